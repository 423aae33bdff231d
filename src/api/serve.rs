//! The server's life: bind, load, serve, end.
//!
//! The caller binds and owns the token that ends it. At the end, in order: no new connections and no new jobs at once; queued
//! jobs are answered 503; the running job gets the grace time, then is interrupted and answers with what it has; open answers
//! are sent; the process leaves.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;

use super::error::with_causes;
use super::{App, blocking, connections, internals, job_runner, router};

/// How long clients may take to read their last answer once the engine has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another program listens there.
    #[error("port in use: `{0}`; stop the other program or choose another port with `--port`")]
    InUse(String),
    /// The address is not usable.
    #[error("cannot listen on `{address}`: {source}")]
    Other {
        /// Host and port.
        address: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Opens the listener.
///
/// # Errors
/// [`BindError`] with the address.
pub async fn bind(host: &str, port: u16) -> Result<TcpListener, BindError> {
    let address = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    TcpListener::bind(&address)
        .await
        .map_err(|source| match source.kind() {
            std::io::ErrorKind::AddrInUse => BindError::InUse(address),
            _ => BindError::Other { address, source },
        })
}

/// Serves until `app.shutdown` is cancelled, then ends gracefully.
///
/// # Errors
/// The listener failed.
pub async fn run(listener: TcpListener, app: Arc<App>) -> std::io::Result<()> {
    let begun = Instant::now();
    let address: SocketAddr = listener.local_addr()?;
    tracing::info!("listening on http://{address}");
    if app.config.model.load_at_start {
        tokio::spawn(load_at_start(app.clone()));
    }
    let (resumed, runtime) = (app.clone(), tokio::runtime::Handle::current());
    let resume = blocking(move || job_runner::resume(&resumed, &runtime));
    if let Err(error) = resume.await {
        tracing::error!(
            error = error.message(),
            "jobs of the last run are lost from sight"
        );
    }
    let stopping = app.shutdown.clone();
    internals::note_start(begun);
    let keep_alive = Duration::from_secs(app.config.server.keep_alive_s);
    let server = connections::serve(listener, router(&app), keep_alive, stopping);
    let server = tokio::spawn(server);
    app.shutdown.cancelled().await;
    let grace = Duration::from_secs(app.config.server.shutdown_grace_s);
    app.engine.shut_down(grace).await;
    // Files of jobs whose clients have left are written before the process goes.
    app.tasks.close();
    app.tasks.wait().await;
    if let Ok(ended) = tokio::time::timeout(LAST_ANSWERS, server).await {
        ended?;
    } else {
        tracing::warn!("a client did not read its answer in time");
    }
    tracing::info!("stopped");
    Ok(())
}

async fn load_at_start(app: Arc<App>) {
    // `/readyz` shows the reason too; another checkpoint can still be chosen.
    if let Err(error) = app.load(app.options.snapshot()).await {
        let error = with_causes(&error);
        tracing::error!(
            error,
            "started without a checkpoint; choose another with POST /sdapi/v1/options"
        );
    }
}
