//! What is said about files that are not a good SDXL checkpoint, word for word; and that every stored type loads.

mod support {
    pub(crate) mod golden;
}

use std::error::Error as _;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use sdgen::pipeline::{CheckpointIdentity, CheckpointSource, LoadOptions, Pipeline, VaeIdentity};
use sdgen::weights::{SafetensorsFile, Source};
use serde_json::{Value, json};
use support::golden;

const CONV_IN: &str = "model.diffusion_model.input_blocks.0.0.weight";

/// Keys and shapes of a file.
type Keys<'a> = &'a [(&'a str, &'a [usize])];
/// How a value is stored.
type Convert = fn(f32) -> Vec<u8>;

/// A directory for files of one test.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("temporary directory"))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    }
}

fn load_with(path: &Path, vae: Option<PathBuf>) -> Result<Pipeline, String> {
    let options = LoadOptions {
        latents_on_device: false,
        device: Device::Cpu,
        dtype: DType::F32,
        vae: vae.map(|path| VaeIdentity {
            path,
            shorthash: String::new(),
        }),
    };
    let source = CheckpointSource::File(path.into());
    Pipeline::load(&source, CheckpointIdentity::default(), &options).map_err(|e| e.to_string())
}

/// What loading the file says, with its path as `FILE`.
#[track_caller]
fn refusal(path: &Path) -> String {
    let error = load_with(path, None).expect_err("refused");
    error.replace(&path.display().to_string(), "FILE")
}

/// The tiny checkpoint taken apart: header and data.
struct Parts {
    header: serde_json::Map<String, Value>,
    data: Vec<u8>,
}

impl Parts {
    fn tiny() -> Self {
        let bytes = golden::unpack("tiny_sdxl.safetensors");
        let n = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().expect("eight")))
            .expect("small");
        Self {
            header: serde_json::from_slice(&bytes[8..8 + n]).expect("JSON"),
            data: bytes[8 + n..].to_vec(),
        }
    }

    fn of(entries: &[(&str, &[usize])]) -> Self {
        let (mut header, mut offset) = (serde_json::Map::new(), 0);
        for (key, shape) in entries {
            let end = offset + 2 * shape.iter().product::<usize>();
            header.insert(
                (*key).into(),
                json!({"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}),
            );
            offset = end;
        }
        Self {
            header,
            data: vec![0; offset],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let header = serde_json::to_vec(&self.header).expect("JSON");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(&self.data);
        bytes
    }

    /// Rewrites all half-precision tensors in another type.
    fn store_as(&mut self, dtype: &str, convert: impl Fn(f32) -> Vec<u8>) {
        let mut keys: Vec<(usize, String)> = self
            .header
            .iter()
            .filter(|(k, _)| *k != "__metadata__")
            .map(|(k, v)| {
                (
                    v["data_offsets"][0].as_u64().expect("offset") as usize,
                    k.clone(),
                )
            })
            .collect();
        keys.sort();
        let mut data = Vec::new();
        for (from, key) in keys {
            let entry = &mut self.header[&key];
            let to = entry["data_offsets"][1].as_u64().expect("offset") as usize;
            let begin = data.len();
            if entry["dtype"] == "F16" {
                let halves = self.data[from..to].chunks_exact(2);
                data.extend(
                    halves.flat_map(|b| convert(half::f16::from_le_bytes([b[0], b[1]]).to_f32())),
                );
                entry["dtype"] = json!(dtype);
            } else {
                data.extend_from_slice(&self.data[from..to]);
            }
            entry["data_offsets"] = json!([begin, data.len()]);
        }
        self.data = data;
    }
}

#[test]
fn a_missing_file_is_named_with_the_reason() {
    let path = Path::new("/nonexistent/model.safetensors");
    assert_eq!(
        refusal(path),
        "cannot read checkpoint: `FILE`; check the path and its permissions"
    );
    let error = SafetensorsFile::open(path).expect_err("refused");
    let cause = error.source().expect("the system's reason").to_string();
    assert!(cause.contains("No such file"), "{cause}");
}

#[test]
fn a_folder_is_told_that_diffusers_folders_are_not_loaded() {
    let folder = Folder::new();
    assert_eq!(
        refusal(folder.0.path()),
        "`FILE` is a folder; sdgen loads SDXL checkpoints as a single `.safetensors` or `.ckpt` file: a diffusers folder cannot be loaded yet; use the model's single-file release"
    );
}

#[test]
fn truncated_files_say_how_much_is_missing() {
    let (folder, bytes) = (Folder::new(), Parts::tiny().bytes());
    let path = folder.write("half.safetensors", &bytes[..bytes.len() / 2]);
    assert_eq!(
        refusal(&path),
        format!(
            "checkpoint is truncated: `FILE` has {} bytes, its header needs {}; download it again",
            bytes.len() / 2,
            bytes.len()
        )
    );
    let path = folder.write("head.safetensors", &bytes[..100]);
    assert!(
        refusal(&path)
            .starts_with("checkpoint is truncated: `FILE` has 100 bytes, its header needs ")
    );
    let path = folder.write("empty.safetensors", &[]);
    assert_eq!(
        refusal(&path),
        "checkpoint is truncated: `FILE` has 0 bytes, its header needs 8; download it again"
    );
    let path = folder.write("five.safetensors", &[1, 2, 3, 4, 5]);
    assert_eq!(
        refusal(&path),
        "checkpoint is truncated: `FILE` has 5 bytes, its header needs 8; download it again"
    );
}

#[test]
fn an_impossible_header_length_is_refused_before_any_allocation() {
    let folder = Folder::new();
    let mut bytes = (1u64 << 60).to_le_bytes().to_vec();
    bytes.extend(b"{}");
    let path = folder.write("huge.safetensors", &bytes);
    assert_eq!(
        refusal(&path),
        "not a safetensors file: `FILE` declares a header of 1152921504606846976 bytes; the limit is 100000000 and the file has 10"
    );
    let path = folder.write("text.safetensors", b"hello world, this is not a checkpoint");
    assert!(refusal(&path).starts_with("not a safetensors file: `FILE` declares a header of "));
}

#[test]
fn contradictory_headers_are_refused() {
    let folder = Folder::new();
    let mut parts = Parts::tiny();
    let offsets = parts.header[CONV_IN]["data_offsets"].clone();
    let (from, to) = (
        offsets[0].as_u64().expect("offset"),
        offsets[1].as_u64().expect("offset"),
    );
    parts.header[CONV_IN]["data_offsets"] = json!([from - 2, to - 2]);
    let path = folder.write("overlap.safetensors", &parts.bytes());
    let said = refusal(&path);
    assert!(
        said.starts_with("damaged safetensors header: `FILE`: the bytes of tensor `")
            && said.ends_with("` overlap another's or leave a gap; download it again"),
        "{said}"
    );

    let mut parts = Parts::tiny();
    parts.header[CONV_IN]["shape"] = json!([1u64 << 40, 1u64 << 40, 3, 3]);
    let path = folder.write("overflow.safetensors", &parts.bytes());
    assert_eq!(
        refusal(&path),
        "damaged safetensors header: `FILE`: a shape overflows; download it again"
    );

    let path = folder.write(
        "json.safetensors",
        &[8u64.to_le_bytes().as_slice(), b"{\"a\": 1}"].concat(),
    );
    assert!(
        refusal(&path)
            .starts_with("damaged safetensors header: `FILE`: it is not the format's JSON (")
    );
    let path = folder.write(
        "utf8.safetensors",
        &[2u64.to_le_bytes().as_slice(), b"\xff\xfe"].concat(),
    );
    assert_eq!(
        refusal(&path),
        "damaged safetensors header: `FILE`: it is not UTF-8; download it again"
    );
    let mut longer = Parts::tiny();
    longer.data.extend([0; 6]);
    let path = folder.write("longer.safetensors", &longer.bytes());
    assert_eq!(
        refusal(&path),
        "damaged safetensors header: `FILE`: 6 bytes follow the last tensor; download it again"
    );
}

#[test]
fn other_formats_are_named() {
    let folder = Folder::new();
    let pickles: [(&str, &[u8], &str); 4] = [
        (
            "zip.safetensors",
            b"PK\x03\x04\0\0\0\0\0\0",
            "a pickled PyTorch file (zip)",
        ),
        (
            "old.safetensors",
            b"\x80\x02}q\0X\0\0\0\0",
            "a pickled PyTorch file",
        ),
        ("model.gguf", b"GGUF\x03\0\0\0\0\0\0\0", "a GGUF file"),
        (
            "page.safetensors",
            b"<!DOCTYPE html>",
            "an HTML page (a failed download)",
        ),
    ];
    for (name, bytes, what) in pickles {
        let path = folder.write(name, bytes);
        assert_eq!(
            refusal(&path),
            format!(
                "`FILE` is {what}; sdgen loads SDXL checkpoints as a single `.safetensors` or `.ckpt` file: convert it with a tool you trust, or use the model's `.safetensors` release"
            )
        );
    }
}

#[test]
fn other_models_are_named_with_what_to_do() {
    let folder = Folder::new();
    let unet: (&str, &[usize]) = (CONV_IN, &[4, 4, 3, 3]);
    let cases: [(Keys<'_>, &str); 4] = [
        (
            &[
                unet,
                (
                    "cond_stage_model.transformer.text_model.final_layer_norm.weight",
                    &[768],
                ),
            ],
            "`FILE` is a Stable Diffusion 1.x checkpoint, not an SDXL checkpoint; use an SDXL checkpoint",
        ),
        (
            &[unet, ("cond_stage_model.model.ln_final.weight", &[1024])],
            "`FILE` is a Stable Diffusion 2.x checkpoint, not an SDXL checkpoint; use an SDXL checkpoint",
        ),
        (
            &[
                unet,
                ("conditioner.embedders.0.model.ln_final.weight", &[1280]),
            ],
            "`FILE` is an SDXL refiner, not an SDXL checkpoint; a refiner takes over from an SDXL checkpoint: name it as `refiner_checkpoint` or `--refiner`",
        ),
        (
            &[("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", &[4, 4])],
            "`FILE` is a LoRA, not an SDXL checkpoint; put it into `models/Lora` and write `<lora:NAME:1>` in the prompt",
        ),
    ];
    for (entries, said) in cases {
        let path = folder.write("other.safetensors", &Parts::of(entries).bytes());
        assert_eq!(refusal(&path), said);
    }
}

#[test]
fn missing_misshapen_and_unreadable_tensors_are_named() {
    let folder = Folder::new();
    let mut parts = Parts::tiny();
    let key = "model.diffusion_model.middle_block.1.transformer_blocks.1.attn2.to_out.0.weight";
    let entry = parts.header.remove(key).expect("there");
    parts.header.insert("unused".into(), entry);
    let path = folder.write("missing.safetensors", &parts.bytes());
    assert_eq!(
        refusal(&path),
        format!(
            "tensor `{key}` is missing from `FILE`; the file is incomplete or of another model"
        )
    );

    let mut parts = Parts::tiny();
    let key = "model.diffusion_model.out.2.weight";
    parts.header[key]["shape"] = json!([4, 16, 6, 3]);
    let path = folder.write("shape.safetensors", &parts.bytes());
    assert_eq!(
        refusal(&path),
        format!("tensor `{key}` in `FILE` has shape [4, 16, 6, 3], the model needs [4, 32, 3, 3]")
    );

    let mut parts = Parts::tiny();
    parts.header[key]["dtype"] = json!("I16");
    let path = folder.write("dtype.safetensors", &parts.bytes());
    assert_eq!(
        refusal(&path),
        format!("tensor `{key}` in `FILE` has type I16; supported are F32, F16, BF16 and F8_E4M3")
    );

    let mut parts = Parts::tiny();
    let at = parts.header[key]["data_offsets"][0]
        .as_u64()
        .expect("offset") as usize;
    parts.data[at + 10..at + 12].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let path = folder.write("nan.safetensors", &parts.bytes());
    assert_eq!(
        refusal(&path),
        format!(
            "tensor `{key}` in `FILE` contains NaN or infinite values; the checkpoint is damaged (a failed merge or conversion)"
        )
    );

    let mut parts = Parts::tiny();
    parts.header.get_mut("__metadata__").expect("there")["sdgen.head_dim"] = json!("48");
    let path = folder.write("heads.safetensors", &parts.bytes());
    let said = refusal(&path);
    assert!(
        said.ends_with("does not fit the architecture: 32 channels do not divide into heads of 48"),
        "{said}"
    );
}

#[test]
fn a_checkpoint_without_vae_takes_one_from_a_file() {
    let folder = Folder::new();
    let mut parts = Parts::tiny();
    let whole = folder.write("whole.safetensors", &parts.bytes());
    let keys: Vec<String> = parts
        .header
        .keys()
        .filter(|k| k.starts_with("first_stage_model."))
        .cloned()
        .collect();
    for (i, key) in keys.iter().enumerate() {
        let entry = parts.header.remove(key).expect("there");
        parts.header.insert(format!("unused.{i}"), entry);
    }
    let path = folder.write("bare.safetensors", &parts.bytes());
    assert_eq!(
        refusal(&path),
        "`FILE` has no VAE (`first_stage_model.*`); give one with `--vae FILE`"
    );
    load_with(&path, Some(whole.clone())).expect("the VAE of another checkpoint");
    let said = load_with(
        &whole,
        Some(folder.write("vae.safetensors", &Parts::of(&[("x", &[1])]).bytes())),
    )
    .expect_err("no VAE");
    assert!(
        said.contains("tensor `quant_conv.weight` is missing from `"),
        "{said}"
    );
}

#[test]
fn every_stored_type_loads_to_the_same_values_within_its_precision() {
    let folder = Folder::new();
    let plain = SafetensorsFile::open(&folder.write("f16.safetensors", &Parts::tiny().bytes()))
        .expect("opens");
    let want = plain.read(CONV_IN).expect("reads");
    // Two to the minus mantissa bits, rounded to nearest.
    let types: [(&str, f32, Convert); 3] = [
        ("F32", 0.0, |v| v.to_le_bytes().to_vec()),
        ("BF16", 1.0 / 256.0, |v| {
            half::bf16::from_f32(v).to_le_bytes().to_vec()
        }),
        ("F8_E4M3", 1.0 / 16.0, |v| vec![nearest_e4m3(v)]),
    ];
    for (dtype, precision, convert) in types {
        let mut parts = Parts::tiny();
        parts.store_as(dtype, convert);
        let path = folder.write("other.safetensors", &parts.bytes());
        let got = SafetensorsFile::open(&path)
            .expect("opens")
            .read(CONV_IN)
            .expect("reads");
        for (g, w) in got.iter().zip(&want) {
            // Below 2^-6 FP8 has only steps of 2^-9.
            assert!(
                (g - w).abs() <= precision * w.abs().max(1.0 / 64.0),
                "{dtype}: {g} for {w}"
            );
        }
        load_with(&path, None).expect("loads whole");
    }
}

/// All FP8 values with their codes, ascending.
static E4M3: std::sync::LazyLock<Vec<(f32, u8)>> = std::sync::LazyLock::new(|| {
    let value = |code: u8| {
        let magnitude = match (code >> 3 & 15, f32::from(code & 7)) {
            (0, m) => m / 512.0,
            (e, m) => (1.0 + m / 8.0) * 2f32.powi(i32::from(e) - 7),
        };
        if code & 0x80 == 0 {
            magnitude
        } else {
            -magnitude
        }
    };
    let codes = (0..=0x7eu8).chain(0x80..=0xfe);
    let mut values: Vec<(f32, u8)> = codes.map(|code| (value(code), code)).collect();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    values
});

/// The FP8 code whose value is nearest.
fn nearest_e4m3(v: f32) -> u8 {
    let above = E4M3
        .partition_point(|(value, _)| *value < v)
        .clamp(1, E4M3.len() - 1);
    let (below, above) = (E4M3[above - 1], E4M3[above]);
    if v - below.0 < above.0 - v {
        below.1
    } else {
        above.1
    }
}
