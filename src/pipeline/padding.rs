//! Prompts of different length side by side: the pieces of one prompt, and the prompt beside its negative.
//!
//! Pieces joined by `AND` always get one length, the longest one's, by repeating each one's last vector. Prompt and negative
//! prompt run apart if their lengths differ, unless a setting pads one of them; padding changes the picture. Follows
//! `reconstruct_multicond_batch` and `CFGDenoiser.pad_cond_uncond` of A1111 1.10.

use std::sync::Arc;

use super::conditioning::{EncodeOptions, EncodedText};
use super::{Error, Pipeline};

/// How a prompt and a negative prompt of different length are brought together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PadConds {
    /// They are not.
    #[default]
    Apart,
    /// The shorter one is followed by the encoded empty prompt (`pad_cond_uncond`).
    EmptyPrompt,
    /// The negative prompt's last vector is repeated, or its end cut off (`pad_cond_uncond_v0`).
    NegativeOnly,
}

impl PadConds {
    /// Infotext's key for a run in which something was padded.
    pub(super) const fn infotext(self) -> Option<&'static str> {
        match self {
            Self::Apart => None,
            Self::EmptyPrompt => Some("Pad conds"),
            Self::NegativeOnly => Some("Pad conds v0"),
        }
    }
}

impl Pipeline {
    /// Encodes the empty prompt once, without any LoRA, if padding needs it.
    pub(super) fn prepare_padding(&mut self, how: PadConds) -> Result<(), Error> {
        if how == PadConds::EmptyPrompt && self.empty_prompt.is_none() {
            self.merge(&[])?;
            let texts = [String::new()];
            self.empty_prompt = self.text.encode(&texts, EncodeOptions::default())?.pop();
        }
        Ok(())
    }
}

/// The texts of one denoiser call, brought to the lengths they run with.
#[derive(Clone)]
pub(super) struct Aligned {
    pub(super) pieces: Vec<Arc<EncodedText>>,
    pub(super) negative: Option<Arc<EncodedText>>,
    /// Whether the setting padded or cut something.
    pub(super) padded: bool,
}

/// Brings the texts of one call to the lengths they run with; `empty` is the encoded empty prompt, if it is needed.
pub(super) fn align(
    pieces: Vec<Arc<EncodedText>>,
    negative: Option<Arc<EncodedText>>,
    how: PadConds,
    empty: Option<&EncodedText>,
) -> Aligned {
    let longest = pieces.iter().map(|text| text.tokens).max().unwrap_or(0);
    let mut pieces: Vec<Arc<EncodedText>> = pieces
        .into_iter()
        .map(|text| repeat_last(text, longest))
        .collect();
    let mut padded = false;
    let negative = negative.map(|text| match (how, empty) {
        (PadConds::NegativeOnly, _) if text.tokens != longest => {
            padded = true;
            cut(repeat_last(text, longest), longest)
        }
        (PadConds::EmptyPrompt, Some(empty)) if text.tokens < longest => {
            padded |= longest - text.tokens >= empty.tokens;
            follow(&text, empty, longest)
        }
        (PadConds::EmptyPrompt, Some(empty)) if text.tokens > longest => {
            padded |= text.tokens - longest >= empty.tokens;
            for piece in &mut pieces {
                *piece = follow(piece, empty, text.tokens);
            }
            text
        }
        _ => text,
    });
    Aligned {
        pieces,
        negative,
        padded,
    }
}

fn width(text: &EncodedText) -> usize {
    text.context.len() / text.tokens.max(1)
}

/// The text with its last vector repeated up to `tokens`.
fn repeat_last(text: Arc<EncodedText>, tokens: usize) -> Arc<EncodedText> {
    if text.tokens >= tokens {
        return text;
    }
    let mut longer = EncodedText::clone(&text);
    let last = longer.context.len() - width(&text)..;
    for _ in text.tokens..tokens {
        longer
            .context
            .extend_from_within(last.start..last.start + width(&text));
    }
    longer.tokens = tokens;
    Arc::new(longer)
}

/// The first `tokens` vectors of the text.
fn cut(text: Arc<EncodedText>, tokens: usize) -> Arc<EncodedText> {
    if text.tokens <= tokens {
        return text;
    }
    let mut shorter = EncodedText::clone(&text);
    shorter.context.truncate(tokens * width(&text));
    shorter.tokens = tokens;
    Arc::new(shorter)
}

/// The text followed by `empty` as often as it fits whole into `tokens`.
fn follow(text: &Arc<EncodedText>, empty: &EncodedText, tokens: usize) -> Arc<EncodedText> {
    let mut longer = EncodedText::clone(text);
    while longer.tokens + empty.tokens <= tokens {
        longer.context.extend_from_slice(&empty.context);
        longer.tokens += empty.tokens;
    }
    Arc::new(longer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of width 2: `(value, 0)`, `(value, 1)`, …
    fn text(value: f32, tokens: usize) -> Arc<EncodedText> {
        Arc::new(EncodedText {
            context: (0..tokens).flat_map(|i| [value, i as f32]).collect(),
            tokens,
            pooled: vec![value],
        })
    }

    #[test]
    fn pieces_repeat_their_last_vector_up_to_the_longest() {
        let aligned = align(
            vec![text(1.0, 2), text(2.0, 4)],
            None,
            PadConds::Apart,
            None,
        );
        assert_eq!(
            aligned.pieces[0].context,
            [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        );
        assert_eq!(aligned.pieces[0].pooled, [1.0]);
        assert_eq!(aligned.pieces[1], text(2.0, 4));
        assert!(!aligned.padded);
    }

    #[test]
    fn lengths_stay_apart_without_the_setting() {
        let aligned = align(
            vec![text(1.0, 4)],
            Some(text(2.0, 2)),
            PadConds::Apart,
            Some(&text(9.0, 2)),
        );
        assert_eq!(aligned.negative, Some(text(2.0, 2)));
        assert!(!aligned.padded);
    }

    #[test]
    fn the_shorter_prompt_is_followed_by_the_empty_one() {
        let empty = text(9.0, 2);
        let pad = |cond, uncond| {
            align(
                vec![text(1.0, cond)],
                Some(text(2.0, uncond)),
                PadConds::EmptyPrompt,
                Some(&empty),
            )
        };
        let shorter_negative = pad(6, 2);
        assert_eq!(
            shorter_negative.negative.map(|text| text.context.clone()),
            Some(vec![
                2.0, 0.0, 2.0, 1.0, 9.0, 0.0, 9.0, 1.0, 9.0, 0.0, 9.0, 1.0
            ])
        );
        let shorter_prompt = pad(2, 4);
        assert_eq!(
            shorter_prompt.pieces[0].context,
            [1.0, 0.0, 1.0, 1.0, 9.0, 0.0, 9.0, 1.0]
        );
        assert!(shorter_negative.padded && shorter_prompt.padded && !pad(4, 4).padded);
    }

    #[test]
    fn the_old_way_changes_the_negative_prompt_only() {
        let pad = |cond, uncond| {
            align(
                vec![text(1.0, cond)],
                Some(text(2.0, uncond)),
                PadConds::NegativeOnly,
                None,
            )
        };
        let (longer, shorter) = (pad(4, 2), pad(2, 4));
        assert_eq!(
            longer.negative.map(|text| text.context.clone()),
            Some(vec![2.0, 0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
        );
        assert_eq!(shorter.negative, Some(text(2.0, 2)));
        assert_eq!(shorter.pieces, [text(1.0, 2)]);
        assert!(longer.padded && shorter.padded && !pad(2, 2).padded);
    }
}
