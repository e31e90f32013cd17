//! Declarations of `shim.h`.

use std::ffi::{CStr, c_char};

use llama_cpp_sys_2::{llama_batch, llama_context, llama_context_params, llama_model, llama_sampler, llama_vocab};

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
}

/// Bytes in the buffers of one kind.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Memory {
    pub(super) device: *const c_char,
    pub(super) model: u64,
    pub(super) context: u64,
    pub(super) compute: u64,
}

/// A token and its log-probability.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Logprob {
    pub(super) token: i32,
    pub(super) logprob: f32,
}

unsafe extern "C" {
    pub(super) fn altiplano_context_new(
        model: *mut llama_model,
        params: *const llama_context_params,
        error: *mut Error,
    ) -> *mut llama_context;
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
}
