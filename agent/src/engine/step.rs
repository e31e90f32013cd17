//! Does what was decided to the llama.cpp context. Nothing else changes it.

use super::capability::Capability;
use super::ffi::{Batch, Context, ContextParams, DecodeError, LogprobRow, Model, Sampler, available_bytes};
use super::load::{Plan, total_context_bytes};
use super::pool::{Pool, SeqId};
use super::prefix::{self, Reuse};
use super::request::Token;
use crate::runner::protocol::MemoryUse;

/// The context and the books that are kept of it.
pub(super) struct Executor {
    model: Model,
    /// `None` only after a failure that ends the engine.
    context: Option<Context>,
    params: ContextParams,
    capability: Capability,
    pool: Pool,
    kept: u32,
    batch: Batch,
}

/// What became of a change of size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Growth {
    /// Another size; all sequences are still there.
    Moved,
    /// Another size; every sequence has to be read again.
    Emptied,
    /// As before.
    Refused(String),
    /// As before in size, but every sequence has to be read again.
    RefusedEmptied(String),
    /// There is no context any more.
    Lost(String),
}

impl Executor {
    pub(super) fn new(model: Model, context: Context, params: ContextParams, plan: &Plan) -> Self {
        Self {
            pool: Pool::new(params.sequences),
            // A larger context may allow a larger batch, up to what was asked for.
            batch: Batch::new(params.batch),
            model,
            context: Some(context),
            params,
            capability: plan.capability,
            kept: plan.kept,
        }
    }

    /// Cells of the KV cache.
    pub(super) fn cells(&self) -> u32 {
        self.context.as_ref().map_or(0, Context::cells)
    }

    /// Tokens in one step at most.
    pub(super) fn batch_tokens(&self) -> u32 {
        self.context.as_ref().map_or(0, Context::batch)
    }

    /// Who holds which cells.
    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Bytes per device.
    pub(super) fn memory(&self) -> Vec<MemoryUse> {
        self.context.as_ref().map(Context::memory).unwrap_or_default()
    }

    /// Tokens of a prompt that [`Self::begin`] would find in the KV cache.
    pub(super) fn reusable<'a>(&self, prompt: &[Token], running: impl Iterator<Item = (SeqId, &'a [Token])>) -> Reuse {
        if !self.capability.reuse {
            return Reuse::Nothing;
        }
        prefix::choose(prompt, self.pool.kept(), running, self.pool.has_free())
    }

    /// Gives a sequence an id; returns it and how many of its tokens are in the KV cache already. `None`: all ids run.
    pub(super) fn begin(&mut self, reuse: Reuse) -> Option<(SeqId, usize)> {
        match reuse {
            Reuse::Take { id, length } => {
                let cells = u32::try_from(length).ok()?;
                if self.context.as_mut()?.remove(id, cells) {
                    self.pool.cut(id, cells);
                    self.pool.revive(id);
                    return Some((id, length));
                }
                self.release(id);
            }
            Reuse::Share { id: from, length } => {
                let cells = u32::try_from(length).ok()?;
                if let Some(to) = self.pool.take() {
                    if self.context.as_mut()?.share(from, to, cells) {
                        self.pool.share(from, to, cells);
                        self.pool.touch(from);
                        return Some((to, length));
                    }
                    self.release(to);
                }
            }
            Reuse::Nothing => {}
        }
        if !self.pool.has_free() {
            self.drop_oldest_kept();
        }
        self.pool.take().map(|id| (id, 0))
    }

    /// Computes tokens: for each entry the sequence, its tokens, the position of the first one, and whether the last
    /// one's logits are needed. `rows` gets the row of those logits for each entry.
    pub(super) fn decode<'a>(
        &mut self,
        work: impl Iterator<Item = (SeqId, &'a [Token], usize, bool)> + Clone,
        rows: &mut Vec<i32>,
    ) -> Result<(), DecodeError> {
        self.batch.clear();
        rows.clear();
        for (id, tokens, start, output) in work.clone() {
            let mut row = None;
            for (index, &token) in tokens.iter().enumerate() {
                let position = i32::try_from(start + index).unwrap_or(i32::MAX);
                row = self.batch.add(token, position, id, output && index + 1 == tokens.len());
            }
            rows.push(row.ok_or_else(|| DecodeError::Invalid("the step is larger than the batch".to_owned()))?);
        }
        let context = self.context.as_mut().ok_or_else(|| DecodeError::Failed("no context".to_owned()))?;
        context.decode(&mut self.batch)?;
        for (id, tokens, _, _) in work {
            self.pool.append(id, u32::try_from(tokens.len()).unwrap_or(u32::MAX));
        }
        Ok(())
    }

    /// The next token after a row of the last step.
    pub(super) fn sample(&mut self, sampler: &mut Sampler, row: i32) -> Result<Token, String> {
        let token = self.context.as_mut().ok_or("no context")?.pick(sampler, row, None)?;
        let token = token.ok_or("no token may come")?;
        sampler.accept(token)?;
        Ok(token)
    }

    /// Log-probabilities after a row of the last step.
    pub(super) fn logprobs(&mut self, row: i32, token: Token, top: u32) -> Result<LogprobRow, String> {
        self.context.as_mut().ok_or("no context")?.logprobs(row, token, top)
    }

    /// A sequence has ended with these tokens in the KV cache; they stay for the next prompt that begins the same.
    pub(super) fn end(&mut self, id: SeqId, tokens: Vec<Token>) {
        if self.kept == 0 || tokens.is_empty() {
            self.release(id);
            return;
        }
        self.pool.keep(id, tokens);
        while self.pool.kept().count() > self.kept as usize {
            self.drop_oldest_kept();
        }
    }

    /// Frees a sequence's id and cells.
    pub(super) fn release(&mut self, id: SeqId) {
        if let Some(context) = &mut self.context {
            context.remove(id, 0);
        }
        self.pool.release(id);
    }

    /// Frees the kept sequence that was of no use for longest; false when there is none.
    pub(super) fn drop_oldest_kept(&mut self) -> bool {
        let Some(id) = self.pool.oldest_kept() else { return false };
        self.release(id);
        true
    }

    /// Gives the context `cells` cells: a new one on the same weights, to which the state moves.
    pub(super) fn resize(&mut self, cells: u32) -> Growth {
        let Some(mut old) = self.context.take() else { return Growth::Lost("no context".to_owned()) };
        if let Err(reason) = has_room(&old, cells) {
            self.context = Some(old);
            return Growth::Refused(reason);
        }
        let from = old.cells();
        let occupied = self.pool.used() > 0;
        let state = if occupied && self.capability.state_survives(from, cells) { old.state() } else { None };
        drop(old);

        let params = ContextParams { cells, ..self.params.clone() };
        match Context::new(&self.model, &params) {
            Ok(context) => {
                self.params = params;
                if self.install(context, state.as_deref()) { Growth::Moved } else { Growth::Emptied }
            }
            Err(reason) => match Context::new(&self.model, &self.params) {
                Ok(context) => {
                    if self.install(context, state.as_deref()) {
                        Growth::Refused(reason)
                    } else {
                        Growth::RefusedEmptied(reason)
                    }
                }
                Err(error) => Growth::Lost(error),
            },
        }
    }

    /// True when all sequences have moved.
    fn install(&mut self, mut context: Context, state: Option<&[u8]>) -> bool {
        let moved = self.pool.used() == 0 || state.is_some_and(|state| context.set_state(state));
        if !moved {
            self.pool.clear();
        }
        self.context = Some(context);
        moved
    }
}

/// On a CPU an allocation does not fail; the kernel ends the process when the memory is touched. So ask before.
fn has_room(context: &Context, cells: u32) -> Result<(), String> {
    let from = u64::from(context.cells().max(1));
    let more = u64::from(cells).saturating_sub(from);
    let memory = context.memory();
    // Host memory also holds the state while it moves.
    let state = total_context_bytes(&memory);
    for device in &memory {
        let growth = device.context_bytes / from * more;
        let needed = if device.device == "CPU" { growth + state } else { growth };
        let Some(available) = available_bytes(&device.device) else { continue };
        if growth > 0 && needed > available / 10 * 9 {
            return Err(format!(
                "a context of {cells} cells needs {needed} bytes more on {}, where {available} are free",
                device.device
            ));
        }
    }
    Ok(())
}
