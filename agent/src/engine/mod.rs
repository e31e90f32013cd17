//! The engine: one llama.cpp model in this process, several sequences at once.
//!
//! [`Engine`] is a handle; the work is done by one thread (`worker`), which alone touches the llama.cpp context. What
//! to do next is decided by pure modules (`schedule`, `sizing`, `pool`, `prefix`), done by `step`. `ffi` holds the only
//! unsafe code of the project.

mod adapters;
mod budget;
mod capability;
pub mod chat;
mod check;
mod chooser;
mod embed;
mod error;
mod facts;
#[expect(unsafe_code, reason = "llama.cpp is C++; this module alone talks to it")]
mod ffi;
mod gbnf;
mod grammar;
mod host;
mod lines;
mod load;
mod mailbox;
mod measure;
mod media;
mod pool;
mod prefix;
mod request;
mod room;
mod sampling;
mod schedule;
mod schema;
mod sequence;
mod shared;
#[cfg(test)]
mod simulation;
mod sizing;
mod snapshots;
mod speculative;
mod stats;
mod step;
mod stop;
mod trigger;
mod worker;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::{mpsc, watch};

pub use budget::{MAX_BUDGET_TEXT_BYTES, ReasoningBudget};
pub use embed::{EmbedRequest, EmbedTask, Embedded, Embedding, MAX_TEXTS};
pub use error::EngineError;
pub use facts::{Ability, FimTokens, ModelFacts};
pub use lines::LineLimits;
pub use media::{MAX_MEDIA_ALIVE, Media, MediaError, MediaPrompt, Medium, Picture, Sound};
pub use request::{
    CacheKey, FinishReason, GenerateEvent, GenerateRequest, Generation, MAX_TOP_LOGPROBS, PromptProgress, SubmitError,
    Timings, Token, TokenLogprob, TopLogprob, Usage,
};
pub use sampling::{
    DryParams, Grammar, MAX_BIAS_TEXT_BYTES, MAX_LOGIT_BIAS, MAX_SAMPLERS, MAX_SEQUENCE_BREAKER_BYTES,
    MAX_SEQUENCE_BREAKERS, Mirostat, SamplerKind, SamplingParams, Triggers, WHOLE_CONTEXT,
};
pub use stats::{Activity, EngineStats};

use crate::runner::grants::Grants;
use crate::runner::protocol::{
    BatchLoad, BatchReport, EstimateReport, ProbeReport, ResizeReport, RunnerConfig, RunnerReport,
};
use budget::Budget;
use chat::{ChatError, ChatTemplates};
use chooser::Chooser;
use ffi::{Model, Piece, Projector, Sampler};
use grammar::Grammars;
use load::Loaded;
use mailbox::{Mailbox, Waiting};
use media::{Alive, MediaPiece, Names};
use shared::Shared;
use worker::Worker;

/// Version of the llama.cpp that is built in.
#[must_use]
pub fn llama_cpp_version() -> String {
    ffi::version()
}

/// Handle to the engine of this process; clones are cheap. The engine ends when it is shut down, or when the last
/// handle is dropped.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    model: Model,
    facts: ModelFacts,
    /// `None`: the model reads text alone.
    projector: Option<Projector>,
    names: Names,
    alive: Arc<Alive>,
    grammars: Grammars,
    queue: Queue,
    shared: Arc<Shared>,
    report: watch::Receiver<RunnerReport>,
    ended: watch::Receiver<Option<Result<(), EngineError>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Where requests wait: a model generates text, or it makes vectors or scores.
#[derive(Clone)]
enum Queue {
    Generate(Arc<Mailbox>),
    Embed(Arc<Mailbox<embed::Waiting>>),
}

impl Queue {
    fn activity(&self) -> watch::Receiver<Activity> {
        match self {
            Self::Generate(mailbox) => mailbox.activity(),
            Self::Embed(mailbox) => mailbox.activity(),
        }
    }

    fn drain_until(&self, deadline: Instant) {
        match self {
            Self::Generate(mailbox) => mailbox.drain_until(deadline),
            Self::Embed(mailbox) => mailbox.drain_until(deadline),
        }
    }

    /// Dropping those who wait ends them.
    fn end(&self) {
        match self {
            Self::Generate(mailbox) => drop(mailbox.end()),
            Self::Embed(mailbox) => drop(mailbox.end()),
        }
    }
}

impl Engine {
    /// Loads the model, makes the context and warms up. Blocks; `progress` gets 0 to 100.
    pub fn start(config: &RunnerConfig, progress: &(dyn Fn(u8) + Sync)) -> Result<Self, EngineError> {
        Self::start_with(config, None, progress)
    }

    /// The same; `grants` is asked before the context grows.
    pub fn start_with(
        config: &RunnerConfig,
        grants: Option<Arc<dyn Grants>>,
        progress: &(dyn Fn(u8) + Sync),
    ) -> Result<Self, EngineError> {
        let started = Instant::now();
        let queue = usize::try_from(config.traffic.max_queued).unwrap_or(0);
        let milliseconds = || u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let engine = on_a_thread_that_ends(|| {
            let (model, gpu) = load::open(config, progress)?;
            if let Some(pooling) = embed::pooling(&model) {
                let mut loaded = embed::load(config, model, pooling, gpu)?;
                loaded.report.load_milliseconds = milliseconds();
                Self::launch_embedder(loaded, queue, grants)
            } else {
                let mut loaded = load::load(config, model, gpu)?;
                loaded.report.load_milliseconds = milliseconds();
                Self::launch(loaded, queue, grants)
            }
        })?;
        progress(100);
        Ok(engine)
    }

    /// Starts the thread of a model that generates; `queue` requests may wait.
    fn launch(loaded: Loaded, queue: usize, grants: Option<Arc<dyn Grants>>) -> Result<Self, EngineError> {
        let mailbox = Arc::new(Mailbox::new(loaded.plan.parallel as usize, queue));
        let shared = Arc::new(Shared::default());
        let (sender, report) = watch::channel(loaded.report.clone());
        let (model, facts, projector) = (loaded.model.clone(), loaded.facts.clone(), loaded.projector.clone());
        let worker = Worker::new(loaded, Arc::clone(&mailbox), Arc::clone(&shared), sender, grants);
        Self::spawn(model, facts, projector, Queue::Generate(mailbox), shared, report, || worker.run())
    }

    /// The same of one that makes vectors or scores.
    fn launch_embedder(
        loaded: embed::Loaded,
        queue: usize,
        grants: Option<Arc<dyn Grants>>,
    ) -> Result<Self, EngineError> {
        let mailbox = Arc::new(Mailbox::new(loaded.parallel as usize, queue));
        let shared = Arc::new(Shared::default());
        let (sender, report) = watch::channel(loaded.report.clone());
        let (model, facts) = (loaded.model.clone(), loaded.facts.clone());
        let worker = embed::Worker::new(loaded, Arc::clone(&mailbox), Arc::clone(&shared), sender, grants);
        Self::spawn(model, facts, None, Queue::Embed(mailbox), shared, report, || worker.run())
    }

    fn spawn(
        model: Model,
        facts: ModelFacts,
        projector: Option<Projector>,
        queue: Queue,
        shared: Arc<Shared>,
        report: watch::Receiver<RunnerReport>,
        work: impl FnOnce() -> Result<(), EngineError> + Send + 'static,
    ) -> Result<Self, EngineError> {
        let (ended_sender, ended) = watch::channel(None);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn({
                let queue = queue.clone();
                move || {
                    // Says that the engine has ended even when it panics.
                    let mut end = End { queue, ended: ended_sender, result: None };
                    end.result = Some(work());
                }
            })
            .map_err(|error| EngineError::Internal(format!("cannot start a thread: {error}")))?;
        let thread = Mutex::new(Some(thread));
        let (names, alive, grammars) = (Names::default(), Arc::default(), Grammars::default());
        let inner = Inner { model, facts, projector, names, alive, grammars, queue, shared, report, ended, thread };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What is known about the model.
    #[must_use]
    pub fn model(&self) -> &ModelFacts {
        &self.inner.facts
    }

    /// Size and memory as they are now.
    #[must_use]
    pub fn report(&self) -> RunnerReport {
        self.inner.report.borrow().clone()
    }

    /// The same, and every change of it.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<RunnerReport> {
        self.inner.report.clone()
    }

    /// Requests running and waiting, and every change of it.
    #[must_use]
    pub fn activity(&self) -> watch::Receiver<Activity> {
        self.inner.queue.activity()
    }

    /// Compiles the model's chat templates; `None`: it has none.
    #[must_use]
    pub fn chat_templates(&self) -> Option<Result<ChatTemplates, ChatError>> {
        let Inner { model, facts, .. } = &*self.inner;
        let source = facts.chat_template.as_deref()?;
        let replaced = model.chat_template().as_deref() != Some(source);
        Some(ChatTemplates::of_model(model, source, replaced, &facts.bos_text, &facts.eos_text))
    }

    /// Text to tokens. `add_special` puts the model's own first token before it; `parse_special` reads control tokens
    /// such as `<|im_start|>` as such.
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>, EngineError> {
        self.inner.model.tokenize(text, add_special, parse_special).map_err(EngineError::Internal)
    }

    /// What stands in a text where an image or a sound belongs; `None`: the model reads neither. It differs from engine to engine, so
    /// that nobody writes it by accident.
    #[must_use]
    pub fn media_marker(&self) -> Option<&str> {
        self.inner.projector.as_ref().map(Projector::marker)
    }

    /// Samples in a second of the sound that the model reads; `None`: it reads none.
    #[must_use]
    pub fn audio_rate(&self) -> Option<u32> {
        self.inner.projector.as_ref().and_then(Projector::audio_rate)
    }

    /// A text with a marker for each image and sound as a prompt, control tokens read as such. Takes milliseconds for
    /// each, so this belongs on a thread that may block.
    pub fn read(&self, text: &str, add_special: bool, given: &[Medium]) -> Result<MediaPrompt, MediaError> {
        let Inner { projector, names, .. } = &*self.inner;
        let projector = projector.as_ref().ok_or("this model reads text only")?;
        let alive = Alive::take(&self.inner.alive, given.iter().map(Medium::share).sum())?;
        let pieces = Arc::new(projector.split(text, add_special, given)?);
        let (mut tokens, mut media) = (Vec::new(), Vec::new());
        let mut seen: Vec<u32> = vec![0; given.len()];
        for index in 0..pieces.len() {
            match pieces.get(index) {
                Some(Piece::Text(text)) => tokens.extend_from_slice(text),
                Some(Piece::Medium { medium, sound, tokens: count, positions, non_causal }) => {
                    let (digest, number) = match (given.get(medium), seen.get_mut(medium)) {
                        (Some(medium), Some(number)) => (medium.digest(), number),
                        _ => return Err("a piece of no image and no sound".into()),
                    };
                    let name = names.of(digest, *number).ok_or("there are no more names for images and sounds")?;
                    *number += 1;
                    let start = tokens.len();
                    tokens.extend(media::stand_ins(name, count, positions));
                    let pieces = Arc::clone(&pieces);
                    media.push(MediaPiece { pieces, index, name, start, tokens: count, positions, sound, non_causal });
                }
                None => return Err("a piece that there is not".into()),
            }
        }
        Ok(MediaPrompt { tokens, media: Media::new(media, alive) })
    }

    /// Tokens to text; control tokens are left out, bytes that are no UTF-8 become U+FFFD, and tokens that the
    /// vocabulary does not have are nothing.
    #[must_use]
    pub fn detokenize(&self, tokens: &[Token]) -> String {
        let mut bytes = Vec::new();
        for &token in tokens {
            let known = self.inner.model.append_piece(token, false, &mut bytes);
            if let Err(reason) = known {
                tracing::debug!(token, reason, "a token without text");
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token stands for, control tokens as they are written; they may be a part of a character. `None`
    /// for a token that the vocabulary does not have.
    #[must_use]
    pub fn piece(&self, token: Token) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.inner.model.append_piece(token, true, &mut bytes).ok()?;
        Some(bytes)
    }

    /// Puts a request into the queue of a model that generates. One that is [`GenerateRequest::is_dear`] takes milliseconds,
    /// up to a second, before it is there, so this belongs on a thread that may block.
    pub fn submit(&self, mut request: GenerateRequest) -> Result<Generation, SubmitError> {
        let Queue::Generate(mailbox) = &self.inner.queue else {
            let can_rank = self.inner.facts.can(Ability::Rerank);
            return Err(SubmitError::Unsupported(if can_rank { embed::RANKS_ONLY } else { embed::EMBEDS_ONLY }));
        };
        let Inner { model, facts, grammars, .. } = &*self.inner;
        check::check(model, facts.max_tokens, facts.adapters.len(), &request)?;
        if let Some(name) = request.adapter.and_then(|adapter| facts.adapters.get(adapter)) {
            // Its strength is the deployment's, the same for all requests of this engine.
            request.cache.adapters = vec![(name.clone(), 0)];
        }
        let compile = |grammar: &Grammar| {
            let compiled = grammars.compile(model, grammar, !request.ignore_eos);
            compiled.map_err(|reason| SubmitError::InvalidGrammar { field: grammar.field(), reason })
        };
        let constraint = request.grammar.as_ref().map(compile).transpose()?;
        let seed = request.sampling.seed.unwrap_or_else(random_seed);
        let sampler = Sampler::new(model, &request.sampling, seed, facts.max_tokens);
        let mut chooser = Chooser::new(sampler.map_err(SubmitError::Internal)?, constraint);
        if let Some(budget) = request.reasoning.take() {
            chooser = chooser.within(Budget::new(budget), model.clone());
        }
        let mailbox = Arc::clone(mailbox);
        let (sender, events) = mpsc::channel(sequence::CHANNEL + 2);
        mailbox.submit(Waiting { request, chooser, events: sender, submitted: Instant::now() })?;
        Ok(Generation { events, mailbox, finished: false })
    }

    /// Puts a request into the queue of a model that makes vectors or scores.
    pub fn embed(&self, request: EmbedRequest) -> Result<Embedding, SubmitError> {
        let Queue::Embed(mailbox) = &self.inner.queue else {
            return Err(SubmitError::Unsupported(embed::GENERATES_ONLY));
        };
        let facts = &self.inner.facts;
        embed::submit(&self.inner.model, facts.can(Ability::Rerank), facts.max_tokens, mailbox, request)
    }

    /// A query and a document as the one text that a reranker scores.
    pub fn rerank_prompt(&self, query: &str, document: &str) -> Result<Vec<Token>, EngineError> {
        embed::rerank_prompt(&self.inner.model, query, document).map_err(EngineError::Internal)
    }

    /// Asks for a context of at most `cells` cells, or of what the running requests need if that is more; prefixes go to
    /// host memory. Returns at once: [`Self::watch`] tells the size. A context of fixed size stays as it is.
    pub fn shrink(&self, cells: u32) {
        match &self.inner.queue {
            Queue::Generate(mailbox) => mailbox.ask_shrink(cells),
            Queue::Embed(mailbox) => mailbox.ask_shrink(cells),
        }
    }

    /// What the engine is doing and has done.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let Activity { running, waiting } = *self.inner.queue.activity().borrow();
        EngineStats { running, waiting, ..self.inner.shared.stats() }
    }

    /// Takes no more requests, lets those that are here end until `deadline`, then ends the engine's thread. Blocks. A
    /// second call can only shorten the time.
    pub fn shutdown(&self, deadline: Instant) {
        self.inner.queue.drain_until(deadline);
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the engine's thread panicked");
        }
    }

    /// Resolves when the engine's thread has ended; the error says why it could not go on.
    pub async fn ended(&self) -> Result<(), EngineError> {
        let mut ended = self.inner.ended.clone();
        let known = ended.wait_for(Option::is_some).await.map(|result| result.clone());
        known.ok().flatten().unwrap_or_else(|| Err(EngineError::Internal("the engine's thread is gone".to_owned())))
    }
}

/// Runs `work`, which computes, on a thread of its own.
///
/// OpenMP leaves its helpers with the thread that it computed on. While those live beside the helpers of the engine's
/// thread there are more of them than CPUs, and OpenMP puts them to sleep at every barrier, hundreds of times a token,
/// where it else waits busily.
fn on_a_thread_that_ends<T: Send>(work: impl FnOnce() -> Result<T, EngineError> + Send) -> Result<T, EngineError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("load".to_owned()).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| EngineError::Internal(format!("cannot start a thread: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(EngineError::Internal("loading the model panicked".to_owned())))
    })
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nobody can ask any more; the thread is not waited for, because this may be on a runtime.
        self.queue.drain_until(Instant::now());
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Engine").field("model", &self.inner.facts.name).finish_non_exhaustive()
    }
}

/// Tells everybody that the engine's thread has ended.
struct End {
    queue: Queue,
    ended: watch::Sender<Option<Result<(), EngineError>>>,
    result: Option<Result<(), EngineError>>,
}

impl Drop for End {
    fn drop(&mut self) {
        let panicked = || Err(EngineError::Internal("the engine's thread panicked".to_owned()));
        // Empty but for a panic; dropping the rest ends their streams.
        self.queue.end();
        self.ended.send_replace(Some(self.result.take().unwrap_or_else(panicked)));
    }
}

fn random_seed() -> u32 {
    // The standard library's keys are random and differ each time.
    let number = RandomState::new().build_hasher().finish();
    u32::try_from(number & u64::from(u32::MAX)).unwrap_or_default()
}

/// Keeps llama.cpp from looking for GPUs. Called by a process that has one thread and none of llama.cpp yet.
pub(crate) fn without_gpus() {
    ffi::without_gpus();
}

/// The devices that llama.cpp sees in this process, the CPU last. Opens them, so only a short-lived process should ask.
pub fn probe() -> Result<ProbeReport, EngineError> {
    load::probe()
}

/// What [`Engine::start`] would take of the devices that `config` grants, by llama.cpp's dry run: no weights are read.
pub fn estimate(config: &RunnerConfig) -> Result<EstimateReport, EngineError> {
    load::estimate(config)
}

/// What a change of the context's size costs, beside llama.cpp's bare calls: from the size that `config` begins with to
/// the largest that it allows.
pub fn measure_resizes(config: &RunnerConfig) -> Result<ResizeReport, EngineError> {
    measure::resizes(config)
}

/// How fast llama.cpp's bare calls are at what some clients ask for.
pub fn measure_batches(asked: &BatchLoad) -> Result<BatchReport, EngineError> {
    measure::batches(asked)
}

#[cfg(test)]
mod tests;
