//! The prompts of a request as the engine gets them: with its styles, and with the LoRA that an option adds to every prompt.

use super::App;
use super::options::Options;
use super::styles;
use super::types::Generation;
use crate::prompt::styles::Style;
use crate::prompt::{apply_styles, extract_extra_networks};

/// What is put into the prompts of a request.
#[derive(Debug)]
pub struct Additions {
    styles: Vec<Style>,
    /// A tag that follows every positive prompt, or nothing.
    tag: String,
}

impl Additions {
    /// The styles a request names, unknown ones ignored as in A1111; and the LoRA of option `sd_lora`, unless the prompt has it.
    #[must_use]
    pub fn of(app: &App, request: &Generation, options: &Options) -> Self {
        let wanted = request.styles.as_deref().unwrap_or_default();
        let known = if wanted.is_empty() {
            Vec::new()
        } else {
            styles::load(&app.config)
        };
        let chosen = wanted
            .iter()
            .filter_map(|name| known.iter().find(|style| style.name == *name))
            .cloned()
            .collect();
        let mut additions = Self {
            styles: chosen,
            tag: String::new(),
        };
        let name = options.text("sd_lora");
        let has_it = || {
            let (_, tags) = extract_extra_networks(&additions.positive(&request.prompt));
            tags.iter()
                .any(|tag| tag.positional.first().is_some_and(|named| named == name))
        };
        let loras = app.engine.catalog().networks();
        if !matches!(name, "" | "None")
            && loras.loras().iter().any(|lora| lora.name == name)
            && !has_it()
        {
            let multiplier = crate::imaging::infotext::python_float(
                options.float("extra_networks_default_multiplier"),
            );
            additions.tag = format!("<lora:{name}:{multiplier}>");
        }
        additions
    }

    /// A positive prompt with them.
    #[must_use]
    pub fn positive(&self, prompt: &str) -> String {
        let texts: Vec<&str> = self
            .styles
            .iter()
            .map(|style| style.prompt.as_str())
            .collect();
        apply_styles(prompt, &texts) + &self.tag
    }

    /// A negative prompt with them.
    #[must_use]
    pub fn negative(&self, prompt: &str) -> String {
        let texts = self
            .styles
            .iter()
            .map(|style| style.negative_prompt.as_str());
        apply_styles(prompt, &texts.collect::<Vec<_>>())
    }
}
