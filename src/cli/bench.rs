//! `sdgen bench`: seconds, GFLOP/s and memory of each part of a job, or of single operations.

use std::path::PathBuf;

use candle_core::{DType, Device};
use clap::Args;

use super::{Common, Stop, load_config, print};
use crate::config::{Config, DtypeChoice};
use crate::engine::backend::prepare_cpu;
use crate::engine::models::Catalog;
use crate::nn::cpu::peak::peak;
use crate::nn::cpu::{Isa, Precision};
use crate::nn::{Placement, Storage};
use crate::pipeline::bench::{
    BenchModel, BenchOptions, Part, measure, measure_lora_switch, measure_operations,
    write_synthetic,
};
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
    /// auto, f32, bf16 or fp8
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<DtypeChoice>,
    /// Threads that compute [default: as many as the process may use]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Runs the measurement and prints each part as it ends.
///
/// # Errors
/// Exit 2 for an unknown checkpoint or size, 1 when the model cannot be loaded or run.
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
    let peak = peak(match place.dtype {
        DType::BF16 => Precision::Bf16,
        _ => Precision::F32,
    });
    let mut report = |part: Part| {
        // A closed pipe does not end a measurement.
        let _ = print(&line(&part, peak, args.json));
    };
    if args.operations {
        measure_operations(&place, &mut report).map_err(Stop::failed)?;
    } else {
        let model = if args.synthetic.is_some() {
            BenchModel::Synthetic
        } else {
            let catalog = Catalog::open(&config);
            let checkpoint = match &args.checkpoint {
                Some(name) => catalog.find_or_open(name).map_err(Stop::usage)?,
                None => catalog.default_checkpoint(),
            };
            BenchModel::Checkpoint(checkpoint.source)
        };
        let options = BenchOptions {
            width: args.width,
            height: args.height,
            steps: args.steps,
        };
        match &args.lora_switch {
            Some(lora) => measure_lora_switch(&model, lora, &place, &mut report),
            None => measure(&model, &place, options, &mut report),
        }
        .map_err(Stop::failed)?;
    }
    print(&summary(&place, peak, args.json))
}

/// The CPU, prepared as flags and settings say.
fn place(args: &BenchArgs, config: &Config) -> Result<Placement, Stop> {
    let mut device = config.device.clone();
    device.threads = args.threads.unwrap_or(device.threads);
    prepare_cpu(&device).map_err(Stop::usage)?;
    let dtype = match args.dtype.unwrap_or(device.dtype) {
        DtypeChoice::Auto | DtypeChoice::F32 => DType::F32,
        DtypeChoice::Bf16 => DType::BF16,
        DtypeChoice::Fp8 => DType::F8E4M3,
        DtypeChoice::F16 => {
            return Err(Stop::usage_text(
                "the CPU computes in f32, bf16 and fp8; use `--dtype bf16` or `--dtype f32`",
            ));
        }
    };
    Ok(Placement::new(Device::Cpu, dtype))
}

/// `peak`: floating-point operations a second that the machine reaches from its registers.
fn line(part: &Part, peak: f64, json: bool) -> String {
    let rate = part.operations as f64 / part.seconds;
    let (gflops, share) = (rate / 1e9, rate / peak);
    if json {
        let value = serde_json::json!({
            "part": part.name,
            "seconds": part.seconds,
            "gflop": part.operations as f64 / 1e9,
            "gflop_per_s": gflops,
            "share_of_peak": share,
        });
        return format!("{value}\n");
    }
    let rate = if part.operations == 0 {
        String::new()
    } else {
        format!("{gflops:9.1} GFLOP/s {:4.0} %", share * 100.0)
    };
    format!("{:<44} {:>10.3} ms {rate}\n", part.name, part.seconds * 1e3)
}

fn summary(place: &Placement, peak: f64, json: bool) -> String {
    let memory = telemetry::peak_memory_bytes().unwrap_or(0) as f64 / 1e9;
    let (isa, threads) = (Isa::chosen(), rayon::current_num_threads());
    let dtype = match place.storage {
        Storage::Wide => place.dtype.as_str(),
        Storage::E4m3 => "fp8",
    };
    let peak = peak / 1e9;
    if json {
        let value = serde_json::json!({
            "peak_rss_gb": memory,
            "isa": format!("{isa:?}"),
            "threads": threads,
            "dtype": dtype,
            "peak_gflop_per_s": peak,
        });
        return format!("{value}\n");
    }
    format!(
        "peak memory {memory:.2} GB, {dtype}, {isa:?}, {threads} threads, at most {peak:.0} GFLOP/s\n"
    )
}
