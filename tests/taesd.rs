//! TAESD on seeded random weights against the same layers written out with candle's `[batch, channels, h, w]` operations.
//!
//! Tolerance 1e-5 of the largest value: the same f32 sums in another order, twenty layers deep.

mod support {
    pub(crate) mod close;
    pub(crate) mod golden;
}

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Result, Tensor};
use sdgen::models::Taesd;
use sdgen::models::taesd::Side;
use sdgen::nn::Placement;
use sdgen::weights::SafetensorsFile;
use support::close::{Tolerance, assert_close};
use support::golden::{channels_first, values};

const TOLERANCE: Tolerance = Tolerance {
    abs: 0.0,
    rel_of_max: 1e-5,
};
/// Channels inside; the published model has 64.
const WIDTH: usize = 8;

/// Seeded values in [-amplitude, amplitude).
fn noise(shape: &[usize], seed: u64, amplitude: f32) -> Tensor {
    let mut state = seed * 2 + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * amplitude
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("shape fits")
}

struct Weights(HashMap<String, Tensor>);

impl Weights {
    fn conv(&mut self, key: &str, outputs: usize, inputs: usize, bias: bool) {
        let seed = self.0.len() as u64 + 7;
        let amplitude = (3.0 / (9 * inputs) as f32).sqrt();
        self.0.insert(
            format!("{key}.weight"),
            noise(&[outputs, inputs, 3, 3], seed, amplitude),
        );
        if bias {
            self.0
                .insert(format!("{key}.bias"), noise(&[outputs], seed, 0.1));
        }
    }

    fn block(&mut self, index: usize) {
        for part in [0, 2, 4] {
            self.conv(&format!("{index}.conv.{part}"), WIDTH, WIDTH, true);
        }
    }

    fn file(&self) -> SafetensorsFile {
        let bytes = safetensors::serialize(&self.0, None).expect("serialises");
        SafetensorsFile::from_vec(Path::new("taesd"), bytes).expect("valid")
    }

    fn apply(&self, key: &str, x: &Tensor, stride: usize) -> Result<Tensor> {
        let y = x.conv2d(&self.0[&format!("{key}.weight")], 1, stride, 1, 1)?;
        match self.0.get(&format!("{key}.bias")) {
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
            None => Ok(y),
        }
    }

    fn apply_block(&self, index: usize, x: &Tensor) -> Result<Tensor> {
        let h = self.apply(&format!("{index}.conv.0"), x, 1)?.relu()?;
        let h = self.apply(&format!("{index}.conv.2"), &h, 1)?.relu()?;
        (self.apply(&format!("{index}.conv.4"), &h, 1)? + x)?.relu()
    }
}

/// Decoder: conv, `ReLU`, three times (three blocks, doubling, conv without bias), block, conv.
fn decoder() -> Weights {
    let mut w = Weights(HashMap::new());
    w.conv("1", WIDTH, 4, true);
    for (blocks, conv) in [(3, 7), (8, 12), (13, 17)] {
        (blocks..blocks + 3).for_each(|i| w.block(i));
        w.conv(&conv.to_string(), WIDTH, WIDTH, false);
    }
    w.block(18);
    w.conv("19", 3, WIDTH, true);
    w
}

fn decode(w: &Weights, z: &Tensor) -> Result<Tensor> {
    let z = ((z / 3.0)?.tanh()? * 3.0)?;
    let mut h = w.apply("1", &z, 1)?.relu()?;
    for (blocks, conv) in [(3, 7), (8, 12), (13, 17)] {
        for i in blocks..blocks + 3 {
            h = w.apply_block(i, &h)?;
        }
        let (_, _, height, width) = h.dims4()?;
        h = w.apply(
            &conv.to_string(),
            &h.upsample_nearest2d(2 * height, 2 * width)?,
            1,
        )?;
    }
    w.apply("19", &w.apply_block(18, &h)?, 1)
}

/// Encoder: conv, block, three times (halving conv without bias, three blocks), conv.
fn encoder() -> Weights {
    let mut w = Weights(HashMap::new());
    w.conv("0", WIDTH, 3, true);
    w.block(1);
    for conv in [2, 6, 10] {
        w.conv(&conv.to_string(), WIDTH, WIDTH, false);
        (conv + 1..conv + 4).for_each(|i| w.block(i));
    }
    w.conv("14", 4, WIDTH, true);
    w
}

fn encode(w: &Weights, x: &Tensor) -> Result<Tensor> {
    let mut h = w.apply_block(1, &w.apply("0", x, 1)?)?;
    for conv in [2, 6, 10] {
        h = w.apply(&conv.to_string(), &h, 2)?;
        for i in conv + 1..conv + 4 {
            h = w.apply_block(i, &h)?;
        }
    }
    w.apply("14", &h, 1)
}

fn channels_last(x: &Tensor) -> Tensor {
    x.permute((0, 2, 3, 1))
        .and_then(|x| x.contiguous())
        .expect("four dimensions")
}

#[test]
fn decoder_equals_its_layers_written_out() {
    let (w, z) = (decoder(), noise(&[2, 4, 5, 3], 1, 4.0));
    let taesd = Taesd::new(&w.file(), Side::Decoder, &Placement::cpu()).expect("builds");
    let got = taesd.forward(&channels_last(&z)).expect("runs");
    assert_eq!(got.dims(), [2, 40, 24, 3]);
    assert_close(
        "decoder",
        &channels_first(&got),
        &values(&decode(&w, &z).expect("runs")),
        TOLERANCE,
    );
}

#[test]
fn encoder_equals_its_layers_written_out() {
    let (w, x) = (encoder(), noise(&[1, 3, 24, 16], 2, 1.0));
    let taesd = Taesd::new(&w.file(), Side::Encoder, &Placement::cpu()).expect("builds");
    let got = taesd.forward(&channels_last(&x)).expect("runs");
    assert_eq!(got.dims(), [1, 3, 2, 4]);
    assert_close(
        "encoder",
        &channels_first(&got),
        &values(&encode(&w, &x).expect("runs")),
        TOLERANCE,
    );
}

#[test]
fn packed_keys_load_and_an_incomplete_file_is_refused() {
    let mut w = decoder();
    let keys: Vec<String> = w.0.keys().cloned().collect();
    for key in keys {
        let tensor = w.0.remove(&key).expect("there");
        w.0.insert(format!("decoder.layers.{key}"), tensor);
    }
    assert!(Taesd::new(&w.file(), Side::Decoder, &Placement::cpu()).is_ok());
    w.0.remove("decoder.layers.3.conv.2.weight");
    let error = Taesd::new(&w.file(), Side::Decoder, &Placement::cpu()).expect_err("refused");
    assert!(
        error
            .to_string()
            .contains("`decoder.layers.3.conv.2.weight` is missing"),
        "{error}"
    );
}
