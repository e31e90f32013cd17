//! The engine's thread of an embedder: admits, packs, computes, answers, until it is told to end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::load::Loaded;
use super::pack::{self, Room};
use super::size::{Lately, Sizes};
use super::{EmbedRequest, Embedded, Waiting};
use crate::engine::error::EngineError;
use crate::engine::ffi::{ContextParams, DecodeError, EmbeddingContext, Model, Pooling};
use crate::engine::mailbox::{LONGEST_WAIT, Mailbox, Phase};
use crate::engine::request::Token;
use crate::engine::shared::Shared;
use crate::runner::grants::Grants;
use crate::runner::protocol::RunnerReport;

mod resize;

use resize::Refused;

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
    /// Requests whose next text needs memory that others hold, in the order of their coming. They have no slot.
    stalled: Vec<Running>,
    /// Asked before the context grows.
    grants: Option<Arc<dyn Grants>>,
    refused: Option<Refused>,
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
    /// How long it waits for memory that others hold.
    patience: Option<Instant>,
}

impl Running {
    /// The texts that are left.
    fn texts(&self) -> &[Vec<Token>] {
        self.request.texts.get(self.vectors.len()..).unwrap_or_default()
    }

    /// The `n`th of them.
    fn text(&self, n: usize) -> Option<&[Token]> {
        self.texts().get(n).map(Vec::as_slice)
    }

    /// Tokens of the next one.
    fn next(&self) -> u32 {
        self.text(0).map_or(0, tokens)
    }

    /// It waits for memory from now on, for as long as it might have waited in the queue: from its coming, or from now on if
    /// it has some of its vectors.
    fn wait_for_memory(&mut self, now: Instant) {
        let may_wait = |deadline: Instant| {
            let patience = deadline.saturating_duration_since(self.started) + self.queue;
            if self.vectors.is_empty() { deadline } else { now + patience }
        };
        let until = self.request.deadline.map_or(now + LONGEST_WAIT, may_wait);
        self.patience.get_or_insert(until);
    }
}

impl Worker {
    pub(in crate::engine) fn new(
        loaded: Loaded,
        mailbox: Arc<Mailbox<Waiting>>,
        shared: Arc<Shared>,
        report: watch::Sender<RunnerReport>,
        grants: Option<Arc<dyn Grants>>,
    ) -> Self {
        shared.update(|stats| stats.cells_total = loaded.context.capacity());
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
            stalled: Vec::new(),
            grants,
            refused: None,
            first: 0,
            lately: Lately::new(Instant::now()),
        }
    }

    /// Works until told to end. The error says why the engine cannot go on.
    pub(in crate::engine) fn run(mut self) -> Result<(), EngineError> {
        let result = self.work();
        let reason = result.clone().err().unwrap_or(EngineError::ShutDown);
        for running in self.running.drain(..).chain(self.stalled.drain(..)) {
            fail(running, &self.mailbox, &self.shared, reason.clone());
        }
        for waiting in self.mailbox.end() {
            give_up(waiting, reason.clone());
        }
        result
    }

    fn work(&mut self) -> Result<(), EngineError> {
        loop {
            let now = Instant::now();
            self.drop_cancelled(now);
            self.shrink(now)?;
            self.admit(now);
            let drained = match self.mailbox.phase() {
                Phase::Draining(deadline) => Some(deadline),
                Phase::Open | Phase::Ended => None,
            };
            let idle = self.running.is_empty();
            let empty = idle && self.stalled.is_empty() && self.mailbox.is_empty();
            if drained.is_some_and(|deadline| now >= deadline || empty) {
                return Ok(());
            }
            if idle {
                let look = (self.capacity() > self.sizes.initial).then(|| self.lately.next_look());
                let tries = self.next_try();
                let next = [self.mailbox.next_deadline(), drained, look, tries].into_iter().flatten().min();
                self.mailbox.wait(next.map_or(IDLE, |next| next.saturating_duration_since(now)).min(IDLE));
            } else {
                self.step()?;
            }
        }
    }

    fn drop_cancelled(&mut self, now: Instant) {
        for running in [&mut self.running, &mut self.stalled] {
            for running in running.extract_if(.., |running| running.result.is_closed()) {
                tracing::debug!(request = running.request.id, texts = running.vectors.len(), "cancelled");
                self.mailbox.ended();
                self.shared.update(|stats| stats.cancelled += 1);
            }
        }
        self.give_up_stalled(now);
    }

    fn admit(&mut self, now: Instant) {
        let late = |waiting: Waiting| give_up(waiting, EngineError::QueueTimeout);
        self.mailbox.expire(now, late);
        self.resume(now);
        while self.running.len() < self.parallel {
            let Some(Waiting { request, result, submitted }) = self.mailbox.take(now, late) else { return };
            let tokens: usize = request.texts.iter().map(Vec::len).sum();
            self.shared.update(|stats| stats.prompt_tokens += tokens as u64);
            let queue = now.saturating_duration_since(submitted);
            self.running.push(Running { vectors: Vec::new(), request, result, queue, started: now, patience: None });
        }
    }

    /// Computes the next texts.
    fn step(&mut self) -> Result<(), EngineError> {
        self.first = (self.first + 1) % self.running.len().max(1);
        let room = Room { tokens: self.sizes.usual, texts: self.params.sequences as usize };
        let length = |request: usize, n: usize| self.running.get(request)?.text(n).map(tokens);
        let picks = pack::pack(self.running.len(), self.first, room, length);
        let mut taken = vec![0; self.running.len()];
        let mut texts: Vec<&[Token]> = Vec::with_capacity(picks.len());
        for &request in &picks {
            texts.extend(self.running[request].text(taken[request]));
            taken[request] += 1;
        }
        let sum = texts.iter().map(|text| tokens(text)).fold(0, u32::saturating_add);
        self.lately.call(sum);
        if sum > self.capacity() {
            // One text alone: others are packed into what there is.
            return self.grow(sum, picks.first().copied().unwrap_or(0));
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
            Err(DecodeError::Failed(reason)) => Err(EngineError::while_computing(reason)),
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
            let Running { request, result, vectors, queue, started, patience: _ } = self.running.remove(index);
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
        fail(self.running.remove(index), &self.mailbox, &self.shared, error);
    }
}

/// Tokens of a text.
fn tokens(text: &[Token]) -> u32 {
    u32::try_from(text.len()).unwrap_or(u32::MAX)
}

/// Ends a request that has begun.
fn fail(running: Running, mailbox: &Mailbox<Waiting>, shared: &Shared, error: EngineError) {
    mailbox.ended();
    shared.update(|stats| stats.failed += 1);
    // A reader that has gone needs no reason.
    let _ = running.result.send(Err(error));
}

/// Ends a request that has not begun.
fn give_up(waiting: Waiting, error: EngineError) {
    // A reader that has gone needs no reason.
    let _ = waiting.result.send(Err(error));
}
