//! How full a context's cache is: attention computes up to the last cell that is taken.

use super::{Context, shim};

impl Context {
    /// Takes `count` free cells for position 0 of a sequence, without computing anything: what they hold means nothing.
    /// False where the cache is not a plain one of keys and values, or has fewer cells; then nothing has changed.
    pub(in crate::engine) fn fill(&mut self, sequence: i32, count: u32) -> bool {
        // SAFETY: the context is alive and the sequence id was checked.
        self.has_sequence(sequence) && unsafe { shim::altiplano_fill(self.raw.as_ptr(), sequence, count) }
    }

    /// Cells up to the last one that is taken, where `sequence` has its cells; 0 where the cache is not a plain one.
    #[cfg(test)]
    pub(in crate::engine) fn depth(&self, sequence: i32) -> u32 {
        if !self.has_sequence(sequence) {
            return 0;
        }
        // SAFETY: the context is alive and the sequence id was checked.
        unsafe { shim::altiplano_depth(self.raw.as_ptr(), sequence) }
    }
}
