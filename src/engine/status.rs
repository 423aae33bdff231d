//! What the engine is doing: the state behind every progress answer, and the token that stops a job.
//!
//! One value, published through a `watch`: readers never wait for a job or a load.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use crate::pipeline::{Control, Progress};

/// Finished task ids that are remembered.
const REMEMBERED: usize = 16;

/// Tells a running job to stop. Asked between steps.
#[derive(Debug, Default)]
pub struct CancelToken(AtomicU8);

const SKIP: u8 = 1;
const INTERRUPT: u8 = 2;

impl CancelToken {
    /// Ends the job at its next step.
    pub fn interrupt(&self) {
        self.0.store(INTERRUPT, Ordering::Release);
    }

    /// Ends the present batch at its next step. Does not weaken an interrupt.
    pub fn skip(&self) {
        let _ = self
            .0
            .compare_exchange(0, SKIP, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether the job is to end.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.0.load(Ordering::Acquire) == INTERRUPT
    }

    /// What the job should do; a skip is reported once, since it concerns one batch.
    #[must_use]
    pub fn take(&self) -> Control {
        match self
            .0
            .compare_exchange(SKIP, 0, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => Control::Skip,
            Err(INTERRUPT) => Control::Interrupt,
            Err(_) => Control::Continue,
        }
    }
}

/// The job on the device.
#[derive(Debug, Clone)]
pub struct Running {
    /// Task id.
    pub id: String,
    /// `txt2img`, ….
    pub kind: &'static str,
    /// When its work began.
    pub started: Instant,
    /// Stops it.
    pub cancel: Arc<CancelToken>,
}

/// A loaded checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedModel {
    /// `xl/name.safetensors [31e35c80fc]`.
    pub title: String,
    /// File stem, the infotext's `Model`.
    pub name: String,
    /// SHA-256 of the file, hex; empty while unknown.
    pub sha256: String,
    /// File name of a separate VAE.
    pub vae_name: Option<String>,
    /// First 10 hex digits of its SHA-256.
    pub vae_hash: Option<String>,
    /// Width and height in pixels of a request without a size.
    pub native_size: (usize, usize),
}

impl LoadedModel {
    /// First 10 hex digits of the SHA-256; empty while unknown.
    #[must_use]
    pub fn shorthash(&self) -> &str {
        self.sha256.get(..10).unwrap_or_default()
    }
}

/// State of the engine; the latest value wins.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// The job on the device; `None` = idle.
    pub running: Option<Running>,
    /// Title of the checkpoint being loaded.
    pub loading: Option<String>,
    /// The checkpoint on the device.
    pub loaded: Option<LoadedModel>,
    /// Where the running job stands; keeps its last value after the end.
    pub progress: Progress,
    /// Local start time of the last job, `YYYYMMDDHHMMSS`; empty before the first.
    pub job_timestamp: String,
    /// The last job was told to skip a batch.
    pub skipped: bool,
    /// The last job was told to end.
    pub interrupted: bool,
    /// Task ids that ended lately, oldest first.
    pub finished: VecDeque<String>,
    /// The device thread has ended.
    pub stopped: bool,
}

impl Status {
    /// A job begins; flags of the job before do not touch it.
    pub(super) fn begin(&mut self, running: Running, batches: usize, steps: usize) {
        self.running = Some(running);
        self.progress = Progress {
            step: 0,
            steps,
            batch: 0,
            batches,
        };
        self.job_timestamp = chrono::Local::now().format("%Y%m%d%H%M%S").to_string();
        self.skipped = false;
        self.interrupted = false;
    }

    /// The running job has ended.
    pub(super) fn end(&mut self) {
        if let Some(running) = self.running.take() {
            self.finished.push_back(running.id);
            if self.finished.len() > REMEMBERED {
                self.finished.pop_front();
            }
        }
    }

    /// Part of the running job that is done, 0 to 1; 0 when idle.
    #[must_use]
    pub fn fraction(&self) -> f64 {
        if self.running.is_none() {
            return 0.0;
        }
        let batches = self.progress.batches.max(1) as f64;
        let step = self.progress.step as f64 / self.progress.steps.max(1) as f64;
        (0.01 + (self.progress.batch as f64 + step) / batches).min(1.0)
    }

    /// Seconds left of the running job, by the pace so far; 0 when idle.
    #[must_use]
    pub fn eta_seconds(&self) -> f64 {
        let Some(running) = &self.running else {
            return 0.0;
        };
        let elapsed = running.started.elapsed().as_secs_f64();
        let fraction = self.fraction();
        if fraction > 0.0 {
            elapsed / fraction - elapsed
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_is_reported_once_and_an_interrupt_for_good() {
        let token = CancelToken::default();
        assert_eq!(token.take(), Control::Continue);
        token.skip();
        assert_eq!(
            (token.take(), token.take()),
            (Control::Skip, Control::Continue)
        );
        token.interrupt();
        token.skip();
        assert_eq!(
            (token.take(), token.take()),
            (Control::Interrupt, Control::Interrupt)
        );
    }

    #[test]
    fn fraction_follows_batches_and_steps() {
        let mut status = Status::default();
        assert!(status.fraction() == 0.0 && status.eta_seconds() == 0.0);
        let running = Running {
            id: "a".into(),
            kind: "txt2img",
            started: Instant::now(),
            cancel: Arc::new(CancelToken::default()),
        };
        status.begin(running, 2, 10);
        status.progress = Progress {
            step: 5,
            steps: 10,
            batch: 1,
            batches: 2,
        };
        assert!((status.fraction() - 0.76).abs() < 1e-9);
        status.end();
        assert_eq!(status.finished, ["a"]);
        assert!(status.fraction() == 0.0);
    }
}
