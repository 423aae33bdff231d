//! LoRAs in the weights of a loaded model, and out again.
//!
//! The set in effect is remembered with the weights it changed. Another set touches only weights for which the two differ; each
//! is computed from the checkpoint's own values, so that an empty set gives back the very bits that were loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use rayon::prelude::*;

use super::Error;
use super::networks::NetworkFile;
use crate::nn::{Origin, Rewrite};
use crate::weights::Source;
use crate::weights::embedding::Embedding;
use crate::weights::lora::{LoraFile, Plan, Strength, Targets, Use};

/// What one file does to one weight.
#[derive(Debug, Clone, PartialEq)]
struct Change {
    path: PathBuf,
    modified: Option<SystemTime>,
    strength: Strength,
}

/// A weight that is, or may be, not the checkpoint's.
#[derive(Debug, Default)]
struct Touched {
    /// `None` if a failed switch left it in an unknown state.
    changes: Option<Vec<Change>>,
    /// Names of the files whose module failed here.
    failures: Vec<String>,
}

/// The networks merged into a pipeline's weights.
#[derive(Debug, Default)]
pub struct MergedNetworks {
    files: Vec<NetworkFile>,
    /// Those of `files` that could be opened.
    loaded: Vec<NetworkFile>,
    /// Whether the weights hold `files`.
    complete: bool,
    touched: BTreeMap<String, Touched>,
    comments: Vec<String>,
    embeddings: Vec<Arc<Embedding>>,
}

impl MergedNetworks {
    /// Makes `layers`, built from `source`, hold exactly `wanted`. Returns whether any weight or embedding may have changed.
    ///
    /// A file that cannot be opened and modules that do not fit are left out; [`Self::comments`] says so.
    ///
    /// # Errors
    /// When the checkpoint cannot be read again or the device refuses a weight. The next call repairs what that left.
    pub fn switch(
        &mut self,
        wanted: &[NetworkFile],
        source: &dyn Source,
        layers: Vec<&mut dyn Rewrite>,
    ) -> Result<bool, Error> {
        if self.holds(wanted) {
            return Ok(false);
        }
        self.complete = false;
        let (loaded, files) = self.open(wanted);
        let uses: Vec<Use<'_>> = loaded
            .iter()
            .zip(&files)
            .map(|(network, file)| Use {
                file,
                te_multiplier: network.te_multiplier,
                unet_multiplier: network.unet_multiplier,
                dyn_dim: network.dyn_dim,
            })
            .collect();
        let plan = Plan::new(&Targets::new(source), &uses);
        for ((network, file), matched) in loaded.iter().zip(&files).zip(plan.matched()) {
            if *matched == 0 {
                let (name, modules) = (&network.name, file.modules());
                self.comments.push(format!("LoRA `{name}` has no effect: none of its {modules} modules is part of this checkpoint"));
            }
        }
        let todo = self.differing(&plan, &loaded);
        for key in &todo {
            self.touched.entry(key.clone()).or_default().changes = None;
        }
        let failures = rewrite(layers, &todo, &plan, source)?;
        for key in todo {
            let changes = changes(&plan, &loaded, &key);
            if changes.is_empty() {
                self.touched.remove(&key);
            } else if let Some(touched) = self.touched.get_mut(&key) {
                touched.changes = Some(changes);
                touched.failures.clear();
            }
        }
        for (key, networks) in failures {
            if let Some(touched) = self.touched.get_mut(&key) {
                let names = networks.into_iter().map(|i| loaded[i].name.clone());
                touched.failures = names.collect();
            }
        }
        self.files = wanted.to_vec();
        self.loaded = loaded;
        self.complete = true;
        Ok(true)
    }

    /// Whether the weights hold exactly this set.
    #[must_use]
    pub fn holds(&self, wanted: &[NetworkFile]) -> bool {
        (self.complete || self.touched.is_empty() && wanted.is_empty()) && self.files == wanted
    }

    /// Opens the files of a set, and takes over what they say besides weights.
    fn open(&mut self, wanted: &[NetworkFile]) -> (Vec<NetworkFile>, Vec<LoraFile>) {
        self.comments.clear();
        self.embeddings.clear();
        let (mut loaded, mut files) = (Vec::new(), Vec::new());
        for network in wanted {
            match LoraFile::open(&network.path) {
                Ok(file) => {
                    self.embeddings
                        .extend(file.embeddings().into_iter().map(Arc::new));
                    loaded.push(network.clone());
                    files.push(file);
                }
                Err(error) => {
                    tracing::warn!(name = network.name, %error, "LoRA skipped");
                    self.comments
                        .push(format!("LoRA `{}` cannot be used: {error}", network.name));
                }
            }
        }
        (loaded, files)
    }

    /// Keys of the weights that are not what `plan` wants.
    fn differing(&self, plan: &Plan<'_>, loaded: &[NetworkFile]) -> BTreeSet<String> {
        let held = self.touched.keys().map(String::as_str);
        let keys: BTreeSet<&str> = held.chain(plan.keys()).collect();
        let differs = |key: &str| {
            let held = self.touched.get(key).map(|touched| &touched.changes);
            let wanted = changes(plan, loaded, key);
            held.map_or(!wanted.is_empty(), |held| held.as_ref() != Some(&wanted))
        };
        keys.into_iter()
            .filter(|key| differs(key))
            .map(str::to_string)
            .collect()
    }

    /// What the user should know about the set in effect.
    #[must_use]
    pub fn comments(&self) -> Vec<String> {
        let mut comments = self.comments.clone();
        let failed = |name: &str| {
            let failures = self.touched.values().flat_map(|touched| &touched.failures);
            failures.filter(|failure| *failure == name).count()
        };
        let names: BTreeSet<&str> = self.loaded.iter().map(|n| n.name.as_str()).collect();
        let errors: Vec<String> = names
            .into_iter()
            .map(|name| (name, failed(name)))
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} ({count})"))
            .collect();
        if !errors.is_empty() {
            comments.push(format!("Networks with errors: {}", errors.join(", ")));
        }
        comments
    }

    /// `NAME: HASH` of each file in effect whose hash is known.
    #[must_use]
    pub fn hashes(&self) -> Vec<String> {
        let known = self
            .loaded
            .iter()
            .filter(|network| !network.hash.is_empty());
        known
            .map(|network| format!("{}: {}", network.name.replace([':', ','], ""), network.hash))
            .collect()
    }

    /// Textual inversions packed into the files of the set.
    #[must_use]
    pub fn embeddings(&self) -> &[Arc<Embedding>] {
        &self.embeddings
    }
}

fn changes(plan: &Plan<'_>, loaded: &[NetworkFile], key: &str) -> Vec<Change> {
    let change = |(network, strength): (usize, Strength)| Change {
        path: loaded[network].path.clone(),
        modified: loaded[network].modified,
        strength,
    };
    plan.contributions(key).into_iter().map(change).collect()
}

/// Writes every layer that a key of `todo` is part of; returns the networks whose modules failed, by key.
fn rewrite(
    layers: Vec<&mut dyn Rewrite>,
    todo: &BTreeSet<String>,
    plan: &Plan<'_>,
    source: &dyn Source,
) -> Result<Vec<(String, Vec<usize>)>, Error> {
    let touched = |layer: &&mut dyn Rewrite| layer.origins().iter().any(|o| todo.contains(&o.key));
    let layers: Vec<_> = layers.into_iter().filter(touched).collect();
    let failures: Vec<_> = layers
        .into_par_iter()
        .with_max_len(1)
        .map(|layer| rewrite_layer(layer, plan, source))
        .collect::<Result<_, Error>>()?;
    Ok(failures.into_iter().flatten().collect())
}

/// Writes all tensors of a layer.
fn rewrite_layer(
    layer: &mut dyn Rewrite,
    plan: &Plan<'_>,
    source: &dyn Source,
) -> Result<Vec<(String, Vec<usize>)>, Error> {
    let origins: Vec<Origin> = layer.origins().to_vec();
    let (mut failures, mut biases) = (Vec::new(), Vec::new());
    for origin in &origins {
        let merged = plan.merge(source, &origin.key)?;
        layer.write_weight(origin.first_row, &merged.weight)?;
        biases.push(merged.bias);
        if !merged.failures.is_empty() {
            failures.push((origin.key.clone(), merged.failures));
        }
    }
    if biases.iter().all(Option::is_none) {
        layer.remove_bias();
    } else {
        for (origin, bias) in origins.iter().zip(biases) {
            let bias = bias.unwrap_or_else(|| vec![0.0; origin.rows]);
            layer.write_bias(origin.first_row, &bias)?;
        }
    }
    Ok(failures)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Device};

    use super::*;
    use crate::models::{TextTower, Unet};
    use crate::nn::Placement;
    use crate::weights::SafetensorsFile;

    fn golden(name: &str) -> Vec<u8> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.zst"));
        zstd::stream::decode_all(std::fs::read(path).unwrap().as_slice()).unwrap()
    }

    /// The tiny checkpoint, stored as all even bytes, then all odd ones.
    fn tiny() -> Vec<u8> {
        let planes = golden("tiny_sdxl.safetensors.planes");
        let (even, odd) = planes.split_at(planes.len() / 2);
        even.iter().zip(odd).flat_map(|(e, o)| [*e, *o]).collect()
    }

    /// A model of all three parts.
    struct Parts {
        source: SafetensorsFile,
        towers: [TextTower; 2],
        unet: Unet,
    }

    impl Parts {
        fn load(place: &Placement) -> Self {
            let source = SafetensorsFile::from_vec(Path::new("tiny"), tiny()).unwrap();
            Self {
                towers: [
                    TextTower::clip_l(&source, place).unwrap(),
                    TextTower::big_g(&source, place).unwrap(),
                ],
                unet: Unet::new(&source, place).unwrap(),
                source,
            }
        }

        fn layers(&mut self) -> Vec<&mut dyn Rewrite> {
            let towers = self.towers.iter_mut().flat_map(TextTower::layers_mut);
            towers.chain(self.unet.layers_mut()).collect()
        }

        fn stored(&mut self) -> Vec<Vec<u32>> {
            let bits =
                |layer: &mut dyn Rewrite| layer.stored().iter().map(|x| x.to_bits()).collect();
            self.layers().into_iter().map(bits).collect()
        }

        fn switch(&mut self, networks: &mut MergedNetworks, set: &[NetworkFile]) {
            let towers = self.towers.iter_mut().flat_map(TextTower::layers_mut);
            let layers = towers.chain(self.unet.layers_mut()).collect();
            networks.switch(set, &self.source, layers).unwrap();
        }
    }

    #[test]
    fn every_weight_of_the_models_knows_its_tensor() {
        let mut parts = Parts::load(&Placement::cpu());
        let known: BTreeSet<String> = parts
            .layers()
            .iter()
            .flat_map(|layer| layer.origins().iter().map(|o| o.key.clone()))
            .collect();
        let missing: Vec<&str> = parts
            .source
            .keys()
            .into_iter()
            .filter(|key| !key.starts_with("first_stage_model.") && !key.contains("embedding"))
            .filter(|key| key.ends_with("weight") && !known.contains(*key))
            .collect();
        // SDXL does not use CLIP-L's last norm.
        assert_eq!(
            missing,
            ["conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"]
        );
    }

    #[test]
    fn taking_a_set_off_restores_every_packed_bit() {
        let folder = tempfile::tempdir().unwrap();
        let network = |name: &str, multiplier: f32| {
            let path = folder.path().join(name);
            std::fs::write(&path, golden(&format!("lora/{name}.safetensors"))).unwrap();
            NetworkFile {
                name: name.into(),
                path,
                te_multiplier: multiplier,
                unet_multiplier: multiplier,
                dyn_dim: None,
                hash: String::new(),
                modified: None,
            }
        };
        let types = [DType::F32, DType::BF16, DType::F8E4M3];
        for place in types.map(|dtype| Placement::new(Device::Cpu, dtype)) {
            let (mut parts, mut networks) = (Parts::load(&place), MergedNetworks::default());
            let plain = parts.stored();
            let (a, b) = (network("full_te", 0.7), network("locon_noalpha", 1.3));
            parts.switch(&mut networks, std::slice::from_ref(&a));
            let with_a = parts.stored();
            assert_ne!(with_a, plain);
            parts.switch(&mut networks, &[a.clone(), b.clone()]);
            assert_ne!(parts.stored(), with_a);
            parts.switch(&mut networks, std::slice::from_ref(&b));
            parts.switch(&mut networks, &[a]);
            assert!(parts.stored() == with_a, "the way to a set leaves no trace");
            parts.switch(&mut networks, &[]);
            assert!(parts.stored() == plain, "the empty set is the checkpoint");
            assert!(networks.touched.is_empty());
        }
    }

    #[test]
    fn only_weights_for_which_two_sets_differ_are_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("full_te");
        std::fs::write(&path, golden("lora/full_te.safetensors")).unwrap();
        let network = |te_multiplier| NetworkFile {
            name: "full_te".into(),
            path: path.clone(),
            te_multiplier,
            unet_multiplier: 1.0,
            dyn_dim: None,
            hash: String::new(),
            modified: None,
        };
        let (mut parts, mut networks) = (Parts::load(&Placement::cpu()), MergedNetworks::default());
        parts.switch(&mut networks, &[network(0.5)]);
        let (loaded, files) = networks.open(&[network(0.25)]);
        let used = Use {
            file: &files[0],
            te_multiplier: 0.25,
            unet_multiplier: 1.0,
            dyn_dim: None,
        };
        let plan = Plan::new(&Targets::new(&parts.source), &[used]);
        let todo = networks.differing(&plan, &loaded);
        assert!(!todo.is_empty() && todo.len() < plan.keys().count());
        assert!(
            todo.iter().all(|key| key.starts_with("conditioner.")),
            "{todo:?}"
        );
    }
}
