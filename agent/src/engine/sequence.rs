//! One request while it is generated.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::{OwnedPermit, Sender};

use super::adapters::AdapterId;
use super::chooser::Chooser;
use super::error::EngineError;
use super::ffi::{LogprobRow, Model};
use super::lines::Lines;
use super::mailbox::{LONGEST_WAIT, Waiting};
use super::media::{Media, MediaPiece};
use super::pool::SeqId;
use super::prefix::{Follow, Serial};
use super::request::{
    CacheKey, FinishReason, GenerateEvent, GenerateRequest, PromptProgress, Timings, Token, TokenLogprob, TopLogprob,
    Usage,
};
use super::sizing::CELLS_STEP;
use super::speculative::Speculation;
use super::step::Saved;
use super::stop::TextAssembler;

/// Events that a reader may be behind before its sequence is parked; two more are reserved for the end.
pub(super) const CHANNEL: usize = 64;

/// A request that has a slot.
#[expect(clippy::struct_excessive_bools, reason = "each says one thing that the client may ask for")]
pub(super) struct Sequence {
    /// Identity, for logs.
    pub(super) id: String,
    /// Identity within the engine; later ones have higher numbers.
    pub(super) serial: Serial,
    /// Whose cells it may begin with.
    pub(super) key: CacheKey,
    /// Whether it may begin with any.
    pub(super) cache_prompt: bool,
    /// llama.cpp's sequence; `None` while preempted, and while it waits for another's prompt.
    pub(super) cells: Option<SeqId>,
    /// The prompt that it waits for.
    pub(super) follow: Option<Follow>,
    /// Its state while preempted, where that could be kept.
    pub(super) saved: Option<Saved>,
    /// Lengths at which messages of its prompt end.
    pub(super) messages: Vec<usize>,
    /// Lengths at which its state is to be looked at.
    pub(super) borders: Vec<usize>,
    /// It has had cells.
    pub(super) begun: bool,
    /// The prompt and what was generated.
    pub(super) tokens: Vec<Token>,
    /// Pictures of the prompt.
    media: Media,
    /// Tokens whose keys and values are in the cache.
    pub(super) resident: usize,
    pub(super) chooser: Chooser,
    /// With which it runs.
    pub(super) adapter: AdapterId,
    /// Alternatives per token that the reader wants.
    pub(super) logprobs: Option<u32>,
    /// Tokens to aim for, prompt and answer.
    pub(super) need: u32,
    /// What it guesses.
    pub(super) speculation: Speculation,
    prompt: usize,
    /// Tokens at most, prompt and answer.
    limit: usize,
    cached: usize,
    ignore_eos: bool,
    preserved: Vec<Token>,
    /// The reader wants to know how far the prompt is.
    progress: bool,
    /// The reader wants tokens without text too.
    every_token: bool,
    text: TextAssembler,
    lines: Lines,
    events: Sender<GenerateEvent>,
    /// For the last text and the last event, so that a full channel cannot lose them.
    last: [OwnedPermit<GenerateEvent>; 2],
    submitted: Instant,
    /// When it got a slot.
    started: Instant,
    /// When it leaves, should it not have begun.
    deadline: Option<Instant>,
    /// It has a slot and finds no room in the context.
    pub(super) waits: bool,
    /// When it gives up waiting for memory.
    waits_until: Option<Instant>,
    first_token: Option<Instant>,
}

impl Sequence {
    /// A request begins. `max_tokens` is what a request may use, prompt and answer.
    pub(super) fn new(
        waiting: Waiting,
        serial: Serial,
        max_tokens: u32,
        need: u32,
        now: Instant,
    ) -> Result<Self, String> {
        let Waiting { request, mut chooser, events, submitted } = waiting;
        let GenerateRequest {
            id,
            prompt,
            media,
            max_tokens: wanted,
            sampling: _,
            grammar: _,
            reasoning: _,
            stop,
            lines,
            preserved,
            ignore_eos,
            logprobs,
            deadline,
            cache,
            cache_prompt,
            borders: messages,
            aim_tokens: _,
            progress,
            every_token,
            adapter,
        } = request;
        chooser.read_prompt(&prompt)?;
        let limit = (max_tokens as usize).min(prompt.len().saturating_add(wanted.map_or(usize::MAX, |n| n as usize)));
        let reserve = || events.clone().try_reserve_owned().map_err(|_| "the reader has gone".to_owned());
        Ok(Self {
            id,
            serial,
            key: cache,
            cache_prompt,
            cells: None,
            follow: None,
            saved: None,
            messages,
            borders: Vec::new(),
            begun: false,
            resident: 0,
            chooser,
            adapter,
            logprobs,
            need,
            speculation: Speculation::default(),
            prompt: prompt.len(),
            limit,
            cached: 0,
            ignore_eos,
            preserved,
            progress,
            every_token,
            text: TextAssembler::new(stop),
            lines: Lines::new(lines),
            last: [reserve()?, reserve()?],
            events,
            submitted,
            started: now,
            deadline,
            waits: false,
            waits_until: None,
            first_token: None,
            tokens: prompt,
            media,
        })
    }

    /// A slot was found: its cells, and how many tokens are in them already.
    pub(super) fn place(&mut self, cells: SeqId, resident: usize) {
        self.cells = Some(cells);
        self.follow = None;
        (self.waits, self.waits_until) = (false, None);
        self.resident = resident;
        if self.first_token.is_none() {
            self.cached = resident.min(self.prompt);
            self.tell_progress();
        }
        self.begun = true;
    }

    /// Its cells are gone; all tokens have to be read again.
    pub(super) fn unplace(&mut self) -> Option<SeqId> {
        self.resident = 0;
        self.speculation.draft.clear();
        self.cells.take()
    }

    /// So many more tokens are in the cache.
    pub(super) fn advance(&mut self, count: u32) {
        self.resident += count as usize;
        self.tell_progress();
    }

    fn tell_progress(&mut self) {
        if self.progress && self.first_token.is_none() {
            let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            let progress = PromptProgress {
                total: count(self.prompt),
                cached: count(self.cached),
                processed: count(self.resident.min(self.prompt)),
                elapsed: self.started.elapsed(),
            };
            // A reader that is behind misses this one, not a token: one place stays free for that.
            if self.events.capacity() > 1 {
                let _ = self.events.try_send(GenerateEvent::Progress(progress));
            }
        }
    }

    /// Tokens to compute.
    pub(super) fn todo(&self) -> usize {
        self.tokens.len() - self.resident
    }

    /// Tokens that may be computed before the state has to be looked at.
    pub(super) fn piece(&self) -> usize {
        let picture = self.media.next(self.resident);
        let ahead = self.borders.iter().copied().chain(picture).filter(|&border| border > self.resident).min();
        ahead.map_or(usize::MAX, |border| border - self.resident).min(self.todo())
    }

    /// The picture that is to be read next.
    pub(super) fn picture(&self) -> Option<&MediaPiece> {
        self.media.at(self.resident)
    }

    /// The position of the token at a place that is not within a picture.
    pub(super) fn position_of(&self, place: usize) -> usize {
        self.media.position(place)
    }

    /// Tokens that may be guessed behind the one that it generates from: each may come with an event, the one after the
    /// last guess too, and where the state is to be looked at nothing may be guessed.
    pub(super) fn guessable(&self) -> usize {
        let left = self.limit.saturating_sub(self.tokens.len() + 1);
        let generates = self.first_token.is_some()
            && self.todo() == 1
            && self.borders.iter().all(|&border| border <= self.resident);
        if generates { left.min(self.events.capacity().saturating_sub(1)) } else { 0 }
    }

    /// Pictures are among its tokens.
    pub(super) fn has_pictures(&self) -> bool {
        !self.media.is_empty()
    }

    /// Of `drafted` guessed tokens, which are in the cache behind its own, the first `right` are its own now.
    pub(super) fn settle(&mut self, drafted: usize, right: usize, price: f64) {
        self.resident += right;
        self.speculation.record.settle(drafted, right, price);
    }

    /// The state is to be looked at now.
    pub(super) fn is_at_border(&self) -> bool {
        self.borders.contains(&self.resident)
    }

    /// Its prompt is being read, so that others can wait for it.
    pub(super) fn is_reading(&self) -> bool {
        self.cells.is_some() && self.todo() > 1 && !self.is_parked()
    }

    /// It can take part in a step.
    pub(super) fn is_ready(&self) -> bool {
        self.cells.is_some() && self.todo() > 0 && !self.is_parked()
    }

    /// Prompt tokens, and how many of them needed no computing.
    pub(super) fn prompt_tokens(&self) -> (usize, usize) {
        (self.prompt, self.cached)
    }

    /// Cells without which it cannot go on: what it has to compute and a little more. `shared`: tokens whose cells will
    /// be another's.
    pub(super) fn next_cells(&self, shared: usize) -> u32 {
        let todo = u32::try_from(self.todo().saturating_sub(shared)).unwrap_or(u32::MAX);
        let left = u32::try_from(self.limit.saturating_sub(self.tokens.len())).unwrap_or(u32::MAX);
        todo.saturating_add(left.min(CELLS_STEP))
    }

    /// Cells that are aimed for beside those it has.
    pub(super) fn aimed_cells(&self, shared: usize) -> u32 {
        let there = u32::try_from(self.resident.saturating_add(shared)).unwrap_or(u32::MAX);
        self.need.saturating_sub(there).max(self.next_cells(shared))
    }

    /// Nobody reads any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// It has waited for its first cells until its deadline.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.first_token.is_none() && self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Nobody runs whose end could make room: it waits for memory, for as long as requests may wait in the queue.
    pub(super) fn wait_for_memory(&mut self, now: Instant) {
        let patience =
            self.deadline.map_or(LONGEST_WAIT, |deadline| deadline.saturating_duration_since(self.submitted));
        self.waits_until.get_or_insert(now + patience);
    }

    /// It has waited long enough for memory.
    pub(super) fn has_waited(&self, now: Instant) -> bool {
        self.waits_until.is_some_and(|until| until <= now)
    }

    /// Its reader is behind.
    pub(super) fn is_parked(&self) -> bool {
        self.events.capacity() == 0
    }

    /// No token may be generated at all.
    pub(super) fn is_complete(&self) -> Option<FinishReason> {
        (self.tokens.len() >= self.limit).then_some(FinishReason::Length)
    }

    /// Takes a sampled token and passes on what may be shown. `Some`: the generation ends.
    pub(super) fn accept(
        &mut self,
        model: &Model,
        token: Token,
        logprobs: Option<&LogprobRow>,
        now: Instant,
    ) -> Result<Option<FinishReason>, String> {
        self.first_token.get_or_insert(now);
        self.tokens.push(token);
        if !self.ignore_eos && model.is_end(token) {
            return Ok(Some(FinishReason::Stop));
        }
        let logprob = logprobs.map(|row| described(model, token, row)).transpose()?;
        model.append_piece(token, self.preserved.contains(&token), self.text.buffer())?;
        let mut passed = self.text.advance();
        let elapsed = self.first_token.map_or(Duration::ZERO, |first| now - first);
        let end = self.lines.pass(&passed.text, elapsed);
        if let Some(end) = end {
            passed.text.truncate(end);
            self.text.clear();
        }
        if !passed.text.is_empty() || logprob.is_some() || self.every_token {
            // The channel has room, because a sequence whose channel is full takes no part in a step; a reader that
            // has gone is seen before the next one.
            let _ = self.events.try_send(GenerateEvent::Token { text: passed.text, token, logprob });
        }
        if end.is_some() {
            return Ok(Some(FinishReason::Length));
        }
        if passed.stopped || self.chooser.is_complete() {
            return Ok(Some(FinishReason::Stop));
        }
        Ok(self.is_complete())
    }

    /// Sends the end.
    pub(super) fn finish(mut self, finish_reason: FinishReason, now: Instant) {
        let [text_permit, done_permit] = self.last;
        let rest = self.text.finish();
        let stop = self.text.matched().map(str::to_owned);
        if !rest.is_empty() {
            let token = self.tokens.last().copied().unwrap_or_default();
            text_permit.send(GenerateEvent::Token { text: rest, token, logprob: None });
        }
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let usage = Usage {
            prompt_tokens: count(self.prompt),
            cached_tokens: count(self.cached),
            completion_tokens: count(self.tokens.len() - self.prompt),
        };
        let first_token = self.first_token.unwrap_or(now);
        let timings = Timings {
            queue: self.started - self.submitted,
            prefill: first_token - self.started,
            time_to_first_token: first_token - self.submitted,
            decode: now - first_token,
            drafted: self.speculation.record.drafted,
            accepted: self.speculation.record.accepted,
        };
        done_permit.send(GenerateEvent::Done { finish_reason, stop, usage, timings });
    }

    /// Sends the failure.
    pub(super) fn fail(self, error: EngineError) {
        let [_, permit] = self.last;
        permit.send(GenerateEvent::Failed(error));
    }
}

/// Ends a request that has no slot.
pub(super) fn give_up(waiting: &Waiting, error: EngineError) {
    // The channel of a request that has got no slot is empty; a reader that has gone needs no reason.
    let _ = waiting.events.try_send(GenerateEvent::Failed(error));
}

fn described(model: &Model, token: Token, row: &LogprobRow) -> Result<TokenLogprob, String> {
    let bytes = |token| {
        let mut bytes = Vec::new();
        model.append_piece(token, true, &mut bytes).map(|()| bytes)
    };
    let top = row.top.iter().map(|&(token, logprob)| Ok(TopLogprob { token, logprob, bytes: bytes(token)? }));
    Ok(TokenLogprob { logprob: row.chosen, bytes: bytes(token)?, top: top.collect::<Result<_, String>>()? })
}
