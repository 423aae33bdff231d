//! The scripts of `script_name`: their arguments, and what they make of a request.
//!
//! "Prompts from file or textbox" becomes one job of many, each line checked as a request of its own; loopback and SD upscale
//! become a script of the pipeline. Arguments that are missing or null have A1111's defaults. Follows `scripts/*.py` of A1111 1.10.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::App;
use super::error::ApiError;
use super::fields::{self, Kind};
use super::options::Options;
use super::resolve::Prepared;
use super::scripts::Page;
use super::types::{Generation, text};
use super::upscalers::Upscalers;
use crate::config::Limits;
use crate::engine::limits::resolve_seed;
use crate::pipeline::{Curve, GenerateRequest, Loopback, PictureUpscaler, Script, SdUpscale};

/// Longest side of an enlarged picture, pixels.
const LONGEST_SIDE: u32 = 16_384;
/// Pieces that SD upscale may cut a picture into.
const MOST_PIECES: usize = 4096;

/// A selectable script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selectable {
    /// "Prompts from file or textbox".
    Prompts,
    /// "Loopback".
    Loopback,
    /// "SD upscale".
    SdUpscale,
}

impl Selectable {
    /// Every script.
    pub const ALL: [Self; 3] = [Self::Prompts, Self::Loopback, Self::SdUpscale];

    /// A1111's title in lower case, as its lists have it.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Prompts => "prompts from file or textbox",
            Self::Loopback => "loopback",
            Self::SdUpscale => "sd upscale",
        }
    }

    /// Whether a page has it.
    #[must_use]
    pub fn is_on(self, page: Page) -> bool {
        self == Self::Prompts || page == Page::Img2img
    }

    /// The script that a request names; "" and `None` are none.
    ///
    /// # Errors
    /// 422 in A1111's words for a name that the page does not have.
    pub fn of(name: Option<&str>, page: Page) -> Result<Option<Self>, ApiError> {
        let Some(name) = name.filter(|name| !matches!(*name, "" | "None")) else {
            return Ok(None);
        };
        let lower = name.to_lowercase();
        let found = Self::ALL
            .into_iter()
            .find(|script| script.title() == lower && script.is_on(page));
        let unknown = || unprocessable(format!("Script '{name}' not found"));
        found.map(Some).ok_or_else(unknown)
    }
}

/// The arguments of a script, by place.
struct Arguments<'a> {
    script: Selectable,
    values: &'a [Value],
}

impl<'a> Arguments<'a> {
    fn of(script: Selectable, request: &'a Generation) -> Self {
        let values = &request.script_args;
        Self { script, values }
    }

    fn value(&self, index: usize) -> Option<&'a Value> {
        self.values.get(index).filter(|value| !value.is_null())
    }

    fn read(&self, index: usize, kind: Kind) -> Result<Option<Value>, ApiError> {
        let Some(value) = self.value(index) else {
            return Ok(None);
        };
        fields::coerce("script_args", kind, value.clone())
            .map(Some)
            .map_err(|problems| {
                let why = problems.first().map_or("", |problem| problem.msg.as_str());
                self.wrong(index, why)
            })
    }

    fn number(&self, index: usize, default: f64, range: [f64; 2]) -> Result<f64, ApiError> {
        let value = self.read(index, Kind::Float)?;
        let number = value.and_then(|value| value.as_f64()).unwrap_or(default);
        if (range[0]..=range[1]).contains(&number) {
            return Ok(number);
        }
        let [least, most] = range;
        Err(self.wrong(
            index,
            &format!("must be between {least} and {most}: `{number}`"),
        ))
    }

    fn flag(&self, index: usize) -> Result<bool, ApiError> {
        Ok(self.read(index, Kind::Bool)? == Some(Value::Bool(true)))
    }

    fn text(&self, index: usize, default: &str) -> Result<String, ApiError> {
        let value = self.read(index, Kind::Text)?;
        let text = value.and_then(|value| value.as_str().map(str::to_string));
        Ok(text.unwrap_or_else(|| default.to_string()))
    }

    fn wrong(&self, index: usize, why: &str) -> ApiError {
        unprocessable(format!(
            "script `{}`: argument {index} {why}",
            self.script.title()
        ))
    }
}

/// Loopback or SD upscale on a picture of `size` pixels, if the request names one of them.
///
/// # Errors
/// 422 for arguments, 400 for an unknown upscaler, a mask with SD upscale or a result that is too large.
pub fn of_picture(
    app: &App,
    request: &Generation,
    options: &Options,
    generate: &GenerateRequest,
) -> Result<Option<Script>, ApiError> {
    match Selectable::of(request.script_name.as_deref(), Page::Img2img)? {
        Some(Selectable::Loopback) => loopback(request, &app.config.limits).map(Some),
        Some(Selectable::SdUpscale) => {
            let upscalers = Upscalers::new(app.engine.catalog().upscalers(), options);
            let names = app.engine.catalog().upscalers().names();
            let script = sd_upscale(request, &names, |name| upscalers.picture(name))?;
            check_enlarged(&script, generate, &app.config.limits)?;
            Ok(Some(Script::SdUpscale(script)))
        }
        Some(Selectable::Prompts) | None => Ok(None),
    }
}

/// `[loops, final denoising strength, curve, interrogation]`.
fn loopback(request: &Generation, limits: &Limits) -> Result<Script, ApiError> {
    let args = Arguments::of(Selectable::Loopback, request);
    let most = limits.max_batch_count as f64;
    let loops = args.number(0, 4.0, [1.0, most])? as usize;
    if loops * request.n_iter.max(1) as usize > limits.max_batch_count {
        let why = format!(
            "times `n_iter` is more than {most} runs (setting `limits.max_batch_count`): `{loops}`"
        );
        return Err(args.wrong(0, &why));
    }
    let curve = args.text(2, Curve::Linear.label())?;
    let unknown = || {
        let valid = Curve::ALL.map(|curve| format!("`{}`", curve.label()));
        args.wrong(
            2,
            &format!("must be one of {}: `{curve}`", valid.join(", ")),
        )
    };
    let curve = Curve::find(&curve).ok_or_else(unknown)?;
    let interrogation = args.text(3, "None")?;
    if !matches!(interrogation.as_str(), "" | "None") {
        return Err(ApiError::not_supported(
            "loopback with interrogated prompts (argument 3)",
        ));
    }
    Ok(Script::Loopback(Loopback {
        loops,
        final_strength: args.number(1, 0.5, [0.0, 1.0])?,
        curve,
    }))
}

/// `[text, overlap, upscaler by name or number, factor]`.
fn sd_upscale(
    request: &Generation,
    names: &[String],
    find: impl Fn(&str) -> Result<PictureUpscaler, String>,
) -> Result<SdUpscale, ApiError> {
    let args = Arguments::of(Selectable::SdUpscale, request);
    let overlap = args.number(1, 64.0, [0.0, f64::from(LONGEST_SIDE)])? as u32;
    let name = match args.value(2) {
        Some(Value::Number(number)) => {
            let index = number
                .as_u64()
                .and_then(|index| usize::try_from(index).ok());
            let name = index.and_then(|index| names.get(index));
            let why = || {
                format!(
                    "must be below {}, the upscalers there are: `{number}`",
                    names.len()
                )
            };
            name.cloned().ok_or_else(|| args.wrong(2, &why()))?
        }
        _ => args.text(2, PictureUpscaler::None.label())?,
    };
    Ok(SdUpscale {
        upscaler: find(&name).map_err(ApiError::bad_request)?,
        factor: args.number(3, 2.0, [0.1, 64.0])?,
        overlap,
    })
}

fn check_enlarged(
    script: &SdUpscale,
    generate: &GenerateRequest,
    limits: &Limits,
) -> Result<(), ApiError> {
    let Some(init) = &generate.init_image else {
        return Ok(());
    };
    if init.mask.is_some() {
        return Err(ApiError::bad_request(
            "SD upscale paints the whole picture; send it without `mask`",
        ));
    }
    let size = init
        .pictures
        .first()
        .map_or((0, 0), image::ImageBuffer::dimensions);
    let (width, height) = script.enlarged(size);
    let most = limits.max_megapixels as u64 * 1_000_000;
    let area = u64::from(width) * u64::from(height) * generate.batch_count as u64;
    if width.max(height) > LONGEST_SIDE || area > most {
        return Err(unprocessable(format!(
            "SD upscale makes {width}x{height} pixels times `n_iter`; a side may have {LONGEST_SIDE} pixels and all results {} megapixels (setting `limits.max_megapixels`)",
            limits.max_megapixels
        )));
    }
    let pieces = script
        .pieces(size, (generate.width as u32, generate.height as u32))
        .map_err(|error| unprocessable(error.to_string()))?;
    if pieces > MOST_PIECES {
        return Err(unprocessable(format!(
            "SD upscale would cut the picture into {pieces} pieces, more than {MOST_PIECES}; use a smaller overlap or a larger `width` and `height`"
        )));
    }
    Ok(())
}

/// A route's resolving.
pub type Resolve = fn(&App, Map<String, Value>) -> Result<Prepared, ApiError>;

/// "Prompts from file or textbox", `[iterate seed, one seed for all, start or end, text]`: a job for each line of the text.
///
/// # Errors
/// 422 for arguments, and whatever a line's own request fails with.
pub fn prompts(
    app: &App,
    wire: Map<String, Value>,
    request: &Generation,
    resolve: Resolve,
) -> Result<Prepared, ApiError> {
    let args = Arguments::of(Selectable::Prompts, request);
    let (iterates, shares) = (args.flag(0)?, args.flag(1)?);
    let at_end = match args.text(2, "start")?.as_str() {
        "start" => false,
        "end" => true,
        other => return Err(args.wrong(2, &format!("must be `start` or `end`: `{other}`"))),
    };
    let lines = args.text(3, "")?;
    let lines: Vec<&str> = lines
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    let most = app.config.limits.max_batch_count;
    if lines.is_empty() || lines.len() > most {
        let why = format!(
            "must have between 1 and {most} lines (setting `limits.max_batch_count`): {}",
            lines.len()
        );
        return Err(args.wrong(3, &why));
    }
    let mut plain = wire.clone();
    plain.insert("script_name".into(), Value::Null);
    plain.insert("script_args".into(), json!([]));
    if iterates || shares {
        plain.insert("seed".into(), json!(resolve_seed(request.seed)));
    }
    let mut whole = resolve(app, plain.clone())?;
    let per_line = request.batch_size.saturating_mul(request.n_iter);
    let mut jobs: Vec<GenerateRequest> = Vec::with_capacity(lines.len());
    let mut batches = 0;
    for line in lines {
        let mut job = resolve(app, merged(&plain, line, at_end))?.job.request;
        share_pictures(&mut job, &whole.job.request);
        batches += job.batch_count;
        check_lines(&args, &job, jobs.len() + 1, batches, &app.config.limits)?;
        jobs.push(job);
        if iterates {
            let seed = plain.get("seed").and_then(Value::as_i64).unwrap_or(0);
            plain.insert("seed".into(), json!(seed.saturating_add(per_line)));
        }
    }
    whole.job.request.batch_count = batches;
    whole.job.request.script = Some(Script::Jobs(Arc::new(jobs)));
    whole.wire = wire;
    Ok(whole)
}

/// All lines together are one job: it has a job's limits.
fn check_lines(
    args: &Arguments<'_>,
    job: &GenerateRequest,
    lines: usize,
    batches: usize,
    limits: &Limits,
) -> Result<(), ApiError> {
    if batches > limits.max_batch_count {
        let most = limits.max_batch_count;
        let why = format!("makes more than {most} batches (setting `limits.max_batch_count`)");
        return Err(args.wrong(3, &why));
    }
    // Each line has a mask of its own.
    let mask = job.init_image.as_ref().and_then(|init| init.mask.as_ref());
    let pixels = mask.map_or(0, |mask| {
        u64::from(mask.mask.width()) * u64::from(mask.mask.height())
    });
    if pixels * lines as u64 > limits.max_megapixels as u64 * 4_000_000 {
        return Err(args.wrong(3, "has too many lines for a mask of this size"));
    }
    Ok(())
}

/// Lines that start from the same pictures hold them once.
fn share_pictures(job: &mut GenerateRequest, whole: &GenerateRequest) {
    if let (Some(one), Some(shared)) = (&mut job.init_image, &whole.init_image)
        && one.pictures == shared.pictures
    {
        one.pictures = shared.pictures.clone();
    }
}

/// The request of one line.
fn merged(plain: &Map<String, Value>, line: &str, at_end: bool) -> Map<String, Value> {
    let mut wire = plain.clone();
    for (name, value) in line_fields(line) {
        let sent = text(plain, name).unwrap_or_default();
        let value = match (name, &value) {
            ("prompt" | "negative_prompt", Value::String(own))
                if !own.is_empty() && !sent.is_empty() =>
            {
                let (first, second) = if at_end {
                    (sent, own.as_str())
                } else {
                    (own.as_str(), sent)
                };
                json!(format!("{first} {second}"))
            }
            _ => value,
        };
        wire.insert(name.into(), value);
    }
    wire
}

/// The fields that a line sets. One with `--` is read as flags; if that fails the whole line is a prompt, as in A1111.
fn line_fields(line: &str) -> Vec<(&'static str, Value)> {
    let prompt = || vec![("prompt", json!(line))];
    if !line.contains("--") {
        return prompt();
    }
    let words = shlex::split(line);
    words.and_then(|words| flags(&words)).unwrap_or_else(prompt)
}

/// Flags that A1111 reads and that mean nothing here: where files go is the server's choice.
const WITHOUT_EFFECT: [&str; 6] = [
    "outpath_samples",
    "outpath_grids",
    "prompt_for_display",
    "sampler_index",
    "do_not_save_samples",
    "do_not_save_grid",
];

const TYPED: [(&str, Kind); 14] = [
    ("styles", Kind::Texts),
    ("seed", Kind::Int),
    ("subseed", Kind::Int),
    ("subseed_strength", Kind::Float),
    ("seed_resize_from_h", Kind::Int),
    ("seed_resize_from_w", Kind::Int),
    ("sampler_name", Kind::Text),
    ("batch_size", Kind::Int),
    ("n_iter", Kind::Int),
    ("steps", Kind::Int),
    ("cfg_scale", Kind::Float),
    ("width", Kind::Int),
    ("height", Kind::Int),
    ("tiling", Kind::Bool),
];

/// `--name value …`; a prompt takes all words up to the next flag. `None` for anything else.
fn flags(words: &[String]) -> Option<Vec<(&'static str, Value)>> {
    let mut fields = Vec::new();
    let mut rest = words.iter().peekable();
    while let Some(flag) = rest.next() {
        let name = flag.strip_prefix("--")?;
        let first = rest.next()?.clone();
        if let Some(name) = ["prompt", "negative_prompt"]
            .into_iter()
            .find(|n| *n == name)
        {
            let mut text = first;
            while let Some(word) = rest.next_if(|word| !word.starts_with("--")) {
                text = format!("{text} {word}");
            }
            fields.push((name, json!(text)));
            continue;
        }
        if name == "restore_faces" || WITHOUT_EFFECT.contains(&name) {
            continue;
        }
        let (name, kind) = TYPED.into_iter().find(|(known, _)| *known == name)?;
        let value = match kind {
            Kind::Texts => json!([first]),
            Kind::Bool => json!(first == "true"),
            kind => fields::coerce(name, kind, json!(first)).ok()?,
        };
        fields.push((name, value));
    }
    Some(fields)
}

fn unprocessable(message: String) -> ApiError {
    ApiError::Http(StatusCode::UNPROCESSABLE_ENTITY, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_prompts_or_flags() {
        assert_eq!(line_fields("a cat"), [("prompt", json!("a cat"))]);
        let flags = r#"--prompt "a red" cat --steps 3 --seed 5 --tiling true --outpath_samples ../../x --cfg_scale 2.5"#;
        let expected = [
            ("prompt", json!("a red cat")),
            ("steps", json!(3)),
            ("seed", json!(5)),
            ("tiling", json!(true)),
            ("cfg_scale", json!(2.5)),
        ];
        assert_eq!(line_fields(flags), expected);
        for broken in [
            "cat --steps 3",
            "--steps many",
            "--frob 1",
            "--steps",
            "--prompt \"a",
        ] {
            assert_eq!(line_fields(broken), [("prompt", json!(broken))], "{broken}");
        }
    }

    #[test]
    fn a_lines_prompt_stands_before_or_after_the_requests() {
        let Value::Object(plain) = json!({ "prompt": "oil", "negative_prompt": "" }) else {
            return;
        };
        assert_eq!(merged(&plain, "cat", false)["prompt"], "cat oil");
        assert_eq!(merged(&plain, "cat", true)["prompt"], "oil cat");
        let negative = merged(&plain, "--negative_prompt dog", false);
        assert_eq!(
            (&negative["prompt"], &negative["negative_prompt"]),
            (&json!("oil"), &json!("dog"))
        );
    }

    #[test]
    fn names_are_found_in_any_letter_case_on_their_page() {
        let find = |name, page| Selectable::of(Some(name), page).ok().flatten();
        assert_eq!(
            find("SD upscale", Page::Img2img),
            Some(Selectable::SdUpscale)
        );
        assert_eq!(find("SD upscale", Page::Txt2img), None);
        assert!(Selectable::of(Some("x/y/z plot"), Page::Txt2img).is_err());
    }
}
