//! Merges the sources of settings: default < file < environment < command line, remembering where each value came from.
//!
//! Every source is reduced to [`Setting`]s (dotted key, TOML value, origin); the merged table is deserialised once, so that
//! unknown keys and wrong types are found by one piece of code whatever the source.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{Config, Problem, a1111, env};

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// The settings file.
    File(PathBuf),
    /// An environment variable.
    Env(&'static str),
    /// A flag on the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Env(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// One value of one source.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// Dotted key, `server.port`.
    pub key: &'static str,
    /// Value in the type of the key.
    pub value: Value,
    /// Where it came from.
    pub origin: Origin,
}

/// Type of a setting that arrives as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Kept as it is.
    Text,
    /// A whole number.
    Int,
    /// Items separated by commas.
    List,
    /// One item appended to those before it.
    Append,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("settings file cannot be read: `{}`", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key or a wrong type.
    #[error("settings file `{}`: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        message: String,
    },
    /// A value does not fit its key.
    #[error("{origin}: {message}")]
    Value {
        /// Where it came from.
        origin: Origin,
        /// What is wrong.
        message: String,
    },
    /// The string of flags in a variable is not shell-quoted.
    #[error("environment {0}: unbalanced quotes")]
    Quoting(&'static str),
    /// An A1111 flag that cannot be honoured and must not be ignored.
    #[error("{0}")]
    Refused(String),
    /// Values that do not make sense.
    #[error("{}", join(.0))]
    Invalid(Vec<Problem>),
}

fn join(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// What the command line and the environment say.
pub struct Input<'a> {
    /// `--data-dir`.
    pub data_dir: Option<PathBuf>,
    /// `--config`.
    pub config_file: Option<PathBuf>,
    /// Our own flags.
    pub flags: Vec<Setting>,
    /// Words of the command line that are not ours: A1111's flags.
    pub words: Vec<String>,
    /// Looks up an environment variable.
    pub env: &'a dyn Fn(&str) -> Option<String>,
}

/// The merged settings and their history.
#[derive(Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Origin of every key that is not a default, and of `data_dir`.
    pub origins: BTreeMap<String, Origin>,
    /// What was ignored, one sentence each.
    pub warnings: Vec<String>,
}

const ENVIRONMENT: &[(&str, &str, Kind)] = &[
    (env::HOST, "server.host", Kind::Text),
    (env::PORT, "server.port", Kind::Int),
    (env::API_AUTH, "server.api_auth", Kind::List),
    (env::API_TOKENS, "server.api_tokens", Kind::List),
    (env::BODY_LIMIT_MIB, "server.body_limit_mib", Kind::Int),
    (env::QUEUE_LIMIT, "server.queue_limit", Kind::Int),
    (env::SHUTDOWN_GRACE, "server.shutdown_grace_s", Kind::Int),
    (env::MODELS_DIR, "paths.models_dir", Kind::Text),
    (env::DEVICE, "device.device", Kind::Text),
    (env::DTYPE, "device.dtype", Kind::Text),
    (env::THREADS, "device.threads", Kind::Int),
    (env::CPU_ISA, "device.cpu_isa", Kind::Text),
    (env::CUDA_KERNELS, "device.cuda_kernels", Kind::Text),
    (env::CHECKPOINT, "model.checkpoint", Kind::Text),
    (env::VAE, "model.vae", Kind::Text),
    (env::LOG, "log.level", Kind::Text),
    (env::LOG_FORMAT, "log.format", Kind::Text),
];

/// Merges all sources and validates the result.
///
/// # Errors
/// Names the source, the key and the reason; [`Error::Invalid`] lists all problems.
pub fn load(input: &Input<'_>) -> Result<Loaded, Error> {
    let mut warnings = Vec::new();
    let from_env = a1111_from_environment(input.env)?;
    let from_line = a1111::translate(&input.words, &|flag| Origin::Flag(flag.to_string()))?;
    warnings.extend(from_env.warnings.into_iter().chain(from_line.warnings));
    let mut a1111_flags = from_env.given;
    a1111_flags.extend(from_line.given);

    let mut origins = BTreeMap::new();
    let (data_dir, origin) = data_dir(input, from_line.data_dir.or(from_env.data_dir));
    origins.insert("data_dir".to_string(), origin);

    let mut table = Table::new();
    if let Some(path) = settings_file(input, &data_dir) {
        let file = read_file(&path)?;
        merge_table(&mut table, file, "", &Origin::File(path), &mut origins);
    }
    let environment = environment_settings(input.env)?;
    let all = from_env
        .settings
        .into_iter()
        .chain(environment)
        .chain(from_line.settings)
        .chain(input.flags.iter().cloned());
    for setting in all {
        check(&setting)?;
        put(&mut table, &setting);
        origins.insert(setting.key.to_string(), setting.origin);
    }
    let mut config: Config = table
        .try_into()
        .map_err(|error: toml::de::Error| Error::Value {
            origin: Origin::Default,
            message: error.message().to_string(),
        })?;
    config.data_dir = std::path::absolute(&data_dir).unwrap_or(data_dir);
    config.a1111_flags = a1111_flags;
    let problems = config.validate();
    if problems.is_empty() {
        Ok(Loaded {
            config,
            origins,
            warnings,
        })
    } else {
        Err(Error::Invalid(problems))
    }
}

/// The merged settings as TOML, each key followed by where its value came from.
#[must_use]
pub fn describe(loaded: &Loaded) -> String {
    let origin = |key: &str| loaded.origins.get(key).cloned().unwrap_or(Origin::Default);
    let mut lines = vec![format!(
        "# data directory: {} ({})",
        loaded.config.data_dir.display(),
        origin("data_dir")
    )];
    if let Ok(Value::Table(sections)) = Value::try_from(&loaded.config) {
        for (section, values) in &sections {
            lines.push(format!("\n[{section}]"));
            for (key, value) in values.as_table().into_iter().flatten() {
                lines.push(format!(
                    "{key} = {value}  # {}",
                    origin(&format!("{section}.{key}"))
                ));
            }
        }
    }
    lines.join("\n") + "\n"
}

/// Turns text into the value of a key.
///
/// # Errors
/// A sentence with the text, if it is not of this kind.
pub fn parse(kind: Kind, text: &str) -> Result<Value, String> {
    match kind {
        Kind::Text => Ok(Value::String(text.to_string())),
        Kind::Int => text
            .trim()
            .parse()
            .map(Value::Integer)
            .map_err(|_| format!("not a whole number: `{text}`")),
        Kind::List => Ok(Value::Array(
            text.split(',')
                .filter(|item| !item.is_empty())
                .map(Value::from)
                .collect(),
        )),
        Kind::Append => Ok(Value::Array(vec![Value::from(text)])),
    }
}

fn environment_settings(env: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Setting>, Error> {
    let mut settings = Vec::new();
    for (name, key, kind) in ENVIRONMENT {
        let Some(text) = env(name).filter(|text| !text.is_empty()) else {
            continue;
        };
        let origin = Origin::Env(name);
        let value = parse(*kind, &text).map_err(|message| Error::Value {
            origin: origin.clone(),
            message,
        })?;
        settings.push(Setting { key, value, origin });
    }
    Ok(settings)
}

fn a1111_from_environment(
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<a1111::Translated, Error> {
    let mut all = a1111::Translated::default();
    for name in [env::COMMANDLINE_ARGS, env::A1111_ARGS] {
        let Some(text) = env(name) else { continue };
        let words = shlex::split(&text).ok_or(Error::Quoting(name))?;
        all.extend(a1111::translate(&words, &|_| Origin::Env(name))?);
    }
    Ok(all)
}

/// `--data-dir`, else the variable, else A1111's flag, else an existing A1111 tree, else `./sdgen-data`.
fn data_dir(input: &Input<'_>, a1111: Option<(PathBuf, Origin)>) -> (PathBuf, Origin) {
    if let Some(path) = &input.data_dir {
        return (path.clone(), Origin::Flag("--data-dir".into()));
    }
    if let Some(path) = (input.env)(env::DATA_DIR).filter(|text| !text.is_empty()) {
        return (path.into(), Origin::Env(env::DATA_DIR));
    }
    if let Some(found) = a1111 {
        return found;
    }
    if let Some(workspace) = (input.env)(env::WORKSPACE) {
        let tree = Path::new(&workspace).join("stable-diffusion-webui");
        if tree.is_dir() {
            return (tree, Origin::Env(env::WORKSPACE));
        }
    }
    ("sdgen-data".into(), Origin::Default)
}

/// The file that was named, or the data directory's own if it exists.
fn settings_file(input: &Input<'_>, data_dir: &Path) -> Option<PathBuf> {
    let named = input
        .config_file
        .clone()
        .or_else(|| (input.env)(env::CONFIG).map(PathBuf::from));
    named.or_else(|| Some(data_dir.join("sdgen.toml")).filter(|path| path.exists()))
}

fn read_file(path: &Path) -> Result<Table, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Unreadable {
        path: path.to_path_buf(),
        source,
    })?;
    let wrong = |error: toml::de::Error| Error::File {
        path: path.to_path_buf(),
        message: error.to_string().trim_end().to_string(),
    };
    // Deserialising the file alone gives line and column; the result is not used.
    toml::from_str::<Config>(&text).map_err(wrong)?;
    text.parse::<Table>().map_err(wrong)
}

fn merge_table(
    into: &mut Table,
    from: Table,
    prefix: &str,
    origin: &Origin,
    origins: &mut BTreeMap<String, Origin>,
) {
    for (key, value) in from {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            Value::Table(inner) => {
                let entry = into
                    .entry(key)
                    .or_insert_with(|| Value::Table(Table::new()));
                if let Value::Table(table) = entry {
                    merge_table(table, inner, &path, origin, origins);
                }
            }
            value => {
                origins.insert(path, origin.clone());
                into.insert(key, value);
            }
        }
    }
}

/// Sets a dotted key of two parts.
fn put(table: &mut Table, setting: &Setting) {
    let (section, key) = setting
        .key
        .split_once('.')
        .expect("every key of the tables here has a section");
    let entry = table
        .entry(section)
        .or_insert_with(|| Value::Table(Table::new()));
    if let Value::Table(section) = entry {
        section.insert(key.to_string(), setting.value.clone());
    }
}

/// Tries a value on its own, so that an error names its source.
fn check(setting: &Setting) -> Result<(), Error> {
    let mut alone = Table::new();
    put(&mut alone, setting);
    let result: Result<Config, toml::de::Error> = alone.try_into();
    let wrong = |error: toml::de::Error| Error::Value {
        origin: setting.origin.clone(),
        message: error.message().to_string(),
    };
    result.map(drop).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_with(vars: &[(&str, &str)], words: &[&str], file: &str) -> Result<Loaded, Error> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("sdgen.toml"), file).unwrap();
        let vars: BTreeMap<String, String> = vars
            .iter()
            .map(|(k, v)| ((*k).to_string(), (*v).to_string()))
            .collect();
        load(&Input {
            data_dir: Some(dir.path().to_path_buf()),
            config_file: None,
            flags: Vec::new(),
            words: words.iter().map(ToString::to_string).collect(),
            env: &|name| vars.get(name).cloned(),
        })
    }

    #[test]
    fn later_sources_win() {
        let loaded = load_with(
            &[
                ("SDGEN_PORT", "2000"),
                ("COMMANDLINE_ARGS", "--port 1500 --listen"),
            ],
            &["--port", "3000"],
            "[server]\nport = 1000\nhost = \"::1\"\nqueue_limit = 7\n",
        )
        .unwrap();
        assert_eq!(loaded.config.server.port, 3000);
        assert_eq!(loaded.config.server.host, "0.0.0.0");
        assert_eq!(loaded.config.server.queue_limit, 7);
        assert_eq!(loaded.origins["server.port"], Origin::Flag("--port".into()));
        assert_eq!(
            loaded.origins["server.host"],
            Origin::Env("COMMANDLINE_ARGS")
        );
        assert!(matches!(
            loaded.origins["server.queue_limit"],
            Origin::File(_)
        ));
    }

    #[test]
    fn unknown_keys_of_the_file_name_line_and_key() {
        let error = load_with(&[], &[], "[server]\nprot = 1\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 2") && error.contains("unknown field `prot`"),
            "{error}"
        );
    }

    #[test]
    fn a_bad_variable_is_named() {
        let error = load_with(&[("SDGEN_PORT", "abc")], &[], "").unwrap_err();
        assert_eq!(
            error.to_string(),
            "environment SDGEN_PORT: not a whole number: `abc`"
        );
        let error = load_with(&[("SDGEN_DEVICE", "gpu")], &[], "").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("environment SDGEN_DEVICE: unknown device: `gpu`"),
            "{error}"
        );
    }

    #[test]
    fn description_shows_origin_and_hides_secrets() {
        let loaded = load_with(&[("SDGEN_API_AUTH", "u:hunter2")], &[], "").unwrap();
        let text = describe(&loaded);
        assert!(
            text.contains("api_auth = [\"***\"]  # environment SDGEN_API_AUTH"),
            "{text}"
        );
        assert!(text.contains("port = 17860  # default"), "{text}");
        assert!(!text.contains("hunter2"));
    }

    #[test]
    fn an_a1111_tree_in_the_workspace_is_the_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("stable-diffusion-webui");
        std::fs::create_dir(&tree).unwrap();
        let workspace = dir.path().to_str().unwrap().to_string();
        let env = |name: &str| (name == env::WORKSPACE).then(|| workspace.clone());
        let loaded = load(&Input {
            data_dir: None,
            config_file: None,
            flags: vec![],
            words: vec![],
            env: &env,
        })
        .unwrap();
        assert_eq!(loaded.config.data_dir, tree);
        assert_eq!(loaded.origins["data_dir"], Origin::Env("WORKSPACE"));
    }
}
