//! The engine's thread: admits, steps, samples, hands out, until it is told to end.

mod admit;
mod alone;
mod media;
pub(super) mod probe;
mod room;
mod speculate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::adapters::Turns;
use super::chooser::ChooseError;
use super::error::EngineError;
use super::ffi::{DecodeError, Model};
use super::load::{Loaded, Plan};
use super::mailbox::{Mailbox, Phase};
use super::prefix::Serial;
use super::request::FinishReason;
use super::schedule::{self, Chunk, Crowd, Lane, Limits, Pace};
use super::sequence::{Sequence, give_up};
use super::shared::Shared;
use super::sizing::Needs;
use super::speculative::Price;
use super::step::Executor;
use crate::runner::grants::Grants;
use crate::runner::protocol::RunnerReport;
use media::Pictures;
use room::Refused;

/// Longest sleep of an idle engine.
const IDLE: Duration = Duration::from_secs(10);

/// All that the engine's thread owns.
pub(super) struct Worker {
    model: Model,
    executor: Executor,
    plan: Plan,
    mailbox: Arc<Mailbox>,
    shared: Arc<Shared>,
    report: watch::Sender<RunnerReport>,
    /// The oldest first.
    running: Vec<Sequence>,
    /// Without cells, because there is no room: preempted, or next to begin. They go before everybody in the queue.
    preempted: Vec<Sequence>,
    pace: Pace,
    price: Price,
    turns: Turns,
    pictures: Pictures,
    next_serial: Serial,
    /// Steps in which one sequence has generated alone.
    alone: u32,
    /// When something was last computed.
    last_step: Instant,
    /// Cells when the size was last looked at.
    cells: u32,
    needs: Needs,
    last_resize: Option<Instant>,
    /// What size could not be had.
    refused: Option<Refused>,
    /// When no context could be had beside the running one.
    beside_refused: Option<Instant>,
    /// When a larger context was last wanted before it was needed.
    anticipated: Option<Instant>,
    /// The context that is being made is not needed yet.
    early: bool,
    // Kept between steps for their memory.
    lanes: Vec<Lane>,
    step: Vec<Chunk>,
    rows: Vec<i32>,
}

impl Worker {
    pub(super) fn new(
        loaded: Loaded,
        mailbox: Arc<Mailbox>,
        shared: Arc<Shared>,
        report: watch::Sender<RunnerReport>,
        grants: Option<Arc<dyn Grants>>,
    ) -> Self {
        let Loaded { model, context, params, draft, adapters, encoder, projector: _, plan, facts: _, report: _ } =
            loaded;
        let cells = context.cells();
        Self {
            executor: Executor::new(model.clone(), context, params, draft, adapters, &plan).asks(grants),
            model,
            plan,
            mailbox,
            shared,
            report,
            running: Vec::new(),
            preempted: Vec::new(),
            pace: Pace::default(),
            price: Price::default(),
            turns: Turns::default(),
            pictures: Pictures::new(encoder),
            next_serial: 0,
            alone: 0,
            last_step: Instant::now(),
            cells,
            needs: Needs::default(),
            last_resize: None,
            refused: None,
            beside_refused: None,
            anticipated: None,
            early: false,
            lanes: Vec::new(),
            step: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Works until told to end. The error says why the engine cannot go on.
    pub(super) fn run(mut self) -> Result<(), EngineError> {
        let result = self.work();
        let reason = result.clone().err().unwrap_or(EngineError::ShutDown);
        for sequence in self.running.drain(..).chain(self.preempted.drain(..)) {
            sequence.fail(reason.clone());
            self.shared.update(|stats| stats.failed += 1);
        }
        for waiting in self.mailbox.end() {
            give_up(&waiting, reason.clone());
        }
        self.publish_cells();
        result
    }

    fn work(&mut self) -> Result<(), EngineError> {
        loop {
            let now = Instant::now();
            self.look_around(now)?;
            if let Phase::Draining(deadline) = self.mailbox.phase() {
                let idle = self.running.is_empty() && self.preempted.is_empty() && self.mailbox.is_empty();
                if idle || now >= deadline {
                    return Ok(());
                }
            }
            self.schedule();
            let picture = self.picture_lane();
            if self.step.is_empty() && picture.is_none() {
                self.publish_cells();
                self.probe(now)?;
                self.wait(now);
            } else {
                self.shared.step_begins();
                let started = Instant::now();
                let result = if let Some(lane) = picture {
                    self.read_picture(lane)
                } else {
                    self.speculate();
                    self.make_step(started)
                };
                self.shared.step_ends();
                self.last_step = Instant::now();
                result?;
                self.publish_cells();
            }
        }
    }

    /// Who goes, who comes, and whether the context is of the right size.
    fn look_around(&mut self, now: Instant) -> Result<(), EngineError> {
        self.drop_cancelled(now);
        self.look_after_size(now)?;
        self.look_after_followers();
        self.admit(now)
    }

    /// Sleeps until somebody comes, goes or reads.
    fn wait(&self, now: Instant) {
        // First say that a reader is waited for, then look: else it could read between the two and wake nobody.
        self.mailbox.park();
        if self.running.iter().any(|sequence| sequence.is_ready() || sequence.follow.is_some()) {
            return;
        }
        let drained = match self.mailbox.phase() {
            Phase::Draining(deadline) => Some(deadline),
            Phase::Open | Phase::Ended => None,
        };
        let next =
            [self.mailbox.next_deadline(), drained, self.probe_due(), self.next_try(now)].into_iter().flatten().min();
        self.mailbox.wait(next.map_or(IDLE, |next| next.saturating_duration_since(now)).min(IDLE));
    }

    fn drop_cancelled(&mut self, now: Instant) {
        for index in (0..self.running.len()).rev() {
            if self.running[index].is_cancelled() {
                let sequence = self.running.remove(index);
                tracing::debug!(request = sequence.id, tokens = sequence.tokens.len(), "cancelled");
                self.end(sequence);
                self.shared.update(|stats| stats.cancelled += 1);
            }
        }
        for index in (0..self.preempted.len()).rev() {
            if self.preempted[index].is_cancelled() {
                let sequence = self.preempted.remove(index);
                self.end(sequence);
                self.shared.update(|stats| stats.cancelled += 1);
            } else if self.preempted[index].is_late(now) {
                let sequence = self.preempted.remove(index);
                self.fail(sequence, EngineError::QueueTimeout);
            } else if self.preempted[index].has_waited(now) {
                let sequence = self.preempted.remove(index);
                let reason = format!("no more than {} cells can be had: others hold the memory", self.executor.cells());
                self.fail(sequence, EngineError::ContextFull(reason));
            }
        }
    }

    /// Gives back a sequence's cells; its beginning stays for the next prompt.
    fn end(&mut self, mut sequence: Sequence) {
        self.release(&mut sequence);
        self.mailbox.ended();
    }

    fn release(&mut self, sequence: &mut Sequence) {
        let resident = sequence.resident;
        if let Some(saved) = sequence.saved.take() {
            self.executor.forget(&saved);
        }
        if let Some(id) = sequence.unplace() {
            self.executor.end(id, sequence.key.clone(), sequence.tokens[..resident].to_vec());
        }
    }

    fn schedule(&mut self) {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        // A step holds sequences of one adapter.
        let ready = self.running.iter().filter(|sequence| sequence.is_ready());
        let turn = self.turns.next(ready.map(|sequence| sequence.adapter), Instant::now());
        self.executor.adapt(turn);
        self.lanes.clear();
        self.lanes.extend(self.running.iter().map(|sequence| Lane {
            todo: count(sequence.todo()),
            piece: count(sequence.piece()),
            parked: !sequence.is_ready() || sequence.adapter != turn || sequence.picture().is_some(),
            draft: count(sequence.speculation.draft.len()),
        }));
        let limits = self.limits();
        schedule::plan(&self.lanes, limits, &mut self.step);
        // llama.cpp computes neighbouring ids together.
        let running = &self.running;
        self.step.sort_by_key(|chunk| running[chunk.lane].cells);
    }

    /// Of a step with the lanes that there are.
    fn limits(&self) -> Limits {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let generating = self.lanes.iter().filter(|lane| lane.todo == 1 && !lane.parked).count();
        let reading = self.running.iter().filter(|sequence| sequence.todo() > 1 && !sequence.is_parked()).count();
        let apart = self.plan.attends_on_cpu();
        let crowd = Crowd { generating: count(generating), reading: count(reading), apart };
        self.pace.limits(self.executor.batch_tokens(), self.plan.outputs, crowd)
    }

    /// `begun`: when the guesses for it were begun.
    fn make_step(&mut self, begun: Instant) -> Result<(), EngineError> {
        loop {
            let tokens: u32 = self.step.iter().map(|chunk| chunk.count + chunk.draft).sum();
            if tokens == 0 {
                return Ok(());
            }
            if self.executor.pool().used().saturating_add(tokens) > self.executor.cells() {
                if !self.forget_drafts() {
                    self.make_room()?;
                }
                self.schedule();
                continue;
            }
            let started = Instant::now();
            let running = &self.running;
            let work = self.step.iter().filter_map(|chunk| {
                let sequence = &running[chunk.lane];
                let end = sequence.resident + chunk.count as usize;
                let position = sequence.position_of(sequence.resident);
                let draft = &sequence.speculation.draft[..chunk.draft as usize];
                Some((sequence.cells?, &sequence.tokens[sequence.resident..end], position, chunk.output, draft))
            });
            match self.executor.decode(work, &mut self.rows) {
                Ok(()) => {}
                Err(DecodeError::NoSlot) => {
                    // The cells of a sliding window or of a shared prefix may lie so that the books say otherwise.
                    if !self.forget_drafts() {
                        self.make_room()?;
                    }
                    self.schedule();
                    continue;
                }
                Err(DecodeError::Invalid(reason)) => {
                    tracing::error!(reason, "llama.cpp refused a batch");
                    self.fail_step(&EngineError::DecodeFailed(reason));
                    return Ok(());
                }
                Err(DecodeError::Failed(reason)) => return Err(EngineError::while_computing(reason)),
            }
            self.observe(tokens, started, begun);
            self.advance()?;
            return self.look_after_the_only_one();
        }
    }

    /// The step is done.
    fn advance(&mut self) -> Result<(), EngineError> {
        let heard = self.is_heard();
        for (entry, chunk) in self.step.iter().enumerate() {
            let sequence = &mut self.running[chunk.lane];
            if let Some(id) = sequence.cells.filter(|_| heard && !sequence.has_pictures()) {
                let read = sequence.resident..sequence.resident + chunk.count as usize;
                self.executor.hear(entry, id, read.start, &sequence.tokens[read], 0);
            }
            sequence.advance(chunk.count);
            if let Some(id) = sequence.cells.filter(|_| sequence.is_at_border()) {
                self.executor.snapshot(id, &sequence.key, &sequence.tokens[..sequence.resident]);
            }
        }
        self.sample()
    }

    fn sample(&mut self) -> Result<(), EngineError> {
        let now = Instant::now();
        let mut ended: Vec<(usize, Result<FinishReason, EngineError>)> = Vec::new();
        let (mut generated, mut drafts, mut drafted, mut accepted) = (0, 0, 0, 0);
        let heard = self.is_heard();
        let entries = self.step.iter().zip(&self.rows).enumerate();
        for (entry, (chunk, &row)) in entries.filter(|(_, (chunk, _))| chunk.output) {
            let sequence = &mut self.running[chunk.lane];
            let mut draft = std::mem::take(&mut sequence.speculation.draft);
            draft.truncate(chunk.draft as usize);
            let mut right = 0;
            // The row of its last token, then one for each guess, of which each is right where all before it were.
            for row in row.. {
                let token = match self.executor.sample(&mut sequence.chooser, row) {
                    Ok(token) => token,
                    Err(ChooseError::Sequence(reason)) => {
                        ended.push((chunk.lane, Err(EngineError::GrammarFailed(reason))));
                        break;
                    }
                    Err(ChooseError::Engine(reason)) => return Err(EngineError::DecodeFailed(reason)),
                };
                let logprobs = match sequence.logprobs {
                    None => None,
                    Some(top) => Some(self.executor.logprobs(row, token, top).map_err(EngineError::DecodeFailed)?),
                };
                generated += 1;
                let end =
                    sequence.accept(&self.model, token, logprobs.as_ref(), now).map_err(EngineError::DecodeFailed)?;
                let is_right = draft.get(right) == Some(&token);
                right += usize::from(is_right);
                if let Some(reason) = end {
                    ended.push((chunk.lane, Ok(reason)));
                    break;
                }
                if !is_right {
                    break;
                }
            }
            if !draft.is_empty() {
                drafts += 1;
                drafted += draft.len() as u64;
                accepted += right as u64;
                sequence.settle(draft.len(), right, self.price.of_a_guess());
                if let Some(id) = sequence.cells {
                    let (length, position) = (sequence.resident, sequence.position_of(sequence.resident));
                    self.executor.retract(id, length, position, draft.len() - right)?;
                    if heard && !sequence.has_pictures() {
                        let read = length - right..length;
                        self.executor.hear(entry, id, read.start, &sequence.tokens[read], chunk.count as usize);
                    }
                }
            }
        }
        self.shared.update(|stats| {
            stats.generated_tokens += generated;
            stats.step_sequences += self.step.len() as u64;
            stats.drafts += drafts;
            stats.drafted_tokens += drafted;
            stats.accepted_tokens += accepted;
        });
        ended.sort_unstable_by_key(|(lane, _)| std::cmp::Reverse(*lane));
        for (lane, end) in ended {
            let sequence = self.running.remove(lane);
            match end {
                Ok(reason) => self.finish(sequence, reason),
                Err(error) => self.fail(sequence, error),
            }
        }
        Ok(())
    }

    fn finish(&mut self, mut sequence: Sequence, reason: FinishReason) {
        let record = sequence.speculation.record;
        if record.drafted > 0 {
            let (drafted, accepted) = (record.drafted, record.accepted);
            tracing::debug!(request = sequence.id, drafted, accepted, "guessed");
        }
        self.release(&mut sequence);
        // Before its reader knows, so that who asks next finds the slot free.
        self.mailbox.ended();
        self.shared.update(|stats| match reason {
            FinishReason::Stop => stats.finished_stop += 1,
            FinishReason::Length => stats.finished_length += 1,
        });
        self.publish_cells();
        sequence.finish(reason, Instant::now());
    }

    fn fail(&mut self, mut sequence: Sequence, error: EngineError) {
        if let Some(saved) = sequence.saved.take() {
            self.executor.forget(&saved);
        }
        if let Some(id) = sequence.unplace() {
            self.executor.release(id);
        }
        self.mailbox.ended();
        self.shared.update(|stats| stats.failed += 1);
        sequence.fail(error);
    }

    /// Fails those who took part in the step.
    fn fail_step(&mut self, error: &EngineError) {
        let mut lanes: Vec<usize> = self.step.iter().map(|chunk| chunk.lane).collect();
        lanes.sort_unstable_by(|left, right| right.cmp(left));
        for lane in lanes {
            let sequence = self.running.remove(lane);
            self.fail(sequence, error.clone());
        }
    }

    fn publish_cells(&self) {
        let (used, total) = (self.executor.pool().used(), self.executor.cells());
        let kept = used - self.executor.pool().used_by_running().min(used);
        self.shared.update(|stats| {
            stats.cells_used = used;
            stats.cells_peak = stats.cells_peak.max(used);
            stats.cells_kept = kept;
            stats.cells_total = total;
            stats.host_cache_bytes = self.executor.host().bytes();
            stats.host_cache_states = u32::try_from(self.executor.host().len()).unwrap_or(u32::MAX);
        });
    }
}
