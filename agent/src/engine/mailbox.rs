//! The bounded queue between those who ask and the engine's thread.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::request::{GenerateEvent, GenerateRequest, SubmitError};

/// A request that has no slot yet.
pub(super) struct Waiting {
    pub(super) request: GenerateRequest,
    pub(super) events: mpsc::Sender<GenerateEvent>,
    pub(super) submitted: Instant,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Requests are taken.
    #[default]
    Open,
    /// No new requests; those that are here may end until then.
    Draining(Option<Instant>),
    /// The engine's thread has ended.
    Ended,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    running: usize,
    phase: Phase,
    woken: bool,
}

/// The queue. All waiting is bounded: `parallel` may run and `queue_limit` may wait.
pub(super) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
    /// Some sequence waits for its reader.
    parked: AtomicBool,
    parallel: usize,
    queue_limit: usize,
}

impl Mailbox {
    pub(super) fn new(parallel: usize, queue_limit: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), parked: AtomicBool::new(false), parallel, queue_limit }
    }

    // A panic elsewhere cannot leave the state half-changed: every change is one assignment or one queue operation.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a request into the queue.
    pub(super) fn submit(&self, waiting: Waiting) -> Result<(), SubmitError> {
        let mut state = self.lock();
        match state.phase {
            Phase::Open => {}
            Phase::Draining(_) => return Err(SubmitError::ShuttingDown),
            Phase::Ended => return Err(SubmitError::EngineFailed),
        }
        if state.running + state.waiting.len() >= self.parallel + self.queue_limit {
            // Those that hung up while they waited no longer count.
            state.waiting.retain(|waiting| !waiting.events.is_closed());
            if state.running + state.waiting.len() >= self.parallel + self.queue_limit {
                return Err(SubmitError::QueueFull { limit: u32::try_from(self.queue_limit).unwrap_or(u32::MAX) });
            }
        }
        state.waiting.push_back(waiting);
        state.woken = true;
        self.changed.notify_one();
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
    pub(super) fn take(&self, now: Instant, mut give_up: impl FnMut(Waiting)) -> Option<Waiting> {
        let mut state = self.lock();
        while let Some(waiting) = state.waiting.pop_front() {
            if waiting.events.is_closed() {
                continue;
            }
            if waiting.request.deadline.is_some_and(|deadline| deadline <= now) {
                give_up(waiting);
                continue;
            }
            state.running += 1;
            return Some(waiting);
        }
        None
    }

    /// Puts a request back at the head of the queue.
    pub(super) fn put_back(&self, waiting: Waiting) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        state.waiting.push_front(waiting);
    }

    /// Removes those who hung up or whose deadline is over from the queue.
    pub(super) fn expire(&self, now: Instant, mut give_up: impl FnMut(Waiting)) {
        let mut state = self.lock();
        let mut index = 0;
        while let Some(waiting) = state.waiting.get(index) {
            let late = waiting.request.deadline.is_some_and(|deadline| deadline <= now);
            if !late && !waiting.events.is_closed() {
                index += 1;
                continue;
            }
            if let Some(waiting) = state.waiting.remove(index) {
                give_up(waiting);
            }
        }
    }

    /// The earliest deadline in the queue.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.lock().waiting.iter().filter_map(|waiting| waiting.request.deadline).min()
    }

    /// A request that ran has ended.
    pub(super) fn ended(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
    }

    /// Running and waiting requests.
    pub(super) fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.running, state.waiting.len())
    }

    /// How far the end has come.
    pub(super) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Moves on towards the end; never back.
    pub(super) fn advance(&self, phase: Phase) {
        let mut state = self.lock();
        state.phase = state.phase.max(phase);
        state.woken = true;
        self.changed.notify_one();
    }

    /// Empties the queue.
    pub(super) fn drain(&self) -> Vec<Waiting> {
        self.lock().waiting.drain(..).collect()
    }
}
