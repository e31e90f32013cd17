//! Another size of the context: a new one on the same weights, to which the state moves.
//!
//! | both contexts fit | what happens | what streams see |
//! |---|---|---|
//! | yes, and somebody generates, or will before the room is needed | the new one is made by a thread beside the old, then the state moves | get + set |
//! | no, or nobody can go on without | the state is taken out, the old context freed, the new one made, the state put in | all of it |
//!
//! Before it grows, the ledger is asked for what it takes at its height; it is free again when the next report says what
//! was taken, or when nothing came of it. For a context beside the running one that thread asks, so that streams do not
//! wait for the answer. The buffer that the state moves through is there before anything is freed, so that a failure finds
//! the way back.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use super::{Context, ContextParams, Executor, load};
use crate::engine::room::{self, DeviceRoom, Way};
use crate::runner::grants::{Grants, Refusal};
use crate::runner::protocol::MemoryUse;

/// What became of a change of size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Resized {
    /// Another size; all sequences are still there.
    Moved,
    /// Another size; every sequence has to be read again.
    Emptied,
    /// As before.
    Refused(Refusal),
    /// As before in size, but every sequence has to be read again.
    RefusedEmptied(String),
    /// There is no context any more.
    Lost(String),
}

/// What nobody can leave.
fn refused(reason: impl Into<String>) -> Resized {
    Resized::Refused(Refusal { reason: reason.into(), passing: false })
}

/// A context that is being made beside the running one.
pub(super) struct Making {
    params: ContextParams,
    result: Receiver<Result<(Context, Option<Context>), Refusal>>,
}

/// How much the thread that makes a context stands back behind those that compute.
const NICENESS: i32 = 5;

/// A question to the ledger.
struct Question {
    grants: Arc<dyn Grants>,
    more: Vec<MemoryUse>,
}

impl Executor {
    /// Begins to make a context of `cells` cells beside the running one; `done` is called when it is there. False when
    /// both do not fit, or there is no thread to be had.
    pub(in crate::engine) fn prepare(&mut self, cells: u32, done: impl FnOnce() + Send + 'static) -> bool {
        if self.making.is_some() {
            return false;
        }
        let rooms = self.rooms(cells);
        if room::way(&rooms, cells) != Ok(Way::Beside) {
            return false;
        }
        let question = self.question(&rooms, cells);
        let (sender, result) = mpsc::sync_channel(1);
        let params = ContextParams { cells, ..self.params.clone() };
        let (model, wanted) = (self.model.clone(), params.clone());
        #[cfg(test)]
        let wanted = if std::mem::take(&mut self.spoils_next) { ContextParams { cells: 1, ..wanted } } else { wanted };
        let draft = self.guesser.as_ref().and_then(|guesser| guesser.recipe(cells));
        let thread = thread::Builder::new().name("context".to_owned()).spawn(move || {
            // Streams come first. Of no use where it is not allowed, and of no harm.
            let _ = rustix::process::nice(NICENESS);
            let both = || {
                let context = Context::new(&model, &wanted)?;
                let draft = draft.map(|(model, wanted)| Context::new(&model, &wanted)).transpose()?;
                Ok((context, draft))
            };
            let granted = question.map_or(Ok(()), |Question { grants, more }| grants.ask(&more));
            let made = granted.and_then(|()| both().map_err(|reason| Refusal { reason, passing: false }));
            // Nobody waits any more when the engine has ended: then the context goes again.
            let _ = sender.send(made);
            done();
        });
        if thread.is_ok() {
            self.making = Some(Making { params, result });
        }
        self.making.is_some()
    }

    /// Cells of the context that is being made.
    pub(in crate::engine) fn preparing(&self) -> Option<u32> {
        self.making.as_ref().map(|making| making.params.cells)
    }

    /// Takes the context that was being made into use; `None` when it is not ready yet, and never with `wait`.
    pub(in crate::engine) fn prepared(&mut self, wait: bool) -> Option<Resized> {
        let making = self.making.as_ref()?;
        let made = if wait { making.result.recv().ok() } else { making.result.try_recv().ok() };
        let made = match made {
            Some(made) => made,
            None if wait => {
                Err(Refusal { reason: "the thread that made the context is gone".to_owned(), passing: false })
            }
            None => return None,
        };
        let params = self.making.take()?.params;
        Some(match made {
            Ok((context, draft)) => {
                let resized = self.swap(context, params);
                let changed = matches!(resized, Resized::Moved | Resized::Emptied);
                if let Some((guesser, draft)) = self.guesser.as_mut().zip(draft).filter(|_| changed) {
                    guesser.swap(draft, &mut self.staging);
                }
                resized
            }
            Err(refusal) => Resized::Refused(refusal),
        })
    }

    /// Moves everything to `context`; the old one stays until that is done.
    fn swap(&mut self, mut context: Context, params: ContextParams) -> Resized {
        let Some(old) = self.context.as_mut() else { return Resized::Lost("no context".to_owned()) };
        let occupied = self.pool.used() > 0;
        if !self.capability.state_survives(old.cells(), params.cells) {
            self.host.clear();
            self.clear();
            (self.context, self.params) = (Some(context), params);
            return if occupied { Resized::Emptied } else { Resized::Moved };
        }
        if occupied {
            let Some(state) = old.state(&mut self.staging) else {
                return refused("no host memory to move the state through");
            };
            if !context.set_state(state) {
                return refused("the state does not fit into the other context");
            }
        }
        let old = self.context.replace(context);
        self.params = params;
        // Streams do not wait until its memory is unmapped, which takes a third as long as the moving. Where there is no
        // thread to be had it goes here.
        let _ = thread::Builder::new().name("old context".to_owned()).spawn(move || drop(old));
        Resized::Moved
    }

    /// Gives the context `cells` cells at once.
    pub(in crate::engine) fn resize(&mut self, cells: u32) -> Resized {
        let rooms = self.rooms(cells);
        // Shrinking gives back soon what it takes.
        let grants = self.grants.as_deref().filter(|_| cells > self.cells());
        match room::acquire(&rooms, cells, grants) {
            Ok(()) => self.replace(cells),
            Err(refusal) => Resized::Refused(refusal),
        }
    }

    /// What the ledger is to be asked before a context of `cells` cells is made beside the running one.
    fn question(&self, rooms: &[DeviceRoom], cells: u32) -> Option<Question> {
        let grants = self.grants.as_ref().filter(|_| cells > self.cells())?;
        Some(Question { grants: Arc::clone(grants), more: room::more(rooms, Way::Beside) })
    }

    /// Whether streams can go on while a context of `cells` cells is made, and in it.
    pub(in crate::engine) fn fits_beside(&mut self, cells: u32) -> bool {
        self.state_survives(cells) && room::way(&self.rooms(cells), cells) == Ok(Way::Beside)
    }

    /// Whether what is in the cache is right in a context of `cells` cells.
    pub(in crate::engine) fn state_survives(&self, cells: u32) -> bool {
        self.capability.state_survives(self.cells(), cells)
    }

    /// Nothing came of what the ledger granted.
    pub(in crate::engine) fn give_back(&self) {
        if let Some(grants) = &self.grants {
            grants.give_back();
        }
    }

    /// The same without asking whether there is memory for it.
    pub(super) fn replace(&mut self, cells: u32) -> Resized {
        let Some(mut old) = self.context.take() else { return Resized::Lost("no context".to_owned()) };
        let occupied = self.pool.used() > 0;
        let survives = self.capability.state_survives(old.cells(), cells);
        let state = if occupied && survives {
            let Some(state) = old.state(&mut self.staging) else {
                self.context = Some(old);
                return refused("no host memory to move the state through");
            };
            Some(state)
        } else {
            None
        };
        drop(old);

        let params = ContextParams { cells, ..self.params.clone() };
        let (made, refused) = match Context::new(&self.model, &params) {
            Ok(context) => {
                self.params = params;
                (Ok(context), None)
            }
            Err(reason) => (Context::new(&self.model, &self.params), Some(reason)),
        };
        let mut context = match made {
            Ok(context) => context,
            Err(error) => return Resized::Lost(error),
        };
        let moved = match state {
            Some(state) => context.set_state(state),
            // The old size again, whose state was not taken out, or another rotation.
            None => !occupied,
        };
        self.context = Some(context);
        if !moved {
            self.clear();
        }
        if let Some(guesser) = self.guesser.as_mut().filter(|_| refused.is_none()) {
            guesser.replace(cells);
        }
        if !survives && refused.is_none() {
            self.host.clear();
        }
        match (refused, moved) {
            (None, true) => Resized::Moved,
            (None, false) => Resized::Emptied,
            (Some(reason), true) => self::refused(reason),
            (Some(reason), false) => Resized::RefusedEmptied(reason),
        }
    }

    /// Nobody has cells any more.
    fn clear(&mut self) {
        self.pool.clear();
        if let Some(guesser) = &mut self.guesser {
            guesser.clear();
        }
    }

    /// Host bytes of the buffer that states move through.
    pub(in crate::engine) fn staging_bytes(&self) -> u64 {
        self.staging.len() as u64
    }

    /// Gives that buffer back until the next change of size.
    pub(in crate::engine) fn free_staging(&mut self) {
        self.staging = Vec::new();
    }

    /// The memory around a change to `cells` cells; none where there is no context.
    fn rooms(&mut self, cells: u32) -> Vec<DeviceRoom> {
        let Some(context) = self.context.as_mut() else { return Vec::new() };
        // Other sequences may write more of it before it is moved.
        let state = context.state_size() as u64 / 8 * 9;
        let staging = state.saturating_sub(self.staging.len() as u64);
        let (from, mut now) = (context.cells(), context.memory_of_cells());
        let params = ContextParams { cells, ..self.params.clone() };
        let mut then = Context::size(&self.model, &params);
        if let Some(guesser) = &self.guesser {
            load::add(&mut now, guesser.memory_of_cells());
            then = then.and_then(|mut then| {
                if let Some((model, params)) = guesser.recipe(cells) {
                    load::add(&mut then, Context::size(&model, &params)?);
                }
                Ok(then)
            });
        }
        let mut rooms = room::around(&now, then, from, cells);
        for room in rooms.iter_mut().filter(|room| room.device == "CPU") {
            room.staging = staging;
        }
        rooms
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use altiplano_crds::model_deployment::ContextSpec;
    use altiplano_test_models::toy;

    use super::*;
    use crate::engine::ffi::LogprobRow;
    use crate::engine::prefix::Reuse;
    use crate::engine::request::Token;
    use crate::engine::tests::config;
    use crate::runner::protocol::RunnerConfig;

    /// Two sequences of one context that say what is most probable.
    struct Streams {
        executor: Executor,
        sequences: Vec<(i32, Vec<Token>)>,
        resident: Vec<usize>,
    }

    impl Streams {
        fn start(cells: i32) -> Self {
            let context =
                ContextSpec { min_tokens: Some(cells), max_tokens: Some(2048), parallel: 2, ..ContextSpec::default() };
            let config = RunnerConfig { context, ..config(toy::path()) };
            let (model, gpu) = load::open(&config, &|_| {}).expect("the toy model loads");
            let load::Loaded { model, context, params, plan, .. } =
                load::load(&config, model, gpu).expect("the context is made");
            let mut executor = Executor::new(model, context, params, None, Vec::new(), &plan);
            let mut begin = |first: Token| {
                let (id, resident) = executor.begin(Reuse::Nothing, &[]).expect("an id");
                assert_eq!(resident, 0);
                // Both together are one batch, also where that is small.
                (id, (first..first + 4).collect())
            };
            let sequences = vec![begin(300), begin(500)];
            Self { executor, sequences, resident: vec![0, 0] }
        }

        /// One step of all; what each says next, with the log-probability to the bit.
        fn step(&mut self) -> Vec<(Token, u32)> {
            let mut rows = Vec::new();
            let work: Vec<_> = self
                .sequences
                .iter()
                .zip(&self.resident)
                .map(|((id, tokens), &from)| (*id, &tokens[from..], from, true, &[][..]))
                .collect();
            self.executor.decode(work.into_iter(), &mut rows).expect("a step");
            let mut said = Vec::new();
            for (index, row) in rows.into_iter().enumerate() {
                let LogprobRow { top, .. } = self.executor.logprobs(row, 0, 1).expect("log-probabilities");
                let (token, logprob) = top[0];
                let (_, tokens) = &mut self.sequences[index];
                self.resident[index] = tokens.len();
                tokens.push(token);
                said.push((token, logprob.to_bits()));
            }
            said
        }

        fn steps(&mut self, count: usize) -> Vec<Vec<(Token, u32)>> {
            (0..count).map(|_| self.step()).collect()
        }
    }

    /// Larger at once, larger beside the streams, smaller: not a bit of what they say changes.
    #[test]
    fn streams_do_not_notice_another_size() {
        let mut large = Streams::start(2048);
        let expected = large.steps(60);

        let mut moved = Streams::start(512);
        let mut said = moved.steps(20);
        assert_eq!(moved.executor.resize(1024), Resized::Moved);
        assert!(moved.executor.staging_bytes() > 10_000);
        said.extend(moved.steps(10));
        let (done, ready) = mpsc::sync_channel(1);
        assert!(moved.executor.prepare(1536, move || done.send(()).expect("the test waits")));
        assert!(!moved.executor.prepare(2048, || {}), "one at a time");
        said.extend(moved.steps(10));
        assert_eq!(moved.executor.cells(), 1024);
        ready.recv().expect("the context is made");
        assert_eq!(moved.executor.prepared(false), Some(Resized::Moved));
        assert_eq!((moved.executor.cells(), moved.executor.preparing()), (1536, None));
        said.extend(moved.steps(10));
        assert_eq!(moved.executor.resize(512), Resized::Moved);
        said.extend(moved.steps(10));
        assert_eq!(said, expected);
        moved.executor.free_staging();
        assert_eq!(moved.executor.staging_bytes(), 0);
    }

    /// A context that cannot be made, or that does not hold what there is, changes nothing.
    #[test]
    fn failure_loses_nothing() {
        let mut large = Streams::start(512);
        let expected = large.steps(30);
        let mut streams = Streams::start(512);
        let mut said = streams.steps(10);
        // llama.cpp makes no context with fewer cells than sequences.
        assert!(matches!(streams.executor.replace(1), Resized::Refused(refusal) if refusal.reason.contains("too few")));
        said.extend(streams.steps(10));
        assert!(streams.executor.prepare(1, || {}), "there is memory for it");
        assert!(matches!(streams.executor.prepared(true), Some(Resized::Refused(_))));
        // Made, but too small for the state.
        while streams.executor.pool().used() <= 256 {
            said.extend(streams.steps(1));
        }
        assert!(streams.executor.prepare(256, || {}));
        assert!(
            matches!(streams.executor.prepared(true), Some(Resized::Refused(refusal)) if refusal.reason.contains("fit"))
        );
        // More than this machine has.
        let refused = streams.executor.resize(1 << 31);
        assert!(matches!(&refused, Resized::Refused(refusal) if refusal.reason.contains("are free")), "{refused:?}");
        assert_eq!(streams.executor.cells(), 512);
        let more = large.steps(said.len() + 5 - expected.len());
        said.extend(streams.steps(5));
        assert_eq!(said, [expected, more].concat());
    }
}
