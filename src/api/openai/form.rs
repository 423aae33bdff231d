//! `multipart/form-data` bodies, held in memory as a whole (RFC 7578).
//!
//! The body has arrived within `server.body_limit_mib`, so parts are slices of it. Transfer encodings are not decoded: no
//! client of HTTP uses them.

use axum::body::Bytes;
use axum::http::{HeaderMap, header};

use super::Failure;

/// Parts that a form may have.
const MOST_PARTS: usize = 64;

/// One field of a form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// What was sent.
    pub content: Bytes,
}

/// Takes a body apart.
///
/// # Errors
/// 400 for a body that is no form.
pub fn parse(headers: &HeaderMap, body: &Bytes) -> Result<Vec<Part>, Failure> {
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind.and_then(|value| value.to_str().ok()).unwrap_or("");
    let is_form = kind
        .trim_start()
        .to_ascii_lowercase()
        .starts_with("multipart/form-data");
    let boundary = parameter(kind, "boundary").filter(|boundary| !boundary.is_empty());
    let Some(boundary) = boundary.filter(|_| is_form) else {
        return Err(refuse(
            "the body must be `multipart/form-data` with a boundary",
        ));
    };
    let delimiter = format!("--{boundary}");
    let mut at = find(body, delimiter.as_bytes(), 0).ok_or_else(cut_short)? + delimiter.len();
    let delimiter = format!("\r\n--{boundary}");
    let mut parts = Vec::new();
    while !body[at..].starts_with(b"--") {
        if parts.len() == MOST_PARTS {
            return Err(refuse(&format!(
                "the form has more than {MOST_PARTS} parts"
            )));
        }
        let start = find(body, b"\r\n", at).ok_or_else(cut_short)? + 2;
        let end = find(body, delimiter.as_bytes(), start).ok_or_else(cut_short)?;
        parts.push(part(&body.slice(start..end))?);
        at = end + delimiter.len();
    }
    Ok(parts)
}

fn part(bytes: &Bytes) -> Result<Part, Failure> {
    let end = find(bytes, b"\r\n\r\n", 0).ok_or_else(cut_short)?;
    let head = String::from_utf8_lossy(&bytes[..end]);
    let disposition = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.trim()
            .eq_ignore_ascii_case("content-disposition")
            .then_some(value)
    });
    let name = disposition.and_then(|value| parameter(value, "name"));
    let name = name.ok_or_else(|| refuse("a part of the form has no name"))?;
    Ok(Part {
        name,
        content: bytes.slice(end + 4..),
    })
}

/// A parameter of a header's value, quoted or not.
fn parameter(value: &str, wanted: &str) -> Option<String> {
    let mut rest = value.split_once(';')?.1;
    loop {
        let (name, after) = rest.split_once('=')?;
        let name = name.trim_start_matches([';', ' ', '\t']).trim_end();
        let (found, after) = if let Some(quoted) = after.strip_prefix('"') {
            unquote(quoted)?
        } else {
            let (token, after) = after.split_once(';').unwrap_or((after, ""));
            (token.trim().to_string(), after)
        };
        if name.eq_ignore_ascii_case(wanted) {
            return Some(found);
        }
        rest = after;
    }
}

/// A quoted text whose first quote is gone, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((out, &text[at + 1..])),
            '\\' => out.push(characters.next()?.1),
            other => out.push(other),
        }
    }
    None
}

fn find(bytes: &[u8], wanted: &[u8], from: usize) -> Option<usize> {
    let finder = bytes.get(from..)?;
    // The first byte is looked for alone, which is fast in pictures.
    let mut at = 0;
    while let Some(step) = finder[at..].iter().position(|byte| *byte == wanted[0]) {
        at += step;
        if finder[at..].starts_with(wanted) {
            return Some(from + at);
        }
        at += 1;
    }
    None
}

fn cut_short() -> Failure {
    refuse("the form's parts do not end with its boundary")
}

fn refuse(message: &str) -> Failure {
    Failure {
        code: Some("invalid_multipart"),
        param: None,
        ..Failure::parameter("", message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: &str, body: &'static [u8]) -> Option<Vec<(String, Vec<u8>)>> {
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, kind.parse().unwrap())]);
        let parts = parse(&headers, &Bytes::from_static(body)).ok()?;
        Some(
            parts
                .into_iter()
                .map(|p| (p.name, p.content.to_vec()))
                .collect(),
        )
    }

    #[test]
    fn parts_keep_every_byte() {
        let body = b"junk\r\n--x y\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n\r\n--x\r\n\
                     \r\n--x y\r\ncontent-type: image/png\r\nCONTENT-DISPOSITION: form-data; filename=\"q\\\"; name=z\"; name=image[]\
                     \r\n\r\n\x00\r\xff\r\n--x y--\r\nend";
        let parts = read("multipart/form-data; charset=utf-8; boundary=\"x y\"", body).unwrap();
        assert_eq!(parts[0], ("a".into(), b"\r\n--x\r\n".to_vec()));
        assert_eq!(parts[1], ("image[]".into(), b"\x00\r\xff".to_vec()));
        assert_eq!(parts.len(), 2);
    }

    #[test]
    fn what_is_no_whole_form_is_refused() {
        assert_eq!(
            read("multipart/form-data; boundary=x", b"--x--"),
            Some(vec![])
        );
        for (kind, body) in [
            ("application/json", &b"{}"[..]),
            ("multipart/form-data", b"--x--"),
            ("multipart/form-data; boundary=x", b""),
            ("multipart/form-data; boundary=x", b"--x\r\n"),
            (
                "multipart/form-data; boundary=x",
                b"--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nb",
            ),
            (
                "multipart/form-data; boundary=x",
                b"--x\r\nContent-Disposition: form-data\r\n\r\nb\r\n--x--",
            ),
        ] {
            assert_eq!(read(kind, body), None, "{kind}: {}", body.escape_ascii());
        }
    }
}
