//! Files, infotext and 8-bit pictures.
//!
//! Reads and writes PNG, JPEG and WebP with their texts, names and saves files as A1111 does, and holds the picture operations
//! of the img2img path with Pillow's results to the bit. Everything is a function of its arguments: the time is passed in,
//! and only [`save`] touches the disk. Sizes are pixels, `(width, height)`, rows from the top.

mod blur;
mod color;
mod composite;
mod decode;
mod encode;
mod exif;
mod fit;
mod grid;
pub mod infotext;
pub mod inpaint;
mod metadata;
pub mod naming;
mod resize;
mod save;
mod soft_overlay;

use std::path::PathBuf;

pub use blur::{Direction, blur_mask, gaussian_blur};
pub use color::ColorReference;
pub use composite::{
    alpha_composite, blend, flatten, invert, paste, paste_masked, to_grey, to_rgb, to_rgba,
};
pub use decode::{Limits, decode, decode_base64};
pub use encode::{EncodeOptions, Encoded, Format, Pixels, encode};
pub use fit::{Placement, ResizeMode, fit, fit_with, placement, upscale_to};
pub use grid::{GridShape, grid, grid_shape};
pub use metadata::{Metadata, read_metadata};
pub use resize::{Filter, resize};
pub use save::{SaveRequest, save};
pub use soft_overlay::soft_overlay;

/// What can go wrong with a picture or its file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not base64, nor a data URL of a picture.
    #[error("invalid base64 picture: {problem}")]
    Base64 {
        /// What is wrong with it.
        problem: &'static str,
        /// The decoder's words.
        #[source]
        source: Option<base64::DecodeError>,
    },
    /// The bytes are no PNG, JPEG or WebP.
    #[error("unknown picture format; use PNG, JPEG or WebP")]
    UnknownFormat,
    /// A setting names no format.
    #[error("unknown picture format: `{0}`; use `png`, `jpg` or `webp`")]
    UnknownFormatName(String),
    /// The picture is larger than allowed.
    #[error("picture of {width}x{height} pixels is larger than the limit of {limit}")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// The limit that was passed, in words.
        limit: String,
    },
    /// The bytes are damaged, or use a variant of the format that cannot be read.
    #[error("picture cannot be read")]
    Decode(#[source] image::ImageError),
    /// The picture cannot be written in this format.
    #[error("picture cannot be written as {format}")]
    Encode {
        /// The format asked for.
        format: Format,
        /// The encoder's words.
        #[source]
        source: image::ImageError,
    },
    /// The PNG encoder failed.
    #[error("picture cannot be written as PNG")]
    EncodePng(#[from] png::EncodingError),
    /// A JPEG holds at most 64 KiB of metadata.
    #[error(
        "infotext of {bytes} bytes does not fit into a JPEG, which takes {limit}; use PNG or WebP"
    )]
    TextTooLong {
        /// Bytes of the metadata.
        bytes: usize,
        /// Bytes a JPEG takes.
        limit: usize,
    },
    /// A setting names no way to resize.
    #[error("unknown resize mode: `{0}`; use 0 (stretch), 1 (crop) or 2 (fill)")]
    UnknownResizeMode(String),
    /// A picture has no pixels.
    #[error("picture of {width}x{height} pixels is empty")]
    Empty {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// A file could not be written.
    #[error("cannot write `{path}`")]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Every number tried in a directory was taken.
    #[error("no free file name in `{directory}` after {tried} tries")]
    NoFreeName {
        /// The directory.
        directory: PathBuf,
        /// How many names were tried.
        tried: usize,
    },
}
