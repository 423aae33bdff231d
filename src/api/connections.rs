//! Connections: how many, how long their heads may take, and how they end.
//!
//! Invariants: a client holds one of a bounded number of places while it is connected, so memory and file descriptors are
//! bounded; one that does not send a whole request head within `HEAD_TIME` (or sends nothing more after an answer) loses its
//! place; at the end, requests under way are answered and idle connections closed.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// How long a request's head may take, and how long a connection may idle: A1111's keep-alive.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// Bytes of a request's head.
const HEAD_BYTES: usize = 256 << 10;
/// Connections at once, if the process may open so many files.
const MOST_CONNECTIONS: usize = 8192;
/// Files that are kept for other things than connections.
const OTHER_FILES: usize = 128;
/// After an error that is the machine's and not a client's.
const REST: Duration = Duration::from_millis(200);

/// Serves until `stopping` is cancelled, then until the last request is answered.
pub async fn serve(listener: TcpListener, router: Router, stopping: CancellationToken) {
    let places = Arc::new(Semaphore::new(most_connections()));
    let graceful = GracefulShutdown::new();
    loop {
        // A place first: whoever has none waits in the machine's own line.
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place,
            () = stopping.cancelled() => break,
        };
        let Ok(place) = place else { break };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopping.cancelled() => break,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_clients(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let connection = connection(stream, address, router.clone());
        let watched = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = watched.await {
                tracing::debug!(%address, %error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// One client's requests, one after another.
fn connection(
    stream: TcpStream,
    address: SocketAddr,
    router: Router,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> {
    // Answers are written whole; waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let answer = move |request: hyper::Request<Incoming>| {
        let router = router.clone();
        async move {
            let mut request: Request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(address));
            let Ok(response) = router.oneshot(request).await;
            Ok::<_, Infallible>(response)
        }
    };
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service_fn(answer))
}

/// Whether a connection failed before it was one.
fn is_clients(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// As many as the process may open files, less a reserve.
fn most_connections() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    places(&limits)
}

/// Places for connections by the text of `/proc/self/limits`.
fn places(limits: &str) -> usize {
    let files = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    files.map_or(MOST_CONNECTIONS, |files| {
        files
            .saturating_sub(OTHER_FILES)
            .clamp(OTHER_FILES / 2, MOST_CONNECTIONS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_leave_files_for_other_things() {
        let limits =
            |soft: &str| format!("Limit x\nMax open files            {soft}   4096   files\n");
        assert_eq!(places(&limits("1024")), 1024 - OTHER_FILES);
        assert_eq!(places(&limits("1048576")), MOST_CONNECTIONS);
        assert_eq!(places(&limits("64")), OTHER_FILES / 2);
        assert_eq!(places(&limits("unlimited")), MOST_CONNECTIONS);
    }
}
