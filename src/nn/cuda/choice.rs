//! Whose kernels run where a library has one too.

use std::fmt;
use std::str::FromStr;

/// Whose kernels run where NVIDIA's libraries have one too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum KernelChoice {
    /// Whichever is measured to be faster on the first use of a shape, among those that agree with ours.
    #[default]
    Auto,
    /// Ours alone.
    Own,
    /// The library's first suggestion; ours where it has none.
    Library,
}

impl FromStr for KernelChoice {
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

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Own => "own",
            Self::Library => "library",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_parse_as_they_print() {
        for choice in [
            KernelChoice::Auto,
            KernelChoice::Own,
            KernelChoice::Library,
        ] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("cutlass".parse::<KernelChoice>().unwrap_err().contains("`own`"));
    }
}
