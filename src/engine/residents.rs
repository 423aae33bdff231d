//! Checkpoints in memory, and which of them goes when another comes.
//!
//! Invariants: the latest used is the current one; the one that was not used for longest goes first; nothing goes for a
//! checkpoint whose file cannot be read.

use super::checkpoint::Selection;
use super::status::LoadedModel;

/// How much may stay in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelLimits {
    /// Checkpoints (`sd_checkpoints_limit`); at least 1.
    pub count: usize,
    /// Bytes of their weights; `None` = what the device has.
    pub bytes: Option<u64>,
}

impl Default for ModelLimits {
    fn default() -> Self {
        Self {
            count: 1,
            bytes: None,
        }
    }
}

/// A checkpoint in memory.
pub(super) struct Resident<M> {
    pub(super) selection: Selection,
    pub(super) info: LoadedModel,
    pub(super) model: M,
    /// Of its weights.
    pub(super) bytes: u64,
}

/// All of them, the current one last.
pub(super) struct Residents<M>(Vec<Resident<M>>);

impl<M> Default for Residents<M> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<M> Residents<M> {
    /// The one used last.
    pub(super) fn current_mut(&mut self) -> Option<&mut Resident<M>> {
        self.0.last_mut()
    }

    /// What each was loaded for.
    pub(super) fn selections(&self) -> impl Iterator<Item = &Selection> {
        self.0.iter().map(|resident| &resident.selection)
    }

    /// Makes one that fits the current one. `false` if there is none.
    pub(super) fn recall(&mut self, fits: impl Fn(&Selection) -> bool) -> bool {
        let found = self
            .0
            .iter()
            .rposition(|resident| fits(&resident.selection));
        if let Some(index) = found {
            let resident = self.0.remove(index);
            self.0.push(resident);
        }
        found.is_some()
    }

    /// Adds one as the current one, and lets go of those beyond `count`.
    pub(super) fn add(&mut self, resident: Resident<M>, count: usize) {
        self.0.push(resident);
        while self.0.len() > count.max(1) {
            self.drop_oldest();
        }
    }

    /// Lets go of as many as it takes for `bytes` more to fit: into `most` bytes together, and into what `free` says is left.
    pub(super) fn make_room(
        &mut self,
        bytes: u64,
        most: Option<u64>,
        free: impl Fn() -> Option<u64>,
    ) {
        let fits = |held: u64| {
            most.is_none_or(|most| held.saturating_add(bytes) <= most)
                && free().is_none_or(|free| bytes <= free)
        };
        while !self.0.is_empty() && !fits(self.0.iter().map(|resident| resident.bytes).sum()) {
            self.drop_oldest();
        }
    }

    /// Lets go of the current one.
    pub(super) fn drop_current(&mut self) {
        self.0.pop();
        crate::trim_memory();
    }

    /// Lets go of all.
    pub(super) fn clear(&mut self) {
        self.0.clear();
        crate::trim_memory();
    }

    fn drop_oldest(&mut self) {
        let resident = self.0.remove(0);
        tracing::info!(checkpoint = resident.info.title, "let go");
        drop(resident);
        crate::trim_memory();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::pipeline::{CheckpointIdentity, CheckpointSource};

    fn resident(name: &str, bytes: u64) -> Resident<()> {
        let selection = Selection {
            source: CheckpointSource::File(name.into()),
            title: name.into(),
            identity: CheckpointIdentity::default(),
            sha256: String::new(),
            vae: None,
        };
        let info = selection.describe((64, 64));
        Resident {
            selection,
            info,
            model: (),
            bytes,
        }
    }

    fn titles(residents: &Residents<()>) -> Vec<&str> {
        let all = residents.0.iter();
        all.map(|resident| resident.info.title.as_str()).collect()
    }

    #[test]
    fn the_one_not_used_for_longest_goes_first() {
        let mut all = Residents::default();
        for name in ["a", "b", "c"] {
            all.add(resident(name, 10), 3);
        }
        assert!(all.recall(|selection| selection.title == "a"));
        assert!(!all.recall(|selection| selection.title == "x"));
        all.add(resident("d", 10), 3);
        assert_eq!(titles(&all), ["c", "a", "d"]);
        assert_eq!(all.current_mut().unwrap().info.title, "d");
    }

    #[test]
    fn room_is_made_within_the_budget_and_what_is_free() {
        let all = || {
            let mut all = Residents::default();
            for name in ["a", "b", "c"] {
                all.add(resident(name, 10), 3);
            }
            all
        };
        let mut budget = all();
        budget.make_room(10, Some(40), || None);
        assert_eq!(titles(&budget), ["a", "b", "c"]);
        budget.make_room(10, Some(30), || None);
        assert_eq!(titles(&budget), ["b", "c"]);
        budget.make_room(100, Some(30), || None);
        assert!(titles(&budget).is_empty(), "it is tried alone");
        let (mut memory, left) = (all(), std::cell::Cell::new(0));
        memory.make_room(10, None, || {
            left.set(left.get() + 6);
            Some(left.get())
        });
        assert_eq!(titles(&memory), ["b", "c"]);
    }
}
