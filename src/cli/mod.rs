//! The command line: what was typed, sorted to a subcommand, ended with an exit code.
//!
//! Exit codes are a contract: 0 done, 1 the job or command failed, 2 usage or configuration, 130 interrupted. One line on
//! stderr says what happened and what to do. Results go to stdout, progress and logs to stderr.

pub mod bench;
pub mod checkpoints;
mod codecs;
pub mod follow;
pub mod from_image;
pub mod inspect;
pub mod models;
pub mod output;
pub mod prompt;
pub mod pull;
pub mod remote;
pub mod serve;
pub mod upscale;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::a1111;
use crate::config::layers::{self, Input, Loaded, Setting};

/// How a command ended badly.
#[derive(Debug)]
pub enum Stop {
    /// The job or command failed: exit 1.
    Failed(anyhow::Error),
    /// What was typed or configured cannot be used: exit 2.
    Usage(anyhow::Error),
    /// A signal ended it: exit 130.
    Interrupted(String),
}

impl Stop {
    /// Exit 1 with the error and its causes.
    pub fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self::Failed(error.into())
    }

    /// Exit 2 with the error and its causes.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::Usage(error.into())
    }

    /// Exit 2 with a sentence.
    pub fn usage_text(text: impl Into<String>) -> Self {
        Self::Usage(anyhow::Error::msg(text.into()))
    }
}

/// Whether progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verbosity {
    /// A bar on stderr, if that is a terminal.
    Normal,
    /// Nothing but errors.
    Quiet,
}

impl Verbosity {
    /// The flag `--quiet`.
    #[must_use]
    pub fn from_flag(quiet: bool) -> Self {
        if quiet { Self::Quiet } else { Self::Normal }
    }

    /// A bar of this length and look. Its template must be valid.
    #[must_use]
    pub fn bar(self, length: Option<u64>, template: &'static str) -> ProgressBar {
        let target = match self {
            Self::Normal => ProgressDrawTarget::stderr(),
            Self::Quiet => ProgressDrawTarget::hidden(),
        };
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::with_draw_target(length, target).with_style(style)
    }
}

/// Stable Diffusion XL in one native binary.
#[derive(Debug, Parser)]
#[command(name = "sdgen", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Where settings come from.
    #[command(flatten)]
    pub common: Common,
}

/// Flags of every subcommand.
#[derive(Debug, Clone, Default, Args)]
pub struct Common {
    /// Directory of models, outputs and settings [default: $WORKSPACE/stable-diffusion-webui if it exists, else ./sdgen-data]
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Settings file [default: sdgen.toml in the data directory]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make pictures from a prompt, here or on a server
    Prompt(Box<prompt::PromptArgs>),
    /// Enlarge pictures
    Upscale(Box<upscale::UpscaleArgs>),
    /// Serve A1111's REST API
    #[command(
        after_help = "A1111's own flags are accepted as well (--listen, --ckpt-dir DIR, --api-auth USER:PASSWORD, …), \
        also from the environment variables A1111_ARGS and COMMANDLINE_ARGS. Unknown flags are reported and ignored."
    )]
    Serve(Box<serve::ServeArgs>),
    /// List, describe, hash and download checkpoints
    #[command(subcommand)]
    Models(models::ModelsCommand),
    /// Print the generation parameters inside a picture
    PngInfo(inspect::PngInfoArgs),
    /// Measure the parts of a job, or single operations
    Bench(bench::BenchArgs),
    /// Print the merged settings and where each came from
    Config,
}

/// Runs a command line and reports on stderr how it ended.
#[must_use]
pub fn main(words: Vec<OsString>) -> ExitCode {
    match run(words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(stop) => {
            let (code, text) = match stop {
                Stop::Failed(error) => (1, format!("{error:#}")),
                Stop::Usage(error) => (2, format!("{error:#}")),
                Stop::Interrupted(text) => (130, text),
            };
            if !text.is_empty() {
                // Nobody is left to tell if stderr is closed.
                let _ = writeln!(std::io::stderr(), "sdgen: {text}");
            }
            ExitCode::from(code)
        }
    }
}

fn run(words: Vec<OsString>) -> Result<(), Stop> {
    let words = words.into_iter().map(utf8).collect::<Result<Vec<_>, _>>()?;
    let (ours, theirs) = split_serve(&words);
    let cli = match Cli::try_parse_from(ours) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not errors; clap writes them where they belong.
            let is_answer = !error.use_stderr();
            let _ = error.print();
            return if is_answer {
                Ok(())
            } else {
                Err(Stop::usage_text(""))
            };
        }
    };
    match cli.command {
        Command::Prompt(args) => prompt::run(&args, &cli.common),
        Command::Upscale(args) => upscale::run(&args, &cli.common),
        Command::Serve(args) => serve::run(&args, &cli.common, theirs),
        Command::Models(command) => models::run(command, &cli.common),
        Command::PngInfo(args) => inspect::png_info(&args),
        Command::Bench(args) => bench::run(&args, &cli.common),
        Command::Config => {
            let loaded = load_config(&cli.common, Vec::new(), Vec::new())?;
            warn_all(&loaded);
            print(&layers::describe(&loaded))
        }
    }
}

fn utf8(word: OsString) -> Result<String, Stop> {
    word.into_string().map_err(|word| {
        Stop::usage_text(format!(
            "argument is not valid UTF-8: `{}`",
            word.to_string_lossy()
        ))
    })
}

/// Takes A1111's flags out of a `serve` command line.
fn split_serve(words: &[String]) -> (Vec<String>, Vec<String>) {
    let command = Cli::command();
    let takes_value = |command: &clap::Command, name: &str| {
        let arg = command
            .get_arguments()
            .find(|arg| arg.get_long() == Some(name))?;
        Some(arg.get_action().takes_values())
    };
    let mut index = 1;
    while let Some(word) = words.get(index) {
        match word.strip_prefix("--") {
            Some(name) if takes_value(&command, name) == Some(true) => index += 2,
            Some(_) => index += 1,
            None => break,
        }
    }
    if words.get(index).map(String::as_str) != Some("serve") {
        return (words.to_vec(), Vec::new());
    }
    let serve = command
        .find_subcommand("serve")
        .expect("`serve` is a variant of `Command`");
    let ours = |name: &str| match name {
        "help" | "version" => Some(false),
        name => takes_value(serve, name).or_else(|| takes_value(&command, name)),
    };
    let (head, tail) = words.split_at(index + 1);
    let (mine, theirs) = a1111::split(tail, &ours);
    ([head, &mine].concat(), theirs)
}

/// Merges all settings.
///
/// # Errors
/// Exit 2 with every problem.
pub fn load_config(
    common: &Common,
    flags: Vec<Setting>,
    words: Vec<String>,
) -> Result<Loaded, Stop> {
    let input = Input {
        data_dir: common.data_dir.clone(),
        config_file: common.config.clone(),
        flags,
        words,
        env: &|name| std::env::var(name).ok(),
    };
    layers::load(&input).map_err(Stop::usage)
}

/// Logs what was ignored.
pub fn warn_all(loaded: &Loaded) {
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
}

/// Writes a result to stdout.
///
/// # Errors
/// Exit 1; a closed pipe is a reader that has seen enough.
pub fn print(text: &str) -> Result<(), Stop> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Stop::failed(
            anyhow::Error::new(error).context("cannot write to stdout"),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn only_serve_lines_are_split() {
        let words = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
        let (ours, theirs) = split_serve(&words(
            "sdgen --data-dir /d serve --port 5 --xformers --vae-dir /v",
        ));
        assert_eq!(
            (ours, theirs),
            (
                words("sdgen --data-dir /d serve --port 5"),
                words("--xformers --vae-dir /v")
            )
        );
        let line = words("sdgen prompt serve --xformers");
        assert_eq!(split_serve(&line), (line, vec![]));
    }
}
