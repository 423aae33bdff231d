//! Text repair that both tokenizers run before they split words.
//!
//! Follows the documented behaviour of Python's ftfy (`fix_text` with its defaults): HTML references, UTF-8 read as
//! Windows-1252, C1 controls, Latin ligatures, full-width forms, curly quotes, line ends, control characters, NFC; repeated
//! until nothing changes. Mojibake is repaired for the Windows-1252 and Latin-1 misreadings only, and only where the text
//! decodes to valid UTF-8 (ftfy also guesses other code pages).

use std::ops::Range;

use tokenizers::tokenizer::NormalizedString;

use super::entities::Entities;

/// Rounds of repair; each undoes one level of double encoding. Real text needs two or three, hostile text gets no more.
const MAX_ROUNDS: usize = 16;

/// What Windows-1252 has in 0x80 to 0x9f; the five unassigned bytes stand for themselves.
const WINDOWS_1252_HIGH: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}',
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// The character that Windows-1252 has for `byte`.
pub(crate) fn windows_1252(byte: u8) -> char {
    match byte {
        0x80..=0x9f => WINDOWS_1252_HIGH[usize::from(byte - 0x80)],
        _ => char::from(byte),
    }
}

/// The byte that Windows-1252, or Latin-1 for C1 controls, has for `c`.
fn windows_1252_byte(c: char) -> Option<u8> {
    if let Ok(byte) = u8::try_from(u32::from(c)) {
        return Some(byte);
    }
    WINDOWS_1252_HIGH
        .iter()
        .position(|&high| high == c)
        .map(|at| 0x80 + at as u8)
}

/// Repairs `text`. Whitespace is neither collapsed nor trimmed.
pub(crate) fn fix_text(text: &str, entities: &Entities) -> String {
    if text
        .bytes()
        .all(|byte| matches!(byte, b' '..=b'~') && byte != b'&')
    {
        return text.to_string();
    }
    let mut out = String::with_capacity(text.len());
    let mut unescape = true;
    for line in text.split_inclusive('\n') {
        // A line with a tag is taken for HTML, where references are meant to stay; so are the lines after it.
        unescape &= !line.contains('<');
        out.push_str(&fix_line(line, entities, unescape));
    }
    out
}

fn fix_line(line: &str, entities: &Entities, unescape: bool) -> String {
    let mut text = line.to_string();
    for _ in 0..MAX_ROUNDS {
        let mut next = if unescape && text.contains('&') {
            entities.unescape_strict(&text)
        } else {
            text.clone()
        };
        next = fix_mojibake(&next);
        next = simplify(&remove_terminal_escapes(&next));
        next = compose(next);
        if next == text {
            break;
        }
        text = next;
    }
    text
}

/// Unicode normalisation form C.
fn compose(text: String) -> String {
    if text.is_ascii() {
        return text;
    }
    let mut normalized = NormalizedString::from(text);
    normalized.nfc();
    normalized.get().to_string()
}

/// Replaces stretches of UTF-8 that were read as Windows-1252.
///
/// Where every character beyond ASCII belongs to such a stretch, one sure sign is enough for all of them: a sequence of three or more
/// bytes, one that begins with `Ã` or `Â`, or two sequences in a row. In mixed text each stretch needs its own, and a single
/// sequence that begins like a letter with an accent (`å¥½`) is none. A lone pair such as `É®` may be meant.
fn fix_mojibake(text: &str) -> String {
    if text.is_ascii() {
        return text.to_string();
    }
    let chars: Vec<char> = text.chars().collect();
    let stretches = misread_stretches(&chars);
    let covered: usize = stretches.iter().map(|stretch| stretch.chars.len()).sum();
    // `Ã` before a space was `à`, whose second byte is a no-break space that programs like to replace.
    let lost_space = |at: usize| chars[at] == 'Ã' && chars.get(at + 1) == Some(&' ');
    let lost_spaces = (0..chars.len()).filter(|&at| lost_space(at)).count();
    let consistent = covered + lost_spaces == chars.iter().filter(|c| !c.is_ascii()).count();
    let any_sure = stretches.iter().any(Stretch::is_sure);
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    let mut stretches = stretches.iter().peekable();
    while at < chars.len() {
        if let Some(stretch) = stretches.next_if(|stretch| stretch.chars.start == at) {
            let sure = if consistent {
                any_sure
            } else {
                stretch.is_sure_alone()
            };
            if sure {
                out.push_str(&stretch.decoded);
            } else {
                out.extend(&chars[stretch.chars.clone()]);
            }
            at = stretch.chars.end;
        } else if lost_space(at) && any_sure {
            out.push('à');
            // Of two spaces one was the byte; a single one is needed between the words.
            at += if chars.get(at + 2) == Some(&' ') {
                2
            } else {
                1
            };
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    out
}

/// Sequences in a row that decode as UTF-8.
struct Stretch {
    chars: Range<usize>,
    decoded: String,
    /// First character of the stretch's sequences, and their lengths.
    leads: Vec<(char, usize)>,
}

impl Stretch {
    fn is_sure(&self) -> bool {
        self.leads.len() > 1
            || self
                .leads
                .iter()
                .any(|&(lead, length)| length > 2 || matches!(lead, 'Ã' | 'Â'))
    }

    fn is_sure_alone(&self) -> bool {
        self.leads.len() > 1
            || self
                .leads
                .iter()
                .any(|&(lead, _)| matches!(lead, 'Ã' | 'Â' | 'â' | 'ã' | 'ï' | 'ð'))
    }
}

fn misread_stretches(chars: &[char]) -> Vec<Stretch> {
    let mut stretches = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let mut stretch = Stretch {
            chars: at..at,
            decoded: String::new(),
            leads: Vec::new(),
        };
        while let Some((c, length)) = misread_sequence(&chars[stretch.chars.end..]) {
            stretch.leads.push((chars[stretch.chars.end], length));
            stretch.decoded.push(c);
            stretch.chars.end += length;
        }
        at = stretch.chars.end.max(at + 1);
        if !stretch.leads.is_empty() {
            stretches.push(stretch);
        }
    }
    stretches
}

/// The character that the first two to four of `chars` encode when read as bytes of Windows-1252, and their number.
fn misread_sequence(chars: &[char]) -> Option<(char, usize)> {
    let lead = windows_1252_byte(*chars.first()?)?;
    let length = match lead {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => return None,
    };
    let bytes: Vec<u8> = chars
        .get(..length)?
        .iter()
        .map_while(|&c| windows_1252_byte(c))
        .collect();
    let decoded = std::str::from_utf8(&bytes).ok()?.chars().next()?;
    (bytes.len() == length).then_some((decoded, length))
}

/// Drops `ESC [ digits letter`, what terminals read as a colour.
fn remove_terminal_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        let body = &rest[at + 2..];
        let digits = body
            .bytes()
            .take_while(|byte| byte.is_ascii_digit() || *byte == b';')
            .count();
        if body
            .as_bytes()
            .get(digits)
            .is_some_and(u8::is_ascii_alphabetic)
        {
            out.push_str(&rest[..at]);
            rest = &body[digits + 1..];
        } else {
            out.push_str(&rest[..at + 2]);
            rest = body;
        }
    }
    out.push_str(rest);
    out
}

/// One pass over the characters: C1 controls, ligatures, widths, quotes, line ends and control characters.
fn simplify(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\r' => {
                chars.next_if_eq(&'\n');
                out.push('\n');
            }
            '\u{2028}' | '\u{2029}' => out.push('\n'),
            '\u{80}'..='\u{9f}' => out.push(windows_1252(c as u8)),
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => out.push('\''),
            '\u{201c}'..='\u{201f}' => out.push('"'),
            '\u{3000}' => out.push(' '),
            '\u{ff01}'..='\u{ffef}' => out.push_str(&narrow(c)),
            '\0'..='\u{8}'
            | '\u{b}'
            | '\u{e}'..='\u{1f}'
            | '\u{7f}'
            | '\u{206a}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffc}' => {}
            _ => match ligature(c) {
                Some(letters) => out.push_str(letters),
                None => out.push(c),
            },
        }
    }
    out
}

/// The ordinary form of a full-width or half-width character.
fn narrow(c: char) -> String {
    let mut normalized = NormalizedString::from(c.to_string());
    normalized.nfkc();
    normalized.get().to_string()
}

fn ligature(c: char) -> Option<&'static str> {
    Some(match c {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "'n",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repairs_what_ftfy_repairs() {
        let entities = Entities::new();
        for (broken, fixed) in [
            ("schÃ¶n", "schön"),
            ("donâ€™t â€œquoteâ€\u{9d}", "don't \"quote\""),
            ("ðŸ˜€ smile", "😀 smile"),
            ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
            ("NESTLÉ® café", "NESTLÉ® café"),
            ("Å‚Ã³dÅº", "łódź"),
            ("Ã©tÃ© Ã  la", "été à la"),
            ("MANHÃ DE SOL", "MANHÃ DE SOL"),
            ("ä½ å¥½ world", "ä½ å¥½ world"),
            ("a\u{85}", "a…"),
            ("&amp;amp; x", "& x"),
            ("<b> &amp;", "<b> &amp;"),
            ("ＦＵＬＬ　ｱ", "FULL ア"),
            ("a\u{1b}[31mred\u{1b}[0m\u{7}", "ared"),
            ("e\u{301} ﬁne\r\nx\u{2028}y", "é fine\nx\ny"),
        ] {
            assert_eq!(fix_text(broken, &entities), fixed, "{broken:?}");
        }
    }

    #[test]
    fn deep_double_encoding_stays_cheap() {
        let entities = Entities::new();
        let hostile = format!("&{}", "amp;".repeat(20_000));
        assert!(fix_text(&hostile, &entities).len() < hostile.len());
    }
}
