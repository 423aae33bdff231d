//! Starting the device threads, and their end: one thread for each device, all before one line.
//!
//! Invariants: either every device opens or no thread stays; a thread that ends, in order or by a panic outside of any job, is
//! known to the line and to the status, and what only it could have answered is refused; the others go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tokio::sync::watch;

use super::{Command, Worker, panic_text};
use crate::engine::Error;
use crate::engine::backend::{Backend, DeviceInfo};
use crate::engine::previews::PreviewSlot;
use crate::engine::queue::Queue;
use crate::engine::residents::{ModelLimits, Residents};
use crate::engine::status::{Publisher, Service, Status};

/// What the device threads have in common with the handles.
pub(in crate::engine) struct Shared {
    pub(in crate::engine) queue: Arc<Queue<Command>>,
    pub(in crate::engine) status: watch::Sender<Status>,
    /// One for each thread.
    pub(in crate::engine) previews: Vec<Arc<PreviewSlot>>,
    pub(in crate::engine) model_limits: Arc<Mutex<ModelLimits>>,
}

/// A device thread that may still be opening its device.
struct Opening {
    thread: JoinHandle<()>,
    answer: Receiver<Result<DeviceInfo, Error>>,
}

/// Starts a thread for each of `makers` at the same time and waits until all devices are open.
///
/// # Errors
/// The first device that cannot be used.
pub(in crate::engine) fn spawn<B: Backend, M>(
    shared: &Shared,
    makers: Vec<M>,
) -> Result<Vec<(JoinHandle<()>, DeviceInfo)>, Error>
where
    M: FnOnce() -> Result<B, Error> + Send + 'static,
{
    let mut opening = Vec::new();
    let mut failed = None;
    for (number, make) in makers.into_iter().enumerate() {
        match open(shared, number, make) {
            Ok(one) => opening.push(one),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    let mut opened = Vec::new();
    for Opening { thread, answer } in opening {
        let lost = || failure("the device thread ended while opening the device".into());
        match answer.recv().unwrap_or_else(|_| Err(lost())) {
            Ok(device) => opened.push((thread, device)),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    let Some(error) = failed else {
        return Ok(opened);
    };
    drop(shared.queue.close());
    for (thread, _) in opened {
        // The thread catches its panics.
        let _ = thread.join();
    }
    Err(error)
}

fn failure(reason: String) -> Error {
    Error::Device {
        device: "thread".into(),
        reason,
    }
}

fn open<B: Backend>(
    shared: &Shared,
    number: usize,
    make: impl FnOnce() -> Result<B, Error> + Send + 'static,
) -> Result<Opening, Error> {
    let (opened, answer) = channel();
    let queue = shared.queue.clone();
    let publisher = Publisher::new(shared.status.clone(), number);
    let previews = shared.previews[number].clone();
    let model_limits = shared.model_limits.clone();
    let body = move || {
        let backend = match make() {
            Ok(backend) => backend,
            Err(error) => return drop(opened.send(Err(error))),
        };
        let (device, free_memory) = (backend.device(), backend.free_memory());
        publisher.modify(|worker| {
            worker.device.clone_from(&device.device);
            worker.free_memory = free_memory;
        });
        let _ = opened.send(Ok(device));
        let status = publisher.clone();
        let worker = Worker {
            backend,
            status: publisher,
            previews,
            model_limits,
            residents: Residents::default(),
            faults: 0,
        };
        // A job's panics end in its answer; this one is of the work between jobs.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| worker.run(&queue))) {
            let reason = panic_text(panic.as_ref());
            tracing::error!(worker = number, reason, "a device thread crashed");
        }
        for command in queue.leave(number) {
            command.refuse();
        }
        status.modify(|worker| {
            worker.running = None;
            worker.loading = None;
            worker.loaded = None;
            worker.service = Service::Stopped;
        });
    };
    let thread = std::thread::Builder::new()
        .name(format!("device-{number}"))
        .spawn(body)
        .map_err(|error| failure(error.to_string()))?;
    Ok(Opening { thread, answer })
}
