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
    let count = u16_at(bytes, end + 10);
    let directory = u32_at(bytes, end + 16);
    if count == 0xffff || directory == 0xffff_ffff {
        return Err("it is a zip of more than 4 GiB or 65534 entries (zip64)".into());
    }
    let mut entries = BTreeMap::new();
    let mut at = directory;
    for _ in 0..count {
        let (name, range, next) = entry(bytes, at)?;
        if entries.insert(name.clone(), range).is_some() {
            return Err(format!("its zip holds `{name}` twice"));
        }
        at = next;
    }
    Ok(entries)
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
    let (packed, size) = (u32_at(header, 20), u32_at(header, 24));
    if flags & 1 != 0 {
        return Err(format!("its entry `{name}` is encrypted"));
    }
    if method != 0 || packed != size {
        return Err(format!(
            "its entry `{name}` is compressed, which PyTorch never does"
        ));
    }
    let local = bytes.get(u32_at(header, 42)..).ok_or_else(damaged)?;
    if local.len() < LOCAL_LEN || !local.starts_with(&LOCAL) {
        return Err(damaged());
    }
    let start = u32_at(header, 42) + LOCAL_LEN + u16_at(local, 26) + u16_at(local, 28);
    if start + size > bytes.len() {
        return Err(format!(
            "its entry `{name}` ends at byte {}, the file at {}",
            start + size,
            bytes.len()
        ));
    }
    Ok((
        name,
        start..start + size,
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
