//! A context beside the model's, for who guesses: the same sequences, as many cells, one pool.

use super::{Context, ContextParams, Model, Pool, SeqId, Token};
use crate::engine::ffi::Sampler;
use crate::engine::load::LoadedDraft;
use crate::runner::protocol::MemoryUse;

/// The context and the books of its cells.
pub(super) struct Side {
    pub(super) model: Model,
    /// `None` after a failure: then nothing is guessed any more.
    pub(super) context: Option<Context>,
    pub(super) params: ContextParams,
    /// Cells are counted as in the model's context; no id is taken or given.
    pub(super) pool: Pool,
}

impl Side {
    pub(super) fn new(draft: LoadedDraft) -> Self {
        let LoadedDraft { model, context, params } = draft;
        Self { pool: Pool::new(params.sequences, true), context: Some(context), model, params }
    }

    /// Bytes per device.
    pub(super) fn memory(&self) -> Vec<MemoryUse> {
        self.context.as_ref().map(Context::memory).unwrap_or_default()
    }

    pub(super) fn memory_of_cells(&self) -> Vec<MemoryUse> {
        self.context.as_ref().map(Context::memory_of_cells).unwrap_or_default()
    }

    /// What a context of `cells` cells is made of; `None` after a failure.
    pub(super) fn recipe(&self, cells: u32) -> Option<(Model, ContextParams)> {
        let is_well = self.context.is_some();
        is_well.then(|| (self.model.clone(), ContextParams { cells, ..self.params.clone() }))
    }

    /// Takes a context of another size into use. False: what was read did not move there.
    pub(super) fn swap(&mut self, mut context: Context, staging: &mut Vec<u8>) -> bool {
        let cells = context.cells();
        let state = self.context.as_mut().filter(|_| self.pool.used() > 0).and_then(|old| old.state(staging));
        let moved = state.is_some_and(|state| context.set_state(state));
        if !moved {
            self.pool.clear();
        }
        self.params.cells = cells;
        self.context = Some(context);
        moved
    }

    /// Makes the context anew with `cells` cells, or as it was where they cannot be had; it is empty.
    pub(super) fn replace(&mut self, cells: u32) {
        self.pool.clear();
        let Some((model, params)) = self.recipe(cells) else { return };
        // First, because there may be no memory for both.
        self.context = None;
        let made = Context::new(&model, &params).map(|context| (context, params)).or_else(|reason| {
            tracing::warn!(cells, reason, "the context of who guesses keeps its size");
            Context::new(&model, &self.params).map(|context| (context, self.params.clone()))
        });
        match made {
            Ok((context, params)) => (self.context, self.params) = (Some(context), params),
            Err(reason) => tracing::error!(reason, "who guesses has lost its context: nothing is guessed any more"),
        }
    }

    /// Empties it.
    pub(super) fn clear(&mut self) {
        if let Some(context) = &mut self.context {
            context.clear();
        }
        self.pool.clear();
    }

    /// Takes away what a sequence has from a position on; `cells` stay.
    pub(super) fn cut(&mut self, id: SeqId, position: usize, cells: usize) {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        if let Some(context) = &mut self.context {
            context.remove(id, count(position));
        }
        self.pool.cut(id, count(cells));
    }

    /// A sequence's id is free again.
    pub(super) fn release(&mut self, id: SeqId) {
        if let Some(context) = &mut self.context {
            context.remove(id, 0);
        }
        self.pool.release(id);
    }

    /// `to`, which is empty, begins with the positions of `from` before this one, which are so many cells.
    pub(super) fn share(&mut self, from: SeqId, to: SeqId, position: usize, cells: usize) -> bool {
        let (Ok(position), Ok(cells)) = (u32::try_from(position), u32::try_from(cells)) else { return false };
        let shared = cells > 0 && self.context.as_mut().is_some_and(|context| context.share(from, to, position));
        if shared {
            self.pool.share(from, to, cells);
        }
        shared
    }

    /// Whether there are so many cells more.
    pub(super) fn has_cells(&self, count: usize) -> bool {
        self.pool.used().saturating_add(u32::try_from(count).unwrap_or(u32::MAX)) <= self.params.cells
    }

    /// The most probable token after a row, if it is probable enough.
    pub(super) fn pick(&mut self, row: i32, min_probability: f32) -> Result<Option<Token>, String> {
        let context = self.context.as_mut().ok_or("no context")?;
        if min_probability <= 0.0 {
            return context.pick(&mut Sampler::default(), row, None);
        }
        let best = context.logprobs(row, 0, 1)?.top.first().copied();
        Ok(best.filter(|(_, logprob)| logprob.exp() >= min_probability).map(|(token, _)| token))
    }
}
