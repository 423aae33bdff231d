//! The `parameters` text: what A1111 writes is read and printed back unchanged.
//!
//! `tests/golden/infotext.txt` holds 30 texts in A1111's form, written for this test; `infotext_fields.json` what Python reads in them.

use proptest::prelude::*;
use sdgen::imaging::infotext::{Completion, Params, Value, build, parse, quote, unquote};

#[test]
fn texts_print_back_unchanged() {
    let texts: Vec<&str> = include_str!("golden/infotext.txt")
        .trim_end()
        .split("\n====\n")
        .collect();
    assert_eq!(texts.len(), 30);
    for text in texts {
        let parsed = parse(text);
        assert!(parsed.params.len() >= 5, "{text}");
        assert_eq!(
            build(&parsed.prompt, &parsed.negative_prompt, &parsed.params),
            text
        );
    }
}

#[test]
fn texts_say_what_python_reads() {
    let texts = include_str!("golden/infotext.txt").trim_end();
    let golden: Vec<serde_json::Value> =
        serde_json::from_str(include_str!("golden/infotext_fields.json")).expect("golden file");
    let texts: Vec<&str> = texts.split("\n====\n").collect();
    assert_eq!(texts.len(), golden.len());
    for (text, want) in texts.into_iter().zip(golden) {
        let parsed = parse(text);
        assert_eq!(parsed.prompt, want["prompt"], "{text}");
        assert_eq!(parsed.negative_prompt, want["negative"], "{text}");
        let pairs: Vec<serde_json::Value> = parsed
            .params
            .iter()
            .map(|(key, value)| serde_json::json!([key, value.to_string()]))
            .collect();
        assert_eq!(serde_json::Value::Array(pairs), want["pairs"], "{text}");
    }
}

#[test]
fn the_parts_are_what_they_say() {
    let parsed = parse(
        "line one,\nline two\nNegative prompt: bad\nworse\nSteps: 8, Sampler: LCM, Hires prompt: \"a, \\\"b\\\": c\\nd\", Size: 512x768,Seed: 7",
    );
    assert_eq!(
        (parsed.prompt.as_str(), parsed.negative_prompt.as_str()),
        ("line one,\nline two", "bad\nworse")
    );
    let values: Vec<_> = parsed
        .params
        .iter()
        .map(|(key, value)| (key, value.to_string()))
        .collect();
    let expected = [
        ("Steps", "8"),
        ("Sampler", "LCM"),
        ("Hires prompt", "a, \"b\": c\nd"),
        ("Size", "512x768"),
        ("Seed", "7"),
    ];
    assert_eq!(
        values,
        expected.map(|(key, value)| (key, value.to_string()))
    );
    let fields = parsed.fields(Completion {
        weighted_prompt: false,
        back_compatible: true,
    });
    assert_eq!(fields.get("Size-2"), Some(&Value::from("768")));
    assert!(fields.get("Size").is_none());
}

#[test]
fn a_text_of_this_program_is_a1111s() {
    let mut params = Params::new();
    params.insert("Steps", 20);
    params.insert("Sampler", "DPM++ 2M");
    params.insert("Schedule type", "Karras");
    params.insert("CFG scale", 7.0f32);
    params.insert("Seed", 1u64);
    params.insert("Size", "1024x1024");
    params.insert("Tiling", true);
    params.insert("TI hashes", "a: 1234, b: 5678");
    params.insert("Hires prompt", "first\nsecond");
    params.insert("CFG scale", 7);
    let line = "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 1024x1024, Tiling: True, \
                TI hashes: \"a: 1234, b: 5678\", Hires prompt: \"first\\nsecond\"";
    assert_eq!(build("a cat", "", &params), format!("a cat\n{line}"));
    assert_eq!(
        build("", "bad", &params),
        format!("Negative prompt: bad\n{line}")
    );
    assert_eq!(build("", "", &Params::new()), "");
}

#[test]
fn what_is_no_parameter_line_is_prompt() {
    assert_eq!(
        parse("a\nSteps: 20, Seed: 1").prompt,
        "a\nSteps: 20, Seed: 1"
    );
    assert_eq!(
        parse("a\r\nNegative prompt: b\r\nSteps: 1, Seed: 2, Size: 8x8").negative_prompt,
        "b"
    );
    let one_line = parse("Steps: 1, Seed: 2, Size: 8x8");
    assert_eq!((one_line.prompt.as_str(), one_line.params.len()), ("", 3));
    let empty_value = parse("Steps: 1, Model: , Seed: 2, Size: 8x8");
    assert!(empty_value.params.get("Model").is_none() && empty_value.params.get("Seed").is_some());
}

proptest! {
    #[test]
    fn any_text_is_read(text in "(\\PC|\n|\"|,|:|\\\\){0,80}") {
        let _ = parse(&text);
    }

    #[test]
    fn quoting_is_undone(text in "(\\PC|\n|\t|\"|,|:|\\\\){1,40}") {
        // Text in quotes of its own is not quoted again, so it does not come back: A1111 loses it too.
        prop_assume!(!text.starts_with('"'));
        prop_assert_eq!(unquote(&quote(&text)), text);
    }

    #[test]
    fn what_is_built_is_read(
        prompt in "[a-zA-Z(\\[,.:é日][a-zA-Z0-9 ,.:()\\[\\]é日]{0,30}",
        negative in "([a-z(][a-z0-9 ,.:()]{0,20}[a-z)])?",
        values in proptest::collection::vec("[a-zA-Z0-9é日][a-zA-Z0-9 ,.:\\\\\"\n日-]{0,12}[a-z]", 3..8),
    ) {
        let params: Params = values.iter().enumerate().map(|(index, value)| (format!("Key {index}"), value.as_str())).collect();
        let parsed = parse(&build(&prompt, &negative, &params));
        prop_assert_eq!(parsed.prompt.as_str(), prompt.trim());
        prop_assert_eq!(parsed.negative_prompt, negative);
        prop_assert_eq!(parsed.params, params);
    }
}
