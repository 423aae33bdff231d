//! `sdgen bench`: seconds, operations a second and memory of each part of a job, of whole jobs, or of single operations; and whether a
//! device computes what the CPU does.

use std::path::PathBuf;

use candle_core::DType;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{Common, Stop, load_config, print};
use crate::config::{Config, DeviceChoice, DtypeChoice};
use crate::engine::backend::PipelineBackend;
use crate::engine::models::Catalog;
use crate::nn::cpu::peak::peak;
use crate::nn::cpu::{Isa, Precision};
use crate::nn::{Placement, Storage};
use crate::pipeline::bench::{
    BenchModel, BenchOptions, JobOptions, Part, measure, measure_jobs, measure_lora_switch,
    measure_operations, write_synthetic,
};
use crate::pipeline::verify::{Row, Scope, VerifyOptions, verify};
use crate::pipeline::{CheckpointSource, cuda};
use crate::telemetry;

/// What to measure.
#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct BenchArgs {
    /// Random weights in the shape of a published model instead of a checkpoint
    #[arg(long, value_name = "MODEL", value_parser = ["sdxl"])]
    pub synthetic: Option<String>,
    /// Checkpoint to measure [default: as for `prompt`]
    #[arg(
        short = 'm',
        long,
        value_name = "PATH|NAME",
        conflicts_with = "synthetic"
    )]
    pub checkpoint: Option<String>,
    /// Picture width in pixels
    #[arg(short = 'W', long, default_value_t = 512)]
    pub width: usize,
    /// Picture height in pixels
    #[arg(short = 'H', long, default_value_t = 512)]
    pub height: usize,
    /// Denoising steps, each with both halves of the guidance
    #[arg(long, default_value_t = 2)]
    pub steps: usize,
    /// Write the synthetic model to a file (f16, 6.9 GB) instead of measuring
    #[arg(long, value_name = "FILE", requires = "synthetic")]
    pub write: Option<PathBuf>,
    /// Measure single operations at SDXL's shapes instead of a whole job
    #[arg(long, conflicts_with_all = ["synthetic", "checkpoint"])]
    pub operations: bool,
    /// Measure putting this LoRA on and off; a file that is not there is written first (noise of rank 64 for every layer)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["operations", "write"])]
    pub lora_switch: Option<PathBuf>,
    /// Measure whole jobs of a checkpoint, from prompt to PNG, with these numbers of steps [default: 30,20]
    #[arg(long, value_name = "STEPS", value_delimiter = ',', num_args = 0..=1, default_missing_value = "30,20",
        conflicts_with_all = ["operations", "lora_switch", "synthetic"])]
    pub job: Option<Vec<usize>>,
    /// Compare operations, pictures of a small checkpoint and golden data with f32 on the CPU; exit 1 if one is off
    #[arg(long, value_name = "SCOPE", num_args = 0..=1, default_missing_value = "all",
        conflicts_with_all = ["operations", "lora_switch", "synthetic", "job"])]
    pub verify: Option<VerifyScope>,
    /// `tests/golden` of a checkout, for `--verify`
    #[arg(long, value_name = "DIR", requires = "verify")]
    pub golden: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// auto, f32, bf16, fp8 or, on CUDA, f16
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<DtypeChoice>,
    /// Threads that compute [default: as many as the process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// How much is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VerifyScope {
    /// Every operation on small shapes
    Quick,
    /// Every operation
    Operations,
    /// Operations, pictures, golden data if given
    All,
}

/// Runs the measurement and prints each part as it ends.
///
/// # Errors
/// Exit 2 for an unknown checkpoint, device or size, 1 when the model cannot be loaded or run, or a comparison fails.
pub fn run(args: &BenchArgs, common: &Common) -> Result<(), Stop> {
    let config = load_config(common, Vec::new(), Vec::new())?.config;
    telemetry::init(&config.log);
    let place = place(args, &config)?;
    if let Some(path) = &args.write {
        return write_synthetic(path).map_err(Stop::failed);
    }
    if args.width < 64 || args.height < 64 || args.width > 4096 || args.height > 4096 {
        return Err(Stop::usage_text(format!(
            "size {}x{} is outside 64x64 to 4096x4096",
            args.width, args.height
        )));
    }
    if let Some(scope) = args.verify {
        return compare(args, scope, &place, &config);
    }
    // The peak of the CPU; what a card reaches is another program's to say.
    let peak = place.device.is_cpu().then(|| {
        peak(match place.dtype {
            DType::BF16 => Precision::Bf16,
            _ => Precision::F32,
        })
    });
    let mut report = |part: Part| {
        // A closed pipe does not end a measurement.
        let _ = print(&line(&part, peak, args.json));
    };
    if args.operations {
        measure_operations(&place, &mut report).map_err(Stop::failed)?;
    } else {
        measure_model(args, &place, &config, &mut report)?;
    }
    print(&summary(&place, peak, args.json))
}

/// Parts, jobs or a LoRA of a model.
fn measure_model(
    args: &BenchArgs,
    place: &Placement,
    config: &Config,
    report: &mut dyn FnMut(Part),
) -> Result<(), Stop> {
    if let Some(steps) = &args.job {
        let options = JobOptions {
            width: args.width,
            height: args.height,
            steps: steps.clone(),
            vae_memory: config.device.vae_memory_mib.saturating_mul(1 << 20),
        };
        let source = checkpoint(args, config)?;
        return measure_jobs(&source, place, &options, report).map_err(Stop::failed);
    }
    let model = if args.synthetic.is_some() {
        BenchModel::Synthetic
    } else {
        BenchModel::Checkpoint(checkpoint(args, config)?)
    };
    let options = BenchOptions {
        width: args.width,
        height: args.height,
        steps: args.steps,
    };
    match &args.lora_switch {
        Some(lora) => measure_lora_switch(&model, lora, place, report),
        None => measure(&model, place, options, report),
    }
    .map_err(Stop::failed)
}

/// The checkpoint of `-m`, else the one that `prompt` takes.
fn checkpoint(args: &BenchArgs, config: &Config) -> Result<CheckpointSource, Stop> {
    let catalog = Catalog::open(config);
    let checkpoint = match &args.checkpoint {
        Some(name) => catalog.find_or_open(name).map_err(Stop::usage)?,
        None => catalog.default_checkpoint(),
    };
    Ok(checkpoint.source)
}

/// Device and type, prepared as flags and settings say.
fn place(args: &BenchArgs, config: &Config) -> Result<Placement, Stop> {
    let mut settings = config.device.clone();
    settings.threads = args.threads.unwrap_or(settings.threads);
    settings.device = args.device.clone().unwrap_or(settings.device);
    settings.dtype = args.dtype.unwrap_or(settings.dtype);
    // Of several devices the first.
    let devices = PipelineBackend::on_each(&settings).map_err(Stop::usage)?;
    let Some(open) = devices.into_iter().next() else {
        return Err(Stop::usage_text("no device to measure"));
    };
    let backend = open().map_err(Stop::usage)?;
    let (device, dtype) = backend.device_and_dtype();
    Ok(Placement::new(device, dtype))
}

/// Prints a row for each comparison.
fn compare(
    args: &BenchArgs,
    scope: VerifyScope,
    place: &Placement,
    config: &Config,
) -> Result<(), Stop> {
    let options = VerifyOptions {
        scope: match scope {
            VerifyScope::Quick => Scope::Quick,
            VerifyScope::Operations => Scope::Operations,
            VerifyScope::All => Scope::All,
        },
        // Without `-m` not a user's checkpoint, of which the CPU's pictures would take minutes.
        checkpoint: match args.checkpoint {
            Some(_) => checkpoint(args, config)?,
            None => CheckpointSource::Embedded,
        },
        golden: args.golden.as_deref(),
    };
    let mut failed = Vec::new();
    let mut count = 0;
    verify(place, &options, &mut |row| {
        let _ = print(&verdict(&row, place, args.json));
        count += 1;
        if !row.is_ok() {
            failed.push(row.check);
        }
    });
    if failed.is_empty() {
        return Ok(());
    }
    Err(Stop::failed(anyhow::Error::msg(format!(
        "{} of {count} comparisons failed: {}",
        failed.len(),
        failed.join("; ")
    ))))
}

/// The compute type as `--dtype` names it.
fn dtype_name(place: &Placement) -> &'static str {
    match place.storage {
        Storage::Wide => place.dtype.as_str(),
        Storage::E4m3 => "fp8",
    }
}

fn verdict(row: &Row, place: &Placement, json: bool) -> String {
    let (ok, dtype) = (row.is_ok(), dtype_name(place));
    if json {
        // JSON has no infinity: what could not run has no error.
        let error = row.error.is_finite().then_some(row.error);
        let value = json!({
            "check": row.check, "dtype": dtype, "error": error, "tolerance": row.tolerance, "ok": ok, "note": row.note,
        });
        return format!("{value}\n");
    }
    let ok = if ok { "ok" } else { "FAILED" };
    format!(
        "{:<52} {dtype:<4} {:>9.2e} of {:>7.1e} {ok:<6} {}\n",
        row.check, row.error, row.tolerance, row.note
    )
}

/// `peak`: floating-point operations a second that the CPU reaches from its registers.
fn line(part: &Part, peak: Option<f64>, json: bool) -> String {
    let rate = part.operations as f64 / part.seconds;
    if json {
        return format!("{}\n", fields(part, rate, peak));
    }
    let rate = match peak {
        _ if part.operations == 0 => String::new(),
        Some(peak) => format!("{:9.1} GFLOP/s {:4.0} %", rate / 1e9, rate / peak * 100.0),
        None => format!("{:9.1} TFLOP/s", rate / 1e12),
    };
    let launches = part.launches.map(|n| format!(" {n} launches"));
    let memory = part.memory.map(|(free, memory)| {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        format!(
            " {:.2} GB free before, {:.2} used, {:.2} at most",
            gb(free),
            gb(memory.used),
            gb(memory.peak)
        )
    });
    format!(
        "{:<44} {:>10.3} ms {rate}{}{}\n",
        part.name,
        part.seconds * 1e3,
        launches.unwrap_or_default(),
        memory.unwrap_or_default()
    )
}

/// A part as JSON; what is not known is left out.
fn fields(part: &Part, rate: f64, peak: Option<f64>) -> Value {
    let mut value = json!({
        "part": part.name,
        "seconds": part.seconds,
        "gflop": part.operations as f64 / 1e9,
        "gflop_per_s": rate / 1e9,
    });
    if let Some(peak) = peak {
        value["share_of_peak"] = json!(rate / peak);
        return value;
    }
    if part.bytes > 0 {
        value["bytes"] = json!(part.bytes);
        value["per_step"] = json!(part.per_step);
    }
    if let Some(launches) = part.launches {
        value["launches"] = json!(launches);
    }
    if let Some((free, memory)) = part.memory {
        value["free_before_bytes"] = json!(free);
        value["used_bytes"] = json!(memory.used);
        value["peak_bytes"] = json!(memory.peak);
    }
    value
}

fn summary(place: &Placement, peak: Option<f64>, json: bool) -> String {
    let memory = telemetry::peak_memory_bytes().unwrap_or(0) as f64 / 1e9;
    let (isa, threads) = (Isa::chosen(), rayon::current_num_threads());
    let (dtype, device) = (dtype_name(place), &place.device);
    let card = cuda::name(device).unwrap_or_default();
    let taken = cuda::memory(device).map_or(0, |memory| memory.taken) as f64 / 1e9;
    match (peak, json) {
        (Some(peak), true) => {
            let value = json!({
                "peak_rss_gb": memory,
                "isa": format!("{isa:?}"),
                "threads": threads,
                "dtype": dtype,
                "peak_gflop_per_s": peak / 1e9,
            });
            format!("{value}\n")
        }
        (Some(peak), false) => format!(
            "peak memory {memory:.2} GB, {dtype}, {isa:?}, {threads} threads, at most {:.0} GFLOP/s\n",
            peak / 1e9
        ),
        (None, true) => {
            let value = json!({
                "peak_rss_gb": memory,
                "dtype": dtype,
                "card": card,
                "card_taken_gb": taken,
            });
            format!("{value}\n")
        }
        (None, false) => format!(
            "peak memory of the host {memory:.2} GB, of the card {taken:.2} GB by all, {dtype}, {card}\n"
        ),
    }
}
