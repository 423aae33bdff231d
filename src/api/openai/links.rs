//! Pictures that are answered as an address: stored for an hour under names that cannot be guessed.
//!
//! A name is 128 random bits, so whoever has the address may read the picture without credentials, as with `OpenAI`. Files lie
//! in `outputs/openai`; one that is older than [`LIFETIME`] is answered 404, and removed when the next is stored.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{OriginalUri, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};

use super::Failure;
use crate::api::error::{ApiError, with_causes};
use crate::api::extract::Path;
use crate::api::middleware::Incompressible;
use crate::api::{App, blocking};
use crate::imaging::{self, Encoded, Format, SaveRequest};

/// What the address of a picture begins with.
pub const PATH: &str = "/v1/images/files/";
/// Time for which an address is good.
pub const LIFETIME: Duration = Duration::from_hours(1);

const FORMATS: [Format; 3] = [Format::Png, Format::Jpeg, Format::WebP];

/// Whether this is the name of a stored picture.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let Some((stem, extension)) = name.split_once('.') else {
        return false;
    };
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    stem.len() == 32 && stem.bytes().all(is_digit) && format_of(extension).is_some()
}

fn format_of(extension: &str) -> Option<Format> {
    let mut formats = FORMATS.into_iter();
    formats.find(|format| format.extension() == extension)
}

fn directory(app: &App) -> PathBuf {
    app.config.data_dir.join("outputs/openai")
}

/// Stores a picture and returns its name. Blocks on the disk.
///
/// # Errors
/// The file cannot be written.
pub fn store(app: &App, file: &Encoded) -> Result<String, ApiError> {
    let directory = directory(app);
    remove_old(&directory);
    let stem = format!("{:032x}", rand::random::<u128>());
    imaging::save(&SaveRequest {
        root: &directory,
        subdirectory: "",
        basename: "",
        stem: &stem,
        numbered: false,
        extension: file.format.extension(),
        bytes: &file.bytes,
        sidecar: None,
    })
    .map_err(|error| ApiError::failure("OSError", with_causes(&error)))?;
    Ok(format!("{stem}.{}", file.format.extension()))
}

fn is_old(path: &FilePath) -> bool {
    let modified = std::fs::metadata(path).and_then(|data| data.modified());
    modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LIFETIME))
}

fn remove_old(directory: &FilePath) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(is_name);
        if is_ours && is_old(&entry.path()) {
            // Another request may have removed it at the same moment.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The address of a name, below what the client has called the server.
#[must_use]
pub fn address(headers: &HeaderMap, uri: &Uri, name: &str) -> String {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text("host").or_else(|| uri.host()).unwrap_or("localhost");
    let scheme = match text("x-forwarded-proto") {
        Some("https") => "https",
        _ => "http",
    };
    let prefix = uri
        .path()
        .split_once("/v1/")
        .map_or("", |(prefix, _)| prefix);
    format!("{scheme}://{host}{prefix}{PATH}{name}")
}

/// The parts of a request that an address is made of.
#[derive(Debug, Clone)]
pub struct Caller(pub HeaderMap, pub Uri);

impl Caller {
    /// The address of a name.
    #[must_use]
    pub fn address(&self, name: &str) -> String {
        address(&self.0, &self.1, name)
    }
}

impl<S: Sync> axum::extract::FromRequestParts<S> for Caller {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(
        parts: &mut axum::http::request::Parts,
        _: &S,
    ) -> Result<Self, Self::Rejection> {
        let original = parts.extensions.get::<OriginalUri>();
        let uri = original.map_or(&parts.uri, |original| &original.0).clone();
        Ok(Self(parts.headers.clone(), uri))
    }
}

/// `GET /v1/images/files/{name}`.
///
/// # Errors
/// 404 for a name that there is not or that has expired.
pub async fn picture(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, Failure> {
    let missing = || ApiError::Http(StatusCode::NOT_FOUND, "no such picture, or no more".into());
    let format = name.split_once('.').and_then(|(_, end)| format_of(end));
    let Some(format) = format.filter(|_| is_name(&name)) else {
        return Err(missing().into());
    };
    let bytes = blocking(move || {
        let path = directory(&app).join(name);
        if is_old(&path) {
            return Err(missing());
        }
        std::fs::read(path).map_err(|_| missing())
    });
    let headers = [
        (header::CONTENT_TYPE, format.mime()),
        (header::CACHE_CONTROL, "private, max-age=3600"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    let mut response = (headers, bytes.await?).into_response();
    response.extensions_mut().insert(Incompressible);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_below_the_clients_name_of_the_server() {
        let mut headers = HeaderMap::new();
        headers.insert("host", "example.com:81".parse().unwrap());
        let uri: Uri = "/sd/v1/images/edits".parse().unwrap();
        let address = |headers: &HeaderMap| address(headers, &uri, "a.png");
        assert_eq!(
            address(&headers),
            "http://example.com:81/sd/v1/images/files/a.png"
        );
        headers.insert("x-forwarded-proto", "https".parse().unwrap());
        assert!(address(&headers).starts_with("https://example.com:81/"));
    }

    #[test]
    fn old_pictures_go_and_other_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, "x").unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            let then = std::time::SystemTime::now() - LIFETIME - Duration::from_secs(1);
            file.set_modified(then).unwrap();
            path
        };
        let old = write("0123456789abcdef0123456789abcdef.png");
        let other = write("keep.png");
        remove_old(directory.path());
        assert!(!old.exists() && other.exists());
    }
}
