//! The model's own head that guesses (MTP): from a token and the model's hidden state before it, the next token.
//!
//! It needs the hidden state of every token that the model reads, which comes with the step that reads it and at no other
//! time. What is taken over from host memory, or read while nobody listens, brings none: then the head begins behind it, with
//! less to see. That costs guesses, never correctness, because each is checked.

use super::side::Side;
use super::{Batch, Context, DecodeError, SeqId, Token, Wish};
use crate::engine::load::LoadedDraft;

/// Tokens of a sequence that wait until somebody guesses; more are read at once.
const WAITING: usize = 32;

/// The head and what it has read.
pub(super) struct Head {
    pub(super) side: Side,
    /// By sequence id.
    lines: Vec<Line>,
    batch: Batch,
    /// Of the batch's tokens.
    states: Vec<f32>,
    /// Numbers of a hidden state.
    width: usize,
}

/// What the head knows of a sequence: all from a place on.
#[derive(Debug, Default, PartialEq)]
struct Line {
    /// It has read from here on…
    start: usize,
    /// …to here.
    end: usize,
    /// Tokens behind those.
    waiting: Vec<Token>,
    /// The hidden state before each of these.
    states: Vec<f32>,
    /// The place of the token that the model reads next.
    next: usize,
    /// The model's hidden state before that; empty: not known.
    last: Vec<f32>,
}

impl Line {
    /// The model has read a token and has this state now. False: not what it should have read next, so that the head
    /// begins anew.
    fn hear(&mut self, place: usize, token: Token, state: &[f32]) -> bool {
        let fits = place == self.next;
        if !fits {
            *self = Self::default();
        }
        if self.last.is_empty() {
            (self.start, self.end) = (place + 1, place + 1);
        } else if place >= self.end + self.waiting.len() {
            self.waiting.push(token);
            self.states.extend_from_slice(&self.last);
        }
        self.next = place + 1;
        self.last.clear();
        self.last.extend_from_slice(state);
        fits
    }

    /// Goes on behind the first `length` tokens. The hidden state before them is known no more and counts as zero: of one
    /// token the head sees less. Returns whether anything is left.
    fn cut(&mut self, length: usize, width: usize) -> bool {
        if length >= self.next && self.end <= length {
            return true;
        }
        if length <= self.start || length > self.next {
            *self = Self::default();
            return false;
        }
        self.waiting.truncate(length.saturating_sub(self.end));
        self.states.truncate(self.waiting.len() * width);
        self.end = self.end.min(length);
        if length < self.next {
            self.last = vec![0.0; width];
        }
        self.next = length;
        true
    }
}

impl Head {
    pub(super) fn new(draft: LoadedDraft) -> Self {
        let mut lines = Vec::new();
        lines.resize_with(draft.params.sequences as usize, Line::default);
        Self {
            lines,
            batch: Batch::new(draft.params.batch),
            states: Vec::new(),
            width: draft.model.embedding_width() as usize,
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
        self.lines.iter_mut().for_each(|line| *line = Line::default());
    }

    pub(super) fn release(&mut self, id: SeqId) {
        self.side.release(id);
        if let Some(line) = line(&mut self.lines, id) {
            *line = Line::default();
        }
    }

    /// `to` begins with the first `length` tokens of `from`.
    pub(super) fn share(&mut self, from: SeqId, to: SeqId, length: usize) {
        self.release(to);
        self.read(from);
        let Some(&mut Line { start, end, next, ref last, .. }) = line(&mut self.lines, from) else { return };
        let known = end.min(length);
        if known <= start || end < next.min(length) {
            return;
        }
        let last = if length == next { last.clone() } else { vec![0.0; self.width] };
        if self.side.share(from, to, known, known - start)
            && let Some(line) = line(&mut self.lines, to)
        {
            *line = Line { start, end: known, next: known, last, ..Line::default() };
        }
    }

    /// A sequence goes on behind its first `length` tokens.
    pub(super) fn cut(&mut self, id: SeqId, length: usize) {
        let Some(line) = line(&mut self.lines, id) else { return };
        let before = line.end;
        if !line.cut(length, self.width) {
            self.side.release(id);
        } else if line.end < before {
            let (end, cells) = (line.end, line.end - line.start);
            self.side.cut(id, end, cells);
        }
    }

    /// The model has read tokens, the first of them at `place` and in this row of its last batch.
    pub(super) fn hear(&mut self, id: SeqId, place: usize, tokens: &[Token], model: &mut Context, row: usize) {
        if self.side.context.is_none() {
            return;
        }
        for (number, &token) in tokens.iter().enumerate() {
            let Some(line) = line(&mut self.lines, id) else { return };
            let Some(state) = i32::try_from(row + number).ok().and_then(|row| model.hidden(row)) else {
                // A gap: the next token is not the one that is expected.
                line.next = usize::MAX;
                return;
            };
            if !line.hear(place + number, token, state) {
                self.side.release(id);
            }
        }
        if line(&mut self.lines, id).is_some_and(|line| line.waiting.len() >= WAITING) {
            self.read(id);
        }
    }

    /// Reads what waits of a sequence.
    fn read(&mut self, id: SeqId) {
        loop {
            let Some(known) = line(&mut self.lines, id) else { return };
            let count = known.waiting.len().min(self.side.params.batch as usize);
            if count == 0 {
                return;
            }
            if !self.side.has_cells(count) {
                self.release(id);
                return;
            }
            self.batch.clear();
            self.states.clear();
            let result = self.add_waiting(id, count).and_then(|()| self.decode());
            if let Err(error) = result {
                self.failed(error);
                return;
            }
        }
    }

    /// Puts tokens that wait into the batch; they count as read.
    fn add_waiting(&mut self, id: SeqId, count: usize) -> Result<(), DecodeError> {
        let Self { lines, batch, states, side, width, .. } = self;
        let Some(line) = line(lines, id) else { return Ok(()) };
        for token in line.waiting.drain(..count) {
            add(batch, token, line.end, id, false)?;
            line.end += 1;
        }
        states.extend(line.states.drain(..count * *width));
        side.pool.append(id, u32::try_from(count).unwrap_or(u32::MAX));
        Ok(())
    }

    fn decode(&mut self) -> Result<(), DecodeError> {
        let context = self.side.context.as_mut().ok_or_else(|| DecodeError::Failed("no context".to_owned()))?;
        if self.batch.is_empty() { Ok(()) } else { context.decode_head(&mut self.batch, &self.states) }
    }

    fn failed(&mut self, error: DecodeError) {
        match error {
            // What lies where is not known.
            DecodeError::NoSlot => {
                tracing::debug!("no cells for the model's head");
                self.clear();
            }
            DecodeError::Invalid(reason) | DecodeError::Failed(reason) => {
                tracing::error!(reason, "the model's head failed: nothing is guessed any more");
                self.forget();
                self.side.pool.clear();
                self.side.context = None;
            }
        }
    }

    /// Guesses for all at once, the head's most probable tokens; those below `min_probability` end a guess.
    pub(super) fn guess(&mut self, wishes: &mut [Wish<'_>], min_probability: f32) {
        if self.side.context.is_none() {
            return;
        }
        if let Err(error) = self.try_guess(wishes, min_probability) {
            self.failed(error);
        }
    }

    fn try_guess(&mut self, wishes: &mut [Wish<'_>], min_probability: f32) -> Result<(), DecodeError> {
        let mut active = self.begin(wishes)?;
        let begun: Vec<usize> = active.iter().map(|&(number, _)| number).collect();
        while !active.is_empty() {
            self.batch.clear();
            self.states.clear();
            let mut next = Vec::with_capacity(active.len());
            for (number, row) in active {
                let wish = &mut wishes[number];
                let Some(token) = self.side.pick(row, min_probability).map_err(DecodeError::Failed)? else { continue };
                wish.draft.push(token);
                if wish.draft.len() == wish.most {
                    continue;
                }
                let context = self.side.context.as_mut();
                let Some(state) = context.and_then(|context| context.hidden(row)) else { continue };
                self.states.extend_from_slice(state);
                let place = wish.tokens.len() + wish.draft.len() - 1;
                next.push((number, add(&mut self.batch, token, place, wish.id, true)?));
            }
            self.decode()?;
            for &(number, _) in &next {
                self.side.pool.append(wishes[number].id, 1);
            }
            active = next;
        }
        // What was only guessed goes again; the model says what came of it.
        for number in begun {
            let id = wishes[number].id;
            if let Some(&mut Line { start, end, .. }) = line(&mut self.lines, id) {
                self.side.cut(id, end, end - start);
            }
        }
        Ok(())
    }

    /// Reads what waits and the last token of those of whom all before it is known; returns the rows of these.
    fn begin(&mut self, wishes: &[Wish<'_>]) -> Result<Vec<(usize, i32)>, DecodeError> {
        let (mut reserved, mut room) = (0, self.side.params.batch as usize);
        self.batch.clear();
        self.states.clear();
        let mut rows = Vec::with_capacity(wishes.len());
        for (number, wish) in wishes.iter().enumerate() {
            let Some((&token, before)) = wish.tokens.split_last() else { continue };
            let place = before.len();
            let Some(known) = line(&mut self.lines, wish.id) else { continue };
            if known.next != place || known.last.is_empty() || wish.most == 0 {
                continue;
            }
            if known.end > place {
                // From a guess whose step did not come.
                known.end = place;
                let cells = place.saturating_sub(known.start);
                self.side.cut(wish.id, place, cells);
            }
            let Some(known) = line(&mut self.lines, wish.id) else { continue };
            let count = known.waiting.len() + 1;
            if count > room || !self.side.has_cells(reserved + count + wish.most) {
                continue;
            }
            room -= count;
            reserved += wish.most;
            self.add_waiting(wish.id, count - 1)?;
            let Some(known) = line(&mut self.lines, wish.id) else { continue };
            self.states.extend_from_slice(&known.last);
            rows.push((number, add(&mut self.batch, token, place, wish.id, true)?));
            known.end = place + 1;
            self.side.pool.append(wish.id, 1);
        }
        self.decode()?;
        Ok(rows)
    }
}

fn add(batch: &mut Batch, token: Token, place: usize, id: SeqId, output: bool) -> Result<i32, DecodeError> {
    let position = i32::try_from(place).unwrap_or(i32::MAX);
    let row = batch.add(token, position, id, output);
    row.ok_or_else(|| DecodeError::Invalid("more to read than the batch holds".to_owned()))
}

fn line(lines: &mut [Line], id: SeqId) -> Option<&mut Line> {
    lines.get_mut(usize::try_from(id).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state of one number, which is the place after which it is.
    fn heard(line: &mut Line, places: std::ops::Range<usize>) -> bool {
        let mut fits = true;
        for place in places {
            let state = f32::from(u16::try_from(place).expect("small"));
            fits &= line.hear(place, i32::try_from(place * 10).expect("small"), &[state]);
        }
        fits
    }

    #[test]
    fn a_token_goes_with_the_state_before_it() {
        let mut line = Line::default();
        assert!(heard(&mut line, 0..4));
        assert_eq!((line.start, line.end, line.next), (1, 1, 4));
        assert_eq!((line.waiting.as_slice(), line.states.as_slice()), (&[10, 20, 30][..], &[0.0, 1.0, 2.0][..]));
        assert_eq!(line.last, [3.0]);
        // A gap: it begins anew behind what was read now.
        assert!(!heard(&mut line, 9..12));
        assert_eq!((line.start, line.end, line.next), (10, 10, 12));
        assert_eq!((line.waiting.as_slice(), line.states.as_slice()), (&[100, 110][..], &[9.0, 10.0][..]));
    }

    #[test]
    fn what_a_guess_has_read_is_not_read_again() {
        let mut line = Line { start: 1, end: 5, next: 4, last: vec![3.0], ..Line::default() };
        assert!(heard(&mut line, 4..7));
        assert_eq!((line.waiting.as_slice(), line.states.as_slice()), (&[50, 60][..], &[4.0, 5.0][..]));
    }

    #[test]
    fn cuts() {
        let line = || {
            let mut line = Line { start: 3, end: 6, next: 6, last: vec![5.0], ..Line::default() };
            heard(&mut line, 6..9);
            line
        };
        // Length, whether anything is left, places read, tokens that wait, the next one, the state before it.
        let cases = [
            (9, true, 3..6, 3, 9, Some(8.0)),
            (8, true, 3..6, 2, 8, Some(0.0)),
            (6, true, 3..6, 0, 6, Some(0.0)),
            (5, true, 3..5, 0, 5, Some(0.0)),
            (3, false, 0..0, 0, 0, None),
            (0, false, 0..0, 0, 0, None),
        ];
        for (length, left, read, waiting, next, last) in cases {
            let mut line = line();
            assert_eq!(line.cut(length, 1), left, "{length}");
            assert_eq!((line.start..line.end, line.waiting.len(), line.next), (read, waiting, next), "{length}");
            assert_eq!((line.states.len(), line.last.first().copied()), (waiting, last), "{length}");
        }
    }
}
