//! Does what was decided to the llama.cpp context. Nothing else changes it.

mod draft;
mod gather;
mod guesser;
mod head;
mod resize;
mod side;

use std::ops::Range;
use std::sync::Arc;

use super::adapters::AdapterId;
use super::capability::{Capability, Cut};
use super::chooser::{ChooseError, Chooser};
use super::error::EngineError;
use super::ffi::{Adapter, Batch, Context, ContextParams, DecodeError, LogprobRow, MediaBatch, Model, available_bytes};
use super::host::{self, HostCache};
use super::load::{self, LoadedDraft, Plan, total_context_bytes};
use super::media::{self, MediaPiece};
use super::pool::{Pool, SeqId};
use super::prefix::{self, Candidate, Choice, Holder, May, Reuse};
use super::request::{CacheKey, Token};
use crate::runner::grants::Grants;
use crate::runner::protocol::MemoryUse;

pub(super) use draft::Wish;
use guesser::Guesser;
pub(super) use resize::Resized;

/// The context and the books that are kept of it.
pub(super) struct Executor {
    model: Model,
    /// `None` only after a failure that ends the engine.
    context: Option<Context>,
    params: ContextParams,
    capability: Capability,
    pool: Pool,
    host: HostCache,
    kept: u32,
    batch: Batch,
    /// What the state moves through; kept for the next change of size.
    staging: Vec<u8>,
    making: Option<resize::Making>,
    /// Who is asked before the context grows; `None`: nobody.
    grants: Option<Arc<dyn Grants>>,
    /// Who guesses with a context of its own.
    guesser: Option<Guesser>,
    /// Sequences whose last guesses were taken away from a state that is one for all tokens: until it computes again,
    /// llama.cpp knows of that by the sequence, so that no other may share it.
    rolled_back: Vec<bool>,
    /// For each entry of the last step the row of its first token.
    firsts: Vec<usize>,
    adapters: Vec<(Adapter, f32)>,
    /// That the next steps are made with.
    adapter: AdapterId,
    /// The next context beside the running one is one that llama.cpp refuses to make.
    #[cfg(test)]
    pub(super) spoils_next: bool,
}

/// The state of a sequence that lost its cells.
pub(super) struct Saved {
    state: Vec<u8>,
    /// Tokens in it.
    tokens: usize,
}

impl Executor {
    pub(super) fn new(
        model: Model,
        context: Context,
        params: ContextParams,
        draft: Option<LoadedDraft>,
        adapters: Vec<(Adapter, f32)>,
        plan: &Plan,
    ) -> Self {
        let sequences = params.sequences as usize;
        Self {
            pool: Pool::new(params.sequences, params.unified),
            host: HostCache::new(plan.host_cache),
            // A larger context may allow a larger batch, up to what was asked for.
            batch: Batch::new(params.batch),
            model,
            context: Some(context),
            params,
            capability: plan.capability,
            kept: plan.kept,
            staging: Vec::new(),
            making: None,
            grants: None,
            guesser: draft.map(Guesser::new),
            rolled_back: vec![false; sequences],
            firsts: Vec::new(),
            adapters,
            adapter: None,
            #[cfg(test)]
            spoils_next: plan.spoils_next,
        }
    }

    /// Asks before it grows.
    pub(super) fn asks(mut self, grants: Option<Arc<dyn Grants>>) -> Self {
        self.grants = grants;
        self
    }

    /// Cells of the KV cache.
    pub(super) fn cells(&self) -> u32 {
        self.context.as_ref().map_or(0, Context::cells)
    }

    /// Tokens in one step at most.
    pub(super) fn batch_tokens(&self) -> u32 {
        self.context.as_ref().map_or(0, Context::batch)
    }

    /// Tokens computed at once at most.
    pub(super) fn micro_batch_tokens(&self) -> u32 {
        self.context.as_ref().map_or(0, Context::micro_batch)
    }

    /// Whether guesses can be taken away only from a step that is computed at once.
    pub(super) fn speculates_in_one_piece(&self) -> bool {
        self.capability.speculates_in_one_piece()
    }

    /// Who holds which cells.
    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// States in host memory.
    pub(super) fn host(&self) -> &HostCache {
        &self.host
    }

    /// Bytes per device, the draft model's counted; the buffer for changes of size is among the host's.
    pub(super) fn memory(&self) -> Vec<MemoryUse> {
        let mut memory = self.context.as_ref().map(Context::memory).unwrap_or_default();
        load::add(&mut memory, self.guesser.as_ref().map(Guesser::memory).unwrap_or_default());
        if let Some(host) = memory.iter_mut().find(|device| device.device == "CPU") {
            host.other_bytes += self.staging_bytes();
        }
        memory
    }

    /// Whether the state has to be looked at on the way through a prompt.
    pub(super) fn needs_snapshots(&self) -> bool {
        self.capability.needs_snapshots()
    }

    /// A running sequence as what a prompt can begin with.
    pub(super) fn candidate<'a>(
        &self,
        id: SeqId,
        holder: Holder,
        tokens: &'a [Token],
        resident: usize,
    ) -> Candidate<'a> {
        Candidate { holder, tokens, resident, cut_from: self.cut_from(id, tokens) }
    }

    fn cut_from(&self, id: SeqId, tokens: &[Token]) -> usize {
        let oldest = match self.capability.cut {
            Cut::Window(_) => self.context.as_ref().map_or(0, |context| context.oldest(id)),
            Cut::Anywhere | Cut::Nowhere => 0,
        };
        if oldest > 0 && !media::is_even(tokens) {
            // Of positions it is known what has gone, not of tokens.
            return usize::MAX;
        }
        self.capability.cut_from(oldest)
    }

    /// What a prompt can begin with; `running` are those of its key.
    pub(super) fn choose<'a>(
        &'a self,
        prompt: &[Token],
        key: &'a CacheKey,
        running: impl Iterator<Item = Candidate<'a>>,
        follow: bool,
    ) -> Choice {
        let kept = self.pool.kept().filter(|&(_, other, _)| other == key);
        let kept = kept.map(|(id, _, tokens)| self.candidate(id, Holder::Kept(id), tokens, tokens.len()));
        let all = kept.chain(running).chain(self.host.candidates(key));
        prefix::choose(prompt, all, May { share: self.pool.has_spare(), follow })
    }

    /// Gives a sequence of these tokens an id; returns it and how many of them are in the KV cache already. `None`: all
    /// ids run.
    pub(super) fn begin(&mut self, reuse: Reuse, tokens: &[Token]) -> Option<(SeqId, usize)> {
        match reuse {
            Reuse::Take { id, length } => {
                if let Some(begun) = self.take_over(id, length, tokens) {
                    return Some(begun);
                }
            }
            // Its next step settles it.
            Reuse::Share { id: from, .. } if self.is_rolled_back(from) => {}
            Reuse::Share { id: from, length } => {
                let cells = u32::try_from(length).ok()?;
                let Some(to) = self.take_id(Some(from)) else {
                    return if self.pool.is_kept(from) { self.take_over(from, length, tokens) } else { None };
                };
                if !self.params.unified {
                    self.free_cells(cells, Some(from));
                }
                if self.context.as_mut()?.share(from, to, positions(tokens, length)) {
                    self.pool.share(from, to, cells);
                    if let Some(guesser) = &mut self.guesser {
                        guesser.share(from, to, length);
                    }
                    self.pool.touch(from);
                    return Some((to, length));
                }
                self.release(to);
            }
            Reuse::Restore { entry, length } => {
                let cells = u32::try_from(length).ok()?;
                let whole = self.host.get(entry).and_then(|(_, whole)| u32::try_from(whole).ok())?;
                let to = self.take_id(None)?;
                self.free_cells(whole, None);
                let context = self.context.as_mut()?;
                let restored = self.host.get(entry).is_some_and(|(state, _)| context.set_sequence_state(to, state));
                if restored && context.remove(to, positions(tokens, length)) {
                    self.pool.append(to, cells);
                    return Some((to, length));
                }
                // No room for it, or bytes of another layout: then it would be tried again and again.
                self.host.remove(entry);
                self.release(to);
            }
            Reuse::Follow { .. } | Reuse::Nothing => {}
        }
        self.take_id(None).map(|id| (id, 0))
    }

    /// Begins with the cells of a kept sequence, cut to `length`; frees them if they cannot be cut.
    fn take_over(&mut self, id: SeqId, length: usize, tokens: &[Token]) -> Option<(SeqId, usize)> {
        let cells = u32::try_from(length).ok()?;
        if self.context.as_mut()?.remove(id, positions(tokens, length)) {
            self.pool.cut(id, cells);
            self.pool.revive(id);
            if let Some(guesser) = &mut self.guesser {
                guesser.cut(id, length);
            }
            return Some((id, length));
        }
        self.release(id);
        None
    }

    /// A free id, or one of a kept sequence other than `except`.
    fn take_id(&mut self, except: Option<SeqId>) -> Option<SeqId> {
        loop {
            if let Some(id) = self.pool.take() {
                return Some(id);
            }
            if !self.drop_kept(except) {
                return None;
            }
        }
    }

    /// Drops kept sequences until so many cells are free.
    fn free_cells(&mut self, cells: u32, except: Option<SeqId>) {
        while self.pool.used().saturating_add(cells) > self.cells() && self.drop_kept(except) {}
    }

    /// Has the next steps made with an adapter, or with none.
    pub(super) fn adapt(&mut self, adapter: AdapterId) {
        self.adapter = adapter;
    }

    /// Computes tokens: for each entry the sequence, its tokens, the position of the first one, whether the last one's
    /// logits are needed, and guessed tokens behind it, whose logits all are. `rows` gets the row of the first of those
    /// logits for each entry; the others follow it.
    pub(super) fn decode<'a>(
        &mut self,
        work: impl Iterator<Item = (SeqId, &'a [Token], usize, bool, &'a [Token])> + Clone,
        rows: &mut Vec<i32>,
    ) -> Result<(), DecodeError> {
        self.batch.clear();
        self.firsts.clear();
        rows.clear();
        let too_large = || DecodeError::Invalid("the step is larger than the batch".to_owned());
        for (id, tokens, start, output, draft) in work.clone() {
            let mut row = None;
            self.firsts.push(self.batch.len());
            for (index, &token) in tokens.iter().enumerate() {
                let position = i32::try_from(start + index).unwrap_or(i32::MAX);
                row = self.batch.add(token, position, id, output && index + 1 == tokens.len());
            }
            rows.push(row.ok_or_else(too_large)?);
            for (index, &token) in draft.iter().enumerate() {
                let position = i32::try_from(start + tokens.len() + index).unwrap_or(i32::MAX);
                self.batch.add(token, position, id, true).ok_or_else(too_large)?;
            }
        }
        let context = self.context.as_mut().ok_or_else(|| DecodeError::Failed("no context".to_owned()))?;
        // Each time, because a context that was just made has none; llama.cpp sees when nothing changes.
        let adapter = self.adapter.and_then(|number| self.adapters.get(number));
        context.adapt(adapter.map(|(adapter, scale)| (adapter, *scale)));
        context.decode(&mut self.batch)?;
        for (id, tokens, _, _, draft) in work {
            self.set_rolled_back(id, false);
            self.pool.append(id, u32::try_from(tokens.len() + draft.len()).unwrap_or(u32::MAX));
        }
        Ok(())
    }

    /// Computes a part of a picture that begins at the position `start`, with an adapter or with none. The row of its last
    /// token is the last one.
    #[expect(clippy::too_many_arguments, reason = "each says one thing about the part")]
    pub(super) fn decode_picture(
        &mut self,
        id: SeqId,
        adapter: AdapterId,
        piece: &MediaPiece,
        start: usize,
        embeddings: &[f32],
        part: Range<usize>,
        output: bool,
    ) -> Result<(), DecodeError> {
        let invalid = || DecodeError::Invalid("a part that the picture does not have".to_owned());
        let all = piece.pieces.positions(piece.index, start).ok_or_else(invalid)?;
        let mut positions = Vec::with_capacity(all.len());
        for section in all.chunks_exact(piece.tokens.max(1)) {
            positions.extend_from_slice(section.get(part.clone()).ok_or_else(invalid)?);
        }
        let width = embeddings.len() / piece.tokens.max(1);
        let embeddings = embeddings.get(part.start * width..part.end * width).ok_or_else(invalid)?;
        self.adapt(adapter);
        let context = self.context.as_mut().ok_or_else(|| DecodeError::Failed("no context".to_owned()))?;
        let adapter = self.adapter.and_then(|number| self.adapters.get(number));
        context.adapt(adapter.map(|(adapter, scale)| (adapter, *scale)));
        let causal = !piece.non_causal;
        context.decode_media(&MediaBatch { embeddings, positions: &positions, sequence: id, causal, output })?;
        self.pool.append(id, u32::try_from(part.len()).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Takes the last `count` tokens of a sequence away, which were guessed wrong; `length` stay, up to `position`.
    pub(super) fn retract(
        &mut self,
        id: SeqId,
        length: usize,
        position: usize,
        count: usize,
    ) -> Result<(), EngineError> {
        let cells = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        if count == 0 {
            return Ok(());
        }
        if !self.context.as_mut().is_some_and(|context| context.remove(id, cells(position))) {
            // Tried when the model was loaded.
            return Err(EngineError::DecodeFailed("llama.cpp does not take guessed tokens away".to_owned()));
        }
        self.pool.cut(id, cells(length));
        self.set_rolled_back(id, self.capability.cut == Cut::Nowhere);
        Ok(())
    }

    fn is_rolled_back(&self, id: SeqId) -> bool {
        usize::try_from(id).ok().and_then(|id| self.rolled_back.get(id)).is_some_and(|rolled_back| *rolled_back)
    }

    fn set_rolled_back(&mut self, id: SeqId, to: bool) {
        if let Some(rolled_back) = usize::try_from(id).ok().and_then(|id| self.rolled_back.get_mut(id)) {
            *rolled_back = to;
        }
    }

    /// Has the one that guesses with a context of its own guess what follows; see [`Guesser::guess`].
    pub(super) fn draft(&mut self, wishes: &mut [Wish<'_>], piece: u32, min_probability: f32) {
        let Self { guesser, model, .. } = self;
        if let Some(guesser) = guesser {
            guesser.guess(wishes, piece, min_probability, model);
        }
    }

    /// Tells who guesses that the last step read these tokens of a sequence, `skip` tokens behind the first one of the
    /// step's entry; the first of them is at `place`.
    pub(super) fn hear(&mut self, entry: usize, id: SeqId, place: usize, tokens: &[Token], skip: usize) {
        let Self { guesser, context, firsts, .. } = self;
        if let (Some(guesser), Some(context), Some(first)) = (guesser, context, firsts.get(entry)) {
            guesser.hear(id, place, tokens, context, first + skip);
        }
    }

    /// The next token after a row of the last step.
    pub(super) fn sample(&mut self, chooser: &mut Chooser, row: i32) -> Result<Token, ChooseError> {
        let context = self.context.as_mut().ok_or_else(|| ChooseError::Engine("no context".to_owned()))?;
        chooser.choose(context, row)
    }

    /// Log-probabilities after a row of the last step.
    pub(super) fn logprobs(&mut self, row: i32, token: Token, top: u32) -> Result<LogprobRow, String> {
        self.context.as_mut().ok_or("no context")?.logprobs(row, token, top)
    }

    /// A sequence has ended with these tokens in the KV cache; they stay for the next prompt that begins the same.
    pub(super) fn end(&mut self, id: SeqId, key: CacheKey, tokens: Vec<Token>) {
        if self.kept == 0 || tokens.is_empty() {
            self.release(id);
            return;
        }
        self.pool.keep(id, key, tokens);
        while self.pool.kept().count() > self.kept as usize && self.drop_kept(None) {}
    }

    /// Frees a sequence's id and cells.
    pub(super) fn release(&mut self, id: SeqId) {
        if let Some(context) = &mut self.context {
            context.remove(id, 0);
        }
        if let Some(guesser) = &mut self.guesser {
            guesser.release(id);
        }
        self.set_rolled_back(id, false);
        self.pool.release(id);
    }

    /// Frees the kept sequence that was of no use for longest; false when there is none. Its state goes to host memory.
    pub(super) fn drop_kept(&mut self, except: Option<SeqId>) -> bool {
        let Some(id) = self.pool.oldest_kept(except) else { return false };
        let kept = self.pool.kept().find(|&(other, ..)| other == id);
        if let Some((key, tokens)) = kept.map(|(_, key, tokens)| (key.clone(), tokens.to_vec())) {
            self.store(id, &key, tokens);
        }
        self.release(id);
        true
    }

    /// Moves kept sequences to host memory until no more than `cells` cells are in use, if that is enough.
    pub(super) fn leave_only(&mut self, cells: u32) {
        while self.pool.used() > cells && self.drop_kept(None) {}
    }

    /// Moves kept sequences to host memory until those that stay pay for what they cost the running ones.
    pub(super) fn trim_kept(&mut self) {
        // In a split cache nobody reads the cells of others.
        let running = self.pool.used_by_running();
        if !self.params.unified || running == 0 {
            return;
        }
        let bytes = total_context_bytes(&self.memory()) / u64::from(self.cells().max(1));
        let weights = self.model.size_bytes();
        while !host::pays(self.pool.used().saturating_sub(self.pool.used_by_running()), running, bytes, weights) {
            let Some(id) = self.pool.oldest_kept(None) else { return };
            let size = self.context.as_mut().map_or(0, |context| context.sequence_state_size(id));
            // What the host cannot take is worth more here than gone.
            if !self.host.accepts(size as u64) || !self.drop_kept(None) {
                return;
            }
        }
    }

    /// Copies the state of a sequence with these tokens to host memory, unless it is there or there is no room.
    pub(super) fn snapshot(&mut self, id: SeqId, key: &CacheKey, tokens: &[Token]) {
        self.store(id, key, tokens.to_vec());
    }

    fn store(&mut self, id: SeqId, key: &CacheKey, mut tokens: Vec<Token>) {
        if !self.capability.needs_snapshots() && self.pool.is_kept(id) {
            // Cells that lie far apart are copied one by one; their tokens are read again instead.
            let solid = media::border(&tokens, (self.pool.solid(id) as usize).min(tokens.len()));
            let end = positions(&tokens, solid);
            if solid < tokens.len() && self.context.as_mut().is_some_and(|context| context.remove(id, end)) {
                tokens.truncate(solid);
            }
        }
        if tokens.len() < host::SHORTEST || self.host.covers(key, &tokens) {
            return;
        }
        let cut_from = self.cut_from(id, &tokens);
        if let Some(state) = self.copy(id) {
            self.host.insert(key.clone(), tokens, cut_from, state);
        }
    }

    /// The state of a sequence as bytes; `None` where host memory has no room for it.
    fn copy(&mut self, id: SeqId) -> Option<Vec<u8>> {
        let context = self.context.as_mut()?;
        let size = context.sequence_state_size(id) as u64;
        let room = available_bytes("CPU").is_some_and(|available| size <= available / 4);
        if room && self.host.accepts(size) { context.sequence_state(id) } else { None }
    }

    /// Takes the cells of a running sequence away; what is returned brings them back, see [`Self::resume`].
    pub(super) fn suspend(&mut self, id: SeqId, tokens: usize) -> Option<Saved> {
        let state = if tokens >= host::SHORTEST { self.copy(id) } else { None };
        let state = state.filter(|state| self.host.reserve(state.len() as u64));
        self.release(id);
        state.map(|state| Saved { state, tokens })
    }

    /// Gives a suspended sequence cells again; returns its id and its tokens there. `None`: its tokens have to be read
    /// again.
    pub(super) fn resume(&mut self, saved: Saved) -> Option<(SeqId, usize)> {
        let Saved { state, tokens } = saved;
        self.host.give_back(state.len() as u64);
        let cells = u32::try_from(tokens).ok()?;
        self.free_cells(cells, None);
        let id = self.take_id(None)?;
        if self.context.as_mut()?.set_sequence_state(id, &state) {
            self.pool.append(id, cells);
            return Some((id, tokens));
        }
        self.release(id);
        None
    }

    /// A suspended sequence does not come back.
    pub(super) fn forget(&mut self, saved: &Saved) {
        self.host.give_back(saved.state.len() as u64);
    }
}

/// Positions of the first `length` tokens, at whose end no picture is cut.
fn positions(tokens: &[Token], length: usize) -> u32 {
    let first = tokens.get(..length).unwrap_or(tokens);
    u32::try_from(media::positions(first)).unwrap_or(u32::MAX)
}
