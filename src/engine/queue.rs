//! The bounded, fair waiting line before the device threads.
//!
//! Clients take turns: each entry gets a turn when it arrives, one after its client's last and none before the present one
//! (fair queuing by virtual time; Demers, Keshav and Shenker 1989). So one client's entries stay in order, and a client with a
//! hundred of them delays another's first by at most one. Invariants: a place is taken at the edge and moves with the job
//! until its work ends, so at most `limit` jobs exist at a time; whoever waits for a place is already listed as pending; a
//! closed queue takes nothing more. Which of several workers takes which entry is [`super::routing`]'s rule.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;

use super::routing::{Desks, Free, Needs, Routed};

/// Why nothing can be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// All places are taken.
    Full,
    /// The queue was closed.
    Closed,
}

/// Name of a queued entry, for taking it out again; they sort in the order of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    turn: u64,
    /// Counts arrivals.
    number: u64,
}

/// A line of `T`s with named places.
pub struct Queue<T> {
    entries: Mutex<Entries<T>>,
    ready: Condvar,
    places: Arc<Places>,
}

struct Entries<T> {
    waiting: BTreeMap<Ticket, Entry<T>>,
    desks: Desks,
    closed: bool,
}

struct Entry<T> {
    /// `None` for commands that are not jobs.
    id: Option<String>,
    item: T,
    permit: Permit,
    /// How often a later one was taken first.
    passed: usize,
}

/// Who may enter, and when each is served.
struct Places(Mutex<Turns>);

struct Turns {
    limit: usize,
    taken: usize,
    /// Those that wait for a place, with what wakes them.
    waiting: BTreeMap<Ticket, (String, oneshot::Sender<Permit>)>,
    /// The turn being served.
    now: u64,
    /// Each client's last turn, as far as it is still to come.
    last: HashMap<String, u64>,
    arrivals: u64,
    closed: bool,
}

impl Turns {
    fn ticket(&mut self, client: &str) -> Ticket {
        let last = self.last.get(client).copied().unwrap_or(0);
        let turn = last.max(self.now) + 1;
        self.last.insert(client.to_string(), turn);
        self.arrivals += 1;
        Ticket {
            turn,
            number: self.arrivals,
        }
    }
}

/// Kept until the work ends; dropping it frees the place for the next in line.
#[derive(Default)]
pub struct Permit(Option<Arc<Places>>);

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(places) = self.0.take() else { return };
        let mut turns = places.lock();
        turns.taken -= 1;
        // The place of one that has given up comes back here when its permit is dropped with its channel.
        if !turns.closed && turns.taken < turns.limit {
            let next = turns.waiting.pop_first();
            if let Some((_, (_, wake))) = next {
                turns.taken += 1;
                drop(turns);
                let _ = wake.send(Self(Some(places)));
            }
        }
    }
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Turns> {
        // No code runs under the lock that could leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the line, not yet filled.
pub struct Place<T> {
    queue: Arc<Queue<T>>,
    permit: Permit,
    ticket: Ticket,
    id: String,
}

/// Takes a waiting id off the list however the wait ends.
struct Waiting<'a> {
    places: &'a Places,
    ticket: Ticket,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let gone = self.places.lock().waiting.remove(&self.ticket);
        drop(gone);
    }
}

impl<T: Routed> Queue<T> {
    /// A line with `limit` places before `workers` workers, numbered from 0.
    #[must_use]
    pub fn new(limit: usize, workers: usize) -> Arc<Self> {
        Arc::new(Self {
            entries: Mutex::new(Entries {
                waiting: BTreeMap::new(),
                desks: Desks::new(workers),
                closed: false,
            }),
            ready: Condvar::new(),
            places: Arc::new(Places(Mutex::new(Turns {
                limit,
                taken: 0,
                waiting: BTreeMap::new(),
                now: 0,
                last: HashMap::new(),
                arrivals: 0,
                closed: false,
            }))),
        })
    }

    /// Waits for a place; those of one client get theirs in arrival order.
    ///
    /// # Errors
    /// [`Refusal::Closed`].
    pub async fn enter(self: &Arc<Self>, client: &str, id: &str) -> Result<Place<T>, Refusal> {
        let (ticket, granted) = {
            let mut turns = self.places.lock();
            if turns.closed {
                return Err(Refusal::Closed);
            }
            let ticket = turns.ticket(client);
            if turns.taken < turns.limit {
                turns.taken += 1;
                drop(turns);
                return Ok(self.place(ticket, id, Permit(Some(self.places.clone()))));
            }
            let (wake, granted) = oneshot::channel();
            turns.waiting.insert(ticket, (id.to_string(), wake));
            (ticket, granted)
        };
        let waiting = Waiting {
            places: &self.places,
            ticket,
        };
        let permit = granted.await.map_err(|_| Refusal::Closed)?;
        drop(waiting);
        Ok(self.place(ticket, id, permit))
    }

    /// Takes a place if one is free.
    ///
    /// # Errors
    /// [`Refusal::Full`] and [`Refusal::Closed`].
    pub fn try_enter(self: &Arc<Self>, client: &str, id: &str) -> Result<Place<T>, Refusal> {
        let mut turns = self.places.lock();
        if turns.closed {
            return Err(Refusal::Closed);
        }
        if turns.taken >= turns.limit {
            return Err(Refusal::Full);
        }
        turns.taken += 1;
        let ticket = turns.ticket(client);
        drop(turns);
        Ok(self.place(ticket, id, Permit(Some(self.places.clone()))))
    }

    fn place(self: &Arc<Self>, ticket: Ticket, id: &str, permit: Permit) -> Place<T> {
        Place {
            queue: self.clone(),
            permit,
            ticket,
            id: id.to_string(),
        }
    }

    /// Adds a command that is not a job and needs no place, behind everything in line.
    ///
    /// # Errors
    /// Gives the item back if the queue is closed.
    pub fn push_command(&self, item: T) -> Result<(), T> {
        let ticket = {
            let entries = self.lock();
            let last = entries.waiting.last_key_value().map(|(ticket, _)| *ticket);
            drop(entries);
            let mut turns = self.places.lock();
            turns.arrivals += 1;
            Ticket {
                turn: last.map_or(turns.now, |last| last.turn),
                number: turns.arrivals,
            }
        };
        self.push(ticket, None, item, Permit::default()).map(|_| ())
    }

    /// The next entry for a worker; waits for one. `None` once the queue is closed.
    pub fn pop(&self, free: &Free) -> Option<(T, Permit)> {
        let mut entries = self.lock();
        loop {
            if entries.closed {
                return None;
            }
            let now = Instant::now();
            entries.desks.ask(free, now);
            if let Some((ticket, entry)) = entries.take(free.worker) {
                let leaves_some = !entries.waiting.is_empty();
                drop(entries);
                if leaves_some {
                    // Something may have been left to this worker, which is busy from here on.
                    self.ready.notify_all();
                }
                let mut turns = self.places.lock();
                let now = turns.now.max(ticket.turn);
                turns.now = now;
                turns.last.retain(|_, last| *last > now);
                return Some((entry.item, entry.permit));
            }
            let rest = free
                .rests
                .and_then(|until| until.checked_duration_since(now));
            entries = match rest.filter(|rest| !rest.is_zero()) {
                Some(rest) => {
                    let woken = self.ready.wait_timeout(entries, rest);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .ready
                    .wait(entries)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// A worker asks no more. Gives back what nobody will take: what was meant for it, and everything if it was the last, with
    /// which the queue is closed.
    pub fn leave(&self, worker: usize) -> Vec<T> {
        let mut entries = self.lock();
        if entries.desks.leave(worker) {
            drop(entries);
            return self.close();
        }
        let is_its = |entry: &Entry<T>| matches!(entry.item.needs(), Needs::Worker(number) if number == worker);
        let its = entries.waiting.extract_if(.., |_, entry| is_its(entry));
        let its = its.map(|(_, entry)| entry.item).collect();
        drop(entries);
        self.ready.notify_all();
        its
    }

    /// Takes an entry out if it still waits.
    pub fn remove(&self, ticket: Ticket) -> Option<T> {
        let entry = self.lock().waiting.remove(&ticket);
        entry.map(|entry| entry.item)
    }

    /// Takes nothing more, and returns what was waiting.
    pub fn close(&self) -> Vec<T> {
        let mut entries = self.lock();
        entries.closed = true;
        let waiting = std::mem::take(&mut entries.waiting);
        drop(entries);
        let mut turns = self.places.lock();
        turns.closed = true;
        let unplaced = std::mem::take(&mut turns.waiting);
        drop(turns);
        drop(unplaced);
        self.ready.notify_all();
        waiting.into_values().map(|entry| entry.item).collect()
    }

    /// Ids of waiting jobs in the order of service.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        let entries = self.lock();
        let mut ids: Vec<(Ticket, String)> = entries
            .waiting
            .iter()
            .filter_map(|(ticket, entry)| Some((*ticket, entry.id.clone()?)))
            .collect();
        drop(entries);
        let turns = self.places.lock();
        let unplaced = turns.waiting.iter();
        ids.extend(unplaced.map(|(ticket, (id, _))| (*ticket, id.clone())));
        drop(turns);
        ids.sort_unstable();
        ids.into_iter().map(|(_, id)| id).collect()
    }

    /// How many workers wait for an entry.
    #[cfg(test)]
    pub(super) fn free_workers(&self) -> usize {
        self.lock().desks.free()
    }

    fn push(
        &self,
        ticket: Ticket,
        id: Option<String>,
        item: T,
        permit: Permit,
    ) -> Result<Ticket, T> {
        let mut entries = self.lock();
        if entries.closed {
            return Err(item);
        }
        let entry = Entry {
            id,
            item,
            permit,
            passed: 0,
        };
        entries.waiting.insert(ticket, entry);
        drop(entries);
        // All of them, since the one that wakes first may leave it to another.
        self.ready.notify_all();
        Ok(ticket)
    }

    fn lock(&self) -> MutexGuard<'_, Entries<T>> {
        // No code runs under the lock that could leave the line half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Routed> Entries<T> {
    /// Takes out what a worker that has asked is to do.
    fn take(&mut self, worker: usize) -> Option<(Ticket, Entry<T>)> {
        let line = self.waiting.values();
        let needs = line.map(|entry| (entry.item.needs(), entry.passed));
        let place = self.desks.choose(worker, needs)?;
        let mut passed = self.waiting.iter_mut();
        for (_, entry) in passed.by_ref().take(place) {
            entry.passed += 1;
        }
        let ticket = *passed.next()?.0;
        let entry = self.waiting.remove(&ticket)?;
        self.desks.begin(worker);
        Some((ticket, entry))
    }
}

impl<T: Routed> Place<T> {
    /// Puts the job into the line.
    ///
    /// # Errors
    /// Gives the item back if the queue was closed meanwhile.
    pub fn fill(self, item: T) -> Result<Ticket, T> {
        let Self {
            queue,
            permit,
            ticket,
            id,
        } = self;
        queue.push(ticket, Some(id), item, permit)
    }
}
