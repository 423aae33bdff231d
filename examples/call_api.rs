//! Starts the server inside this process on a free port and calls it as any client of A1111's API would.
//!
//! `cargo run --release --example call_api` writes `rocket.png`, or the file named as the first argument.

use std::error::Error;

use base64::Engine as _;
use sdgen::api::options::OptionStore;
use sdgen::api::{self, App};
use sdgen::config::Config;
use sdgen::engine::Engine;
use sdgen::engine::backend::PipelineBackend;
use sdgen::engine::history::History;
use sdgen::engine::models::Catalog;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let path = std::env::args().nth(1);
    let path = path.unwrap_or_else(|| "rocket.png".into());

    // The server: port 0 is a free one, the data directory goes away with this program.
    let directory = tempfile::tempdir()?;
    let config = Config {
        data_dir: directory.path().into(),
        ..Config::default()
    };
    let engine = Engine::start(
        Catalog::open(&config),
        config.server.queue_limit,
        PipelineBackend::on_each(&config.device)?,
    )?;
    let options = OptionStore::open(config.settings_file())?;
    let listener = api::serve::bind("127.0.0.1", 0).await?;
    let url = format!("http://{}", listener.local_addr()?);
    let stop = CancellationToken::new();
    let history = History::open(&config.data_dir.join("jobs.sqlite"))?;
    let app = App::new(engine, options, config, history, stop.clone());
    let server = tokio::spawn(api::serve::run(listener, app));

    // The client.
    let picture = tokio::task::spawn_blocking(move || txt2img(&url)).await??;
    std::fs::write(&path, picture)?;
    eprintln!("{path}");

    stop.cancel();
    server.await??;
    Ok(())
}

/// Asks for one picture and returns the bytes of its PNG.
fn txt2img(url: &str) -> Result<Vec<u8>, Failure> {
    let body = json!({
        "prompt": "a rocket, glossy style",
        "seed": 7,
        "steps": 20,
        "cfg_scale": 4,
        "width": 128,
        "height": 128,
    });
    let mut response = ureq::post(format!("{url}/sdapi/v1/txt2img")).send_json(&body)?;
    let answer: Value = response.body_mut().read_json()?;
    let picture = answer["images"][0]
        .as_str()
        .ok_or("the answer has no picture")?;
    Ok(base64::engine::general_purpose::STANDARD.decode(picture)?)
}
