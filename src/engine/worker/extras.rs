//! Extras jobs on the device thread: pictures enlarged, with no checkpoint needed and none dropped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::{JobObserver, QueuedExtras, Worker, panic_text};
use crate::engine::backend::Backend;
use crate::engine::status::Running;
use crate::engine::{Error, JobState};
use crate::pipeline::{Extras, Progress};
use crate::telemetry::metrics::{self, JobResult, StepClock};

impl<B: Backend> Worker<B> {
    pub(super) fn extras(&mut self, queued: QueuedExtras) {
        let span = queued.span.clone();
        let _entered = span.enter();
        let started = Instant::now();
        let running = Running {
            id: queued.job.id.clone(),
            client: queued.job.client.clone(),
            kind: "extras",
            started,
            cancel: queued.cancel.clone(),
        };
        let first = Progress {
            step: 0,
            steps: 1,
            batch: 0,
            batches: queued.job.request.pictures.len(),
        };
        self.previews.clear();
        self.status.begin(running, first.batches, first.steps);
        queued.state.send_replace(JobState::Running(first));
        let result = self.upscale(&queued);
        self.note_fault(&result);
        self.status.end(self.backend.free_memory());
        let interrupted = result.as_ref().map(|extras| extras.interrupted);
        metrics::job_ended(JobResult::of(interrupted.ok()));
        let seconds = started.elapsed().as_secs_f64();
        match &result {
            Ok(extras) => tracing::info!(
                job = queued.job.id,
                images = extras.pictures.len(),
                interrupted = extras.interrupted,
                seconds,
                "upscaled"
            ),
            Err(error) => tracing::error!(job = queued.job.id, %error, seconds, "job failed"),
        }
        queued.answer(result);
    }

    fn upscale(&mut self, queued: &QueuedExtras) -> Result<Extras, Error> {
        let observer = JobObserver {
            status: &self.status,
            state: &queued.state,
            cancel: &queued.cancel,
            previews: &self.previews,
            preview_every: 0,
            clock: StepClock::default(),
        };
        let (backend, request) = (&mut self.backend, &queued.job.request);
        let result = catch_unwind(AssertUnwindSafe(|| backend.upscale(request, &observer)));
        crate::trim_memory();
        match result {
            Ok(result) => Ok(result?),
            Err(panic) => {
                self.backend.unload_upscaler();
                Err(Error::Panicked(panic_text(panic.as_ref())))
            }
        }
    }
}
