//! What happens to every request around its handler, outermost first: timing and log, CORS, panics, authentication, HEAD,
//! gzip.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Extensions, HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower_http::CompressionLevel;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{Predicate, SizeAbove};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};
use tracing::Instrument;

use super::error::ApiError;
use super::{App, auth};
use crate::telemetry::metrics;

/// Bodies below this many bytes are not worth compressing.
const COMPRESS_FROM: u64 = 1000;

/// Marks an answer that gzip would only slow down: base64 of compressed pictures.
#[derive(Debug, Clone, Copy)]
pub struct Incompressible;

/// Puts all layers around the routes.
pub fn wrap(routes: Router, app: &Arc<App>) -> Router {
    let worth = SizeAbove::new(COMPRESS_FROM).and(is_compressible);
    let gzip = CompressionLayer::new()
        .quality(CompressionLevel::Fastest)
        .compress_when(worth);
    routes
        .layer(gzip)
        .layer(from_fn(head_only_where_useful))
        .layer(from_fn_with_state(auth::Guard::new(app), auth::require))
        .layer(CatchPanicLayer::custom(crashed))
        .layer(cors(app))
        .layer(from_fn_with_state(app.clone(), time))
}

fn is_compressible(_: StatusCode, _: Version, _: &HeaderMap, extensions: &Extensions) -> bool {
    extensions.get::<Incompressible>().is_none()
}

/// `X-Process-Time` on every answer, a span and, if asked for, a log line.
async fn time(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    static REQUESTS: AtomicU64 = AtomicU64::new(1);
    let id = REQUESTS.fetch_add(1, Ordering::Relaxed);
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let span = tracing::info_span!("request", id);
    let started = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let took = started.elapsed();
    let seconds = took.as_secs_f64();
    let value = format!("{seconds:.4}");
    if let Ok(value) = HeaderValue::from_str(&value) {
        response.headers_mut().insert("x-process-time", value);
    }
    let status = response.status().as_u16();
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    metrics::http_answered(method.as_str(), route, status, took);
    span.in_scope(|| {
        if app.config.server.access_log {
            tracing::info!(%method, path, status, seconds, "request");
        } else {
            tracing::debug!(%method, path, status, seconds, "request");
        }
    });
    response
}

/// `FastAPI` answers HEAD only where a route says so; probes use `/` and the health routes.
async fn head_only_where_useful(request: Request, next: Next) -> Response {
    let allowed = matches!(
        request.uri().path(),
        "/" | "/healthz" | "/readyz" | "/internal/ping"
    );
    if request.method() != Method::HEAD || allowed {
        return next.run(request).await;
    }
    let mut answer = next.run(request).await;
    if answer.status().is_success() {
        answer = ApiError::MethodNotAllowed.into_response();
        answer
            .headers_mut()
            .insert(header::ALLOW, HeaderValue::from_static("GET"));
    }
    answer
}

/// Any method and header, credentials allowed, as A1111; no origin unless configured.
fn cors(app: &App) -> CorsLayer {
    let server = &app.config.server;
    let origins = server.cors_allow_origins.clone();
    // `Config::validate` has compiled the pattern before.
    let pattern = server.cors_allow_origins_regex.as_ref();
    let pattern = pattern.and_then(|pattern| regex::Regex::new(&format!("^(?:{pattern})$")).ok());
    let allow = move |origin: &HeaderValue, _: &_| {
        let Ok(origin) = origin.to_str() else {
            return false;
        };
        origins
            .iter()
            .any(|allowed| allowed == "*" || allowed == origin)
            || pattern
                .as_ref()
                .is_some_and(|pattern| pattern.is_match(origin))
    };
    CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(allow))
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .allow_credentials(true)
}

fn crashed(_: Box<dyn Any + Send + 'static>) -> Response {
    // The panic's own message is on stderr already.
    tracing::error!("a request handler panicked");
    ApiError::failure("RuntimeError", "the request crashed; see the server's log").into_response()
}
