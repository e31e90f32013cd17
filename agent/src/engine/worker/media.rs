//! Pictures and sound: computed between the steps of those who generate, then read as a part of the prompt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::error::EngineError;
use super::super::ffi::{DecodeError, Encoder};
use super::super::mailbox::Phase;
use super::super::media::{Kept, MediaPiece};
use super::super::prefix::Serial;
use super::super::schedule::Chunk;
use super::Worker;

/// How long a picture is computed before those who generate get a step. A part of the encoder's graph that takes longer
/// is not cut.
const TURN: Duration = Duration::from_millis(20);

/// What pictures need.
pub(super) struct Pictures {
    /// `None`: the model reads none, or one is being computed right now.
    encoder: Option<Encoder>,
    kept: Kept,
    /// Whose picture is being computed.
    encoding: Option<Serial>,
    /// The last step read a picture.
    had_turn: bool,
}

impl Pictures {
    pub(super) fn new(encoder: Option<Encoder>) -> Self {
        Self { encoder, kept: Kept::default(), encoding: None, had_turn: false }
    }

    /// Whose picture is being computed; it is not idle, though its prompt does not get on.
    pub(super) fn encoding(&self) -> Option<Serial> {
        self.encoding
    }
}

impl Worker {
    /// The sequence whose picture is to be read in this step: the oldest. A step with a picture holds nothing else, so
    /// where others have something to compute they take turns.
    pub(super) fn picture_lane(&mut self) -> Option<usize> {
        let lane = self.running.iter().position(|sequence| sequence.is_ready() && sequence.picture().is_some());
        let lane = lane.filter(|_| self.pictures.encoder.is_some());
        let turn = lane.is_some() && (self.step.is_empty() || !self.pictures.had_turn);
        self.pictures.had_turn = turn;
        lane.filter(|_| turn)
    }

    /// Reads a picture, or a part of it; computes it first where it is not there.
    pub(super) fn read_picture(&mut self, lane: usize) -> Result<(), EngineError> {
        let beside = !self.step.is_empty();
        let sequence = &self.running[lane];
        let (Some(id), Some(piece)) = (sequence.cells, sequence.picture().cloned()) else { return Ok(()) };
        let Some(embeddings) = self.pictures.kept.get(piece.name) else { return self.encode(lane, &piece) };
        let first = sequence.resident - piece.start;
        let left = piece.tokens - first;
        let batch = self.executor.batch_tokens() as usize;
        let count = match (piece.non_causal, beside) {
            (true, _) => left,
            (false, true) => left.min(self.limits().mixed as usize),
            (false, false) => left.min(batch),
        };
        let cells = u32::try_from(count).unwrap_or(u32::MAX);
        if self.executor.pool().used().saturating_add(cells) > self.executor.cells() {
            return self.make_room();
        }
        let output = sequence.todo() == count;
        let start = sequence.position_of(piece.start);
        match self.executor.decode_picture(
            id,
            sequence.adapter,
            &piece,
            start,
            &embeddings,
            first..first + count,
            output,
        ) {
            Ok(()) => {}
            Err(DecodeError::NoSlot) => return self.make_room(),
            Err(DecodeError::Invalid(reason)) => {
                tracing::error!(reason, "llama.cpp refused a picture");
                let sequence = self.running.remove(lane);
                self.fail(sequence, EngineError::DecodeFailed(reason));
                return Ok(());
            }
            Err(DecodeError::Failed(reason)) => return Err(EngineError::while_computing(reason)),
        }
        self.step.clear();
        self.step.push(Chunk { lane, count: cells, output, draft: 0 });
        self.rows.clear();
        self.rows.push(i32::try_from(count - 1).unwrap_or(i32::MAX));
        self.advance()
    }

    /// Computes a picture. Those who generate go on meanwhile, a step after each [`TURN`]; who asked for it may go.
    fn encode(&mut self, lane: usize, piece: &MediaPiece) -> Result<(), EngineError> {
        let Some(mut encoder) = self.pictures.encoder.take() else { return Ok(()) };
        let (serial, id) = (self.running[lane].serial, self.running[lane].id.clone());
        self.pictures.encoding = Some(serial);
        let started = Instant::now();
        let mut failed = None;
        let mut last = started;
        let result = encoder.encode(&piece.pieces, piece.index, &mut || {
            if last.elapsed() < TURN {
                return true;
            }
            let between = self.between();
            last = Instant::now();
            match between {
                Ok(()) => {}
                Err(error) => {
                    failed = Some(error);
                    return false;
                }
            }
            // One that gave way comes back for it.
            let is_here = self.running.iter().chain(&self.preempted).any(|sequence| sequence.serial == serial);
            let must_end = matches!(self.mailbox.phase(), Phase::Draining(deadline) if deadline <= last);
            is_here && !must_end
        });
        self.pictures.encoder = Some(encoder);
        self.pictures.encoding = None;
        if let Some(error) = failed {
            return Err(error);
        }
        let elapsed = started.elapsed();
        match result {
            Ok(Some(embeddings)) => {
                tracing::debug!(request = id, tokens = piece.tokens, milliseconds = elapsed.as_millis(), "picture");
                self.pictures.kept.insert(piece.name, Arc::from(embeddings));
                self.shared.update(|stats| {
                    let (count, time) = if piece.sound {
                        (&mut stats.sounds, &mut stats.sound_time)
                    } else {
                        (&mut stats.pictures, &mut stats.picture_time)
                    };
                    *count += 1;
                    *time += elapsed;
                });
            }
            Ok(None) => tracing::debug!(request = id, "a picture is not needed any more"),
            Err(reason) => {
                tracing::error!(request = id, reason, "a picture could not be computed");
                if let Some(lane) = self.running.iter().position(|sequence| sequence.serial == serial) {
                    let sequence = self.running.remove(lane);
                    self.fail(sequence, EngineError::DecodeFailed(reason));
                }
            }
        }
        Ok(())
    }

    /// A step of those who generate, while a picture is computed.
    fn between(&mut self) -> Result<(), EngineError> {
        self.shared.step_ends();
        self.look_around(Instant::now())?;
        self.schedule();
        self.shared.step_begins();
        if !self.step.is_empty() {
            self.make_step(Instant::now())?;
            self.publish_cells();
        }
        Ok(())
    }
}
