//! What llama.cpp's bare calls take, for benchmarks: changes of size beside the engine's own, and steps as a physical limit.

mod batches;
mod resizes;

pub(super) use batches::batches;
pub(super) use resizes::resizes;
