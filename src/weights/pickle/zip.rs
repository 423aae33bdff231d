//! The entries of a zip as `torch.save` writes it: stored, not compressed, so that an entry is a range of the file.
//!
//! Follows PKWARE's APPNOTE, 4.3. Compressed and encrypted entries are refused, so no entry can be larger than the file.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Reason;

const END: [u8; 4] = *b"PK\x05\x06";
const CENTRAL: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
/// Bytes of the end record without its comment, of a central header and of a local header without name and extra fields.
const END_LEN: usize = 22;
const CENTRAL_LEN: usize = 46;
const LOCAL_LEN: usize = 30;
/// Of zip64: end record, its locator before the plain one, the extra field of an entry, and what plain fields say then.
const LARGE_END: [u8; 4] = *b"PK\x06\x06";
const LOCATOR: [u8; 4] = *b"PK\x06\x07";
const LOCATOR_LEN: usize = 20;
const LARGE_FIELD: usize = 1;
const U16_FULL: usize = 0xffff;
const U32_FULL: usize = 0xffff_ffff;
/// The longest comment there can be.
const COMMENT: usize = 0xffff;

/// Byte ranges of all entries by name.
pub(super) fn entries(bytes: &[u8]) -> Result<BTreeMap<String, Range<usize>>, Reason> {
    if !bytes.starts_with(&LOCAL) {
        return Err("it is no zip, which PyTorch files are since version 1.6".into());
    }
    let truncated = || "it is truncated: the end of the zip is missing".to_string();
    let from = bytes.len().saturating_sub(END_LEN + COMMENT);
    let end = bytes[from..]
        .windows(END.len())
        .rposition(|window| window == END)
        .map(|at| from + at)
        .filter(|at| at + END_LEN <= bytes.len())
        .ok_or_else(truncated)?;
    let (count, mut at) = directory(bytes, end)?;
    let mut entries = BTreeMap::new();
    for _ in 0..count {
        let (name, range, next) = entry(bytes, at)?;
        if entries.insert(name.clone(), range).is_some() {
            return Err(format!("its zip holds `{name}` twice"));
        }
        at = next;
    }
    Ok(entries)
}

/// Number of entries and where their headers begin, as the end record at `end` says, or the larger one (zip64) before it.
fn directory(bytes: &[u8], end: usize) -> Result<(usize, usize), Reason> {
    let (count, at) = (u16_at(bytes, end + 10), u32_at(bytes, end + 16));
    if count != U16_FULL && at != U32_FULL {
        return Ok((count, at));
    }
    let damaged = || "its zip64 directory is damaged".to_string();
    let locator = end
        .checked_sub(LOCATOR_LEN)
        .map(|at| &bytes[at..end])
        .filter(|locator| locator.starts_with(&LOCATOR))
        .ok_or_else(damaged)?;
    let large = u64_at(locator, 8)
        .and_then(|at| bytes.get(at..))
        .filter(|record| record.starts_with(&LARGE_END))
        .ok_or_else(damaged)?;
    let count = u64_at(large, 32).ok_or_else(damaged)?;
    // Each has a header, so that there are no more than fit.
    if count > bytes.len() / CENTRAL_LEN {
        return Err(damaged());
    }
    Ok((count, u64_at(large, 48).ok_or_else(damaged)?))
}

/// Size and place of an entry, from its header or where that has no room for them from its zip64 field.
fn size_and_place(header: &[u8], extra: &[u8]) -> Option<(usize, usize, usize)> {
    let mut rest = extra;
    let mut large: &[u8] = &[];
    while rest.len() >= 4 {
        let (id, len) = (u16_at(rest, 0), u16_at(rest, 2));
        let field = rest.get(4..4 + len)?;
        if id == LARGE_FIELD {
            large = field;
        }
        rest = &rest[4 + len..];
    }
    let mut value = |field: usize| match u32_at(header, field) {
        U32_FULL => {
            let value = u64_at(large, 0)?;
            large = &large[8..];
            Some(value)
        }
        value => Some(value),
    };
    // In this order: size, packed size, place.
    let (size, packed, place) = (value(24)?, value(20)?, value(42)?);
    Some((size, packed, place))
}

/// Name and bytes of the entry whose central header lies at `at`, and where the next one begins.
fn entry(bytes: &[u8], at: usize) -> Result<(String, Range<usize>, usize), Reason> {
    let damaged = || "its zip directory is damaged".to_string();
    let header = bytes.get(at..).ok_or_else(damaged)?;
    if header.len() < CENTRAL_LEN || !header.starts_with(&CENTRAL) {
        return Err(damaged());
    }
    let [name_len, extra, comment] = [28, 30, 32].map(|field| u16_at(header, field));
    let name = header
        .get(CENTRAL_LEN..CENTRAL_LEN + name_len)
        .ok_or_else(damaged)?;
    let name = String::from_utf8_lossy(name).into_owned();
    let (flags, method) = (u16_at(header, 8), u16_at(header, 10));
    let extras = header.get(CENTRAL_LEN + name_len..CENTRAL_LEN + name_len + extra);
    let (size, packed, place) = extras
        .and_then(|extras| size_and_place(header, extras))
        .ok_or_else(damaged)?;
    if flags & 1 != 0 {
        return Err(format!("its entry `{name}` is encrypted"));
    }
    if method != 0 || packed != size {
        return Err(format!(
            "its entry `{name}` is compressed, which PyTorch never does"
        ));
    }
    let local = bytes.get(place..).ok_or_else(damaged)?;
    if local.len() < LOCAL_LEN || !local.starts_with(&LOCAL) {
        return Err(damaged());
    }
    let start = place + LOCAL_LEN + u16_at(local, 26) + u16_at(local, 28);
    let end = start.saturating_add(size);
    if end > bytes.len() || start > end {
        return Err(format!(
            "its entry `{name}` ends at byte {end}, the file at {}",
            bytes.len()
        ));
    }
    Ok((
        name,
        start..end,
        at + CENTRAL_LEN + name_len + extra + comment,
    ))
}

/// A field of a header whose length was checked.
fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u16_at(bytes, at) | u16_at(bytes, at + 2) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    let field = bytes.get(at..)?.first_chunk()?;
    usize::try_from(u64::from_le_bytes(*field)).ok()
}
