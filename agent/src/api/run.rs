//! One request's generations, from submission to the answer, streamed or whole.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;
use super::wire::{self, Answer, ChoiceBody, FINGERPRINT, Message, Said, Shape, UsageSlot};
use super::{ApiState, sse};
use crate::engine::{FinishReason, GenerateEvent, GenerateRequest, Timings, TokenLogprob, Usage};
use crate::metrics::{EndReason, RequestMetrics};

/// What is to be generated, prompts and parameters checked.
pub(crate) struct Job {
    pub(crate) shape: Shape,
    /// One for each choice, in the order of their indices.
    pub(crate) requests: Vec<GenerateRequest>,
    /// Choices of the same prompt.
    pub(crate) per_prompt: usize,
    /// Texts that stand before the answers, by choice; empty unless `echo` was asked for.
    pub(crate) echoes: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) request_id: String,
    pub(crate) arrived: Instant,
    /// Held until the answer is complete.
    pub(crate) admission: OwnedSemaphorePermit,
}

/// Submits the job and answers.
pub(crate) async fn answer(state: &ApiState, job: Job) -> Result<Response, ApiError> {
    let stream = job.stream;
    let run = Run::submit(state, job)?;
    if stream { Stream::new(run).respond().await } else { run.collect().await }
}

struct Choice {
    metrics: RequestMetrics,
    text: String,
    /// Characters said so far, for the offsets of log-probabilities.
    said: usize,
    logprobs: Vec<TokenLogprob>,
    end: Option<(FinishReason, Usage, Timings)>,
}

/// What a generation said.
struct Progress {
    index: usize,
    text: String,
    logprob: Option<TokenLogprob>,
    end: Option<FinishReason>,
}

struct Run {
    state: ApiState,
    shape: Shape,
    id: String,
    request_id: String,
    created: u64,
    per_prompt: usize,
    include_usage: bool,
    wants_logprobs: bool,
    echoes: Vec<String>,
    arrived: Instant,
    deadline: Instant,
    choices: Vec<Choice>,
    /// Dropping it cancels what still runs.
    events: SelectAll<BoxStream<'static, (usize, GenerateEvent)>>,
    outcome: &'static str,
    _admission: OwnedSemaphorePermit,
}

impl Run {
    fn submit(state: &ApiState, job: Job) -> Result<Self, ApiError> {
        let Job { shape, requests, per_prompt, echoes, stream: _, include_usage, request_id, arrived, admission } = job;
        let wants_logprobs = requests.iter().any(|request| request.logprobs.is_some());
        let mut choices = Vec::with_capacity(requests.len());
        let mut events = SelectAll::new();
        for (index, request) in requests.into_iter().enumerate() {
            // An error drops the generations submitted before, which cancels them.
            let generation = state
                .engine()
                .submit(request)
                .map_err(|error| ApiError::from_submit(&error, shape.prompt_param(), state.retry_after()))?;
            events.push(generation.map(move |event| (index, event)).boxed());
            choices.push(Choice {
                metrics: RequestMetrics::new(Arc::clone(state.metrics()), arrived),
                text: String::new(),
                said: 0,
                logprobs: Vec::new(),
                end: None,
            });
        }
        Ok(Self {
            id: format!("{}{}", shape.id_prefix(), uuid::Uuid::new_v4().simple()),
            request_id,
            created: unix_seconds(),
            deadline: arrived + state.request_timeout(),
            state: state.clone(),
            shape,
            per_prompt,
            include_usage,
            wants_logprobs,
            echoes,
            arrived,
            choices,
            events,
            outcome: "abort",
            _admission: admission,
        })
    }

    /// What comes next; `None` when all choices have ended. Cancellation safe.
    async fn next(&mut self) -> Result<Option<Progress>, ApiError> {
        let next = tokio::time::timeout_at(self.deadline.into(), self.events.next());
        let Ok(event) = next.await else {
            return Err(self.fail(ApiError::request_timeout(self.state.request_timeout().as_secs())));
        };
        let Some((index, event)) = event else {
            if self.choices.iter().any(|choice| choice.end.is_none()) {
                return Err(self.fail(ApiError::internal("the engine ended before the answer was complete")));
            }
            self.outcome = "done";
            return Ok(None);
        };
        let now = Instant::now();
        let Some(choice) = self.choices.get_mut(index) else { return Ok(None) };
        match event {
            GenerateEvent::Token { text, token: _, logprob } => {
                choice.metrics.token(now);
                Ok(Some(Progress { index, text, logprob, end: None }))
            }
            GenerateEvent::Done { finish_reason, usage, timings } => {
                choice.metrics.done(now, finish_reason, &usage, &timings);
                choice.end = Some((finish_reason, usage, timings));
                Ok(Some(Progress { index, text: String::new(), logprob: None, end: Some(finish_reason) }))
            }
            GenerateEvent::Failed(error) => {
                let error = ApiError::from_engine(&error, self.state.retry_after());
                Err(self.fail(error))
            }
        }
    }

    /// Ends what still runs.
    fn fail(&mut self, error: ApiError) -> ApiError {
        self.events.clear();
        self.outcome = "error";
        for choice in self.choices.iter_mut().filter(|choice| choice.end.is_none()) {
            choice.metrics.end(EndReason::Error);
        }
        error
    }

    fn totals(&self) -> (wire::UsageBody, wire::TimingsBody) {
        let ended = |choice: &Choice| choice.end.map_or_else(Default::default, |(_, usage, timings)| (usage, timings));
        let ended: Vec<_> = self.choices.iter().map(ended).collect();
        wire::totals(&ended, self.per_prompt)
    }

    fn echo(&self, index: usize) -> &str {
        self.echoes.get(index).map_or("", String::as_str)
    }

    fn head<'a>(&'a self, streamed: bool, choices: Vec<ChoiceBody<'a>>) -> Answer<'a> {
        Answer {
            id: &self.id,
            object: self.shape.object(streamed),
            created: self.created,
            model: self.state.served_name(),
            system_fingerprint: FINGERPRINT,
            choices,
            usage: None,
            timings: None,
        }
    }

    /// The whole answer at once.
    async fn collect(mut self) -> Result<Response, ApiError> {
        for index in 0..self.choices.len() {
            let echo = self.echo(index).to_owned();
            self.choices[index].text = echo;
        }
        while let Some(Progress { index, text, logprob, end: _ }) = self.next().await? {
            let Some(choice) = self.choices.get_mut(index) else { continue };
            choice.text.push_str(&text);
            choice.logprobs.extend(logprob);
        }
        let (usage, timings) = self.totals();
        let choices = self.choices.iter().enumerate().map(|(index, choice)| ChoiceBody {
            index,
            said: match self.shape {
                Shape::Chat => Said::Message(Message { role: Some("assistant"), content: Some(&choice.text) }),
                Shape::Text => Said::Text(&choice.text),
            },
            logprobs: self.wants_logprobs.then(|| wire::logprobs(self.shape, &choice.logprobs, 0)),
            finish_reason: choice.end.map(|(reason, _, _)| wire::finish_word(reason)),
        });
        let choices = choices.collect();
        let mut answer = self.head(false, choices);
        answer.usage = Some(UsageSlot::Now(usage));
        answer.timings = Some(timings);
        Ok(Json(answer).into_response())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let (usage, timings) = self.totals();
        tracing::info!(
            request_id = %self.request_id,
            outcome = self.outcome,
            choices = self.choices.len(),
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = timings.cache_n,
            completion_tokens = usage.completion_tokens,
            queue_ms = timings.queue_ms,
            time_to_first_token_ms = timings.time_to_first_token_ms,
            seconds = self.arrived.elapsed().as_secs_f64(),
            "request ended"
        );
    }
}

/// A run as server-sent events.
struct Stream {
    run: Run,
    ping: Duration,
    /// Events that were made together and are sent one by one.
    frames: VecDeque<Bytes>,
    begun: Vec<bool>,
    open: bool,
}

impl Stream {
    fn new(run: Run) -> Self {
        let begun = vec![false; run.choices.len()];
        Self { ping: run.state.ping_interval(), run, frames: VecDeque::new(), begun, open: true }
    }

    /// Waits for the first token, at most one ping interval, so that what goes wrong at once still has its own status.
    async fn respond(mut self) -> Result<Response, ApiError> {
        match tokio::time::timeout(self.ping, self.run.next()).await {
            Ok(Ok(progress)) => self.push(progress),
            Ok(Err(error)) => return Err(error),
            Err(_) => self.frames.push_back(sse::PING),
        }
        let frames = futures::stream::unfold(self, |mut stream| async move {
            let frame = stream.frame().await?;
            Some((Ok::<_, std::convert::Infallible>(frame), stream))
        });
        Ok(sse::response(Body::from_stream(frames)))
    }

    async fn frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Some(frame);
            }
            if !self.open {
                return None;
            }
            match tokio::time::timeout(self.ping, self.run.next()).await {
                Err(_) => return Some(sse::PING),
                Ok(Ok(progress)) => self.push(progress),
                Ok(Err(error)) => {
                    self.open = false;
                    self.frames.push_back(sse::error(&error));
                }
            }
        }
    }

    /// Makes the events for what came; `None` is the end.
    fn push(&mut self, progress: Option<Progress>) {
        let Some(Progress { index, text, logprob, end }) = progress else {
            self.open = false;
            if self.run.include_usage {
                let (usage, timings) = self.run.totals();
                let mut last = self.run.head(true, Vec::new());
                last.usage = Some(UsageSlot::Now(usage));
                last.timings = Some(timings);
                let frame = sse::data(&last);
                self.push_frame(frame);
            }
            self.frames.push_back(sse::DONE);
            return;
        };
        if self.begun.get(index) == Some(&false) {
            self.begun[index] = true;
            let echo = self.run.echo(index).to_owned();
            match self.run.shape {
                Shape::Chat => self.chunk(index, Message { role: Some("assistant"), content: Some("") }, None, None),
                Shape::Text if echo.is_empty() => {}
                Shape::Text => self.chunk(index, Message { role: None, content: Some(&echo) }, None, None),
            }
        }
        if !text.is_empty() || logprob.is_some() {
            self.chunk(index, Message { role: None, content: Some(&text) }, logprob.as_ref(), None);
            if let Some(choice) = self.run.choices.get_mut(index) {
                choice.said += text.chars().count();
            }
        }
        if let Some(reason) = end {
            self.chunk(index, Message::default(), None, Some(reason));
        }
    }

    fn chunk(&mut self, index: usize, delta: Message<'_>, logprob: Option<&TokenLogprob>, end: Option<FinishReason>) {
        let run = &self.run;
        let offset = run.echo(index).chars().count() + run.choices.get(index).map_or(0, |choice| choice.said);
        let said = match run.shape {
            Shape::Chat => Said::Delta(delta),
            Shape::Text => Said::Text(delta.content.unwrap_or_default()),
        };
        let logprobs = logprob.map(|logprob| wire::logprobs(run.shape, std::slice::from_ref(logprob), offset));
        let finish_reason = end.map(wire::finish_word);
        let choices = vec![ChoiceBody { index, said, logprobs, finish_reason }];
        let mut chunk = Answer {
            id: &run.id,
            object: run.shape.object(true),
            created: run.created,
            model: run.state.served_name(),
            system_fingerprint: FINGERPRINT,
            choices,
            usage: run.include_usage.then_some(UsageSlot::Later),
            timings: None,
        };
        // Without a chunk for usage, the last one of all tells the timings, as llama-server's does.
        if end.is_some() && !run.include_usage && run.choices.iter().all(|choice| choice.end.is_some()) {
            chunk.timings = Some(run.totals().1);
        }
        let frame = sse::data(&chunk);
        self.push_frame(frame);
    }

    fn push_frame(&mut self, frame: Result<Bytes, serde_json::Error>) {
        match frame {
            Ok(frame) => self.frames.push_back(frame),
            Err(error) => {
                self.open = false;
                self.frames.push_back(sse::error(&ApiError::internal(error.to_string())));
            }
        }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
