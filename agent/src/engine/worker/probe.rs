//! A step of one token where nobody else computes, so that a GPU that is gone, or does not answer, is found before the next
//! request is: by its error, or by the heartbeat of a step that does not end.

use std::time::{Duration, Instant};

use super::super::error::EngineError;
use super::super::ffi::DecodeError;
use super::super::prefix::Reuse;
use super::Worker;

impl Worker {
    /// When the device is looked after, if nothing is computed until then. A CPU's steps tell nothing new.
    pub(super) fn probe_due(&self) -> Option<Instant> {
        Some(self.last_step + self.plan.probe_after?)
    }

    /// Computes a token if that is due. What is kept for prompts to come stays; without room there is no probe.
    pub(super) fn probe(&mut self, now: Instant) -> Result<(), EngineError> {
        if self.probe_due().is_none_or(|due| now < due) {
            return Ok(());
        }
        self.last_step = now;
        if !self.running.is_empty() || !self.preempted.is_empty() {
            return Ok(());
        }
        let has_room = self.executor.pool().used() < self.executor.cells();
        let tokens = [self.model.bos().unwrap_or(0)];
        let Some((id, _)) = has_room.then(|| self.executor.begin(Reuse::Nothing, &tokens)).flatten() else {
            return Ok(());
        };
        self.shared.step_begins();
        let computed = self.executor.decode(std::iter::once((id, &tokens[..], 0, true, &[][..])), &mut self.rows);
        self.shared.step_ends();
        self.executor.release(id);
        self.shared.update(|stats| stats.probes += 1);
        match computed {
            Err(DecodeError::Failed(reason)) => Err(EngineError::while_computing(format!("while idle: {reason}"))),
            // No slot, or refused: of this token, not of the device.
            Ok(()) | Err(DecodeError::NoSlot | DecodeError::Invalid(_)) => Ok(()),
        }
    }
}

/// How long nothing was computed before a GPU is asked for a token.
pub(in crate::engine) const PROBE_AFTER: Duration = Duration::from_mins(1);
