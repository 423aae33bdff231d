//! (weights)

/// Placeholder until the room is built.
#[derive(Debug, thiserror::Error)]
#[error("weights")]
pub struct Error;
