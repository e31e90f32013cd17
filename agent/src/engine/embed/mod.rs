//! Embeddings and rerank scores: texts go in, vectors come out, nothing is generated.
//!
//! A model whose file names a pooling is an embedder (or, with pooling `Rank`, a reranker) and generates nothing. It has
//! the engine's queue and thread, but a worker and a context of its own: several texts, of several requests in turn, go
//! into one call, and a text longer than any before gets a larger context. `pack` and `size` decide, `worker` does.

mod load;
mod pack;
mod size;
mod worker;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::error::EngineError;
use super::ffi::{Model, Pooling};
use super::mailbox::{Mailbox, Queued};
use super::request::{SubmitError, Token};

pub(super) use load::{Loaded, estimate, load};
pub(super) use worker::Worker;

/// Texts of one request at most.
pub const MAX_TEXTS: usize = 2048;

/// What is wanted of the texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EmbedTask {
    /// A vector for each text.
    #[default]
    Embedding,
    /// The score of each text, which holds a query and a document: see [`Engine::rerank_prompt`](super::Engine::rerank_prompt).
    Score,
}

/// Texts, and what is wanted of them.
#[derive(Clone, Debug, Default)]
pub struct EmbedRequest {
    /// Identity of the request, for logs.
    pub id: String,
    /// Vectors or scores.
    pub task: EmbedTask,
    /// 1 to [`MAX_TEXTS`] texts, none empty, every token of the vocabulary.
    pub texts: Vec<Vec<Token>>,
    /// When the request leaves the queue, should it still be waiting.
    pub deadline: Option<Instant>,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embedded {
    /// One for each text, in the same order. A vector has the model's width and is not normalised; a score stands first
    /// in its vector.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of all texts.
    pub prompt_tokens: u32,
    /// From submission to the first call.
    pub queue: Duration,
    /// From the first call to the last.
    pub compute: Duration,
}

/// Resolves when all texts are done. Dropping it cancels the request before its next call.
pub struct Embedding {
    result: oneshot::Receiver<Result<Embedded, EngineError>>,
    mailbox: Arc<Mailbox<Waiting>>,
}

impl Future for Embedding {
    type Output = Result<Embedded, EngineError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = std::task::ready!(Pin::new(&mut self.result).poll(context));
        // Only a panic of the engine's thread leaves a request without its answer.
        Poll::Ready(result.unwrap_or_else(|_| Err(EngineError::Internal("the engine has ended".to_owned()))))
    }
}

impl Drop for Embedding {
    fn drop(&mut self) {
        self.result.close();
        self.mailbox.wake();
    }
}

impl std::fmt::Debug for Embedding {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Embedding").finish_non_exhaustive()
    }
}

/// A request that has not begun.
pub(super) struct Waiting {
    request: EmbedRequest,
    result: oneshot::Sender<Result<Embedded, EngineError>>,
    submitted: Instant,
}

impl Queued for Waiting {
    fn is_closed(&self) -> bool {
        self.result.is_closed()
    }

    fn deadline(&self) -> Option<Instant> {
        self.request.deadline
    }
}

/// Checks a request and puts it into the queue. `max_tokens` is what one text may have.
pub(super) fn submit(
    model: &Model,
    can_rank: bool,
    max_tokens: u32,
    mailbox: &Arc<Mailbox<Waiting>>,
    request: EmbedRequest,
) -> Result<Embedding, SubmitError> {
    match (request.task, can_rank) {
        (EmbedTask::Embedding, true) => return Err(SubmitError::Unsupported(RANKS_ONLY)),
        (EmbedTask::Score, false) => return Err(SubmitError::Unsupported(EMBEDS_ONLY)),
        _ => {}
    }
    if request.texts.is_empty() || request.texts.iter().any(Vec::is_empty) {
        return Err(SubmitError::EmptyPrompt);
    }
    if request.texts.len() > MAX_TEXTS {
        return Err(SubmitError::InvalidParameter("a request has more than 2048 texts"));
    }
    for text in &request.texts {
        let prompt_tokens = u32::try_from(text.len()).unwrap_or(u32::MAX);
        if prompt_tokens > max_tokens {
            return Err(SubmitError::ContextLengthExceeded { prompt_tokens, limit: max_tokens });
        }
        if let Some(&token) = text.iter().find(|&&token| !model.has(token)) {
            return Err(SubmitError::InvalidToken { token, n_vocab: model.n_vocab() });
        }
    }
    let (sender, result) = oneshot::channel();
    mailbox.submit(Waiting { request, result: sender, submitted: Instant::now() })?;
    Ok(Embedding { result, mailbox: Arc::clone(mailbox) })
}

/// Why a reranker does nothing else.
pub(super) const RANKS_ONLY: &str = "this model scores documents: it makes no embeddings and generates no text";

/// Why an embedder does nothing else.
pub(super) const EMBEDS_ONLY: &str = "this model makes embeddings: it scores no documents and generates no text";

/// Why a model that generates makes no vectors.
pub(super) const GENERATES_ONLY: &str =
    "this model generates text: its file names no pooling, so it makes no embeddings and scores no documents";

/// How the model pools; `None` for one that generates text. An encoder that names no pooling gets the mean.
pub(super) fn pooling(model: &Model) -> Option<Pooling> {
    let architecture = model.metadata("general.architecture")?;
    let named = model.metadata(&format!("{architecture}.pooling_type"));
    let pooling = named.as_deref().and_then(Pooling::from_number);
    pooling.or_else(|| (!model.is_causal()).then_some(Pooling::Mean))
}

/// A query and a document as one text: in the file's own form, else as BERT has it, parted by the model's own tokens.
pub(super) fn rerank_prompt(model: &Model, query: &str, document: &str) -> Result<Vec<Token>, String> {
    if let Some(template) = model.rerank_template() {
        // What the client sent is put in last, so that it cannot name a place of the template.
        let parts = template.split_inclusive("{query}").map(|part| match part.strip_suffix("{query}") {
            Some(before) => before.replace("{document}", document) + query,
            None => part.replace("{document}", document),
        });
        return model.tokenize(&parts.collect::<String>(), true, true);
    }
    let end = model.eos().or_else(|| model.separator()).filter(|_| model.adds_eos());
    let separator = model.separator().filter(|_| model.adds_separator());
    let mut tokens: Vec<Token> = model.bos().filter(|_| model.adds_bos()).into_iter().collect();
    tokens.extend(model.tokenize(query, false, false)?);
    tokens.extend(end);
    tokens.extend(separator);
    tokens.extend(model.tokenize(document, false, false)?);
    // BERT's second part ends with the separator too.
    tokens.extend(end.or(separator));
    Ok(tokens)
}
