//! The texts of a job: as they are shown, and as they are encoded.

use super::request::GenerateRequest;
use crate::prompt::{ExtraNetwork, extract_extra_networks, strip_comments};

/// Prompts without comments; the `plain` ones also without `<name:…>` tags, which only positive prompts have.
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
    pub(super) networks: Vec<ExtraNetwork>,
}

impl Texts {
    pub(super) fn new(request: &GenerateRequest) -> Self {
        let (prompt, negative) = (
            strip_comments(&request.prompt),
            strip_comments(&request.negative_prompt),
        );
        let (plain, networks) = extract_extra_networks(&prompt);
        let hires = |text: Option<&String>| {
            text.filter(|text| !text.is_empty())
                .map(|text| strip_comments(text))
        };
        let hires_prompt = hires(request.hires.as_ref().map(|hires| &hires.prompt));
        let hires_negative = hires(request.hires.as_ref().map(|hires| &hires.negative_prompt));
        Self {
            hires_plain: hires_prompt
                .map_or_else(|| plain.clone(), |text| extract_extra_networks(&text).0),
            hires_negative: hires_negative.unwrap_or_else(|| negative.clone()),
            prompt,
            negative,
            plain,
            networks,
        }
    }

    /// Remarks for the user.
    pub(super) fn comments(&self) -> Vec<String> {
        let ignored = |network: &ExtraNetwork| {
            format!("`<{}:…>` tags are not supported yet: ignored", network.kind)
        };
        self.networks.iter().map(ignored).collect()
    }
}
