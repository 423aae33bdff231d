//! Noise against numbers of `PyTorch`, torchsde and `NumPy` (golden files `rng.*`, `brownian.*`, made with torch 2.6.0).

mod support {
    pub(crate) mod close;
    pub(crate) mod tensors;
}

use sdgen::rng::{BrownianTree, Generator, ImageRng, ImageRngConfig, NoiseSource, SeedSequence};
use support::close::{Tolerance, assert_close};
use support::tensors::{Tensors, json};

/// Torch's vectorised path approximates log, sin and cos in single precision; ours are exact to the last bit.
const NORMAL: Tolerance = Tolerance {
    abs: 2e-6,
    rel_of_max: 0.0,
};
/// A tree adds about 20 normals and divides by a standard deviation of down to 0.1.
const BROWNIAN: Tolerance = Tolerance {
    abs: 1e-5,
    rel_of_max: 0.0,
};

fn list<'a>(value: &'a serde_json::Value, key: &str) -> &'a Vec<serde_json::Value> {
    value[key]
        .as_array()
        .unwrap_or_else(|| panic!("list `{key}`"))
}

fn number(value: &serde_json::Value) -> f32 {
    value.as_f64().expect("a number") as f32
}

#[test]
fn cpu_normals_equal_torch_for_every_size() {
    let (tensors, cases) = (Tensors::open("rng.safetensors"), json("rng.json"));
    let (mut got, mut want) = (Vec::new(), Vec::new());
    for case in list(&cases, "cpu") {
        let values = tensors.values(case["tensor"].as_str().expect("a name"));
        let seed = case["seed"].as_u64().expect("a seed");
        got.extend(Generator::new(NoiseSource::Cpu, seed).normals(values.len()));
        want.extend(values);
    }
    assert_close("cpu randn, 6 seeds x 15 shapes", &got, &want, NORMAL);
}

#[test]
fn cpu_draws_of_mixed_sizes_from_one_generator_equal_torch() {
    let (tensors, cases) = (Tensors::open("rng.safetensors"), json("rng.json"));
    let (mut got, mut want) = (Vec::new(), Vec::new());
    let mut generator = Generator::new(NoiseSource::Cpu, 0);
    for case in list(&cases, "cpu_sequences") {
        if case["draw"] == 0 {
            generator = Generator::new(NoiseSource::Cpu, case["seed"].as_u64().expect("a seed"));
        }
        let values = tensors.values(case["tensor"].as_str().expect("a name"));
        got.extend(generator.normals(values.len()));
        want.extend(values);
    }
    assert_close("cpu randn, sequences of 8 draws", &got, &want, NORMAL);
}

#[test]
fn philox_normals_equal_the_reference_at_every_offset() {
    let (tensors, cases) = (Tensors::open("rng.safetensors"), json("rng.json"));
    let (mut got, mut want) = (Vec::new(), Vec::new());
    for case in list(&cases, "philox") {
        let values = tensors.values(case["tensor"].as_str().expect("a name"));
        let mut generator = Generator::new(NoiseSource::Nv, case["seed"].as_u64().expect("a seed"));
        for _ in 0..case["offset"].as_u64().expect("an offset") {
            generator.normals(5);
        }
        got.extend(generator.normals(values.len()));
        want.extend(values);
    }
    assert_close("philox randn, seeds x offsets x sizes", &got, &want, NORMAL);
}

#[test]
fn philox_normals_equal_published_cuda_values() {
    let first = [
        -0.92466259,
        -0.42534415,
        -2.6438457,
        0.14518388,
        -0.12086647,
        -0.57972564,
        -0.62285122,
        -0.32838709,
        -1.07454231,
        -0.36314407,
        -1.67105067,
        2.26550497,
    ];
    let mut generator = Generator::new(NoiseSource::Gpu, 0);
    assert_close("torch CUDA, seed 0", &generator.normals(12), &first, NORMAL);
    // These were printed with 6 decimals.
    let six = Tolerance {
        abs: 2e-6,
        rel_of_max: 0.0,
    };
    let second = [0.180826, -0.552263, 0.923813, -0.734970];
    assert_close(
        "torch CUDA, seed 0, second call",
        &generator.normals(4),
        &second,
        six,
    );
    for (seed, want) in [
        (42, [0.194019, 2.161374, -0.172051, 0.849060]),
        ((1 << 32) + 1, [0.854894, -0.114202, -1.071755, 1.695765]),
    ] {
        assert_close(
            &format!("philox, seed {seed}"),
            &Generator::new(NoiseSource::Nv, seed).normals(4),
            &want,
            six,
        );
    }
}

#[test]
fn mt19937_words_equal_the_golden_ones() {
    let cases = json("rng.json");
    for (seed, words) in cases["mt19937_first_words"].as_object().expect("an object") {
        let mut mt = sdgen::rng::Mt19937::new(seed.parse::<u64>().expect("a seed") as u32);
        for word in words.as_array().expect("a list") {
            assert_eq!(
                Some(u64::from(mt.next_word())),
                word.as_u64(),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn seed_sequences_equal_numpy() {
    let cases = json("brownian.json");
    for case in list(&cases, "seed_sequence") {
        let entropy = case["entropy"].as_u64().expect("entropy");
        let keys: [(&str, &[u64], usize); 4] = [
            ("root_state3", &[], 3),
            ("spawn(0,0)_state4", &[0, 0], 4),
            ("spawn(1,1)_state4", &[1, 1], 4),
            ("spawn(5,3)_state4", &[5, 3], 4),
        ];
        for (field, key, n) in keys {
            let want: Vec<u64> = list(case, field)
                .iter()
                .filter_map(serde_json::Value::as_u64)
                .collect();
            let got: Vec<u64> = SeedSequence::new(entropy, key)
                .generate_state(n)
                .into_iter()
                .map(u64::from)
                .collect();
            assert_eq!(got, want, "entropy {entropy}, {field}");
        }
    }
}

#[test]
fn brownian_noise_equals_torchsde() {
    let (tensors, cases) = (Tensors::open("brownian.safetensors"), json("brownian.json"));
    for case in list(&cases, "cases") {
        let (id, seed) = (&case["case"], case["seed"].as_u64().expect("a seed"));
        let len = list(case, "shape")
            .iter()
            .filter_map(serde_json::Value::as_u64)
            .product::<u64>() as usize;
        let (low, high) = (number(&case["sigma_min"]), number(&case["sigma_max"]));
        let mut tree = BrownianTree::new(NoiseSource::Cpu, seed, len, low, high);
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (q, query) in list(case, "queries").iter().enumerate() {
            got.extend(tree.noise(number(&query[0]), number(&query[1])));
            want.extend(tensors.values(&format!("case{id}.q{q}")));
        }
        assert_close(&format!("brownian case {id}"), &got, &want, BROWNIAN);
    }
}

#[test]
fn brownian_noise_over_philox_equals_the_specification() {
    // Karras(5); a change of a sigma's last bit moves a leaf by about 1e-3, hence the width.
    let want = [
        [-1.06878, 1.52079, -1.54563, -0.92586],
        [-0.63691, -0.59716, -0.30310, -0.00382],
        [1.67542, -0.38432, -0.67682, 1.06925],
        [0.24361, 1.03101, 0.58397, 1.06770],
    ];
    let table = sdgen::sampling::SigmaTable::default();
    let shape = sdgen::sampling::ScheduleShape::of(&table);
    let karras = sdgen::sampling::Scheduler::Karras.sigmas(5, &table, &shape);
    let mut tree = BrownianTree::new(NoiseSource::Nv, 42, 4, karras[4], karras[0]);
    let got: Vec<f32> = karras[..5]
        .windows(2)
        .flat_map(|pair| tree.noise(pair[0], pair[1]))
        .collect();
    assert_close(
        "brownian over philox",
        &got,
        &want.concat(),
        Tolerance {
            abs: 2e-3,
            rel_of_max: 0.0,
        },
    );
}

#[test]
fn a_batch_has_the_noise_of_its_pictures_drawn_singly() {
    for source in NoiseSource::ALL {
        let config = |seeds: &[u64]| ImageRngConfig {
            source,
            shape: [4, 5, 3],
            seeds: seeds.to_vec(),
            subseeds: Vec::new(),
            subseed_strength: 0.0,
            seed_resize_from: None,
            eta_noise_seed_delta: 0,
        };
        let mut batch = ImageRng::new(config(&[11, 12]));
        let mut singles = [ImageRng::new(config(&[11])), ImageRng::new(config(&[12]))];
        for draw in 0..3 {
            let want: Vec<f32> = singles
                .iter_mut()
                .flat_map(|rng| rng.next_noise().into_data())
                .collect();
            assert_eq!(
                batch.next_noise().into_data(),
                want,
                "{source}, draw {draw}"
            );
        }
    }
}
