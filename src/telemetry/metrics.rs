//! Counters and histograms of this process, and their Prometheus text.
//!
//! Counting is one or two atomic additions, for HTTP requests a short lock as well; label values come from fixed sets (routes,
//! methods, statuses, results), so memory is bounded. Values are of the whole process and only ever grow. Format: Prometheus
//! text exposition 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::metric;

/// Most upper bounds of a histogram.
const BOUNDS: usize = 12;

/// Seconds of a denoising step.
pub static STEP_SECONDS: Histogram = Histogram::new(&[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
]);
/// Seconds of a checkpoint load.
pub static MODEL_LOAD_SECONDS: Histogram = Histogram::new(&[
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0,
]);
/// Previews made.
pub static PREVIEWS: Counter = Counter::new();

static JOBS: [Counter; 4] = [const { Counter::new() }; 4];
static WEBHOOKS: [Counter; 2] = [const { Counter::new() }; 2];
static HTTP: Mutex<BTreeMap<String, Route>> = Mutex::new(BTreeMap::new());

const HTTP_BOUNDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0,
];

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobResult {
    /// Its pictures were made.
    Done,
    /// It failed.
    Failed,
    /// It was told to end before its last step.
    Interrupted,
    /// Its client left while it was in line.
    Abandoned,
}

impl JobResult {
    /// By whether the job was interrupted; `None` for one that failed.
    #[must_use]
    pub fn of(interrupted: Option<bool>) -> Self {
        match interrupted {
            Some(true) => Self::Interrupted,
            Some(false) => Self::Done,
            None => Self::Failed,
        }
    }
}

const RESULTS: [(JobResult, &str); 4] = [
    (JobResult::Done, "done"),
    (JobResult::Failed, "failed"),
    (JobResult::Interrupted, "interrupted"),
    (JobResult::Abandoned, "abandoned"),
];

/// Whether a webhook was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// With 2xx.
    Done,
    /// Not, or with something else.
    Failed,
}

/// A number that grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more.
    pub fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Durations sorted into buckets.
#[derive(Debug)]
pub struct Histogram {
    /// Rising upper bounds, seconds.
    bounds: &'static [f64],
    /// One for each bound, and one for what is above all.
    counts: [AtomicU64; BOUNDS + 1],
    microseconds: AtomicU64,
}

impl Histogram {
    const fn new(bounds: &'static [f64]) -> Self {
        assert!(bounds.len() <= BOUNDS, "a const block has fewer bounds");
        Self {
            bounds,
            counts: [const { AtomicU64::new(0) }; BOUNDS + 1],
            microseconds: AtomicU64::new(0),
        }
    }

    /// Adds a duration.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.microseconds.fetch_add(micros, Ordering::Relaxed);
    }

    /// Its lines; `labels` is empty or ends with a comma.
    fn write(&self, out: &mut String, name: &str, labels: &str) {
        let mut below = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            below += count.load(Ordering::Relaxed);
            line(
                out,
                &format!("{name}_bucket{{{labels}le=\"{bound}\"}}"),
                below,
            );
        }
        below += self.counts[self.bounds.len()].load(Ordering::Relaxed);
        line(out, &format!("{name}_bucket{{{labels}le=\"+Inf\"}}"), below);
        let labels = match labels.trim_end_matches(',') {
            "" => String::new(),
            labels => format!("{{{labels}}}"),
        };
        let seconds = self.microseconds.load(Ordering::Relaxed) as f64 / 1e6;
        line(out, &format!("{name}_sum{labels}"), seconds);
        line(out, &format!("{name}_count{labels}"), below);
    }
}

/// What one route has answered.
#[derive(Debug, Default)]
struct Route {
    answers: BTreeMap<(&'static str, u16), u64>,
    seconds: BTreeMap<&'static str, Histogram>,
}

/// Times the steps of a job, from one report of progress to the next.
#[derive(Debug)]
pub struct StepClock(Mutex<(Instant, usize)>);

impl Default for StepClock {
    fn default() -> Self {
        Self(Mutex::new((Instant::now(), 0)))
    }
}

impl StepClock {
    /// `step` steps of the batch are done. The first of a batch is not counted: what comes before it is no step.
    pub fn at(&self, step: usize) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if last.1 > 0 && step == last.1 + 1 {
            STEP_SECONDS.observe(now - last.0);
        }
        *last = (now, step);
    }
}

/// Counts an ended job.
pub fn job_ended(result: JobResult) {
    let place = RESULTS.iter().position(|(known, _)| *known == result);
    JOBS[place.unwrap_or(0)].increment();
}

/// Counts an attempt to deliver a webhook.
pub fn webhook_sent(delivery: Delivery) {
    WEBHOOKS[usize::from(delivery == Delivery::Failed)].increment();
}

/// Counts an answered request. `route` is the pattern that its path has matched, never the path itself.
pub fn http_answered(method: &str, route: &str, status: u16, took: Duration) {
    let method = METHODS
        .iter()
        .find(|known| **known == method)
        .map_or("OTHER", |known| *known);
    let mut routes = HTTP.lock().unwrap_or_else(PoisonError::into_inner);
    if !routes.contains_key(route) {
        routes.insert(route.to_string(), Route::default());
    }
    if let Some(route) = routes.get_mut(route) {
        *route.answers.entry((method, status)).or_default() += 1;
        let seconds = route.seconds.entry(method);
        seconds
            .or_insert_with(|| Histogram::new(HTTP_BOUNDS))
            .observe(took);
    }
}

const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// What is so at the moment of asking.
#[derive(Debug, Clone, Default)]
pub struct Gauges {
    /// Jobs in line.
    pub queue_length: usize,
    /// Bytes in use on the device, if it can be told.
    pub device_memory_bytes: Option<u64>,
    /// Each device by itself.
    pub devices: Vec<DeviceGauges>,
}

/// One device at the moment of asking.
#[derive(Debug, Clone, Default)]
pub struct DeviceGauges {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// A job runs on it.
    pub is_running: bool,
    /// It takes jobs.
    pub is_in_service: bool,
    /// Jobs that have ended on it.
    pub ended: u64,
    /// Bytes that could be allocated when the last of them ended, if it can be told.
    pub free_memory_bytes: Option<u64>,
}

/// All metrics as Prometheus text.
#[must_use]
pub fn render(gauges: &Gauges) -> String {
    let mut out = String::with_capacity(16 << 10);
    head(&mut out, metric::JOBS_TOTAL, "counter", "Jobs ended.");
    for ((_, result), counter) in RESULTS.iter().zip(&JOBS) {
        let name = format!("{}{{result=\"{result}\"}}", metric::JOBS_TOTAL);
        line(&mut out, &name, counter.get());
    }
    let help = "Jobs waiting.";
    gauge(
        &mut out,
        metric::QUEUE_LENGTH,
        help,
        gauges.queue_length as u64,
    );
    histogram(
        &mut out,
        metric::STEP_SECONDS,
        "Seconds of one denoising step.",
        &STEP_SECONDS,
    );
    let help = "Seconds of one checkpoint load.";
    histogram(
        &mut out,
        metric::MODEL_LOAD_SECONDS,
        help,
        &MODEL_LOAD_SECONDS,
    );
    if let Some(bytes) = gauges.device_memory_bytes {
        gauge(
            &mut out,
            metric::DEVICE_MEMORY_BYTES,
            "Bytes in use on the device.",
            bytes,
        );
    }
    devices(&mut out, &gauges.devices);
    if let Some(bytes) = super::resident_memory_bytes() {
        gauge(
            &mut out,
            metric::MEMORY_BYTES,
            "Resident bytes of the process.",
            bytes,
        );
    }
    sent(&mut out);
    http(&mut out);
    out
}

/// What each device does.
fn devices(out: &mut String, devices: &[DeviceGauges]) {
    type Value = fn(&DeviceGauges) -> Option<u64>;
    let families: [(&str, &str, &str, Value); 4] = [
        (
            metric::DEVICE_JOBS_TOTAL,
            "counter",
            "Jobs ended on a device.",
            |one| Some(one.ended),
        ),
        (
            metric::DEVICE_RUNNING,
            "gauge",
            "Whether a device runs a job.",
            |one| Some(one.is_running.into()),
        ),
        (
            metric::DEVICE_IN_SERVICE,
            "gauge",
            "Whether a device takes jobs.",
            |one| Some(one.is_in_service.into()),
        ),
        (
            metric::DEVICE_FREE_MEMORY_BYTES,
            "gauge",
            "Bytes free on a device after its last job.",
            |one| one.free_memory_bytes,
        ),
    ];
    for (name, kind, help, value) in families {
        head(out, name, kind, help);
        for one in devices {
            if let Some(value) = value(one) {
                line(out, &format!("{name}{{device=\"{}\"}}", one.device), value);
            }
        }
    }
}

/// Previews and webhooks.
fn sent(out: &mut String) {
    head(out, metric::PREVIEWS_TOTAL, "counter", "Previews made.");
    line(out, metric::PREVIEWS_TOTAL, PREVIEWS.get());
    let help = "Attempts to deliver a webhook.";
    head(out, metric::WEBHOOKS_TOTAL, "counter", help);
    for (result, counter) in ["done", "failed"].iter().zip(&WEBHOOKS) {
        let name = format!("{}{{result=\"{result}\"}}", metric::WEBHOOKS_TOTAL);
        line(out, &name, counter.get());
    }
}

fn http(out: &mut String) {
    let routes = HTTP.lock().unwrap_or_else(PoisonError::into_inner);
    head(
        out,
        metric::HTTP_REQUESTS_TOTAL,
        "counter",
        "Requests answered.",
    );
    for (path, route) in &*routes {
        for ((method, status), count) in &route.answers {
            let labels = format!("method=\"{method}\",route=\"{path}\",status=\"{status}\"");
            line(
                out,
                &format!("{}{{{labels}}}", metric::HTTP_REQUESTS_TOTAL),
                count,
            );
        }
    }
    let help = "Seconds from a request's head to its answer's.";
    head(out, metric::HTTP_REQUEST_SECONDS, "histogram", help);
    for (path, route) in &*routes {
        for (method, seconds) in &route.seconds {
            let labels = format!("method=\"{method}\",route=\"{path}\",");
            seconds.write(out, metric::HTTP_REQUEST_SECONDS, &labels);
        }
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a `String` cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, series: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "{series} {value}");
}

fn gauge(out: &mut String, name: &str, help: &str, value: u64) {
    head(out, name, "gauge", help);
    line(out, name, value);
}

fn histogram(out: &mut String, name: &str, help: &str, histogram: &Histogram) {
    head(out, name, "histogram", help);
    histogram.write(out, name, "");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_is_not_above_its_bound() {
        let histogram = Histogram::new(&[0.1, 1.0]);
        for millis in [50, 100, 101, 5000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = String::new();
        histogram.write(&mut text, "x", "a=\"b\",");
        let expected = "x_bucket{a=\"b\",le=\"0.1\"} 2\nx_bucket{a=\"b\",le=\"1\"} 3\nx_bucket{a=\"b\",le=\"+Inf\"} 4\n\
                        x_sum{a=\"b\"} 5.251\nx_count{a=\"b\"} 4\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn methods_that_nobody_knows_share_a_label() {
        http_answered("BREW", "/test/other", 405, Duration::ZERO);
        http_answered("GRIND", "/test/other", 405, Duration::ZERO);
        let text = render(&Gauges::default());
        let expected =
            "sdgen_http_requests_total{method=\"OTHER\",route=\"/test/other\",status=\"405\"} 2";
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains("sdgen_device_memory_bytes"));
    }
    #[test]
    fn each_device_has_its_own_series() {
        let device = |device: &str, ended| DeviceGauges {
            device: device.into(),
            ended,
            is_in_service: true,
            ..DeviceGauges::default()
        };
        let text = render(&Gauges {
            devices: vec![device("cuda:0", 3), device("cuda:1", 4)],
            ..Gauges::default()
        });
        for line in [
            "sdgen_device_jobs_total{device=\"cuda:0\"} 3",
            "sdgen_device_jobs_total{device=\"cuda:1\"} 4",
            "sdgen_device_running{device=\"cuda:1\"} 0",
            "sdgen_device_in_service{device=\"cuda:0\"} 1",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line}: {text}");
        }
        assert!(!text.contains("sdgen_device_free_memory_bytes{"));
    }
}
