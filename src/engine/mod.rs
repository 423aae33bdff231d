//! The engine: one thread for each device behind one queue, and handles to give them work.
//!
//! [`Engine`] is cloneable and cheap; async code submits and waits, only a device thread touches a model. A job that
//! fails or panics answers its own client and leaves the engine ready for the next; a device that fails leaves the others at
//! work. [`routing`] says which device takes which job. Follows the shape of text-embeddings-inference (permit moved with the
//! request, one thread owning the back end).

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
pub mod previews;
pub mod queue;
pub mod residents;
pub mod routing;
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
use previews::Preview;
use queue::{Queue, Refusal, Ticket};
use residents::ModelLimits;
use status::{CancelToken, LoadedModel, Status, WorkerStatus};
use worker::{Command, Queued};

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
    /// The device that made them, `cpu` or `cuda:N`.
    pub device: String,
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
    /// Waits until a device thread has taken the job up (or has ended it).
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
        // Every job in line is answered; this one was on a device.
        let lost = || Err(Error::Panicked("its device thread has ended".into()));
        (&mut self.result).await.unwrap_or_else(|_| lost())
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

/// Handle to the engine. All clones speak to the same device threads.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// Owned by all handles together; the last one ends the device threads.
struct Shared {
    to_workers: worker::Shared,
    queue_limit: usize,
    catalog: Arc<Catalog>,
    /// One for each thread, at least one.
    devices: Vec<DeviceInfo>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts a device thread for each of `makers`. Each maker runs on its thread and builds what owns the device.
    ///
    /// # Errors
    /// One of the devices cannot be used, or there is none.
    pub fn start<B: Backend, M>(
        catalog: Catalog,
        queue_limit: usize,
        makers: impl IntoIterator<Item = M>,
    ) -> Result<Self, Error>
    where
        M: FnOnce() -> Result<B, Error> + Send + 'static,
    {
        let makers: Vec<M> = makers.into_iter().collect();
        let count = makers.len();
        let previews = (0..count).map(|_| Arc::default()).collect();
        let to_workers = worker::Shared {
            queue: Queue::new(queue_limit, count),
            status: watch::channel(Status::new(count)).0,
            previews,
            model_limits: Arc::default(),
        };
        let (threads, devices): (Vec<_>, Vec<_>) =
            worker::spawn(&to_workers, makers)?.into_iter().unzip();
        if devices.is_empty() {
            return Err(Error::Device {
                device: "none".into(),
                reason: "name at least one".into(),
            });
        }
        Ok(Self {
            shared: Arc::new(Shared {
                to_workers,
                queue_limit,
                catalog: Arc::new(catalog),
                devices,
                threads: Mutex::new(threads),
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
        let place = self.shared.to_workers.queue.enter(client, id).await;
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
            .to_workers
            .queue
            .try_enter(&job.client, &job.id)
            .map_err(|refusal| self.refused(refusal))?;
        self.fill(place, job.id.clone(), job, Command::Generate)
    }

    /// How many checkpoints stay in the memory of each device from the next load on.
    pub fn keep_models(&self, limits: ModelLimits) {
        let shared = &self.shared.to_workers.model_limits;
        *shared.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Makes a checkpoint the loaded one, behind the jobs already queued. On failure the previous one stays. Of several devices
    /// one is enough, by the rule of [`routing`]; the others load it when a job reaches them.
    ///
    /// # Errors
    /// Whatever the load failed with.
    pub async fn load(&self, model: Selection) -> Result<LoadedModel, Error> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Load(Box::new(model), reply))?;
        answer.await.unwrap_or(Err(Error::ShuttingDown))
    }

    /// Drops the loaded checkpoints of all devices, behind the jobs already queued. The next job loads what it needs.
    ///
    /// # Errors
    /// [`Error::ShuttingDown`].
    pub async fn unload(&self) -> Result<(), Error> {
        let mut answers = Vec::new();
        for worker in self.status().workers {
            // A thread that has ended holds nothing.
            if !worker.is_stopped() {
                let (reply, answer) = oneshot::channel();
                self.command(Command::Unload(worker.number, reply))?;
                answers.push(answer);
            }
        }
        let count = answers.len();
        let mut unloaded = 0;
        for answer in answers {
            unloaded += usize::from(answer.await.is_ok());
        }
        if count == 0 || unloaded == 0 {
            return Err(Error::ShuttingDown);
        }
        Ok(())
    }

    /// Ends the running job that `client` is shown ([`Status::shown`]) at its next step: its own if it has one. Queued jobs are
    /// not touched; idle = nothing happens.
    pub fn interrupt(&self, client: &str) {
        self.tell(client, |worker, cancel| {
            cancel.interrupt();
            worker.interrupted = true;
        });
    }

    /// Ends the present batch of the job that [`Self::interrupt`] would end, at its next step.
    pub fn skip(&self, client: &str) {
        self.tell(client, |worker, cancel| {
            cancel.skip();
            worker.skipped = true;
        });
    }

    fn tell(&self, client: &str, what: impl FnOnce(&mut WorkerStatus, &CancelToken)) {
        self.shared.to_workers.status.send_if_modified(|status| {
            let number = status.shown(client).number;
            let worker = &mut status.workers[number];
            let Some(cancel) = worker
                .running
                .as_ref()
                .map(|running| running.cancel.clone())
            else {
                return false;
            };
            what(worker, &cancel);
            true
        });
    }

    /// What the engine is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.to_workers.status.borrow().clone()
    }

    /// Changes of [`Engine::status`].
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.shared.to_workers.status.subscribe()
    }

    /// Ids of waiting jobs, first in line first.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        self.shared.to_workers.queue.pending()
    }

    /// The latest preview of a worker's running job, and asks for more of them for a while.
    #[must_use]
    pub fn preview(&self, worker: usize) -> Option<Preview> {
        self.shared.to_workers.previews.get(worker)?.look()
    }

    /// Lets at least `interval` pass between two previews of a worker; each costs the job its making.
    pub fn limit_previews(&self, interval: Duration) {
        for slot in &self.shared.to_workers.previews {
            slot.limit(interval);
        }
    }

    /// What is on disk.
    #[must_use]
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.shared.catalog
    }

    /// Devices and dtypes in use, in the workers' order.
    #[must_use]
    pub fn devices(&self) -> &[DeviceInfo] {
        &self.shared.devices
    }

    /// Ends the engine: refuses new jobs, answers queued ones with [`Error::ShuttingDown`], gives the running ones
    /// `grace` to end, then interrupts them at their next step. Returns when the device threads have ended.
    pub async fn shut_down(&self, grace: Duration) {
        self.shared.refuse_queued();
        let mut status = self.shared.to_workers.status.subscribe();
        let in_time = tokio::time::timeout(grace, status.wait_for(Status::is_stopped))
            .await
            .is_ok();
        if !in_time {
            tracing::warn!(
                grace_seconds = grace.as_secs(),
                "interrupting the running jobs"
            );
            self.shared.to_workers.status.send_modify(|status| {
                for worker in &mut status.workers {
                    worker.interrupted |= worker.running.is_some();
                }
            });
            // Looks again at each change, so that a job taken up at this very moment is interrupted as well. The sender
            // lives in `self`, so the wait ends only with the threads.
            let ended = status.wait_for(|status| {
                status.running().for_each(|job| job.cancel.interrupt());
                status.is_stopped()
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
                queue: self.shared.to_workers.queue.clone(),
                ticket,
            },
        })
    }

    fn command(&self, command: Command) -> Result<(), Error> {
        self.shared
            .to_workers
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
        for command in self.to_workers.queue.close() {
            command.refuse();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.refuse_queued();
        let status = self.to_workers.status.borrow();
        status.running().for_each(|job| job.cancel.interrupt());
        drop(status);
        let threads = self.threads.get_mut();
        for thread in threads.unwrap_or_else(PoisonError::into_inner).drain(..) {
            // The thread catches its panics, so its end is always orderly.
            let _ = thread.join();
        }
    }
}
