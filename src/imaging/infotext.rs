//! The `parameters` text.

/// Ordered key-value pairs of the parameter line.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Params {}
