//! The engine: one device thread behind a queue, and handles to give it work.
//!
//! [`Engine`] is cloneable and cheap; async code submits and waits, only the device thread touches a model. A job that
//! fails or panics answers its own client and leaves the engine ready for the next. Follows the shape of
//! text-embeddings-inference (permit moved with the request, one thread owning the back end).

pub mod approximations;
pub mod backend;
pub mod checkpoint;
mod error;
pub mod hashes;
pub mod history;
pub mod hub;
pub mod limits;
pub mod models;
pub mod networks;
pub mod queue;
pub mod residents;
mod scan;
pub mod status;
pub mod upscalers;
mod vaes;
pub mod worker;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::pipeline::{Extras, ExtrasRequest, GenerateRequest, Generated, Progress};

use backend::{Backend, DeviceInfo};
use checkpoint::Selection;
pub use error::{Error, with_causes};
use models::Catalog;
use queue::{Queue, Refusal, Ticket};
use residents::ModelLimits;
use status::{CancelToken, LoadedModel, Status};
use worker::{Command, PreviewSlot, Queued};

/// [`Job::preview_every`] of a job that shows each batch when it is finished.
pub const PREVIEW_BATCHES: usize = usize::MAX;

/// One job, fully resolved.
#[derive(Debug, Clone)]
pub struct Job {
    /// Task id, `task(txt2img-AB12CD3)` or the client's own.
    pub id: String,
    /// Who asked, by whatever name tells clients apart: they take turns.
    pub client: String,
    /// `txt2img`, ….
    pub kind: &'static str,
    /// Checkpoint and VAE that it needs; the device thread makes it true.
    pub model: Selection,
    /// What to make.
    pub request: GenerateRequest,
    /// Make a preview every so many steps while somebody looks; 0 = never, [`PREVIEW_BATCHES`] = of finished batches only.
    pub preview_every: usize,
}

/// Pictures to be enlarged.
#[derive(Debug, Clone)]
pub struct ExtrasJob {
    /// Task id, `task(extras-AB12CD3)`.
    pub id: String,
    /// Who asked, as in [`Job::client`].
    pub client: String,
    /// What to make.
    pub request: ExtrasRequest,
}

/// A finished (or interrupted) job.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Pictures and what they came from.
    pub generated: Generated,
    /// The checkpoint that made them.
    pub model: LoadedModel,
    /// Local start time, `YYYYMMDDHHMMSS`.
    pub job_timestamp: String,
    /// Batches that were finished before an interrupt.
    pub finished_batches: usize,
    /// Seconds spent loading the checkpoint for this job.
    pub load_seconds: f64,
}

/// Where a submitted job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    /// In line.
    Queued,
    /// On the device; loading counts as step 0.
    Running(Progress),
    /// The result was sent.
    Finished,
}

/// The submitter's end of a job. Dropping it gives up a queued job; a running one goes on.
#[derive(Debug)]
pub struct JobHandle<T = Outcome> {
    /// Task id.
    pub id: String,
    /// Latest state.
    pub progress: watch::Receiver<JobState>,
    /// Interrupts or skips.
    pub cancel: Arc<CancelToken>,
    result: oneshot::Receiver<Result<T, Error>>,
    _line: LeaveLine,
}

impl<T> JobHandle<T> {
    /// Waits until the device thread has taken the job up (or has ended it).
    pub async fn started(&mut self) {
        // An error means that the job has ended, which also is an answer.
        let _ = self
            .progress
            .wait_for(|state| *state != JobState::Queued)
            .await;
    }

    /// Waits for the pictures.
    ///
    /// # Errors
    /// Whatever the job failed with.
    pub async fn finished(&mut self) -> Result<T, Error> {
        (&mut self.result).await.unwrap_or(Err(Error::ShuttingDown))
    }
}

/// Takes a queued job out of the line when its handle is dropped.
struct LeaveLine {
    queue: Arc<Queue<Command>>,
    ticket: Ticket,
}

impl std::fmt::Debug for LeaveLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.ticket)
    }
}

impl Drop for LeaveLine {
    fn drop(&mut self) {
        if self.queue.remove(self.ticket).is_some() {
            tracing::debug!("a queued job was given up by its client");
        }
    }
}

/// A place in line that waits for its job.
pub struct Reserved(queue::Place<Command>);

/// Handle to the engine. All clones speak to the same device thread.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// Owned by all handles together; the last one ends the device thread.
struct Shared {
    queue: Arc<Queue<Command>>,
    queue_limit: usize,
    status: watch::Sender<Status>,
    previews: Arc<PreviewSlot>,
    model_limits: Arc<Mutex<ModelLimits>>,
    catalog: Arc<Catalog>,
    device: DeviceInfo,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the device thread. `make` runs on it and builds what owns the device.
    ///
    /// # Errors
    /// The device cannot be used.
    pub fn start<B: Backend>(
        catalog: Catalog,
        queue_limit: usize,
        make: impl FnOnce() -> Result<B, Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let queue = Queue::new(queue_limit);
        let (status, _) = watch::channel(Status::default());
        let previews = Arc::new(PreviewSlot::default());
        let model_limits = Arc::new(Mutex::new(ModelLimits::default()));
        let shared = worker::Shared {
            status: status.clone(),
            previews: previews.clone(),
            model_limits: model_limits.clone(),
        };
        let (thread, device) = worker::spawn(queue.clone(), shared, make)?;
        let thread = Mutex::new(Some(thread));
        let catalog = Arc::new(catalog);
        Ok(Self {
            shared: Arc::new(Shared {
                queue,
                queue_limit,
                status,
                previews,
                model_limits,
                catalog,
                device,
                thread,
            }),
        })
    }

    /// Queues a job, waiting for a place if all are taken. The place is given up if the future is dropped.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`].
    pub async fn submit(&self, job: Job) -> Result<JobHandle, Error> {
        let place = self.reserve(&job.client, &job.id).await?;
        self.submit_in(place, job)
    }

    /// Queues an extras job, as [`Self::submit`] does.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`].
    pub async fn submit_extras(&self, job: ExtrasJob) -> Result<JobHandle<Extras>, Error> {
        let place = self.reserve(&job.client, &job.id).await?;
        self.fill(place.0, job.id.clone(), job, Command::Extras)
    }

    /// Waits for a place in line. It is given up if the future or the place is dropped.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`].
    pub async fn reserve(&self, client: &str, id: &str) -> Result<Reserved, Error> {
        let place = self.shared.queue.enter(client, id).await;
        place.map(Reserved).map_err(|refusal| self.refused(refusal))
    }

    /// Queues a job in a place of its own.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`].
    pub fn submit_in(&self, place: Reserved, job: Job) -> Result<JobHandle, Error> {
        self.fill(place.0, job.id.clone(), job, Command::Generate)
    }

    /// Queues a job if there is a place.
    ///
    /// # Errors
    /// [`Error::QueueFull`] and [`Error::ShuttingDown`].
    pub fn try_submit(&self, job: Job) -> Result<JobHandle, Error> {
        let place = self
            .shared
            .queue
            .try_enter(&job.client, &job.id)
            .map_err(|refusal| self.refused(refusal))?;
        self.fill(place, job.id.clone(), job, Command::Generate)
    }

    /// How many checkpoints stay in memory from the next load on.
    pub fn keep_models(&self, limits: ModelLimits) {
        let shared = &self.shared.model_limits;
        *shared.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Makes a checkpoint the loaded one, behind the jobs already queued. On failure the previous one stays.
    ///
    /// # Errors
    /// Whatever the load failed with.
    pub async fn load(&self, model: Selection) -> Result<LoadedModel, Error> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Load(Box::new(model), reply))?;
        answer.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// Drops the loaded checkpoint, behind the jobs already queued. The next job loads what it needs.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`].
    pub async fn unload(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Unload(reply))?;
        answer.await.map_err(|_| Error::ShuttingDown)
    }

    /// Ends the running job at its next step. Queued jobs are not touched; idle = nothing happens.
    pub fn interrupt(&self) {
        self.shared.status.send_if_modified(|status| {
            let Some(running) = &status.running else {
                return false;
            };
            running.cancel.interrupt();
            status.interrupted = true;
            true
        });
    }

    /// Ends the running job's present batch at its next step.
    pub fn skip(&self) {
        self.shared.status.send_if_modified(|status| {
            let Some(running) = &status.running else {
                return false;
            };
            running.cancel.skip();
            status.skipped = true;
            true
        });
    }

    /// What the engine is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status.borrow().clone()
    }

    /// Changes of [`Engine::status`].
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.shared.status.subscribe()
    }

    /// Ids of waiting jobs, first in line first.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        self.shared.queue.pending()
    }

    /// The latest preview of the running job, and asks for more of them for a while.
    #[must_use]
    pub fn preview(&self) -> Option<worker::Preview> {
        self.shared.previews.look()
    }

    /// Lets at least `interval` pass between two previews; each costs the job its making.
    pub fn limit_previews(&self, interval: Duration) {
        self.shared.previews.limit(interval);
    }

    /// What is on disk.
    #[must_use]
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.shared.catalog
    }

    /// Device and dtype in use.
    #[must_use]
    pub fn device(&self) -> &DeviceInfo {
        &self.shared.device
    }

    /// Ends the engine: refuses new jobs, answers queued ones with [`Error::ShuttingDown`], gives the running one `grace`
    /// to end, then interrupts it at its next step. Returns when the device thread has ended.
    pub async fn shut_down(&self, grace: Duration) {
        self.shared.refuse_queued();
        let mut status = self.shared.status.subscribe();
        let in_time = tokio::time::timeout(grace, status.wait_for(|status| status.stopped))
            .await
            .is_ok();
        if !in_time {
            tracing::warn!(
                grace_seconds = grace.as_secs(),
                "interrupting the running job"
            );
            self.interrupt();
            // Looks again at each change, so that a job taken up at this very moment is interrupted as well. The sender
            // lives in `self`, so the wait ends only with the thread.
            let ended = status.wait_for(|status| {
                let _ = status
                    .running
                    .as_ref()
                    .map(|running| running.cancel.interrupt());
                status.stopped
            });
            let _ = ended.await;
        }
    }

    fn fill<J, T>(
        &self,
        place: queue::Place<Command>,
        id: String,
        job: J,
        command: fn(Box<Queued<J, T>>) -> Command,
    ) -> Result<JobHandle<T>, Error> {
        let cancel = Arc::new(CancelToken::default());
        let (state, progress) = watch::channel(JobState::Queued);
        let (reply, result) = oneshot::channel();
        let queued = Queued {
            job,
            cancel: cancel.clone(),
            state,
            reply,
            span: tracing::Span::current(),
        };
        let ticket = place
            .fill(command(Box::new(queued)))
            .map_err(|_| Error::ShuttingDown)?;
        Ok(JobHandle {
            id,
            progress,
            cancel,
            result,
            _line: LeaveLine {
                queue: self.shared.queue.clone(),
                ticket,
            },
        })
    }

    fn command(&self, command: Command) -> Result<(), Error> {
        self.shared
            .queue
            .push_command(command)
            .map_err(|_| Error::ShuttingDown)
    }

    fn refused(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Full => Error::QueueFull {
                limit: self.shared.queue_limit,
            },
            Refusal::Closed => Error::ShuttingDown,
        }
    }
}

impl Shared {
    fn refuse_queued(&self) {
        for command in self.queue.close() {
            command.refuse();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.refuse_queued();
        if let Some(running) = &self.status.borrow().running {
            running.cancel.interrupt();
        }
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // The thread catches the panics of jobs, so its end is always orderly.
        let _ = thread.map(JoinHandle::join);
    }
}
