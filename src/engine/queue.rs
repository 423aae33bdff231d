//! The bounded waiting line before the device thread.
//!
//! Invariants: first in, first out; a place is taken at the edge and moves with the job until its work ends, so at most
//! `limit` jobs exist at a time; whoever waits for a place is already listed as pending; a closed queue takes nothing more.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

/// Why nothing can be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// All places are taken.
    Full,
    /// The queue was closed.
    Closed,
}

/// A first-in-first-out line of `T`s with named places.
pub struct Queue<T> {
    inner: Mutex<Inner<T>>,
    ready: Condvar,
    places: Arc<Semaphore>,
}

struct Inner<T> {
    entries: VecDeque<Entry<T>>,
    /// Ids of those that wait for a place, in order.
    waiting: VecDeque<(u64, String)>,
    next: u64,
    closed: bool,
}

struct Entry<T> {
    ticket: u64,
    /// `None` for commands that are not jobs.
    id: Option<String>,
    item: T,
    permit: Option<OwnedSemaphorePermit>,
}

/// Name of a queued entry, for taking it out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// Kept until the work ends; dropping it frees the place.
#[derive(Debug)]
pub struct Permit(#[expect(dead_code, reason = "held for its Drop")] Option<OwnedSemaphorePermit>);

/// A place in the line, not yet filled.
pub struct Place<T> {
    queue: Arc<Queue<T>>,
    permit: Option<OwnedSemaphorePermit>,
    id: String,
}

/// Takes a waiting id off the list however the wait ends.
struct Waiting<'a, T> {
    queue: &'a Queue<T>,
    ticket: u64,
}

impl<T> Drop for Waiting<'_, T> {
    fn drop(&mut self) {
        self.queue
            .lock()
            .waiting
            .retain(|(ticket, _)| *ticket != self.ticket);
    }
}

impl<T> Queue<T> {
    /// A line with `limit` places.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                entries: VecDeque::new(),
                waiting: VecDeque::new(),
                next: 0,
                closed: false,
            }),
            ready: Condvar::new(),
            places: Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS))),
        })
    }

    /// Waits for a place, in arrival order.
    ///
    /// # Errors
    /// [`Refusal::Closed`].
    pub async fn enter(self: &Arc<Self>, id: &str) -> Result<Place<T>, Refusal> {
        let waiting = {
            let mut inner = self.lock();
            let ticket = inner.ticket();
            inner.waiting.push_back((ticket, id.to_string()));
            Waiting {
                queue: self,
                ticket,
            }
        };
        let permit = self
            .places
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| Refusal::Closed)?;
        drop(waiting);
        Ok(Place {
            queue: self.clone(),
            permit: Some(permit),
            id: id.to_string(),
        })
    }

    /// Takes a place if one is free.
    ///
    /// # Errors
    /// [`Refusal::Full`] and [`Refusal::Closed`].
    pub fn try_enter(self: &Arc<Self>, id: &str) -> Result<Place<T>, Refusal> {
        match self.places.clone().try_acquire_owned() {
            Ok(permit) => Ok(Place {
                queue: self.clone(),
                permit: Some(permit),
                id: id.to_string(),
            }),
            Err(TryAcquireError::NoPermits) => Err(Refusal::Full),
            Err(TryAcquireError::Closed) => Err(Refusal::Closed),
        }
    }

    /// Adds a command that is not a job and needs no place.
    ///
    /// # Errors
    /// Gives the item back if the queue is closed.
    pub fn push_command(&self, item: T) -> Result<(), T> {
        self.push(None, item, None).map(|_| ())
    }

    /// The next entry; waits for one. `None` once the queue is closed and empty.
    pub fn pop(&self) -> Option<(T, Permit)> {
        let mut inner = self.lock();
        loop {
            if let Some(entry) = inner.entries.pop_front() {
                return Some((entry.item, Permit(entry.permit)));
            }
            if inner.closed {
                return None;
            }
            inner = self
                .ready
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes an entry out if it still waits.
    pub fn remove(&self, ticket: Ticket) -> Option<T> {
        let mut inner = self.lock();
        let index = inner
            .entries
            .iter()
            .position(|entry| entry.ticket == ticket.0)?;
        inner.entries.remove(index).map(|entry| entry.item)
    }

    /// Takes nothing more, and returns what was waiting.
    pub fn close(&self) -> Vec<T> {
        let mut inner = self.lock();
        inner.closed = true;
        let items = inner.entries.drain(..).map(|entry| entry.item).collect();
        drop(inner);
        self.places.close();
        self.ready.notify_all();
        items
    }

    /// Ids of waiting jobs, first in line first.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        let inner = self.lock();
        let queued = inner.entries.iter().filter_map(|entry| entry.id.clone());
        queued
            .chain(inner.waiting.iter().map(|(_, id)| id.clone()))
            .collect()
    }

    fn push(
        &self,
        id: Option<String>,
        item: T,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<Ticket, T> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(item);
        }
        let ticket = inner.ticket();
        inner.entries.push_back(Entry {
            ticket,
            id,
            item,
            permit,
        });
        drop(inner);
        self.ready.notify_one();
        Ok(Ticket(ticket))
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        // No code runs under the lock that could leave the line half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Inner<T> {
    fn ticket(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl<T> Place<T> {
    /// Puts the job into the line.
    ///
    /// # Errors
    /// Gives the item back if the queue was closed meanwhile.
    pub fn fill(mut self, item: T) -> Result<Ticket, T> {
        let permit = self.permit.take();
        self.queue
            .push(Some(std::mem::take(&mut self.id)), item, permit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn order_is_first_in_first_out() {
        let queue = Queue::new(8);
        for n in 0..5 {
            queue.enter(&n.to_string()).await.unwrap().fill(n).unwrap();
        }
        assert_eq!(queue.pending(), ["0", "1", "2", "3", "4"]);
        let order: Vec<i32> = (0..5).map(|_| queue.pop().unwrap().0).collect();
        assert_eq!(order, [0, 1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn a_place_is_free_again_only_when_its_permit_is_dropped() {
        let queue = Queue::new(1);
        queue.enter("a").await.unwrap().fill(1).unwrap();
        assert_eq!(queue.try_enter("b").err(), Some(Refusal::Full));
        let (_, permit) = queue.pop().unwrap();
        assert_eq!(queue.try_enter("b").err(), Some(Refusal::Full));
        drop(permit);
        assert!(queue.try_enter("b").is_ok());
    }

    #[tokio::test]
    async fn those_waiting_for_a_place_are_pending_and_leave_when_they_give_up() {
        let queue: Arc<Queue<i32>> = Queue::new(1);
        queue.enter("a").await.unwrap().fill(1).unwrap();
        {
            let mut second = Box::pin(queue.enter("b"));
            assert!(futures_poll_once(&mut second).await.is_none());
            assert_eq!(queue.pending(), ["a", "b"]);
        }
        assert_eq!(queue.pending(), ["a"]);
    }

    #[tokio::test]
    async fn a_removed_entry_frees_its_place() {
        let queue = Queue::new(1);
        let ticket = queue.enter("a").await.unwrap().fill(1).unwrap();
        assert_eq!(queue.remove(ticket), Some(1));
        assert_eq!(queue.remove(ticket), None);
        assert!(queue.try_enter("b").is_ok());
    }

    #[tokio::test]
    async fn closing_returns_what_waited_and_refuses_the_rest() {
        let queue = Queue::new(4);
        let place = queue.enter("late").await.unwrap();
        queue.enter("a").await.unwrap().fill(1).unwrap();
        assert_eq!(queue.close(), [1]);
        assert_eq!(place.fill(2), Err(2));
        assert_eq!(queue.enter("b").await.err(), Some(Refusal::Closed));
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
