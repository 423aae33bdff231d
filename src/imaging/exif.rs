//! The EXIF block that carries the infotext of a JPEG or WebP: a TIFF file with one entry, `UserComment`.
//!
//! Layout of Exif 2.3, written big-endian with the text in UTF-16BE, as piexif writes it for A1111; either byte order is read.

/// `UserComment` in the Exif directory.
const USER_COMMENT: u16 = 0x9286;
/// Points from the first directory to the Exif directory.
const EXIF_DIRECTORY: u16 = 0x8769;
const TYPE_LONG: u16 = 4;
const TYPE_UNDEFINED: u16 = 7;
/// Some writers put the JPEG marker's prefix in front of the block in other formats too.
const JPEG_PREFIX: &[u8] = b"Exif\0\0";
const UNICODE: &[u8; 8] = b"UNICODE\0";
const ASCII: &[u8; 8] = b"ASCII\0\0\0";

/// Builds the block for `text`.
pub(super) fn user_comment_block(text: &str) -> Vec<u8> {
    let comment: Vec<u8> = UNICODE
        .iter()
        .copied()
        .chain(text.encode_utf16().flat_map(u16::to_be_bytes))
        .collect();
    let mut block = Vec::with_capacity(44 + comment.len());
    block.extend(b"MM\0\x2a");
    block.extend(8u32.to_be_bytes());
    // A directory is a count, entries of 12 bytes and the offset of the next directory.
    extend_directory(&mut block, EXIF_DIRECTORY, TYPE_LONG, 1, 26);
    extend_directory(
        &mut block,
        USER_COMMENT,
        TYPE_UNDEFINED,
        comment.len() as u32,
        44,
    );
    block.extend(comment);
    block
}

fn extend_directory(block: &mut Vec<u8>, tag: u16, kind: u16, count: u32, value: u32) {
    block.extend(1u16.to_be_bytes());
    block.extend(tag.to_be_bytes());
    block.extend(kind.to_be_bytes());
    block.extend(count.to_be_bytes());
    block.extend(value.to_be_bytes());
    block.extend(0u32.to_be_bytes());
}

/// The text of `UserComment`, if the block has one.
pub(super) fn read_user_comment(block: &[u8]) -> Option<String> {
    let tiff = Tiff::new(block.strip_prefix(JPEG_PREFIX).unwrap_or(block))?;
    let exif = tiff.entry(tiff.long(4)?, EXIF_DIRECTORY)?;
    let comment = tiff.entry(tiff.long(exif + 8)?, USER_COMMENT)?;
    let length = tiff.long(comment + 4)? as usize;
    // Up to four bytes would stand in the entry itself, but the prefix alone takes eight.
    let start = tiff.long(comment + 8)? as usize;
    let bytes = tiff.bytes.get(start..start.checked_add(length)?)?;
    Some(decode_comment(bytes))
}

struct Tiff<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Tiff<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let big_endian = match bytes.get(..2)? {
            b"MM" => true,
            b"II" => false,
            _ => return None,
        };
        Some(Self { bytes, big_endian })
    }

    fn short(&self, at: u32) -> Option<u16> {
        let bytes = self.bytes.get(at as usize..)?.first_chunk()?;
        Some(if self.big_endian {
            u16::from_be_bytes(*bytes)
        } else {
            u16::from_le_bytes(*bytes)
        })
    }

    fn long(&self, at: u32) -> Option<u32> {
        let bytes = self.bytes.get(at as usize..)?.first_chunk()?;
        Some(if self.big_endian {
            u32::from_be_bytes(*bytes)
        } else {
            u32::from_le_bytes(*bytes)
        })
    }

    /// Position of the entry `tag` in the directory at `directory`.
    fn entry(&self, directory: u32, tag: u16) -> Option<u32> {
        let count = u32::from(self.short(directory)?);
        (0..count)
            .map_while(|index| directory.checked_add(2 + 12 * index))
            .find(|&entry| self.short(entry) == Some(tag))
    }
}

fn decode_comment(bytes: &[u8]) -> String {
    let Some((prefix, text)) = bytes.split_first_chunk::<8>() else {
        return String::from_utf8_lossy(bytes).into_owned();
    };
    let text = match prefix {
        UNICODE => decode_utf16(text),
        ASCII | &[0, 0, 0, 0, 0, 0, 0, 0] => String::from_utf8_lossy(text).into_owned(),
        _ => String::from_utf8_lossy(bytes).into_owned(),
    };
    text.trim_end_matches('\0').to_string()
}

/// UTF-16 in the byte order that makes more of it Latin: writers disagree about the order, not about the prefix.
fn decode_utf16(bytes: &[u8]) -> String {
    let zeros = |offset: usize| {
        bytes
            .iter()
            .skip(offset)
            .step_by(2)
            .filter(|&&byte| byte == 0)
            .count()
    };
    let little_endian = zeros(1) > zeros(0);
    let units = bytes.chunks_exact(2).map(|pair| {
        if little_endian {
            u16::from_le_bytes([pair[0], pair[1]])
        } else {
            u16::from_be_bytes([pair[0], pair[1]])
        }
    });
    char::decode_utf16(units)
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_piexifs_with_the_link_that_tiff_demands() {
        // piexif.dump({"Exif": {piexif.ExifIFD.UserComment: piexif.helper.UserComment.dump("aé", encoding="unicode")}})[6:]
        let piexif = b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\x01\x92\x86\0\x07\0\0\0\x0c\0\0\0\x28UNICODE\0\0a\0\xe9";
        assert_eq!(read_user_comment(piexif).as_deref(), Some("aé"));
        let expected = b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0\0\x01\x92\x86\0\x07\0\0\0\x0c\0\0\0\x2c\0\0\0\0UNICODE\0\0a\0\xe9";
        assert_eq!(user_comment_block("aé"), expected);
    }

    #[test]
    fn either_byte_order_and_plain_text_are_read() {
        for text in ["", "a", "日本, Steps: 20\n😀"] {
            assert_eq!(
                read_user_comment(&user_comment_block(text)).as_deref(),
                Some(text)
            );
        }
        assert_eq!(decode_comment(b"UNICODE\0a\0b\0"), "ab");
        assert_eq!(decode_comment(b"ASCII\0\0\0plain\0"), "plain");
        assert_eq!(
            decode_comment(b"plain text without prefix"),
            "plain text without prefix"
        );
    }

    #[test]
    fn damaged_blocks_are_no_text() {
        let block = user_comment_block("text");
        for length in 0..block.len() {
            assert_eq!(read_user_comment(&block[..length]), None, "{length}");
        }
        for at in 0..block.len() {
            let mut damaged = block.clone();
            damaged[at] = 0xff;
            read_user_comment(&damaged);
        }
    }
}
