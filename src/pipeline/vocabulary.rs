//! Textual inversions as a prompt's words: found by token ids, put in place of token embeddings.
//!
//! As A1111 does it (`textual_inversion.py`): names are tokenised like prompts, so case does not matter, and of several names
//! that begin at a token the longest counts. An embedding whose vectors do not fit the text encoders is not a word.

use std::collections::HashMap;
use std::sync::Arc;

use crate::prompt::{CHUNK_LENGTH, Chunk, EmbeddingMatch, Embeddings, Flavour, Tokenizer, Tower};
use crate::weights::embedding::Embedding;

/// The textual inversions that prompts may name.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    embeddings: Vec<Arc<Embedding>>,
    /// By first token id: all ids of the name and the embedding's position; longest first.
    words: HashMap<u32, Vec<(Vec<u32>, usize)>>,
}

impl Vocabulary {
    /// `widths` are those of CLIP-L's token embeddings, if there is that encoder, and of bigG's. Of two equal names the first
    /// counts.
    pub(super) fn new(
        embeddings: Vec<Arc<Embedding>>,
        tokenizer: &Tokenizer,
        widths: (Option<usize>, usize),
    ) -> Self {
        let mut words: HashMap<u32, Vec<(Vec<u32>, usize)>> = HashMap::new();
        for (i, embedding) in embeddings.iter().enumerate() {
            let found = (embedding.width_l(), embedding.width_g());
            if widths.0.is_some_and(|width| width != found.0) || widths.1 != found.1 {
                tracing::debug!(
                    name = embedding.name,
                    ?found,
                    ?widths,
                    "embedding of another model"
                );
                continue;
            }
            let ids = tokenizer.encode(&embedding.name, Flavour::ClipL);
            let Some(first) = ids.first() else { continue };
            let same_start = words.entry(*first).or_default();
            if same_start.iter().all(|(other, _)| *other != ids) {
                same_start.push((ids, i));
                same_start.sort_by_key(|(ids, _)| std::cmp::Reverse(ids.len()));
            }
        }
        Self { embeddings, words }
    }

    /// All that was given, words or not.
    pub(super) fn given(&self) -> &[Arc<Embedding>] {
        &self.embeddings
    }

    /// Position among the 77 and vector of every row that textual inversions replace in a chunk. Rows past its end are dropped.
    pub(super) fn vectors<'a>(
        &'a self,
        chunk: &'a Chunk,
        tower: Tower,
    ) -> impl Iterator<Item = (usize, &'a [f32])> {
        chunk.embeddings.iter().flat_map(move |fix| {
            let embedding = &self.embeddings[fix.embedding];
            let (table, width) = match tower {
                Tower::ClipL => (&embedding.clip_l, embedding.width_l()),
                Tower::OpenClipG => (&embedding.clip_g, embedding.width_g()),
            };
            (fix.offset + 1..CHUNK_LENGTH).zip(table.chunks_exact(width))
        })
    }

    /// The embeddings named in some chunks, each once, in order of use.
    pub(super) fn used<'a>(&self, chunks: impl Iterator<Item = &'a Chunk>) -> Vec<Arc<Embedding>> {
        let mut used: Vec<usize> = Vec::new();
        for fix in chunks.flat_map(|chunk| &chunk.embeddings) {
            if !used.contains(&fix.embedding) {
                used.push(fix.embedding);
            }
        }
        used.into_iter()
            .map(|i| self.embeddings[i].clone())
            .collect()
    }
}

impl Embeddings for Vocabulary {
    fn find(&self, ids: &[u32]) -> Option<EmbeddingMatch> {
        let (name, embedding) = self
            .words
            .get(ids.first()?)?
            .iter()
            .find(|(name, _)| ids.starts_with(name))?;
        Some(EmbeddingMatch {
            embedding: *embedding,
            tokens: name.len(),
            vectors: self.embeddings[*embedding].vectors,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::{ChunkOptions, build_chunks, parse_attention};

    fn embedding(name: &str, vectors: usize, width: usize) -> Arc<Embedding> {
        let table =
            |start: usize, width| (start..start + vectors * width).map(|i| i as f32).collect();
        Arc::new(Embedding {
            name: name.into(),
            shorthash: String::new(),
            vectors,
            clip_l: table(0, width),
            clip_g: table(100, 3),
        })
    }

    #[test]
    fn the_longest_name_counts_and_its_vectors_take_its_place() {
        let tokenizer = Tokenizer::new();
        let given = vec![
            embedding("Zebra", 1, 2),
            embedding("zebra print", 2, 2),
            embedding("ZEBRA", 5, 2),
            embedding("cat", 1, 4),
        ];
        let vocabulary = Vocabulary::new(given, &tokenizer, (Some(2), 3));
        let options = ChunkOptions {
            embeddings: &vocabulary,
            ..ChunkOptions::new(Tower::OpenClipG)
        };
        let fragments = parse_attention("a (zebra Print:1.2) zebra cat");
        let chunk = &build_chunks(&fragments, &tokenizer, &options)[0];
        let placed: Vec<_> = vocabulary.vectors(chunk, Tower::OpenClipG).collect();
        let g = [100.0, 101.0, 102.0, 103.0, 104.0, 105.0];
        assert_eq!(placed, [(2, &g[..3]), (3, &g[3..]), (4, &g[..3])]);
        let l: Vec<_> = vocabulary.vectors(chunk, Tower::ClipL).collect();
        assert_eq!(l[1], (3, &[2.0, 3.0][..]));
        let used = vocabulary.used([chunk].into_iter());
        let names: Vec<&str> = used.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["zebra print", "Zebra"], "`cat` has another width");
    }
}
