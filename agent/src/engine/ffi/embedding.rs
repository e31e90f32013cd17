//! A context that makes vectors of texts instead of text of tokens.

use std::ptr::NonNull;

use llama_cpp_sys_2::{self as sys, llama_context};

use super::memory::{self, Attention, Copies};
use super::params::{ContextParams, check_sizes, raw_params};
use super::{Batch, DecodeError, Model, context, shim};
use crate::engine::request::Token;
use crate::runner::protocol::MemoryUse;

/// How a text's vector is made of its tokens, in llama.cpp's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Pooling {
    /// The mean of all tokens.
    Mean,
    /// The first token.
    Cls,
    /// The last token.
    Last,
    /// A score by a classification head.
    Rank,
}

impl Pooling {
    /// Of llama.cpp's number, as files have it.
    pub(in crate::engine) fn from_number(number: &str) -> Option<Self> {
        match number {
            "1" => Some(Self::Mean),
            "2" => Some(Self::Cls),
            "3" => Some(Self::Last),
            "4" => Some(Self::Rank),
            _ => None,
        }
    }

    fn raw(self) -> sys::llama_pooling_type {
        match self {
            Self::Mean => sys::LLAMA_POOLING_TYPE_MEAN,
            Self::Cls => sys::LLAMA_POOLING_TYPE_CLS,
            Self::Last => sys::LLAMA_POOLING_TYPE_LAST,
            Self::Rank => sys::LLAMA_POOLING_TYPE_RANK,
        }
    }
}

/// A llama.cpp context for embeddings. It remembers nothing from one call to the next.
pub(in crate::engine) struct EmbeddingContext {
    raw: NonNull<llama_context>,
    /// Encoders have none.
    memory: Option<NonNull<sys::llama_memory_i>>,
    /// Only the last token's state is needed, so only its output is computed: for a causal model that saves the output
    /// layer for all others, which llama.cpp would else compute and keep.
    last_only: bool,
    /// Floats of one text.
    width: usize,
    sequences: u32,
    capacity: u32,
    batch: Batch,
    /// Attention is computed as products of whole matrices.
    plain_attention: bool,
    model: Model,
}

// SAFETY: llama.cpp ties a context to no thread; it is used by one at a time, because every use that changes it takes
// `&mut`.
unsafe impl Send for EmbeddingContext {}

impl EmbeddingContext {
    /// Allocates the compute buffers, and the KV cache of models that have one. `params.batch` tokens fit into a call,
    /// `params.micro_batch` are usual. The error is llama.cpp's own words.
    pub(in crate::engine) fn new(model: &Model, params: &ContextParams, pooling: Pooling) -> Result<Self, String> {
        let causal = model.is_causal() && matches!(pooling, Pooling::Last | Pooling::Rank);
        let made = Self::create(model, params, pooling, causal)?;
        if causal && made.memory.is_none() {
            // An encoder that pools its last token: all tokens go in one call.
            drop(made);
            return Self::create(model, params, pooling, false);
        }
        Ok(made)
    }

    /// llama.cpp's parameters of a context.
    fn raw_params(
        params: &ContextParams,
        pooling: Pooling,
        last_only: bool,
    ) -> Result<sys::llama_context_params, String> {
        check_sizes(params)?;
        let mut raw_params = raw_params(params);
        raw_params.embeddings = true;
        raw_params.pooling_type = pooling.raw();
        // Nothing stays from call to call, so a window as large as the batch costs little and never lacks a cell.
        raw_params.swa_full = true;
        if !last_only {
            // llama.cpp asserts that a non-causal batch fits a micro-batch, takes the mean of one micro-batch only,
            // and makes an output of every token. It plans with a multiple of the sequences, and aborts where that is more
            // than the outputs (`graph_reserve`).
            let planned = params.batch.next_multiple_of(params.sequences.max(1));
            raw_params.n_ctx = raw_params.n_ctx.max(planned);
            raw_params.n_batch = planned;
            raw_params.n_ubatch = planned;
            raw_params.n_outputs_max = planned;
        }
        Ok(raw_params)
    }

    fn create(model: &Model, params: &ContextParams, pooling: Pooling, last_only: bool) -> Result<Self, String> {
        let raw = context::create(model, &Self::raw_params(params, pooling, last_only)?)?;
        // SAFETY: the context is alive.
        let memory = NonNull::new(unsafe { sys::llama_get_memory(raw.as_ptr()) });
        // SAFETY: the model is alive.
        let width = unsafe {
            match pooling {
                Pooling::Rank => i64::from(sys::llama_model_n_cls_out(model.raw())),
                Pooling::Mean | Pooling::Cls | Pooling::Last => i64::from(sys::llama_model_n_embd_out(model.raw())),
            }
        };
        // SAFETY: the context is alive.
        let (most, plain_attention) =
            unsafe { (sys::llama_n_batch(raw.as_ptr()), !shim::altiplano_flash_attention(raw.as_ptr())) };
        Ok(Self {
            raw,
            memory,
            last_only,
            width: usize::try_from(width).unwrap_or(0),
            sequences: params.sequences,
            capacity: params.batch.min(most),
            batch: Batch::new(params.batch),
            plain_attention,
            model: model.clone(),
        })
    }

    /// Tokens in one call.
    pub(in crate::engine) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// One vector for each text, as llama.cpp gives it (not normalised).
    pub(in crate::engine) fn embed(&mut self, texts: &[&[Token]]) -> Result<Vec<Vec<f32>>, DecodeError> {
        self.check(texts).map_err(DecodeError::Invalid)?;
        self.clear();
        let embedded = if self.last_only { self.embed_last(texts) } else { self.embed_all(texts) };
        let vectors = embedded.and_then(|()| self.vectors(texts.len()));
        self.clear();
        vectors
    }

    fn embed_all(&mut self, texts: &[&[Token]]) -> Result<(), DecodeError> {
        self.fill(texts, |_| true, true);
        self.decode()
    }

    fn embed_last(&mut self, texts: &[&[Token]]) -> Result<(), DecodeError> {
        self.fill(texts, |left| left > 0, false);
        if !self.batch.tokens().is_empty() {
            self.set_embeddings(false);
            let done = self.decode();
            self.set_embeddings(true);
            done?;
        }
        self.fill(texts, |left| left == 0, true);
        self.decode()
    }

    /// Puts the tokens into the batch of which `wanted` says so, given how many come after them in their text.
    fn fill(&mut self, texts: &[&[Token]], wanted: impl Fn(usize) -> bool, output: bool) {
        self.batch.clear();
        for (text, sequence) in texts.iter().zip(0..) {
            for ((index, &token), position) in text.iter().enumerate().zip(0..) {
                if wanted(text.len() - 1 - index) {
                    self.batch.add(token, position, sequence, output);
                }
            }
        }
    }

    fn decode(&mut self) -> Result<(), DecodeError> {
        let batch = self.batch.raw();
        // SAFETY: the context is alive and the texts were checked.
        unsafe { context::decode(self.raw, &batch) }
    }

    fn set_embeddings(&mut self, embeddings: bool) {
        // SAFETY: the context is alive.
        unsafe { sys::llama_set_embeddings(self.raw.as_ptr(), embeddings) };
    }

    fn vectors(&self, count: usize) -> Result<Vec<Vec<f32>>, DecodeError> {
        let failed = |text: usize| DecodeError::Failed(format!("llama.cpp has no vector for text {text}"));
        let one = |text: usize| {
            let sequence = i32::try_from(text).map_err(|_| failed(text))?;
            // SAFETY: the context is alive, and was waited for; llama.cpp answers null for a sequence it has not.
            let vector = unsafe { sys::llama_get_embeddings_seq(self.raw.as_ptr(), sequence) };
            if vector.is_null() {
                return Err(failed(text));
            }
            // SAFETY: a sequence's vector has the model's width, or that of its classification head.
            Ok(unsafe { std::slice::from_raw_parts(vector, self.width) }.to_vec())
        };
        (0..count).map(one).collect()
    }

    fn clear(&mut self) {
        if let Some(memory) = self.memory {
            // SAFETY: the memory lives with the context.
            unsafe { sys::llama_memory_clear(memory.as_ptr(), false) };
        }
    }

    /// What llama.cpp would answer with an abort.
    fn check(&self, texts: &[&[Token]]) -> Result<(), String> {
        let tokens: usize = texts.iter().map(|text| text.len()).sum();
        if texts.is_empty() || texts.len() > self.sequences as usize {
            return Err(format!("{} texts, where 1 to {} fit", texts.len(), self.sequences));
        }
        if texts.iter().any(|text| text.is_empty()) || tokens > self.capacity() as usize {
            return Err(format!("texts of {tokens} tokens, where 1 to {} fit and none may be empty", self.capacity()));
        }
        if let Some(token) = texts.iter().copied().flatten().find(|&&token| !self.model.has(token)) {
            return Err(format!("token {token} is not in the vocabulary"));
        }
        if self.model.is_dry_run() {
            return Err("the weights were not read".to_owned());
        }
        Ok(())
    }

    /// Bytes per device; see [`Context::memory`](super::Context::memory).
    pub(in crate::engine) fn memory(&self) -> Vec<MemoryUse> {
        let mut uses = self.breakdown();
        uses[0].other_bytes += self.model.process_bytes(&uses[0]);
        uses
    }

    /// Bytes per device that a context of another size takes more or less of.
    pub(in crate::engine) fn memory_of_cells(&self) -> Vec<MemoryUse> {
        memory::without_weights(self.breakdown())
    }

    /// What [`Self::memory_of_cells`] of a context of another size would be, by llama.cpp's own reckoning: nothing is taken.
    pub(in crate::engine) fn size(&self, params: &ContextParams, pooling: Pooling) -> Result<Vec<MemoryUse>, String> {
        let raw_params = Self::raw_params(params, pooling, self.last_only)?;
        let memory::Size { mut uses, micro_batch, plain_attention, .. } = memory::size(&self.model, &raw_params)?;
        self.add_uncounted(&mut uses, params.batch, micro_batch, plain_attention);
        Ok(uses)
    }

    /// llama.cpp's breakdown, and what it leaves out.
    fn breakdown(&self) -> Vec<MemoryUse> {
        // SAFETY: the context is alive.
        let (mut uses, micro_batch) = unsafe { (memory::breakdown(self.raw), sys::llama_n_ubatch(self.raw.as_ptr())) };
        self.add_uncounted(&mut uses, self.capacity, micro_batch, self.plain_attention);
        uses
    }

    /// Adds what no breakdown knows of a context for `tokens` tokens. On the host: outputs, because llama.cpp keeps room for
    /// logits also where the model has none, and cells' metadata. Where attention is computed: backends' copies.
    fn add_uncounted(&self, uses: &mut [MemoryUse], tokens: u32, micro_batch: u32, plain_attention: bool) {
        let attention = Attention {
            plain: plain_attention,
            // It has cells for one call alone.
            quantised: false,
            cells: tokens,
            sequence_cells: tokens,
            tokens: micro_batch.min(tokens),
        };
        let copies = Copies::new(&self.model, attention);
        for device in uses {
            if device.device == "CPU" {
                let outputs = if self.last_only { self.sequences } else { tokens };
                let floats = u64::from(self.model.n_vocab()) + self.width as u64;
                device.other_bytes += u64::from(outputs) * floats * 4;
                device.other_bytes += if self.memory.is_some() { memory::cells_metadata(tokens) } else { 0 };
            }
            // Who computes it holds the scores, in single precision.
            if plain_attention && device.compute_bytes / 2 >= copies.scores {
                device.other_bytes = device.other_bytes.saturating_add(copies.on(&device.device));
            }
        }
    }
}

impl Drop for EmbeddingContext {
    fn drop(&mut self) {
        // SAFETY: the context is ours; the model outlives it.
        unsafe { shim::altiplano_context_free(self.raw.as_ptr()) };
    }
}
