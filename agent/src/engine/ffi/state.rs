//! The state of sequences as bytes.

use super::{Context, shim};

impl Context {
    /// Bytes that [`Self::state`] would give; 0 when they cannot be had.
    pub(in crate::engine) fn state_size(&mut self) -> usize {
        // SAFETY: the context is alive.
        unsafe { shim::altiplano_state_size(self.raw.as_ptr()) }
    }

    /// All sequences as bytes at the beginning of `buffer`, which grows to hold them. A context of the same parameters
    /// but another size takes them with [`Self::set_state`]. `None` when the bytes, or memory for them, cannot be had.
    pub(in crate::engine) fn state<'buffer>(&mut self, buffer: &'buffer mut Vec<u8>) -> Option<&'buffer [u8]> {
        let size = self.state_size();
        if buffer.len() < size {
            buffer.try_reserve_exact(size - buffer.len()).ok()?;
            buffer.resize(size, 0);
        }
        // SAFETY: the context is alive and the buffer has at least `size` bytes.
        let written = unsafe { shim::altiplano_state_get(self.raw.as_ptr(), buffer.as_mut_ptr(), size) };
        buffer.get(..written).filter(|bytes| !bytes.is_empty())
    }

    /// Takes over what [`Self::state`] gave. On false the context is empty.
    pub(in crate::engine) fn set_state(&mut self, bytes: &[u8]) -> bool {
        // SAFETY: the context is alive; llama.cpp checks the bytes against the size.
        let read = unsafe { shim::altiplano_state_set(self.raw.as_ptr(), bytes.as_ptr(), bytes.len()) };
        if read == 0 {
            self.clear();
        }
        read != 0
    }

    /// Bytes that [`Self::sequence_state`] would give; 0 when they cannot be had.
    pub(in crate::engine) fn sequence_state_size(&mut self, sequence: i32) -> usize {
        if !self.has_sequence(sequence) {
            return 0;
        }
        // SAFETY: the context is alive; the sequence id was checked.
        unsafe { shim::altiplano_sequence_state_size(self.raw.as_ptr(), sequence) }
    }

    /// One sequence as bytes, which [`Self::set_sequence_state`] takes in a context of the same layout and types.
    pub(in crate::engine) fn sequence_state(&mut self, sequence: i32) -> Option<Vec<u8>> {
        let size = self.sequence_state_size(sequence);
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).ok()?;
        bytes.resize(size, 0);
        if size == 0 {
            return None;
        }
        // SAFETY: the context is alive, a size above 0 says that the sequence id is valid, and the buffer has `size`
        // bytes.
        let written =
            unsafe { shim::altiplano_sequence_state_get(self.raw.as_ptr(), bytes.as_mut_ptr(), size, sequence) };
        bytes.truncate(written);
        (written > 0).then_some(bytes)
    }

    /// Puts what [`Self::sequence_state`] gave into a sequence that is empty. On false it still is.
    pub(in crate::engine) fn set_sequence_state(&mut self, sequence: i32, bytes: &[u8]) -> bool {
        if !self.has_sequence(sequence) {
            return false;
        }
        // SAFETY: the context is alive, the sequence id was checked; llama.cpp checks the bytes against the size.
        let read =
            unsafe { shim::altiplano_sequence_state_set(self.raw.as_ptr(), bytes.as_ptr(), bytes.len(), sequence) };
        if read == 0 {
            self.remove(sequence, 0);
        }
        read != 0
    }
}
