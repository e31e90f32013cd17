//! The worker's side of the ledger: it asks before it takes more memory.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{MemoryUse, RunnerCommand, RunnerEvent};

/// How long the agent has to answer; its loop answers in milliseconds unless it is gone.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long nobody is asked after a question without an answer; doubled after each further one, up to [`LONGEST_SILENCE`].
const SILENCE: Duration = Duration::from_secs(5);

/// See [`SILENCE`].
const LONGEST_SILENCE: Duration = Duration::from_mins(1);

/// Answers that nobody has taken yet.
const ANSWERS: usize = 16;

/// Why there is no more memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For people.
    pub reason: String,
    /// Others may leave what is missing: it is worth waiting for.
    pub passing: bool,
}

impl Refusal {
    /// Another time the answer may be another one.
    pub fn passing(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), passing: true }
    }
}

/// Who is asked before the context grows.
pub trait Grants: Send + Sync {
    /// Asks for `more` bytes per device, beyond what the last report said. Blocks for at most a second. What was granted
    /// is settled by the next report.
    fn ask(&self, more: &[MemoryUse]) -> Result<(), Refusal>;

    /// What was granted is not taken after all.
    fn give_back(&self);
}

/// Asks the agent by events, and hears its answers as commands.
pub(super) struct Agent<T> {
    tell: T,
    /// See [`PATIENCE`] and [`SILENCE`].
    patience: Duration,
    silence: Duration,
    state: Mutex<State>,
}

struct State {
    /// Questions asked.
    asked: u64,
    answers: Receiver<RunnerCommand>,
    /// When a question was last left without an answer, and how long nobody is asked after it.
    silent: Option<(Instant, Duration)>,
}

impl<T: Fn(&RunnerEvent) -> bool + Send + Sync> Agent<T> {
    /// `tell` says an event to the agent, and whether it could. Commands go into the sender.
    pub(super) fn new(tell: T) -> (Self, SyncSender<RunnerCommand>) {
        Self::with(tell, PATIENCE, SILENCE)
    }

    fn with(tell: T, patience: Duration, silence: Duration) -> (Self, SyncSender<RunnerCommand>) {
        let (sender, commands) = sync_channel(ANSWERS);
        let state = Mutex::new(State { asked: 0, answers: commands, silent: None });
        (Self { tell, patience, silence, state }, sender)
    }
}

impl<T: Fn(&RunnerEvent) -> bool + Send + Sync> Grants for Agent<T> {
    fn ask(&self, more: &[MemoryUse]) -> Result<(), Refusal> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.silent.is_some_and(|(silent, pause)| silent.elapsed() < pause) {
            return Err(Refusal::passing("the agent has not answered lately"));
        }
        state.asked += 1;
        let asked = state.asked;
        if !(self.tell)(&RunnerEvent::Growth { id: asked, memory: more.to_vec() }) {
            return Err(Refusal::passing("the agent cannot be asked for memory"));
        }
        let deadline = Instant::now() + self.patience;
        loop {
            match state.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(RunnerCommand::Growth { id, refused, passing }) if id == asked => {
                    state.silent = None;
                    return refused.map_or(Ok(()), |reason| Err(Refusal { reason, passing }));
                }
                // To an earlier question, which was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let pause = state.silent.map_or(self.silence, |(_, pause)| (pause * 2).min(LONGEST_SILENCE));
                    state.silent = Some((Instant::now(), pause));
                    self.give_back();
                    return Err(Refusal::passing("the agent did not answer whether there is memory"));
                }
            }
        }
    }

    fn give_back(&self) {
        // An agent that cannot be told is gone, and its ledger with it.
        let _ = (self.tell)(&RunnerEvent::Growth { id: 0, memory: Vec::new() });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn the_answer_to_this_question_counts() {
        let start = |patience| {
            let (told, events) = channel();
            let told = Mutex::new(told);
            let tell = move |event: &RunnerEvent| told.lock().unwrap().send(event.clone()).is_ok();
            let (agent, commands) = Agent::with(tell, patience, Duration::from_mins(10));
            let agent = Arc::new(agent);
            let ask = move || {
                let agent = Arc::clone(&agent);
                let more = [MemoryUse { device: "CPU".to_owned(), context_bytes: 7, ..MemoryUse::default() }];
                std::thread::spawn(move || agent.ask(&more))
            };
            (ask, commands, events)
        };
        let (ask, commands, events) = start(Duration::from_mins(10));
        let id = |event| match event {
            RunnerEvent::Growth { id, memory } => (id, memory.len()),
            other => panic!("{other:?}"),
        };
        let first = ask();
        assert_eq!(id(events.recv().unwrap()), (1, 1));
        let answer = |id, refused: Option<&str>| RunnerCommand::Growth {
            id,
            refused: refused.map(str::to_owned),
            passing: refused.is_some(),
        };
        commands.send(answer(0, Some("an old answer"))).unwrap();
        commands.send(answer(1, None)).unwrap();
        assert_eq!(first.join().unwrap(), Ok(()));

        let second = ask();
        assert_eq!(id(events.recv().unwrap()), (2, 1));
        commands.send(answer(2, Some("no room"))).unwrap();
        assert_eq!(second.join().unwrap(), Err(Refusal { reason: "no room".to_owned(), passing: true }));

        let (ask, _commands, events) = start(Duration::from_millis(10));
        let third = ask();
        assert_eq!(id(events.recv().unwrap()), (1, 1));
        assert!(third.join().unwrap().is_err_and(|refusal| refusal.passing), "nobody answers");
        assert_eq!(id(events.recv().unwrap()), (0, 0), "what may have been granted is given back");
        assert!(ask().join().unwrap().is_err(), "and nobody is asked for a while");
        assert!(events.try_recv().is_err());
    }
}
