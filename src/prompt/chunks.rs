//! Weighted fragments to chunks of 77 token ids, the unit a text encoder reads.
//!
//! A chunk is the start mark, 75 tokens and the end mark. Fragments are tokenised one by one; a long prompt is broken after
//! a comma where one is near. Follows A1111's `sd_hijack_clip.tokenize_line`, with its padding per encoder.

use super::attention::{BREAK, BREAK_WEIGHT};
use super::tokenizer::{COMMA, END, Flavour, START, Tokenizer};

/// Tokens of a chunk, marks included: the encoders' context length.
pub const CHUNK_LENGTH: usize = 77;
const PAYLOAD: usize = CHUNK_LENGTH - 2;

/// A text encoder of SDXL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tower {
    /// CLIP ViT-L: short chunks are filled with the end mark.
    ClipL,
    /// `OpenCLIP` bigG: everything after the first end mark is 0.
    OpenClipG,
}

impl Tower {
    /// The tokenizer in front of this encoder.
    #[must_use]
    pub const fn flavour(self) -> Flavour {
        match self {
            Self::ClipL => Flavour::ClipL,
            Self::OpenClipG => Flavour::OpenClip,
        }
    }
}

/// A textual inversion that begins at a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbeddingMatch {
    /// The caller's index of the embedding.
    pub embedding: usize,
    /// Number of tokens its name takes; at least 1.
    pub tokens: usize,
    /// Number of vectors that stand in their place.
    pub vectors: usize,
}

/// Where textual inversions are looked up.
pub trait Embeddings {
    /// The embedding whose name's ids begin at `ids[0]`; of several the longest name.
    fn find(&self, ids: &[u32]) -> Option<EmbeddingMatch>;
}

/// No textual inversion.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoEmbeddings;

impl Embeddings for NoEmbeddings {
    fn find(&self, _ids: &[u32]) -> Option<EmbeddingMatch> {
        None
    }
}

impl<F: Fn(&[u32]) -> Option<EmbeddingMatch>> Embeddings for F {
    fn find(&self, ids: &[u32]) -> Option<EmbeddingMatch> {
        self(ids)
    }
}

/// Vectors to put in place of token embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EmbeddingFix {
    /// Position of the first vector among the 75 payload positions: row `offset + 1` of the encoder's input. Vectors
    /// beyond the chunk's end are dropped.
    pub offset: usize,
    /// The caller's index of the embedding.
    pub embedding: usize,
}

/// One chunk of a prompt for one encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Token ids, marks and padding included.
    pub tokens: [u32; CHUNK_LENGTH],
    /// Weight of each position; 1 for marks and padding.
    pub weights: [f32; CHUNK_LENGTH],
    /// Textual inversions in this chunk.
    pub embeddings: Vec<EmbeddingFix>,
}

impl Chunk {
    /// The chunk of an empty prompt.
    #[must_use]
    pub fn empty(tower: Tower) -> Self {
        Payload::default().close(tower)
    }
}

/// A1111's default of `comma_padding_backtrack`, tokens.
pub const COMMA_BACKTRACK: usize = 20;

/// How a prompt is cut into chunks.
#[derive(Clone, Copy)]
pub struct ChunkOptions<'a> {
    /// The encoder to cut for.
    pub tower: Tower,
    /// How many tokens may move to the next chunk so that it starts after a comma (`comma_padding_backtrack`); 0 = off.
    pub comma_backtrack: usize,
    /// Textual inversions.
    pub embeddings: &'a dyn Embeddings,
}

impl ChunkOptions<'_> {
    /// A1111's defaults for `tower`, without textual inversions.
    #[must_use]
    pub fn new(tower: Tower) -> Self {
        Self {
            tower,
            comma_backtrack: COMMA_BACKTRACK,
            embeddings: &NoEmbeddings,
        }
    }
}

/// Cuts fragments (see [`parse_attention`](super::parse_attention)) into chunks; never empty.
#[must_use]
pub fn build_chunks(
    fragments: &[(String, f32)],
    tokenizer: &Tokenizer,
    options: &ChunkOptions<'_>,
) -> Vec<Chunk> {
    let mut builder = Builder {
        options: *options,
        chunks: Vec::new(),
        payload: Payload::default(),
        last_comma: None,
    };
    for (text, weight) in fragments {
        if text == BREAK && weight.to_bits() == BREAK_WEIGHT.to_bits() {
            builder.flush();
            continue;
        }
        let ids = tokenizer.encode(text, options.tower.flavour());
        let mut position = 0;
        while position < ids.len() {
            position += builder.push(&ids[position..], *weight);
        }
    }
    if !builder.payload.tokens.is_empty() || builder.chunks.is_empty() {
        builder.flush();
    }
    builder.chunks
}

/// Appends empty chunks until every prompt has as many as the longest.
///
/// For the texts of one editing schedule, which are encoded as one batch, and for the two encoders of one text.
pub fn equalize_chunks(prompts: &mut [(Tower, Vec<Chunk>)]) {
    let longest = prompts
        .iter()
        .map(|(_, chunks)| chunks.len())
        .max()
        .unwrap_or(0);
    for (tower, chunks) in prompts {
        chunks.resize_with(longest, || Chunk::empty(*tower));
    }
}

/// The tokens of a chunk under construction, without marks.
#[derive(Default)]
struct Payload {
    tokens: Vec<u32>,
    weights: Vec<f32>,
    embeddings: Vec<EmbeddingFix>,
}

impl Payload {
    fn close(self, tower: Tower) -> Chunk {
        let mut chunk = Chunk {
            tokens: [END; CHUNK_LENGTH],
            weights: [1.0; CHUNK_LENGTH],
            embeddings: self.embeddings,
        };
        let end = self.tokens.len() + 1;
        chunk.tokens[0] = START;
        chunk.tokens[1..end].copy_from_slice(&self.tokens);
        chunk.weights[1..end].copy_from_slice(&self.weights);
        if tower == Tower::OpenClipG
            && let Some(first_end) = chunk.tokens.iter().position(|&id| id == END)
        {
            chunk.tokens[first_end + 1..].fill(0);
        }
        chunk
    }
}

struct Builder<'a> {
    options: ChunkOptions<'a>,
    chunks: Vec<Chunk>,
    payload: Payload,
    /// Position of the last comma in the payload.
    last_comma: Option<usize>,
}

impl Builder<'_> {
    /// Appends the token or textual inversion at the start of `ids`; returns how many tokens that took.
    fn push(&mut self, ids: &[u32], weight: f32) -> usize {
        let full = self.payload.tokens.len() == PAYLOAD;
        if ids[0] == COMMA {
            self.last_comma = Some(self.payload.tokens.len());
        } else if full
            && let Some(comma) = self
                .last_comma
                .filter(|&comma| PAYLOAD - comma <= self.options.comma_backtrack)
        {
            self.flush_after(comma);
        }
        if self.payload.tokens.len() == PAYLOAD {
            self.flush();
        }
        // An embedding longer than a chunk can never be placed; its name is read as text.
        let found =
            self.options.embeddings.find(ids).filter(|found| {
                found.vectors <= PAYLOAD && (1..=ids.len()).contains(&found.tokens)
            });
        let Some(found) = found else {
            self.extend(ids[0], weight, 1);
            return 1;
        };
        if self.payload.tokens.len() + found.vectors > PAYLOAD {
            self.flush();
        }
        self.payload.embeddings.push(EmbeddingFix {
            offset: self.payload.tokens.len(),
            embedding: found.embedding,
        });
        self.extend(0, weight, found.vectors);
        found.tokens
    }

    fn extend(&mut self, id: u32, weight: f32, count: usize) {
        let length = self.payload.tokens.len() + count;
        self.payload.tokens.resize(length, id);
        self.payload.weights.resize(length, weight);
    }

    /// Ends the chunk after its comma and carries the rest over.
    ///
    /// Textual inversions stay behind with the old chunk even where their tokens move on, as in A1111.
    fn flush_after(&mut self, comma: usize) {
        let tokens = self.payload.tokens.split_off(comma + 1);
        let weights = self.payload.weights.split_off(comma + 1);
        self.flush();
        self.payload = Payload {
            tokens,
            weights,
            embeddings: Vec::new(),
        };
    }

    fn flush(&mut self) {
        self.chunks
            .push(std::mem::take(&mut self.payload).close(self.options.tower));
        self.last_comma = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragments(text: &str) -> Vec<(String, f32)> {
        super::super::parse_attention(text)
    }

    #[test]
    fn padding_differs_between_the_towers() {
        let tokenizer = Tokenizer::new();
        let l = &build_chunks(
            &fragments("cat"),
            &tokenizer,
            &ChunkOptions::new(Tower::ClipL),
        )[0];
        let g = &build_chunks(
            &fragments("cat"),
            &tokenizer,
            &ChunkOptions::new(Tower::OpenClipG),
        )[0];
        assert_eq!(
            (l.tokens[..4].to_vec(), g.tokens[..4].to_vec()),
            (vec![START, 2368, END, END], vec![START, 2368, END, 0])
        );
        assert!(
            l.tokens[2..].iter().all(|&id| id == END) && g.tokens[3..].iter().all(|&id| id == 0)
        );
        assert_eq!(Chunk::empty(Tower::ClipL).tokens[1..], [END; 76]);
    }

    #[test]
    fn an_embedding_takes_its_vectors_and_moves_to_the_next_chunk_if_it_does_not_fit() {
        let tokenizer = Tokenizer::new();
        let name = tokenizer.encode("zebra print", Flavour::ClipL);
        let find = |ids: &[u32]| {
            ids.starts_with(&name).then_some(EmbeddingMatch {
                embedding: 7,
                tokens: name.len(),
                vectors: 5,
            })
        };
        let options = ChunkOptions {
            embeddings: &find,
            ..ChunkOptions::new(Tower::ClipL)
        };
        let chunks = build_chunks(&fragments("a (zebra print:1.5) cat"), &tokenizer, &options);
        assert_eq!(chunks[0].tokens[..8], [START, 320, 0, 0, 0, 0, 0, 2368]);
        assert_eq!(
            chunks[0].weights[..8],
            [1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.0]
        );
        assert_eq!(
            chunks[0].embeddings,
            [EmbeddingFix {
                offset: 1,
                embedding: 7
            }]
        );
        let long = format!("{}zebra print", "cat ".repeat(72));
        let chunks = build_chunks(&fragments(&long), &tokenizer, &options);
        assert_eq!(
            (
                chunks.len(),
                chunks[1].embeddings[0].offset,
                chunks[1].tokens[6]
            ),
            (2, 0, END)
        );
        let huge = |ids: &[u32]| {
            ids.starts_with(&name).then_some(EmbeddingMatch {
                embedding: 7,
                tokens: name.len(),
                vectors: 76,
            })
        };
        let options = ChunkOptions {
            embeddings: &huge,
            ..options
        };
        assert!(
            build_chunks(&fragments(&long), &tokenizer, &options)
                .iter()
                .all(|chunk| chunk.embeddings.is_empty())
        );
    }

    #[test]
    fn texts_are_made_equally_long() {
        let mut prompts = vec![
            (Tower::ClipL, vec![Chunk::empty(Tower::ClipL); 3]),
            (Tower::OpenClipG, vec![]),
        ];
        equalize_chunks(&mut prompts);
        assert_eq!(prompts[1].1, vec![Chunk::empty(Tower::OpenClipG); 3]);
    }
}
