//! What the engine is doing: the state behind every progress answer, and the token that stops a job.
//!
//! One value, published through a `watch`: readers never wait for a job or a load. With several workers, whoever does not ask
//! for a job by its id (A1111's progress, interrupt and skip) is shown one of them: see [`Status::shown`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use tokio::sync::watch;

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

/// The job on a device.
#[derive(Debug, Clone)]
pub struct Running {
    /// Task id.
    pub id: String,
    /// Who asked.
    pub client: String,
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
#[derive(Debug, Clone)]
pub struct Status {
    /// One for each device, at least one.
    pub workers: Vec<WorkerStatus>,
    /// Task ids that ended lately, oldest first.
    pub finished: VecDeque<String>,
}

/// State of one device thread.
#[derive(Debug, Clone, Default)]
pub struct WorkerStatus {
    /// Its place among the workers.
    pub number: usize,
    /// `cpu` or `cuda:N`; empty until it is open.
    pub device: String,
    /// The job on the device; `None` = idle.
    pub running: Option<Running>,
    /// Title of the checkpoint being loaded.
    pub loading: Option<String>,
    /// The checkpoint used last.
    pub loaded: Option<LoadedModel>,
    /// Where the running job stands; keeps its last value after the end.
    pub progress: Progress,
    /// Local start time of the last job, `YYYYMMDDHHMMSS`; empty before the first.
    pub job_timestamp: String,
    /// When the last job began.
    pub begun: Option<Instant>,
    /// The last job was told to skip a batch.
    pub skipped: bool,
    /// The last job was told to end.
    pub interrupted: bool,
    /// Jobs that have ended here.
    pub ended: u64,
    /// Bytes that could be allocated when the last job ended; `None` = unknown.
    pub free_memory: Option<u64>,
    /// Whether it takes jobs.
    pub service: Service,
}

/// Whether a worker takes jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Service {
    /// It does.
    #[default]
    Open,
    /// Its device failed several times in a row: it leaves the line to the others for a while.
    Resting,
    /// The device thread has ended.
    Stopped,
}

impl Default for Status {
    fn default() -> Self {
        Self::new(1)
    }
}

impl Status {
    /// Of workers that have not opened their devices yet.
    pub(super) fn new(workers: usize) -> Self {
        let worker = |number| WorkerStatus {
            number,
            ..WorkerStatus::default()
        };
        Self {
            workers: (0..workers.max(1)).map(worker).collect(),
            finished: VecDeque::new(),
        }
    }

    /// The worker that `client` means when it names no job: that of its own job that has run longest; if it has none running,
    /// that of anybody's; if nothing runs, the one that loads or has begun a job last.
    #[must_use]
    pub fn shown(&self, client: &str) -> &WorkerStatus {
        let oldest = |is_meant: &dyn Fn(&Running) -> bool| {
            let meant = |worker: &&WorkerStatus| worker.running.as_ref().is_some_and(is_meant);
            let of_them = self.workers.iter().filter(meant);
            of_them.min_by_key(|worker| worker.running.as_ref().map(|running| running.started))
        };
        let latest = || {
            let all = self.workers.iter();
            all.max_by_key(|worker| (worker.loading.is_some(), worker.begun))
        };
        oldest(&|running| running.client == client)
            .or_else(|| oldest(&|_| true))
            .or_else(latest)
            .unwrap_or(&self.workers[0])
    }

    /// The worker that runs a job.
    #[must_use]
    pub fn of_job(&self, id: &str) -> Option<&WorkerStatus> {
        let runs = |worker: &&WorkerStatus| {
            let running = worker.running.as_ref();
            running.is_some_and(|running| running.id == id)
        };
        self.workers.iter().find(runs)
    }

    /// Seconds until a job with `before` others before it begins, if each takes `one`: the time until the first device is free,
    /// and the jobs before it spread over all.
    #[must_use]
    pub fn wait_seconds(&self, before: usize, one: f64) -> f64 {
        let present = self.workers.iter().filter(|one| !one.is_stopped());
        let first = present.clone().map(WorkerStatus::eta_seconds);
        let first = first.reduce(f64::min).unwrap_or(0.0);
        first + one * (before / present.count().max(1)) as f64
    }

    /// Whether any device has a checkpoint.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.workers.iter().any(|worker| worker.loaded.is_some())
    }

    /// Whether all device threads have ended.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.workers.iter().all(WorkerStatus::is_stopped)
    }

    /// All that run.
    pub(super) fn running(&self) -> impl Iterator<Item = &Running> {
        self.workers
            .iter()
            .filter_map(|worker| worker.running.as_ref())
    }
}

impl WorkerStatus {
    /// A job begins; flags of the job before do not touch it.
    fn begin(&mut self, running: Running, batches: usize, steps: usize) {
        self.begun = Some(running.started);
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

    /// What it is doing, in a word: `stopped`, `running`, `loading`, `resting` or `idle`.
    #[must_use]
    pub fn activity(&self) -> &'static str {
        match self.service {
            Service::Stopped => "stopped",
            _ if self.loading.is_some() => "loading",
            _ if self.running.is_some() => "running",
            Service::Resting => "resting",
            Service::Open => "idle",
        }
    }

    /// Whether the device thread has ended.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.service == Service::Stopped
    }
}

/// One worker's end of the status.
#[derive(Debug, Clone)]
pub(super) struct Publisher {
    /// Of all workers.
    status: watch::Sender<Status>,
    number: usize,
}

impl Publisher {
    pub(super) fn new(status: watch::Sender<Status>, number: usize) -> Self {
        Self { status, number }
    }

    /// The worker's place among all.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    /// Changes the worker's state.
    pub(super) fn modify(&self, change: impl FnOnce(&mut WorkerStatus)) {
        self.status
            .send_modify(|status| change(&mut status.workers[self.number]));
    }

    /// Changes the worker's state; `change` says whether it did, which readers are told.
    pub(super) fn modify_if(&self, change: impl FnOnce(&mut WorkerStatus) -> bool) {
        self.status
            .send_if_modified(|status| change(&mut status.workers[self.number]));
    }

    /// Reads the worker's state.
    pub(super) fn read<R>(&self, read: impl FnOnce(&WorkerStatus) -> R) -> R {
        read(&self.status.borrow().workers[self.number])
    }

    /// A job begins.
    pub(super) fn begin(&self, running: Running, batches: usize, steps: usize) {
        self.modify(|worker| worker.begin(running, batches, steps));
    }

    /// The running job has ended.
    pub(super) fn end(&self, free_memory: Option<u64>) {
        self.status.send_modify(|status| {
            let worker = &mut status.workers[self.number];
            worker.free_memory = free_memory;
            let Some(running) = worker.running.take() else {
                return;
            };
            worker.ended += 1;
            status.finished.push_back(running.id);
            if status.finished.len() > REMEMBERED {
                status.finished.pop_front();
            }
        });
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

    fn running(id: &str, client: &str) -> Running {
        Running {
            id: id.into(),
            client: client.into(),
            kind: "txt2img",
            started: Instant::now(),
            cancel: Arc::new(CancelToken::default()),
        }
    }

    #[test]
    fn fraction_follows_batches_and_steps() {
        let (sender, status) = watch::channel(Status::default());
        let publisher = Publisher::new(sender, 0);
        let shown = || status.borrow().shown("").clone();
        assert!(shown().fraction() == 0.0 && shown().eta_seconds() == 0.0);
        publisher.begin(running("a", ""), 2, 10);
        publisher.modify(|worker| {
            worker.progress = Progress {
                step: 5,
                steps: 10,
                batch: 1,
                batches: 2,
            };
        });
        assert!((shown().fraction() - 0.76).abs() < 1e-9);
        publisher.end(Some(7));
        assert_eq!(status.borrow().finished, ["a"]);
        assert!(shown().fraction() == 0.0);
        assert_eq!((shown().ended, shown().free_memory), (1, Some(7)));
    }

    #[test]
    fn a_client_is_shown_its_own_job_else_the_oldest_else_the_latest() {
        let (sender, status) = watch::channel(Status::new(3));
        let workers: Vec<_> = (0..3).map(|n| Publisher::new(sender.clone(), n)).collect();
        let shown = |client: &str| status.borrow().shown(client).number;
        workers[1].begin(running("a", "ann"), 1, 1);
        workers[2].begin(running("b", "bob"), 1, 1);
        workers[0].begin(running("c", "bob"), 1, 1);
        assert_eq!([shown("ann"), shown("bob"), shown("eve")], [1, 2, 1]);
        assert_eq!(
            status.borrow().of_job("c").map(|worker| worker.number),
            Some(0)
        );
        workers[1].end(None);
        assert_eq!([shown("ann"), shown("bob")], [2, 2]);
        workers[2].end(None);
        workers[0].end(None);
        assert_eq!(shown("ann"), 0, "the one that began last");
        workers[1].modify(|worker| worker.loading = Some("x".into()));
        assert_eq!(shown("ann"), 1);
        assert!(status.borrow().of_job("c").is_none());
    }
}
