//! The architecture as a test: who may use whom, where `unsafe` may stand, how long a file may get.
//!
//! Every file below `src` is split into Rust tokens; comments and literals are dropped. A path that begins with `crate` or
//! `super` is made absolute, braces of `use` included, and its first part is the room that is used. The drawing that
//! [`ARROWS`] repeats is in the documentation of the library.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Everything may use these; they use nothing of ours but one another.
const BASE: &[&str] = &["config", "telemetry", "shutdown", "trim_memory"];

/// Room, and the rooms it may use besides [`BASE`]. A new room gets a row here before it gets code.
const ARROWS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    ("cli", &["engine", "pipeline", "imaging"]),
    ("api", &["engine", "pipeline", "imaging"]),
    ("ui", &["engine", "pipeline", "imaging"]),
    ("engine", &["pipeline", "weights", "imaging"]),
    (
        "pipeline",
        &["sampling", "prompt", "models", "weights", "imaging", "rng"],
    ),
    ("sampling", &["rng"]),
    ("models", &["nn", "weights"]),
    ("weights", &[]),
    ("nn", &[]),
    ("prompt", &[]),
    ("imaging", &[]),
    ("rng", &[]),
    ("dashboard", &["supervisor"]),
    ("portal", &[]),
    ("provision", &[]),
    ("backup", &[]),
    ("supervisor", &[]),
];

/// Room, path it may use although no arrow leads there, and why. None of them points up.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    (
        "cli",
        "api",
        "`serve` starts it; `prompt` shares its names of samplers and its options",
    ),
    (
        "cli",
        "sampling",
        "a request names a sampler and a scheduler",
    ),
    ("cli", "rng", "a request names a noise source"),
    (
        "cli",
        "nn",
        "`bench` measures single operations and names the kernels in use",
    ),
    ("engine", "rng", "its tests write requests out"),
    (
        "api",
        "sampling",
        "a request names a sampler and a scheduler",
    ),
    (
        "api",
        "prompt",
        "styles are put into prompts before a request exists",
    ),
    ("api", "rng", "a request names a noise source"),
    (
        "pipeline",
        "nn",
        "it says where and in which type models compute",
    ),
    (
        "weights",
        "nn::block_cache",
        "buffers come from the process's allocator",
    ),
    (
        "weights",
        "nn::Stored",
        "what a file holds goes to a layer as it is",
    ),
    (
        "weights",
        "nn::product",
        "deltas of LoRAs are products of matrices",
    ),
    (
        "weights",
        "nn::transpose",
        "and some factors are stored the other way round",
    ),
];

/// Where `unsafe` is allowed: the kernels, the card, the allocator, the one memory map and its numbers.
const UNSAFE: &[&str] = &[
    "nn/cpu/",
    "nn/cpu.rs",
    "nn/cuda/",
    "nn/block_cache.rs",
    "weights/file.rs",
    "weights/held.rs",
];

/// Lines a file may have.
const LINES: usize = 500;

/// Lines of code a function may have, signature and braces included; comments and empty lines do not count.
const FUNCTION_LINES: usize = 60;

/// Files that may have more, how many, and why.
const LONG: &[(&str, usize, &str)] = &[];

#[test]
fn every_arrow_points_down() {
    let mut used = BTreeSet::new();
    let mut broken = Vec::new();
    for file in sources() {
        let room = file.module.first().map_or("main", String::as_str);
        let row = ARROWS.iter().find(|(name, _)| *name == room);
        if row.is_none() && !BASE.contains(&room) {
            broken.push(format!("{}: room `{room}` has no row in ARROWS", file.name));
        }
        let allowed = row.map_or(&[][..], |(_, allowed)| allowed);
        for path in paths(&file) {
            let Some(target) = path.first() else { continue };
            let known = target == room
                || BASE.contains(&target.as_str())
                || allowed.contains(&target.as_str());
            let full = path.join("::");
            let exception = EXCEPTIONS.iter().find(|(from, to, _)| {
                *from == room && (full == *to || full.starts_with(&format!("{to}::")))
            });
            if let (false, Some(exception)) = (known, exception) {
                used.insert(*exception);
            } else if !known {
                broken.push(format!("{}: `{room}` may not use `{full}`", file.name));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    let stale: Vec<_> = EXCEPTIONS.iter().filter(|e| !used.contains(*e)).collect();
    assert!(stale.is_empty(), "exceptions that nothing needs: {stale:?}");
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let outside: Vec<String> = sources()
        .into_iter()
        .filter(|file| !UNSAFE.iter().any(|room| file.name.starts_with(room)))
        .filter(|file| {
            let is_unsafe = |token: &Token| matches!(token, Token::Word(word) if word == "unsafe" || word == "unsafe_code");
            file.tokens.iter().any(is_unsafe)
        })
        .map(|file| file.name)
        .collect();
    assert!(outside.is_empty(), "unsafe outside its rooms: {outside:?}");
}

#[test]
fn files_stay_short() {
    let limit = |name: &str| {
        let entry = LONG.iter().find(|(long, ..)| *long == name);
        entry.map_or(LINES, |(_, lines, _)| *lines)
    };
    let long: Vec<_> = sources()
        .into_iter()
        .filter(|file| file.lines > limit(&file.name))
        .map(|file| (file.name, file.lines))
        .collect();
    assert!(
        long.is_empty(),
        "split along a concept, or list with a reason: {long:?}"
    );
    let files = sources();
    for (name, ..) in LONG {
        let needed = |file: &Source| file.name == *name && file.lines > LINES;
        assert!(files.iter().any(needed), "no longer long: `{name}`");
    }
}

#[test]
fn functions_stay_short() {
    let long: Vec<String> = sources()
        .iter()
        .filter(|file| !file.name.ends_with("tests.rs"))
        .flat_map(|file| {
            let long = functions(file).into_iter();
            long.filter(|(_, lines)| *lines > FUNCTION_LINES)
                .map(|(name, lines)| format!("{}: `{name}` has {lines}", file.name))
        })
        .collect();
    assert!(
        long.is_empty(),
        "split what is set up off what is done: {long:#?}"
    );
}

#[test]
fn functions_are_counted_to_their_closing_brace() {
    let text = "pub fn a(\n    x: [u8; { 3 }],\n) {\n    // no\n\n    \"}\";\n    fn b() {}\n}\n\
        trait C {\n    fn d(&self);\n    fn e(&self) -> [u8; 2] {\n        [1, 2]\n    }\n}\n\
        mod tests {\n    fn f() {\n    }\n}";
    let got = functions(&Source::new("room/part.rs", text));
    let want = [("a", 6), ("b", 1), ("e", 3)];
    let want = want.map(|(name, lines)| (name.to_string(), lines));
    assert_eq!(got, want);
}

#[test]
fn the_reader_sees_through_comments_literals_braces_and_inline_modules() {
    let text = r##"
        //! crate::no
        use crate::a::{self, b::{C, D as E}, *};
        /* crate::no /* crate::no */ crate::no */
        pub(crate) fn f<'a>(x: &'a str) { let _ = ("crate::no \" ", r#"crate::no" no"#, '"', 'x', b'\''); super::g(); }
        mod tests { use super::super::h; use super::*; fn g() { crate::i::J::k() } }
    "##;
    let file = Source::new("room/part.rs", text);
    let got: Vec<String> = paths(&file).iter().map(|path| path.join("::")).collect();
    let want = [
        "a",
        "a::b::C",
        "a::b::D",
        "a",
        "room::g",
        "room::h",
        "room::part",
        "i::J::k",
    ];
    assert_eq!(got, want);
}

/// A file below `src`.
struct Source {
    /// Path below `src`, with `/`.
    name: String,
    /// Its module path; empty for `main.rs` and `lib.rs`.
    module: Vec<String>,
    lines: usize,
    tokens: Vec<Token>,
    /// The line of each token, from 0.
    places: Vec<usize>,
    /// Whether a line has more on it than a comment.
    code: Vec<bool>,
}

impl Source {
    fn new(name: &str, text: &str) -> Self {
        let mut module: Vec<String> = name
            .trim_end_matches(".rs")
            .split('/')
            .map(String::from)
            .collect();
        if module.last().is_some_and(|last| last == "mod") || module == ["main"] {
            module.pop();
        }
        let (tokens, places) = tokens(text).into_iter().unzip();
        let is_code = |line: &str| !line.trim().is_empty() && !line.trim().starts_with("//");
        Self {
            name: name.into(),
            module,
            lines: text.lines().count(),
            tokens,
            places,
            code: text.lines().map(is_code).collect(),
        }
    }
}

/// All files but `lib.rs`, which declares the rooms.
fn sources() -> Vec<Source> {
    fn visit(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    visit(&root, &mut found);
    found.sort();
    let name = |path: &Path| {
        let below = path.strip_prefix(&root).expect("found below it");
        below.to_str().expect("an ASCII name").to_string()
    };
    let sources: Vec<Source> = found
        .iter()
        .map(|path| (name(path), fs::read_to_string(path).expect("UTF-8")))
        .filter(|(name, _)| name != "lib.rs")
        .map(|(name, text)| Source::new(&name, &text))
        .collect();
    assert!(
        sources.len() > 50,
        "the tree was not found at {}",
        root.display()
    );
    sources
}

#[derive(Debug, PartialEq)]
enum Token {
    Word(String),
    /// `::`
    Path,
    Mark(char),
}

/// Name and lines of code of each function with a body, those of tests left out.
fn functions(file: &Source) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (i, pair) in file.tokens.windows(2).enumerate() {
        match pair {
            [Token::Word(word), Token::Word(name)] if word == "mod" && name.ends_with("tests") => {
                break;
            }
            [Token::Word(word), Token::Word(name)] if word == "fn" => {
                if let Some(end) = end_of_function(&file.tokens, i + 2) {
                    let lines = &file.code[file.places[i]..=file.places[end]];
                    found.push((name.clone(), lines.iter().filter(|code| **code).count()));
                }
            }
            _ => {}
        }
    }
    found
}

/// The closing brace of a function whose parameters begin at `start`; nothing if it has no body.
fn end_of_function(tokens: &[Token], start: usize) -> Option<usize> {
    let (mut brackets, mut braces, mut is_body) = (0, 0, false);
    for (i, token) in tokens.iter().enumerate().skip(start) {
        let Token::Mark(mark) = token else { continue };
        match mark {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets -= 1,
            ';' if brackets == 0 && braces == 0 => return None,
            '{' => {
                is_body |= brackets == 0;
                braces += 1;
            }
            '}' => {
                braces -= 1;
                if braces == 0 && is_body {
                    return Some(i);
                }
            }
            _ => {}
        }
    }
    None
}

/// Words and marks with their lines; comments, strings, characters, numbers' insides and lifetimes are dropped.
fn tokens(text: &str) -> Vec<(Token, usize)> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let (mut out, mut i) = (Vec::new(), 0);
    let (mut line, mut seen) = (0, 0);
    while i < chars.len() {
        let c = chars[i];
        line += chars[seen..i].iter().filter(|c| **c == '\n').count();
        seen = i;
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            i = after_block_comment(&chars, i);
        } else if c == '"' {
            i = after_string(&chars, i);
        } else if c == '\'' {
            // A character ends in a quote, a lifetime does not.
            i += match (at(i + 1), at(i + 2)) {
                ('\\', _) => {
                    3 + (i + 3..chars.len())
                        .take_while(|&k| chars[k] != '\'')
                        .count()
                        + 1
                }
                (_, '\'') => 3,
                _ => 1,
            };
        } else if c.is_alphanumeric() || c == '_' {
            let start = i;
            while at(i).is_alphanumeric() || at(i) == '_' {
                i += 1;
            }
            let word: String = chars[start..i].iter().collect();
            let hashes = (i..chars.len()).take_while(|&k| chars[k] == '#').count();
            if matches!(word.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                i = after_raw_string(&chars, i + hashes + 1, hashes);
            } else {
                out.push((Token::Word(word), line));
            }
        } else if c == ':' && at(i + 1) == ':' {
            out.push((Token::Path, line));
            i += 2;
        } else {
            if !c.is_whitespace() {
                out.push((Token::Mark(c), line));
            }
            i += 1;
        }
    }
    out
}

fn after_block_comment(chars: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn after_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn after_raw_string(chars: &[char], start: usize, hashes: usize) -> usize {
    let ends = |i: usize| chars[i] == '"' && chars[i + 1..].iter().take(hashes).all(|&c| c == '#');
    let end = (start..chars.len())
        .find(|&i| ends(i))
        .unwrap_or(chars.len());
    end + 1 + hashes
}

/// Every path of a file that begins with `crate` or `super` (in `main.rs`: `sdgen`), made absolute.
fn paths(file: &Source) -> Vec<Vec<String>> {
    let tokens = &file.tokens;
    let word = |i: usize| match tokens.get(i) {
        Some(Token::Word(word)) => word.as_str(),
        _ => "",
    };
    let mut found = Vec::new();
    // The module a token stands in: the file's own, and the inline ones that are open, by depth of braces.
    let (mut module, mut inline, mut depth) = (file.module.clone(), Vec::new(), 0);
    for i in 0..tokens.len() {
        match &tokens[i] {
            Token::Mark('{') => {
                depth += 1;
                if i >= 2 && word(i - 2) == "mod" {
                    inline.push(depth);
                    module.push(word(i - 1).to_string());
                }
            }
            Token::Mark('}') => {
                if inline.last() == Some(&depth) {
                    inline.pop();
                    module.pop();
                }
                depth -= 1;
            }
            Token::Word(first) if tokens.get(i + 1) == Some(&Token::Path) => {
                if i > 0 && tokens[i - 1] == Token::Path {
                    continue;
                }
                let base = match first.as_str() {
                    "crate" => Vec::new(),
                    "sdgen" if file.name == "main.rs" => Vec::new(),
                    "super" => module[..module.len().saturating_sub(1)].to_vec(),
                    _ => continue,
                };
                tree(tokens, i + 2, base, &mut found);
            }
            _ => {}
        }
    }
    found
}

/// Reads what follows a `::`: a name, a star or braces. Returns the place behind it.
fn tree(
    tokens: &[Token],
    mut i: usize,
    mut base: Vec<String>,
    found: &mut Vec<Vec<String>>,
) -> usize {
    loop {
        match tokens.get(i) {
            Some(Token::Word(word)) if word == "super" => {
                base.pop();
            }
            Some(Token::Word(word)) if word == "self" => {}
            Some(Token::Word(word)) => base.push(word.clone()),
            Some(Token::Mark('{')) => {
                i += 1;
                while !matches!(tokens.get(i), None | Some(Token::Mark('}'))) {
                    let starts = matches!(tokens[i], Token::Word(_) | Token::Mark('*' | '{'));
                    let renamed = i > 0 && tokens[i - 1] == Token::Word("as".into());
                    if tokens[i] == Token::Word("as".into()) || renamed || !starts {
                        i += 1;
                    } else {
                        i = tree(tokens, i, base.clone(), found);
                    }
                }
                return i + 1;
            }
            _ => {}
        }
        if tokens.get(i + 1) != Some(&Token::Path) {
            found.push(base);
            return i + 1;
        }
        i += 2;
    }
}
