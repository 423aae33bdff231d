//! A1111's prompt language.

/// How attention weights act on the encoders' output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Emphasis {
    /// Multiply, then restore the mean.
    #[default]
    Original,
}
