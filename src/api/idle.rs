//! Which connections idle: those whose client owes a request, because it has sent none yet or has read its last answer.
//!
//! Invariant: a connection is at work from its request's head to the last byte of the answer's body; only the others can be sent
//! away, the longest idle first.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use hyper::body::{Frame, SizeHint};
use tokio_util::sync::CancellationToken;

/// The idle connections, by when they began to idle.
#[derive(Debug, Default)]
pub struct Idle {
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    next: u64,
    waiting: BTreeMap<u64, CancellationToken>,
}

impl Idle {
    /// A new connection, idle until its first request.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Occupant {
        let left = CancellationToken::new();
        let number = self.begin(&left);
        let idle = self.clone();
        Occupant(Arc::new(Mutex::new(Turn { number, left, idle })))
    }

    /// Ends the connection that has idled longest, if any idles.
    pub fn send_away(&self) {
        let longest = self.line().waiting.pop_first();
        if let Some((_, left)) = longest {
            left.cancel();
        }
    }

    fn begin(&self, left: &CancellationToken) -> u64 {
        let mut line = self.line();
        line.next += 1;
        let turn = line.next;
        line.waiting.insert(turn, left.clone());
        turn
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's standing in the line.
#[derive(Debug)]
struct Turn {
    number: u64,
    left: CancellationToken,
    idle: Arc<Idle>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.idle.line().waiting.remove(&self.number);
    }
}

/// A connection, for as long as it lasts.
#[derive(Debug, Clone)]
pub struct Occupant(Arc<Mutex<Turn>>);

impl Occupant {
    /// Cancelled when the connection is to give up its place.
    #[must_use]
    pub fn left(&self) -> CancellationToken {
        self.turn().left.clone()
    }

    /// Leaves the line until the value is dropped.
    #[must_use]
    pub fn at_work(&self) -> AtWork {
        let turn = self.turn();
        turn.idle.line().waiting.remove(&turn.number);
        AtWork(self.clone())
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request under way.
#[derive(Debug)]
pub struct AtWork(Occupant);

impl AtWork {
    /// Stays at work until `body` has been sent.
    pub fn until_sent(self, body: Body) -> Body {
        Body::new(Answer { body, _work: self })
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        let mut turn = self.0.turn();
        turn.number = turn.idle.begin(&turn.left);
    }
}

/// An answer's body that keeps its connection at work.
struct Answer {
    body: Body,
    _work: AtWork,
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_idle_goes_first_and_who_works_stays() {
        let idle = Arc::new(Idle::default());
        let (first, second, third) = (idle.enter(), idle.enter(), idle.enter());
        let at_work = first.at_work();
        idle.send_away();
        assert!(!first.left().is_cancelled() && second.left().is_cancelled());
        // `first` begins to idle anew, after `third`.
        drop(at_work);
        idle.send_away();
        assert!(!first.left().is_cancelled() && third.left().is_cancelled());
        idle.send_away();
        assert!(first.left().is_cancelled());
        idle.send_away();
    }

    #[test]
    fn a_connection_that_has_ended_is_out_of_the_line() {
        let idle = Arc::new(Idle::default());
        let (gone, here) = (idle.enter(), idle.enter());
        drop(gone);
        idle.send_away();
        assert!(here.left().is_cancelled());
    }

    #[tokio::test]
    async fn an_answer_keeps_its_connection_at_work_until_it_is_dropped() {
        let idle = Arc::new(Idle::default());
        let occupant = idle.enter();
        let body = occupant.at_work().until_sent(Body::from("x"));
        idle.send_away();
        assert!(!occupant.left().is_cancelled());
        let read = axum::body::to_bytes(body, 10).await.unwrap();
        assert_eq!(read, "x");
        idle.send_away();
        assert!(occupant.left().is_cancelled());
    }
}
