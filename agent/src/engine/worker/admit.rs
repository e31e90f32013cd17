//! From the queue to cells.

use std::time::Instant;

use super::super::error::EngineError;
use super::super::mailbox::Waiting;
use super::super::prefix::{Choice, Follow, Holder, Patience, Reuse};
use super::super::sequence::{Sequence, give_up};
use super::super::sizing::{self, Admission};
use super::super::snapshots;
use super::Worker;

impl Worker {
    pub(super) fn admit(&mut self, now: Instant) -> Result<(), EngineError> {
        let late = |waiting: Waiting| give_up(&waiting, EngineError::QueueTimeout);
        self.mailbox.expire(now, late);
        while self.running.len() < self.plan.parallel as usize {
            let sequence = if self.preempted.is_empty() {
                let Some(waiting) = self.mailbox.take(now, late) else { return Ok(()) };
                let limits = &self.plan.limits;
                let prompt = u32::try_from(waiting.request.prompt.len()).unwrap_or(u32::MAX);
                let need = limits.need(prompt, waiting.request.max_tokens, waiting.request.aim_tokens);
                self.next_serial += 1;
                match Sequence::new(waiting, self.next_serial, limits.max_tokens, need, now) {
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
        let choice = loop {
            // A change of size may take away what was chosen.
            let choice = self.choose(&sequence, true);
            let demand = self.demand(Some((&sequence, self.shared_by(choice.reuse))));
            let (cells, alone) = (self.executor.cells(), self.running.is_empty() && !self.may_get_memory(now));
            let (calm, may_resize) = (self.calm(now), self.may_resize());
            match sizing::admit(cells, self.ceiling(demand.hard, now), demand, calm, may_resize, alone) {
                Admission::Wish { to } if self.running.is_empty() && !self.executor.fits_beside(to) => {
                    self.resize(to)?;
                }
                Admission::Begin | Admission::Wish { .. } => {
                    let granted = sequence.need.saturating_sub(demand.aim.saturating_sub(cells));
                    tracing::debug!(
                        request = sequence.id,
                        needed = sequence.need,
                        granted,
                        pool = cells,
                        "tokens of context"
                    );
                    break choice;
                }
                Admission::Grow { to } => self.resize(to)?,
                Admission::Wait => {
                    if self.running.is_empty() {
                        sequence.wait_for_memory(now);
                    }
                    if !std::mem::replace(&mut sequence.waits, true) {
                        self.shared.update(|stats| stats.context_waits += 1);
                        tracing::debug!(request = sequence.id, hard = demand.hard, pool = cells, "waits for room");
                    }
                    return Ok(Some(sequence));
                }
                Admission::Fail => {
                    let reason = format!("no more than {cells} cells can be had, {} are needed", demand.hard);
                    self.fail(sequence, EngineError::ContextFull(reason));
                    return Ok(None);
                }
            }
        };
        if self.running.is_empty() && self.plan.attends_on_cpu() {
            self.executor.make_way(choice.reuse);
        }
        if !self.begin(&mut sequence, choice) {
            return Ok(Some(sequence));
        }
        // One that was preempted is older than some that run.
        let place = self.running.partition_point(|other| other.serial < sequence.serial);
        self.running.insert(place, sequence);
        self.executor.trim_kept();
        Ok(None)
    }

    /// What a sequence can begin with.
    fn choose(&self, sequence: &Sequence, follow: bool) -> Choice {
        if !sequence.cache_prompt || sequence.saved.is_some() {
            return Choice { reuse: Reuse::Nothing, border: None };
        }
        let same = self.running.iter().filter(|other| other.key == sequence.key);
        let running = same.filter_map(|other| {
            let id = other.cells?;
            // The sequence itself is not among those with cells.
            let (holder, tokens) = if other.is_reading() {
                (Holder::Reading(id, other.serial), other.tokens.as_slice())
            } else {
                (Holder::Running(id), &other.tokens[..other.resident])
            };
            Some(self.executor.candidate(id, holder, tokens, other.resident))
        });
        self.executor.choose(&sequence.tokens, &sequence.key, running, follow)
    }

    /// Tokens whose cells are, or will be, a running sequence's too.
    fn shared_by(&self, reuse: Reuse) -> usize {
        match reuse {
            Reuse::Share { id, length } if self.plan.unified && !self.executor.pool().is_kept(id) => length,
            Reuse::Follow { length, .. } if self.plan.unified => length,
            _ => 0,
        }
    }

    /// Gives a sequence cells, or lets it wait for another's prompt. False: all ids run.
    fn begin(&mut self, sequence: &mut Sequence, choice: Choice) -> bool {
        let Choice { reuse, border } = choice;
        if self.executor.needs_snapshots() {
            // Where others have parted from this prompt others will again, and the whole may come again.
            let (prompt, _) = sequence.prompt_tokens();
            sequence.borders = snapshots::places(&sequence.tokens[..prompt], &sequence.messages, border);
        }
        if let Reuse::Follow { leader, length } = reuse
            && let Some(leader) = self.running.iter_mut().find(|other| other.serial == leader)
        {
            if self.executor.needs_snapshots() && !leader.borders.contains(&length) {
                leader.borders.push(length);
            }
            tracing::debug!(request = sequence.id, leader = leader.id, length, "waits for an equal prompt");
            sequence.follow = Some(Follow::new(leader.serial, length));
            return true;
        }
        let resumed = sequence.saved.take().and_then(|saved| self.executor.resume(saved));
        let Some((cells, resident)) = resumed.or_else(|| self.executor.begin(reuse, &sequence.tokens)) else {
            return false;
        };
        let first_time = !sequence.begun;
        let followed = sequence.follow.is_some();
        sequence.place(cells, resident);
        if first_time {
            let (prompt, cached) = sequence.prompt_tokens();
            self.shared.update(|stats| {
                stats.prompt_tokens += prompt as u64;
                stats.cached_prompt_tokens += cached as u64;
                stats.followed += u64::from(followed);
            });
        }
        true
    }

    /// Lets those go on who wait for another's prompt, when it has been read so far, or will not be.
    pub(super) fn look_after_followers(&mut self) {
        for index in 0..self.running.len() {
            let Some(mut follow) = self.running[index].follow else { continue };
            if self.pictures.encoding() == Some(follow.leader) {
                continue;
            }
            let leader = self.running.iter().find(|other| other.serial == follow.leader && other.cells.is_some());
            // One that does not read any more and has not come so far will not.
            let resident = leader.filter(|other| other.is_reading() || other.resident >= follow.length);
            let patience = follow.look(resident.map(|other| other.resident), self.pace.has_read());
            self.running[index].follow = Some(follow);
            if patience == Patience::Wait {
                continue;
            }
            let choice = self.choose(&self.running[index], patience == Patience::Choose);
            let mut sequence = self.running.remove(index);
            let begun = self.begin(&mut sequence, choice);
            self.running.insert(index, sequence);
            if !begun {
                tracing::error!("more sequences than ids");
            }
        }
    }
}
