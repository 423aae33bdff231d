//! `sdgen prompt --server URL`: the same job on a server that speaks A1111's API.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::from_image::Start;
use super::output::{Form, Output, Report, Seconds};
use super::prompt::{Choices, PromptArgs, progress_bar};
use super::{Stop, Verbosity};
use crate::api::resolve::task_id;
use crate::imaging::{self, Format};
use crate::shutdown;

/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(300);

/// A server and how to speak to it.
#[derive(Debug, Clone)]
struct Server {
    base: String,
    authorization: Option<String>,
    agent: ureq::Agent,
}

impl Server {
    fn new(url: &str) -> Result<Self, Stop> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        if !matches!(scheme, "http" | "https") || rest.is_empty() {
            return Err(Stop::usage_text(format!(
                "`--server`: not an http or https address: `{url}`"
            )));
        }
        let (credentials, host) = rest
            .rsplit_once('@')
            .map_or((None, rest), |(user, host)| (Some(user), host));
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build()
            .into();
        Ok(Self {
            base: format!("{scheme}://{}", host.trim_end_matches('/')),
            authorization: credentials.map(|pair| format!("Basic {}", STANDARD.encode(pair))),
            agent,
        })
    }

    fn get(&self, path: &str) -> anyhow::Result<Value> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some(value) = &self.authorization {
            request = request.header("authorization", value);
        }
        self.read(request.call())
    }

    fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let mut request = self.agent.post(format!("{}{path}", self.base));
        if let Some(value) = &self.authorization {
            request = request.header("authorization", value);
        }
        self.read(request.send_json(body))
    }

    fn read(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> anyhow::Result<Value> {
        let mut response =
            answer.with_context(|| format!("cannot reach the server: `{}`", self.base))?;
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(1 << 31)
            .read_to_string()?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        if status.is_success() {
            return Ok(answer);
        }
        Err(anyhow!(
            "the server answered {}: {}",
            status.as_u16(),
            error_text(&answer)
        ))
    }
}

/// Asks for the server's list before a name is used: A1111 drops an override that it does not know and goes on without it.
fn check_names(server: &Server, [checkpoint, vae]: [Option<String>; 2]) -> anyhow::Result<()> {
    for (what, name, path) in [
        ("checkpoint", checkpoint, "/sdapi/v1/sd-models"),
        ("VAE", vae, "/sdapi/v1/sd-vae"),
    ] {
        let Some(name) = name
            .as_deref()
            .filter(|name| what != "VAE" || !matches!(*name, "Automatic" | "None"))
        else {
            continue;
        };
        let list = server.get(path)?;
        let rows = list.as_array().into_iter().flatten();
        let is_meant = |row: &Value| {
            let title = row["title"].as_str().unwrap_or_default();
            let file = title.split(" [").next().unwrap_or_default();
            let stem = file.rsplit('/').next().unwrap_or_default();
            let stem = stem
                .strip_suffix(".safetensors")
                .or_else(|| stem.strip_suffix(".ckpt"))
                .unwrap_or(stem);
            let fields = ["title", "model_name", "hash", "sha256"]
                .map(|key| row[key].as_str().unwrap_or_default());
            fields.contains(&name) || [file, stem].contains(&name)
        };
        if !rows.clone().any(is_meant) {
            let known: Vec<&str> = rows
                .filter_map(|row| row["title"].as_str().or(row["model_name"].as_str()))
                .collect();
            return Err(anyhow!(
                "{what} not found on the server: `{name}`; known: `{}`",
                known.join("`, `")
            ));
        }
    }
    Ok(())
}

/// The message of an answer in any of A1111's error shapes.
fn error_text(answer: &Value) -> String {
    let entry = |problem: &Value| {
        let field = problem["loc"]
            .as_array()
            .and_then(|loc| loc.last())
            .and_then(Value::as_str)
            .unwrap_or("body");
        format!("`{field}` {}", problem["msg"].as_str().unwrap_or_default())
    };
    match &answer["detail"] {
        Value::String(text) if !text.is_empty() => text.clone(),
        Value::Array(problems) => problems.iter().map(entry).collect::<Vec<_>>().join("; "),
        _ => answer["errors"]
            .as_str()
            .unwrap_or("no reason given")
            .to_string(),
    }
}

/// Makes the pictures on the server and writes them here.
///
/// # Errors
/// Exit 2 for options a server cannot honour, 1 if it cannot be reached or refuses, 130 after a signal.
pub async fn run(
    args: &PromptArgs,
    choices: &Choices,
    start: &Start,
    output: &Output,
    url: &str,
) -> Result<(), Stop> {
    for (option, given) in [
        ("--save-latents", args.save_latents.is_some()),
        ("--device", args.device.is_some()),
        ("--dtype", args.dtype.is_some()),
        ("--threads", args.threads.is_some()),
    ] {
        if given {
            return Err(Stop::usage_text(format!(
                "`{option}` cannot be used with `--server`"
            )));
        }
    }
    let started = Instant::now();
    let server = Server::new(url)?;
    let stop = shutdown::on_signal().map_err(Stop::failed)?;
    let id = task_id(start.kind());
    let path = format!("/sdapi/v1/{}", start.kind());
    let mut body = body(args, choices, output.format, &id);
    start.add_to(&mut body);
    args.refiner.describe(&mut body);
    let bar = progress_bar(Verbosity::from_flag(args.quiet), 1000);
    bar.set_message("waiting");
    let (posting, names) = (server.clone(), [args.checkpoint.clone(), args.vae.clone()]);
    let job = tokio::task::spawn_blocking(move || {
        check_names(&posting, names)?;
        posting.post(&path, &body)
    });
    let answer = tokio::select! {
        answer = job => answer.map_err(Stop::failed)?.map_err(Stop::Failed)?,
        () = stop.cancelled() => {
            interrupt(&server, &id).await;
            return Err(Stop::Interrupted("interrupted; no picture was written".into()));
        }
        never = poll(&server, &id, &bar) => match never {},
    };
    bar.finish_and_clear();
    finish(args, output, &answer, started)
}

fn body(args: &PromptArgs, choices: &Choices, format: Format, id: &str) -> Value {
    let mut overrides = json!({
        "CLIP_stop_at_last_layers": args.clip_skip.max(1),
        "randn_source": choices.noise_source.label(),
        "samples_format": format.extension(),
    });
    if let Some(checkpoint) = &args.checkpoint {
        overrides["sd_model_checkpoint"] = json!(checkpoint);
    }
    if let Some(vae) = &args.vae {
        overrides["sd_vae"] = json!(vae);
    }
    args.codecs.add_to(&mut overrides);
    json!({
        "prompt": args.prompt, "negative_prompt": args.negative,
        "seed": args.seed, "subseed": args.subseed, "subseed_strength": args.subseed_strength,
        "sampler_name": choices.sampler.label(), "scheduler": choices.scheduler.label(),
        "steps": args.steps, "cfg_scale": choices.cfg_scale,
        "width": args.width.unwrap_or(1024), "height": args.height.unwrap_or(1024),
        "batch_size": args.batch_size, "n_iter": args.batch_count, "tiling": args.tiling,
        "override_settings": overrides, "force_task_id": id,
    })
}

/// Shows the job's progress until dropped. A server without task progress shows none.
async fn poll(server: &Server, id: &str, bar: &ProgressBar) -> Infallible {
    let mut ticks = tokio::time::interval(POLL);
    loop {
        ticks.tick().await;
        let Some(answer) = task_state(server, id).await else {
            continue;
        };
        if let Some(fraction) = answer["progress"].as_f64() {
            bar.set_message("sampling");
            bar.set_position((fraction * 1000.0) as u64);
        } else if let Some(text) = answer["textinfo"].as_str() {
            bar.set_message(text.to_string());
        }
    }
}

async fn task_state(server: &Server, id: &str) -> Option<Value> {
    let (server, body) = (
        server.clone(),
        json!({ "id_task": id, "live_preview": false }),
    );
    tokio::task::spawn_blocking(move || server.post("/internal/progress", &body))
        .await
        .ok()?
        .ok()
}

/// Interrupts the job if it is the one that runs; a queued one is given up with the connection.
async fn interrupt(server: &Server, id: &str) {
    if task_state(server, id)
        .await
        .is_some_and(|state| state["active"] == true)
    {
        let server = server.clone();
        // The process ends in either case.
        let _ = tokio::task::spawn_blocking(move || server.post("/sdapi/v1/interrupt", &json!({})))
            .await;
    }
}

fn finish(
    args: &PromptArgs,
    output: &Output,
    answer: &Value,
    started: Instant,
) -> Result<(), Stop> {
    let broken = |what: &str| Stop::failed(anyhow!("the server's answer has no usable `{what}`"));
    let info = answer["info"].as_str().ok_or_else(|| broken("info"))?;
    let info: Value = serde_json::from_str(info).map_err(|_| broken("info"))?;
    let images = answer["images"]
        .as_array()
        .ok_or_else(|| broken("images"))?;
    let seeds: Vec<u64> = info["all_seeds"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .take(images.len())
        .collect();
    let texts = info["infotexts"].as_array().into_iter().flatten();
    let infotexts: Vec<String> = texts
        .filter_map(|text| text.as_str().map(str::to_string))
        .collect();
    let save_started = Instant::now();
    let mut files: Vec<PathBuf> = Vec::new();
    for (index, image) in images.iter().enumerate() {
        let bytes = imaging::decode_base64(image.as_str().unwrap_or_default())
            .map_err(|_| broken("images"))?;
        let format = Format::sniff(&bytes).ok_or_else(|| broken("images"))?;
        let seed = seeds.get(index).copied().unwrap_or_default();
        files.push(output.write_bytes(&bytes, format, seed, index, images.len())?);
    }
    let seconds = Seconds {
        save: save_started.elapsed().as_secs_f64(),
        total: started.elapsed().as_secs_f64(),
        ..Seconds::default()
    };
    let checkpoint = info["sd_model_name"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    Report {
        files,
        seeds,
        infotexts,
        seconds,
        device: None,
        dtype: None,
        checkpoint,
    }
    .print(Form::from_flag(args.json))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_leave_the_address() {
        let server = Server::new("http://user:pa@ss@host:1/").unwrap();
        assert_eq!(server.base, "http://host:1");
        assert_eq!(
            server.authorization.as_deref(),
            Some("Basic dXNlcjpwYUBzcw==")
        );
        assert!(Server::new("ftp://host").is_err());
    }

    #[test]
    fn all_error_shapes_are_read() {
        assert_eq!(error_text(&json!({"detail": "Not Found"})), "Not Found");
        assert_eq!(error_text(&json!({"detail": "", "errors": "boom"})), "boom");
        let list = json!({"detail": [{"loc": ["body", "steps"], "msg": "is bad"}]});
        assert_eq!(error_text(&list), "`steps` is bad");
    }
}
