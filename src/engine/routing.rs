//! Which of several workers takes which entry of the line.
//!
//! The rule, for a worker that is free: it goes through the line in its fair order and takes the first entry that it serves
//! without a load (its checkpoint is in its memory, or it needs none). Failing that it takes the first whose checkpoint no
//! other free worker holds, if it is the free worker with the fewest checkpoints, so that an empty device fills before a full
//! one lets something go. Hence nothing waits for a busy worker while another is free, whatever that one has to load. An
//! entry is passed over at most once for each other worker, then it goes first; with one worker the order is the line's own.
//!
//! A worker whose device fails again and again rests: it takes nothing while another one is in service, so that a broken
//! device, which fails fast, does not eat the line. What of a job's LoRAs is merged into a worker's checkpoint is not looked
//! at: their names are known only once the prompts are read.

use std::time::Instant;

use super::checkpoint::Selection;

/// What an entry needs of the worker that takes it.
#[derive(Debug, Clone, Copy)]
pub enum Needs<'a> {
    /// Nothing.
    Nothing,
    /// A checkpoint, best in memory already.
    Checkpoint(&'a Selection),
    /// To be this worker.
    Worker(usize),
}

/// Something that can stand in line.
pub trait Routed {
    /// What it needs.
    fn needs(&self) -> Needs<'_>;
}

/// A worker that asks for an entry.
#[derive(Debug, Clone, Default)]
pub struct Free {
    /// Its number.
    pub worker: usize,
    /// The checkpoints in its memory.
    pub holds: Vec<Selection>,
    /// Until when it would rather have nothing; `None` = it is well.
    pub rests: Option<Instant>,
}

/// What a worker is doing, as the line sees it.
#[derive(Debug, Clone)]
enum Desk {
    /// At work on an entry, or about to ask for its first.
    Busy,
    /// Waiting for an entry.
    Free(Vec<Selection>),
    /// Waiting, but only for what nobody else could take.
    Resting,
    /// It has ended.
    Gone,
}

/// All workers.
#[derive(Debug)]
pub(super) struct Desks(Vec<Desk>);

impl Desks {
    pub(super) fn new(workers: usize) -> Self {
        Self(vec![Desk::Busy; workers])
    }

    /// The worker asks for an entry at `now`.
    pub(super) fn ask(&mut self, free: &Free, now: Instant) {
        let is_resting = free.rests.is_some_and(|until| until > now);
        self.0[free.worker] = if is_resting && self.are_others_in_service(free.worker) {
            Desk::Resting
        } else {
            Desk::Free(free.holds.clone())
        };
    }

    /// The worker has got one.
    pub(super) fn begin(&mut self, worker: usize) {
        self.0[worker] = Desk::Busy;
    }

    /// The worker asks no more. `true` if it was the last.
    pub(super) fn leave(&mut self, worker: usize) -> bool {
        self.0[worker] = Desk::Gone;
        self.0.iter().all(|desk| matches!(desk, Desk::Gone))
    }

    /// How many wait for an entry.
    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        let is_free = |desk: &&Desk| matches!(desk, Desk::Free(_) | Desk::Resting);
        self.0.iter().filter(is_free).count()
    }

    /// How often an entry may be passed over.
    fn patience(&self) -> usize {
        let present = self.0.iter().filter(|desk| !matches!(desk, Desk::Gone));
        present.count().saturating_sub(1)
    }

    fn are_others_in_service(&self, worker: usize) -> bool {
        let in_service = |desk: &Desk| matches!(desk, Desk::Busy | Desk::Free(_));
        let mut others = self.0.iter().enumerate();
        others.any(|(number, desk)| number != worker && in_service(desk))
    }

    /// The place in line of the entry that a worker which has asked takes; `line` gives needs and how often each was passed over.
    pub(super) fn choose<'a>(
        &self,
        worker: usize,
        line: impl Iterator<Item = (Needs<'a>, usize)>,
    ) -> Option<usize> {
        let patience = self.patience();
        let mut to_load = None;
        for (place, (needs, passed)) in line.enumerate() {
            match self.offer(worker, needs) {
                Offer::AtOnce => return Some(place),
                Offer::AfterLoading if passed >= patience => return to_load.or(Some(place)),
                Offer::AfterLoading => {
                    to_load.get_or_insert(place);
                }
                Offer::No => {}
            }
        }
        to_load
    }

    /// How a worker that has asked serves an entry.
    fn offer(&self, worker: usize, needs: Needs<'_>) -> Offer {
        let own = match &self.0[worker] {
            Desk::Free(own) => own,
            Desk::Resting | Desk::Busy | Desk::Gone => {
                return match needs {
                    Needs::Worker(number) if number == worker => Offer::AtOnce,
                    _ => Offer::No,
                };
            }
        };
        match needs {
            Needs::Worker(number) if number != worker => Offer::No,
            Needs::Worker(_) | Needs::Nothing => Offer::AtOnce,
            Needs::Checkpoint(wanted) if holds(own, wanted) => Offer::AtOnce,
            Needs::Checkpoint(wanted) if self.is_for_another((worker, own.len()), wanted) => {
                Offer::No
            }
            Needs::Checkpoint(_) => Offer::AfterLoading,
        }
    }

    /// Whether another free worker is the better place for a checkpoint that `worker`, which holds `count` others, has not.
    fn is_for_another(&self, (worker, count): (usize, usize), wanted: &Selection) -> bool {
        let mut others = self.0.iter().enumerate().filter(|(n, _)| *n != worker);
        others.any(|(number, desk)| match desk {
            Desk::Free(held) => holds(held, wanted) || (held.len(), number) < (count, worker),
            Desk::Busy | Desk::Resting | Desk::Gone => false,
        })
    }
}

enum Offer {
    /// It has what the entry needs.
    AtOnce,
    /// It is the one to load what the entry needs.
    AfterLoading,
    /// It is another's.
    No,
}

fn holds(held: &[Selection], wanted: &Selection) -> bool {
    held.iter().any(|one| one.is_same_checkpoint(wanted))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pipeline::{CheckpointIdentity, CheckpointSource};

    fn checkpoint(name: &str) -> Selection {
        Selection {
            source: CheckpointSource::File(name.into()),
            title: name.into(),
            identity: CheckpointIdentity::default(),
            sha256: String::new(),
            vae: None,
        }
    }

    fn free(worker: usize, names: &[&str]) -> Free {
        Free {
            worker,
            holds: names.iter().map(|name| checkpoint(name)).collect(),
            rests: None,
        }
    }

    /// Desks of `workers`, of whom `asking` have asked.
    fn desks(workers: usize, asking: &[Free]) -> Desks {
        let mut desks = Desks::new(workers);
        for free in asking {
            desks.ask(free, Instant::now());
        }
        desks
    }

    fn choose(desks: &Desks, worker: usize, line: &[(&str, usize)]) -> Option<usize> {
        let line: Vec<(Selection, usize)> = line
            .iter()
            .map(|(name, passed)| (checkpoint(name), *passed))
            .collect();
        let needs = line.iter().map(|(wanted, passed)| {
            let needs = match wanted.title.as_str() {
                "" => Needs::Nothing,
                _ => Needs::Checkpoint(wanted),
            };
            (needs, *passed)
        });
        desks.choose(worker, needs)
    }

    #[test]
    fn one_worker_keeps_to_the_order_of_the_line() {
        let one = desks(1, &[free(0, &["b"])]);
        assert_eq!(choose(&one, 0, &[("a", 0), ("b", 0)]), Some(0));
        assert_eq!(choose(&one, 0, &[]), None);
    }

    #[test]
    fn a_worker_takes_first_what_it_holds() {
        let busy_other = desks(2, &[free(0, &["b"])]);
        let line = [("a", 0), ("b", 0), ("", 0)];
        assert_eq!(choose(&busy_other, 0, &line), Some(1));
        assert_eq!(choose(&busy_other, 0, &[("a", 0), ("", 0)]), Some(1));
        assert_eq!(choose(&busy_other, 0, &[("a", 0)]), Some(0), "no waiting");
    }

    #[test]
    fn an_entry_is_passed_over_once_for_each_other_worker() {
        let three = desks(3, &[free(0, &["b"])]);
        assert_eq!(choose(&three, 0, &[("a", 1), ("b", 0)]), Some(1));
        assert_eq!(choose(&three, 0, &[("a", 2), ("b", 0)]), Some(0));
        assert_eq!(
            choose(&three, 0, &[("x", 0), ("a", 2), ("b", 0)]),
            Some(0),
            "nor does one late in line go before one that is earlier"
        );
    }

    #[test]
    fn what_another_free_worker_holds_is_left_to_it() {
        let both = desks(2, &[free(0, &["a"]), free(1, &["b"])]);
        assert_eq!(choose(&both, 0, &[("b", 9)]), None);
        assert_eq!(choose(&both, 1, &[("b", 9)]), Some(0));
        assert_eq!(choose(&both, 0, &[("b", 0), ("c", 0)]), Some(1));
    }

    #[test]
    fn the_emptiest_free_worker_loads() {
        let three = desks(3, &[free(0, &["a", "b"]), free(1, &["a"]), free(2, &["b"])]);
        let takers: Vec<_> = (0..3).map(|n| choose(&three, n, &[("c", 0)])).collect();
        assert_eq!(takers, [None, Some(0), None]);
        let mut gone = three;
        assert!(!gone.leave(1));
        assert_eq!(choose(&gone, 2, &[("c", 0)]), Some(0));
    }

    #[test]
    fn a_worker_rests_only_while_another_serves() {
        let rests = |hours| Free {
            rests: Some(Instant::now() + Duration::from_hours(hours)),
            ..free(0, &["a"])
        };
        let mut two = desks(2, &[rests(1)]);
        assert_eq!(choose(&two, 0, &[("a", 0), ("", 0)]), None);
        let own = [(Needs::Nothing, 0), (Needs::Worker(0), 0)];
        assert_eq!(two.choose(0, own.into_iter()), Some(1));
        two.ask(&rests(0), Instant::now());
        assert_eq!(choose(&two, 0, &[("a", 0)]), Some(0), "it has rested");
        assert!(!two.leave(1));
        two.ask(&rests(1), Instant::now());
        assert_eq!(choose(&two, 0, &[("a", 0)]), Some(0), "the last one works");
        assert!(two.leave(0));
    }
}
