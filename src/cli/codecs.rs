//! `--vae-decoder` and `--vae-encoder`: the VAE, or TAESD in its place.

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::Stop;
use crate::engine::approximations::{Approximations, TaesdHalf};
use crate::pipeline::{Codec, GenerateRequest};

/// What stands between pictures and latents.
#[derive(Debug, Clone, Copy, Args)]
pub struct CodecArgs {
    /// What makes pictures of latents
    #[arg(long, value_enum, value_name = "METHOD", default_value_t = Method::Full)]
    pub vae_decoder: Method,
    /// What makes latents of pictures
    #[arg(long, value_enum, value_name = "METHOD", default_value_t = Method::Full)]
    pub vae_encoder: Method,
}

/// A way between pictures and latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// The VAE
    Full,
    /// The tiny autoencoder: fast and coarse, downloaded when first used
    Taesd,
}

impl CodecArgs {
    /// Puts the choice into a request. Blocks for seconds while TAESD is downloaded.
    ///
    /// # Errors
    /// Exit 1 if TAESD is neither there nor to be had.
    pub fn apply(self, files: &Approximations, request: &mut GenerateRequest) -> Result<(), Stop> {
        let codec = |method, half| match method {
            Method::Full => Ok(Codec::Full),
            Method::Taesd => files.taesd(half).map(Codec::Taesd).map_err(Stop::failed),
        };
        request.vae.decoder = codec(self.vae_decoder, TaesdHalf::Decoder)?;
        request.vae.encoder = codec(self.vae_encoder, TaesdHalf::Encoder)?;
        Ok(())
    }

    /// Puts the choice into the overrides of a request to a server, which keeps its own if nothing was asked for.
    pub fn add_to(self, overrides: &mut Value) {
        for (key, method) in [
            ("sd_vae_decode_method", self.vae_decoder),
            ("sd_vae_encode_method", self.vae_encoder),
        ] {
            if method == Method::Taesd {
                overrides[key] = json!("TAESD");
            }
        }
    }
}
