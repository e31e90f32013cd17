//! Room for the running sequences: another size of the context, or somebody gives way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::error::EngineError;
use super::super::prefix::Reuse;
use super::super::sequence::Sequence;
use super::super::sizing::{self, Demand, Pressure, Relief};
use super::super::step::Resized;
use super::Worker;

/// Least time between two changes of size that are only wished for, and after one that failed.
const RESIZE_PAUSE: Duration = Duration::from_secs(5);

/// Least time between two looks for room for a context that is not needed yet.
const ANTICIPATE_PAUSE: Duration = Duration::from_secs(1);

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
        let last = self.last_resize.max(self.resize_refused.map(|(last, _)| last));
        self.may_resize() && last.is_none_or(|last| now.saturating_duration_since(last) >= RESIZE_PAUSE)
    }

    /// No other change is under way.
    pub(super) fn may_resize(&self) -> bool {
        self.executor.preparing().is_none()
    }

    /// Cells that may be asked for now.
    pub(super) fn ceiling(&self, hard: u32, now: Instant) -> u32 {
        let lately = |(last, _): &(Instant, u32)| now.saturating_duration_since(*last) < RESIZE_PAUSE;
        sizing::ceiling(self.plan.limits.cap, self.resize_refused.filter(lately).map(|(_, cells)| cells), hard)
    }

    /// Gives the context another size: beside the running streams where there is memory for both, else at once.
    pub(super) fn resize(&mut self, to: u32) -> Result<(), EngineError> {
        let mailbox = Arc::clone(&self.mailbox);
        let streams = self.running.iter().any(|sequence| sequence.cells.is_some());
        if streams && self.executor.prepare(to, move || mailbox.wake()) {
            tracing::debug!(from = self.executor.cells(), to, "a context is made beside the running one");
            return Ok(());
        }
        let started = Instant::now();
        let resized = self.executor.resize(to);
        self.resized(to, resized, started.elapsed())
    }

    /// Takes a context that was made beside the running one into use, if it is ready or `wait` says so.
    pub(super) fn take_prepared(&mut self, wait: bool) -> Result<(), EngineError> {
        let Some(to) = self.executor.preparing() else { return Ok(()) };
        if to < self.executor.cells() {
            self.executor.leave_only(to);
        }
        let started = Instant::now();
        match self.executor.prepared(wait) {
            Some(resized) => self.resized(to, resized, started.elapsed()),
            None => Ok(()),
        }
    }

    fn resized(&mut self, to: u32, resized: Resized, stall: Duration) -> Result<(), EngineError> {
        let from = std::mem::replace(&mut self.cells, self.executor.cells());
        let milliseconds = stall.as_millis();
        let (changed, emptied) = match resized {
            Resized::Moved => (true, false),
            Resized::Emptied => (true, true),
            Resized::Refused(reason) => {
                tracing::warn!(from, to, reason, "the context keeps its size");
                (false, false)
            }
            Resized::RefusedEmptied(reason) => {
                tracing::warn!(from, to, reason, "the context keeps its size, and everything is read again");
                (false, true)
            }
            Resized::Lost(reason) => return Err(EngineError::InsufficientMemory(reason)),
        };
        if emptied {
            // The pool is empty, so the ids they get are the lowest ones again.
            for sequence in self.running.iter_mut().filter(|sequence| sequence.cells.is_some()) {
                sequence.unplace();
                let Some((cells, resident)) = self.executor.begin(Reuse::Nothing, &sequence.tokens) else {
                    return Err(EngineError::Internal("more sequences than ids".to_owned()));
                };
                sequence.place(cells, resident);
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
        } else {
            self.resize_refused = Some((now, to));
            self.executor.give_back();
        }
        self.shared.update(|stats| {
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
            let to = sizing::rung(hard.max(target)).min(self.plan.limits.cap);
            return if to < cells { self.shrink(to) } else { Ok(()) };
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

    /// Begins to make a larger context beside the running one when somebody will soon need it and the device has room for
    /// both.
    fn anticipate(&mut self, demand: Demand, now: Instant) -> bool {
        let Some(to) = sizing::anticipate(self.executor.cells(), self.ceiling(demand.hard, now), demand) else {
            return false;
        };
        if self.anticipated.is_some_and(|last| now.saturating_duration_since(last) < ANTICIPATE_PAUSE) {
            return false;
        }
        self.anticipated = Some(now);
        let mailbox = Arc::clone(&self.mailbox);
        let begun = self.executor.prepare(to, move || mailbox.wake());
        if begun {
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
