//! `AND`: several prompts in one, each with a weight in the guidance sum.
//!
//! Follows A1111's `get_multicond_prompt_list`: a trailing `: number` is a weight even without any `AND`.

use super::attention::is_word_at;

/// One prompt of a composition.
#[derive(Debug, Clone, PartialEq)]
pub struct Subprompt {
    /// Its text, leading space kept, trailing space and weight removed.
    pub text: String,
    /// Its weight in the guidance sum.
    pub weight: f32,
}

/// Splits a positive prompt at the word `AND`; never empty.
#[must_use]
pub fn split_and(prompt: &str) -> Vec<Subprompt> {
    const AND: &str = "AND";
    let mut parts = Vec::new();
    let mut start = 0;
    for (at, _) in prompt.match_indices(AND) {
        if is_word_at(prompt, at, at + AND.len()) {
            parts.push(weighted(&prompt[start..at]));
            start = at + AND.len();
        }
    }
    parts.push(weighted(&prompt[start..]));
    parts
}

fn weighted(part: &str) -> Subprompt {
    let text = part.trim_end_matches(super::is_space);
    if let Some((before, number)) = text.rsplit_once(':') {
        let number = number.trim_start_matches(super::is_space);
        if is_weight(number)
            && let Ok(weight) = number.parse()
        {
            return Subprompt {
                text: before.trim_end_matches(super::is_space).to_string(),
                weight,
            };
        }
    }
    Subprompt {
        text: text.to_string(),
        weight: 1.0,
    }
}

/// Digits with at most one dot and an optional sign; Rust's own syntax would also take exponents and `inf`.
fn is_weight(text: &str) -> bool {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    unsigned
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
        && unsigned.bytes().any(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_read_from_the_end() {
        for (prompt, expected) in [
            ("a AND b :0.5", vec![("a", 1.0), (" b", 0.5)]),
            ("foo: 1.5", vec![("foo", 1.5)]),
            ("a AND", vec![("a", 1.0), ("", 1.0)]),
            ("AND", vec![("", 1.0), ("", 1.0)]),
            ("sandAND x", vec![("sandAND x", 1.0)]),
            (
                "a : 1 : -2. AND b:1e3",
                vec![("a : 1", -2.0), (" b:1e3", 1.0)],
            ),
            ("a:1.2.3 AND :.5", vec![("a:1.2.3", 1.0), ("", 0.5)]),
        ] {
            let got: Vec<_> = split_and(prompt)
                .into_iter()
                .map(|part| (part.text, part.weight))
                .collect();
            assert_eq!(
                got,
                expected
                    .iter()
                    .map(|&(text, weight)| (text.to_string(), weight))
                    .collect::<Vec<_>>(),
                "{prompt:?}"
            );
        }
    }
}
