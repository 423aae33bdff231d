//! SIGTERM and SIGINT become a cancelled token; a second signal ends the process at once.
//!
//! Whoever holds the token decides what graceful means. The forced end uses the shell's convention, 128 + signal number.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a process ended by SIGINT.
pub const INTERRUPTED: i32 = 130;
/// Exit code of a process ended by SIGTERM.
const TERMINATED: i32 = 143;

/// Starts to listen for signals and returns the token that the first one cancels. Needs a tokio runtime.
///
/// # Errors
/// The operating system refused the handler.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let token = CancellationToken::new();
    let first = token.clone();
    tokio::spawn(async move {
        let code = next(&mut interrupt, &mut terminate).await;
        tracing::info!(
            signal = code - 128,
            "shutting down; a second signal ends the process at once"
        );
        first.cancel();
        let code = next(&mut interrupt, &mut terminate).await;
        std::process::exit(code);
    });
    Ok(token)
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal) -> i32 {
    tokio::select! {
        _ = interrupt.recv() => INTERRUPTED,
        _ = terminate.recv() => TERMINATED,
    }
}
