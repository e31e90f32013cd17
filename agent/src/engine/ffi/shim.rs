//! Declarations of `shim.h`.

use std::ffi::{CStr, c_char, c_void};

use llama_cpp_sys_2::{
    llama_batch, llama_context, llama_context_params, llama_flash_attn_type, llama_model, llama_sampler, llama_vocab,
    mtmd_input_chunk_type, mtmd_input_chunks,
};

/// Returned when an exception was caught.
pub(super) const EXCEPTION: i32 = -1000;

/// Returned by [`altiplano_pick`] when no token may come.
pub(super) const NO_TOKEN: i32 = -1001;

/// Text of a caught exception.
#[repr(C)]
pub(super) struct Error {
    text: [c_char; 512],
}

impl Error {
    pub(super) fn new() -> Self {
        Self { text: [0; 512] }
    }

    pub(super) fn text(&self) -> String {
        // SAFETY: the shim writes with snprintf, which ends the text with a zero within the array, and the array
        // begins as zeros.
        unsafe { CStr::from_ptr(self.text.as_ptr()) }.to_string_lossy().into_owned()
    }

    /// The same, or what else is known where nothing was caught.
    pub(super) fn text_or(&self, otherwise: String) -> String {
        let text = self.text();
        if text.is_empty() { otherwise } else { text }
    }
}

/// Bytes in the buffers of one kind.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Memory {
    pub(super) device: *const c_char,
    pub(super) model: u64,
    pub(super) context: u64,
    pub(super) compute: u64,
    pub(super) mapped: u64,
}

/// What a context would be like, of `shim_sizing.cpp`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Size {
    pub(super) cells: u32,
    pub(super) micro_batch: u32,
    pub(super) flash_attention: bool,
}

/// A driver of `shim_driver.cpp`: the device's name, the driver's, and its own words on its version.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Driver {
    pub(super) device: [c_char; 256],
    pub(super) name: [c_char; 256],
    pub(super) version: [c_char; 256],
}

/// The device of an entry, "CPU" for host memory.
///
/// # Safety
/// The name is null or ends with a zero and is alive.
pub(super) unsafe fn device_name(entry: &Memory) -> String {
    // SAFETY: as the caller says.
    let name = if entry.device.is_null() { c"" } else { unsafe { CStr::from_ptr(entry.device) } };
    let name = name.to_string_lossy();
    if name.is_empty() { "CPU".to_owned() } else { name.into_owned() }
}

/// A projector of `shim_media.cpp`.
#[repr(C)]
pub(super) struct Projector {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(super) struct ProjectorParams {
    pub(super) path: *const c_char,
    pub(super) device: *const c_char,
    pub(super) marker: *const c_char,
    pub(super) threads: i32,
    pub(super) flash_attention: llama_flash_attn_type,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ProjectorFacts {
    pub(super) vision: bool,
    pub(super) audio: bool,
    pub(super) mrope: bool,
    pub(super) sample_rate: i32,
}

#[repr(C)]
pub(super) struct ProjectorNeeds {
    pub(super) most_tokens: i32,
    pub(super) non_causal: bool,
}

#[repr(C)]
pub(super) struct Medium {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) pixels: *const u8,
    pub(super) samples: *const f32,
    pub(super) count: usize,
}

#[repr(C)]
pub(super) struct Piece {
    pub(super) kind: mtmd_input_chunk_type,
    pub(super) medium: usize,
    pub(super) tokens: usize,
    pub(super) positions: i32,
    pub(super) non_causal: bool,
    pub(super) text: *const i32,
}

/// A token and its log-probability.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Logprob {
    pub(super) token: i32,
    pub(super) logprob: f32,
}

unsafe extern "C" {
    pub(super) fn altiplano_vulkan_drivers(out: *mut Driver, size: usize) -> usize;
    #[cfg(feature = "cuda")]
    pub(super) fn altiplano_cuda_driver() -> bool;
    pub(super) fn altiplano_context_new(
        model: *mut llama_model,
        params: *const llama_context_params,
        error: *mut Error,
    ) -> *mut llama_context;
    pub(super) fn altiplano_context_free(context: *mut llama_context);
    pub(super) fn altiplano_context_size(
        model: *mut llama_model,
        params: *const llama_context_params,
        out: *mut Size,
        kinds: *mut Memory,
        size: usize,
        error: *mut Error,
    ) -> usize;
    pub(super) fn altiplano_decode(context: *mut llama_context, batch: *const llama_batch, error: *mut Error) -> i32;
    pub(super) fn altiplano_pick(
        chain: *mut llama_sampler,
        context: *mut llama_context,
        row: i32,
        allowed: *const u32,
        error: *mut Error,
    ) -> i32;
    pub(super) fn altiplano_accept(sampler: *mut llama_sampler, token: i32, error: *mut Error) -> i32;
    pub(super) fn altiplano_dry_new(
        vocab: *const llama_vocab,
        multiplier: f32,
        base: f32,
        allowed_length: i32,
        last_n: i32,
        breakers: *mut *const c_char,
        count: usize,
        error: *mut Error,
    ) -> *mut llama_sampler;
    pub(super) fn altiplano_logprobs(
        context: *mut llama_context,
        row: i32,
        token: i32,
        top: i32,
        out: *mut Logprob,
        error: *mut Error,
    ) -> i32;
    pub(super) fn altiplano_token_to_piece(
        vocab: *const llama_vocab,
        token: i32,
        buffer: *mut c_char,
        size: i32,
        special: bool,
        error: *mut Error,
    ) -> i32;
    pub(super) fn altiplano_tokenize(
        vocab: *const llama_vocab,
        text: *const c_char,
        length: i32,
        tokens: *mut i32,
        size: i32,
        add_special: bool,
        parse_special: bool,
        error: *mut Error,
    ) -> i32;
    pub(super) fn altiplano_state_size(context: *mut llama_context) -> usize;
    pub(super) fn altiplano_state_get(context: *mut llama_context, buffer: *mut u8, size: usize) -> usize;
    pub(super) fn altiplano_state_set(context: *mut llama_context, buffer: *const u8, size: usize) -> usize;
    pub(super) fn altiplano_sequence_state_size(context: *mut llama_context, sequence: i32) -> usize;
    pub(super) fn altiplano_sequence_state_get(
        context: *mut llama_context,
        buffer: *mut u8,
        size: usize,
        sequence: i32,
    ) -> usize;
    pub(super) fn altiplano_sequence_state_set(
        context: *mut llama_context,
        buffer: *const u8,
        size: usize,
        sequence: i32,
    ) -> usize;
    pub(super) fn altiplano_memory_breakdown(context: *const llama_context, out: *mut Memory, size: usize) -> usize;
    pub(super) fn altiplano_projector_new(
        model: *const llama_model,
        params: *const ProjectorParams,
        error: *mut Error,
    ) -> *mut Projector;
    pub(super) fn altiplano_projector_free(projector: *mut Projector);
    pub(super) fn altiplano_projector_facts_of(projector: *const Projector) -> ProjectorFacts;
    #[cfg(test)]
    pub(super) fn altiplano_projector_context(projector: *mut Projector) -> *mut llama_cpp_sys_2::mtmd_context;
    pub(super) fn altiplano_projector_memory(
        params: *const ProjectorParams,
        out: *mut Memory,
        size: usize,
        needs: *mut ProjectorNeeds,
        error: *mut Error,
    ) -> usize;
    pub(super) fn altiplano_media_split(
        projector: *const Projector,
        text: *const c_char,
        length: usize,
        add_special: bool,
        media: *const Medium,
        count: usize,
        error: *mut Error,
    ) -> *mut mtmd_input_chunks;
    pub(super) fn altiplano_media_count(pieces: *const mtmd_input_chunks) -> usize;
    pub(super) fn altiplano_media_piece(
        projector: *const Projector,
        pieces: *const mtmd_input_chunks,
        index: usize,
        out: *mut Piece,
    ) -> bool;
    pub(super) fn altiplano_media_encode(
        projector: *mut Projector,
        pieces: *const mtmd_input_chunks,
        index: usize,
        out: *mut f32,
        size: usize,
        pause: unsafe extern "C" fn(*mut c_void) -> bool,
        data: *mut c_void,
        error: *mut Error,
    ) -> i32;
    pub(super) fn altiplano_media_positions(
        projector: *const Projector,
        pieces: *const mtmd_input_chunks,
        index: usize,
        first: i32,
        out: *mut i32,
        size: usize,
    ) -> bool;
    pub(super) fn altiplano_has_tensor(model: *const llama_model, name: *const c_char) -> bool;
    pub(super) fn altiplano_fill(context: *mut llama_context, sequence: i32, count: u32) -> bool;
    #[cfg(test)]
    pub(super) fn altiplano_depth(context: *const llama_context, sequence: i32) -> u32;
    pub(super) fn altiplano_flash_attention(context: *const llama_context) -> bool;
    pub(super) fn altiplano_hidden(context: *mut llama_context, outputs_only: bool);
    pub(super) fn altiplano_hidden_row(context: *mut llama_context, row: i32) -> *const f32;
    pub(super) fn altiplano_decode_head(
        context: *mut llama_context,
        batch: *const llama_batch,
        states: *const f32,
        width: usize,
        error: *mut Error,
    ) -> i32;
    pub(super) fn altiplano_decode_media(
        context: *mut llama_context,
        batch: *const llama_batch,
        causal: bool,
        error: *mut Error,
    ) -> i32;
}
