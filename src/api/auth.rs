//! Who may come in: HTTP Basic pairs and bearer tokens, before everything but health checks.
//!
//! Both sides of a comparison are hashed first, so that neither length nor content shows in its time. Without configured
//! credentials any `Authorization` header is ignored, however malformed: clients send such. Failures are counted by
//! [`Throttle`]. Who came in is left in the request as [`User`].

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::client::User;
use super::error::ApiError;
use super::throttle::{Throttle, Verdict};
use super::{App, openai};
use crate::config::{Secret, Server};

/// Paths that answer without credentials.
const OPEN: &[&str] = &["/healthz", "/readyz", "/internal/ping"];

/// What a request has shown.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    /// `user:password`.
    Pair(Vec<u8>),
    /// A token.
    Token(Vec<u8>),
}

/// The layer's state.
#[derive(Clone)]
pub struct Guard {
    app: Arc<App>,
    failures: Arc<Throttle>,
}

impl Guard {
    /// A guard that has seen nobody yet.
    #[must_use]
    pub fn new(app: &Arc<App>) -> Self {
        Self {
            app: app.clone(),
            failures: Arc::new(Throttle::default()),
        }
    }
}

/// Lets a request through if it carries one of the configured pairs or tokens.
pub async fn require(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let server = &guard.app.config.server;
    let path = below_prefix(request.uri().path(), server.subpath.as_deref());
    let needs_none = server.api_auth.is_empty() && server.api_tokens.is_empty();
    if needs_none || OPEN.contains(&path) || openai::is_picture_link(path) {
        return next.run(request).await;
    }
    let refuse = |error: ApiError| refused(error, path, server);
    let sent = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(shown);
    let Some(sent) = sent else {
        return refuse(ApiError::Unauthorized("Not authenticated"));
    };
    let address = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let address = address.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |info| info.0.ip());
    let digest = sent.digest();
    let now = Instant::now();
    if let Verdict::Wait(seconds) = guard.failures.before(address, &digest, now) {
        return refuse(too_many(seconds));
    }
    if let Some(user) = find(&sent, server) {
        guard.failures.succeeded(address, &digest);
        request.extensions_mut().insert(User(user));
        return next.run(request).await;
    }
    match guard.failures.failed(address, now) {
        Verdict::Wait(seconds) => refuse(too_many(seconds)),
        Verdict::Check => refuse(ApiError::Unauthorized("Incorrect username or password")),
    }
}

/// The path as the routes know it.
fn below_prefix<'a>(path: &'a str, prefix: Option<&str>) -> &'a str {
    let prefix = prefix.map_or("", |prefix| prefix.trim_matches('/'));
    if prefix.is_empty() {
        return path;
    }
    let inner = path.strip_prefix('/').and_then(|p| p.strip_prefix(prefix));
    inner.filter(|path| path.starts_with('/')).unwrap_or(path)
}

fn too_many(seconds: u64) -> ApiError {
    ApiError::TooMany {
        message: "too many wrong credentials from this address".into(),
        retry_after: seconds,
    }
}

/// A refusal in the form its path's clients read, naming what would be taken.
fn refused(error: ApiError, path: &str, server: &Server) -> Response {
    let is_unauthorized = matches!(error, ApiError::Unauthorized(_));
    let mut response = if openai::is_route(path) {
        openai::Failure::from(error).into_response()
    } else {
        error.into_response()
    };
    let headers = response.headers_mut();
    headers.remove(header::WWW_AUTHENTICATE);
    let ways = [
        ("Basic realm=\"sdgen\"", !server.api_auth.is_empty()),
        ("Bearer realm=\"sdgen\"", !server.api_tokens.is_empty()),
    ];
    for (way, _) in ways
        .iter()
        .filter(|(_, is_open)| *is_open && is_unauthorized)
    {
        headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static(way));
    }
    response
}

/// The credentials of a header.
fn shown(header: &str) -> Option<Shown> {
    let (scheme, value) = header.split_once(' ')?;
    let value = value.trim();
    match scheme.to_ascii_lowercase().as_str() {
        "basic" => STANDARD.decode(value).ok().map(Shown::Pair),
        "bearer" => Some(Shown::Token(value.into())),
        _ => None,
    }
}

impl Shown {
    fn digest(&self) -> [u8; 32] {
        match self {
            Self::Pair(bytes) | Self::Token(bytes) => Sha256::digest(bytes).into(),
        }
    }
}

/// The name behind what was shown: the user's, or `token N`.
fn find(sent: &Shown, server: &Server) -> Option<String> {
    match sent {
        Shown::Pair(pair) => {
            place(pair, &server.api_auth)?;
            let user = pair.split(|byte| *byte == b':').next().unwrap_or_default();
            Some(String::from_utf8_lossy(user).into_owned())
        }
        // Some clients can only send pairs and some only tokens; each is looked up among its own kind.
        Shown::Token(token) => {
            place(token, &server.api_tokens).map(|index| format!("token {}", index + 1))
        }
    }
}

/// Compares with every secret, whether or not one has matched; the last match's place.
fn place(sent: &[u8], secrets: &[Secret]) -> Option<usize> {
    let sent = Sha256::digest(sent);
    let mut found = None;
    for (index, secret) in secrets.iter().enumerate() {
        let wanted = Sha256::digest(secret.expose().as_bytes());
        let pairs = sent.iter().zip(wanted.iter());
        let difference = pairs.fold(0u8, |all, (a, b)| all | (a ^ b));
        if difference == 0 {
            found = Some(index);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_secrets_are_known() {
        let pairs = [Secret::new("a:b"), Secret::new("user:pass:word")];
        assert_eq!(place(b"a:b", &pairs), Some(0));
        assert_eq!(place(b"user:pass:word", &pairs), Some(1));
        for wrong in [&b"a:"[..], b"", b"a:b\0"] {
            assert_eq!(place(wrong, &pairs), None);
        }
        assert_eq!(place(b"", &[]), None);
    }

    #[test]
    fn pairs_and_tokens_are_not_mixed_up() {
        let server = Server {
            api_auth: vec![Secret::new("ann:secret")],
            api_tokens: vec![Secret::new("t0ken")],
            ..Server::default()
        };
        let name = |header| find(&shown(header)?, &server);
        assert_eq!(name("Basic YW5uOnNlY3JldA==").as_deref(), Some("ann"));
        assert_eq!(name("bearer t0ken").as_deref(), Some("token 1"));
        assert_eq!(name("Bearer ann:secret"), None);
        assert_eq!(name("Basic dDBrZW4="), None);
    }

    #[test]
    fn headers_of_no_known_scheme_are_none() {
        assert_eq!(shown("Basic YTpi"), Some(Shown::Pair(b"a:b".to_vec())));
        assert_eq!(shown("basic YTpi"), Some(Shown::Pair(b"a:b".to_vec())));
        for junk in ["", "Basic", "Basic !!", "Digest YTpi"] {
            assert_eq!(shown(junk), None, "{junk}");
        }
    }

    #[test]
    fn health_below_the_prefix_is_health() {
        assert_eq!(below_prefix("/sd/healthz", Some("/sd/")), "/healthz");
        assert_eq!(below_prefix("/sdx/healthz", Some("sd")), "/sdx/healthz");
        assert_eq!(below_prefix("/healthz", None), "/healthz");
    }
}
