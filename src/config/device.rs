//! Devices, compute type and CUDA kernels as they are typed: `auto`, `cpu`, `cuda:0,cuda:1`, `all`; `auto`, `f32`, `bf16`, `f16`, `fp8`;
//! `auto`, `own`, `library`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Devices as typed, one worker for each; what `auto` and `all` come to is decided when they are opened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first CUDA device if this build and machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU; always one worker, since its threads work on one job together.
    Cpu,
    /// CUDA devices by ordinal: at least one, each once.
    Cuda(Vec<usize>),
    /// Every CUDA device of the machine.
    All,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "all" => return Ok(Self::All),
            _ => {}
        }
        let mut ordinals = Vec::new();
        for name in text.split(',').map(str::trim) {
            let ordinal = match name {
                "cuda" => Some(0),
                other => other
                    .strip_prefix("cuda:")
                    .and_then(|ordinal| ordinal.parse().ok()),
            };
            let ordinal = ordinal.ok_or_else(|| {
                format!(
                    "unknown device: `{name}`; use `auto`, `cpu`, `cuda`, `cuda:N`, several as `cuda:0,cuda:1`, or `all`"
                )
            })?;
            if ordinals.contains(&ordinal) {
                return Err(format!("device named twice: `cuda:{ordinal}`"));
            }
            ordinals.push(ordinal);
        }
        Ok(Self::Cuda(ordinals))
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::All => f.write_str("all"),
            Self::Cuda(ordinals) => {
                let names = ordinals.iter().map(|ordinal| format!("cuda:{ordinal}"));
                f.write_str(&names.collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// Compute type as typed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum DtypeChoice {
    /// f32 on the CPU, f16 on CUDA.
    #[default]
    Auto,
    /// 32-bit float.
    F32,
    /// Brain float.
    Bf16,
    /// Half float.
    F16,
    /// e4m3 in the UNet's linear layers over tokens, brain float elsewhere.
    Fp8,
}

impl FromStr for DtypeChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            "fp8" => Ok(Self::Fp8),
            _ => Err(format!(
                "unknown dtype: `{text}`; use `auto`, `f32`, `bf16`, `f16` or `fp8`"
            )),
        }
    }
}

impl TryFrom<String> for DtypeChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Whose kernels run on CUDA where NVIDIA's libraries have one too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum CudaKernels {
    /// Whichever is measured to be faster, shape by shape.
    #[default]
    Auto,
    /// Ours.
    Own,
    /// The library's, as far as it has them.
    Library,
}

impl FromStr for CudaKernels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "own" => Ok(Self::Own),
            "library" => Ok(Self::Library),
            _ => Err(format!(
                "unknown CUDA kernels: `{text}`; use `auto`, `own` or `library`"
            )),
        }
    }
}

impl TryFrom<String> for CudaKernels {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_parse_as_they_are_printed() {
        for (name, choice) in [("bf16", DtypeChoice::Bf16), ("fp8", DtypeChoice::Fp8)] {
            assert_eq!(name.parse(), Ok(choice));
            assert_eq!(serde_json::to_value(choice).unwrap(), name);
        }
        assert!("f8".parse::<DtypeChoice>().unwrap_err().contains("`fp8`"));
    }

    #[test]
    fn devices_parse_and_print() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(vec![3])));
        for text in ["auto", "cpu", "all", "cuda:0", "cuda:2,cuda:0"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        let several: DeviceChoice = "cuda, cuda:1".parse().unwrap();
        assert_eq!(several.to_string(), "cuda:0,cuda:1");
        let error = |text: &str| text.parse::<DeviceChoice>().unwrap_err();
        assert_eq!(
            error("gpu"),
            "unknown device: `gpu`; use `auto`, `cpu`, `cuda`, `cuda:N`, several as `cuda:0,cuda:1`, or `all`"
        );
        assert!(
            error("cuda:0,cpu").starts_with("unknown device: `cpu`"),
            "the CPU works alone"
        );
        assert!(error("cuda:0,").starts_with("unknown device: ``"));
        assert_eq!(error("cuda,cuda:0"), "device named twice: `cuda:0`");
    }
}
