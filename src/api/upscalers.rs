//! Upscalers by A1111's names, with the options that say how their networks are run; and the lists of them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::options::Options;
use super::{App, vocabulary};
use crate::engine::upscalers::UpscalerCatalog;
use crate::pipeline::{HiresUpscaler, LatentMode, PictureUpscaler, Tiling};

/// What a request may name.
#[derive(Debug, Clone)]
pub struct Upscalers<'a> {
    catalog: &'a UpscalerCatalog,
    tiling: Tiling,
}

impl<'a> Upscalers<'a> {
    /// Those of `catalog`, run as `options` say.
    #[must_use]
    pub fn new(catalog: &'a UpscalerCatalog, options: &Options) -> Self {
        let pixels = |option: &str| usize::try_from(options.int(option)).unwrap_or(0);
        let tiling = Tiling {
            tile: pixels("ESRGAN_tile"),
            overlap: pixels("ESRGAN_tile_overlap"),
        };
        Self { catalog, tiling }
    }

    /// An upscaler of pictures.
    ///
    /// # Errors
    /// A1111's sentence, with every valid name.
    pub fn picture(&self, name: &str) -> Result<PictureUpscaler, String> {
        let found = self.catalog.find(name, self.tiling);
        found.ok_or_else(|| unknown(name, self.catalog.names()))
    }

    /// An upscaler of pictures by name or by the path of a file. For the command line, not for the API.
    ///
    /// # Errors
    /// As [`Self::picture`].
    pub fn picture_or_file(&self, name: &str) -> Result<PictureUpscaler, String> {
        let found = self.catalog.find_or_open(name, self.tiling);
        found.ok_or_else(|| unknown(name, self.catalog.names()))
    }

    /// Hires fix's upscaler; nothing and "" mean `Latent`.
    ///
    /// # Errors
    /// A1111's sentence, with every valid name.
    pub fn hires(&self, name: Option<&str>) -> Result<HiresUpscaler, String> {
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return Ok(HiresUpscaler::Latent(LatentMode::Bilinear));
        };
        if let Some(built_in) = HiresUpscaler::find(name.trim()) {
            return Ok(built_in);
        }
        let found = self.catalog.find(name, self.tiling);
        found.map(HiresUpscaler::Picture).ok_or_else(|| {
            let latents = vocabulary::LATENT_UPSCALERS.iter();
            let latents = latents.map(|mode| mode.label().to_string());
            unknown(name, latents.chain(self.catalog.names()))
        })
    }

    /// The option `upscaler_for_img2img`. A name that is gone enlarges by Lanczos, as in A1111.
    #[must_use]
    pub fn for_img2img(&self, options: &Options) -> PictureUpscaler {
        match options.text("upscaler_for_img2img") {
            "" => PictureUpscaler::None,
            name => self.picture(name).unwrap_or_else(|error| {
                tracing::warn!("option `upscaler_for_img2img`: {error}; Lanczos is used");
                PictureUpscaler::None
            }),
        }
    }
}

fn unknown(name: &str, valid: impl IntoIterator<Item = String>) -> String {
    let shown: String = name.chars().take(100).collect();
    let valid: Vec<String> = valid.into_iter().map(|name| format!("`{name}`")).collect();
    format!(
        "could not find upscaler named {shown}; valid: {}",
        valid.join(", ")
    )
}

/// `GET /sdapi/v1/upscalers`: the three that need no model, `None` first, then the files by name.
pub async fn upscalers(State(app): State<Arc<App>>) -> Json<Value> {
    let row = |name: &str, path: Value, scale: u32| json!({ "name": name, "model_name": null, "model_path": path, "model_url": null, "scale": scale });
    let built_in = PictureUpscaler::BUILT_IN;
    let built_in = built_in.iter().map(|one| row(one.label(), Value::Null, 4));
    let files = app.engine.catalog().upscalers().list();
    let files = files
        .iter()
        .map(|file| row(&file.name, json!(file.path), file.scale));
    Json(built_in.chain(files).collect())
}

/// `GET /sdapi/v1/realesrgan-models`: those of Real-ESRGAN's folder.
pub async fn realesrgan_models(State(app): State<Arc<App>>) -> Json<Value> {
    let files = app.engine.catalog().upscalers().list();
    Json(
        files
            .iter()
            .filter(|file| file.real_esrgan)
            .map(|file| json!({ "name": file.name, "path": file.path, "scale": file.scale }))
            .collect(),
    )
}
