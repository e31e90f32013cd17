//! One sequence that generates alone on a CPU.

use super::super::error::EngineError;
use super::Worker;
use super::room::read_again;

/// Steps alone before its cells are gathered: who comes in a burst is there by then.
const PATIENCE: u32 = 8;

impl Worker {
    /// After each step: gathers the cells of the only sequence, once it has generated alone for a while.
    pub(super) fn look_after_the_only_one(&mut self) -> Result<(), EngineError> {
        let generates = matches!(self.step.as_slice(), [chunk] if chunk.output && chunk.count == 1);
        if !generates || self.running.len() != 1 || !self.plan.attends_on_cpu() {
            self.alone = 0;
            return Ok(());
        }
        self.alone += 1;
        let [sequence] = self.running.as_mut_slice() else { return Ok(()) };
        let Some(id) = sequence.cells.filter(|_| self.alone.is_multiple_of(PATIENCE)) else { return Ok(()) };
        if self.executor.gather(id, sequence.resident) {
            return Ok(());
        }
        read_again(&mut self.executor, sequence)
    }
}
