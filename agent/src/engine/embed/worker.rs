//! The engine's thread of an embedder: admits, packs, computes, answers, until it is told to end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::load::Loaded;
use super::pack::{self, Room};
use super::size::{self, Lately, Sizes};
use super::{EmbedRequest, Embedded, Waiting};
use crate::engine::error::EngineError;
use crate::engine::ffi::{ContextParams, DecodeError, EmbeddingContext, Model, Pooling, available_bytes};
use crate::engine::mailbox::{Mailbox, Phase};
use crate::engine::request::Token;
use crate::engine::shared::Shared;
use crate::runner::protocol::RunnerReport;

/// Longest sleep of an idle engine.
const IDLE: Duration = Duration::from_secs(10);

/// All that the engine's thread owns.
pub(in crate::engine) struct Worker {
    model: Model,
    /// `None` only after a failure that ends the engine.
    context: Option<EmbeddingContext>,
    params: ContextParams,
    pooling: Pooling,
    sizes: Sizes,
    parallel: usize,
    mailbox: Arc<Mailbox<Waiting>>,
    shared: Arc<Shared>,
    report: watch::Sender<RunnerReport>,
    running: Vec<Running>,
    /// How long texts were of late.
    lately: Lately,
    /// The request whose text is the next call's first.
    first: usize,
}

/// A request of which some texts are done.
struct Running {
    request: EmbedRequest,
    result: oneshot::Sender<Result<Embedded, EngineError>>,
    vectors: Vec<Vec<f32>>,
    queue: Duration,
    started: Instant,
}

impl Running {
    /// The `n`th of the texts that are left.
    fn text(&self, n: usize) -> Option<&[Token]> {
        self.request.texts.get(self.vectors.len() + n).map(Vec::as_slice)
    }
}

impl Worker {
    pub(in crate::engine) fn new(
        loaded: Loaded,
        mailbox: Arc<Mailbox<Waiting>>,
        shared: Arc<Shared>,
        report: watch::Sender<RunnerReport>,
    ) -> Self {
        let Loaded { model, facts: _, report: _, parallel, context, params, pooling, sizes } = loaded;
        Self {
            model,
            context: Some(context),
            params,
            pooling,
            sizes,
            parallel: parallel as usize,
            mailbox,
            shared,
            report,
            running: Vec::new(),
            first: 0,
            lately: Lately::new(Instant::now()),
        }
    }

    /// Works until told to end. The error says why the engine cannot go on.
    pub(in crate::engine) fn run(mut self) -> Result<(), EngineError> {
        let result = self.work();
        let reason = result.clone().err().unwrap_or(EngineError::ShutDown);
        for index in (0..self.running.len()).rev() {
            self.fail(index, reason.clone());
        }
        for waiting in self.mailbox.end() {
            give_up(waiting, reason.clone());
        }
        result
    }

    fn work(&mut self) -> Result<(), EngineError> {
        loop {
            let now = Instant::now();
            self.drop_cancelled();
            self.shrink(now)?;
            self.admit(now);
            let drained = match self.mailbox.phase() {
                Phase::Draining(deadline) => Some(deadline),
                Phase::Open | Phase::Ended => None,
            };
            let idle = self.running.is_empty();
            if drained.is_some_and(|deadline| now >= deadline || (idle && self.mailbox.is_empty())) {
                return Ok(());
            }
            if idle {
                let look = (self.capacity() > self.sizes.initial).then(|| self.lately.next_look());
                let next = [self.mailbox.next_deadline(), drained, look].into_iter().flatten().min();
                self.mailbox.wait(next.map_or(IDLE, |next| next.saturating_duration_since(now)).min(IDLE));
            } else {
                self.step()?;
            }
        }
    }

    fn drop_cancelled(&mut self) {
        for index in (0..self.running.len()).rev() {
            if self.running[index].result.is_closed() {
                let running = self.running.remove(index);
                tracing::debug!(request = running.request.id, texts = running.vectors.len(), "cancelled");
                self.mailbox.ended();
                self.shared.update(|stats| stats.cancelled += 1);
            }
        }
    }

    fn admit(&mut self, now: Instant) {
        let late = |waiting: Waiting| give_up(waiting, EngineError::QueueTimeout);
        self.mailbox.expire(now, late);
        while self.running.len() < self.parallel {
            let Some(Waiting { request, result, submitted }) = self.mailbox.take(now, late) else { return };
            let tokens: usize = request.texts.iter().map(Vec::len).sum();
            self.shared.update(|stats| stats.prompt_tokens += tokens as u64);
            let queue = now.saturating_duration_since(submitted);
            self.running.push(Running { vectors: Vec::new(), request, result, queue, started: now });
        }
    }

    /// Computes the next texts.
    fn step(&mut self) -> Result<(), EngineError> {
        self.first = (self.first + 1) % self.running.len().max(1);
        let room = Room { tokens: self.sizes.usual, texts: self.params.sequences as usize };
        let length = |request: usize, n: usize| {
            let text = self.running.get(request)?.text(n)?;
            u32::try_from(text.len()).ok()
        };
        let picks = pack::pack(self.running.len(), self.first, room, length);
        let mut taken = vec![0; self.running.len()];
        let mut texts: Vec<&[Token]> = Vec::with_capacity(picks.len());
        for &request in &picks {
            texts.extend(self.running[request].text(taken[request]));
            taken[request] += 1;
        }
        let tokens = u32::try_from(texts.iter().map(|text| text.len()).sum::<usize>()).unwrap_or(u32::MAX);
        self.lately.call(tokens);
        if tokens > self.capacity() {
            // One text alone: others are packed into what there is.
            return self.grow(tokens, picks.first().copied().unwrap_or(0));
        }
        let context = self.context.as_mut().ok_or_else(|| EngineError::DecodeFailed("no context".to_owned()))?;
        self.shared.step_begins();
        let embedded = context.embed(&texts);
        self.shared.step_ends();
        match embedded {
            Ok(vectors) => {
                for (&request, vector) in picks.iter().zip(vectors) {
                    self.running[request].vectors.push(vector);
                }
                self.shared.update(|stats| stats.embedded_texts += picks.len() as u64);
                self.answer();
                Ok(())
            }
            Err(DecodeError::Failed(reason)) => Err(EngineError::DecodeFailed(reason)),
            Err(error @ (DecodeError::NoSlot | DecodeError::Invalid(_))) => {
                tracing::error!(?error, "llama.cpp refused texts");
                for request in (0..taken.len()).rev().filter(|&request| taken[request] > 0) {
                    self.fail(request, EngineError::DecodeFailed("llama.cpp refused the texts".to_owned()));
                }
                Ok(())
            }
        }
    }

    /// Tokens that a call has room for.
    fn capacity(&self) -> u32 {
        self.context.as_ref().map_or(0, EmbeddingContext::capacity)
    }

    /// Ends the requests that have all their vectors.
    fn answer(&mut self) {
        let now = Instant::now();
        for index in (0..self.running.len()).rev() {
            if self.running[index].vectors.len() < self.running[index].request.texts.len() {
                continue;
            }
            let Running { request, result, vectors, queue, started } = self.running.remove(index);
            let tokens: usize = request.texts.iter().map(Vec::len).sum();
            let prompt_tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            // Before its reader knows, so that who asks next finds the slot free.
            self.mailbox.ended();
            self.shared.update(|stats| stats.finished_stop += 1);
            let compute = now.saturating_duration_since(started);
            // A reader that has gone needs no answer.
            let _ = result.send(Ok(Embedded { vectors, prompt_tokens, queue, compute }));
        }
    }

    fn fail(&mut self, index: usize, error: EngineError) {
        let running = self.running.remove(index);
        self.mailbox.ended();
        self.shared.update(|stats| stats.failed += 1);
        // A reader that has gone needs no reason.
        let _ = running.result.send(Err(error));
    }

    /// Makes the context large enough for a text of `length` tokens, or fails the request that has it.
    fn grow(&mut self, length: u32, request: usize) -> Result<(), EngineError> {
        let Some(old) = &self.context else { return Err(EngineError::DecodeFailed("no context".to_owned())) };
        let (from, to) = (old.capacity(), self.sizes.grown(length));
        let made = match self.has_room(old, from, to) {
            Ok(()) => self.resize(to)?,
            Err(reason) => Err(reason),
        };
        match made {
            Ok(()) => self.shared.update(|stats| stats.resizes += 1),
            Err(reason) => {
                tracing::warn!(from, to, reason, "the context does not grow");
                self.fail(request, EngineError::ContextFull(reason));
            }
        }
        Ok(())
    }

    /// Gives back what long texts took, when none came for a while, or when others need it and nobody is here.
    fn shrink(&mut self, now: Instant) -> Result<(), EngineError> {
        let capacity = self.capacity();
        let asked = self.mailbox.take_shrink().filter(|_| self.running.is_empty());
        let asked = asked.map(|cells| cells.max(self.sizes.initial)).filter(|to| *to < capacity);
        let Some(to) = asked.or_else(|| self.lately.shrunk(&self.sizes, capacity, now)) else { return Ok(()) };
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

    /// On a CPU an allocation does not fail; the kernel ends the process when the memory is touched. So ask before.
    fn has_room(&self, context: &EmbeddingContext, from: u32, to: u32) -> Result<(), String> {
        for device in &context.memory() {
            let mut needed = size::growth(device, from, to, self.params.flash_attention);
            if device.device == "CPU" && context.outputs_all() {
                needed += context.output_bytes(to as usize).saturating_sub(device.other_bytes);
            }
            let Some(available) = available_bytes(&device.device) else { continue };
            if needed > available / 10 * 9 {
                return Err(format!(
                    "a text of so many tokens needs {needed} bytes more on {}, where {available} are free",
                    device.device
                ));
            }
        }
        Ok(())
    }
}

/// Ends a request that has not begun.
fn give_up(waiting: Waiting, error: EngineError) {
    // A reader that has gone needs no reason.
    let _ = waiting.result.send(Err(error));
}
