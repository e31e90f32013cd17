//! The engine's thread: admits, steps, samples, hands out, until it is told to end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::error::EngineError;
use super::ffi::{DecodeError, Model};
use super::load::{Loaded, Plan};
use super::mailbox::{Mailbox, Phase, Waiting};
use super::request::FinishReason;
use super::schedule::{self, Chunk, Lane, Pace};
use super::sequence::{Sequence, give_up};
use super::shared::Shared;
use super::sizing::{self, Demand, Sizing};
use super::step::{Executor, Growth};
use crate::runner::protocol::RunnerReport;

/// Time that pieces of prompts may take in a step in which others generate.
const PREFILL_TIME: Duration = Duration::from_millis(100);

/// Least time between two growths that are only wished for, and after one that failed.
const GROWTH_PAUSE: Duration = Duration::from_secs(5);

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
    last_growth: Option<Instant>,
    growth_refused: Option<Instant>,
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
    ) -> Self {
        let Loaded { model, context, params, plan, facts: _, report: _ } = loaded;
        Self {
            executor: Executor::new(model.clone(), context, params, &plan),
            model,
            plan,
            mailbox,
            shared,
            report,
            running: Vec::new(),
            preempted: Vec::new(),
            pace: Pace::default(),
            last_growth: None,
            growth_refused: None,
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
            self.drop_cancelled(now);
            self.admit(now)?;
            if let Phase::Draining(deadline) = self.mailbox.phase() {
                let idle = self.running.is_empty() && self.preempted.is_empty() && self.mailbox.is_empty();
                if idle || now >= deadline {
                    return Ok(());
                }
            }
            self.schedule();
            if self.step.is_empty() {
                self.publish_cells();
                self.wait(now);
            } else {
                self.shared.step_begins();
                let result = self.make_step();
                self.shared.step_ends();
                result?;
                self.publish_cells();
            }
        }
    }

    /// Sleeps until somebody comes, goes or reads.
    fn wait(&self, now: Instant) {
        // First say that a reader is waited for, then look: else it could read between the two and wake nobody.
        self.mailbox.park();
        if self.running.iter().any(|sequence| sequence.todo() > 0 && !sequence.is_parked()) {
            return;
        }
        let drained = match self.mailbox.phase() {
            Phase::Draining(deadline) => Some(deadline),
            Phase::Open | Phase::Ended => None,
        };
        let next = [self.mailbox.next_deadline(), drained].into_iter().flatten().min();
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
                self.preempted.remove(index);
                self.mailbox.ended();
                self.shared.update(|stats| stats.cancelled += 1);
            } else if self.preempted[index].is_late(now) {
                let sequence = self.preempted.remove(index);
                self.fail(sequence, EngineError::QueueTimeout);
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
        if let Some(id) = sequence.unplace() {
            let mut tokens = std::mem::take(&mut sequence.tokens);
            tokens.truncate(resident);
            self.executor.end(id, tokens);
        }
    }

    fn admit(&mut self, now: Instant) -> Result<(), EngineError> {
        let late = |waiting: Waiting| give_up(&waiting, EngineError::QueueTimeout);
        self.mailbox.expire(now, late);
        while self.running.len() < self.plan.parallel as usize {
            let sequence = if self.preempted.is_empty() {
                let Some(waiting) = self.mailbox.take(now, late) else { return Ok(()) };
                let limits = &self.plan.limits;
                let prompt = u32::try_from(waiting.request.prompt.len()).unwrap_or(u32::MAX);
                let need = limits.need(prompt, waiting.request.max_tokens);
                match Sequence::new(waiting, limits.max_tokens, need, now) {
                    Ok(sequence) => sequence,
                    Err(reason) => {
                        // Checked when it was submitted, so this is the reader that has gone meanwhile.
                        tracing::debug!(reason, "a request did not begin");
                        self.mailbox.ended();
                        continue;
                    }
                }
            } else {
                self.preempted.remove(0)
            };
            if let Some(sequence) = self.place(sequence, now)? {
                // No room: it waits, before everybody else, for another to end.
                self.preempted.insert(0, sequence);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Finds cells for a sequence; gives it back when there is no room.
    fn place(&mut self, mut sequence: Sequence, now: Instant) -> Result<Option<Sequence>, EngineError> {
        if let Some(reason) = sequence.is_complete() {
            self.finish(sequence, reason);
            return Ok(None);
        }
        loop {
            match sizing::decide(
                self.executor.cells(),
                self.plan.limits.cap,
                self.demand(Some(&sequence)),
                self.calm(now),
            ) {
                Sizing::Fits => break,
                Sizing::Wait if self.running.is_empty() => {
                    // Nobody will make room.
                    let reason =
                        format!("{} cells do not hold {} tokens", self.executor.cells(), sequence.tokens.len());
                    self.fail(sequence, EngineError::ContextFull(reason));
                    return Ok(None);
                }
                Sizing::Grow { to } if self.may_grow(now) => self.grow(to)?,
                Sizing::Grow { .. } if self.demand(Some(&sequence)).hard <= self.executor.cells() => break,
                Sizing::Grow { .. } if self.running.is_empty() => {
                    let reason = "the context cannot grow any further on this device".to_owned();
                    self.fail(sequence, EngineError::ContextFull(reason));
                    return Ok(None);
                }
                Sizing::Wait | Sizing::Grow { .. } => return Ok(Some(sequence)),
            }
        }
        let running = self.running.iter().filter_map(|other| Some((other.cells?, other.resident_tokens())));
        let reuse = self.executor.reusable(&sequence.tokens, running);
        let Some((cells, resident)) = self.executor.begin(reuse) else { return Ok(Some(sequence)) };
        let first_time = sequence.tokens.len() == sequence.prompt_tokens().0;
        sequence.place(cells, resident);
        if first_time {
            let (prompt, cached) = sequence.prompt_tokens();
            self.shared.update(|stats| {
                stats.prompt_tokens += prompt as u64;
                stats.cached_prompt_tokens += cached as u64;
            });
        }
        // One that was preempted is older than some that run.
        let place = self.running.partition_point(|other| other.started <= sequence.started);
        self.running.insert(place, sequence);
        Ok(None)
    }

    /// What the running sequences take and want, with one more.
    fn demand(&self, more: Option<&Sequence>) -> Demand {
        let used = self.executor.pool().used_by_running();
        let all = || self.running.iter().chain(more);
        Demand {
            hard: all().fold(used, |sum, sequence| sum.saturating_add(sequence.next_cells())),
            aim: all().fold(used, |sum, sequence| sum.saturating_add(sequence.aimed_cells())),
        }
    }

    fn calm(&self, now: Instant) -> bool {
        self.last_growth.is_none_or(|last| now.saturating_duration_since(last) >= GROWTH_PAUSE) && self.may_grow(now)
    }

    fn may_grow(&self, now: Instant) -> bool {
        self.growth_refused.is_none_or(|last| now.saturating_duration_since(last) >= GROWTH_PAUSE)
    }

    fn grow(&mut self, to: u32) -> Result<(), EngineError> {
        let from = self.executor.cells();
        let started = Instant::now();
        let growth = self.executor.resize(to);
        let milliseconds = started.elapsed().as_millis();
        let (changed, emptied) = match growth {
            Growth::Moved => (true, false),
            Growth::Emptied => (true, true),
            Growth::Refused(reason) => {
                tracing::warn!(from, to, reason, "the context does not grow");
                (false, false)
            }
            Growth::RefusedEmptied(reason) => {
                tracing::warn!(from, to, reason, "the context does not grow, and everything is read again");
                (false, true)
            }
            Growth::Lost(reason) => return Err(EngineError::InsufficientMemory(reason)),
        };
        if emptied {
            // The pool is empty, so the ids they get are the lowest ones again.
            for sequence in &mut self.running {
                sequence.unplace();
            }
            for sequence in &mut self.running {
                let Some((cells, resident)) = self.executor.begin(super::prefix::Reuse::Nothing) else {
                    return Err(EngineError::Internal("more sequences than ids".to_owned()));
                };
                sequence.place(cells, resident);
            }
        }
        if changed {
            tracing::info!(from, to, milliseconds, emptied, "the context has grown");
            self.last_growth = Some(Instant::now());
            self.shared.update(|stats| stats.resizes += 1);
            let (cells, memory) = (self.executor.cells(), self.executor.memory());
            self.report.send_modify(|report| {
                report.context_tokens = cells;
                report.memory = memory;
            });
        } else {
            self.growth_refused = Some(Instant::now());
        }
        Ok(())
    }

    fn schedule(&mut self) {
        self.lanes.clear();
        self.lanes.extend(self.running.iter().map(|sequence| Lane {
            todo: u32::try_from(sequence.todo()).unwrap_or(u32::MAX),
            parked: sequence.is_parked(),
        }));
        let batch = self.executor.batch_tokens();
        let limits =
            schedule::Limits { batch, outputs: self.plan.parallel, prefill: self.pace.budget(PREFILL_TIME, batch) };
        schedule::plan(&self.lanes, limits, &mut self.step);
    }

    fn make_step(&mut self) -> Result<(), EngineError> {
        loop {
            let tokens: u32 = self.step.iter().map(|chunk| chunk.count).sum();
            if tokens == 0 {
                return Ok(());
            }
            if self.executor.pool().used().saturating_add(tokens) > self.executor.cells() {
                self.make_room()?;
                self.schedule();
                continue;
            }
            let started = Instant::now();
            let running = &self.running;
            let work = self.step.iter().filter_map(|chunk| {
                let sequence = &running[chunk.lane];
                let end = sequence.resident + chunk.count as usize;
                Some((sequence.cells?, &sequence.tokens[sequence.resident..end], sequence.resident, chunk.output))
            });
            match self.executor.decode(work, &mut self.rows) {
                Ok(()) => {}
                Err(DecodeError::NoSlot) => {
                    // The cells of a sliding window or of a shared prefix may lie so that the books say otherwise.
                    self.make_room()?;
                    self.schedule();
                    continue;
                }
                Err(DecodeError::Invalid(reason)) => {
                    tracing::error!(reason, "llama.cpp refused a batch");
                    self.fail_step(&EngineError::DecodeFailed(reason));
                    return Ok(());
                }
                Err(DecodeError::Failed(reason)) => return Err(EngineError::DecodeFailed(reason)),
            }
            for chunk in &self.step {
                self.running[chunk.lane].resident += chunk.count as usize;
            }
            self.sample()?;
            if self.step.iter().any(|chunk| chunk.count > 1) {
                self.pace.observe(tokens, started.elapsed());
            }
            return Ok(());
        }
    }

    fn sample(&mut self) -> Result<(), EngineError> {
        let now = Instant::now();
        let mut ended: Vec<(usize, FinishReason)> = Vec::new();
        let mut generated = 0;
        for (chunk, &row) in self.step.iter().zip(&self.rows).filter(|(chunk, _)| chunk.output) {
            let sequence = &mut self.running[chunk.lane];
            let token = self.executor.sample(&mut sequence.sampler, row).map_err(EngineError::DecodeFailed)?;
            let logprobs = match sequence.logprobs {
                None => None,
                Some(top) => Some(self.executor.logprobs(row, token, top).map_err(EngineError::DecodeFailed)?),
            };
            generated += 1;
            let end = sequence.accept(&self.model, token, logprobs.as_ref(), now).map_err(EngineError::DecodeFailed)?;
            if let Some(reason) = end {
                ended.push((chunk.lane, reason));
            }
        }
        self.shared.update(|stats| stats.generated_tokens += generated);
        ended.sort_unstable_by_key(|&(lane, _)| std::cmp::Reverse(lane));
        for (lane, reason) in ended {
            let sequence = self.running.remove(lane);
            self.finish(sequence, reason);
        }
        Ok(())
    }

    fn finish(&mut self, mut sequence: Sequence, reason: FinishReason) {
        let resident = sequence.resident;
        if let Some(id) = sequence.unplace() {
            let tokens = sequence.tokens[..resident].to_vec();
            self.executor.end(id, tokens);
        }
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

    /// Makes room for the next step by the cheapest measure that is left.
    fn make_room(&mut self) -> Result<(), EngineError> {
        if self.executor.drop_oldest_kept() {
            return Ok(());
        }
        let now = Instant::now();
        let cells = self.executor.cells();
        let cap = self.plan.limits.cap;
        if cells < cap && self.may_grow(now) {
            let Demand { hard: _, aim } = self.demand(None);
            return self.grow(sizing::rung(aim.max(cells + sizing::CELLS_STEP)).min(cap));
        }
        // The oldest can always finish.
        let Some(mut youngest) = self.running.pop() else { return Ok(()) };
        if self.running.is_empty() {
            let reason = format!("no more than {cells} cells can be had");
            self.fail(youngest, EngineError::ContextFull(reason));
            return Ok(());
        }
        self.shared.update(|stats| stats.preempted += 1);
        tracing::warn!(request = youngest.id, tokens = youngest.tokens.len(), "preempted: no more cells");
        if let Some(id) = youngest.unplace() {
            self.executor.release(id);
        }
        self.preempted.insert(0, youngest);
        Ok(())
    }

    fn publish_cells(&self) {
        let (used, total) = (self.executor.pool().used(), self.executor.cells());
        let kept = used - self.executor.pool().used_by_running().min(used);
        self.shared.update(|stats| {
            stats.cells_used = used;
            stats.cells_kept = kept;
            stats.cells_total = total;
        });
    }
}
