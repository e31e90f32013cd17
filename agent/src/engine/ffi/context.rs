//! A KV cache and what computes on it.

use std::ptr::{self, NonNull};

use llama_cpp_sys_2::{self as sys, llama_context, llama_context_params};

use super::memory::{self, Attention, Copies};
use super::params::{check_sizes, raw_params};
use super::{Adapter, Batch, ContextParams, Model, Part, Sampler, log, shim};
use crate::engine::request::{MAX_TOP_LOGPROBS, Token};
use crate::runner::protocol::MemoryUse;

/// Why a decode did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::engine) enum DecodeError {
    /// The KV cache has no place for the batch; nothing has changed.
    NoSlot,
    /// The batch is not valid; nothing has changed.
    Invalid(String),
    /// The device failed; the context cannot be trusted any more.
    Failed(String),
}

/// Embeddings that stand for tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct MediaBatch<'a> {
    /// One after the other.
    pub(in crate::engine) embeddings: &'a [f32],
    /// Of each, section by section.
    pub(in crate::engine) positions: &'a [i32],
    /// The sequence.
    pub(in crate::engine) sequence: i32,
    /// Each sees those before it; else each sees all.
    pub(in crate::engine) causal: bool,
    /// The last one's logits are needed.
    pub(in crate::engine) output: bool,
}

/// Log-probabilities of one row.
#[derive(Clone, Debug, Default)]
pub(in crate::engine) struct LogprobRow {
    /// Of the token in question.
    pub(in crate::engine) chosen: f32,
    /// The most probable tokens, best first.
    pub(in crate::engine) top: Vec<(Token, f32)>,
}

/// A llama.cpp context.
pub(in crate::engine) struct Context {
    pub(super) raw: NonNull<llama_context>,
    memory: NonNull<sys::llama_memory_i>,
    /// Which rows of the last batch have logits.
    pub(super) output_rows: Vec<i8>,
    sequences: u32,
    outputs: u32,
    unified: bool,
    /// Attention is computed as products of whole matrices.
    plain_attention: bool,
    /// Keys and values are both quantised.
    quantised: bool,
    pub(super) part: Part,
    /// The weights; kept alive for as long as the context.
    pub(super) model: Model,
}

// SAFETY: llama.cpp ties a context to no thread; it is used by one at a time, because every use that changes it takes
// `&mut`.
unsafe impl Send for Context {}

impl Context {
    /// Allocates the KV cache and the compute buffers. The error is llama.cpp's own words.
    pub(in crate::engine) fn new(model: &Model, params: &ContextParams) -> Result<Self, String> {
        check_sizes(params)?;
        let raw = create(model, &raw_params(params))?;
        // SAFETY: the context is alive.
        let Some(memory) = NonNull::new(unsafe { sys::llama_get_memory(raw.as_ptr()) }) else {
            // SAFETY: the context is ours and is not used any more.
            unsafe { shim::altiplano_context_free(raw.as_ptr()) };
            return Err("the model keeps no state from token to token".to_owned());
        };
        let ContextParams { sequences, outputs, unified, part, .. } = *params;
        // Not what was asked for: some models, and some devices, have none.
        // SAFETY: the context is alive.
        let plain_attention = unsafe { !shim::altiplano_flash_attention(raw.as_ptr()) };
        let context = Self {
            raw,
            memory,
            output_rows: Vec::new(),
            sequences,
            outputs,
            unified,
            plain_attention,
            quantised: params.is_quantised(),
            part,
            model: model.clone(),
        };
        context.give_hidden_states();
        Ok(context)
    }

    /// Cells of the KV cache.
    pub(in crate::engine) fn cells(&self) -> u32 {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_ctx(self.raw.as_ptr()) }
    }

    /// Cells that one sequence can have.
    pub(in crate::engine) fn sequence_cells(&self) -> u32 {
        if self.unified { self.cells() } else { self.cells() / self.sequences }
    }

    /// Whether attention is computed as products of whole matrices, not by flash attention.
    pub(in crate::engine) fn plain_attention(&self) -> bool {
        self.plain_attention
    }

    /// Sequences that have cells of their own; 1 where all share them.
    pub(in crate::engine) fn lanes(&self) -> u32 {
        if self.unified { 1 } else { self.sequences }
    }

    /// Rows with logits in one call at most.
    pub(super) fn outputs(&self) -> u32 {
        self.outputs
    }

    /// Tokens in one call at most.
    pub(in crate::engine) fn batch(&self) -> u32 {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_batch(self.raw.as_ptr()) }
    }

    /// Tokens computed at once at most.
    pub(in crate::engine) fn micro_batch(&self) -> u32 {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_ubatch(self.raw.as_ptr()) }
    }

    /// Has the next batches computed with an adapter of the context's model at some strength, or with none. A change
    /// makes llama.cpp plan its memory anew.
    pub(in crate::engine) fn adapt(&mut self, adapter: Option<(&Adapter, f32)>) {
        let (mut raw, mut scale) = match adapter {
            Some((adapter, scale)) => (adapter.raw().as_ptr(), scale),
            None => (std::ptr::null_mut(), 0.0),
        };
        let count = usize::from(adapter.is_some());
        // SAFETY: context and adapter are alive, the adapter as long as the model, and both arrays have `count` entries
        // or more.
        unsafe { sys::llama_set_adapters_lora(self.raw.as_ptr(), &raw mut raw, count, &raw mut scale) };
    }

    /// Computes a batch and waits for it.
    pub(in crate::engine) fn decode(&mut self, batch: &mut Batch) -> Result<(), DecodeError> {
        self.check(batch).map_err(DecodeError::Invalid)?;
        self.output_rows.clear();
        // SAFETY: the context is alive and the batch was checked.
        unsafe { decode(self.raw, &batch.raw())? };
        self.output_rows.extend_from_slice(batch.outputs());
        Ok(())
    }

    /// Computes the embeddings of a picture as tokens of a sequence, and waits for it.
    pub(in crate::engine) fn decode_media(&mut self, media: &MediaBatch<'_>) -> Result<(), DecodeError> {
        let MediaBatch { embeddings, positions, sequence, causal, output } = *media;
        // SAFETY: the model is alive.
        let width = usize::try_from(unsafe { sys::llama_model_n_embd_inp(self.model.raw()) }).unwrap_or(0).max(1);
        let count = embeddings.len() / width;
        let most = if causal { self.batch() } else { self.micro_batch() };
        if count == 0 || count * width != embeddings.len() || count > most as usize {
            return Err(DecodeError::Invalid(format!("a picture of {count} tokens, where 1 to {most} fit")));
        }
        if positions.len() != count * self.model.position_sections() || !self.has_sequence(sequence) {
            return Err(DecodeError::Invalid("positions or a sequence that there are not".to_owned()));
        }
        let mut sequence = sequence;
        let mut sequences = vec![&raw mut sequence; count];
        let mut counts = vec![1; count];
        let mut outputs = vec![0_i8; count];
        if let Some(last) = outputs.last_mut() {
            *last = i8::from(output);
        }
        let batch = sys::llama_batch {
            n_tokens: i32::try_from(count).unwrap_or(i32::MAX),
            token: ptr::null_mut(),
            embd: embeddings.as_ptr().cast_mut(),
            pos: positions.as_ptr().cast_mut(),
            n_seq_id: counts.as_mut_ptr(),
            seq_id: sequences.as_mut_ptr(),
            logits: outputs.as_mut_ptr(),
        };
        self.output_rows.clear();
        let mut error = shim::Error::new();
        let (result, errors) = log::with_errors(|| {
            // SAFETY: the context is alive, the batch was checked, its arrays live through the call, and llama.cpp only
            // reads them.
            unsafe { shim::altiplano_decode_media(self.raw.as_ptr(), &raw const batch, causal, &raw mut error) }
        });
        decoded(result, &error, errors)?;
        self.output_rows.extend_from_slice(&outputs);
        Ok(())
    }

    /// llama.cpp's own handle, for what tests do past this type; see [`Self::last_row`].
    #[cfg(test)]
    pub(super) fn raw(&mut self) -> *mut llama_context {
        self.raw.as_ptr()
    }

    /// Believes that the last batch, which was not ours, had one output, that of its last token.
    #[cfg(test)]
    pub(super) fn last_row(&mut self) -> i32 {
        self.output_rows = vec![1];
        -1
    }

    /// What llama.cpp would answer with an abort.
    pub(super) fn check(&self, batch: &Batch) -> Result<(), String> {
        let outputs = batch.outputs().iter().filter(|&&output| output != 0).count();
        if batch.tokens().is_empty() || batch.tokens().len() > self.batch() as usize {
            return Err(format!("a batch of {} tokens, where 1 to {} fit", batch.tokens().len(), self.batch()));
        }
        if outputs > self.outputs as usize {
            return Err(format!("{outputs} outputs, where {} fit", self.outputs));
        }
        if let Some(id) = batch.sequences().iter().find(|&&id| !self.has_sequence(id)) {
            return Err(format!("sequence {id} of {}", self.sequences));
        }
        if let Some(token) = batch.tokens().iter().find(|&&token| !self.model.has(token)) {
            return Err(format!("token {token} is not in the vocabulary"));
        }
        if self.model.is_dry_run() {
            return Err("the weights were not read".to_owned());
        }
        Ok(())
    }

    pub(super) fn has_sequence(&self, id: i32) -> bool {
        u32::try_from(id).is_ok_and(|id| id < self.sequences)
    }

    fn has_output(&self, row: i32) -> bool {
        #[cfg(test)]
        if row == -1 && self.output_rows == [1] {
            return true;
        }
        usize::try_from(row).ok().and_then(|row| self.output_rows.get(row)).is_some_and(|&output| output != 0)
    }

    /// The next token after a row of the last batch, among those whose bits are set in `allowed` (`None`: all). The
    /// sampler does not yet remember it. `Ok(None)`: no token may come.
    pub(in crate::engine) fn pick(
        &mut self,
        sampler: &mut Sampler,
        row: i32,
        allowed: Option<&[u32]>,
    ) -> Result<Option<Token>, String> {
        if !self.has_output(row) {
            return Err(format!("row {row} has no logits"));
        }
        if allowed.is_some_and(|bits| bits.len() * 32 < self.model.n_vocab() as usize) {
            return Err("a mask that is shorter than the vocabulary".to_owned());
        }
        let allowed = allowed.map_or(ptr::null(), <[u32]>::as_ptr);
        let mut error = shim::Error::new();
        // SAFETY: context and chain are alive, the row has logits and the mask a bit for each token.
        let token = unsafe { shim::altiplano_pick(sampler.chain(), self.raw.as_ptr(), row, allowed, &raw mut error) };
        match token {
            shim::NO_TOKEN => Ok(None),
            token if self.model.has(token) => Ok(Some(token)),
            _ => Err(error.text()),
        }
    }

    /// Log-probabilities of `token` and of the `top` most probable ones after a row of the last batch.
    pub(in crate::engine) fn logprobs(&mut self, row: i32, token: Token, top: u32) -> Result<LogprobRow, String> {
        if !self.has_output(row) {
            return Err(format!("row {row} has no logits"));
        }
        let mut out = [shim::Logprob::default(); 1 + MAX_TOP_LOGPROBS as usize];
        let top = i32::try_from(top.min(MAX_TOP_LOGPROBS)).map_err(|error| error.to_string())?;
        let mut error = shim::Error::new();
        // SAFETY: the context is alive, the row has logits, and `out` has room for `top` + 1 entries.
        let count =
            unsafe { shim::altiplano_logprobs(self.raw.as_ptr(), row, token, top, out.as_mut_ptr(), &raw mut error) };
        let Some(found) = usize::try_from(count).ok().and_then(|count| out.get(1..count)) else {
            return Err(error.text());
        };
        Ok(LogprobRow { chosen: out[0].logprob, top: found.iter().map(|entry| (entry.token, entry.logprob)).collect() })
    }

    /// Removes the positions from `from` on (0: all) of a sequence; false where the model cannot cut there.
    pub(in crate::engine) fn remove(&mut self, sequence: i32, from: u32) -> bool {
        let Ok(from) = i32::try_from(from) else { return true };
        if !self.has_sequence(sequence) {
            return false;
        }
        // SAFETY: the memory lives with the context; the sequence id was checked.
        unsafe { sys::llama_memory_seq_rm(self.memory.as_ptr(), sequence, from, -1) }
    }

    /// Makes `to`, which is empty, begin with the first `length` positions of `from`: the same cells in a unified pool,
    /// else a copy of them. On false `to` is empty.
    pub(in crate::engine) fn share(&mut self, from: i32, to: i32, length: u32) -> bool {
        let Ok(end) = i32::try_from(length) else { return false };
        if !self.has_sequence(from) || !self.has_sequence(to) || from == to {
            return false;
        }
        if self.unified {
            // SAFETY: the memory lives with the context, the ids were checked, and the context is unified.
            unsafe { sys::llama_memory_seq_cp(self.memory.as_ptr(), from, to, 0, end) };
            return true;
        }
        // llama.cpp's own copy takes the whole stream, used or not.
        let copied = self.sequence_state(from).is_some_and(|state| self.set_sequence_state(to, &state));
        if copied && self.remove(to, length) {
            return true;
        }
        self.remove(to, 0);
        false
    }

    /// The lowest position of a sequence that is in the cache; 0 when there is none.
    pub(in crate::engine) fn oldest(&self, sequence: i32) -> u32 {
        if !self.has_sequence(sequence) {
            return 0;
        }
        // SAFETY: the memory lives with the context; the sequence id was checked.
        u32::try_from(unsafe { sys::llama_memory_seq_pos_min(self.memory.as_ptr(), sequence) }).unwrap_or(0)
    }

    /// Forgets all sequences.
    pub(in crate::engine) fn clear(&mut self) {
        // SAFETY: the memory lives with the context.
        unsafe { sys::llama_memory_clear(self.memory.as_ptr(), false) };
    }

    /// Bytes per device that a context of another size takes more or less of; see [`Self::memory`].
    pub(in crate::engine) fn memory_of_cells(&self) -> Vec<MemoryUse> {
        memory::without_weights(self.breakdown())
    }

    /// What [`Self::memory_of_cells`] of a context of other cells would be, by llama.cpp's own reckoning: nothing is taken.
    /// `model` is the one of which the context would be made.
    pub(in crate::engine) fn size(model: &Model, params: &ContextParams) -> Result<Vec<MemoryUse>, String> {
        check_sizes(params)?;
        let memory::Size { mut uses, cells, micro_batch, plain_attention } = memory::size(model, &raw_params(params))?;
        let sequence_cells = if params.unified { cells } else { cells / params.sequences.max(1) };
        let attention = Attention {
            plain: plain_attention,
            quantised: params.is_quantised(),
            cells,
            sequence_cells,
            tokens: micro_batch,
        };
        add_cells(&mut uses, cells, Copies::new(model, attention));
        Ok(uses)
    }

    /// llama.cpp's breakdown, and what it leaves out for cells.
    fn breakdown(&self) -> Vec<MemoryUse> {
        // SAFETY: the context is alive.
        let mut uses = unsafe { memory::breakdown(self.raw) };
        let attention = Attention {
            plain: self.plain_attention,
            quantised: self.quantised,
            cells: self.cells(),
            sequence_cells: self.sequence_cells(),
            tokens: self.micro_batch(),
        };
        add_cells(&mut uses, self.cells(), Copies::new(&self.model, attention));
        uses
    }

    /// Bytes per device, host memory as "CPU", in llama.cpp's order of devices. What llama.cpp's breakdown leaves out,
    /// copies of attention scores and on the host the logits, the cells' metadata and the process itself, stands in
    /// `other_bytes`.
    pub(in crate::engine) fn memory(&self) -> Vec<MemoryUse> {
        let logits = u64::from(self.model.n_vocab()) * 4 * u64::from(self.outputs);
        let outputs = logits + self.hidden_bytes();
        if self.part == Part::Head {
            // The weights are the model's.
            let mut uses = self.memory_of_cells();
            uses[0].other_bytes += outputs;
            return uses;
        }
        let mut uses = self.breakdown();
        uses[0].other_bytes += outputs;
        // llama.cpp's breakdown knows no adapters and no projector; adapters lie where the weights do.
        if let Some(device) = uses.iter_mut().max_by_key(|device| device.weights_bytes) {
            device.weights_bytes += self.model.adapter_bytes();
        }
        for projector in self.model.projector_memory() {
            match uses.iter_mut().find(|device| device.device == projector.device) {
                Some(device) => device.weights_bytes += projector.weights_bytes,
                None => uses.push(projector.clone()),
            }
        }
        uses[0].other_bytes += self.model.process_bytes(&uses[0]);
        uses
    }
}

/// Adds what no breakdown knows: cells' metadata, and copies where attention is computed, which is where the cells are.
fn add_cells(uses: &mut [MemoryUse], cells: u32, copies: Copies) {
    for device in uses.iter_mut() {
        if device.device == "CPU" {
            device.other_bytes += memory::cells_metadata(cells);
        }
        if device.context_bytes > 0 {
            device.other_bytes = device.other_bytes.saturating_add(copies.on(&device.device));
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is ours; the model outlives it.
        unsafe { shim::altiplano_context_free(self.raw.as_ptr()) };
    }
}

/// A context of checked sizes, whose owner frees it and keeps the model alive.
pub(super) fn create(model: &Model, raw_params: &llama_context_params) -> Result<NonNull<llama_context>, String> {
    let mut error = shim::Error::new();
    let (raw, errors) = log::with_errors(|| {
        // SAFETY: the model is alive and is kept by the context.
        unsafe { shim::altiplano_context_new(model.raw(), raw_params, &raw mut error) }
    });
    NonNull::new(raw).ok_or_else(|| error.text_or(errors))
}

/// Computes a batch and waits for it.
///
/// # Safety
/// The context is alive, and the batch holds nothing that llama.cpp would answer with an abort.
pub(super) unsafe fn decode(context: NonNull<llama_context>, batch: &sys::llama_batch) -> Result<(), DecodeError> {
    let mut error = shim::Error::new();
    let (result, errors) = log::with_errors(|| {
        // SAFETY: as the caller says; the batch lives through the call.
        unsafe { shim::altiplano_decode(context.as_ptr(), batch, &raw mut error) }
    });
    decoded(result, &error, errors)
}

pub(super) fn decoded(result: i32, error: &shim::Error, errors: String) -> Result<(), DecodeError> {
    match result {
        0 => Ok(()),
        1 => Err(DecodeError::NoSlot),
        -1 => Err(DecodeError::Invalid(errors)),
        shim::EXCEPTION => Err(DecodeError::Failed(error.text())),
        code => Err(DecodeError::Failed(format!("code {code}: {errors}"))),
    }
}
