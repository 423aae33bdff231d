//! A1111's prompt language, from the text a user typed to chunks of 77 token ids with weights.
//!
//! In the order of use: styles ([`apply_styles`]), comments ([`strip_comments`]), extra networks
//! ([`extract_extra_networks`]), `AND` ([`split_and`]), prompt editing ([`schedule`]), attention weights ([`parse_attention`]),
//! tokens and chunks ([`Tokenizer`], [`build_chunks`]), and the weights' effect ([`Emphasis`]). Nothing here fails on any text:
//! what does not parse stands for itself. Everything is a function of its arguments. Behaves as A1111 v1.10.1.

mod attention;
mod chunks;
mod compose;
mod emphasis;
mod entities;
mod fixup;
mod networks;
mod schedule;
pub mod styles;
mod tokenizer;

pub use attention::{BREAK, BREAK_WEIGHT, parse_attention};
pub use chunks::{
    CHUNK_LENGTH, COMMA_BACKTRACK, Chunk, ChunkOptions, EmbeddingFix, EmbeddingMatch, Embeddings,
    NoEmbeddings, Tower, build_chunks, equalize_chunks,
};
pub use compose::{Subprompt, split_and};
pub use emphasis::Emphasis;
pub use networks::{ExtraNetwork, extract_extra_networks, strip_comments};
pub use schedule::{EditRule, ScheduleSteps, schedule};
pub use styles::apply_styles;
pub use tokenizer::{COMMA, END, Flavour, START, Tokenizer};

/// What can go wrong around prompts (never in a prompt).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting names no emphasis mode.
    #[error("unknown emphasis: `{0}`; known: None, Ignore, Original, No norm")]
    UnknownEmphasis(String),
    /// Encoder output and multipliers do not belong together.
    #[error("{values} encoder values cannot be weighted by {multipliers} multipliers")]
    EmphasisShape {
        /// Number of values in the encoder output.
        values: usize,
        /// Number of multipliers, one per position.
        multipliers: usize,
    },
    /// A styles file is not a table with a `name` column.
    #[error("styles file, line {line}: {problem}")]
    Styles {
        /// Line of the file, from 1.
        line: usize,
        /// What is wrong there.
        problem: &'static str,
    },
}

/// Whitespace as Python's regular expressions see it: Unicode's, and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}
