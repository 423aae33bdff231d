//! The prompt language against A1111's answers: tokenizer, attention weights, chunks, AND, editing schedules.
//!
//! `tests/golden/tokenize.json` comes from transformers 4.46.3 and `open_clip` 2.30.0, `prompt_*.json` from
//! `tests/golden/make/prompt.py`. Ids, texts and call numbers are compared exactly; weights to 1e-6, the step of an f32 near 8.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use sdgen::prompt::{
    BREAK, Chunk, ChunkOptions, END, EditRule, Emphasis, Flavour, START, ScheduleSteps, Tokenizer,
    Tower, build_chunks, extract_extra_networks, parse_attention, schedule, split_and,
    strip_comments,
};
use serde_json::Value;

fn golden(text: &str) -> Vec<Value> {
    serde_json::from_str(text).expect("golden file")
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .expect("ids")
        .iter()
        .map(|id| id.as_u64().expect("id") as u32)
        .collect()
}

#[test]
fn every_golden_prompt_gets_the_published_ids() {
    let tokenizer = Tokenizer::new();
    let cases = golden(include_str!("golden/tokenize.json"));
    assert_eq!(cases.len(), 60);
    for case in &cases {
        let text = case["text"].as_str().expect("text");
        assert_eq!(
            tokenizer.encode(text, Flavour::ClipL),
            ids(&case["clip_l"]),
            "CLIP-L: {text:?}"
        );
        assert_eq!(
            tokenizer.encode(text, Flavour::OpenClip),
            ids(&case["open_clip"]),
            "OpenCLIP: {text:?}"
        );
    }
}

#[test]
fn the_tokenizer_is_built_quickly() {
    let fastest = (0..3)
        .map(|_| {
            let start = Instant::now();
            std::hint::black_box(Tokenizer::new());
            start.elapsed()
        })
        .min()
        .expect("three runs");
    assert!(fastest < Duration::from_millis(400), "{fastest:?}");
}

fn assert_fragments(text: &str, expected: &[(&str, f32)]) {
    let got = parse_attention(text);
    let same = got.len() == expected.len()
        && got.iter().zip(expected).all(|(got, want)| {
            got.0 == want.0 && (got.1 - want.1).abs() <= 1e-6 * want.1.abs().max(1.0)
        });
    assert!(same, "{text:?}\n got {got:?}\nwant {expected:?}");
}

#[test]
fn attention_vectors_of_a1111() {
    assert_fragments(
        "an (important) word",
        &[("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    );
    assert_fragments("(unbalanced", &[("unbalanced", 1.1)]);
    assert_fragments(r"\(literal\]", &[("(literal]", 1.0)]);
    assert_fragments("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]);
    assert_fragments(
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        &[
            ("a ", 1.0),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ],
    );
    assert_fragments("(a:1.2)b:1.3)", &[("a", 1.2), ("b:1.3)", 1.0)]);
    assert_fragments("(a:1.5", &[("a:1.5", 1.1)]);
    assert_fragments("[a:1.2]", &[("a:1.2", 0.909_090_9)]);
    assert_fragments("((a))[[b]]", &[("a", 1.21), ("b", 0.826_446_3)]);
    assert_fragments("(a (b:2):3)", &[("a ", 3.0), ("b", 6.0)]);
    assert_fragments("(a:-1)", &[("a", -1.0)]);
    assert_fragments("()", &[("", 1.0)]);
    assert_fragments("", &[("", 1.0)]);
    assert_fragments(r"a\", &[("a", 1.0)]);
    assert_fragments(r"a\\b", &[(r"a\b", 1.0)]);
    assert_fragments("BREAK a", &[("", 1.0), (BREAK, -1.0), ("a", 1.0)]);
    assert_fragments("x BREAKy", &[("x BREAKy", 1.0)]);
    assert_fragments(
        "a (b BREAK c:1.2) d",
        &[
            ("a ", 1.0),
            ("b", 1.2),
            (BREAK, -1.2),
            ("c", 1.2),
            (" d", 1.0),
        ],
    );
}

#[test]
fn attention_of_random_texts_is_the_references() {
    for case in golden(include_str!("golden/prompt_attention.json")) {
        let expected: Vec<(&str, f32)> = case["fragments"]
            .as_array()
            .expect("fragments")
            .iter()
            .map(|entry| {
                (
                    entry[0].as_str().expect("text"),
                    entry[1].as_f64().expect("weight") as f32,
                )
            })
            .collect();
        assert_fragments(case["text"].as_str().expect("text"), &expected);
    }
}

fn chunks(text: &str, tower: Tower) -> Vec<Chunk> {
    build_chunks(
        &parse_attention(text),
        &Tokenizer::new(),
        &ChunkOptions::new(tower),
    )
}

#[test]
fn chunks_end_at_75_tokens() {
    for (words, count) in [(0, 1), (74, 1), (75, 1), (76, 2), (150, 2), (151, 3)] {
        let built = chunks(&"cat ".repeat(words), Tower::ClipL);
        assert_eq!(built.len(), count, "{words} words");
        assert!(
            built
                .iter()
                .all(|chunk| chunk.tokens[0] == START && chunk.tokens[76] == END)
        );
    }
}

#[test]
fn a_chunk_ends_after_a_near_comma() {
    // 60 words, a comma, 20 words: the comma is 61st; 14 tokens behind it move on.
    let near = chunks(
        &format!("{}, {}", "cat ".repeat(60), "dog ".repeat(20)),
        Tower::OpenClipG,
    );
    assert_eq!(
        (near[0].tokens[61], near[0].tokens[62], near[0].tokens[63]),
        (267, END, 0)
    );
    assert_eq!(near[1].tokens[1..=20], [1929; 20]);
    // A comma more than 20 tokens back stays where it is.
    let far = chunks(
        &format!("{}, {}", "cat ".repeat(54), "dog ".repeat(30)),
        Tower::ClipL,
    );
    assert_eq!(
        (far[0].tokens[75], far[1].tokens[1..=10].to_vec()),
        (1929, vec![1929; 10])
    );
    let weighted = chunks(
        &format!("{}, ({}:1.5)", "cat ".repeat(60), "dog ".repeat(20)),
        Tower::ClipL,
    );
    assert_eq!(
        weighted[1].weights[..22].to_vec(),
        [vec![1.0], vec![1.5; 20], vec![1.0]].concat()
    );
}

#[test]
fn breaks_flush_and_weighted_breaks_are_words() {
    assert_eq!(chunks("a BREAK", Tower::ClipL).len(), 1);
    let leading = chunks("BREAK a", Tower::ClipL);
    assert_eq!(
        (leading.len(), &leading[0]),
        (2, &Chunk::empty(Tower::ClipL))
    );
    let weighted = chunks("(a BREAK c:1.2)", Tower::ClipL);
    assert_eq!(
        (
            weighted.len(),
            weighted[0].tokens[2],
            weighted[0].weights[2]
        ),
        (1, 2568, -1.2)
    );
    let literal = build_chunks(
        &Emphasis::None.fragments("a BREAK c"),
        &Tokenizer::new(),
        &ChunkOptions::new(Tower::ClipL),
    );
    assert_eq!(literal.len(), 1);
}

const TEN: ScheduleSteps = ScheduleSteps {
    base: 10,
    hires: None,
};
const TEN_HIRES: ScheduleSteps = ScheduleSteps {
    base: 10,
    hires: Some(10),
};

fn owned(expected: &[(usize, &str)]) -> Vec<(usize, String)> {
    expected
        .iter()
        .map(|&(end, text)| (end, text.to_string()))
        .collect()
}

/// Asserts the first segments, and that the last one ends at 10.
fn assert_schedule(text: &str, steps: ScheduleSteps, expected: &[(usize, &str)]) {
    let got = schedule(text, steps, EditRule::Current);
    assert_eq!(
        got[..expected.len().min(got.len())],
        owned(expected),
        "{text:?}"
    );
    assert_eq!(got.last().map(|segment| segment.0), Some(10), "{text:?}");
}

#[test]
fn editing_vectors_of_a1111() {
    for (text, expected) in [
        ("test", &[(10, "test")][..]),
        ("a [b:3]", &[(3, "a "), (10, "a b")]),
        ("a [b: 3]", &[(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", &[(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", &[(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", &[(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", &[(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", &[(10, "a [unbalanced")]),
        ("a [b:.5] c", &[(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", &[(10, "a [{b|d{:.5] c")]),
        ("((a][:b:c [d:3]", &[(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        (
            "[a|(b:1.1)]",
            &[(1, "a"), (2, "(b:1.1)"), (3, "a"), (4, "(b:1.1)")],
        ),
        ("[fe|]male", &[(1, "female"), (2, "male"), (3, "female")]),
        (
            "[fe|||]male",
            &[
                (1, "female"),
                (2, "male"),
                (3, "male"),
                (4, "male"),
                (5, "female"),
            ],
        ),
        ("[cat::5]", &[(5, "cat"), (10, "")]),
        ("[:dog:5]", &[(5, ""), (10, "dog")]),
        ("[[a:b:3]:c:6]", &[(3, "a"), (6, "b"), (10, "c")]),
        (
            "[a:[b|c]:3]",
            &[(1, "a"), (2, "a"), (3, "a"), (4, "c"), (5, "b")],
        ),
        ("[|a]", &[(1, ""), (2, "a"), (3, "")]),
        ("[ a : b : 5 ]", &[(5, " a "), (10, " b ")]),
        ("[a(b):c:5]", &[(5, "a(b)"), (10, "c")]),
        ("[b:c:5] ] x", &[(5, "b ] x"), (10, "c ] x")]),
        ("[[b:c:5] x", &[(5, "[b x"), (10, "[c x")]),
        ("(a [b:c:5]", &[(5, "(a b"), (10, "(a c")]),
        ("[a:b:5]:c", &[(5, "a:c"), (10, "b:c")]),
        (r"[a:b:3] \| x", &[(3, r"a \| x"), (10, r"b \| x")]),
        ("[a:b:1.0]", &[(10, "a")]),
        ("[a:b:-1]", &[(10, "b")]),
        ("[a:b:0]", &[(10, "b")]),
        ("[a:b:20]", &[(10, "a")]),
        ("[a:b:1e1]", &[(10, "a")]),
    ] {
        assert_schedule(text, TEN, expected);
    }
    for literal in [
        "[a:b]",
        "[]",
        "[a:b:c:5]",
        "[a:b:5 x]",
        "x:y",
        "a:b:5]",
        "[a|b:3]",
        "[(a|b):3]",
        "a | [b:c:5]",
        "[a|b] (c|d)",
        "{x|y} [b:c:5]",
        r"[b:c:5] \",
        "[b:c:5] \\\n",
    ] {
        assert_eq!(
            schedule(literal, TEN, EditRule::Current),
            owned(&[(10, literal)])
        );
    }
}

#[test]
fn hires_pass_counts_from_the_end_of_the_base_pass() {
    assert_schedule("a [b:.5] c", TEN_HIRES, &[(10, "a b c")]);
    assert_schedule("a [b:1.5] c", TEN_HIRES, &[(5, "a  c"), (10, "a b c")]);
    assert_schedule(
        "[a:b:1.5] [c:d:14] [e:f:4]",
        TEN_HIRES,
        &[(4, "a c f"), (5, "a d f"), (10, "b d f")],
    );
    let steps = ScheduleSteps {
        base: 10,
        hires: Some(4),
    };
    assert_eq!(
        schedule("[a:b:.5]", steps, EditRule::Old),
        owned(&[(5, "a"), (10, "b")])
    );
}

#[test]
fn schedules_of_random_texts_are_the_references() {
    for case in golden(include_str!("golden/prompt_schedule.json")) {
        let text = case["text"].as_str().expect("text");
        for (key, steps, rule) in [
            ("base", TEN, EditRule::Current),
            ("hires", TEN_HIRES, EditRule::Current),
            ("old", TEN, EditRule::Old),
        ] {
            let expected: Vec<(usize, String)> =
                serde_json::from_value(case[key].clone()).expect("segments");
            assert_eq!(schedule(text, steps, rule), expected, "{key}: {text:?}");
        }
    }
}

#[test]
fn ten_thousand_nested_brackets_take_no_time() {
    let deep = |open: &str, inside: &str, close: &str| {
        format!("{}{inside}{}", open.repeat(10_000), close.repeat(10_000))
    };
    let hostile = [
        deep("(", "a", ")"),
        deep("[", "a", "]"),
        deep("[a:", "b", ":3]"),
        deep("[a|", "b", "]"),
        deep("(a", "b", ":1.1)"),
        deep("([", "b", "])"),
        "[".repeat(10_000),
        "]|".repeat(10_000),
        "<lora:".repeat(10_000),
        "#\n".repeat(10_000),
        "AND BREAK ".repeat(10_000),
        "a:".repeat(10_000),
    ];
    for text in &hostile {
        let start = Instant::now();
        std::hint::black_box((
            schedule(text, TEN, EditRule::Current),
            parse_attention(text),
            split_and(text),
            extract_extra_networks(text),
            strip_comments(text),
        ));
        let taken = start.elapsed();
        assert!(taken < Duration::from_millis(500), "{text:.20}: {taken:?}");
    }
}

/// Text that is mostly grammar.
fn prompt_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        5 => proptest::sample::select(vec!["(", ")", "[", "]", ":", "|", "\\", "<", ">", "#", "\n", " ", ",", "AND", "BREAK", "1.5", "3", "lora:x", "&amp;", "<|endoftext|>"])
            .prop_map(str::to_string),
        3 => "\\PC{0,4}",
        1 => any::<char>().prop_map(String::from),
    ];
    proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// Writes fragments so that reading them gives them back.
fn print_fragments(fragments: &[(String, f32)]) -> String {
    let escape = |text: &str| {
        text.chars()
            .flat_map(|c| ["()[]\\".contains(c).then_some('\\'), Some(c)])
            .flatten()
            .collect::<String>()
    };
    let printed = fragments
        .iter()
        .map(|(text, weight)| format!("({}:{weight})", escape(text)));
    printed.collect::<Vec<_>>().concat()
}

proptest! {
    #[test]
    fn no_text_panics(text in prompt_text()) {
        let fragments = parse_attention(&text);
        prop_assert!(!fragments.is_empty());
        let segments = schedule(&text, TEN, EditRule::Current);
        prop_assert!(segments.windows(2).all(|pair| pair[0].0 < pair[1].0));
        prop_assert_eq!(segments.last().map(|segment| segment.0), Some(10));
        prop_assert!(!split_and(&text).is_empty());
        prop_assert!(!strip_comments(&text).contains('#'));
        prop_assert!(extract_extra_networks(&text).0.len() <= text.len());
    }

    #[test]
    fn printed_fragments_read_back(parts in proptest::collection::vec(("[a-z()\\[\\]\\\\ é]{1,8}", 1u8..40), 1..6)) {
        let mut fragments: Vec<(String, f32)> = Vec::new();
        for (text, weight) in parts {
            let weight = f32::from(weight) / 8.0;
            match fragments.last_mut() {
                Some((last, last_weight)) if last_weight.to_bits() == weight.to_bits() => last.push_str(&text),
                _ => fragments.push((text, weight)),
            }
        }
        prop_assert_eq!(parse_attention(&print_fragments(&fragments)), fragments);
    }

    #[test]
    fn text_without_grammar_is_left_alone(text in "[a-zA-Z0-9 ,.é日]{0,40}") {
        prop_assert_eq!(schedule(&text, TEN, EditRule::Current), vec![(10, text.clone())]);
        prop_assert_eq!(strip_comments(&text), text.clone());
        prop_assert_eq!(extract_extra_networks(&text), (text, Vec::new()));
    }
}

#[test]
fn any_unicode_gets_tokens() {
    let tokenizer = Tokenizer::new();
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    runner
        .run(&prompt_text(), |text| {
            for flavour in [Flavour::ClipL, Flavour::OpenClip] {
                prop_assert!(tokenizer.encode(&text, flavour).iter().all(|&id| id <= END));
            }
            let chunks = build_chunks(
                &parse_attention(&text),
                &tokenizer,
                &ChunkOptions::new(Tower::ClipL),
            );
            prop_assert!(
                chunks
                    .iter()
                    .all(|chunk| chunk.tokens[0] == START && chunk.tokens[76] == END)
            );
            Ok(())
        })
        .expect("property");
}
