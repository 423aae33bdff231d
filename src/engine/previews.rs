//! The latest preview of a worker's job, made only while somebody looks and no faster than the limit.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long one look at a preview asks for further previews.
const PREVIEW_INTEREST: Duration = Duration::from_secs(10);

/// A small picture of a running job's state.
#[derive(Debug, Clone)]
pub struct Preview {
    /// Counts up with each new picture.
    pub id: u64,
    /// Pixels.
    pub image: Arc<image::RgbImage>,
}

/// The latest preview, and whether anybody looks.
#[derive(Debug, Default)]
pub struct PreviewSlot(Mutex<PreviewState>);

#[derive(Debug, Default)]
struct PreviewState {
    latest: Option<Preview>,
    next: u64,
    looked: Option<Instant>,
    /// When the latest was made.
    made: Option<Instant>,
    /// Least time between two.
    interval: Duration,
}

impl PreviewSlot {
    /// The latest preview; asks for more of them for a while.
    pub fn look(&self) -> Option<Preview> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.looked = Some(Instant::now());
        state.latest.clone()
    }

    /// Whether a preview is wanted and the one before is old enough.
    pub(super) fn is_due(&self) -> bool {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rested = state.made.is_none_or(|at| at.elapsed() >= state.interval);
        rested
            && state
                .looked
                .is_some_and(|at| at.elapsed() < PREVIEW_INTEREST)
    }

    pub(super) fn limit(&self, interval: Duration) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .interval = interval;
    }

    pub(super) fn put(&self, image: image::RgbImage) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.next += 1;
        state.made = Some(Instant::now());
        state.latest = Some(Preview {
            id: state.next,
            image: Arc::new(image),
        });
    }

    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).latest = None;
    }
}
