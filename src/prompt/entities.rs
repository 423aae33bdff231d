//! HTML character references: the table of the HTML standard and the two ways the CLIP tokenizers resolve them.
//!
//! The table (`entities.txt`: a name per line, code points in hexadecimal) is WHATWG's list of named references; names
//! without `;` are the ones browsers accept bare. Follows HTML 13.2.5.72 as Python's `html.unescape` carries it out.

use std::collections::HashMap;

/// Longest name that is looked up, in characters; the limit of Python's `html.unescape`.
const LONGEST_NAME: usize = 32;

/// The references of the HTML standard.
pub(crate) struct Entities {
    by_name: HashMap<&'static str, String>,
}

impl Entities {
    /// Reads the embedded table.
    pub(crate) fn new() -> Self {
        let by_name = include_str!("entities.txt")
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, codes)| {
                let text = codes
                    .split(' ')
                    .filter_map(|code| u32::from_str_radix(code, 16).ok())
                    .filter_map(char::from_u32);
                (name, text.collect())
            })
            .collect();
        Self { by_name }
    }

    /// Resolves every reference once, those without `;` included, as a browser does.
    pub(crate) fn unescape(&self, text: &str) -> String {
        replace_references(text, |rest| self.browser_reference(rest))
    }

    /// Resolves only complete references (`&name;`, `&#1;`), and names in capitals that stand for a capital letter.
    ///
    /// This is the cautious rule of ftfy, which both tokenizers run first.
    pub(crate) fn unescape_strict(&self, text: &str) -> String {
        replace_references(text, |rest| self.strict_reference(rest))
    }

    /// Value and byte length of the reference at the start of `rest`, which begins with `&`.
    fn browser_reference(&self, rest: &str) -> Option<(String, usize)> {
        let body = &rest[1..];
        if let Some(number) = body.strip_prefix('#') {
            return numeric_reference(number).map(|(value, length)| (value, length + 2));
        }
        let end = body
            .char_indices()
            .take(LONGEST_NAME)
            .find(|(_, c)| matches!(c, '\t' | '\n' | '\u{c}' | ' ' | '<' | '&' | '#' | ';'))
            .map_or_else(
                || {
                    body.char_indices()
                        .nth(LONGEST_NAME)
                        .map_or(body.len(), |(at, _)| at)
                },
                |(at, _)| at,
            );
        let with_semicolon = if body[end..].starts_with(';') {
            end + 1
        } else {
            end
        };
        if let Some(value) = self.by_name.get(&body[..with_semicolon]) {
            return Some((value.clone(), with_semicolon + 1));
        }
        let name = &body[..end];
        name.char_indices()
            .map(|(at, c)| at + c.len_utf8())
            .rev()
            .filter(|&length| length > 1)
            .find_map(|length| {
                self.by_name
                    .get(&name[..length])
                    .map(|value| (value.clone(), length + 1))
            })
    }

    fn strict_reference(&self, rest: &str) -> Option<(String, usize)> {
        let end = rest.bytes().take(27).position(|byte| byte == b';')?;
        let body = &rest[1..end];
        if let Some(number) = body.strip_prefix('#') {
            let (value, length) = numeric_reference(&rest[2..=end])?;
            return (length == number.len() + 1 && !value.contains(';'))
                .then_some((value, end + 1));
        }
        if body.is_empty()
            || body.len() > 24
            || !body.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            return None;
        }
        if let Some(value) = self.by_name.get(&rest[1..=end]) {
            return Some((value.clone(), end + 1));
        }
        let lower = rest[1..=end].to_ascii_lowercase();
        let capitals = body.bytes().all(|byte| !byte.is_ascii_lowercase())
            && self.browser_reference(&rest[..=end]).is_none();
        let value = self.by_name.get(lower.as_str()).filter(|_| capitals)?;
        Some((value.to_uppercase(), end + 1))
    }
}

/// Copies `text`, asking `resolve` at every `&` for a replacement and the bytes it covers.
fn replace_references(text: &str, resolve: impl Fn(&str) -> Option<(String, usize)>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some((value, length)) = resolve(rest) {
            out.push_str(&value);
            rest = &rest[length..];
        } else {
            out.push('&');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

/// Value of the digits after `&#`, and how many bytes they and a closing `;` take.
fn numeric_reference(text: &str) -> Option<(String, usize)> {
    let (digits, radix, prefix) = match text.as_bytes() {
        [b'x' | b'X', ..] => (&text[1..], 16, 1),
        _ => (text, 10, 0),
    };
    let length = digits
        .bytes()
        .take_while(|byte| char::from(*byte).is_digit(radix))
        .count();
    if length == 0 {
        return None;
    }
    // Digits beyond any code point saturate: the value is out of range either way.
    let code = digits[..length]
        .chars()
        .filter_map(|c| c.to_digit(radix))
        .fold(0u32, |sum, digit| {
            sum.saturating_mul(radix).saturating_add(digit)
        });
    let semicolon = usize::from(digits[length..].starts_with(';'));
    Some((code_point_text(code), prefix + length + semicolon))
}

fn code_point_text(code: u32) -> String {
    match code {
        0 => "\u{fffd}".into(),
        0x80..=0x9f => super::fixup::windows_1252(code as u8).to_string(),
        0x1..=0x8 | 0xb | 0xe..=0x1f | 0x7f | 0xfdd0..=0xfdef => String::new(),
        _ if code <= 0x10_ffff && code & 0xfffe == 0xfffe => String::new(),
        _ => char::from_u32(code).unwrap_or('\u{fffd}').to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn browser_rule_takes_bare_names_and_the_longest_prefix() {
        let entities = Entities::new();
        assert_eq!(entities.by_name.len(), 2231);
        assert_eq!(
            entities
                .unescape("&amp;lt; &copy 1 &notit; &noti &nosuch; & &#x41;&#66 &#128; &#xD800;"),
            "&lt; © 1 ¬it; ¬i &nosuch; & AB € \u{fffd}"
        );
        assert_eq!(entities.unescape("&NotEqualTilde;&é;&"), "≂\u{338}&é;&");
    }

    #[test]
    fn strict_rule_needs_the_semicolon() {
        let entities = Entities::new();
        assert_eq!(
            entities.unescape_strict("&copy 1 &copy; &EACUTE; &AMP; &#39; &#39 &; &#x1F600;"),
            "&copy 1 © É & ' &#39 &; 😀"
        );
    }
}
