//! What a context is made of, in our words and in llama.cpp's.

use altiplano_crds::model_deployment::{CacheType, FlashAttention, RopeScaling, RopeSpec};
use llama_cpp_sys_2::{self as sys, llama_context_params};

/// What a context is made of.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::engine) struct ContextParams {
    /// Cells of the KV cache, for all sequences together.
    pub(in crate::engine) cells: u32,
    /// Tokens in one call at most.
    pub(in crate::engine) batch: u32,
    /// Tokens computed at once at most.
    pub(in crate::engine) micro_batch: u32,
    /// Sequence ids there are.
    pub(in crate::engine) sequences: u32,
    /// Rows with logits in one call at most; at least one for each sequence.
    pub(in crate::engine) outputs: u32,
    /// One pool of cells for all sequences; else each has a part of its own, of equal size.
    pub(in crate::engine) unified: bool,
    /// CPU threads.
    pub(in crate::engine) threads: u32,
    /// Whether the KV cache follows the layers to the devices.
    pub(in crate::engine) offload: bool,
    /// Flash attention.
    pub(in crate::engine) flash_attention: FlashAttention,
    /// Type of the keys.
    pub(in crate::engine) key_type: CacheType,
    /// Type of the values.
    pub(in crate::engine) value_type: CacheType,
    /// Stretching of the positions.
    pub(in crate::engine) rope: Option<RopeSpec>,
    /// Tokens of a step that can be taken away again from a state that is one for all tokens; takes as many copies of it.
    /// Where llama.cpp cannot do that, the context has 0 ([`Context::rollback`](super::Context::rollback)).
    pub(in crate::engine) rollback: u32,
    /// What the context computes.
    pub(in crate::engine) part: Part,
}

impl ContextParams {
    /// Keys and values are both quantised.
    pub(super) fn is_quantised(&self) -> bool {
        [self.key_type, self.value_type].into_iter().all(|kind| kind != CacheType::F16)
    }
}

/// A part of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::engine) enum Part {
    /// All but its head for guessing.
    #[default]
    Model,
    /// The same, which also gives the hidden states that the head needs.
    ModelForHead,
    /// The head that guesses tokens (MTP).
    Head,
}

/// What llama.cpp asserts about the sizes of a context.
pub(super) fn check_sizes(params: &ContextParams) -> Result<(), String> {
    if params.sequences == 0 || params.sequences > 256 {
        return Err(format!("{} sequences are not between 1 and 256", params.sequences));
    }
    if params.outputs < params.sequences || params.outputs > params.batch {
        return Err(format!(
            "{} outputs are not between {} sequences and a batch of {}",
            params.outputs, params.sequences, params.batch
        ));
    }
    if params.cells < params.sequences || params.micro_batch < params.sequences {
        // A batch must have room for a token of each sequence.
        return Err(format!(
            "{} cells or a batch of {} are too few for {} sequences",
            params.cells, params.micro_batch, params.sequences
        ));
    }
    if params.micro_batch <= params.rollback + 1 {
        return Err(format!("{} tokens cannot be taken away from a batch of {}", params.rollback, params.micro_batch));
    }
    Ok(())
}

pub(super) fn raw_params(params: &ContextParams) -> llama_context_params {
    let ContextParams {
        cells,
        batch,
        micro_batch,
        sequences,
        outputs,
        unified,
        threads,
        offload,
        flash_attention,
        key_type,
        value_type,
        ref rope,
        rollback,
        part,
    } = *params;
    let threads = i32::try_from(threads.max(1)).unwrap_or(1);
    // SAFETY: returns plain values.
    let mut raw = unsafe { sys::llama_context_default_params() };
    raw.n_ctx = cells;
    raw.n_rs_seq = rollback;
    if part == Part::Head {
        raw.ctx_type = sys::LLAMA_CONTEXT_TYPE_MTP;
    }
    raw.n_batch = batch;
    raw.n_ubatch = micro_batch;
    raw.n_seq_max = sequences;
    // Else llama.cpp reserves logits for a whole micro-batch.
    raw.n_outputs_max = outputs;
    raw.n_threads = threads;
    raw.n_threads_batch = threads;
    raw.offload_kqv = offload;
    raw.op_offload = offload;
    raw.flash_attn_type = flash_attention_type(flash_attention);
    raw.type_k = ggml_type(key_type);
    raw.type_v = ggml_type(value_type);
    raw.no_perf = true;
    raw.swa_full = false;
    raw.kv_unified = unified;
    if let Some(RopeSpec { scaling, factor, original_tokens }) = rope {
        raw.rope_scaling_type = match scaling {
            RopeScaling::Linear => sys::LLAMA_ROPE_SCALING_TYPE_LINEAR,
            RopeScaling::Yarn => sys::LLAMA_ROPE_SCALING_TYPE_YARN,
        };
        let factor = u8::try_from((*factor).clamp(1, 64)).unwrap_or(1);
        raw.rope_freq_scale = 1.0 / f32::from(factor);
        raw.yarn_orig_ctx = original_tokens.and_then(|tokens| u32::try_from(tokens).ok()).unwrap_or(0);
    }
    raw
}

pub(super) fn flash_attention_type(flash_attention: FlashAttention) -> sys::llama_flash_attn_type {
    match flash_attention {
        FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
        FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
        FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }
}

fn ggml_type(cache: CacheType) -> sys::ggml_type {
    match cache {
        CacheType::F16 => sys::GGML_TYPE_F16,
        CacheType::Q8_0 => sys::GGML_TYPE_Q8_0,
        CacheType::Q4_0 => sys::GGML_TYPE_Q4_0,
    }
}
