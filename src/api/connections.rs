//! Connections: how many, how long they may idle, and how they end.
//!
//! Invariants: a client holds one of a bounded number of places while it is connected, so memory and file descriptors are
//! bounded; when no place is free, the connection that has idled longest gives up its own, so idle ones keep nobody out; one that
//! does not send a whole request head in time (or nothing more after an answer) is ended; at the end, requests under way are
//! answered and idle connections closed.

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
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::idle::{Idle, Occupant};

/// Bytes of a request's head.
const HEAD_BYTES: usize = 256 << 10;
/// Connections at once, if the process may open so many files.
const MOST_CONNECTIONS: usize = 8192;
/// Files that are kept for other things than connections.
const OTHER_FILES: usize = 128;
/// After an error that is the machine's and not a client's.
const REST: Duration = Duration::from_millis(200);

/// Serves until `stopping` is cancelled, then until the last request is answered. `keep_alive` is how long a connection may idle
/// and a request's head may take.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    keep_alive: Duration,
    stopping: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(most_connections()));
    let idle = Arc::new(Idle::default());
    let graceful = GracefulShutdown::new();
    loop {
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
        // Where all are at work, who comes next waits in the machine's own line.
        let place = tokio::select! {
            place = place(&places, &idle) => place,
            () = stopping.cancelled() => break,
        };
        let occupant = idle.enter();
        let left = occupant.left();
        let connection = connection(stream, address, router.clone(), keep_alive, occupant);
        let watched = graceful.watch(connection);
        tokio::spawn(async move {
            tokio::select! {
                ended = watched => if let Err(error) = ended {
                    tracing::debug!(%address, %error, "connection ended");
                },
                () = left.cancelled() => tracing::debug!(%address, "idle connection gave up its place"),
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// A free place, that of the longest idle connection if there is no other.
async fn place(places: &Arc<Semaphore>, idle: &Idle) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Some(place);
    }
    idle.send_away();
    // The semaphore is never closed.
    places.clone().acquire_owned().await.ok()
}

/// One client's requests, one after another.
fn connection(
    stream: TcpStream,
    address: SocketAddr,
    router: Router,
    keep_alive: Duration,
    occupant: Occupant,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> {
    // Answers are written whole; waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let answer = move |request: hyper::Request<Incoming>| {
        let (router, at_work) = (router.clone(), occupant.at_work());
        async move {
            let mut request: Request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(address));
            let Ok(response) = router.oneshot(request).await;
            Ok::<_, Infallible>(response.map(|body| at_work.until_sent(body)))
        }
    };
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(keep_alive)
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

/// As many as the process may open files, less a reserve. Takes all files that the machine allows.
fn most_connections() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    // Where that is refused, the limit before stands.
    let files = setrlimit(Resource::Nofile, raised).map_or(limit.current, |()| limit.maximum);
    places(files)
}

/// Places for connections where `files` may be open; `None` = any number.
fn places(files: Option<u64>) -> usize {
    files.map_or(MOST_CONNECTIONS, |files| {
        (files as usize)
            .saturating_sub(OTHER_FILES)
            .clamp(OTHER_FILES / 2, MOST_CONNECTIONS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_leave_files_for_other_things() {
        assert_eq!(places(Some(1024)), 1024 - OTHER_FILES);
        assert_eq!(places(Some(1_048_576)), MOST_CONNECTIONS);
        assert_eq!(places(Some(64)), OTHER_FILES / 2);
        assert_eq!(places(None), MOST_CONNECTIONS);
    }
}
