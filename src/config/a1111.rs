//! A1111's command-line flags, translated into our settings.
//!
//! Unknown flags never abort: each is reported once. Flags that would be dangerous to ignore (TLS) refuse to start.
//! Follows A1111 1.10's `cmd_args.py` as listed in the API contract, chapter 18. `--flag value` and `--flag=value` are equal.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::Value as Json;
use toml::Value;

use super::a1111_flags::{Act, Arity, FLAGS};
use super::layers::{Error, Kind, Origin, Setting, parse};

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

/// Adds items to a list that earlier flags may have begun.
fn extend_list<'a>(
    out: &mut Translated,
    key: &'static str,
    items: impl Iterator<Item = &'a str>,
    origin: &Origin,
) {
    let begun = out.settings.iter().rev().find(|setting| setting.key == key);
    let mut list = begun
        .and_then(|setting| setting.value.as_array().cloned())
        .unwrap_or_default();
    list.extend(items.map(Value::from));
    out.settings.push(Setting {
        key,
        value: Value::Array(list),
        origin: origin.clone(),
    });
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
        });
    };
    match act {
        // `--gradio-auth` adds to `--api-auth`; neither takes the other's users away.
        Act::Set(key @ "server.api_auth", _) => {
            let pairs = first.split(',').filter(|pair| !pair.is_empty());
            extend_list(out, key, pairs, origin);
        }
        Act::PairsFile => {
            let text = read_pairs(first).map_err(wrong)?;
            let pairs = text.split([',', '\n']).map(str::trim);
            let pairs = pairs.filter(|pair| !pair.is_empty());
            extend_list(out, "server.api_auth", pairs, origin);
        }
        Act::Set(key, Kind::Append) => extend_list(out, key, std::iter::once(first), origin),
        Act::Set(key, kind) => set(key, parse(kind, first).map_err(wrong)?),
        Act::Switch(key, on) => set(key, Value::Boolean(on)),
        // `--server-name` wins over `--listen` in any order.
        Act::Fixed("server.host", _) if out.given.contains_key("server_name") => {}
        Act::Fixed(key, value) => set(key, Value::from(value)),
        Act::DataDir => out.data_dir = Some((first.into(), origin.clone())),
        Act::DeviceId => set("device.device", device(first).map_err(wrong)?),
        Act::UseCpu if values.iter().any(|value| value == "all") => {
            set("device.device", Value::from("cpu"));
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
    out.given.insert(name.replace('-', "_"), shown(act, values));
    Ok(())
}

fn read_pairs(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("cannot read `{path}`: {error}"))
}

fn device(ordinal: &str) -> Result<Value, String> {
    let ordinal: usize = ordinal
        .parse()
        .map_err(|_| format!("not a device number: `{ordinal}`"))?;
    Ok(Value::from(format!("cuda:{ordinal}")))
}

/// How `cmd-flags` shows a flag that was given.
fn shown(act: Act, values: &[String]) -> Json {
    let [first, ..] = values else {
        return Json::Bool(true);
    };
    match act {
        Act::Set(_, Kind::Int) | Act::DeviceId => {
            first.parse::<i64>().map_or(Json::Null, Json::from)
        }
        Act::Set("paths.styles_files", _) | Act::UseCpu => Json::from(values.to_vec()),
        _ => Json::from(first.as_str()),
    }
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
    fn credentials_add_up() {
        let all = run("--api-auth a:b --gradio-auth c:d,e:f").unwrap();
        assert_eq!(
            all.settings.last().unwrap().value.to_string(),
            "[\"a:b\", \"c:d\", \"e:f\"]"
        );
    }

    #[test]
    fn a_file_of_credentials_adds_to_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "c:d, e:f\n\ng:h:i\n").unwrap();
        let path = file.path().display();
        let all = run(&format!("--api-auth a:b --api-auth-file {path}")).unwrap();
        assert_eq!(
            all.settings.last().unwrap().value.to_string(),
            "[\"a:b\", \"c:d\", \"e:f\", \"g:h:i\"]"
        );
        let missing = run("--gradio-auth-path /nonexistent/pairs").unwrap_err();
        assert!(missing.to_string().contains("cannot read"), "{missing}");
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
    fn credentials_come_from_flags_and_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "c:d, e:f:g\n\nh:i\n").unwrap();
        let line = format!(
            "--api-auth a:b --gradio-auth-path {}",
            file.path().display()
        );
        let all = run(&line).unwrap();
        assert_eq!(
            all.settings.last().unwrap().value.to_string(),
            r#"["a:b", "c:d", "e:f:g", "h:i"]"#
        );
        let missing = run("--gradio-auth-path /nowhere/at/all").unwrap_err();
        assert!(
            missing
                .to_string()
                .contains("cannot read `/nowhere/at/all`")
        );
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
