//! Textual inversions in every form that A1111 reads: PyTorch files and pictures, made by `golden/make/make_embeddings.py`.
//!
//! Values are exact: all of them are powers of two or three times one.

use std::fs;
use std::path::{Path, PathBuf};

use sdgen::weights::embedding::{Embedding, EmbeddingLibrary};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/embeddings")
}

/// Row `r` is (r + 1) / 4 for CLIP ViT-L and (r + 1) / 8 for bigG.
fn assert_rows(embedding: &Embedding, rows: usize) {
    let wanted = |width: usize, first: f32| -> Vec<f32> {
        (0..rows)
            .flat_map(|row| vec![first * (row + 1) as f32; width])
            .collect()
    };
    assert_eq!(embedding.vectors, rows, "{}", embedding.name);
    assert_eq!(embedding.clip_l, wanted(768, 0.25), "{}", embedding.name);
    assert_eq!(embedding.clip_g, wanted(1280, 0.125), "{}", embedding.name);
}

#[test]
fn every_form_is_read_and_others_are_told_why_not() {
    let library = EmbeddingLibrary::scan(&golden(), |_| None);
    let mut names: Vec<_> = library.loaded.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    // A file's name counts, but of a picture the name inside.
    let wanted = [
        "concept", "large", "module", "painted", "pair", "plain", "single", "texted", "webp",
    ];
    assert_eq!(names, wanted, "skipped: {:?}", library.skipped);
    for embedding in &library.loaded {
        assert_rows(embedding, if embedding.name == "concept" { 1 } else { 2 });
    }
    let reasons = [
        ("damaged.png", "not JSON"),
        ("odd.bin", "1 to 75 vectors of 2048"),
        ("program.pt", "`__builtin__.print`"),
        ("sd1.pt", "one text encoder"),
        ("short.png", "pixels are damaged"),
    ];
    assert_eq!(
        library.skipped.len(),
        reasons.len(),
        "{:?}",
        library.skipped
    );
    for ((path, reason), (file, part)) in library.skipped.iter().zip(reasons) {
        assert!(
            path.ends_with(file) && reason.contains(part),
            "{file}: {reason}"
        );
    }
}

#[test]
fn damaged_copies_are_refused_without_a_panic() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for file in [
        "plain.pt",
        "large.pt",
        "text.png",
        "pixels.png",
        "pixels.webp",
    ] {
        let bytes = fs::read(golden().join(file)).expect("a golden file");
        let path = folder.path().join(file);
        // What follows the pixels of a picture is not needed.
        for cut in (0..bytes.len() - 32).step_by(bytes.len() / 40 + 1) {
            fs::write(&path, &bytes[..cut]).expect("written");
            assert!(
                !matches!(Embedding::open(&path), Ok(Some(_))),
                "{file} {cut}"
            );
            let mut changed = bytes.clone();
            changed[cut] ^= 0x55;
            fs::write(&path, &changed).expect("written");
            // A value may have changed; the sizes may not.
            if let Ok(Some(embedding)) = Embedding::open(&path) {
                assert_eq!(
                    embedding.clip_l.len(),
                    embedding.vectors * embedding.width_l()
                );
            }
        }
    }
}
