//! LoRAs of a job, from the tags of its prompts to what each pass is told.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::conditioning::{EncodeOptions, Prompts};
use super::{Error, GenerateRequest, Pipeline};
use crate::prompt::{EditRule, ExtraNetwork, ScheduleSteps, schedule};

/// A LoRA file with its strengths.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkFile {
    /// The name the prompt uses.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Factor of its changes to the text encoders.
    pub te_multiplier: f32,
    /// Factor of its changes to the UNet.
    pub unet_multiplier: f32,
    /// Ranks that count; all if `None`.
    pub dyn_dim: Option<usize>,
    /// First 12 hex digits of A1111's LoRA hash; empty while unknown.
    pub hash: String,
    /// When the file was last changed: another time is another version.
    pub modified: Option<SystemTime>,
}

/// A LoRA file that a prompt may name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KnownLora {
    /// The file.
    pub path: PathBuf,
    /// First 12 hex digits of A1111's LoRA hash; empty while unknown.
    pub hash: String,
    /// When the file was last changed: another time is another version.
    pub modified: Option<SystemTime>,
}

/// The networks a job asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Networks {
    /// Those there are, in the order of the prompt.
    pub files: Vec<NetworkFile>,
    /// Names that no file has.
    pub missing: Vec<String>,
    /// Tags of kinds that cannot be applied, as `kind:name`.
    pub unsupported: Vec<String>,
}

impl Networks {
    /// Reads the tags of a prompt; `lookup` gives the file of a name.
    ///
    /// `<lora:NAME:TE:UNET:DYN>` and `<lyco:…>`, where `te=`, `unet=` and `dyn=` go before positions; the text encoders' factor
    /// is 1 by default and the UNet's the text encoders'.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a multiplier that is no finite number and ranks that are no whole number.
    pub fn resolve(
        tags: &[ExtraNetwork],
        lookup: impl Fn(&str) -> Option<KnownLora>,
    ) -> Result<Self, Error> {
        let mut networks = Self::default();
        for tag in tags {
            let name = tag.positional.first().cloned().unwrap_or_default();
            if !is_lora(tag) {
                networks.unsupported.push(format!("{}:{name}", tag.kind));
                continue;
            }
            let te_multiplier = number(tag, "te", 1)?.unwrap_or(1.0);
            let unet_multiplier = number(tag, "unet", 2)?.unwrap_or(te_multiplier);
            let dyn_dim = dyn_dim(tag)?;
            match lookup(&name) {
                Some(KnownLora {
                    path,
                    hash,
                    modified,
                }) => networks.files.push(NetworkFile {
                    name,
                    path,
                    te_multiplier,
                    unet_multiplier,
                    dyn_dim,
                    hash,
                    modified,
                }),
                None if networks.missing.contains(&name) => {}
                None => networks.missing.push(name),
            }
        }
        Ok(networks)
    }

    /// What the user should know about tags that have no effect.
    #[must_use]
    pub fn comments(&self) -> Vec<String> {
        let mut comments = Vec::new();
        if !self.missing.is_empty() {
            comments.push(format!("Lora not found: {}", self.missing.join(", ")));
        }
        comments.extend(self.unsupported.iter().map(|tag| {
            if tag.starts_with("hypernet:") {
                format!("Hypernetworks are not supported: `<{tag}>` was ignored")
            } else {
                format!("Unknown kind of extra network: `<{tag}>` was ignored")
            }
        }));
        comments
    }
}

/// Whether a tag names a LoRA.
pub(super) fn is_lora(tag: &ExtraNetwork) -> bool {
    tag.kind == "lora" || tag.kind == "lyco"
}

/// The argument called `name`, else the one at `position`.
fn argument<'a>(tag: &'a ExtraNetwork, name: &str, position: usize) -> Option<&'a str> {
    let positional = tag.positional.get(position).map(String::as_str);
    tag.named(name).or(positional).map(str::trim)
}

fn number(tag: &ExtraNetwork, name: &str, position: usize) -> Result<Option<f32>, Error> {
    let Some(text) = argument(tag, name, position) else {
        return Ok(None);
    };
    let value = text.parse::<f32>().ok().filter(|value| value.is_finite());
    match value {
        Some(value) => Ok(Some(value)),
        None => Err(invalid(
            tag,
            &format!("multiplier `{text}` is not a number"),
        )),
    }
}

fn dyn_dim(tag: &ExtraNetwork) -> Result<Option<usize>, Error> {
    match argument(tag, "dyn", 3) {
        None => Ok(None),
        Some(text) => match text.parse() {
            Ok(ranks) => Ok(Some(ranks)),
            Err(_) => Err(invalid(tag, &format!("`{text}` is not a number of ranks"))),
        },
    }
}

fn invalid(tag: &ExtraNetwork, problem: &str) -> Error {
    let name = tag.positional.first().map_or("", String::as_str);
    Error::Invalid(format!("`<{}:{name}:…>`: {problem}", tag.kind))
}

/// What a job has to say about its networks.
#[derive(Debug, Default)]
pub(super) struct Remarks {
    pub(super) comments: Vec<String>,
    pub(super) lora_hashes: Vec<String>,
    pub(super) embedding_hashes: Vec<String>,
    /// Whether reading prompt editing by its old rule made a difference.
    pub(super) old_timelines: bool,
}

/// Appends what is not there yet.
fn note(to: &mut Vec<String>, remarks: impl IntoIterator<Item = String>) {
    for remark in remarks {
        if !to.contains(&remark) {
            to.push(remark);
        }
    }
}

impl Pipeline {
    /// Merges a pass's networks and encodes its positive and negative prompt with them.
    pub(super) fn encode_with(
        &mut self,
        networks: &Networks,
        (positive, negative): (&str, &str),
        steps: ScheduleSteps,
        request: &GenerateRequest,
        remarks: &mut Remarks,
    ) -> Result<Prompts, Error> {
        self.merge_noting(networks, remarks)?;
        let bundled = self.networks.embeddings().iter();
        let embeddings = request.embeddings.iter().chain(bundled).map(Arc::clone);
        self.text.set_embeddings(embeddings.collect());
        let prompts = self
            .text
            .prompts(positive, negative, steps, EncodeOptions::of(request))?;
        note(&mut remarks.embedding_hashes, prompts.embedding_hashes());
        let differs =
            |text| schedule(text, steps, EditRule::Old) != schedule(text, steps, EditRule::Current);
        remarks.old_timelines |=
            request.settings.edit_rule == EditRule::Old && (differs(positive) || differs(negative));
        Ok(prompts)
    }

    /// Merges a pass's networks and notes what there is to say about them.
    pub(super) fn merge_noting(
        &mut self,
        networks: &Networks,
        remarks: &mut Remarks,
    ) -> Result<(), Error> {
        self.merge(&networks.files)?;
        note(&mut remarks.comments, networks.comments());
        note(&mut remarks.comments, self.networks.comments());
        note(&mut remarks.lora_hashes, self.networks.hashes());
        Ok(())
    }

    /// Brings the weights to a set of networks.
    pub(super) fn merge(&mut self, wanted: &[NetworkFile]) -> Result<(), Error> {
        if self.networks.holds(wanted) {
            return Ok(());
        }
        let start = Instant::now();
        let reopened;
        let file = if let Some(file) = &self.file {
            file
        } else {
            reopened = self.source.open()?;
            &reopened
        };
        let mut layers = self.text.layers_mut();
        layers.extend(self.unet.layers_mut());
        self.networks.switch(wanted, file, layers)?;
        crate::trim_memory();
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!(networks = wanted.len(), seconds, "LoRAs merged");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::extract_extra_networks;

    fn resolve(prompt: &str) -> Result<Networks, Error> {
        let (_, tags) = extract_extra_networks(prompt);
        Networks::resolve(&tags, |name| {
            (name != "gone").then(|| KnownLora {
                path: name.into(),
                hash: format!("hash of {name}"),
                modified: None,
            })
        })
    }

    #[test]
    fn tags_give_their_strengths_by_position_and_by_name() {
        let networks = resolve(
            "<lora:a> <lora:b:0.5> <lyco:c:0.5: -1 :8> <lora:d:unet=2:te=.25:dyn=4> <lora:gone:1> <lora:gone:2> <hypernet:e:1> <pic:f>",
        )
        .unwrap();
        let strengths: Vec<_> = networks
            .files
            .iter()
            .map(|f| {
                (
                    f.name.as_str(),
                    f.te_multiplier,
                    f.unet_multiplier,
                    f.dyn_dim,
                )
            })
            .collect();
        assert_eq!(
            strengths,
            [
                ("a", 1.0, 1.0, None),
                ("b", 0.5, 0.5, None),
                ("c", 0.5, -1.0, Some(8)),
                ("d", 0.25, 2.0, Some(4)),
            ]
        );
        assert_eq!(
            networks.comments(),
            [
                "Lora not found: gone",
                "Hypernetworks are not supported: `<hypernet:e>` was ignored",
                "Unknown kind of extra network: `<pic:f>` was ignored",
            ]
        );
        for bad in [
            "<lora:a:x>",
            "<lora:a:te=>",
            "<lora:a:nan>",
            "<lora:a:1:inf>",
            "<lora:a:1:1:2.5>",
            "<lora:a:dyn=-1>",
        ] {
            let error = resolve(bad).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{bad}: {error}");
        }
    }
}
