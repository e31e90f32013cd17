//! What goes into the engine and what comes out of it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::Stream;
use tokio::sync::mpsc;

use super::budget::ReasoningBudget;
use super::error::EngineError;
use super::lines::LineLimits;
use super::mailbox::Mailbox;
use super::media::Media;
use super::sampling::{Grammar, SamplingParams};

/// A token of the model's vocabulary.
pub type Token = i32;

/// One prompt and how to go on from it.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing that the client may ask for")]
pub struct GenerateRequest {
    /// Identity of the request, for logs.
    pub id: String,
    /// The prompt; not empty, every token of the vocabulary or one that stands for a picture.
    pub prompt: Vec<Token>,
    /// Its pictures, see [`Engine::read`](super::Engine::read).
    pub media: Media,
    /// Tokens to generate at most; clamped to what is left of the context. `None`: until the model ends, or the
    /// context does.
    pub max_tokens: Option<u32>,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// What the output must be; the generation ends with `stop` when nothing more may come.
    pub grammar: Option<Grammar>,
    /// How long the model may think; `None`: as long as it likes.
    pub reasoning: Option<ReasoningBudget>,
    /// Texts that end the generation; they never appear in the output.
    pub stop: Vec<String>,
    /// Where its lines end it.
    pub lines: LineLimits,
    /// Control tokens whose text belongs to the output: marks of reasoning and of tool calls.
    pub preserved: Vec<Token>,
    /// Goes on after the model's end-of-generation token, as benchmarks do.
    pub ignore_eos: bool,
    /// `Some(n)`: the log-probability of each token, and of the `n` most probable ones (at most [`MAX_TOP_LOGPROBS`]).
    pub logprobs: Option<u32>,
    /// When the request leaves the queue, should it still be waiting.
    pub deadline: Option<Instant>,
    /// Number of the adapter in [`ModelFacts::adapters`](super::ModelFacts::adapters); `None`: the model itself.
    pub adapter: Option<usize>,
    /// Whose KV cells the prompt may begin with; the adapter is put in by the engine.
    pub cache: CacheKey,
    /// Whether KV cells are reused at all; what was computed stays for others of the same key either way.
    pub cache_prompt: bool,
    /// Lengths of the prompt at which a message ends. Where the model's state cannot be cut, copies of it are made at the last
    /// few of them, so that a prompt which parts from this one there goes on from such a copy.
    pub borders: Vec<usize>,
    /// Tokens of context to aim for instead of what the sizing's formula says (`num_ctx`). Never a limit, and never more
    /// than a request may use.
    pub aim_tokens: Option<u32>,
    /// Sends [`GenerateEvent::Progress`] while the prompt is read.
    pub progress: bool,
    /// Sends an event for every token but the last end-of-generation token, also for those without text.
    pub every_token: bool,
}

impl Default for GenerateRequest {
    fn default() -> Self {
        Self {
            id: String::new(),
            prompt: Vec::new(),
            media: Media::default(),
            max_tokens: None,
            sampling: SamplingParams::default(),
            grammar: None,
            reasoning: None,
            stop: Vec::new(),
            lines: LineLimits::default(),
            preserved: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            deadline: None,
            adapter: None,
            cache: CacheKey::default(),
            cache_prompt: true,
            borders: Vec::new(),
            aim_tokens: None,
            progress: false,
            every_token: false,
        }
    }
}

/// Prompts share KV cells only with prompts of an equal key: the same tokens mean something else to another adapter, and
/// how fast an answer comes tells whether somebody has asked the same before. Images are among the tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct CacheKey {
    /// The client's `cache_salt`; empty: none.
    pub salt: String,
    /// Namespace of the caller; empty: all callers share.
    pub namespace: String,
    /// LoRA adapters that the tokens are read with, each with the bits of its scale.
    pub adapters: Vec<(String, u32)>,
}

impl GenerateRequest {
    /// Whether the engine has to compile something before it can take the request.
    #[must_use]
    pub fn is_dear(&self) -> bool {
        self.grammar.is_some() || self.sampling.dry.multiplier != 0.0
    }
}

/// Most alternatives per token whose log-probabilities are reported.
pub const MAX_TOP_LOGPROBS: u32 = 20;

/// One piece of an answer.
#[derive(Clone, Debug)]
pub enum GenerateEvent {
    /// A piece of the prompt has been read; a reader that is behind misses some.
    Progress(PromptProgress),
    /// A token, or text that was held back until it was known not to be the beginning of a stop text.
    Token {
        /// Complete UTF-8; empty only when `logprob` is there or every token was asked for.
        text: String,
        /// The token that completed the text.
        token: Token,
        /// Where the request asked for it; `None` for text that was held back.
        logprob: Option<TokenLogprob>,
    },
    /// The end; nothing comes after it.
    Done {
        /// Why.
        finish_reason: FinishReason,
        /// The stop text that came, if one did.
        stop: Option<String>,
        /// Tokens used.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
    },
    /// The request cannot be served any further; nothing comes after it.
    Failed(EngineError),
}

/// How far a prompt has been read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptProgress {
    /// Tokens of the prompt.
    pub total: u32,
    /// Of these, the ones whose KV cells were there already.
    pub cached: u32,
    /// Of these, the ones that are done, `cached` counted.
    pub processed: u32,
    /// Since the request got its slot.
    pub elapsed: Duration,
}

/// Log-probability of a token, under the model's own distribution (before the sampling parameters).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Natural logarithm of the probability.
    pub logprob: f32,
    /// The token's own bytes, which may be a part of a character.
    pub bytes: Vec<u8>,
    /// The most probable tokens, the best first.
    pub top: Vec<TopLogprob>,
}

/// One of the most probable tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct TopLogprob {
    /// The token.
    pub token: Token,
    /// Natural logarithm of the probability.
    pub logprob: f32,
    /// The token's own bytes, which may be a part of a character.
    pub bytes: Vec<u8>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended, or a stop text came.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, the ones whose KV cells were there already.
    pub cached_tokens: u32,
    /// Tokens generated, the end-of-generation token counted.
    pub completion_tokens: u32,
}

/// Where a request's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From submission to a slot.
    pub queue: Duration,
    /// From the slot to the first token.
    pub prefill: Duration,
    /// From submission to the first token.
    pub time_to_first_token: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Tokens that were guessed and checked.
    pub drafted: u32,
    /// Of these, the ones that were right.
    pub accepted: u32,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests as allowed run and wait already.
    #[error("{limit} requests are waiting already")]
    QueueFull {
        /// Requests that may wait.
        limit: u32,
    },
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {prompt_tokens} tokens, but the context of a request is {limit}")]
    ContextLengthExceeded {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that a request may use.
        limit: u32,
    },
    /// The prompt has no token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt or the logit bias names a token that the vocabulary does not have.
    #[error("token {token} is not in the vocabulary of {n_vocab}")]
    InvalidToken {
        /// The token.
        token: Token,
        /// Size of the vocabulary.
        n_vocab: u32,
    },
    /// A sampling parameter is out of its range.
    #[error("{0}")]
    InvalidParameter(&'static str),
    /// The grammar or the schema cannot be compiled, or is larger than is allowed.
    #[error("'{field}' cannot be used: {reason}")]
    InvalidGrammar {
        /// OpenAI's or llama-server's name for it.
        field: &'static str,
        /// For people.
        reason: String,
    },
    /// llama.cpp could not make the sampler.
    #[error("{0}")]
    Internal(String),
    /// The model cannot do what is asked.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The engine takes no more requests.
    #[error("the model is being unloaded")]
    ShuttingDown,
    /// The engine has ended by itself; the worker process is about to exit.
    #[error("the engine has failed")]
    EngineFailed,
}

/// An answer as it comes. Dropping it cancels the generation at the next step; reading it slowly holds up this
/// generation alone.
pub struct Generation {
    pub(super) events: mpsc::Receiver<GenerateEvent>,
    pub(super) mailbox: Arc<Mailbox>,
    /// The last event has been read.
    pub(super) finished: bool,
}

impl Stream for Generation {
    type Item = GenerateEvent;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(self.events.poll_recv(context));
        // The engine may have parked the sequence because this channel was full.
        self.mailbox.unpark();
        let event = event.unwrap_or_else(|| {
            // Only a panic of the engine's thread leaves a stream without its last event.
            GenerateEvent::Failed(EngineError::Internal("the engine has ended".to_owned()))
        });
        self.finished = matches!(event, GenerateEvent::Done { .. } | GenerateEvent::Failed(_));
        Poll::Ready(Some(event))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.events.close();
        self.mailbox.wake();
    }
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Generation").finish_non_exhaustive()
    }
}
