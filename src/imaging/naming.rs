//! File and directory names: A1111's pattern language (`[seed]-[prompt_words]`, `[datetime<%H%M>]`) and its cleaning.
//!
//! A name made here never holds a path separator, a control character or a leading or trailing blank. Follows A1111's
//! `images.FilenameGenerator`.

use chrono::format::{Item, StrftimeItems};
use chrono::{DateTime, FixedOffset, Utc};
use sha2::{Digest, Sha256};

/// Longest part that comes from a prompt or a name, in characters.
const LONGEST_PART: usize = 128;
/// Words of `[prompt_words]` (`directories_max_prompt_words`).
const PROMPT_WORDS: usize = 8;
const DATETIME: &str = "%Y%m%d%H%M%S";

/// What the patterns may speak of. Absent things are empty or `None`.
#[derive(Debug, Clone, Default)]
pub struct NameContext<'a> {
    /// Seed of this picture.
    pub seed: u64,
    /// Seeds of the whole job.
    pub all_seeds: &'a [u64],
    /// Sampler steps.
    pub steps: usize,
    /// CFG scale, as the infotext prints it.
    pub cfg_scale: &'a str,
    /// Size of this picture.
    pub size: (u32, u32),
    /// Names of the styles applied.
    pub styles: &'a [&'a str],
    /// Sampler label.
    pub sampler: &'a str,
    /// Scheduler label.
    pub scheduler: &'a str,
    /// First 10 hex digits of the checkpoint's hash.
    pub model_hash: &'a str,
    /// Checkpoint name.
    pub model_name: &'a str,
    /// File name of the VAE.
    pub vae_filename: &'a str,
    /// When this picture is saved, in local time.
    pub time: DateTime<FixedOffset>,
    /// When the job began, `YYYYMMDDHHMMSS`.
    pub job_timestamp: &'a str,
    /// Prompt after styles.
    pub prompt: &'a str,
    /// Prompt before styles.
    pub prompt_no_styles: &'a str,
    /// Negative prompt after styles.
    pub negative_prompt: &'a str,
    /// Raw pixels, for `[image_hash]`.
    pub pixels: &'a [u8],
    /// Position in the batch, from 0.
    pub batch_index: usize,
    /// Pictures per batch.
    pub batch_size: usize,
    /// Batch, from 0.
    pub iteration: usize,
    /// Number of batches.
    pub batch_count: usize,
    /// Clip skip.
    pub clip_skip: usize,
    /// Denoising strength of img2img and hires jobs, as the infotext prints it.
    pub denoising: Option<&'a str>,
    /// Who asked for the job.
    pub user: Option<&'a str>,
    /// File name that an upload came with, without extension.
    pub basename: &'a str,
}

/// What a pattern turns into.
enum Replacement {
    Text(String),
    /// The pattern does not apply: it goes, and the literal text before it too.
    Vanish,
    /// No such pattern: it stays as it is written.
    Unknown,
}

/// Replaces the patterns of a file or directory name. The result may hold the separators that were typed in the pattern.
///
/// ```
/// use sdgen::imaging::naming::{NameContext, apply_pattern};
/// let context = NameContext { seed: 7, steps: 20, batch_size: 1, ..NameContext::default() };
/// assert_eq!(apply_pattern("[seed]-[batch_number] [steps] [x]", &context), "7 20 [x]");
/// ```
#[must_use]
pub fn apply_pattern(pattern: &str, context: &NameContext<'_>) -> String {
    let mut name = String::new();
    let mut rest = pattern;
    while let Some((literal, inside, after)) = next_pattern(rest) {
        rest = after;
        let (key, arguments) = split_arguments(inside);
        match replacement(&key.to_lowercase(), &arguments, context) {
            Replacement::Text(text) => name.extend([literal, &text]),
            Replacement::Vanish => {}
            Replacement::Unknown => name.extend([literal, "[", key, "]"]),
        }
    }
    name.push_str(rest);
    name
}

/// The first `[…]` without brackets inside: text before, inside, text after.
fn next_pattern(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    loop {
        let close = from + text[from..].find(']')?;
        match text[..close].rfind('[') {
            Some(open) if open >= from && open + 1 < close => {
                return Some((&text[..open], &text[open + 1..close], &text[close + 1..]));
            }
            _ => from = close + 1,
        }
    }
}

/// `datetime<%H><UTC>` as its name and arguments.
fn split_arguments(inside: &str) -> (&str, Vec<&str>) {
    let mut arguments = Vec::new();
    let mut key = inside;
    while let Some((name, argument)) = key
        .strip_suffix('>')
        .and_then(|text| text.rsplit_once('<'))
        .filter(|(_, argument)| !argument.contains('>'))
    {
        arguments.insert(0, argument);
        key = name;
    }
    (key, arguments)
}

fn replacement(key: &str, arguments: &[&str], context: &NameContext<'_>) -> Replacement {
    let single_batch = context.batch_size <= 1;
    let text = match key {
        "seed" => context.seed.to_string(),
        "seed_first" => context
            .all_seeds
            .first()
            .filter(|_| !single_batch)
            .unwrap_or(&context.seed)
            .to_string(),
        "seed_last" | "batch_number" if single_batch => return Replacement::Vanish,
        "seed_last" => context
            .all_seeds
            .last()
            .unwrap_or(&context.seed)
            .to_string(),
        "batch_number" => (context.batch_index + 1).to_string(),
        "generation_number" if single_batch && context.batch_count <= 1 => {
            return Replacement::Vanish;
        }
        "generation_number" => {
            (context.iteration * context.batch_size + context.batch_index + 1).to_string()
        }
        "denoising" => match context.denoising {
            Some(strength) => strength.to_string(),
            None => return Replacement::Vanish,
        },
        "steps" => context.steps.to_string(),
        "cfg" => context.cfg_scale.to_string(),
        "width" => context.size.0.to_string(),
        "height" => context.size.1.to_string(),
        "batch_size" => context.batch_size.to_string(),
        "clip_skip" => context.clip_skip.to_string(),
        "date" => context.time.format("%Y-%m-%d").to_string(),
        "datetime" => date_time(context.time, arguments),
        "job_timestamp" => context.job_timestamp.to_string(),
        "none" => String::new(),
        _ => {
            return named_text(key, arguments, context)
                .map_or(Replacement::Unknown, Replacement::Text);
        }
    };
    Replacement::Text(text)
}

/// Patterns whose text comes from a user or a file, cleaned.
fn named_text(key: &str, arguments: &[&str], context: &NameContext<'_>) -> Option<String> {
    Some(match key {
        "styles" => {
            let styles = context
                .styles
                .iter()
                .filter(|&&style| style != "None")
                .copied()
                .collect::<Vec<_>>()
                .join(", ");
            sanitize(if styles.is_empty() { "None" } else { &styles })
        }
        "sampler" => sanitize(context.sampler),
        "scheduler" => sanitize(context.scheduler),
        "sampler_scheduler" if context.scheduler.is_empty() || context.scheduler == "Automatic" => {
            sanitize(context.sampler)
        }
        "sampler_scheduler" => sanitize(&format!("{} {}", context.sampler, context.scheduler)),
        "model_hash" => sanitize(context.model_hash),
        "model_name" => sanitize(context.model_name),
        "vae_filename" => sanitize(if context.vae_filename.is_empty() {
            "NoneType"
        } else {
            context.vae_filename
        }),
        "prompt" => sanitize(&context.prompt.replace(' ', "_")),
        "prompt_spaces" => sanitize(context.prompt),
        "prompt_no_styles" => sanitize(context.prompt_no_styles),
        "prompt_words" => prompt_words(context.prompt),
        "prompt_hash" => hash(context.prompt.as_bytes(), arguments),
        "negative_prompt_hash" => hash(context.negative_prompt.as_bytes(), arguments),
        "full_prompt_hash" => hash(
            format!("{} {}", context.prompt, context.negative_prompt).as_bytes(),
            arguments,
        ),
        "image_hash" => hash(context.pixels, arguments),
        "hasprompt" => has_prompt(context.prompt, arguments),
        "user" => sanitize(context.user?),
        "basename" => sanitize(context.basename),
        _ => return None,
    })
}

/// The time in Python's `strftime` notation; a format or zone that cannot be used is ignored, as in A1111.
///
/// Zones are UTC or an offset such as `+02:00`: names of places would need a table of zones.
fn date_time(time: DateTime<FixedOffset>, arguments: &[&str]) -> String {
    let format = arguments.first().copied().filter(|format| {
        !format.is_empty() && StrftimeItems::new(format).all(|item| item != Item::Error)
    });
    let zone = arguments
        .get(1)
        .and_then(|zone| match zone.to_ascii_uppercase().as_str() {
            "UTC" | "GMT" => Some(time.with_timezone(&Utc).fixed_offset()),
            _ => zone
                .parse()
                .ok()
                .map(|offset: FixedOffset| time.with_timezone(&offset)),
        });
    sanitize(
        &zone
            .unwrap_or(time)
            .format(format.unwrap_or(DATETIME))
            .to_string(),
    )
}

fn prompt_words(prompt: &str) -> String {
    let words: Vec<&str> = prompt
        .split(|c: char| c.is_whitespace() || c.is_ascii_punctuation())
        .filter(|word| !word.is_empty())
        .take(PROMPT_WORDS)
        .collect();
    sanitize(&if words.is_empty() {
        "empty".to_string()
    } else {
        words.join(" ")
    })
}

/// The first digits of the SHA-256 of `data`: 8, or as many as the argument says.
fn hash(data: &[u8], arguments: &[&str]) -> String {
    let length = arguments
        .first()
        .and_then(|length| length.parse().ok())
        .filter(|&length| length > 0)
        .unwrap_or(8);
    Sha256::digest(data)
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .take(length)
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

/// For each `word|otherwise`: the word if the prompt has it, else the other text.
fn has_prompt(prompt: &str, arguments: &[&str]) -> String {
    let prompt = prompt.to_lowercase();
    let chosen = arguments
        .iter()
        .filter(|argument| !argument.is_empty())
        .map(|argument| {
            let (word, otherwise) = argument.split_once('|').unwrap_or((argument, ""));
            let word = word.to_lowercase();
            let otherwise = otherwise.split('|').next().unwrap_or_default();
            if prompt.contains(&word) {
                word
            } else {
                otherwise.to_string()
            }
        });
    sanitize(&chosen.collect::<String>())
}

/// Makes a text fit for one part of a file name: what some file system forbids becomes `_`; at most 128 characters; no blank
/// at its start, no blank or dot at its end.
#[must_use]
pub fn sanitize(text: &str) -> String {
    let allowed: String = text
        .chars()
        .map(|c| {
            if c.is_control() || "#<>:\"/\\|?*".contains(c) {
                '_'
            } else {
                c
            }
        })
        .skip_while(|&c| c == ' ')
        .take(LONGEST_PART)
        .collect();
    allowed.trim_end_matches([' ', '.']).to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn context() -> NameContext<'static> {
        NameContext {
            seed: 42,
            all_seeds: &[42, 43],
            steps: 20,
            cfg_scale: "7.0",
            size: (512, 768),
            sampler: "DPM++ 2M",
            scheduler: "Karras",
            model_name: "sd/xl",
            time: DateTime::parse_from_rfc3339("2024-03-09T23:30:05-02:00").unwrap(),
            job_timestamp: "20240309233000",
            prompt: "a Cat, <lora:x:1> on a mat. It sleeps all day long",
            batch_size: 1,
            batch_count: 1,
            ..NameContext::default()
        }
    }

    #[test]
    fn patterns_are_replaced() {
        // Hashes: python3 -c "import hashlib; print(hashlib.sha256(prompt.encode()).hexdigest())"
        for (pattern, name) in [
            ("[seed]", "42"),
            ("[SEED]-[steps]-[cfg]-[width]x[height]", "42-20-7.0-512x768"),
            ("[date]/[sampler_scheduler]", "2024-03-09/DPM++ 2M Karras"),
            ("[datetime]", "20240309233005"),
            ("[datetime<%H-%M><UTC>]", "01-30"),
            ("[datetime<%H><+01:00>]", "02"),
            ("[datetime<%Q><Mars>]", "20240309233005"),
            ("[model_name][styles][none]", "sd_xlNone"),
            ("[prompt_words]", "a Cat lora x 1 on a mat"),
            (
                "[prompt]",
                "a_Cat,__lora_x_1__on_a_mat._It_sleeps_all_day_long",
            ),
            ("[hasprompt<cat|no><dog|nodog><bird>]", "catnodog"),
            ("[prompt_hash]-[prompt_hash<4>]", "4c9e54c7-4c9e"),
            ("x[batch_number]y[denoising]z[seed_last]", ""),
            (
                "x[nothing<a>]y[user] [[seed] []",
                "x[nothing]y[user] [42 []",
            ),
            ("no pattern", "no pattern"),
        ] {
            assert_eq!(apply_pattern(pattern, &context()), name, "{pattern}");
        }
        let batch = NameContext {
            batch_size: 2,
            batch_index: 1,
            iteration: 3,
            denoising: Some("0.5"),
            ..context()
        };
        assert_eq!(
            apply_pattern(
                "[seed_first] [seed_last]-[batch_number]-[generation_number]-[denoising]",
                &batch
            ),
            "42 43-2-8-0.5"
        );
    }

    #[test]
    fn cleaned_parts_are_safe() {
        assert_eq!(sanitize("  ../a:b\n\tc\0 . ."), ".._a_b__c_");
        assert_eq!(sanitize(&"é".repeat(200)).chars().count(), 128);
        assert_eq!(sanitize("..."), "");
    }
}
