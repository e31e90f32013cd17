//! The engine: one llama.cpp model in this process, several sequences at once.
//!
//! [`Engine`] is a handle; the work is done by one thread (`worker`), which alone touches the llama.cpp context. What
//! to do next is decided by pure modules (`schedule`, `sizing`, `pool`, `prefix`), done by `step`. `ffi` holds the only
//! unsafe code of the project.

mod error;
mod mailbox;
mod request;

use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use error::EngineError;
pub use request::{
    FinishReason, GenerateEvent, GenerateRequest, Generation, MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, PENALTY_WINDOW,
    SamplingParams, SubmitError, Timings, Token, TokenLogprob, TopLogprob, Usage,
};

use crate::runner::protocol::{RunnerConfig, RunnerReport};

/// What is known about the model once it is loaded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFacts {
    /// `general.name` of the file.
    pub name: Option<String>,
    /// `general.architecture`, such as "llama".
    pub architecture: String,
    /// llama.cpp's short description: architecture, size class, quantisation.
    pub description: String,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// Tokens that the model was trained with.
    pub trained_context: u32,
    /// Tokens that one request may use, prompt and answer.
    pub max_tokens: u32,
    /// Token that begins a text.
    pub bos: Option<Token>,
    /// `bos` as text, for chat templates; empty when there is none.
    pub bos_text: String,
    /// Token that ends a text.
    pub eos: Option<Token>,
    /// `eos` as text, for chat templates; empty when there is none.
    pub eos_text: String,
    /// Whether a prompt begins with `bos`.
    pub adds_bos: bool,
    /// Jinja source in the file, unless the configuration replaces it.
    pub chat_template: Option<String>,
    /// Parameters.
    pub parameter_count: u64,
    /// Bytes of all tensors.
    pub size_bytes: u64,
}

/// What the engine is doing and has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Requests that are generated.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: u32,
    /// Cells of the KV cache that hold a token.
    pub cells_used: u32,
    /// Cells of the KV cache.
    pub cells_total: u32,
    /// Prompt tokens of all requests that got a slot.
    pub prompt_tokens: u64,
    /// Of these, the ones that were in the KV cache already.
    pub cached_prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Requests that ended with `stop`.
    pub finished_stop: u64,
    /// Requests that ended with `length`.
    pub finished_length: u64,
    /// Requests whose client went away.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Times the context got another size.
    pub resizes: u64,
    /// Steps done.
    pub steps: u64,
    /// How long the present step runs; zero while the engine is idle.
    pub step_age: Duration,
}

/// Handle to the engine of this process; clones are cheap.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Loads the model, makes the context and warms up. Blocks; `progress` gets 0 to 100.
    pub fn start(_config: &RunnerConfig, _progress: &dyn Fn(u8)) -> Result<Self, EngineError> {
        Err(EngineError::Internal("the engine is not built yet".to_owned()))
    }

    /// What is known about the model.
    #[must_use]
    pub fn model(&self) -> &ModelFacts {
        unimplemented!()
    }

    /// Size and memory as they are now.
    #[must_use]
    pub fn report(&self) -> RunnerReport {
        RunnerReport::default()
    }

    /// The same, and every change of it.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<RunnerReport> {
        watch::channel(RunnerReport::default()).1
    }

    /// Text to tokens. `add_special` puts the model's own first token before it; `parse_special` reads control tokens
    /// such as `<|im_start|>` as such.
    pub fn tokenize(&self, _text: &str, _add_special: bool, _parse_special: bool) -> Result<Vec<Token>, EngineError> {
        Err(EngineError::Internal("the engine is not built yet".to_owned()))
    }

    /// Tokens to text; control tokens are left out, bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn detokenize(&self, _tokens: &[Token]) -> String {
        String::new()
    }

    /// Puts a request into the queue.
    pub fn submit(&self, _request: GenerateRequest) -> Result<Generation, SubmitError> {
        Err(SubmitError::EngineFailed)
    }

    /// What the engine is doing and has done.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    /// Takes no more requests, lets those that are here end until `deadline`, then ends the engine's thread. Blocks.
    pub fn shutdown(&self, _deadline: Instant) {}
}
