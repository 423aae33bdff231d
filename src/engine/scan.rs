//! Walking a directory of models, and the order its files are listed in.

use std::cmp::Ordering;
use std::fs;
use std::path::Path;

/// Directories nested deeper than this are not searched; also ends cycles of links.
const MAX_DEPTH: usize = 12;

/// Calls `visit(relative, absolute)` for each file below `dir`. A directory that cannot be read counts as empty.
pub(super) fn walk(root: &Path, dir: &Path, depth: usize, visit: &mut dyn FnMut(&Path, &Path)) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if depth < MAX_DEPTH {
                walk(root, &path, depth + 1, visit);
            }
        } else if let Ok(relative) = path.strip_prefix(root) {
            visit(relative, &path);
        }
    }
}

/// Whether a file name ends in one of these, in any letter case.
pub(super) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|found| {
        extensions
            .iter()
            .any(|wanted| found.eq_ignore_ascii_case(wanted))
    })
}

/// Case-insensitive order in which `a2` comes before `a10`.
pub(super) fn natural_order(a: &str, b: &str) -> Ordering {
    let key = |text: &str| -> Vec<(u64, String)> {
        let lower = text.to_lowercase();
        let mut parts = Vec::new();
        let mut rest = lower.as_str();
        while !rest.is_empty() {
            let text_end = rest
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(rest.len());
            let (word, after) = rest.split_at(text_end);
            let digits_end = after
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(after.len());
            let (digits, after) = after.split_at(digits_end);
            parts.push((0, word.to_string()));
            parts.push((digits.parse().unwrap_or(u64::MAX), String::new()));
            rest = after;
        }
        parts
    };
    key(a).cmp(&key(b)).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_ordered_by_value() {
        let mut names = ["m10", "b", "M2", "m02", "a1b"];
        names.sort_by(|a, b| natural_order(a, b));
        assert_eq!(names, ["a1b", "b", "M2", "m02", "m10"]);
    }
}
