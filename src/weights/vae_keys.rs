//! A VAE file in diffusers' naming, seen under the names of the LDM checkpoints.
//!
//! The table is the pipeline specification's, 1.3: levels of the decoder are counted from the other end, attention is linear
//! where LDM has 1x1 convolutions (shapes are left alone, readers take both), and older files call its parts `query`, `key`,
//! `value` and `proj_attn`.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Error, Held, Source};

/// Fixed parts of a name, diffusers' and LDM's.
const PARTS: &[(&str, &str)] = &[
    ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
    (".query.", ".q."),
    (".key.", ".k."),
    (".value.", ".v."),
    (".proj_attn.", ".proj_out."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".resnets.", ".block."),
];

/// No VAE has as many levels.
const MAX_LEVELS: usize = 64;

/// A diffusers VAE under LDM's names, without prefix.
pub struct LdmVae<'a> {
    file: &'a dyn Source,
    /// LDM's name to the file's.
    names: BTreeMap<String, String>,
}

impl<'a> LdmVae<'a> {
    /// The view, if the file is in diffusers' naming.
    #[must_use]
    pub fn of(file: &'a dyn Source) -> Option<Self> {
        const MARK: &str = "decoder.mid_block.resnets.0.conv1.weight";
        let prefix = ["", "vae."]
            .into_iter()
            .find(|prefix| file.shape(&format!("{prefix}{MARK}")).is_some())?;
        let levels = (0..MAX_LEVELS)
            .take_while(|i| {
                let key = format!("{prefix}decoder.up_blocks.{i}.resnets.0.conv1.weight");
                file.shape(&key).is_some()
            })
            .count();
        let names = file
            .keys()
            .into_iter()
            .filter_map(|key| Some((ldm_name(key.strip_prefix(prefix)?, levels), key.into())))
            .collect();
        Some(Self { file, names })
    }

    fn name(&self, key: &str) -> Option<&str> {
        self.names.get(key).map(String::as_str)
    }
}

/// LDM's name of a diffusers key; `levels` of the decoder.
fn ldm_name(key: &str, levels: usize) -> String {
    let mut name = key.to_string();
    for (diffusers, ldm) in PARTS {
        name = name.replace(diffusers, ldm);
    }
    for (blocks, level, reversed) in [
        ("down_blocks.", "down.", false),
        ("up_blocks.", "up.", true),
    ] {
        let Some((before, after)) = name.split_once(blocks) else {
            continue;
        };
        let Some((number, rest)) = after.split_once('.') else {
            continue;
        };
        let Ok(number) = number.parse::<usize>() else {
            continue;
        };
        let number = if reversed && number < levels {
            levels - 1 - number
        } else {
            number
        };
        name = format!("{before}{level}{number}.{rest}");
    }
    name
}

impl Source for LdmVae<'_> {
    fn path(&self) -> &Path {
        self.file.path()
    }
    fn keys(&self) -> Vec<&str> {
        self.names.keys().map(String::as_str).collect()
    }
    fn shape(&self, key: &str) -> Option<&[usize]> {
        self.file.shape(self.name(key)?)
    }
    fn metadata(&self, key: &str) -> Option<&str> {
        self.file.metadata(key)
    }
    fn read(&self, key: &str) -> Result<Vec<f32>, Error> {
        match self.name(key) {
            Some(name) => self.file.read(name),
            None => Err(Error::Missing {
                path: self.path().into(),
                key: key.into(),
            }),
        }
    }
    fn hold(&self, key: &str) -> Result<Held<'_>, Error> {
        match self.name(key) {
            Some(name) => self.file.hold(name),
            None => self.read(key).map(Held::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_tables() {
        for (diffusers, ldm) in [
            ("encoder.conv_norm_out.bias", "encoder.norm_out.bias"),
            (
                "encoder.down_blocks.2.resnets.1.conv_shortcut.weight",
                "encoder.down.2.block.1.nin_shortcut.weight",
            ),
            (
                "encoder.down_blocks.0.downsamplers.0.conv.weight",
                "encoder.down.0.downsample.conv.weight",
            ),
            (
                "decoder.up_blocks.0.resnets.2.norm1.weight",
                "decoder.up.3.block.2.norm1.weight",
            ),
            (
                "decoder.up_blocks.2.upsamplers.0.conv.bias",
                "decoder.up.1.upsample.conv.bias",
            ),
            (
                "decoder.mid_block.attentions.0.to_out.0.bias",
                "decoder.mid.attn_1.proj_out.bias",
            ),
            (
                "decoder.mid_block.attentions.0.query.weight",
                "decoder.mid.attn_1.q.weight",
            ),
            (
                "encoder.mid_block.attentions.0.group_norm.weight",
                "encoder.mid.attn_1.norm.weight",
            ),
            (
                "decoder.mid_block.resnets.1.conv2.bias",
                "decoder.mid.block_2.conv2.bias",
            ),
            ("quant_conv.weight", "quant_conv.weight"),
        ] {
            assert_eq!(ldm_name(diffusers, 4), ldm);
        }
    }
}
