//! The CLIP tokenizer: text to token ids, without start and end marks and without a length limit.
//!
//! Both text encoders of SDXL share one vocabulary of 49408 entries, derived here from the merges alone. They differ in how text
//! is cleaned ([`Flavour`]). Follows the published tokenizers of `OpenAI`'s CLIP (as Hugging Face's `CLIPTokenizer`) and of
//! `OpenCLIP` (`SimpleTokenizer`); the merging itself is the `tokenizers` crate's BPE.

use std::fmt;

use regex::Regex;
use tokenizers::Model as _;
use tokenizers::models::bpe::{BPE, Vocab};

use super::entities::Entities;
use super::fixup::fix_text;

/// Id of the start mark.
pub const START: u32 = 49406;
/// Id of the end mark, which also fills short chunks.
pub const END: u32 = 49407;
/// Id of a comma that ends a word, where long prompts are preferably broken.
pub const COMMA: u32 = 267;

const MERGES: &str = include_str!("../../models/clip/merges.txt");

/// Which published tokenizer to behave as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flavour {
    /// Hugging Face's, in front of CLIP ViT-L: special tokens are spelled `<|startoftext|>` and `<|endoftext|>`.
    ClipL,
    /// `OpenCLIP`'s, in front of bigG: HTML references are resolved twice more, and special tokens are spelled
    /// `<start_of_text>` and `<end_of_text>`.
    OpenClip,
}

impl Flavour {
    const fn specials(self) -> [(&'static str, u32); 2] {
        match self {
            Self::ClipL => [("<|startoftext|>", START), ("<|endoftext|>", END)],
            Self::OpenClip => [("<start_of_text>", START), ("<end_of_text>", END)],
        }
    }
}

/// The tokenizer of both text encoders. Build it once and share it: it holds the merge tables (some 10 MiB).
pub struct Tokenizer {
    bpe: BPE,
    /// What counts as a word, by [`Flavour`].
    words: [Regex; 2],
    symbols: [char; 256],
    entities: Entities,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").finish_non_exhaustive()
    }
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl Tokenizer {
    /// Builds the tables from the embedded merges.
    ///
    /// # Panics
    /// Never on a tested build: the embedded merges are complete.
    #[must_use]
    pub fn new() -> Self {
        let symbols = byte_symbols();
        let merges = merges()
            .map(|(left, right)| (left.to_string(), right.to_string()))
            .collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocabulary(&symbols), merges)
            .end_of_word_suffix("</w>".into())
            .build()
            .expect("every embedded merge joins symbols of the vocabulary, as the tests check");
        let words = [Flavour::ClipL, Flavour::OpenClip].map(word_pattern);
        Self {
            bpe,
            words,
            symbols,
            entities: Entities::new(),
        }
    }

    /// Token ids of `text`, without start and end marks.
    #[must_use]
    pub fn encode(&self, text: &str, flavour: Flavour) -> Vec<u32> {
        let mut ids = Vec::new();
        match flavour {
            Flavour::ClipL => {
                // Special tokens are cut out before anything is cleaned, so each piece is cleaned alone.
                let mut rest = text;
                while let Some((at, length, id)) = first_special(rest, flavour) {
                    self.encode_clean(&fix_text(&rest[..at], &self.entities), flavour, &mut ids);
                    ids.push(id);
                    rest = &rest[at + length..];
                }
                self.encode_clean(&fix_text(rest, &self.entities), flavour, &mut ids);
            }
            Flavour::OpenClip => {
                let fixed = fix_text(text, &self.entities);
                let unescaped = self.entities.unescape(&self.entities.unescape(&fixed));
                self.encode_clean(&unescaped, flavour, &mut ids);
            }
        }
        ids
    }

    /// The text a token stands for; a word's end shows as a space. `None` for an id outside the vocabulary.
    #[must_use]
    pub fn token_text(&self, id: u32) -> Option<String> {
        let token = self.bpe.id_to_token(id)?;
        let (body, space) = token
            .strip_suffix("</w>")
            .map_or((token.as_str(), ""), |body| (body, " "));
        let bytes: Vec<u8> = body
            .chars()
            .filter_map(|c| self.symbols.iter().position(|&s| s == c))
            .map(|at| at as u8)
            .collect();
        Some(format!("{}{space}", String::from_utf8_lossy(&bytes)))
    }

    /// Lower-cases, cuts into words and merges each.
    fn encode_clean(&self, text: &str, flavour: Flavour, ids: &mut Vec<u32>) {
        let lower = text.to_lowercase();
        for word in self.words[flavour as usize].find_iter(&lower) {
            match flavour
                .specials()
                .into_iter()
                .find(|(name, _)| *name == word.as_str())
            {
                Some((_, id)) => ids.push(id),
                None => self.encode_word(word.as_str(), ids),
            }
        }
    }

    fn encode_word(&self, word: &str, ids: &mut Vec<u32>) {
        let symbols: String = word
            .bytes()
            .map(|byte| self.symbols[usize::from(byte)])
            .collect();
        let tokens = self
            .bpe
            .tokenize(&symbols)
            .expect("every byte has a symbol, so BPE without dropout cannot fail");
        ids.extend(tokens.iter().map(|token| token.id));
    }
}

/// The first special token in `text`: byte position, byte length and id.
fn first_special(text: &str, flavour: Flavour) -> Option<(usize, usize, u32)> {
    flavour
        .specials()
        .into_iter()
        .filter_map(|(name, id)| text.find(name).map(|at| (at, name.len(), id)))
        .min()
}

/// A special token, an English contraction, letters, one digit, or a run of anything else but space.
fn word_pattern(flavour: Flavour) -> Regex {
    let specials = flavour
        .specials()
        .map(|(name, _)| regex::escape(name))
        .join("|");
    Regex::new(&format!(
        r"{specials}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
    ))
    .expect("a constant pattern")
}

/// The pairs of the merge file, best first.
fn merges() -> impl Iterator<Item = (&'static str, &'static str)> {
    MERGES
        .lines()
        .skip(1)
        .filter_map(|line| line.split_once(' '))
}

/// Printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on.
fn byte_symbols() -> [char; 256] {
    let mut next = 256u32;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("U+0100 to U+0143 are characters")
    })
}

/// Symbol to id: printable bytes, the other bytes, both again with the word's end, the merges, the two marks.
fn vocabulary(symbols: &[char; 256]) -> Vocab {
    let (printable, other): (Vec<char>, Vec<char>) =
        symbols.iter().partition(|&&c| u32::from(c) < 256);
    let bytes: Vec<String> = printable
        .into_iter()
        .chain(other)
        .map(String::from)
        .collect();
    let ends = bytes.iter().map(|symbol| format!("{symbol}</w>"));
    let merged = merges().map(|(left, right)| format!("{left}{right}"));
    let marks = Flavour::ClipL.specials().map(|(name, _)| name.to_string());
    bytes
        .iter()
        .cloned()
        .chain(ends)
        .chain(merged)
        .chain(marks)
        .zip(0..)
        .collect()
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    /// SHA-256 over `token NUL` in order of ids, of `OpenAI`'s published `vocab.json`.
    const VOCABULARY_SHA256: &str =
        "32b8b550caa7cc344dcd947f4c20690ad9e1d437142029382b2ffb59f7df19ff";

    #[test]
    fn derived_vocabulary_is_the_published_one() {
        let vocabulary = vocabulary(&byte_symbols());
        assert_eq!(vocabulary.len(), 49408);
        let mut tokens: Vec<_> = vocabulary.into_iter().collect();
        tokens.sort_unstable_by_key(|&(_, id)| id);
        let digest = tokens.iter().fold(Sha256::new(), |hash, (token, _)| {
            hash.chain_update(token).chain_update([0])
        });
        let hex: Vec<String> = digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex.concat(), VOCABULARY_SHA256);
    }

    #[test]
    fn special_tokens_inside_a_word_of_punctuation_are_not_special() {
        let tokenizer = Tokenizer::new();
        let ids = tokenizer.encode("!<end_of_text> <end_of_text>", Flavour::OpenClip);
        assert_eq!(ids.iter().filter(|&&id| id == END).count(), 1);
        assert_eq!(
            tokenizer.encode("!<|endoftext|>", Flavour::ClipL).last(),
            Some(&END)
        );
        assert_eq!(tokenizer.token_text(COMMA).as_deref(), Some(", "));
    }
}
