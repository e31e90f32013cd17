//! The cells of one sequence together, and no others among them.
//!
//! On a CPU llama.cpp divides the attention of a single row among its threads by ranges of cells (ggml-cpu's
//! `flash_attn_ext`, from 512 cells on), and cells of other sequences cost next to nothing. Where a lone stream's cells
//! lie behind those of kept prefixes one thread does all the work and the others wait for it in every layer: 290 tokens
//! a second instead of 360 (125 million weights, 2 threads, 256 cells behind 256).

use super::Executor;
use crate::engine::pool::SeqId;
use crate::engine::prefix::Reuse;

/// Up to this llama.cpp, which takes cells by 256, divides the work by heads.
const UNDIVIDED: u32 = 256;

/// Idle cells per running one that are no matter.
const IDLE_PART: u32 = 4;

impl Executor {
    /// Moves kept sequences to host memory before one begins alone, but for that which it begins with: it gets the first
    /// cells.
    pub(in crate::engine) fn make_way(&mut self, reuse: Reuse) {
        if !self.params.unified || self.capability.needs_snapshots() {
            return;
        }
        let mut needed = None;
        match reuse {
            Reuse::Take { id, .. } | Reuse::Share { id, .. } => needed = Some(id),
            // Used now, so that it does not make room for the others.
            Reuse::Restore { entry, .. } => drop(self.host.get(entry)),
            Reuse::Follow { .. } | Reuse::Nothing => {}
        }
        while let Some(id) = self.pool.oldest_kept(needed) {
            let size = self.context.as_mut().map_or(0, |context| context.sequence_state_size(id));
            // What the host cannot take is worth more here than gone.
            if !self.host.accepts(size as u64) || !self.drop_kept(needed) {
                return;
            }
        }
    }

    /// Moves kept sequences to host memory and this one, of so many tokens, to the first cells, where that is worth the
    /// copies. False: its cells are gone, and its tokens have to be read again.
    pub(in crate::engine) fn gather(&mut self, id: SeqId, tokens: usize) -> bool {
        let used = self.pool.used();
        let idle = used.saturating_sub(self.pool.used_by_running());
        let worth = used > UNDIVIDED && idle > (used - idle) / IDLE_PART;
        if !self.params.unified || self.capability.needs_snapshots() || !worth {
            return true;
        }
        let Some(context) = self.context.as_mut() else { return true };
        let mut moved = self.pool.kept().map(|(kept, ..)| kept).chain([id]);
        // What the host cannot take is worth more here than gone.
        let fits = moved.all(|id| self.host.accepts(context.sequence_state_size(id) as u64));
        drop(moved);
        if !fits {
            return true;
        }
        let Some(state) = self.copy(id) else { return true };
        while self.drop_kept(None) {}
        let Some(context) = self.context.as_mut() else { return false };
        context.remove(id, 0);
        if !context.set_sequence_state(id, &state) {
            self.release(id);
            return false;
        }
        self.pool.gathered(id, u32::try_from(tokens).unwrap_or(u32::MAX));
        true
    }
}
