//! The few paths of Gradio that clients of A1111 use: the layout's choices, the login, files that were made.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::network_pages::{decoded, picture};
use super::{App, blocking, vocabulary};

/// `GET /config`: no layout, only the choices that plug-ins read from it.
pub async fn config(State(app): State<Arc<App>>) -> Json<Value> {
    let catalog = app.engine.catalog();
    let latents = vocabulary::LATENT_UPSCALERS.iter();
    let latents = latents.map(|mode| mode.label().to_string());
    let upscalers: Vec<String> = latents.chain(catalog.upscalers().names()).collect();
    let loras = catalog.networks().loras().into_iter().map(|lora| lora.name);
    let loras: Vec<String> = std::iter::once("None".to_string()).chain(loras).collect();
    let dropdown = |id: u8, props: Value| json!({ "id": id, "type": "dropdown", "props": props });
    let components = [
        dropdown(
            1,
            json!({ "elem_id": "txt2img_hr_upscaler", "label": "Upscaler", "choices": upscalers }),
        ),
        dropdown(
            2,
            json!({ "elem_id": "setting_sd_lora", "label": "Add network to prompt", "choices": loras }),
        ),
        json!({ "id": 3, "type": "slider", "props": { "elem_id": "setting_control_net_max_models_num", "value": 0 } }),
        dropdown(4, json!({ "label": "Preprocessor", "choices": ["none"] })),
    ];
    Json(json!({
        "version": "3.41.2",
        "mode": "blocks",
        "dev_mode": false,
        "components": components,
        "dependencies": [],
    }))
}

/// `POST /login`: whoever gets here has been let in; the form is not looked at.
pub async fn login() -> Json<Value> {
    Json(json!({ "success": true }))
}

/// `GET /login_check`.
pub async fn login_check() -> Json<Value> {
    Json(Value::Null)
}

/// `GET /file=PATH`: a picture in one of the output directories. `path` is percent-encoded.
pub async fn file(app: Arc<App>, path: String) -> Response {
    let send = move || {
        let path = PathBuf::from(decoded(&path));
        let options = app.options.snapshot();
        let data = &app.config.data_dir;
        let mut folders = vec![data.join("outputs")];
        for key in options
            .as_map()
            .keys()
            .filter(|key| key.starts_with("outdir_"))
        {
            let folder = options.text(key);
            if !folder.is_empty() {
                folders.push(data.join(folder));
            }
        }
        picture(&data.join(path), &folders)
    };
    let sent: Result<Response, ApiError> = blocking(send).await;
    sent.unwrap_or_else(IntoResponse::into_response)
}
