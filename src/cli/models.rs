//! `sdgen models`: list, info, hash, pull.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Common, Stop, Verbosity, load_config, print, pull};
use crate::engine::checkpoint::{Checkpoint, VaeChoice};
use crate::engine::hashes;
use crate::engine::models::Catalog;
use crate::pipeline::CheckpointSource;
use crate::telemetry;

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// List checkpoints by title
    List,
    /// Describe a checkpoint
    Info(NameArgs),
    /// Print a checkpoint's hashes
    Hash(NameArgs),
    /// Download a checkpoint: owner/repo/file.safetensors on the Hugging Face hub, or an address
    Pull(PullArgs),
}

/// One checkpoint.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Title, name, hash or path
    pub name: String,
}

/// What to download.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// owner/repo/path/file.safetensors, or https://…
    pub source: String,
    /// Directory to put it into [default: the first directory of checkpoints]
    #[arg(long, value_name = "DIR")]
    pub into: Option<PathBuf>,
    /// Expected SHA-256; checked besides what the server says
    #[arg(long, value_name = "HEX")]
    pub sha256: Option<String>,
    /// No progress bar
    #[arg(long)]
    pub quiet: bool,
}

/// Runs one of the subcommands.
///
/// # Errors
/// Exit 2 for an unknown checkpoint, 1 for anything that goes wrong with a file or download.
pub fn run(command: ModelsCommand, common: &Common) -> Result<(), Stop> {
    let mut config = load_config(common, Vec::new(), Vec::new())?.config;
    telemetry::init(&config.log);
    if matches!(command, ModelsCommand::Hash(_)) {
        config.model.hashing = true;
    }
    match command {
        ModelsCommand::List => {
            let titles = Catalog::open(&config).checkpoints();
            print(&titles.iter().fold(String::new(), |text, checkpoint| {
                text + &checkpoint.title() + "\n"
            }))
        }
        ModelsCommand::Info(args) => print(&info(&find(&Catalog::open(&config), &args.name)?)?),
        ModelsCommand::Hash(args) => {
            let catalog = Catalog::open(&config);
            print(&hash(&catalog, find(&catalog, &args.name)?)?)
        }
        ModelsCommand::Pull(args) => {
            let directory = args
                .into
                .clone()
                .or_else(|| config.checkpoint_dirs().into_iter().next())
                .unwrap_or_default();
            let path = pull::pull(
                &args.source,
                &directory,
                args.sha256.as_deref(),
                Verbosity::from_flag(args.quiet),
            )
            .map_err(Stop::failed)?;
            print(&format!("{}\n", path.display()))
        }
    }
}

fn find(catalog: &Catalog, name: &str) -> Result<Checkpoint, Stop> {
    catalog.find_or_open(name).map_err(Stop::usage)
}

fn hash(catalog: &Catalog, checkpoint: Checkpoint) -> Result<String, Stop> {
    let CheckpointSource::File(path) = checkpoint.source.clone() else {
        return Err(Stop::usage_text(format!(
            "`{}` is part of the program and has no file to hash",
            checkpoint.name
        )));
    };
    let selection = catalog
        .select(checkpoint, &VaeChoice::Own)
        .map_err(Stop::failed)?;
    let legacy = hashes::legacy(&path).map_err(Stop::failed)?;
    Ok(format!(
        "sha256 {}\nshort  {}\nlegacy {legacy}\n",
        selection.sha256, selection.identity.shorthash
    ))
}

fn info(checkpoint: &Checkpoint) -> Result<String, Stop> {
    let mut lines = vec![
        ("title", checkpoint.title()),
        ("name", checkpoint.model_name()),
        ("file", checkpoint.filename()),
        (
            "sha256",
            checkpoint
                .sha256
                .clone()
                .unwrap_or_else(|| "not computed; see `sdgen models hash`".into()),
        ),
    ];
    let header = checkpoint.inspect().map_err(Stop::failed)?;
    lines.push(("kind", header.kind.to_string()));
    lines.push((
        "tensors",
        format!("{} in {} bytes", header.tensors, header.bytes),
    ));
    lines.push(("dtypes", header.dtypes.join(" ")));
    let known = [
        "modelspec.title",
        "modelspec.architecture",
        "modelspec.resolution",
        "modelspec.license",
    ];
    lines.extend(
        known
            .into_iter()
            .filter_map(|key| Some((key, header.metadata.get(key)?.clone()))),
    );
    Ok(lines.iter().fold(String::new(), |text, (key, value)| {
        text + &format!("{key}: {value}\n")
    }))
}
