//! The bounded queue between those who ask and the engine's thread.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::Activity;
use super::chooser::Chooser;
use super::request::{GenerateEvent, GenerateRequest, SubmitError};

/// How long a request waits for memory if nobody said how long requests may wait in the queue.
pub(super) const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// A request that has no slot yet.
pub(super) struct Waiting {
    pub(super) request: GenerateRequest,
    pub(super) chooser: Chooser,
    pub(super) events: mpsc::Sender<GenerateEvent>,
    pub(super) submitted: Instant,
}

/// What can wait in a queue.
pub(super) trait Queued {
    /// Nobody waits for the answer any more.
    fn is_closed(&self) -> bool;
    /// When it leaves the queue, should it still be waiting.
    fn deadline(&self) -> Option<Instant>;
}

impl Queued for Waiting {
    fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    fn deadline(&self) -> Option<Instant> {
        self.request.deadline
    }
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Requests are taken.
    #[default]
    Open,
    /// No new requests; those that are here may end until then.
    Draining(Instant),
    /// The engine's thread has ended.
    Ended,
}

struct State<W> {
    waiting: VecDeque<W>,
    running: usize,
    phase: Phase,
    woken: bool,
    /// Cells that the context should not have more of than it needs.
    shrink: Option<u32>,
}

/// The queue. All waiting is bounded: `parallel` may run and `queue_limit` may wait.
pub(super) struct Mailbox<W = Waiting> {
    state: Mutex<State<W>>,
    changed: Condvar,
    /// Some sequence waits for its reader.
    parked: AtomicBool,
    activity: watch::Sender<Activity>,
    parallel: usize,
    queue_limit: usize,
}

impl<W: Queued> Mailbox<W> {
    pub(super) fn new(parallel: usize, queue_limit: usize) -> Self {
        Self {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                running: 0,
                phase: Phase::default(),
                woken: false,
                shrink: None,
            }),
            changed: Condvar::new(),
            parked: AtomicBool::new(false),
            activity: watch::Sender::default(),
            parallel,
            queue_limit,
        }
    }

    // A panic elsewhere cannot leave the state half-changed: every change is one assignment or one queue operation.
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a request into the queue.
    pub(super) fn submit(&self, waiting: W) -> Result<(), SubmitError> {
        let mut state = self.lock();
        match state.phase {
            Phase::Open => {}
            Phase::Draining(_) => return Err(SubmitError::ShuttingDown),
            Phase::Ended => return Err(SubmitError::EngineFailed),
        }
        if state.running + state.waiting.len() >= self.parallel + self.queue_limit {
            // Those that hung up while they waited no longer count.
            state.waiting.retain(|waiting| !waiting.is_closed());
            if state.running + state.waiting.len() >= self.parallel + self.queue_limit {
                return Err(SubmitError::QueueFull { limit: u32::try_from(self.queue_limit).unwrap_or(u32::MAX) });
            }
        }
        state.waiting.push_back(waiting);
        state.woken = true;
        self.changed.notify_one();
        self.publish(&state);
        Ok(())
    }

    /// Makes the engine's thread look again.
    pub(super) fn wake(&self) {
        self.lock().woken = true;
        self.changed.notify_one();
    }

    /// Makes the engine's thread look again if it waits for a reader; cheap otherwise.
    pub(super) fn unpark(&self) {
        if self.parked.swap(false, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// Says that a sequence waits for its reader. To be called before the last look at the reader's channel.
    pub(super) fn park(&self) {
        self.parked.store(true, Ordering::Release);
    }

    /// Asks for a context of `cells` cells, or of what the running sequences need.
    pub(super) fn ask_shrink(&self, cells: u32) {
        let mut state = self.lock();
        state.shrink = Some(state.shrink.map_or(cells, |asked| asked.min(cells)));
        state.woken = true;
        self.changed.notify_one();
    }

    /// What was asked for, once.
    pub(super) fn take_shrink(&self) -> Option<u32> {
        self.lock().shrink.take()
    }

    /// Blocks until there may be something to do, or `timeout` is over.
    pub(super) fn wait(&self, timeout: Duration) {
        let state = self.lock();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, timeout, |state| !state.woken)
            .unwrap_or_else(PoisonError::into_inner);
        state.woken = false;
    }

    /// Takes the next request that can run; `give_up` gets those whose deadline is over.
    pub(super) fn take(&self, now: Instant, mut give_up: impl FnMut(W)) -> Option<W> {
        let mut state = self.lock();
        while let Some(waiting) = state.waiting.pop_front() {
            if waiting.is_closed() {
                continue;
            }
            if waiting.deadline().is_some_and(|deadline| deadline <= now) {
                give_up(waiting);
                continue;
            }
            state.running += 1;
            self.publish(&state);
            return Some(waiting);
        }
        self.publish(&state);
        None
    }

    /// Removes those who hung up or whose deadline is over from the queue.
    pub(super) fn expire(&self, now: Instant, mut give_up: impl FnMut(W)) {
        let mut state = self.lock();
        let mut index = 0;
        while let Some(waiting) = state.waiting.get(index) {
            let late = waiting.deadline().is_some_and(|deadline| deadline <= now);
            if !late && !waiting.is_closed() {
                index += 1;
                continue;
            }
            if let Some(waiting) = state.waiting.remove(index) {
                give_up(waiting);
            }
        }
        self.publish(&state);
    }

    /// The earliest deadline in the queue.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.lock().waiting.iter().filter_map(Queued::deadline).min()
    }

    /// Nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().waiting.is_empty()
    }

    /// A request that ran has ended.
    pub(super) fn ended(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        self.publish(&state);
    }

    /// Running and waiting requests, and every change of them.
    pub(super) fn activity(&self) -> watch::Receiver<Activity> {
        self.activity.subscribe()
    }

    // Under the lock, so that the last to publish is the last to have changed something.
    fn publish(&self, state: &State<W>) {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let now = Activity { running: count(state.running), waiting: count(state.waiting.len()) };
        self.activity.send_if_modified(|known| std::mem::replace(known, now) != now);
    }

    /// How far the end has come.
    pub(super) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Takes no more requests; those that are here may end until `deadline`. A second call can only shorten the time.
    pub(super) fn drain_until(&self, deadline: Instant) {
        let mut state = self.lock();
        state.phase = match state.phase {
            Phase::Open => Phase::Draining(deadline),
            Phase::Draining(known) => Phase::Draining(known.min(deadline)),
            Phase::Ended => Phase::Ended,
        };
        state.woken = true;
        self.changed.notify_one();
    }

    /// The engine's thread ends: returns those who still wait, and nobody comes any more.
    pub(super) fn end(&self) -> Vec<W> {
        let mut state = self.lock();
        state.phase = Phase::Ended;
        state.running = 0;
        let left = state.waiting.drain(..).collect();
        self.publish(&state);
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(deadline: Option<Instant>) -> (Waiting, mpsc::Receiver<GenerateEvent>) {
        let (events, receiver) = mpsc::channel(4);
        let request = GenerateRequest { deadline, ..GenerateRequest::default() };
        (Waiting { request, chooser: Chooser::default(), events, submitted: Instant::now() }, receiver)
    }

    #[test]
    fn the_queue_is_bounded_and_forgets_who_hung_up() {
        let mailbox = Mailbox::new(1, 1);
        let (first, _first) = waiting(None);
        let (second, second_reader) = waiting(None);
        mailbox.submit(first).unwrap();
        mailbox.submit(second).unwrap();
        let (third, _third) = waiting(None);
        assert_eq!(mailbox.submit(third).unwrap_err(), SubmitError::QueueFull { limit: 1 });
        drop(second_reader);
        let (fourth, _fourth) = waiting(None);
        mailbox.submit(fourth).unwrap();
        assert_eq!(*mailbox.activity().borrow(), Activity { running: 0, waiting: 2 });
        assert!(mailbox.take(Instant::now(), |_| {}).is_some());
        assert_eq!(*mailbox.activity().borrow(), Activity { running: 1, waiting: 1 });
    }

    #[test]
    fn deadlines_end_the_wait() {
        let mailbox = Mailbox::new(4, 4);
        let now = Instant::now();
        let (late, _late) = waiting(Some(now));
        let (patient, _patient) = waiting(Some(now + Duration::from_mins(1)));
        mailbox.submit(late).unwrap();
        mailbox.submit(patient).unwrap();
        assert_eq!(mailbox.next_deadline(), Some(now));
        let mut gone = 0;
        mailbox.expire(now, |_| gone += 1);
        assert_eq!((gone, mailbox.activity().borrow().waiting), (1, 1));
        mailbox.drain_until(now + Duration::from_secs(5));
        mailbox.drain_until(now + Duration::from_secs(9));
        assert_eq!(mailbox.phase(), Phase::Draining(now + Duration::from_secs(5)));
        let (another, _another) = waiting(None);
        assert_eq!(mailbox.submit(another).unwrap_err(), SubmitError::ShuttingDown);
        assert_eq!(mailbox.end().len(), 1);
        let (another, _another) = waiting(None);
        assert_eq!(mailbox.submit(another).unwrap_err(), SubmitError::EngineFailed);
    }
}
