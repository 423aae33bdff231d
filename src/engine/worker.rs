//! A device thread: commands in, results and progress out.
//!
//! Invariants: one thread owns its device and the models loaded there; a job is answered exactly once; a failed load leaves the
//! previous model in place; a panic drops the model, answers the job, and the thread goes on. The pictures of a job leave the
//! thread as pixels: they are encoded and written by whoever waits for them while the next job runs. Nothing above this file
//! touches a tensor.

mod extras;
mod start;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::backend::Backend;
use super::checkpoint::Selection;
use super::previews::PreviewSlot;
use super::queue::Queue;
use super::residents::{ModelLimits, Resident, Residents};
use super::routing::{Free, Needs, Routed};
use super::status::{CancelToken, LoadedModel, Publisher, Running, Service};
use super::{Error, ExtrasJob, Job, JobState, Outcome, PREVIEW_BATCHES};
use crate::pipeline::{
    self, Control, Extras, GenerateRequest, Generated, Observer, Progress, Timings,
};
use crate::telemetry::metrics::{self, JobResult, StepClock};

pub(super) use start::{Shared, spawn};

/// Failures of a device in a row after which its worker rests.
const FAULTS: u32 = 3;
/// For how long it rests, if another worker serves meanwhile.
const REST: Duration = Duration::from_mins(1);

/// Something for a device thread to do.
pub enum Command {
    /// Make pictures.
    Generate(Box<QueuedJob>),
    /// Enlarge pictures.
    Extras(Box<QueuedExtras>),
    /// Make a checkpoint the loaded one.
    Load(Box<Selection>, oneshot::Sender<Result<LoadedModel, Error>>),
    /// Drop the checkpoints that this worker has loaded.
    Unload(usize, oneshot::Sender<()>),
}

impl Command {
    /// Answers that the engine is ending.
    pub fn refuse(self) {
        match self {
            Self::Generate(job) => job.answer(Err(Error::ShuttingDown)),
            Self::Extras(job) => job.answer(Err(Error::ShuttingDown)),
            Self::Load(_, reply) => drop(reply.send(Err(Error::ShuttingDown))),
            Self::Unload(..) => {}
        }
    }
}

impl Routed for Command {
    fn needs(&self) -> Needs<'_> {
        match self {
            Self::Generate(job) => Needs::Checkpoint(&job.job.model),
            Self::Load(selection, _) => Needs::Checkpoint(selection),
            Self::Extras(_) => Needs::Nothing,
            Self::Unload(worker, _) => Needs::Worker(*worker),
        }
    }
}

/// A job in line, with the channels to its submitter.
pub struct Queued<J, T> {
    /// What to do.
    pub job: J,
    /// Stops it.
    pub cancel: Arc<CancelToken>,
    /// Progress out.
    pub state: watch::Sender<JobState>,
    /// The answer out.
    pub reply: oneshot::Sender<Result<T, Error>>,
    /// The request's span.
    pub span: tracing::Span,
}

/// A generation in line.
pub type QueuedJob = Queued<Job, Outcome>;
/// An extras job in line.
pub type QueuedExtras = Queued<ExtrasJob, Extras>;

impl<J, T> Queued<J, T> {
    fn answer(self, result: Result<T, Error>) {
        // A client that has left is not an error; its files, if any, are written by the task that holds the handle.
        let _ = self.reply.send(result);
        self.state.send_replace(JobState::Finished);
    }
}

struct Worker<B: Backend> {
    backend: B,
    status: Publisher,
    previews: Arc<PreviewSlot>,
    model_limits: Arc<Mutex<ModelLimits>>,
    residents: Residents<B::Model>,
    /// Failures of the device since its last success.
    faults: u32,
}

impl<B: Backend> Worker<B> {
    fn run(mut self, queue: &Queue<Command>) {
        while let Some((command, permit)) = queue.pop(&self.free()) {
            match command {
                Command::Generate(job) if job.reply.is_closed() => {
                    metrics::job_ended(JobResult::Abandoned);
                    tracing::debug!(job = %job.job.id, "dropped: its client left the queue");
                }
                Command::Generate(job) => self.job(*job),
                Command::Extras(job) if job.reply.is_closed() => {
                    metrics::job_ended(JobResult::Abandoned);
                    tracing::debug!(job = %job.job.id, "dropped: its client left the queue");
                }
                Command::Extras(job) => self.extras(*job),
                Command::Load(selection, reply) => {
                    let result = self.ensure(&selection);
                    if let Err(error) = &result {
                        tracing::error!(checkpoint = selection.title, %error, "checkpoint not loaded");
                    }
                    let _ = reply.send(result);
                }
                Command::Unload(_, reply) => {
                    self.unload();
                    let _ = reply.send(());
                }
            }
            drop(permit);
        }
    }

    /// How the worker presents itself to the line.
    fn free(&self) -> Free {
        let is_resting = self.faults >= FAULTS;
        self.status.modify_if(|worker| {
            let service = if is_resting {
                Service::Resting
            } else {
                Service::Open
            };
            std::mem::replace(&mut worker.service, service) != service
        });
        Free {
            worker: self.status.number(),
            holds: self.residents.selections().cloned().collect(),
            rests: is_resting.then(|| Instant::now() + REST),
        }
    }

    /// Counts failures that may be the device's, not the job's.
    fn note_fault<T>(&mut self, result: &Result<T, Error>) {
        match result {
            Ok(_) => self.faults = 0,
            Err(error) if error.may_be_the_device() => self.faults += 1,
            Err(_) => {}
        }
        if self.faults >= FAULTS {
            let device = self.backend.device().device;
            tracing::error!(
                device,
                failures = self.faults,
                rest_seconds = REST.as_secs(),
                "the device keeps failing: other devices, if any, go first"
            );
        }
    }

    fn job(&mut self, queued: QueuedJob) {
        let span = queued.span.clone();
        let _entered = span.enter();
        let started = Instant::now();
        let request = &queued.job.request;
        let running = Running {
            id: queued.job.id.clone(),
            client: queued.job.client.clone(),
            kind: queued.job.kind,
            started,
            cancel: queued.cancel.clone(),
        };
        self.previews.clear();
        self.status
            .begin(running, request.batch_count, request.steps);
        let first = Progress {
            step: 0,
            steps: request.steps,
            batch: 0,
            batches: request.batch_count,
        };
        queued.state.send_replace(JobState::Running(first));

        let result = self.generate(&queued);
        self.note_fault(&result);
        self.status.end(self.backend.free_memory());
        self.previews.clear();
        let interrupted = result.as_ref().map(|made| made.generated.interrupted);
        metrics::job_ended(JobResult::of(interrupted.ok()));
        let seconds = started.elapsed().as_secs_f64();
        let generated = result.as_ref().map(|outcome| &outcome.generated);
        for comment in generated.map_or(&[][..], |generated| &generated.comments) {
            tracing::warn!(job = queued.job.id, comment);
        }
        match &result {
            Ok(outcome) => tracing::info!(
                job = queued.job.id,
                images = outcome.generated.images.len(),
                steps = outcome.generated.timings.steps,
                interrupted = outcome.generated.interrupted,
                seconds,
                "generated"
            ),
            Err(error) => tracing::error!(job = queued.job.id, %error, seconds, "job failed"),
        }
        queued.answer(result);
    }

    fn generate(&mut self, queued: &QueuedJob) -> Result<Outcome, Error> {
        let load_started = Instant::now();
        let info = self.ensure(&queued.job.model)?;
        let load_seconds = load_started.elapsed().as_secs_f64();
        let Some(loaded) = self.residents.current_mut() else {
            return Err(no_model());
        };
        let observer = JobObserver {
            status: &self.status,
            state: &queued.state,
            cancel: &queued.cancel,
            previews: &self.previews,
            preview_every: queued.job.preview_every,
            clock: StepClock::default(),
        };
        let request = &queued.job.request;
        let backend = &mut self.backend;
        let result = catch_unwind(AssertUnwindSafe(|| {
            backend.generate(&mut loaded.model, request, &observer)
        }));
        let generated = match result {
            Ok(Ok(generated)) => generated,
            Ok(Err(pipeline::Error::Interrupted)) => nothing_made(request),
            Ok(Err(error)) => return Err(error.into()),
            Err(panic) => {
                // Its buffers may be half written: the next job loads afresh.
                self.drop_current();
                return Err(Error::Panicked(panic_text(panic.as_ref())));
            }
        };
        let (job_timestamp, progress) = self
            .status
            .read(|worker| (worker.job_timestamp.clone(), worker.progress));
        let finished_batches = match (generated.interrupted, progress) {
            (false, _) => request.batch_count,
            // The last report is of the last step that was taken, which may have been a batch's own last.
            (true, at) => at.batch + usize::from(at.steps > 0 && at.step >= at.steps),
        };
        Ok(Outcome {
            generated,
            model: info,
            device: self.backend.device().device,
            job_timestamp,
            finished_batches,
            load_seconds,
        })
    }

    /// Makes `selection` the current model. On failure the previous one stays, unless its memory was needed.
    fn ensure(&mut self, selection: &Selection) -> Result<LoadedModel, Error> {
        if self.residents.recall(|held| held.is_same_model(selection)) {
            return self.note_current().ok_or_else(no_model);
        }
        if self
            .residents
            .recall(|held| held.is_same_checkpoint(selection))
        {
            return self.switch_vae(selection);
        }
        let bytes = self.backend.estimate(selection)?;
        let limits = *self
            .model_limits
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let backend = &self.backend;
        self.residents
            .make_room(bytes, limits.bytes, || backend.free_memory());
        let started = Instant::now();
        self.status
            .modify(|worker| worker.loading = Some(selection.title.clone()));
        let backend = &mut self.backend;
        let result = catch_unwind(AssertUnwindSafe(|| backend.load(selection)));
        let result = match result {
            Ok(result) => result.map_err(Error::from),
            Err(panic) => Err(Error::Panicked(panic_text(panic.as_ref()))),
        };
        self.status.modify(|worker| worker.loading = None);
        let model = match result {
            Ok(model) => model,
            Err(error) => {
                self.note_current();
                return Err(error);
            }
        };
        let info = selection.describe(self.backend.native_size(&model));
        metrics::MODEL_LOAD_SECONDS.observe(started.elapsed());
        let resident = Resident {
            selection: selection.clone(),
            info,
            model,
            bytes,
        };
        self.residents.add(resident, limits.count);
        let seconds = started.elapsed().as_secs_f64();
        let info = self.note_current().ok_or_else(no_model)?;
        tracing::info!(checkpoint = info.title, seconds, "loaded");
        Ok(info)
    }

    /// Publishes which model is current.
    fn note_current(&mut self) -> Option<LoadedModel> {
        let current = self.residents.current_mut();
        let info = current.map(|resident| resident.info.clone());
        self.status.modify_if(|worker| {
            let changed = worker.loaded != info;
            worker.loaded.clone_from(&info);
            changed
        });
        info
    }

    /// Changes only the VAE of the current checkpoint. On failure the previous one stays.
    fn switch_vae(&mut self, selection: &Selection) -> Result<LoadedModel, Error> {
        let backend = &mut self.backend;
        let Some(loaded) = self.residents.current_mut() else {
            return Err(no_model());
        };
        let switched = catch_unwind(AssertUnwindSafe(|| {
            backend.set_vae(&mut loaded.model, selection)
        }));
        match switched {
            Ok(result) => result?,
            Err(panic) => {
                self.drop_current();
                return Err(Error::Panicked(panic_text(panic.as_ref())));
            }
        }
        loaded.selection = selection.clone();
        loaded.info = selection.describe(backend.native_size(&loaded.model));
        let info = self.note_current().ok_or_else(no_model)?;
        tracing::info!(vae = info.vae_name, checkpoint = info.title, "VAE loaded");
        Ok(info)
    }

    /// Lets go of a model that is not to be trusted any more.
    fn drop_current(&mut self) {
        self.residents.drop_current();
        self.status.modify(|worker| worker.loaded = None);
    }

    fn unload(&mut self) {
        self.residents.clear();
        self.backend.unload_upscaler();
        crate::trim_memory();
        self.status.modify(|worker| worker.loaded = None);
    }
}

/// What an interrupt before the first picture leaves: the plan, no pictures.
fn nothing_made(request: &GenerateRequest) -> Generated {
    let count = (request.batch_size * request.batch_count) as u64;
    let seed_step = u64::from(request.subseed_strength == 0.0);
    Generated {
        images: Vec::new(),
        seeds: (0..count)
            .map(|i| request.seed.wrapping_add(i * seed_step))
            .collect(),
        subseeds: (0..count)
            .map(|i| request.subseed.wrapping_add(i))
            .collect(),
        extra_params: crate::imaging::infotext::Params::default(),
        timings: Timings::default(),
        interrupted: true,
        inpainting_conditioning: false,
        comments: Vec::new(),
    }
}

/// A load that worked and left nothing.
fn no_model() -> Error {
    Error::Panicked("no model after a successful load".into())
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".into())
}

/// Publishes a job's progress and passes on what its watchers want.
struct JobObserver<'a> {
    status: &'a Publisher,
    state: &'a watch::Sender<JobState>,
    cancel: &'a CancelToken,
    previews: &'a PreviewSlot,
    preview_every: usize,
    clock: StepClock,
}

impl Observer for JobObserver<'_> {
    fn control(&self) -> Control {
        self.cancel.take()
    }

    fn progress(&self, progress: Progress) {
        self.clock.at(progress.step);
        self.state.send_replace(JobState::Running(progress));
        self.status.modify(|worker| worker.progress = progress);
    }

    fn wants_preview(&self) -> bool {
        let step = self.status.read(|worker| worker.progress.step);
        !matches!(self.preview_every, 0 | PREVIEW_BATCHES)
            && step.is_multiple_of(self.preview_every)
            && self.previews.is_due()
    }

    fn wants_finished(&self) -> bool {
        self.preview_every == PREVIEW_BATCHES && self.previews.is_due()
    }

    fn preview(&self, image: image::RgbImage) {
        metrics::PREVIEWS.increment();
        self.previews.put(image);
    }
}
