//! Attention weights: `(text)`, `[text]`, `(text:1.3)`, escapes and `BREAK` become fragments with a weight.
//!
//! Nothing is an error: a bracket without a partner acts to the end of the text or stands for itself. Follows A1111's
//! `prompt_parser.parse_prompt_attention`, whose weights are products in f64, innermost bracket first.

use std::cmp::Ordering;

/// Text of the marker between two chunks; it comes with [`BREAK_WEIGHT`].
pub const BREAK: &str = "BREAK";
/// Weight of the marker between two chunks, before any bracket around it multiplies it.
pub const BREAK_WEIGHT: f32 = -1.0;

const ROUND: f64 = 1.1;
const SQUARE: f64 = 1.0 / 1.1;

/// Parses `text` into fragments and weights; never empty.
///
/// ```
/// use sdgen::prompt::parse_attention;
/// assert_eq!(parse_attention("a (red:1.5) cat"), [("a ".into(), 1.0), ("red".into(), 1.5), (" cat".into(), 1.0)]);
/// ```
#[must_use]
pub fn parse_attention(text: &str) -> Vec<(String, f32)> {
    let mut fragments = Fragments::default();
    let mut round = Vec::new();
    let mut square = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (token, after) = next_token(rest);
        rest = after;
        match token {
            Token::Escaped(literal) => fragments.push(literal, 1.0),
            Token::Open(b'(') => round.push(fragments.texts.len()),
            Token::Open(_) => square.push(fragments.texts.len()),
            Token::Close(b')', _) if let Some(start) = round.pop() => {
                fragments.multiply(start, ROUND);
            }
            Token::Close(b']', _) if let Some(start) = square.pop() => {
                fragments.multiply(start, SQUARE);
            }
            Token::Weight(weight, _) if let Some(start) = round.pop() => {
                fragments.multiply(start, weight);
            }
            Token::Close(_, literal) | Token::Weight(_, literal) | Token::Text(literal) => {
                fragments.push_with_breaks(literal);
            }
        }
    }
    for start in round {
        fragments.multiply(start, ROUND);
    }
    for start in square {
        fragments.multiply(start, SQUARE);
    }
    fragments.merge()
}

enum Token<'a> {
    /// What a backslash protected.
    Escaped(&'a str),
    Open(u8),
    Close(u8, &'a str),
    /// `:1.3)`: its number and its spelling.
    Weight(f64, &'a str),
    Text(&'a str),
}

/// The token at the start of `text`, which is not empty, and what follows.
fn next_token(text: &str) -> (Token<'_>, &str) {
    let bytes = text.as_bytes();
    match bytes[0] {
        b'\\' => {
            let length = usize::from(matches!(
                bytes.get(1),
                Some(b'(' | b')' | b'[' | b']' | b'\\')
            ));
            (Token::Escaped(&text[1..=length]), &text[1 + length..])
        }
        open @ (b'(' | b'[') => (Token::Open(open), &text[1..]),
        close @ (b')' | b']') => (Token::Close(close, &text[..1]), &text[1..]),
        b':' => {
            if let Some((weight, length)) = weight_suffix(text) {
                (Token::Weight(weight, &text[..length]), &text[length..])
            } else {
                (Token::Text(&text[..1]), &text[1..])
            }
        }
        _ => {
            let end = text
                .find(['\\', '(', ')', '[', ']', ':'])
                .unwrap_or(text.len());
            (Token::Text(&text[..end]), &text[end..])
        }
    }
}

/// Reads `: number )` at the start of `text`: the number and the bytes covered.
///
/// Digits and dots that are no number (`1.2.3`) stop A1111 with an error; here they are text.
fn weight_suffix(text: &str) -> Option<(f64, usize)> {
    let body = text.strip_prefix(':')?.trim_start_matches(super::is_space);
    let unsigned = body.strip_prefix(['+', '-']).unwrap_or(body);
    let digits = unsigned
        .bytes()
        .take_while(|byte| matches!(byte, b'0'..=b'9' | b'.'))
        .count();
    let number = &body[..body.len() - unsigned.len() + digits];
    let tail = unsigned[digits..]
        .trim_start_matches(super::is_space)
        .strip_prefix(')')?;
    Some((
        number.parse().ok().filter(|_| digits > 0)?,
        text.len() - tail.len(),
    ))
}

/// Texts and weights of one prompt, kept apart so that a bracket multiplies a plain slice.
#[derive(Default)]
struct Fragments<'a> {
    texts: Vec<&'a str>,
    weights: Vec<f64>,
}

impl<'a> Fragments<'a> {
    fn push(&mut self, text: &'a str, weight: f64) {
        self.texts.push(text);
        self.weights.push(weight);
    }

    fn multiply(&mut self, start: usize, factor: f64) {
        for weight in &mut self.weights[start..] {
            *weight *= factor;
        }
    }

    /// Appends `text`, with a marker wherever the word `BREAK` stands in it.
    fn push_with_breaks(&mut self, text: &'a str) {
        let mut part = text;
        let mut searched = 0;
        while let Some(found) = part[searched..].find(BREAK) {
            let at = searched + found;
            let end = at + BREAK.len();
            if is_word_at(part, at, end) {
                self.push(part[..at].trim_end_matches(super::is_space), 1.0);
                self.push(BREAK, f64::from(BREAK_WEIGHT));
                part = part[end..].trim_start_matches(super::is_space);
                searched = 0;
            } else {
                searched = end;
            }
        }
        self.push(part, 1.0);
    }

    /// Joins neighbours of exactly equal weight.
    fn merge(self) -> Vec<(String, f32)> {
        let mut merged: Vec<(String, f64)> = Vec::new();
        for (text, weight) in self.texts.into_iter().zip(self.weights) {
            match merged.last_mut() {
                Some((last, last_weight))
                    if (*last_weight).partial_cmp(&weight) == Some(Ordering::Equal) =>
                {
                    last.push_str(text);
                }
                _ => merged.push((text.to_string(), weight)),
            }
        }
        if merged.is_empty() {
            merged.push((String::new(), 1.0));
        }
        merged
            .into_iter()
            .map(|(text, weight)| (text, weight as f32))
            .collect()
    }
}

/// Whether `text[start..end]` has no word character right before or after it.
pub(super) fn is_word_at(text: &str, start: usize, end: usize) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    !text[..start].chars().next_back().is_some_and(word)
        && !text[end..].chars().next().is_some_and(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_break_needs_word_boundaries() {
        assert_eq!(
            parse_attention("x BREAKy BREAK"),
            [
                ("x BREAKy".into(), 1.0),
                (BREAK.into(), -1.0),
                (String::new(), 1.0)
            ]
        );
    }

    #[test]
    fn digits_that_are_no_number_are_text() {
        assert_eq!(parse_attention("(a:1.2.3)"), [("a:1.2.3".into(), 1.1)]);
        assert_eq!(parse_attention("(a:.)"), [("a:.".into(), 1.1)]);
    }
}
