//! Waiting for a job of this process, with its progress on a bar.

use std::convert::Infallible;

use indicatif::ProgressBar;
use tokio_util::sync::CancellationToken;

use crate::engine::{self, JobHandle, JobState};

/// Shows progress until the job ends; a signal interrupts it at its next step.
///
/// # Errors
/// Whatever the job failed with.
pub async fn follow<T>(
    handle: &mut JobHandle<T>,
    bar: &ProgressBar,
    stop: &CancellationToken,
) -> Result<T, engine::Error> {
    let mut progress = handle.progress.clone();
    let cancel = handle.cancel.clone();
    let show = async {
        while progress.changed().await.is_ok() {
            if let JobState::Running(at) = *progress.borrow_and_update() {
                bar.set_message(if at.step == at.steps {
                    "decoding"
                } else {
                    "sampling"
                });
                bar.set_length((at.batches * at.steps) as u64);
                bar.set_position((at.batch * at.steps + at.step) as u64);
            }
        }
        std::future::pending::<Infallible>().await
    };
    let interrupt = async {
        stop.cancelled().await;
        cancel.interrupt();
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        result = handle.finished() => result,
        never = show => match never {},
        never = interrupt => match never {},
    }
}
