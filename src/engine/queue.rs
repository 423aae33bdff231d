//! The bounded, fair waiting line before the device thread.
//!
//! Clients take turns: each entry gets a turn when it arrives, one after its client's last and none before the present one
//! (fair queuing by virtual time; Demers, Keshav and Shenker 1989). So one client's entries stay in order, and a client with a
//! hundred of them delays another's first by at most one. Invariants: a place is taken at the edge and moves with the job
//! until its work ends, so at most `limit` jobs exist at a time; whoever waits for a place is already listed as pending; a
//! closed queue takes nothing more.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

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
    closed: bool,
}

struct Entry<T> {
    /// `None` for commands that are not jobs.
    id: Option<String>,
    item: T,
    permit: Permit,
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

impl<T> Queue<T> {
    /// A line with `limit` places.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            entries: Mutex::new(Entries {
                waiting: BTreeMap::new(),
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

    /// The next entry; waits for one. `None` once the queue is closed and empty.
    pub fn pop(&self) -> Option<(T, Permit)> {
        let mut entries = self.lock();
        loop {
            if let Some((ticket, entry)) = entries.waiting.pop_first() {
                drop(entries);
                let mut turns = self.places.lock();
                let now = turns.now.max(ticket.turn);
                turns.now = now;
                turns.last.retain(|_, last| *last > now);
                return Some((entry.item, entry.permit));
            }
            if entries.closed {
                return None;
            }
            entries = self
                .ready
                .wait(entries)
                .unwrap_or_else(PoisonError::into_inner);
        }
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
        let entry = Entry { id, item, permit };
        entries.waiting.insert(ticket, entry);
        drop(entries);
        self.ready.notify_one();
        Ok(ticket)
    }

    fn lock(&self) -> MutexGuard<'_, Entries<T>> {
        // No code runs under the lock that could leave the line half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Place<T> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn order_is_first_in_first_out() {
        let queue = Queue::new(8);
        for n in 0..5 {
            queue
                .enter("one", &n.to_string())
                .await
                .unwrap()
                .fill(n)
                .unwrap();
        }
        assert_eq!(queue.pending(), ["0", "1", "2", "3", "4"]);
        let order: Vec<i32> = (0..5).map(|_| queue.pop().unwrap().0).collect();
        assert_eq!(order, [0, 1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn clients_take_turns() {
        let queue = Queue::new(16);
        for n in 0..4 {
            let place = queue.enter("many", &n.to_string()).await.unwrap();
            place.fill(n).unwrap();
        }
        assert_eq!(queue.pop().unwrap().0, 0);
        queue.enter("few", "a").await.unwrap().fill(10).unwrap();
        queue.push_command(99).unwrap();
        queue.enter("few", "b").await.unwrap().fill(11).unwrap();
        assert_eq!(queue.pending(), ["1", "a", "2", "b", "3"]);
        let order: Vec<i32> = (0..6).map(|_| queue.pop().unwrap().0).collect();
        // The command comes behind all that was in line before it.
        assert_eq!(order, [1, 10, 2, 11, 3, 99]);
    }

    #[tokio::test]
    async fn a_freed_place_goes_to_the_client_whose_turn_it_is() {
        let queue: Arc<Queue<i32>> = Queue::new(1);
        queue.enter("many", "0").await.unwrap().fill(0).unwrap();
        let mut second = Box::pin(queue.enter("many", "1"));
        let mut third = Box::pin(queue.enter("many", "2"));
        let mut other = Box::pin(queue.enter("few", "a"));
        for waiting in [&mut second, &mut third, &mut other] {
            assert!(futures_poll_once(waiting).await.is_none());
        }
        assert_eq!(queue.pending(), ["0", "a", "1", "2"]);
        drop(queue.pop());
        assert!(futures_poll_once(&mut second).await.is_none());
        let place = futures_poll_once(&mut other).await.unwrap().unwrap();
        // A place that is given up goes to the next.
        drop(place);
        assert!(futures_poll_once(&mut third).await.is_none());
        assert!(futures_poll_once(&mut second).await.is_some());
    }

    #[tokio::test]
    async fn a_place_is_free_again_only_when_its_permit_is_dropped() {
        let queue = Queue::new(1);
        queue.enter("one", "a").await.unwrap().fill(1).unwrap();
        assert_eq!(queue.try_enter("one", "b").err(), Some(Refusal::Full));
        let (_, permit) = queue.pop().unwrap();
        assert_eq!(queue.try_enter("one", "b").err(), Some(Refusal::Full));
        drop(permit);
        assert!(queue.try_enter("one", "b").is_ok());
    }

    #[tokio::test]
    async fn those_waiting_for_a_place_are_pending_and_leave_when_they_give_up() {
        let queue: Arc<Queue<i32>> = Queue::new(1);
        queue.enter("one", "a").await.unwrap().fill(1).unwrap();
        {
            let mut second = Box::pin(queue.enter("one", "b"));
            assert!(futures_poll_once(&mut second).await.is_none());
            assert_eq!(queue.pending(), ["a", "b"]);
        }
        assert_eq!(queue.pending(), ["a"]);
    }

    #[tokio::test]
    async fn a_removed_entry_frees_its_place() {
        let queue = Queue::new(1);
        let ticket = queue.enter("one", "a").await.unwrap().fill(1).unwrap();
        assert_eq!(queue.remove(ticket), Some(1));
        assert_eq!(queue.remove(ticket), None);
        assert!(queue.try_enter("one", "b").is_ok());
    }

    #[tokio::test]
    async fn closing_returns_what_waited_and_refuses_the_rest() {
        let queue = Queue::new(4);
        let place = queue.enter("one", "late").await.unwrap();
        queue.enter("one", "a").await.unwrap().fill(1).unwrap();
        assert_eq!(queue.close(), [1]);
        assert_eq!(place.fill(2), Err(2));
        assert_eq!(queue.enter("one", "b").await.err(), Some(Refusal::Closed));
        assert!(queue.pop().is_none());
    }

    async fn futures_poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        std::future::poll_fn(|cx| {
            std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(cx) {
                std::task::Poll::Ready(value) => Some(value),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }
}
