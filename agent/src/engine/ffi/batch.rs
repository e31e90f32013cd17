//! Tokens for one call of llama.cpp.

use llama_cpp_sys_2::llama_batch;

/// Tokens for one decode, each of one sequence. Its memory is taken once.
pub(in crate::engine) struct Batch {
    tokens: Vec<i32>,
    positions: Vec<i32>,
    sequences: Vec<i32>,
    outputs: Vec<i8>,
    sequence_counts: Vec<i32>,
    sequence_pointers: Vec<*mut i32>,
    capacity: usize,
}

// SAFETY: the pointers point into `sequences` of the same value and are made anew for each use.
unsafe impl Send for Batch {}

impl Batch {
    /// Room for `capacity` tokens.
    pub(in crate::engine) fn new(capacity: u32) -> Self {
        let capacity = capacity as usize;
        Self {
            tokens: Vec::with_capacity(capacity),
            positions: Vec::with_capacity(capacity),
            sequences: Vec::with_capacity(capacity),
            outputs: Vec::with_capacity(capacity),
            sequence_counts: vec![1; capacity],
            sequence_pointers: Vec::with_capacity(capacity),
            capacity,
        }
    }

    /// Forgets all tokens.
    pub(in crate::engine) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.outputs.clear();
    }

    /// Tokens that were added.
    pub(in crate::engine) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is nothing to compute.
    pub(in crate::engine) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Adds a token and returns its row; `None` when the batch is full.
    pub(in crate::engine) fn add(&mut self, token: i32, position: i32, sequence: i32, output: bool) -> Option<i32> {
        if self.tokens.len() == self.capacity {
            return None;
        }
        let row = i32::try_from(self.tokens.len()).ok()?;
        self.tokens.push(token);
        self.positions.push(position);
        self.sequences.push(sequence);
        self.outputs.push(i8::from(output));
        Some(row)
    }

    pub(super) fn tokens(&self) -> &[i32] {
        &self.tokens
    }

    pub(super) fn sequences(&self) -> &[i32] {
        &self.sequences
    }

    pub(super) fn outputs(&self) -> &[i8] {
        &self.outputs
    }

    /// llama.cpp's view; valid until the batch is changed or dropped.
    pub(super) fn raw(&mut self) -> llama_batch {
        self.sequence_pointers.clear();
        self.sequence_pointers.extend(self.sequences.iter_mut().map(std::ptr::from_mut));
        llama_batch {
            n_tokens: i32::try_from(self.tokens.len()).unwrap_or(i32::MAX),
            token: self.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.sequence_counts.as_mut_ptr(),
            seq_id: self.sequence_pointers.as_mut_ptr(),
            logits: self.outputs.as_mut_ptr(),
        }
    }
}
