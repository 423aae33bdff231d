//! Settings.

/// What `Version:` says in the infotext.
pub const VERSION_TEXT: &str = "v1.10.1";
