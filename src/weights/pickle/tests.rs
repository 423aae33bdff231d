//! PyTorch files made by hand: good ones, damaged ones, and programs that pretend to be weights.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

/// Pieces of a pickle.
mod op {
    pub(super) fn text(text: &str) -> Vec<u8> {
        [
            b"X",
            &(text.len() as u32).to_le_bytes()[..],
            text.as_bytes(),
        ]
        .concat()
    }
    pub(super) fn int(number: i32) -> Vec<u8> {
        [b"J", &number.to_le_bytes()[..]].concat()
    }
    pub(super) fn global(module: &str, name: &str) -> Vec<u8> {
        format!("c{module}\n{name}\n").into_bytes()
    }
    pub(super) fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
        [b"(", &items.concat()[..], b"t"].concat()
    }
    /// `callable(*arguments)`.
    pub(super) fn call(callable: Vec<u8>, arguments: Vec<u8>) -> Vec<u8> {
        [callable, arguments, b"R".to_vec()].concat()
    }
}

struct Spec {
    storage: &'static str,
    offset: i32,
    size: Vec<i32>,
    stride: Vec<i32>,
}

const GOOD: fn() -> Spec = || Spec {
    storage: "FloatStorage",
    offset: 1,
    size: vec![2, 3],
    stride: vec![3, 1],
};

fn tensor(spec: &Spec) -> Vec<u8> {
    let numbers =
        |values: &[i32]| op::tuple(&values.iter().map(|n| op::int(*n)).collect::<Vec<_>>());
    let place = [
        op::text("storage"),
        op::global("torch", spec.storage),
        op::text("0"),
        op::text("cpu"),
        op::int(7),
    ];
    let storage = [op::tuple(&place), b"Q".to_vec()].concat();
    let hooks = op::call(op::global("collections", "OrderedDict"), b")".to_vec());
    let arguments = op::tuple(&[
        storage,
        op::int(spec.offset),
        numbers(&spec.size),
        numbers(&spec.stride),
        vec![0x89],
        hooks,
    ]);
    op::call(op::global("torch._utils", "_rebuild_tensor_v2"), arguments)
}

/// `{"params": {"weight": VALUE}}`.
fn program(value: &[u8]) -> Vec<u8> {
    [
        &[0x80, 2, b'}'][..],
        &op::text("params"),
        b"}",
        &op::text("weight"),
        value,
        b"ss.",
    ]
    .concat()
}

/// A zip of stored entries, as `torch.save` writes it.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let at = file.len() as u32;
        let len = bytes.len() as u32;
        // Version, flags, method, time, date, checksum, sizes, length of the name, of extra fields.
        let shared = |version: &[u8]| {
            let mut header = [version, &[0; 12]].concat();
            header.extend(len.to_le_bytes());
            header.extend(len.to_le_bytes());
            header.extend((name.len() as u16).to_le_bytes());
            header.extend([0, 0]);
            header
        };
        file.extend([b"PK\x03\x04", &shared(&[0, 0])[..], name.as_bytes(), bytes].concat());
        directory.extend([b"PK\x01\x02", &shared(&[0, 0, 0, 0])[..], &[0; 10]].concat());
        directory.extend(at.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let start = file.len() as u32;
    let count = (entries.len() as u16).to_le_bytes();
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend([count, count].concat());
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
    file
}

fn values(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn file_of(program: &[u8]) -> Vec<u8> {
    let data = values(&[9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    zip(&[("net/data.pkl", program), ("net/data/0", &data)])
}

fn open(bytes: Vec<u8>) -> Result<PickleFile, Error> {
    PickleFile::from_vec(Path::new("net.pth"), bytes)
}

#[track_caller]
fn refused(bytes: Vec<u8>, why: &str) {
    let error = open(bytes).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(why) && text.contains("`net.pth`") && text.contains(".safetensors"),
        "`{why}` is not in: {text}"
    );
}

#[test]
fn tensors_are_read_where_their_strides_say() {
    let file = open(file_of(&program(&tensor(&GOOD())))).unwrap();
    assert_eq!(file.keys(), ["weight"]);
    assert_eq!(file.shape("weight").unwrap(), [2, 3]);
    assert_eq!(file.read("weight").unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let transposed = Spec {
        size: vec![3, 2],
        stride: vec![1, 3],
        ..GOOD()
    };
    let file = open(file_of(&program(&tensor(&transposed)))).unwrap();
    assert_eq!(file.read("weight").unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    assert!(matches!(file.read("other"), Err(Error::Missing { .. })));
}

#[test]
fn a_program_is_refused_by_the_name_it_calls_and_never_run() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("ran");
    let command = op::tuple(&[op::text(&format!("touch {}", mark.display()))]);
    for (module, name) in [("os", "system"), ("posix", "system"), ("builtins", "eval")] {
        let value = op::call(op::global(module, name), command.clone());
        let bytes = file_of(&program(&value));
        // What reads the pickle below runs nothing either.
        let path = dir.path().join("net.pth");
        std::fs::write(&path, &bytes).unwrap();
        assert!(candle_core::pickle::read_all(&path).unwrap().is_empty());
        refused(bytes, &format!("calls for `{module}.{name}`"));
    }
    assert!(!mark.exists());
}

#[test]
fn what_would_panic_below_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let short = op::tuple(&[op::int(1)]);
    let value = op::call(op::global("torch._utils", "_rebuild_tensor_v2"), short);
    let bytes = file_of(&[&[0x80, 2, b'}'][..], &op::text("weight"), &value, b"s."].concat());
    let path = dir.path().join("net.pth");
    std::fs::write(&path, &bytes).unwrap();
    let below = catch_unwind(AssertUnwindSafe(|| candle_core::pickle::read_all(&path)));
    assert!(below.is_err(), "candle has learned to check: simplify");
    refused(bytes, "is not described as `torch.save` does");
}

#[test]
fn pickles_that_grow_or_nest_without_bound_are_refused() {
    // Each step remembers a pair of the one before: 2^30 values from 200 bytes.
    let mut bomb = vec![0x80, 2, b'}', b'q', 0];
    for i in 0..30u8 {
        bomb.extend([b'h', i, b'h', i, 0x86, b'q', i + 1]);
    }
    refused(file_of(&bomb), "unfolds to more than");
    let deep = [vec![0x80, 2, b')'], vec![0x85; 100_000], vec![b'.']].concat();
    refused(file_of(&deep), "nested deeper than");
    let long = [&[0x80, 2, 0x8a, 255][..], &[1; 255], b"."].concat();
    refused(file_of(&long), "a number of 255 bytes");
    let text = [&[0x80, 2, b'X', 255, 255, 255, 255][..], b"abc."].concat();
    refused(file_of(&text), "truncated");
    let large = [vec![0x80, 2], vec![b'N'; 17 << 20]].concat();
    refused(file_of(&large), "the limit is");
    for (program, why) in [
        (&b"\x80\x04\x95\0\0\0\0\0\0\0\0."[..], "opcode 0x95"),
        (b"\x80\x02\x93.", "opcode 0x93"),
        (b"\x80\x02R.", "an empty stack"),
        (b"\x80\x02t.", "misses a mark"),
        (b"\x80\x02(N(\x85t.", "takes a mark for a value"),
        (b"\x80\x02(q\0.", "takes a mark for a value"),
        (b"\x80\x02h\x05.", "never remembered"),
        (b"\x80\x02", "truncated"),
        (b"\x80\x02N.", "no state dict"),
        (b"\x80\x02}.", "no tensors"),
        (b"\x80\x02.", "damaged"),
    ] {
        refused(file_of(program), why);
    }
}

#[test]
fn tensors_outside_their_storage_are_refused() {
    let refuse = |spec: Spec, why| refused(file_of(&program(&tensor(&spec))), why);
    refuse(
        Spec {
            offset: 2,
            ..GOOD()
        },
        "lies outside its 7 stored values",
    );
    refuse(
        Spec {
            size: vec![i32::MAX; 3],
            ..GOOD()
        },
        "larger than any memory",
    );
    refuse(
        Spec {
            size: vec![1000, 1000],
            stride: vec![0, 0],
            ..GOOD()
        },
        "lies outside its 7 stored values",
    );
    refuse(
        Spec {
            stride: vec![i32::MAX, 1],
            ..GOOD()
        },
        "lies outside",
    );
    refuse(
        Spec {
            stride: vec![1],
            ..GOOD()
        },
        "as many strides as dimensions",
    );
    refuse(
        Spec {
            offset: -1,
            ..GOOD()
        },
        "not described",
    );
    refuse(
        Spec {
            storage: "StrangeStorage",
            ..GOOD()
        },
        "type `StrangeStorage`",
    );
    let good = program(&tensor(&GOOD()));
    refused(
        zip(&[("net/data.pkl", &good)]),
        "`net/data/0` of tensor `weight` is missing",
    );
    let twice = [
        &[0x80, 2, b'}'][..],
        &op::text("a"),
        &tensor(&GOOD()),
        b"s",
        &op::text("a"),
        &tensor(&GOOD()),
        b"s.",
    ];
    refused(file_of(&twice.concat()), "tensor `a` twice");
}

#[test]
fn values_that_cannot_be_computed_with_are_named() {
    let wide = Spec {
        storage: "DoubleStorage",
        offset: 0,
        size: vec![3],
        stride: vec![1],
    };
    let file = open(file_of(&program(&tensor(&wide)))).unwrap();
    assert!(
        matches!(file.read("weight"), Err(Error::Dtype { dtype, .. }) if dtype == "DoubleStorage")
    );
    let program = program(&tensor(&GOOD()));
    let nan = values(&[0.0, f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let file = open(zip(&[("net/data.pkl", &program), ("net/data/0", &nan)])).unwrap();
    assert!(matches!(file.read("weight"), Err(Error::NotFinite { .. })));
}

#[test]
fn zips_that_torch_does_not_write_are_refused() {
    let good = file_of(&program(&tensor(&GOOD())));
    let central = good.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    refused(with(central + 10, 8), "is compressed");
    // A bomb: a small entry that says it becomes large.
    refused(with(central + 27, 0x7f), "is compressed");
    refused(with(central + 8, 1), "is encrypted");
    let mut outside = good.clone();
    for field in [20, 24] {
        outside[central + field + 2] = 1;
    }
    refused(outside, "ends at byte");
    refused(with(central, b'X'), "directory is damaged");
    refused(zip(&[("net/other", b"")]), "no `data.pkl`");
    refused(
        zip(&[("a/data.pkl", b"."), ("b/data.pkl", b".")]),
        "several `data.pkl`",
    );
    refused(zip(&[("a", b""), ("a", b"")]), "`a` twice");
    refused(b"\x80\x02}q\0.".to_vec(), "before version 1.6");
    refused(b"hello".to_vec(), "no zip");
    refused(good[..good.len() - 30].to_vec(), "truncated");
}

#[test]
fn no_prefix_and_no_flipped_bit_makes_it_panic() {
    let good = file_of(&program(&tensor(&GOOD())));
    let try_all = |bytes: Vec<u8>| {
        if let Ok(file) = open(bytes) {
            for key in file.keys() {
                // Either values or an error.
                drop(file.read(key));
            }
        }
    };
    for len in 0..good.len() {
        try_all(good[..len].to_vec());
    }
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            try_all(bytes);
        }
    }
}
