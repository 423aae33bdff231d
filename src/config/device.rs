//! Device, compute type and CUDA kernels as they are typed: `auto`, `cpu`, `cuda:1`; `auto`, `f32`, `bf16`, `f16`, `fp8`; `auto`,
//! `own`, `library`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Device as typed; what it comes to is decided on the device thread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// CUDA if this build and machine have it, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by ordinal.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| {
                    format!("unknown device: `{text}`; use `auto`, `cpu`, `cuda` or `cuda:N`")
                }),
        }
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
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
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
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!(DeviceChoice::Cuda(0).to_string(), "cuda:0");
        let error = "gpu".parse::<DeviceChoice>().unwrap_err();
        assert_eq!(
            error,
            "unknown device: `gpu`; use `auto`, `cpu`, `cuda` or `cuda:N`"
        );
    }
}
