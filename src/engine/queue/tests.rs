//! The line, by one worker and by several.

use super::*;

impl Routed for i32 {
    fn needs(&self) -> Needs<'_> {
        // A negative one is a worker's own.
        match self.checked_neg() {
            Some(own @ 1..) => Needs::Worker(own as usize - 1),
            _ => Needs::Nothing,
        }
    }
}

fn pop(queue: &Queue<i32>) -> Option<(i32, Permit)> {
    queue.pop(&Free::default())
}

#[tokio::test]
async fn order_is_first_in_first_out() {
    let queue = Queue::new(8, 1);
    for n in 0..5 {
        queue
            .enter("one", &n.to_string())
            .await
            .unwrap()
            .fill(n)
            .unwrap();
    }
    assert_eq!(queue.pending(), ["0", "1", "2", "3", "4"]);
    let order: Vec<i32> = (0..5).map(|_| pop(&queue).unwrap().0).collect();
    assert_eq!(order, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn clients_take_turns() {
    let queue = Queue::new(16, 1);
    for n in 0..4 {
        let place = queue.enter("many", &n.to_string()).await.unwrap();
        place.fill(n).unwrap();
    }
    assert_eq!(pop(&queue).unwrap().0, 0);
    queue.enter("few", "a").await.unwrap().fill(10).unwrap();
    queue.push_command(99).unwrap();
    queue.enter("few", "b").await.unwrap().fill(11).unwrap();
    assert_eq!(queue.pending(), ["1", "a", "2", "b", "3"]);
    let order: Vec<i32> = (0..6).map(|_| pop(&queue).unwrap().0).collect();
    // The command comes behind all that was in line before it.
    assert_eq!(order, [1, 10, 2, 11, 3, 99]);
}

#[tokio::test]
async fn a_freed_place_goes_to_the_client_whose_turn_it_is() {
    let queue: Arc<Queue<i32>> = Queue::new(1, 1);
    queue.enter("many", "0").await.unwrap().fill(0).unwrap();
    let mut second = Box::pin(queue.enter("many", "1"));
    let mut third = Box::pin(queue.enter("many", "2"));
    let mut other = Box::pin(queue.enter("few", "a"));
    for waiting in [&mut second, &mut third, &mut other] {
        assert!(futures_poll_once(waiting).await.is_none());
    }
    assert_eq!(queue.pending(), ["0", "a", "1", "2"]);
    drop(pop(&queue));
    assert!(futures_poll_once(&mut second).await.is_none());
    let place = futures_poll_once(&mut other).await.unwrap().unwrap();
    // A place that is given up goes to the next.
    drop(place);
    assert!(futures_poll_once(&mut third).await.is_none());
    assert!(futures_poll_once(&mut second).await.is_some());
}

#[tokio::test]
async fn a_place_is_free_again_only_when_its_permit_is_dropped() {
    let queue = Queue::new(1, 1);
    queue.enter("one", "a").await.unwrap().fill(1).unwrap();
    assert_eq!(queue.try_enter("one", "b").err(), Some(Refusal::Full));
    let (_, permit) = pop(&queue).unwrap();
    assert_eq!(queue.try_enter("one", "b").err(), Some(Refusal::Full));
    drop(permit);
    assert!(queue.try_enter("one", "b").is_ok());
}

#[tokio::test]
async fn those_waiting_for_a_place_are_pending_and_leave_when_they_give_up() {
    let queue: Arc<Queue<i32>> = Queue::new(1, 1);
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
    let queue = Queue::new(1, 1);
    let ticket = queue.enter("one", "a").await.unwrap().fill(1).unwrap();
    assert_eq!(queue.remove(ticket), Some(1));
    assert_eq!(queue.remove(ticket), None);
    assert!(queue.try_enter("one", "b").is_ok());
}

#[tokio::test]
async fn closing_returns_what_waited_and_refuses_the_rest() {
    let queue = Queue::new(4, 1);
    let place = queue.enter("one", "late").await.unwrap();
    queue.enter("one", "a").await.unwrap().fill(1).unwrap();
    assert_eq!(queue.close(), [1]);
    assert_eq!(place.fill(2), Err(2));
    assert_eq!(queue.enter("one", "b").await.err(), Some(Refusal::Closed));
    assert!(pop(&queue).is_none());
}

#[test]
fn a_worker_that_leaves_takes_its_own_along_and_the_last_one_all() {
    let queue: Arc<Queue<i32>> = Queue::new(4, 2);
    for item in [-1, -2, 7] {
        queue.push_command(item).unwrap();
    }
    assert_eq!(queue.leave(1), [-2]);
    assert_eq!(pop(&queue).unwrap().0, -1);
    assert_eq!(queue.leave(0), [7]);
    assert_eq!(queue.push_command(8), Err(8));
}

#[test]
fn a_rested_worker_serves_again() {
    let queue: Arc<Queue<i32>> = Queue::new(4, 2);
    queue.push_command(7).unwrap();
    let begun = Instant::now();
    let rests = Some(begun + std::time::Duration::from_millis(30));
    let free = Free {
        rests,
        ..Free::default()
    };
    // The other worker never comes, but counts as busy.
    assert_eq!(queue.pop(&free).unwrap().0, 7);
    assert!(rests <= Some(Instant::now()));
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
