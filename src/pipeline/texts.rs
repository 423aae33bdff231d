//! The texts of a job: as they are shown, and as they are encoded.

use std::collections::BTreeSet;

use super::Error;
use super::networks::{Networks, is_lora};
use super::request::GenerateRequest;
use crate::prompt::{ExtraNetwork, extract_extra_networks, strip_comments};

/// Prompts without comments, if these are stripped; the `plain` ones also without `<name:…>` tags, which only positive prompts have.
pub(super) struct Texts {
    /// The infotext's prompt.
    pub(super) prompt: String,
    /// The infotext's negative prompt, encoded as it is.
    pub(super) negative: String,
    /// What is encoded.
    pub(super) plain: String,
    /// What the hires pass encodes.
    pub(super) hires_plain: String,
    /// The hires pass's negative prompt.
    pub(super) hires_negative: String,
    /// What the prompt asks for besides text.
    networks: Vec<ExtraNetwork>,
    /// What the hires pass's prompt asks for; it has all the tags of its own, or all the prompt's.
    hires_networks: Vec<ExtraNetwork>,
}

impl Texts {
    pub(super) fn new(request: &GenerateRequest) -> Self {
        let shown = |text: &str| {
            if request.settings.strip_comments {
                strip_comments(text)
            } else {
                text.to_string()
            }
        };
        let (prompt, negative) = (shown(&request.prompt), shown(&request.negative_prompt));
        let (plain, networks) = extract_extra_networks(&prompt);
        let hires =
            |text: Option<&String>| text.filter(|text| !text.is_empty()).map(|text| shown(text));
        let hires_prompt = hires(request.hires.as_ref().map(|hires| &hires.prompt));
        let hires_negative = hires(request.hires.as_ref().map(|hires| &hires.negative_prompt));
        let (hires_plain, hires_networks) = hires_prompt.map_or_else(
            || (plain.clone(), networks.clone()),
            |text| extract_extra_networks(&text),
        );
        Self {
            hires_plain,
            hires_negative: hires_negative.unwrap_or_else(|| negative.clone()),
            prompt,
            negative,
            plain,
            networks,
            hires_networks,
        }
    }

    /// The networks of both passes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a tag whose strength is no number.
    pub(super) fn networks(&self, request: &GenerateRequest) -> Result<[Networks; 2], Error> {
        let Some(known) = &request.loras else {
            return Ok(Default::default());
        };
        let resolve =
            |tags: &[ExtraNetwork]| Networks::resolve(tags, |name| known.get(name).cloned());
        Ok([resolve(&self.networks)?, resolve(&self.hires_networks)?])
    }
}

impl GenerateRequest {
    /// Checks the strengths in the tags of the prompts.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the tag.
    pub fn check_networks(&self) -> Result<(), Error> {
        Texts::new(self).networks(self).map(drop)
    }

    /// Names of the LoRAs that the prompts ask for.
    #[must_use]
    pub fn lora_names(&self) -> BTreeSet<String> {
        let texts = Texts::new(self);
        let tags = texts.networks.into_iter().chain(texts.hires_networks);
        tags.filter(is_lora)
            .filter_map(|tag| tag.positional.into_iter().next())
            .collect()
    }
}
