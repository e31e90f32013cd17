//! What the engine is doing and has done.

use std::time::Duration;

/// What the engine is doing and has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Requests that are generated.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: u32,
    /// Cells of the KV cache that hold a token.
    pub cells_used: u32,
    /// Of these, the ones of finished sequences, kept for prompts that begin the same; they go when room is needed.
    pub cells_kept: u32,
    /// Cells of the KV cache.
    pub cells_total: u32,
    /// Most cells that have held a token at once.
    pub cells_peak: u32,
    /// Prompt tokens of all requests that got a slot.
    pub prompt_tokens: u64,
    /// Of these, the ones that were in the KV cache already.
    pub cached_prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Guesses of one or more tokens.
    pub drafts: u64,
    /// Tokens that were guessed and checked.
    pub drafted_tokens: u64,
    /// Of these, the ones that were right.
    pub accepted_tokens: u64,
    /// Texts of which a vector or a score was made.
    pub embedded_texts: u64,
    /// Requests that ended with `stop`, or with their embeddings.
    pub finished_stop: u64,
    /// Requests that ended with `length`.
    pub finished_length: u64,
    /// Requests whose client went away.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Times a request lost its cells to older ones and had to be read again.
    pub preempted: u64,
    /// Times the context grew.
    pub resizes: u64,
    /// Times it shrank.
    pub shrinks: u64,
    /// Times that it grew in a context that was made beside the running one before anybody needed it.
    pub growths_anticipated: u64,
    /// Times that it could not grow because others held the memory.
    pub growths_refused: u64,
    /// Requests that had a slot and no room in the context, and waited for others to end or for memory.
    pub context_waits: u64,
    /// How long streams stood still for that, in all.
    pub resize_time: Duration,
    /// Images that were computed for a prompt; those that were there already do not count.
    pub pictures: u64,
    /// How long that took, the steps of others meanwhile counted.
    pub picture_time: Duration,
    /// Sounds, or parts of them, that were computed for a prompt.
    pub sounds: u64,
    /// Time spent on that, steps of others included.
    pub sound_time: Duration,
    /// Requests that waited for an equal prompt to be read, and went on from its cells.
    pub followed: u64,
    /// Bytes of sequences' states in host memory: prefixes for prompts to come, and requests that gave way.
    pub host_cache_bytes: u64,
    /// Prefixes among them.
    pub host_cache_states: u32,
    /// Steps done.
    pub steps: u64,
    /// Tokens that were computed while nobody asked, to see that the GPU answers.
    pub probes: u64,
    /// Sequences that took part in them, summed over the steps.
    pub step_sequences: u64,
    /// How long the present step runs; zero while the engine is idle.
    pub step_age: Duration,
}

/// Requests in the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Requests that are generated.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: u32,
}
