//! The draft model: a smaller one whose context has the same sequences, and as many cells, as the model's.
//!
//! What it has read of a sequence is known token by token, so it needs no word of what the model does with its cells: it
//! keeps what the sequence begins with, forgets the rest (wrong guesses, or all after a preemption) and reads what it
//! lacks. That it has less than the model costs guesses, never correctness.

use super::side::Side;
use super::{Batch, Context, DecodeError, Model, SeqId, Token};
use crate::engine::load::LoadedDraft;

/// A sequence whose continuation is to be guessed.
pub(in crate::engine) struct Wish<'a> {
    pub(in crate::engine) id: SeqId,
    /// Whose it is, for the caller.
    pub(in crate::engine) lane: usize,
    /// All that there is of it.
    pub(in crate::engine) tokens: &'a [Token],
    /// Tokens to guess at most.
    pub(in crate::engine) most: usize,
    /// The guess; empty at first.
    pub(in crate::engine) draft: Vec<Token>,
}

/// Tokens that a cut of a sliding window may go back: farther back its beginning is gone, and all is read again.
const WINDOW_CUT: usize = 64;

/// The draft model and what it has read.
pub(super) struct Drafter {
    pub(super) side: Side,
    /// By sequence id.
    held: Vec<Vec<Token>>,
    batch: Batch,
    has_window: bool,
}

impl Drafter {
    pub(super) fn new(draft: LoadedDraft) -> Self {
        Self {
            held: vec![Vec::new(); draft.params.sequences as usize],
            batch: Batch::new(draft.params.batch),
            has_window: draft.model.sliding_window() > 0,
            side: Side::new(draft),
        }
    }

    pub(super) fn swap(&mut self, context: Context, staging: &mut Vec<u8>) {
        if !self.side.swap(context, staging) {
            self.forget();
        }
    }

    pub(super) fn replace(&mut self, cells: u32) {
        self.side.replace(cells);
        self.forget();
    }

    pub(super) fn clear(&mut self) {
        self.side.clear();
        self.forget();
    }

    fn forget(&mut self) {
        self.held.iter_mut().for_each(Vec::clear);
    }

    pub(super) fn release(&mut self, id: SeqId) {
        self.side.release(id);
        if let Some(held) = held(&mut self.held, id) {
            held.clear();
        }
    }

    /// `to` begins with the first `length` tokens of `from`, as far as they were read.
    pub(super) fn share(&mut self, from: SeqId, to: SeqId, length: usize) {
        self.release(to);
        let Some(mut tokens) = held(&mut self.held, from).cloned() else { return };
        tokens.truncate(length);
        if self.side.share(from, to, tokens.len(), tokens.len())
            && let Some(held) = held(&mut self.held, to)
        {
            *held = tokens;
        }
    }

    /// Guesses for all at once, the model's most probable tokens. What it lacks of their texts it reads first, but
    /// `piece` tokens in all at most: who lacks more guesses another time. Tokens that `target` does not have, and those
    /// below `min_probability`, end a guess.
    pub(super) fn guess(&mut self, wishes: &mut [Wish<'_>], piece: u32, min_probability: f32, target: &Model) {
        if let Err(reason) = self.try_guess(wishes, piece, min_probability, target) {
            match reason {
                // Nothing was changed by the call that failed, but what lies where is not known.
                DecodeError::NoSlot => {
                    tracing::debug!("no cells for the draft model");
                    self.clear();
                }
                DecodeError::Invalid(reason) | DecodeError::Failed(reason) => {
                    tracing::error!(reason, "the draft model failed: nothing is guessed any more");
                    self.forget();
                    self.side.pool.clear();
                    self.side.context = None;
                }
            }
        }
    }

    fn try_guess(
        &mut self,
        wishes: &mut [Wish<'_>],
        piece: u32,
        min_probability: f32,
        target: &Model,
    ) -> Result<(), DecodeError> {
        // Who lacks least goes first: one with a long prompt does not hold up the others.
        let mut order: Vec<(usize, usize)> =
            (0..wishes.len()).map(|number| (self.keep_common(&wishes[number]), number)).collect();
        order.sort_unstable();
        let room = piece.min(self.side.params.batch) as usize;
        let rows = self.read(wishes, &order, room)?;
        let mut active: Vec<(usize, i32)> = rows;
        while !active.is_empty() {
            let mut next = Vec::with_capacity(active.len());
            for (number, row) in active {
                let wish = &mut wishes[number];
                let Some(token) = self.side.pick(row, min_probability).map_err(DecodeError::Failed)? else { continue };
                if !target.has(token) {
                    continue;
                }
                wish.draft.push(token);
                if wish.draft.len() < wish.most {
                    next.push(number);
                }
            }
            active = self.extend(wishes, &next)?;
        }
        Ok(())
    }

    /// Cuts what is held of a sequence to what it begins with; returns how many tokens are missing, at least one.
    fn keep_common(&mut self, wish: &Wish<'_>) -> usize {
        let Some(held) = held(&mut self.held, wish.id) else { return usize::MAX };
        let known = held.iter().zip(wish.tokens).take_while(|(held, token)| held == token).count();
        let known = known.min(wish.tokens.len().saturating_sub(1));
        let known = if self.has_window && held.len() - known > WINDOW_CUT { 0 } else { known };
        if known < held.len() {
            held.truncate(known);
            self.side.cut(wish.id, known, known);
        }
        wish.tokens.len() - known
    }

    /// Reads what is missing, in `order` and `room` tokens at most; who is complete gets the row of its last token.
    fn read(
        &mut self,
        wishes: &[Wish<'_>],
        order: &[(usize, usize)],
        room: usize,
    ) -> Result<Vec<(usize, i32)>, DecodeError> {
        let (mut room, mut reserved) = (room, 0);
        let mut reading: Vec<(usize, usize, bool)> = Vec::new();
        for &(missing, number) in order {
            let count = missing.min(room);
            let wish = &wishes[number];
            let ahead = if count == missing { wish.most } else { 0 };
            if count == 0 || missing > wish.tokens.len() || !self.has_cells(reserved + count + ahead, wishes) {
                continue;
            }
            room -= count;
            reserved += count + ahead;
            reading.push((number, count, count == missing));
        }
        // llama.cpp computes neighbouring ids together.
        reading.sort_unstable_by_key(|&(number, ..)| wishes[number].id);
        self.batch.clear();
        let mut rows = Vec::with_capacity(reading.len());
        for &(number, count, complete) in &reading {
            let wish = &wishes[number];
            let from = held(&mut self.held, wish.id).map_or(0, |held| held.len());
            for (index, &token) in wish.tokens[from..from + count].iter().enumerate() {
                let last = complete && index + 1 == count;
                let row = self.add(token, from + index, wish.id, last)?;
                if last {
                    rows.push((number, row));
                }
            }
        }
        self.decode()?;
        for (number, count, _) in reading {
            let wish = &wishes[number];
            if let Some(held) = held(&mut self.held, wish.id) {
                let from = held.len();
                held.extend_from_slice(&wish.tokens[from..from + count]);
            }
            self.side.pool.append(wish.id, u32::try_from(count).unwrap_or(u32::MAX));
        }
        Ok(rows)
    }

    /// Reads the last guess of some; returns their rows.
    fn extend(&mut self, wishes: &[Wish<'_>], numbers: &[usize]) -> Result<Vec<(usize, i32)>, DecodeError> {
        self.batch.clear();
        let mut rows = Vec::with_capacity(numbers.len());
        for &number in numbers {
            let wish = &wishes[number];
            let Some(&token) = wish.draft.last() else { continue };
            let position = wish.tokens.len() + wish.draft.len() - 1;
            rows.push((number, self.add(token, position, wish.id, true)?));
        }
        self.decode()?;
        for &(number, _) in &rows {
            let wish = &wishes[number];
            if let Some(held) = held(&mut self.held, wish.id) {
                held.extend(wish.draft.last());
            }
            self.side.pool.append(wish.id, 1);
        }
        Ok(rows)
    }

    fn add(&mut self, token: Token, position: usize, id: SeqId, output: bool) -> Result<i32, DecodeError> {
        // The two vocabularies may differ in their last tokens.
        let token = if self.side.model.has(token) { token } else { self.side.model.bos().unwrap_or(0) };
        let position = i32::try_from(position).unwrap_or(i32::MAX);
        let row = self.batch.add(token, position, id, output);
        row.ok_or_else(|| DecodeError::Invalid("more to read than the batch holds".to_owned()))
    }

    fn decode(&mut self) -> Result<(), DecodeError> {
        let context = self.side.context.as_mut().ok_or_else(|| DecodeError::Failed("no context".to_owned()))?;
        if self.batch.is_empty() { Ok(()) } else { context.decode(&mut self.batch) }
    }

    /// Whether there are so many cells more; those who do not guess now lose theirs for it.
    fn has_cells(&mut self, count: usize, wishes: &[Wish<'_>]) -> bool {
        if self.side.has_cells(count) {
            return true;
        }
        for id in (0..).take(self.held.len()) {
            if wishes.iter().all(|wish| wish.id != id) {
                self.release(id);
            }
        }
        self.side.has_cells(count)
    }
}

fn held(held: &mut [Vec<Token>], id: SeqId) -> Option<&mut Vec<Token>> {
    held.get_mut(usize::try_from(id).ok()?)
}
