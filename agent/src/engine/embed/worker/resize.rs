//! Another size of an embedder's context, for a text that is longer than any before, and back.
//!
//! Nothing stays in it from call to call, so the old one goes before the new one comes. The ledger is asked before it grows.
//! A request whose text needs memory that others hold waits for it beside the slots, so that others' texts go on, and
//! asks again every few seconds; it fails at once where nobody could leave what is missing.

use std::time::{Duration, Instant};

use super::{Running, Worker, fail};
use crate::engine::error::EngineError;
use crate::engine::ffi::{ContextParams, EmbeddingContext};
use crate::engine::room::{self, DeviceRoom};
use crate::runner::grants::Refusal;

/// Least time between two questions for memory that others hold. In the crate's own tests not so long.
const PAUSE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// Memory that others hold.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    at: Instant,
    /// Tokens that there was no room for.
    tokens: u32,
    reason: String,
}

impl Refused {
    fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < PAUSE
    }
}

impl Worker {
    /// Makes the context large enough for a text of `length` tokens; or has the request that has it wait, or fails it.
    pub(super) fn grow(&mut self, length: u32, request: usize) -> Result<(), EngineError> {
        let now = Instant::now();
        if self.refused.as_ref().is_some_and(|refused| refused.tokens <= length && refused.is_recent(now)) {
            self.stall(request, now);
            return Ok(());
        }
        let from = self.capacity();
        let mut made = self.enlarge(self.sizes.rung(length))?;
        if made.is_err() && self.sizes.rung(length) > length {
            // For this text alone it may do.
            made = self.enlarge(length)?;
        }
        match made {
            Ok(()) => {
                self.refused = None;
                self.shared.update(|stats| stats.resizes += 1);
            }
            Err(Refusal { reason, passing: true }) => {
                tracing::warn!(from, length, reason, "the context does not grow yet: others hold the memory");
                self.shared.update(|stats| stats.growths_refused += 1);
                self.refused = Some(Refused { at: now, tokens: length, reason });
                self.stall(request, now);
            }
            Err(Refusal { reason, passing: false }) => {
                tracing::warn!(from, length, reason, "the context does not grow");
                self.fail(request, EngineError::ContextFull(about(length, &reason)));
            }
        }
        Ok(())
    }

    /// Tries to have a context for `to` tokens.
    fn enlarge(&mut self, to: u32) -> Result<Result<(), Refusal>, EngineError> {
        if let Err(refusal) = room::acquire(&self.rooms(to), to, self.grants.as_deref()) {
            return Ok(Err(refusal));
        }
        let made = self.resize(to)?;
        if let (Err(_), Some(grants)) = (&made, &self.grants) {
            grants.give_back();
        }
        Ok(made.map_err(|reason| Refusal { reason, passing: false }))
    }

    /// The memory around a change to `to` tokens.
    fn rooms(&self, to: u32) -> Vec<DeviceRoom> {
        let Some(context) = &self.context else { return Vec::new() };
        let params = ContextParams { cells: to, batch: to, ..self.params.clone() };
        let then = context.size(&params, self.pooling);
        room::around(&context.memory_of_cells(), then, context.capacity(), to)
    }

    /// A request leaves its slot to others until there is memory for its next text.
    fn stall(&mut self, request: usize, now: Instant) {
        let mut running = self.running.remove(request);
        if running.patience.is_none() {
            self.shared.update(|stats| stats.context_waits += 1);
        }
        running.wait_for_memory(now);
        let place = self.stalled.partition_point(|other| other.started <= running.started);
        self.stalled.insert(place, running);
    }

    /// Those who wait for memory and may ask again, or need not, get slots before everybody else.
    pub(super) fn resume(&mut self, now: Instant) {
        let (capacity, refused) = (self.capacity(), self.refused.as_ref());
        let refused = refused.filter(|refused| refused.is_recent(now)).map_or(u32::MAX, |refused| refused.tokens);
        let slots = self.parallel.saturating_sub(self.running.len());
        let ready = |running: &mut Running| running.next() <= capacity || running.next() < refused;
        self.running.extend(self.stalled.extract_if(.., ready).take(slots));
    }

    /// Those who have waited for memory as long as they may.
    pub(super) fn give_up_stalled(&mut self, now: Instant) {
        let late = |running: &mut Running| running.patience.is_some_and(|until| until <= now);
        for running in self.stalled.extract_if(.., late) {
            let reason = self.refused.as_ref().map_or("others hold the memory", |refused| &refused.reason);
            let error = EngineError::ContextFull(about(running.next(), reason));
            fail(running, &self.mailbox, &self.shared, error);
        }
    }

    /// When something is to be done for those who wait for memory.
    pub(super) fn next_try(&self) -> Option<Instant> {
        let late = self.stalled.iter().filter_map(|running| running.patience).min()?;
        Some(self.refused.as_ref().map_or(late, |refused| late.min(refused.at + PAUSE)))
    }

    /// Gives back what long texts took, when none came for a while, or when others need it.
    pub(super) fn shrink(&mut self, now: Instant) -> Result<(), EngineError> {
        let capacity = self.capacity();
        // Those that run, or may, would only ask for it again.
        let may_run = self.stalled.iter().filter(|running| running.next() <= capacity);
        let texts = self.running.iter().chain(may_run).flat_map(Running::texts).map(|text| super::tokens(text));
        let needed = texts.max().map_or(0, |longest| self.sizes.rung(longest)).max(self.sizes.initial);
        let asked = self.mailbox.take_shrink().map(|cells| cells.max(needed));
        // Who waits for memory holds none that another may wait for.
        let waits = (self.running.is_empty() && !self.stalled.is_empty()).then_some(needed);
        let to = asked.or(waits).filter(|to| *to < capacity);
        let Some(to) = to.or_else(|| self.lately.shrunk(&self.sizes, capacity, now)) else { return Ok(()) };
        match self.resize(to)? {
            Ok(()) => self.shared.update(|stats| stats.shrinks += 1),
            Err(reason) => tracing::warn!(from = capacity, to, reason, "the context does not shrink"),
        }
        Ok(())
    }

    /// Makes a context for `to` tokens in place of the one there is, which stays if that fails; why it did is returned.
    fn resize(&mut self, to: u32) -> Result<Result<(), String>, EngineError> {
        let started = Instant::now();
        let from = self.capacity();
        // Both at once might be too much.
        self.context = None;
        let params = ContextParams { cells: to, batch: to, ..self.params.clone() };
        match EmbeddingContext::new(&self.model, &params, self.pooling) {
            Ok(context) => {
                let milliseconds = started.elapsed().as_millis();
                tracing::info!(from, to, milliseconds, "the context has another size");
                self.params = params;
                let (tokens, memory) = (context.capacity(), context.memory());
                self.context = Some(context);
                self.shared.update(|stats| stats.cells_total = tokens);
                self.report.send_modify(|report| {
                    report.context_tokens = tokens;
                    report.memory = memory;
                });
                Ok(Ok(()))
            }
            Err(reason) => {
                let old = EmbeddingContext::new(&self.model, &self.params, self.pooling);
                self.context = Some(old.map_err(EngineError::InsufficientMemory)?);
                Ok(Err(reason))
            }
        }
    }
}

/// Why a text has no vector.
fn about(tokens: u32, reason: &str) -> String {
    format!("a text of {tokens} tokens needs a larger context: {reason}")
}
