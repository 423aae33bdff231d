//! Names in an infotext that mean something on this machine: styles found in its prompts, and LoRAs that have another name here.
//!
//! Follows `extract_styles_from_prompt` and the LoRA extension's `infotext_pasted` of A1111 1.10.

use crate::engine::networks::LoraEntry;
use crate::imaging::infotext::{self as text, Parsed};
use crate::prompt::styles::{Style, extract_styles};

/// What a text can refer to.
pub(super) struct Known<'a> {
    pub(super) styles: Vec<Style>,
    pub(super) loras: Vec<LoraEntry>,
    /// Whether LoRAs are called by their files (`lora_preferred_name`).
    pub(super) names_by_file: bool,
    /// The short hash of a LoRA, as infotext has it, if it is known.
    pub(super) hash_of: &'a dyn Fn(&LoraEntry) -> Option<String>,
}

/// Takes styles out of the prompts and names those that are to be used. Nothing is taken if the second pass's prompts have others.
pub(super) fn take_styles(parsed: &mut Parsed, mode: &str, known: &[Style]) -> Option<Vec<String>> {
    if mode == "Ignore" {
        return None;
    }
    let (prompt, negative, found) = extract_styles(&parsed.prompt, &parsed.negative_prompt, known);
    let keys = ["Hires prompt", "Hires negative prompt"];
    let version = parsed.params.get("Version").map(ToString::to_string);
    if keys.iter().any(|key| parsed.params.get(key).is_some())
        && text::is_after(version.as_deref(), [1, 8, 0], 139)
    {
        let or = |key: &str, first: &str| match parsed.params.get(key) {
            Some(text) => text.to_string(),
            None => first.to_string(),
        };
        let hires = (
            or(keys[0], &parsed.prompt),
            or(keys[1], &parsed.negative_prompt),
        );
        let (hires, hires_negative, others) = extract_styles(&hires.0, &hires.1, known);
        if others != found {
            return None;
        }
        for (key, text, first) in [
            (keys[0], hires, &prompt),
            (keys[1], hires_negative, &negative),
        ] {
            let text = if text == *first { String::new() } else { text };
            parsed.params.insert(key, text);
        }
    }
    (parsed.prompt, parsed.negative_prompt) = (prompt, negative);
    let used = mode == "Apply" || mode == "Apply if any" && !found.is_empty();
    used.then_some(found)
}

/// Tags of LoRAs that are here under another name get that name.
pub(super) fn rename_loras(prompt: &str, hashes: &str, known: &Known<'_>) -> String {
    let hash_of = |alias: &str| {
        let mut pairs = hashes.split(',').filter_map(|pair| pair.split_once(':'));
        pairs
            .find(|(name, _)| name.trim() == alias)
            .map(|(_, hash)| hash.trim().to_string())
    };
    let mut out = String::with_capacity(prompt.len());
    let mut rest = prompt;
    while let Some(at) = rest.find("<lora:") {
        let (before, tag) = rest.split_at(at + "<lora:".len());
        out.push_str(before);
        rest = tag;
        let Some((alias, _)) = tag.split_once(':') else {
            continue;
        };
        let Some(wanted) = hash_of(alias).filter(|hash| !hash.is_empty()) else {
            continue;
        };
        let has_it = |lora: &&LoraEntry| (known.hash_of)(lora).as_ref() == Some(&wanted);
        let found = known.loras.iter().find(has_it);
        if let Some(lora) = found {
            out.push_str(preferred_name(lora, known));
            rest = &tag[alias.len()..];
        }
    }
    out + rest
}

/// The name A1111 gives a LoRA in prompts: its alias, unless others have it or an option asks for the file's name.
fn preferred_name<'a>(lora: &'a LoraEntry, known: &Known<'_>) -> &'a str {
    let shared = known.loras.iter().filter(|other| other.alias == lora.alias);
    let by_file =
        known.names_by_file || shared.count() > 1 || lora.alias.eq_ignore_ascii_case("none");
    if by_file { &lora.name } else { &lora.alias }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imaging::infotext::parse;

    fn ink() -> Vec<Style> {
        vec![Style {
            name: "Ink".into(),
            prompt: "{prompt}, ink".into(),
            negative_prompt: String::new(),
        }]
    }

    #[test]
    fn the_second_pass_must_have_the_same_styles() {
        let text = |hires: &str| {
            format!("a cat, ink\nSteps: 1, Sampler: Euler, Seed: 1, Hires prompt: \"{hires}\"")
        };
        let mut same = parse(&text("a dog, ink"));
        assert_eq!(
            take_styles(&mut same, "Apply", &ink()),
            Some(vec!["Ink".to_string()])
        );
        let hires = same.params.get("Hires prompt").map(ToString::to_string);
        assert_eq!(
            (same.prompt.as_str(), hires.as_deref()),
            ("a cat", Some("a dog"))
        );
        let mut other = parse(&text("a dog, oil"));
        assert_eq!(take_styles(&mut other, "Apply", &ink()), None);
        assert_eq!(other.prompt, "a cat, ink");
    }
}
