//! The engine over a back end that fails, panics and waits on command: what the real one does not do when asked.

mod devices;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::backend::{Backend, DeviceInfo};
use super::checkpoint::{Selection, VaeChoice};
use super::models::Catalog;
use super::residents::ModelLimits;
use super::status::WorkerStatus;
use super::{Engine, Error, ExtrasJob, Job, JobState, Outcome};
use crate::config::Config;
use crate::pipeline::{
    self, Control, Extras, ExtrasRequest, ExtrasSize, GenerateRequest, Generated, Observer,
    PictureUpscaler, Progress, Timings,
};

/// What the back end does with a job is written in its prompt: `panic`, `fail`, `fault` (of the device), `crash` (of the thread,
/// after the job), `wait`, or anything else for a quick success.
struct Scripted {
    device: String,
    loads: Arc<AtomicUsize>,
    crashes: bool,
    /// A `wait` job takes one step for each message.
    steps: Mutex<Receiver<()>>,
}

impl Backend for Scripted {
    fn upscale(
        &mut self,
        request: &ExtrasRequest,
        _: &dyn Observer,
    ) -> Result<Extras, pipeline::Error> {
        match request.upscaler.label() {
            "Nearest" => panic!("no such pixel"),
            _ => Ok(Extras::default()),
        }
    }

    fn unload_upscaler(&mut self) {}

    type Model = String;

    fn device(&self) -> DeviceInfo {
        DeviceInfo {
            device: self.device.clone(),
            dtype: "f32",
            memory: None,
        }
    }

    fn estimate(&self, _: &Selection) -> Result<u64, pipeline::Error> {
        Ok(1)
    }

    fn free_memory(&self) -> Option<u64> {
        assert!(!self.crashes, "no such device");
        None
    }

    fn load(&mut self, model: &Selection) -> Result<String, pipeline::Error> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        match model.identity.name.as_str() {
            "broken" => Err(pipeline::Error::Invalid("broken".into())),
            "explosive" => panic!("loading exploded"),
            name => Ok(name.to_string()),
        }
    }

    fn set_vae(&mut self, loaded: &mut String, model: &Selection) -> Result<(), pipeline::Error> {
        let vae = model.vae.as_ref().map_or("own", |vae| &vae.shorthash);
        if vae == "broken" {
            return Err(pipeline::Error::Invalid("broken VAE".into()));
        }
        loaded.push('+');
        loaded.push_str(vae);
        Ok(())
    }

    fn native_size(&self, _: &String) -> (usize, usize) {
        (64, 32)
    }

    fn generate(
        &mut self,
        _: &mut String,
        request: &GenerateRequest,
        observer: &dyn Observer,
    ) -> Result<Generated, pipeline::Error> {
        let mut interrupted = false;
        match request.prompt.as_str() {
            "panic" => panic!("no such tensor"),
            "crash" => self.crashes = true,
            "fault" => return Err(candle_core::Error::msg("illegal address").into()),
            "fail" => return Err(pipeline::Error::NotANumber { stage: "Unet" }),
            "wait" => {
                let steps = self.steps.lock().unwrap();
                for step in 1.. {
                    interrupted = observer.control() == Control::Interrupt;
                    if interrupted || steps.recv().is_err() {
                        break;
                    }
                    observer.progress(Progress {
                        step,
                        steps: 100,
                        batch: 0,
                        batches: 1,
                    });
                }
            }
            _ => {}
        }
        if interrupted && request.negative_prompt == "nothing made" {
            return Err(pipeline::Error::Interrupted);
        }
        Ok(Generated {
            images: Vec::new(),
            seeds: vec![request.seed],
            subseeds: vec![0],
            extra_params: crate::imaging::infotext::Params::default(),
            timings: Timings::default(),
            interrupted,
            inpainting_conditioning: false,
            comments: Vec::new(),
        })
    }
}

struct Bench {
    engine: Engine,
    loads: Arc<AtomicUsize>,
    /// Of the first device.
    step: Sender<()>,
    /// Of the others.
    steps: Vec<Sender<()>>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(queue_limit: usize) -> Self {
        Self::with_devices(queue_limit, 1)
    }

    fn with_devices(queue_limit: usize, devices: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().to_path_buf(),
            ..Config::default()
        };
        let loads = Arc::new(AtomicUsize::new(0));
        let (mut senders, mut makers) = (Vec::new(), Vec::new());
        for number in 0..devices {
            let (step, steps) = channel();
            senders.push(step);
            let backend = Scripted {
                device: format!("cuda:{number}"),
                loads: loads.clone(),
                crashes: false,
                steps: Mutex::new(steps),
            };
            makers.push(move || Ok(backend));
        }
        Self {
            engine: Engine::start(Catalog::open(&config), queue_limit, makers).unwrap(),
            loads,
            step: senders.remove(0),
            steps: senders,
            _dir: dir,
        }
    }

    /// What the first device does.
    fn status(&self) -> WorkerStatus {
        self.engine.status().workers.swap_remove(0)
    }

    fn model(&self, name: &str) -> Selection {
        let catalog = self.engine.catalog();
        let mut selection = catalog
            .select(catalog.default_checkpoint(), &VaeChoice::Own)
            .unwrap();
        selection.identity.name = name.into();
        selection.title = name.into();
        selection.sha256 = name.into();
        selection
    }

    fn job(&self, prompt: &str) -> Job {
        let request = GenerateRequest {
            prompt: prompt.into(),
            seed: 1,
            subseed: 1,
            steps: 100,
            cfg_scale: 1.0,
            width: 64,
            height: 64,
            noise_source: crate::rng::NoiseSource::Cpu,
            ..GenerateRequest::default()
        };
        Job {
            id: format!("task({prompt})"),
            client: String::new(),
            kind: "txt2img",
            model: self.model("good"),
            request,
            preview_every: 0,
        }
    }

    async fn run(&self, prompt: &str) -> Result<Outcome, Error> {
        self.engine.submit(self.job(prompt)).await?.finished().await
    }
}

#[tokio::test]
async fn a_panicking_or_failing_job_answers_and_the_next_one_works() {
    let bench = Bench::new(4);
    let error = bench.run("panic").await.unwrap_err();
    assert_eq!(error.to_string(), "the job crashed: no such tensor");
    assert!(
        bench.status().loaded.is_none(),
        "a model that panicked is not trusted"
    );
    assert!(bench.run("ok").await.is_ok());
    assert_eq!(bench.loads.load(Ordering::Relaxed), 2);
    assert!(matches!(
        bench.run("fail").await,
        Err(Error::Pipeline(pipeline::Error::NotANumber {
            stage: "Unet"
        }))
    ));
    assert!(bench.run("ok").await.is_ok());
    assert_eq!(
        bench.loads.load(Ordering::Relaxed),
        2,
        "a failed job does not cost its model"
    );
    assert_eq!(
        bench.engine.status().finished,
        ["task(panic)", "task(ok)", "task(fail)", "task(ok)"]
    );
}

#[tokio::test]
async fn a_failed_load_leaves_the_previous_model() {
    let bench = Bench::new(4);
    let loaded = bench.engine.load(bench.model("good")).await.unwrap();
    assert_eq!(
        (loaded.title.as_str(), loaded.native_size),
        ("good", (64, 32))
    );
    for (name, message) in [
        ("broken", "broken"),
        ("explosive", "the job crashed: loading exploded"),
    ] {
        assert_eq!(
            bench
                .engine
                .load(bench.model(name))
                .await
                .unwrap_err()
                .to_string(),
            message
        );
        assert_eq!(bench.status().loaded.unwrap().title, "good");
    }
    assert!(bench.run("ok").await.is_ok());
    assert_eq!(
        bench.loads.load(Ordering::Relaxed),
        3,
        "the model was still there"
    );
    bench.engine.unload().await.unwrap();
    assert!(bench.status().loaded.is_none());
    assert!(bench.run("ok").await.is_ok());
}

#[tokio::test]
async fn interrupt_ends_the_running_job_only() {
    let bench = Bench::new(4);
    bench.engine.interrupt("");
    let mut running = bench.engine.submit(bench.job("wait")).await.unwrap();
    let mut queued = bench.engine.submit(bench.job("ok")).await.unwrap();
    running.started().await;
    bench.step.send(()).unwrap();
    let at = Progress {
        step: 1,
        steps: 100,
        batch: 0,
        batches: 1,
    };
    running
        .progress
        .wait_for(|state| *state == JobState::Running(at))
        .await
        .unwrap();
    assert_eq!(bench.engine.pending(), ["task(ok)"]);
    bench.engine.interrupt("");
    bench.step.send(()).unwrap();
    let outcome = running.finished().await.unwrap();
    assert!(outcome.generated.interrupted && outcome.finished_batches == 0);
    assert!(!queued.finished().await.unwrap().generated.interrupted);
    assert!(
        !bench.status().interrupted,
        "the flag belongs to the last job"
    );
}

#[tokio::test]
async fn an_interrupt_before_the_first_picture_is_an_answer_with_the_plan() {
    let bench = Bench::new(4);
    let mut job = bench.job("wait");
    job.request.negative_prompt = "nothing made".into();
    job.request.batch_count = 3;
    let mut handle = bench.engine.submit(job).await.unwrap();
    handle.started().await;
    handle.cancel.interrupt();
    bench.step.send(()).unwrap();
    let outcome = handle.finished().await.unwrap();
    assert_eq!(
        (outcome.generated.seeds, outcome.generated.images.len()),
        (vec![1, 2, 3], 0)
    );
}

#[tokio::test]
async fn a_handle_that_is_dropped_takes_its_queued_job_along() {
    let bench = Bench::new(2);
    let mut running = bench.engine.submit(bench.job("wait")).await.unwrap();
    running.started().await;
    let queued = bench.engine.submit(bench.job("ok")).await.unwrap();
    assert!(matches!(
        bench.engine.try_submit(bench.job("ok")),
        Err(Error::QueueFull { limit: 2 })
    ));
    drop(queued);
    assert!(bench.engine.pending().is_empty());
    let mut last = bench.engine.try_submit(bench.job("ok")).unwrap();
    running.cancel.interrupt();
    bench.step.send(()).unwrap();
    assert!(last.finished().await.is_ok());
    assert_eq!(bench.engine.status().finished, ["task(wait)", "task(ok)"]);
}

#[tokio::test]
async fn shutting_down_refuses_the_queue_and_interrupts_after_the_grace_time() {
    let bench = Bench::new(2);
    let mut running = bench.engine.submit(bench.job("wait")).await.unwrap();
    running.started().await;
    let mut queued = bench.engine.submit(bench.job("ok")).await.unwrap();
    let (engine, late) = (bench.engine.clone(), bench.job("late"));
    let waiting =
        tokio::spawn(async move { engine.submit(late).await.map(|handle| handle.id.clone()) });
    while bench.engine.pending().len() < 2 {
        tokio::task::yield_now().await;
    }
    let engine = bench.engine.clone();
    let shutdown = tokio::spawn(async move { engine.shut_down(Duration::from_millis(20)).await });
    assert!(matches!(queued.finished().await, Err(Error::ShuttingDown)));
    assert!(matches!(waiting.await.unwrap(), Err(Error::ShuttingDown)));
    while !bench.status().interrupted {
        tokio::task::yield_now().await;
    }
    bench.step.send(()).unwrap();
    assert!(running.finished().await.unwrap().generated.interrupted);
    shutdown.await.unwrap();
    assert!(bench.engine.status().is_stopped());
    assert!(matches!(
        bench.engine.submit(bench.job("ok")).await,
        Err(Error::ShuttingDown)
    ));
    assert!(matches!(
        bench.engine.unload().await,
        Err(Error::ShuttingDown)
    ));
}

#[tokio::test]
async fn extras_wait_their_turn_load_nothing_and_survive_a_panic() {
    let bench = Bench::new(4);
    let extras = |upscaler| ExtrasJob {
        id: "task(extras)".into(),
        client: String::new(),
        request: ExtrasRequest {
            pictures: Arc::default(),
            size: ExtrasSize::By {
                factor: 2.0,
                longest: 0,
            },
            upscaler,
            second: None,
        },
    };
    let run = async |upscaler| {
        let mut handle = bench.engine.submit_extras(extras(upscaler)).await?;
        handle.finished().await
    };
    let error = run(PictureUpscaler::Nearest).await.unwrap_err();
    assert_eq!(error.to_string(), "the job crashed: no such pixel");
    assert!(!run(PictureUpscaler::Lanczos).await.unwrap().interrupted);
    assert_eq!(bench.loads.load(Ordering::Relaxed), 0);
    assert!(bench.status().loaded.is_none());

    let mut waiting = bench.engine.submit(bench.job("wait")).await.unwrap();
    waiting.started().await;
    let queued = bench.engine.submit_extras(extras(PictureUpscaler::Lanczos));
    let queued = queued.await.unwrap();
    assert_eq!(bench.engine.pending(), ["task(extras)"]);
    drop(queued);
    assert!(bench.engine.pending().is_empty());
    bench.engine.interrupt("");
    bench.step.send(()).unwrap();
    assert!(waiting.finished().await.unwrap().generated.interrupted);
    bench.engine.shut_down(Duration::ZERO).await;
    let refused = bench.engine.submit_extras(extras(PictureUpscaler::Lanczos));
    assert!(matches!(refused.await, Err(Error::ShuttingDown)));
}

#[tokio::test]
async fn as_many_checkpoints_stay_as_may() {
    let bench = Bench::new(4);
    let load = async |name: &str| {
        let loaded = bench.engine.load(bench.model(name)).await.unwrap();
        assert_eq!(bench.status().loaded, Some(loaded));
        bench.loads.load(Ordering::Relaxed)
    };
    let limits = ModelLimits {
        count: 2,
        bytes: None,
    };
    bench.engine.keep_models(limits);
    assert_eq!(
        [load("a").await, load("b").await, load("a").await],
        [1, 2, 2]
    );
    assert_eq!([load("c").await, load("a").await], [3, 3], "`b` went");
    assert_eq!(load("b").await, 4);
    let limits = ModelLimits {
        bytes: Some(1),
        ..limits
    };
    bench.engine.keep_models(limits);
    assert_eq!(
        [load("c").await, load("b").await],
        [5, 6],
        "one byte holds one"
    );
    let error = bench.engine.load(bench.model("broken")).await.unwrap_err();
    assert_eq!(error.to_string(), "broken");
    assert!(bench.status().loaded.is_none(), "its memory was needed");
}

#[tokio::test]
async fn another_vae_does_not_load_the_checkpoint_again() {
    let bench = Bench::new(4);
    let with_vae = |name: &str| Selection {
        vae: Some(crate::pipeline::VaeIdentity {
            path: format!("{name}.safetensors").into(),
            shorthash: name.into(),
        }),
        ..bench.model("good")
    };
    bench.engine.load(bench.model("good")).await.unwrap();
    let loaded = bench.engine.load(with_vae("fine")).await.unwrap();
    assert_eq!(loaded.vae_name.as_deref(), Some("fine.safetensors"));
    assert_eq!(bench.status().loaded, Some(loaded.clone()));
    let error = bench.engine.load(with_vae("broken")).await.unwrap_err();
    assert_eq!(error.to_string(), "broken VAE");
    assert_eq!(bench.status().loaded, Some(loaded), "the one before stays");
    let own = bench.engine.load(bench.model("good")).await.unwrap();
    assert_eq!(own.vae_name, None);
    assert_eq!(bench.loads.load(Ordering::Relaxed), 1);
    bench.engine.load(bench.model("other")).await.unwrap();
    assert_eq!(bench.loads.load(Ordering::Relaxed), 2);
}

#[test]
fn previews_are_made_while_watched_and_no_faster_than_the_limit() {
    let slot = super::previews::PreviewSlot::default();
    assert!(!slot.is_due(), "nobody looks");
    assert!(slot.look().is_none());
    assert!(slot.is_due());
    slot.limit(Duration::from_hours(1));
    assert!(slot.is_due(), "the first is due at once");
    slot.put(image::RgbImage::new(1, 1));
    assert!(!slot.is_due(), "the next after the interval");
    slot.limit(Duration::ZERO);
    assert!(slot.is_due());
    assert_eq!(slot.look().map(|preview| preview.id), Some(1));
    slot.limit(Duration::MAX);
    assert!(!slot.is_due());
}
