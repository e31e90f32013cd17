//! The worker's side of the ledger: it asks before it takes more memory.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{MemoryUse, RunnerCommand, RunnerEvent};

/// How long the agent has to answer; its loop answers in milliseconds unless it is gone.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long nobody is asked after a question without an answer: streams wait meanwhile.
const SILENCE: Duration = Duration::from_secs(5);

/// Answers that nobody has taken yet.
const ANSWERS: usize = 16;

/// Who is asked before the context grows.
pub trait Grants: Send + Sync {
    /// Asks for `more` bytes per device, beyond what the last report said. Blocks for at most a second. An error says
    /// why not, for people. What was granted is settled by the next report.
    fn ask(&self, more: &[MemoryUse]) -> Result<(), String>;

    /// What was granted is not taken after all.
    fn give_back(&self);
}

/// Asks the agent by events, and hears its answers as commands.
pub(super) struct Agent<T> {
    tell: T,
    state: Mutex<State>,
}

struct State {
    /// Questions asked.
    asked: u64,
    answers: Receiver<RunnerCommand>,
    /// When a question was last left without an answer.
    silent: Option<Instant>,
}

impl<T: Fn(&RunnerEvent) -> bool + Send + Sync> Agent<T> {
    /// `tell` says an event to the agent, and whether it could. Commands go into the sender.
    pub(super) fn new(tell: T) -> (Self, SyncSender<RunnerCommand>) {
        let (sender, commands) = sync_channel(ANSWERS);
        (Self { tell, state: Mutex::new(State { asked: 0, answers: commands, silent: None }) }, sender)
    }
}

impl<T: Fn(&RunnerEvent) -> bool + Send + Sync> Grants for Agent<T> {
    fn ask(&self, more: &[MemoryUse]) -> Result<(), String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.silent.is_some_and(|silent| silent.elapsed() < SILENCE) {
            return Err("the agent has not answered lately".to_owned());
        }
        state.asked += 1;
        let asked = state.asked;
        if !(self.tell)(&RunnerEvent::Growth { id: asked, memory: more.to_vec() }) {
            return Err("the agent cannot be asked for memory".to_owned());
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match state.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(RunnerCommand::Growth { id, refused }) if id == asked => return refused.map_or(Ok(()), Err),
                // To an earlier question, which was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    state.silent = Some(Instant::now());
                    self.give_back();
                    return Err("the agent did not answer whether there is memory".to_owned());
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
        let (told, events) = channel();
        let told = Mutex::new(told);
        let (agent, commands) = Agent::new(move |event: &RunnerEvent| told.lock().unwrap().send(event.clone()).is_ok());
        let agent = Arc::new(agent);
        let ask = || {
            let agent = Arc::clone(&agent);
            let more = [MemoryUse { device: "CPU".to_owned(), context_bytes: 7, ..MemoryUse::default() }];
            std::thread::spawn(move || agent.ask(&more))
        };
        let id = |event| match event {
            RunnerEvent::Growth { id, memory } => (id, memory.len()),
            other => panic!("{other:?}"),
        };
        let first = ask();
        assert_eq!(id(events.recv().unwrap()), (1, 1));
        commands.send(RunnerCommand::Growth { id: 0, refused: Some("an old answer".to_owned()) }).unwrap();
        commands.send(RunnerCommand::Growth { id: 1, refused: None }).unwrap();
        assert_eq!(first.join().unwrap(), Ok(()));

        let second = ask();
        assert_eq!(id(events.recv().unwrap()), (2, 1));
        commands.send(RunnerCommand::Growth { id: 2, refused: Some("no room".to_owned()) }).unwrap();
        assert_eq!(second.join().unwrap(), Err("no room".to_owned()));

        let third = ask();
        assert_eq!(id(events.recv().unwrap()), (3, 1));
        assert!(third.join().unwrap().is_err(), "nobody answers");
        assert_eq!(id(events.recv().unwrap()), (0, 0), "what may have been granted is given back");
    }
}
