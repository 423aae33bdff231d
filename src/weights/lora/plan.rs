//! A set of LoRA files on one checkpoint: which weights it touches, and the merged value of each.

use std::collections::BTreeMap;

use super::delta::{Strength, Weight, apply};
use super::{Error, LoraFile, Module, Target, Targets};
use crate::weights::{self, Source};

/// One file with its strengths.
#[derive(Debug, Clone, Copy)]
pub struct Use<'a> {
    /// The file.
    pub file: &'a LoraFile,
    /// Multiplier of the text encoders' modules.
    pub te_multiplier: f32,
    /// Multiplier of the UNet's modules.
    pub unet_multiplier: f32,
    /// Ranks that count; see [`Strength`].
    pub dyn_dim: Option<usize>,
}

struct Edit<'a> {
    network: usize,
    file: &'a LoraFile,
    module: &'a Module,
    name: &'a str,
    target: Target,
    strength: Strength,
}

/// The edits of a set of files, by checkpoint key, in the order of the set.
pub struct Plan<'a> {
    edits: BTreeMap<String, Vec<Edit<'a>>>,
    matched: Vec<usize>,
}

impl std::fmt::Debug for Plan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Plan({} weights)", self.edits.len())
    }
}

/// One weight with a set of files merged in.
#[derive(Debug)]
pub struct Merged {
    /// Values of the weight.
    pub weight: Vec<f32>,
    /// Values of its bias; `None` if it has none.
    pub bias: Option<Vec<f32>>,
    /// Positions in the set of the files whose module failed here; it was skipped.
    pub failures: Vec<usize>,
}

impl<'a> Plan<'a> {
    /// Matches the modules of every file with the checkpoint's. What matches nothing is logged and left out.
    #[must_use]
    pub fn new(targets: &Targets, uses: &[Use<'a>]) -> Self {
        let mut edits: BTreeMap<String, Vec<Edit<'a>>> = BTreeMap::new();
        let mut matched = vec![0; uses.len()];
        for (network, used) in uses.iter().enumerate() {
            for (name, module) in &used.file.modules {
                let Some(target) = targets.find(name) else {
                    tracing::debug!(file = %used.file.file.path().display(), module = name, "unmatched module");
                    continue;
                };
                matched[network] += 1;
                let multiplier = if target.text_encoder {
                    used.te_multiplier
                } else {
                    used.unet_multiplier
                };
                edits.entry(target.weight.clone()).or_default().push(Edit {
                    network,
                    file: used.file,
                    module,
                    name,
                    target: target.clone(),
                    strength: Strength {
                        multiplier,
                        dyn_dim: used.dyn_dim,
                    },
                });
            }
        }
        Self { edits, matched }
    }

    /// Keys of the weights that change.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.edits.keys().map(String::as_str)
    }

    /// For each file of the set, how many of its modules this checkpoint has.
    #[must_use]
    pub fn matched(&self) -> &[usize] {
        &self.matched
    }

    /// Which files of the set change a weight, by position, and how strongly; empty for one that does not change.
    #[must_use]
    pub fn contributions(&self, key: &str) -> Vec<(usize, Strength)> {
        let edits = self.edits.get(key).map(Vec::as_slice).unwrap_or_default();
        let mut out: Vec<(usize, Strength)> =
            edits.iter().map(|e| (e.network, e.strength)).collect();
        out.dedup();
        out
    }

    /// The weight `key` and its bias from `source`, with every module of the plan added in order.
    ///
    /// A key that the plan does not touch comes back as it is.
    ///
    /// # Errors
    /// When the checkpoint's own tensor cannot be read.
    pub fn merge(&self, source: &dyn Source, key: &str) -> Result<Merged, weights::Error> {
        let mut weight = source.read(key)?;
        let mut bias = match bias_key(key).filter(|bias| source.shape(bias).is_some()) {
            Some(bias) => Some(source.read(&bias)?),
            None => None,
        };
        let shape = source.shape(key).unwrap_or_default();
        let mut failures = Vec::new();
        for edit in self.edits.get(key).map(Vec::as_slice).unwrap_or_default() {
            if let Err(error) = edit.apply(&mut weight, shape, &mut bias) {
                tracing::debug!(file = %edit.file.file.path().display(), module = edit.name, %error, "module skipped");
                failures.push(edit.network);
            }
        }
        Ok(Merged {
            weight,
            bias,
            failures,
        })
    }
}

impl Edit<'_> {
    fn apply(
        &self,
        weight: &mut Vec<f32>,
        shape: &[usize],
        bias: &mut Option<Vec<f32>>,
    ) -> Result<(), Error> {
        let rows = self.target.rows.clone();
        let outputs = shape.first().copied().unwrap_or(1);
        let row = weight.len() / outputs.max(1);
        let mut part_shape = shape.to_vec();
        if let Some(first) = part_shape.first_mut() {
            *first = rows.len();
        }
        let part = Weight {
            values: &weight[rows.start * row..rows.end * row],
            shape: &part_shape,
        };
        let changed = apply(&self.file.file, self.module, part, self.strength)?;
        if rows.len() == outputs {
            *weight = changed.weight;
        } else {
            weight[rows.start * row..rows.end * row].copy_from_slice(&changed.weight);
        }
        if let Some(delta) = changed.bias {
            let bias = bias.get_or_insert_with(|| vec![0.0; outputs]);
            let part = bias[rows].iter_mut();
            part.zip(delta).for_each(|(x, d)| *x += d);
        }
        Ok(())
    }
}

/// Key of the bias beside a weight.
pub(crate) fn bias_key(weight: &str) -> Option<String> {
    if let Some(module) = weight.strip_suffix(".weight") {
        return Some(format!("{module}.bias"));
    }
    let attention = weight.strip_suffix("in_proj_weight")?;
    Some(format!("{attention}in_proj_bias"))
}
