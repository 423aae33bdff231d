//! Where a file of the Hugging Face hub is, and what the hub says of it. The one place that speaks to the hub.

use crate::config::env;

/// A file of the hub.
#[derive(Debug)]
pub struct HubFile {
    /// Where its bytes are.
    pub url: String,
    /// What is sent along for files that need it.
    pub token: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Hex, of large files; small ones carry git's SHA-1 instead.
    pub sha256: Option<String>,
}

/// Asks the hub for `file` of `repo`, `owner/name`. Blocks on the network.
///
/// # Errors
/// The hub does not answer or has no such file.
pub fn locate(repo: &str, file: &str) -> Result<HubFile, hf_hub::api::sync::ApiError> {
    let token = std::env::var(env::HF_TOKEN)
        .ok()
        .filter(|token| !token.is_empty());
    let mut builder = hf_hub::api::sync::ApiBuilder::from_env().with_progress(false);
    if token.is_some() {
        builder = builder.with_token(token.clone());
    }
    let api = builder.build()?;
    let url = api.model(repo.to_string()).url(file);
    let metadata = api.metadata(&url)?;
    let etag = Some(metadata.etag().to_string());
    Ok(HubFile {
        url,
        token,
        size: metadata.size() as u64,
        sha256: etag.filter(|etag| is_sha256(etag)),
    })
}

/// Whether a text is a SHA-256 in hex.
#[must_use]
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
