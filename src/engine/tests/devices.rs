//! Several devices before one line: who works on what, and what a failing one does to the others.

use super::*;

impl Bench {
    /// Waits until so many devices wait for work.
    async fn until_free(&self, count: usize) {
        while self.engine.shared.to_workers.queue.free_workers() < count {
            tokio::task::yield_now().await;
        }
    }

    async fn submit(&self, prompt: &str, model: &str, client: &str) -> super::super::JobHandle {
        let job = Job {
            id: format!("task({client}-{prompt})"),
            client: client.into(),
            model: self.model(model),
            ..self.job(prompt)
        };
        self.engine.submit(job).await.unwrap()
    }

    /// The device that makes a quick picture while all `free` devices wait for work.
    async fn device_of(&self, model: &str, free: usize) -> String {
        self.until_free(free).await;
        let mut job = self.submit("ok", model, "").await;
        job.finished().await.unwrap().device
    }

    fn loads(&self) -> usize {
        self.loads.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn devices_work_at_the_same_time_and_an_interrupt_ends_the_clients_own_job() {
    let bench = Bench::with_devices(8, 2);
    let names: Vec<_> = bench
        .engine
        .devices()
        .iter()
        .map(|one| &one.device)
        .collect();
    assert_eq!(names, ["cuda:0", "cuda:1"]);
    bench.until_free(2).await;
    let mut first = bench.submit("wait", "a", "ann").await;
    first.started().await;
    let mut second = bench.submit("wait", "a", "bob").await;
    second.started().await;
    let status = bench.engine.status();
    let of = |id| status.of_job(id).map(|worker| worker.device.as_str());
    assert_eq!(
        of("task(ann-wait)"),
        Some("cuda:0"),
        "the first of two empty ones"
    );
    assert_eq!(
        of("task(bob-wait)"),
        Some("cuda:1"),
        "nothing waits for a busy one"
    );
    assert_eq!(status.shown("eve").device, "cuda:0", "the oldest");
    let third = bench.submit("ok", "a", "ann").await;
    assert_eq!(bench.engine.pending(), [third.id.as_str()]);

    bench.engine.interrupt("bob");
    bench.steps[0].send(()).unwrap();
    let outcome = second.finished().await.unwrap();
    assert!(outcome.generated.interrupted && outcome.device == "cuda:1");
    let flags = bench.engine.status().workers;
    assert!(!flags[0].interrupted, "the other job goes on");
    bench.engine.interrupt("eve");
    bench.step.send(()).unwrap();
    assert!(first.finished().await.unwrap().generated.interrupted);
    assert_eq!(bench.loads(), 2);
}

#[tokio::test]
async fn a_job_goes_where_its_checkpoint_is() {
    let bench = Bench::with_devices(8, 2);
    for _ in 0..3 {
        assert_eq!(bench.device_of("a", 2).await, "cuda:0");
        assert_eq!(
            bench.device_of("b", 2).await,
            "cuda:1",
            "rather than to let `a` go"
        );
    }
    assert_eq!(bench.loads(), 2);
    bench.engine.unload().await.unwrap();
    assert!(!bench.engine.status().is_loaded(), "on no device");
    assert_eq!(bench.device_of("b", 2).await, "cuda:0");
}

#[tokio::test]
async fn what_waits_is_taken_by_the_device_that_has_its_checkpoint() {
    let bench = Bench::with_devices(8, 2);
    bench.until_free(2).await;
    let mut busy = [
        bench.submit("wait", "a", "ann").await,
        bench.submit("wait", "b", "bob").await,
    ];
    for job in &mut busy {
        job.started().await;
    }
    let device = |id: &str| bench.engine.status().of_job(id).unwrap().number;
    let (on_a, on_b) = (device("task(ann-wait)"), device("task(bob-wait)"));
    let mut waiting_b = bench.submit("ok", "b", "eve").await;
    let mut waiting_a = bench.submit("ok", "a", "eve").await;
    busy[0].cancel.interrupt();
    let senders = [&bench.step, &bench.steps[0]];
    senders[on_a].send(()).unwrap();
    let names = ["cuda:0", "cuda:1"];
    let outcome = waiting_a.finished().await.unwrap();
    assert_eq!(outcome.device, names[on_a], "though it came later");
    busy[1].cancel.interrupt();
    senders[on_b].send(()).unwrap();
    waiting_b.finished().await.unwrap();
}

#[tokio::test]
async fn a_device_that_keeps_failing_leaves_the_line_to_the_others() {
    let bench = Bench::with_devices(8, 2);
    for _ in 0..3 {
        bench.until_free(2).await;
        let mut job = bench.submit("fault", "a", "").await;
        let error = job.finished().await.unwrap_err();
        assert_eq!(error.to_string(), "tensor operation failed");
    }
    for _ in 0..2 {
        assert_eq!(bench.device_of("a", 2).await, "cuda:1");
    }
    assert!(bench.status().activity() == "resting");
    assert_eq!(bench.engine.status().workers[0].ended, 3);

    let alone = Bench::new(8);
    for _ in 0..4 {
        assert!(alone.run("fault").await.is_err());
    }
    assert!(alone.run("ok").await.is_ok(), "the only one works on");
    alone.until_free(1).await;
    assert!(alone.status().activity() == "idle", "a success ends it");
}

#[tokio::test]
async fn a_thread_that_crashes_does_not_take_the_others_down() {
    let bench = Bench::with_devices(8, 2);
    bench.until_free(2).await;
    let mut job = bench.submit("crash", "a", "").await;
    let error = job.finished().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the job crashed: its device thread has ended"
    );
    let mut status = bench.engine.watch();
    status
        .wait_for(|status| status.workers[0].is_stopped())
        .await
        .unwrap();
    assert_eq!(bench.device_of("a", 1).await, "cuda:1");
    bench.engine.unload().await.unwrap();

    let mut last = bench.submit("crash", "a", "").await;
    assert!(last.finished().await.is_err());
    status
        .wait_for(super::super::Status::is_stopped)
        .await
        .unwrap();
    let late = bench.engine.submit(bench.job("ok")).await;
    assert!(matches!(late, Err(Error::ShuttingDown)));
}

#[tokio::test]
async fn shutting_down_interrupts_all_devices() {
    let bench = Bench::with_devices(8, 2);
    bench.until_free(2).await;
    let mut first = bench.submit("wait", "a", "").await;
    let mut second = bench.submit("wait", "b", "").await;
    first.started().await;
    second.started().await;
    let engine = bench.engine.clone();
    let shutdown = tokio::spawn(async move { engine.shut_down(Duration::ZERO).await });
    let mut status = bench.engine.watch();
    let all = |status: &super::super::Status| status.workers.iter().all(|one| one.interrupted);
    status.wait_for(all).await.unwrap();
    bench.step.send(()).unwrap();
    bench.steps[0].send(()).unwrap();
    assert!(first.finished().await.unwrap().generated.interrupted);
    assert!(second.finished().await.unwrap().generated.interrupted);
    shutdown.await.unwrap();
    assert!(bench.engine.status().is_stopped());
}

#[tokio::test]
async fn the_next_job_does_not_wait_for_the_pictures_of_the_last_to_be_taken() {
    let bench = Bench::new(1);
    let mut first = bench.submit("ok", "a", "ann").await;
    // There is one place: it is free again although nobody has asked for the first one's pictures.
    let mut second = bench.submit("ok", "a", "ann").await;
    assert!(second.finished().await.is_ok());
    assert!(first.finished().await.is_ok());
}

#[test]
fn a_device_that_cannot_be_opened_ends_the_start_and_leaves_no_thread() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        data_dir: dir.path().to_path_buf(),
        ..Config::default()
    };
    let loads = Arc::new(AtomicUsize::new(0));
    let maker = |number: usize| {
        let loads = loads.clone();
        move || match number {
            1 => Err(Error::Device {
                device: "cuda:1".into(),
                reason: "it is on fire".into(),
            }),
            _ => Ok(Scripted {
                device: "cuda".into(),
                loads,
                crashes: false,
                steps: Mutex::new(channel().1),
            }),
        }
    };
    let start = |devices: usize| {
        Engine::start(Catalog::open(&config), 1, (0..devices).map(maker)).map(drop)
    };
    let error = start(3).unwrap_err();
    assert_eq!(
        error.to_string(),
        "device not available: `cuda:1`; it is on fire"
    );
    assert_eq!(Arc::strong_count(&loads), 1);
    assert!(start(1).is_ok());
    assert!(matches!(start(0), Err(Error::Device { .. })));
}
