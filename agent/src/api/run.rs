//! One request's generations, from submission to the answer, streamed or whole. Knows no dialect.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use http::{HeaderValue, header};

use super::ApiState;
use super::dialect::{ChoiceJob, Dialect, End, Finish, Job, Piece, Tally};
use super::error::ApiError;
use super::frames::Frames;
use super::intake::Visit;
use super::output::{Delta, Output, OutputParser};
use super::overflow::{self, TRUNCATED_TOKENS, Truncation};
use crate::engine::{FinishReason, GenerateEvent, PromptProgress};
use crate::metrics::{EndReason, RequestMetrics};

/// Submits the job and answers.
pub(crate) async fn answer(state: &ApiState, visit: Visit, job: Job) -> Result<Response, ApiError> {
    let Job { mut dialect, choices, per_prompt, stream, truncation } = job;
    let prompt_tokens =
        choices.iter().step_by(per_prompt.max(1)).map(|choice| choice.request.prompt.len() as u64).sum();
    let prompt_param = dialect.prompt_param();
    dialect.asked(state, &choices, per_prompt);
    let run = if choices.iter().any(|choice| choice.request.is_dear()) {
        state.prepare(move |state| Run::submit(state, visit, choices, per_prompt, prompt_param)).await?
    } else {
        Run::submit(state, visit, choices, per_prompt, prompt_param)?
    };
    if let Some(truncation) = &truncation {
        declare(state, &run.visit.request_id, truncation);
        dialect.declare(truncation);
    }
    let answered =
        if stream { Stream::new(run, dialect, prompt_tokens).respond().await } else { run.collect(dialect).await };
    let mut response = answered?;
    if let Some(truncation) = &truncation {
        response.headers_mut().insert(TRUNCATED_TOKENS, truncation.tokens().into());
    }
    Ok(response)
}

/// Counts a truncation and writes it down.
fn declare(state: &ApiState, request_id: &str, truncation: &Truncation) {
    let Truncation { policy, tokens_before, limit, tokens_after, dropped_messages } = *truncation;
    state.metrics().truncated(policy);
    tracing::info!(
        %request_id,
        model = state.full_name(),
        policy = overflow::word(policy),
        tokens_before,
        limit,
        tokens_after,
        dropped_messages,
        "the prompt was truncated"
    );
}

struct Choice {
    metrics: RequestMetrics,
    parser: Box<dyn OutputParser>,
    called_tools: bool,
}

/// What a run does next.
enum Progress {
    /// More of a choice's prompt has been read.
    Prompt(usize, PromptProgress),
    Piece(Piece),
    /// A choice has ended; the last of its text came as a piece before.
    Ended(usize),
    /// All have.
    Complete,
}

struct Run {
    state: ApiState,
    deadline: Instant,
    choices: Vec<Choice>,
    tally: Tally,
    /// Dropping it cancels what still runs.
    events: SelectAll<BoxStream<'static, (usize, GenerateEvent)>>,
    /// A choice whose end is known and not yet said, because its parser held text back.
    ending: Option<usize>,
    outcome: &'static str,
    visit: Visit,
}

impl Run {
    fn submit(
        state: &ApiState,
        visit: Visit,
        jobs: Vec<ChoiceJob>,
        per_prompt: usize,
        prompt_param: &'static str,
    ) -> Result<Self, ApiError> {
        let mut choices = Vec::with_capacity(jobs.len());
        let mut events = SelectAll::new();
        for (index, ChoiceJob { request, parser }) in jobs.into_iter().enumerate() {
            // An error drops the generations submitted before, which cancels them.
            let generation = state
                .engine()
                .submit(request)
                .map_err(|error| ApiError::from_submit(&error, prompt_param, state.retry_after()))?;
            events.push(generation.map(move |event| (index, event)).boxed());
            let metrics = RequestMetrics::new(Arc::clone(state.metrics()), visit.arrived);
            choices.push(Choice { metrics, parser, called_tools: false });
        }
        Ok(Self {
            deadline: visit.arrived + state.request_timeout(),
            state: state.clone(),
            tally: Tally::new(choices.len(), per_prompt),
            choices,
            events,
            ending: None,
            outcome: "abort",
            visit,
        })
    }

    /// What comes next. Cancellation safe.
    async fn next(&mut self) -> Result<Progress, ApiError> {
        if let Some(choice) = self.ending.take() {
            return Ok(Progress::Ended(choice));
        }
        let next = tokio::time::timeout_at(self.deadline.into(), self.events.next());
        let Ok(event) = next.await else {
            return Err(self.fail(ApiError::request_timeout(self.state.request_timeout().as_secs())));
        };
        let Some((index, event)) = event else {
            if !self.tally.all_ended() {
                return Err(self.fail(ApiError::internal("the engine ended before the answer was complete")));
            }
            self.outcome = "done";
            return Ok(Progress::Complete);
        };
        self.take(index, event).map_err(|error| self.fail(error))
    }

    fn take(&mut self, index: usize, event: GenerateEvent) -> Result<Progress, ApiError> {
        let now = Instant::now();
        let Some(choice) = self.choices.get_mut(index) else {
            return Err(ApiError::internal("an event of a choice that is not there"));
        };
        match event {
            GenerateEvent::Token { text, token, logprob } => {
                choice.metrics.token(now);
                let deltas = choice.parse(|parser| parser.push(&text))?;
                Ok(Progress::Piece(Piece { choice: index, deltas, token: Some(token), logprob }))
            }
            GenerateEvent::Progress(progress) => Ok(Progress::Prompt(index, progress)),
            GenerateEvent::Done { finish_reason, stop, usage, timings } => {
                choice.metrics.done(now, finish_reason, &usage, &timings);
                let deltas = choice.parse(|parser| parser.finish())?;
                let finish = match finish_reason {
                    FinishReason::Stop if choice.called_tools => Finish::ToolCalls,
                    FinishReason::Stop => Finish::Stop,
                    FinishReason::Length => Finish::Length,
                };
                self.tally.end(index, End { finish, stop, usage, timings });
                if deltas.is_empty() {
                    return Ok(Progress::Ended(index));
                }
                self.ending = Some(index);
                Ok(Progress::Piece(Piece { choice: index, deltas, token: None, logprob: None }))
            }
            GenerateEvent::Failed(error) => Err(ApiError::from_engine(&error, self.state.retry_after())),
        }
    }

    /// Ends what still runs.
    fn fail(&mut self, error: ApiError) -> ApiError {
        self.events.clear();
        self.outcome = "error";
        for (index, choice) in self.choices.iter_mut().enumerate() {
            if self.tally.of(index).is_none() {
                choice.metrics.end(EndReason::Error);
            }
        }
        error
    }

    /// The whole answer at once.
    async fn collect(mut self, mut dialect: Box<dyn Dialect>) -> Result<Response, ApiError> {
        let mut outputs = vec![Output::default(); self.choices.len()];
        loop {
            match self.next().await? {
                Progress::Piece(Piece { choice, deltas, token, logprob }) => {
                    let Some(output) = outputs.get_mut(choice) else { continue };
                    output.tokens.extend(token);
                    for delta in deltas {
                        output.push(delta);
                    }
                    output.logprobs.extend(logprob);
                }
                Progress::Prompt(..) | Progress::Ended(_) => {}
                Progress::Complete => break,
            }
        }
        let body = dialect.whole(&outputs, &self.tally).map_err(|error| ApiError::internal(error.to_string()))?;
        let mut response = Response::new(Body::from(body));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }
}

impl Choice {
    fn parse(
        &mut self,
        step: impl FnOnce(&mut dyn OutputParser) -> Result<Vec<Delta>, ApiError>,
    ) -> Result<Vec<Delta>, ApiError> {
        let deltas = step(self.parser.as_mut())?;
        self.called_tools |= deltas.iter().any(|delta| matches!(delta, Delta::ToolCall { .. }));
        Ok(deltas)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let (usage, timings) = self.tally.totals();
        tracing::info!(
            request_id = %self.visit.request_id,
            outcome = self.outcome,
            choices = self.choices.len(),
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = timings.cache_n,
            completion_tokens = usage.completion_tokens,
            queue_ms = timings.queue_ms,
            time_to_first_token_ms = timings.time_to_first_token_ms,
            seconds = self.visit.arrived.elapsed().as_secs_f64(),
            "request ended"
        );
    }
}

/// A run as frames.
struct Stream {
    run: Run,
    dialect: Box<dyn Dialect>,
    prompt_tokens: u64,
    ping: Duration,
    /// Frames that were made together and are sent one by one.
    frames: Frames,
    open: bool,
}

impl Stream {
    fn new(run: Run, dialect: Box<dyn Dialect>, prompt_tokens: u64) -> Self {
        let ping = run.state.ping_interval();
        Self { run, dialect, prompt_tokens, ping, frames: Frames::default(), open: true }
    }

    /// Waits for the first token, at most one ping interval, so that what goes wrong at once still has its own status.
    async fn respond(mut self) -> Result<Response, ApiError> {
        let first = match tokio::time::timeout(self.ping, self.run.next()).await {
            Ok(first) => Some(first?),
            Err(_) => None,
        };
        let started = self.dialect.started(self.prompt_tokens, &mut self.frames);
        self.check(started);
        match first {
            Some(progress) => self.push(progress),
            None => self.ping(),
        }
        let form = self.dialect.form();
        let frames = futures::stream::unfold(self, |mut stream| async move {
            let frame = stream.frame().await?;
            Some((Ok::<_, std::convert::Infallible>(frame), stream))
        });
        Ok(form.stream(Body::from_stream(frames)))
    }

    async fn frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.pop() {
                return Some(frame);
            }
            if !self.open {
                return None;
            }
            match tokio::time::timeout(self.ping, self.run.next()).await {
                Err(_) => self.ping(),
                Ok(Ok(progress)) => self.push(progress),
                Ok(Err(error)) => self.fail(&error),
            }
        }
    }

    /// Makes the frames for what came.
    fn push(&mut self, progress: Progress) {
        let Self { run, dialect, frames, .. } = self;
        let done = match progress {
            Progress::Prompt(choice, progress) => dialect.progress(choice, &progress, frames),
            Progress::Piece(piece) => dialect.piece(piece, frames),
            Progress::Ended(choice) => dialect.choice_ended(choice, &run.tally, frames),
            Progress::Complete => {
                self.open = false;
                dialect.ended(&run.tally, frames)
            }
        };
        self.check(done);
    }

    fn ping(&mut self) {
        self.frames.raw(self.dialect.ping());
    }

    fn check(&mut self, done: Result<(), serde_json::Error>) {
        if let Err(error) = done {
            let error = self.run.fail(ApiError::internal(error.to_string()));
            self.fail(&error);
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.open = false;
        self.dialect.failed(error, &mut self.frames);
    }
}
