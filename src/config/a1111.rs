//! A1111's command-line flags, translated into our settings.
//!
//! Unknown flags never abort: each is reported once. Flags that would be dangerous to ignore (TLS) refuse to start.
//! Follows A1111 1.10's `cmd_args.py` as listed in the API contract, chapter 18. `--flag value` and `--flag=value` are equal.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::Value as Json;
use toml::Value;

use super::layers::{Error, Kind, Origin, Setting, parse};

/// How many words follow a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arity {
    None,
    One,
    Many,
}

/// What a flag does here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// Its value becomes a setting.
    Set(&'static str, Kind),
    /// It turns a setting on (`true`) or off.
    Switch(&'static str, bool),
    /// It sets a text.
    Fixed(&'static str, &'static str),
    /// `--data-dir`.
    DataDir,
    /// `--device-id N`.
    DeviceId,
    /// `--use-cpu all`.
    UseCpu,
    /// `--precision full`.
    Precision,
    /// Nothing to do, nothing to say.
    Silent,
    /// Nothing to do; the user should know.
    Ignored(&'static str),
    /// Must not be ignored.
    Refuse(&'static str),
}

type Row = (&'static str, Arity, Act);

const NO_EFFECT: Act = Act::Ignored("has no effect in sdgen");
const OFFLOADING: Act = Act::Ignored("has no effect: sdgen keeps the whole model on its device");
const TLS: Act = Act::Refuse(
    "TLS is not served by `sdgen serve`; put a TLS proxy before it and remove the flag",
);

#[rustfmt::skip]
const FLAGS: &[Row] = &[
    ("port", Arity::One, Act::Set("server.port", Kind::Int)),
    ("listen", Arity::None, Act::Fixed("server.host", "0.0.0.0")),
    ("server-name", Arity::One, Act::Set("server.host", Kind::Text)),
    ("api", Arity::None, Act::Silent),
    ("nowebui", Arity::None, Act::Switch("server.root_page", false)),
    ("api-auth", Arity::One, Act::Set("server.api_auth", Kind::List)),
    ("gradio-auth", Arity::One, Act::Set("server.api_auth", Kind::List)),
    ("gradio-auth-path", Arity::One, Act::Refuse("`--gradio-auth-path` is not supported; give the pairs with `--api-auth`")),
    ("api-log", Arity::None, Act::Switch("server.access_log", true)),
    ("api-server-stop", Arity::None, Act::Switch("server.server_stop", true)),
    ("add-stop-route", Arity::None, Act::Silent),
    ("cors-allow-origins", Arity::One, Act::Set("server.cors_allow_origins", Kind::List)),
    ("cors-allow-origins-regex", Arity::One, Act::Set("server.cors_allow_origins_regex", Kind::Text)),
    ("subpath", Arity::One, Act::Set("server.subpath", Kind::Text)),
    ("tls-keyfile", Arity::One, TLS),
    ("tls-certfile", Arity::One, TLS),
    ("disable-tls-verify", Arity::None, Act::Silent),
    ("timeout-keep-alive", Arity::One, Act::Silent),
    ("data-dir", Arity::One, Act::DataDir),
    ("forge-ref-a1111-home", Arity::One, Act::DataDir),
    ("models-dir", Arity::One, Act::Set("paths.models_dir", Kind::Text)),
    ("ckpt", Arity::One, Act::Set("model.checkpoint", Kind::Text)),
    ("ckpt-dir", Arity::One, Act::Set("paths.checkpoint_dirs", Kind::Append)),
    ("vae-dir", Arity::One, Act::Set("paths.vae_dirs", Kind::Append)),
    ("vae-path", Arity::One, Act::Set("model.vae", Kind::Text)),
    ("lora-dir", Arity::One, Act::Set("paths.lora_dirs", Kind::Append)),
    ("lyco-dir-backcompat", Arity::One, Act::Set("paths.lora_dirs", Kind::Append)),
    ("embeddings-dir", Arity::One, Act::Set("paths.embeddings_dir", Kind::Text)),
    ("esrgan-models-path", Arity::One, Act::Set("paths.esrgan_dirs", Kind::Append)),
    ("realesrgan-models-path", Arity::One, Act::Set("paths.esrgan_dirs", Kind::Append)),
    ("bsrgan-models-path", Arity::One, NO_EFFECT),
    ("dat-models-path", Arity::One, NO_EFFECT),
    ("swinir-models-path", Arity::One, NO_EFFECT),
    ("scunet-models-path", Arity::One, NO_EFFECT),
    ("ldsr-models-path", Arity::One, NO_EFFECT),
    ("gfpgan-models-path", Arity::One, Act::Silent),
    ("codeformer-models-path", Arity::One, Act::Silent),
    ("gfpgan-dir", Arity::One, Act::Silent),
    ("gfpgan-model", Arity::One, Act::Silent),
    ("unload-gfpgan", Arity::None, Act::Silent),
    ("hypernetwork-dir", Arity::One, Act::Silent),
    ("localizations-dir", Arity::One, Act::Silent),
    ("textual-inversion-templates-dir", Arity::One, Act::Silent),
    ("controlnet-dir", Arity::One, Act::Set("paths.controlnet_dir", Kind::Text)),
    ("controlnet-annotator-models-path", Arity::One, Act::Silent),
    ("controlnet-preprocessor-models-dir", Arity::One, Act::Silent),
    ("styles-file", Arity::One, Act::Set("paths.styles_files", Kind::Append)),
    ("ui-settings-file", Arity::One, Act::Set("paths.settings_file", Kind::Text)),
    ("ui-config-file", Arity::One, Act::Silent),
    ("freeze-settings", Arity::None, Act::Switch("server.freeze_settings", true)),
    ("freeze-settings-in-sections", Arity::One, Act::Switch("server.freeze_settings", true)),
    ("freeze-specific-settings", Arity::One, Act::Switch("server.freeze_settings", true)),
    ("no-half", Arity::None, Act::Fixed("device.dtype", "f32")),
    ("no-half-vae", Arity::None, Act::Silent),
    ("precision", Arity::One, Act::Precision),
    ("upcast-sampling", Arity::None, NO_EFFECT),
    ("medvram", Arity::None, OFFLOADING),
    ("medvram-sdxl", Arity::None, OFFLOADING),
    ("lowvram", Arity::None, OFFLOADING),
    ("lowram", Arity::None, Act::Silent),
    ("use-cpu", Arity::Many, Act::UseCpu),
    ("device-id", Arity::One, Act::DeviceId),
    ("xformers", Arity::None, Act::Silent),
    ("force-enable-xformers", Arity::None, Act::Silent),
    ("xformers-flash-attention", Arity::None, Act::Silent),
    ("opt-sdp-attention", Arity::None, Act::Silent),
    ("opt-sdp-no-mem-attention", Arity::None, Act::Silent),
    ("opt-split-attention", Arity::None, Act::Silent),
    ("opt-split-attention-v1", Arity::None, Act::Silent),
    ("opt-split-attention-invokeai", Arity::None, Act::Silent),
    ("opt-sub-quad-attention", Arity::None, Act::Silent),
    ("sub-quad-q-chunk-size", Arity::One, Act::Silent),
    ("sub-quad-kv-chunk-size", Arity::One, Act::Silent),
    ("sub-quad-chunk-threshold", Arity::One, Act::Silent),
    ("opt-channelslast", Arity::None, Act::Silent),
    ("disable-opt-split-attention", Arity::None, Act::Silent),
    ("disable-nan-check", Arity::None, NO_EFFECT),
    ("no-hashing", Arity::None, Act::Switch("model.hashing", false)),
    ("skip-load-model-at-start", Arity::None, Act::Switch("model.load_at_start", false)),
    ("ui-debug-mode", Arity::None, Act::Switch("model.load_at_start", false)),
    ("disable-safe-unpickle", Arity::None, NO_EFFECT),
    ("no-download-sd-model", Arity::None, Act::Silent),
    ("do-not-download-clip", Arity::None, Act::Silent),
    ("filenames-max-length", Arity::One, Act::Silent),
    ("unix-filenames-sanitization", Arity::None, Act::Silent),
    ("no-prompt-history", Arity::None, Act::Silent),
    ("hide-ui-dir-config", Arity::None, Act::Silent),
    ("loglevel", Arity::One, Act::Set("log.level", Kind::Text)),
    ("log-startup", Arity::None, Act::Silent),
    ("dump-sysinfo", Arity::None, Act::Silent),
    ("skip-torch-cuda-test", Arity::None, Act::Silent),
    ("skip-version-check", Arity::None, Act::Silent),
    ("skip-python-version-check", Arity::None, Act::Silent),
    ("skip-prepare-environment", Arity::None, Act::Silent),
    ("skip-install", Arity::None, Act::Silent),
    ("reinstall-xformers", Arity::None, Act::Silent),
    ("reinstall-torch", Arity::None, Act::Silent),
    ("update-check", Arity::None, Act::Silent),
    ("update-all-extensions", Arity::None, Act::Silent),
    ("exit", Arity::None, Act::Silent),
    ("test-server", Arity::None, Act::Silent),
    ("enable-insecure-extension-access", Arity::None, Act::Silent),
    ("disable-all-extensions", Arity::None, Act::Silent),
    ("disable-extra-extensions", Arity::None, Act::Silent),
    ("allow-code", Arity::None, Act::Silent),
    ("administrator", Arity::None, Act::Silent),
    ("share", Arity::None, Act::Ignored("has no effect: sdgen opens no tunnel")),
    ("ngrok", Arity::One, Act::Ignored("has no effect: sdgen opens no tunnel")),
    ("ngrok-region", Arity::One, Act::Silent),
    ("ngrok-options", Arity::One, Act::Silent),
    ("autolaunch", Arity::None, Act::Silent),
    ("theme", Arity::One, Act::Silent),
    ("gradio-img2img-tool", Arity::One, Act::Silent),
    ("gradio-inpaint-tool", Arity::One, Act::Silent),
    ("gradio-allowed-path", Arity::One, Act::Silent),
    ("gradio-debug", Arity::None, Act::Silent),
    ("gradio-queue", Arity::None, Act::Silent),
    ("no-gradio-queue", Arity::None, Act::Silent),
    ("use-textbox-seed", Arity::None, Act::Silent),
    ("no-progressbar-hiding", Arity::None, Act::Silent),
    ("disable-console-progressbars", Arity::None, Act::Silent),
    ("max-batch-count", Arity::One, Act::Silent),
    ("use-ipex", Arity::None, NO_EFFECT),
    ("use-directml", Arity::None, NO_EFFECT),
    ("use-zluda", Arity::None, NO_EFFECT),
    ("always-batch-cond-uncond", Arity::None, Act::Silent),
    ("deepdanbooru", Arity::None, Act::Silent),
    ("enable-console-prompts", Arity::None, Act::Silent),
    ("show-negative-prompt", Arity::None, Act::Silent),
    ("cuda-malloc", Arity::None, NO_EFFECT),
    ("cuda-stream", Arity::None, NO_EFFECT),
    ("pin-shared-memory", Arity::None, NO_EFFECT),
    ("always-gpu", Arity::None, NO_EFFECT),
    ("always-high-vram", Arity::None, NO_EFFECT),
    ("always-low-vram", Arity::None, OFFLOADING),
];

/// What a list of words came to.
#[derive(Debug, Default)]
pub struct Translated {
    /// Settings in the order given.
    pub settings: Vec<Setting>,
    /// `--data-dir`.
    pub data_dir: Option<(PathBuf, Origin)>,
    /// Flags as given, by destination name.
    pub given: BTreeMap<String, Json>,
    /// One sentence for each flag without effect.
    pub warnings: Vec<String>,
}

impl Translated {
    /// Adds a later, stronger list.
    pub fn extend(&mut self, later: Self) {
        self.settings.extend(later.settings);
        self.data_dir = later.data_dir.or_else(|| self.data_dir.take());
        self.given.extend(later.given);
        self.warnings.extend(later.warnings);
    }
}

/// Names of all flags with whether they take a value, for `/sdapi/v1/cmd-flags` and for splitting a command line.
pub fn flag_names() -> impl Iterator<Item = (&'static str, bool)> {
    FLAGS
        .iter()
        .map(|(name, arity, _)| (*name, *arity != Arity::None))
}

/// Takes the words that are A1111's (or nobody's) out of a command line; `ours` tells which long flags are our own
/// (`Some(takes a value)`). Words before the first flag of theirs stay, in order.
#[must_use]
pub fn split(words: &[String], ours: &dyn Fn(&str) -> Option<bool>) -> (Vec<String>, Vec<String>) {
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    let mut rest = words.iter().peekable();
    while let Some(word) = rest.next() {
        let Some(long) = word.strip_prefix("--").filter(|long| !long.is_empty()) else {
            mine.push(word.clone());
            continue;
        };
        let (name, inline) = long
            .split_once('=')
            .map_or((long, false), |(name, _)| (name, true));
        if let Some(takes_value) = ours(name) {
            mine.push(word.clone());
            if takes_value && !inline {
                mine.extend(rest.next().cloned());
            }
            continue;
        }
        theirs.push(word.clone());
        let arity = FLAGS.iter().find(|row| row.0 == name).map(|row| row.1);
        let most = match arity {
            _ if inline => 0,
            Some(Arity::None) => 0,
            Some(Arity::One) | None => 1,
            Some(Arity::Many) => usize::MAX,
        };
        for _ in 0..most {
            let is_value = rest.peek().is_some_and(|next| !next.starts_with("--"));
            if !is_value {
                break;
            }
            theirs.extend(rest.next().cloned());
        }
    }
    (mine, theirs)
}

/// Translates words such as `--listen --port 7860 --ckpt-dir=/models`.
///
/// # Errors
/// A flag without its value, a value of the wrong type, or a flag that must not be ignored.
pub fn translate(words: &[String], origin: &dyn Fn(&str) -> Origin) -> Result<Translated, Error> {
    let mut out = Translated::default();
    let mut warned = BTreeSet::new();
    let mut rest = words.iter().peekable();
    while let Some(word) = rest.next() {
        let Some(long) = word.strip_prefix("--") else {
            out.warnings.push(format!("argument ignored: `{word}`"));
            continue;
        };
        let (name, inline) = long.split_once('=').map_or((long, None), |(name, value)| {
            (name, Some(value.to_string()))
        });
        let Some((name, arity, act)) = FLAGS.iter().find(|row| row.0 == name) else {
            // An unknown flag takes the word after it along, unless that is a flag.
            if inline.is_none() {
                rest.next_if(|next| !next.starts_with("--"));
            }
            if warned.insert(name.to_string()) {
                out.warnings
                    .push(format!("unknown flag ignored: `--{name}`"));
            }
            continue;
        };
        let mut values: Vec<String> = inline.into_iter().collect();
        if *arity != Arity::None && values.is_empty() {
            values.extend(rest.next_if(|next| !next.starts_with("--")).cloned());
        }
        while *arity == Arity::Many
            && let Some(value) = rest.next_if(|next| !next.starts_with("--"))
        {
            values.push(value.clone());
        }
        let flag = format!("--{name}");
        let origin = origin(&flag);
        if *arity != Arity::None && values.is_empty() {
            return Err(Error::Value {
                origin,
                message: format!("`{flag}` needs a value"),
            });
        }
        apply(&mut out, name, *act, &values, &origin, &mut warned)?;
    }
    Ok(out)
}

fn apply(
    out: &mut Translated,
    name: &str,
    act: Act,
    values: &[String],
    origin: &Origin,
    warned: &mut BTreeSet<String>,
) -> Result<(), Error> {
    let first = values.first().map_or("", String::as_str);
    let wrong = |message: String| Error::Value {
        origin: origin.clone(),
        message: format!("`--{name}`: {message}"),
    };
    let mut set = |key: &'static str, value: Value| {
        out.settings.push(Setting {
            key,
            value,
            origin: origin.clone(),
        })
    };
    match act {
        Act::Set(key, Kind::Append) => {
            let before = out
                .settings
                .iter()
                .rev()
                .find(|s| s.key == key)
                .map(|s| s.value.clone());
            let mut list = before
                .and_then(|value| value.as_array().cloned())
                .unwrap_or_default();
            list.push(Value::from(first));
            out.settings.push(Setting {
                key,
                value: Value::Array(list),
                origin: origin.clone(),
            });
        }
        Act::Set(key, kind) => set(key, parse(kind, first).map_err(wrong)?),
        Act::Switch(key, on) => set(key, Value::Boolean(on)),
        // `--server-name` wins over `--listen` in any order.
        Act::Fixed("server.host", _) if out.given.contains_key("server_name") => {}
        Act::Fixed(key, value) => set(key, Value::from(value)),
        Act::DataDir => out.data_dir = Some((first.into(), origin.clone())),
        Act::DeviceId => {
            let ordinal: usize = first
                .parse()
                .map_err(|_| wrong(format!("not a device number: `{first}`")))?;
            set("device.device", Value::from(format!("cuda:{ordinal}")));
        }
        Act::UseCpu if values.iter().any(|value| value == "all") => {
            set("device.device", Value::from("cpu"))
        }
        Act::Precision if first == "full" => set("device.dtype", Value::from("f32")),
        Act::UseCpu => {
            let message = format!(
                "flag ignored: `--{name} {}`: only `all` is supported",
                values.join(" ")
            );
            out.warnings.push(message);
        }
        Act::Silent | Act::Precision => {}
        Act::Ignored(why) => {
            if warned.insert(name.to_string()) {
                out.warnings.push(format!("flag ignored: `--{name}` {why}"));
            }
        }
        Act::Refuse(why) => return Err(Error::Refused(why.to_string())),
    }
    let shown = match (act, values) {
        (_, []) => Json::Bool(true),
        (Act::Set(_, Kind::Int) | Act::DeviceId, _) => {
            first.parse::<i64>().map_or(Json::Null, Json::from)
        }
        (Act::Set("paths.styles_files", _) | Act::UseCpu, _) => Json::from(values.to_vec()),
        _ => Json::from(first),
    };
    out.given.insert(name.replace('-', "_"), shown);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Translated, Error> {
        let words = shlex::split(line).unwrap();
        translate(&words, &|flag| Origin::Flag(flag.to_string()))
    }

    fn keys(translated: &Translated) -> Vec<(&str, String)> {
        translated
            .settings
            .iter()
            .map(|s| (s.key, s.value.to_string()))
            .collect()
    }

    #[test]
    fn both_spellings_of_a_value_are_equal() {
        let (a, b) = (
            run("--port 81 --ckpt-dir '/a b'").unwrap(),
            run("--port=81 '--ckpt-dir=/a b'").unwrap(),
        );
        assert_eq!(
            keys(&a),
            [
                ("server.port", "81".into()),
                ("paths.checkpoint_dirs", "[\"/a b\"]".into())
            ]
        );
        assert_eq!(keys(&a), keys(&b));
    }

    #[test]
    fn repeated_directories_add_up() {
        let all = run("--lora-dir /a --lyco-dir-backcompat /b").unwrap();
        assert_eq!(
            all.settings.last().unwrap().value.to_string(),
            "[\"/a\", \"/b\"]"
        );
    }

    #[test]
    fn server_name_beats_listen() {
        for line in [
            "--server-name 10.0.0.1 --listen",
            "--listen --server-name 10.0.0.1",
        ] {
            let all = run(line).unwrap();
            assert_eq!(
                all.settings.last().unwrap().value.as_str(),
                Some("10.0.0.1"),
                "{line}"
            );
        }
    }

    #[test]
    fn unknown_flags_are_reported_once_and_swallow_their_value() {
        let all = run("--frobnicate 3 --frobnicate 4 --listen").unwrap();
        assert_eq!(all.warnings, ["unknown flag ignored: `--frobnicate`"]);
        assert_eq!(all.settings.len(), 1);
    }

    #[test]
    fn tls_flags_refuse_to_start() {
        let error = run("--tls-keyfile k.pem").unwrap_err().to_string();
        assert!(
            error.starts_with("TLS is not served by `sdgen serve`"),
            "{error}"
        );
    }

    #[test]
    fn missing_and_wrong_values_name_the_flag() {
        assert_eq!(
            run("--port").unwrap_err().to_string(),
            "flag --port: `--port` needs a value"
        );
        assert_eq!(
            run("--port x").unwrap_err().to_string(),
            "flag --port: `--port`: not a whole number: `x`"
        );
    }

    #[test]
    fn a_command_line_is_split_between_us_and_them() {
        let words: Vec<String> = [
            "--host",
            "::1",
            "--xformers",
            "--port=5",
            "--vae-dir",
            "/v",
            "--json",
            "--use-cpu",
            "all",
            "--odd",
            "1",
        ]
        .map(String::from)
        .to_vec();
        let ours = |name: &str| match name {
            "host" | "port" => Some(true),
            "json" => Some(false),
            _ => None,
        };
        let (mine, theirs) = split(&words, &ours);
        assert_eq!(mine, ["--host", "::1", "--port=5", "--json"]);
        assert_eq!(
            theirs,
            [
                "--xformers",
                "--vae-dir",
                "/v",
                "--use-cpu",
                "all",
                "--odd",
                "1"
            ]
        );
    }
}
