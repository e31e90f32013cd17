//! Who guesses with a context of its own: a draft model, or the model's own head.

use super::draft::Drafter;
use super::head::Head;
use super::side::Side;
use super::{Context, ContextParams, Model, SeqId, Token, Wish};
use crate::engine::ffi::Part;
use crate::engine::load::LoadedDraft;
use crate::runner::protocol::MemoryUse;

/// One of the two.
pub(super) enum Guesser {
    /// A smaller model, which reads the tokens.
    Model(Drafter),
    /// A part of the model, which reads the model's hidden states too.
    Head(Head),
}

impl Guesser {
    pub(super) fn new(draft: LoadedDraft) -> Self {
        match draft.params.part {
            Part::Head => Self::Head(Head::new(draft)),
            Part::Model | Part::ModelForHead => Self::Model(Drafter::new(draft)),
        }
    }

    fn side(&self) -> &Side {
        match self {
            Self::Model(drafter) => &drafter.side,
            Self::Head(head) => &head.side,
        }
    }

    /// Bytes per device.
    pub(super) fn memory(&self) -> Vec<MemoryUse> {
        self.side().memory()
    }

    pub(super) fn memory_of_cells(&self) -> Vec<MemoryUse> {
        self.side().memory_of_cells()
    }

    /// What a context of `cells` cells is made of; `None` after a failure.
    pub(super) fn recipe(&self, cells: u32) -> Option<(Model, ContextParams)> {
        self.side().recipe(cells)
    }

    /// Takes a context of another size into use; what was read moves there, or is read again.
    pub(super) fn swap(&mut self, context: Context, staging: &mut Vec<u8>) {
        match self {
            Self::Model(drafter) => drafter.swap(context, staging),
            Self::Head(head) => head.swap(context, staging),
        }
    }

    /// Makes the context anew with `cells` cells, or as it was where they cannot be had.
    pub(super) fn replace(&mut self, cells: u32) {
        match self {
            Self::Model(drafter) => drafter.replace(cells),
            Self::Head(head) => head.replace(cells),
        }
    }

    /// Forgets all that was read.
    pub(super) fn clear(&mut self) {
        match self {
            Self::Model(drafter) => drafter.clear(),
            Self::Head(head) => head.clear(),
        }
    }

    /// A sequence's id is free again.
    pub(super) fn release(&mut self, id: SeqId) {
        match self {
            Self::Model(drafter) => drafter.release(id),
            Self::Head(head) => head.release(id),
        }
    }

    /// `to` begins with the first `length` tokens of `from`, as far as they were read.
    pub(super) fn share(&mut self, from: SeqId, to: SeqId, length: usize) {
        match self {
            Self::Model(drafter) => drafter.share(from, to, length),
            Self::Head(head) => head.share(from, to, length),
        }
    }

    /// A sequence goes on behind its first `length` tokens.
    pub(super) fn cut(&mut self, id: SeqId, length: usize) {
        match self {
            // It sees by the tokens.
            Self::Model(_) => {}
            Self::Head(head) => head.cut(id, length),
        }
    }

    /// Has them guess what follows; see [`Drafter::guess`] and [`Head::guess`].
    pub(super) fn guess(&mut self, wishes: &mut [Wish<'_>], piece: u32, min_probability: f32, target: &Model) {
        match self {
            Self::Model(drafter) => drafter.guess(wishes, piece, min_probability, target),
            Self::Head(head) => head.guess(wishes, min_probability),
        }
    }

    /// The model has read tokens, the first of them at `place` and in this row of its last batch.
    pub(super) fn hear(&mut self, id: SeqId, place: usize, tokens: &[Token], model: &mut Context, row: usize) {
        match self {
            Self::Model(_) => {}
            Self::Head(head) => head.hear(id, place, tokens, model, row),
        }
    }
}
