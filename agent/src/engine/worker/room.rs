//! Room for the running sequences: another size of the context, or somebody gives way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::error::EngineError;
use super::super::prefix::Reuse;
use super::super::sequence::Sequence;
use super::super::sizing::{self, Demand, Pressure, Relief};
use super::super::step::{Executor, Resized};
use super::Worker;
use crate::runner::grants::Refusal;

/// Least time between two changes of size that are only wished for, and after one that failed.
const RESIZE_PAUSE: Duration = Duration::from_secs(5);

/// Least time between two looks for room for a context that is not needed yet.
const ANTICIPATE_PAUSE: Duration = Duration::from_secs(1);

/// A size that could not be had.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused {
    at: Instant,
    cells: u32,
    /// Others may leave the memory.
    passing: bool,
}

impl Refused {
    fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < RESIZE_PAUSE
    }
}

impl Worker {
    /// What the running sequences take and want, with one more, of whose tokens so many will be in others' cells.
    pub(super) fn demand(&self, more: Option<(&Sequence, usize)>) -> Demand {
        let used = self.executor.pool().used_by_running();
        let shares = |sequence: &Sequence| match sequence.follow {
            Some(follow) if self.plan.unified => follow.length,
            _ => 0,
        };
        let all = || self.running.iter().map(|sequence| (sequence, shares(sequence))).chain(more);
        Demand {
            hard: all().fold(used, |sum, (sequence, shared)| sum.saturating_add(sequence.next_cells(shared))),
            aim: all().fold(used, |sum, (sequence, shared)| sum.saturating_add(sequence.aimed_cells(shared))),
        }
    }

    /// No other change of size is under way, and the last one is long enough ago for one that is only wished for.
    pub(super) fn calm(&self, now: Instant) -> bool {
        let last = self.last_resize.max(self.refused.map(|refused| refused.at)).max(self.beside_refused);
        self.may_resize() && last.is_none_or(|last| now.saturating_duration_since(last) >= RESIZE_PAUSE)
    }

    /// No other change is under way.
    pub(super) fn may_resize(&self) -> bool {
        self.executor.preparing().is_none()
    }

    /// Cells that may be asked for now.
    pub(super) fn ceiling(&self, hard: u32, now: Instant) -> u32 {
        let refused = self.refused.filter(|refused| refused.is_recent(now));
        sizing::ceiling(self.plan.limits.cap, refused.map(|refused| refused.cells), hard)
    }

    /// What was refused lately is held by others, who may leave it.
    pub(super) fn may_get_memory(&self, now: Instant) -> bool {
        self.refused.is_some_and(|refused| refused.passing && refused.is_recent(now))
    }

    /// When those who wait for memory may ask again.
    pub(super) fn next_try(&self, now: Instant) -> Option<Instant> {
        let next = self.refused.filter(|_| !self.preempted.is_empty()).map(|refused| refused.at + RESIZE_PAUSE);
        next.filter(|next| *next > now)
    }

    /// Gives the context another size: beside the running one where there is memory for both and somebody runs; else at
    /// once.
    pub(super) fn resize(&mut self, to: u32) -> Result<(), EngineError> {
        let mailbox = Arc::clone(&self.mailbox);
        let streams = self.running.iter().any(|sequence| sequence.cells.is_some());
        if streams && self.may_make_beside(Instant::now()) && self.executor.prepare(to, move || mailbox.wake()) {
            self.early = false;
            tracing::debug!(from = self.executor.cells(), to, "a context is made beside the running one");
            return Ok(());
        }
        let started = Instant::now();
        let resized = self.executor.resize(to);
        self.resized(to, resized, started.elapsed())
    }

    /// None was refused lately.
    fn may_make_beside(&self, now: Instant) -> bool {
        self.beside_refused.is_none_or(|last| now.saturating_duration_since(last) >= RESIZE_PAUSE)
    }

    /// Takes a context that was made beside the running one into use, if it is ready or `wait` says so.
    pub(super) fn take_prepared(&mut self, wait: bool) -> Result<(), EngineError> {
        let Some(to) = self.executor.preparing() else { return Ok(()) };
        if to < self.executor.cells() {
            self.executor.leave_only(to);
        }
        let (started, grows) = (Instant::now(), to > self.executor.cells());
        match self.executor.prepared(wait) {
            // It may still be had instead of the running one.
            Some(Resized::Refused(Refusal { reason, passing })) => {
                // It is asked for again and again while streams aim for it.
                if self.beside_refused.replace(Instant::now()).is_none() {
                    tracing::info!(to, reason, passing, "no context beside the running one");
                }
                self.executor.give_back();
                Ok(())
            }
            Some(resized) => {
                let early = grows && !wait && std::mem::take(&mut self.early);
                self.shared.update(|stats| stats.growths_anticipated += u64::from(early));
                self.resized(to, resized, started.elapsed())
            }
            None => Ok(()),
        }
    }

    fn resized(&mut self, to: u32, resized: Resized, stall: Duration) -> Result<(), EngineError> {
        let from = std::mem::replace(&mut self.cells, self.executor.cells());
        let milliseconds = stall.as_millis();
        let (changed, emptied, passing) = match resized {
            Resized::Moved => (true, false, false),
            Resized::Emptied => (true, true, false),
            Resized::Refused(Refusal { reason, passing }) => {
                tracing::warn!(from, to, reason, "the context keeps its size");
                (false, false, passing)
            }
            Resized::RefusedEmptied(reason) => {
                tracing::warn!(from, to, reason, "the context keeps its size, and everything is read again");
                (false, true, false)
            }
            Resized::Lost(reason) => return Err(EngineError::InsufficientMemory(reason)),
        };
        if emptied {
            // The pool is empty, so the ids they get are the lowest ones again.
            for sequence in self.running.iter_mut().filter(|sequence| sequence.cells.is_some()) {
                read_again(&mut self.executor, sequence)?;
            }
            // What was saved was made with the other rotation.
            for saved in self.preempted.iter_mut().filter_map(|sequence| sequence.saved.take()) {
                self.executor.forget(&saved);
            }
        }
        let now = Instant::now();
        if changed {
            tracing::info!(from, to, milliseconds, emptied, "the context has another size");
            self.last_resize = Some(now);
            self.beside_refused = None;
        } else {
            self.refused = Some(Refused { at: now, cells: to, passing });
            self.executor.give_back();
        }
        self.shared.update(|stats| {
            stats.growths_refused += u64::from(passing);
            stats.resizes += u64::from(changed && to > from);
            stats.shrinks += u64::from(changed && to < from);
            stats.resize_time += stall;
        });
        self.publish_cells();
        self.publish_memory();
        Ok(())
    }

    fn publish_memory(&self) {
        let (cells, memory) = (self.executor.cells(), self.executor.memory());
        self.report.send_if_modified(|report| {
            let known = std::mem::replace(&mut report.memory, memory);
            let size = std::mem::replace(&mut report.context_tokens, cells);
            known != report.memory || size != cells
        });
    }

    /// Gives back what has not been needed for a while, or what is asked for.
    pub(super) fn look_after_size(&mut self, now: Instant) -> Result<(), EngineError> {
        self.take_prepared(false)?;
        if self.plan.limits.initial == self.plan.limits.cap || self.executor.preparing().is_some() {
            return Ok(());
        }
        let cells = self.executor.cells();
        let demand = self.demand(None);
        if self.anticipate(demand, now) {
            return Ok(());
        }
        let Demand { hard, aim } = demand;
        if let Some(target) = self.mailbox.take_shrink() {
            // Not below what the running ones aim for: they would only ask for it again.
            let to = sizing::rung(aim.max(hard).max(target)).clamp(self.plan.limits.initial, self.plan.limits.cap);
            if to < cells {
                self.shrink(to)?;
            }
            if self.running.is_empty() && self.executor.staging_bytes() > 0 {
                self.executor.free_staging();
                self.publish_memory();
            }
            return Ok(());
        }
        if self.running.is_empty() && !self.preempted.is_empty() && self.may_get_memory(now) {
            // Who waits for memory holds none that another may wait for.
            let shrunk = if self.plan.limits.initial < cells { self.shrink(self.plan.limits.initial) } else { Ok(()) };
            if self.executor.staging_bytes() > 0 {
                self.executor.free_staging();
                self.publish_memory();
            }
            return shrunk;
        }
        self.needs.see(sizing::rung(aim).clamp(self.plan.limits.initial, self.plan.limits.cap), now);
        let needed = self.needs.largest(now, self.plan.shrink_after).unwrap_or(cells);
        if needed < cells && self.calm(now) {
            return self.shrink(needed);
        }
        if self.executor.staging_bytes() > 0
            && self.last_resize.is_none_or(|last| now.saturating_duration_since(last) >= self.plan.shrink_after)
        {
            self.executor.free_staging();
            self.publish_memory();
        }
        Ok(())
    }

    /// Begins to make a larger context beside the running one when somebody will soon need it, or aims for it and nobody
    /// waits for a first token, and the device has room for both.
    fn anticipate(&mut self, demand: Demand, now: Instant) -> bool {
        let (cells, cap) = (self.executor.cells(), self.ceiling(demand.hard, now));
        let wishes = self.calm(now) && !self.running.iter().any(Sequence::is_reading);
        let Some(to) = sizing::anticipate(cells, cap, demand, wishes) else { return false };
        if self.anticipated.is_some_and(|last| now.saturating_duration_since(last) < ANTICIPATE_PAUSE)
            || !self.may_make_beside(now)
            // Streams would have to be read again for room that they may never need.
            || !self.executor.state_survives(to)
        {
            return false;
        }
        self.anticipated = Some(now);
        let mailbox = Arc::clone(&self.mailbox);
        let begun = self.executor.prepare(to, move || mailbox.wake());
        if begun {
            self.early = true;
            tracing::debug!(from = self.executor.cells(), to, "a context is made before it is needed");
        }
        begun
    }

    fn shrink(&mut self, to: u32) -> Result<(), EngineError> {
        self.executor.leave_only(to);
        if self.executor.pool().used() > to {
            return Ok(());
        }
        self.resize(to)
    }

    /// Makes room for the next step by the cheapest measure that is left.
    pub(super) fn make_room(&mut self) -> Result<(), EngineError> {
        let demand = self.demand(None);
        let pressure = Pressure {
            cells: self.executor.cells(),
            cap: self.ceiling(demand.hard, Instant::now()),
            aim: demand.aim,
            kept: self.executor.pool().oldest_kept(None).is_some(),
            preparing: self.executor.preparing().is_some(),
            passing: self.may_get_memory(Instant::now()),
            holders: self.running.iter().filter(|sequence| sequence.cells.is_some()).count(),
        };
        let relief = sizing::relieve(pressure);
        match relief {
            Relief::DropKept => {
                self.executor.drop_kept(None);
                return Ok(());
            }
            Relief::AwaitContext => return self.take_prepared(true),
            Relief::Grow { to } => {
                self.resize(to)?;
                return self.take_prepared(true);
            }
            Relief::Preempt | Relief::Fail => {}
        }
        // Those that wait for another's prompt have no cells to give.
        let Some(youngest) = self.running.iter().rposition(|sequence| sequence.cells.is_some()) else { return Ok(()) };
        let mut youngest = self.running.remove(youngest);
        if relief == Relief::Fail {
            let reason = format!("no more than {} cells can be had", pressure.cells);
            self.fail(youngest, EngineError::ContextFull(reason));
            return Ok(());
        }
        let tokens = youngest.resident;
        if let Some(id) = youngest.unplace() {
            youngest.saved = self.executor.suspend(id, tokens);
        }
        self.shared.update(|stats| stats.preempted += 1);
        let saved = youngest.saved.is_some();
        tracing::warn!(request = youngest.id, tokens, saved, "preempted: no more cells");
        // The oldest of them comes back first.
        let place = self.preempted.partition_point(|other| other.serial < youngest.serial);
        self.preempted.insert(place, youngest);
        Ok(())
    }
}

/// A sequence whose cells are gone gets new ones, into which all of its tokens will be read.
pub(super) fn read_again(executor: &mut Executor, sequence: &mut Sequence) -> Result<(), EngineError> {
    sequence.unplace();
    let Some((cells, resident)) = executor.begin(Reuse::Nothing, &sequence.tokens) else {
        return Err(EngineError::Internal("more sequences than ids".to_owned()));
    };
    sequence.place(cells, resident);
    Ok(())
}
