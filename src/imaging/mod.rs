//! Files, infotext and 8-bit pictures.
pub mod infotext;
