//! Whose kernels run where a library has one too.

use std::fmt;

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

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Own => "own",
            Self::Library => "library",
        })
    }
}
