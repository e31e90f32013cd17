//! The seam between a run, which drives generations, and the APIs: a [`Dialect`] turns what was generated into bytes.

use bytes::Bytes;

use super::ApiState;
use super::error::ApiError;
use super::form::Form;
use super::frames::Frames;
use super::output::{Delta, Output, OutputParser};
use super::overflow::Truncation;
use super::wire::{self, TimingsBody, UsageBody};
use crate::engine::{GenerateRequest, PromptProgress, Timings, Token, TokenLogprob, Usage};

/// What is to be generated, prompts and parameters checked, and how it will be said.
pub(crate) struct Job {
    /// The API that asks.
    pub(crate) dialect: Box<dyn Dialect>,
    /// The choices, in the order of their indices; at least one.
    pub(crate) choices: Vec<ChoiceJob>,
    /// Choices of the same prompt.
    pub(crate) per_prompt: usize,
    /// Whether the client reads frames.
    pub(crate) stream: bool,
    /// What was taken from the prompts so that they fit.
    pub(crate) truncation: Option<Truncation>,
}

/// One choice.
pub(crate) struct ChoiceJob {
    pub(crate) request: GenerateRequest,
    pub(crate) parser: Box<dyn OutputParser>,
}

/// How one of the APIs says what a run generates. One of these answers one request; `whole` is for an answer at once,
/// the others for a stream, in the order in which they stand here.
pub(crate) trait Dialect: Send {
    /// Errors, framing and signs of life.
    fn form(&self) -> Form;

    /// The parameter that holds the prompt, for errors about it.
    fn prompt_param(&self) -> &'static str;

    /// What the engine is about to be asked; before all else.
    fn asked(&mut self, state: &ApiState, choices: &[ChoiceJob], per_prompt: usize) {
        let _ = (state, choices, per_prompt);
    }

    /// Something was taken from the prompts, which the answer has to say. Before all that is said, and only then.
    fn declare(&mut self, truncation: &Truncation);

    /// The body of a whole answer; `choices` by index.
    fn whole(&mut self, choices: &[Output], tally: &Tally) -> Result<Vec<u8>, serde_json::Error>;

    /// The request was taken; nothing was generated yet. `prompt_tokens`: of all prompts.
    fn started(&mut self, prompt_tokens: u64, frames: &mut Frames) -> Result<(), serde_json::Error> {
        let _ = (prompt_tokens, frames);
        Ok(())
    }

    /// More of a choice's prompt has been read, where the request asked to be told.
    fn progress(
        &mut self,
        choice: usize,
        progress: &PromptProgress,
        frames: &mut Frames,
    ) -> Result<(), serde_json::Error> {
        let _ = (choice, progress, frames);
        Ok(())
    }

    /// A choice said something.
    fn piece(&mut self, piece: Piece, frames: &mut Frames) -> Result<(), serde_json::Error>;

    /// A choice has ended; `tally` knows how.
    fn choice_ended(&mut self, choice: usize, tally: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error>;

    /// All choices have.
    fn ended(&mut self, tally: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error>;

    /// What is sent when nothing else was for a while.
    fn ping(&self) -> Bytes {
        self.form().ping()
    }

    /// The run failed; nothing follows.
    fn failed(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.raw(self.form().error_frame(error, 0));
    }
}

/// What came of one token of one choice.
pub(crate) struct Piece {
    /// Index of the choice.
    pub(crate) choice: usize,
    /// Empty when the text is held back, or when there is none.
    pub(crate) deltas: Vec<Delta>,
    /// The token that completed the text; `None` for text that was held back until the end.
    pub(crate) token: Option<Token>,
    /// Where it was asked for.
    pub(crate) logprob: Option<TokenLogprob>,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model ended, or a stop text came.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
    /// It ended with calls of tools.
    ToolCalls,
}

/// How a choice ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) finish: Finish,
    /// The stop text that came: one of the client's, or of the model's format.
    pub(crate) stop: Option<String>,
    pub(crate) usage: Usage,
    pub(crate) timings: Timings,
}

/// How the choices of a run ended, those that have.
#[derive(Debug)]
pub(crate) struct Tally {
    per_prompt: usize,
    ends: Vec<Option<End>>,
}

impl Tally {
    pub(crate) fn new(choices: usize, per_prompt: usize) -> Self {
        Self { per_prompt, ends: vec![None; choices] }
    }

    pub(crate) fn end(&mut self, choice: usize, end: End) {
        if let Some(slot) = self.ends.get_mut(choice) {
            *slot = Some(end);
        }
    }

    pub(crate) fn of(&self, choice: usize) -> Option<&End> {
        self.ends.get(choice)?.as_ref()
    }

    pub(crate) fn all_ended(&self) -> bool {
        self.ends.iter().all(Option::is_some)
    }

    /// OpenAI's `finish_reason` of a choice; `None` while it runs.
    pub(crate) fn finish(&self, choice: usize) -> Option<Finish> {
        self.of(choice).map(|end| end.finish)
    }

    /// Sums over the choices that have ended.
    pub(crate) fn totals(&self) -> (UsageBody, TimingsBody) {
        let ended = |end: &Option<End>| end.as_ref().map_or_else(Default::default, |end| (end.usage, end.timings));
        let ended: Vec<_> = self.ends.iter().map(ended).collect();
        wire::totals(&ended, self.per_prompt)
    }
}

/// What a dialect says, for tests of dialects.
#[cfg(test)]
pub(crate) mod testing {
    use serde_json::Value;

    use super::*;

    /// A choice that ended so after 10 prompt tokens, 4 of them cached, and 6 more.
    pub(crate) fn ended(finish: Finish) -> Tally {
        let mut tally = Tally::new(1, 1);
        let usage = Usage { prompt_tokens: 10, cached_tokens: 4, completion_tokens: 6 };
        tally.end(0, End { finish, stop: Some("X".to_owned()), usage, timings: Timings::default() });
        tally
    }

    /// The frames of a stream in which each delta comes by itself.
    pub(crate) fn streamed(dialect: &mut dyn Dialect, deltas: Vec<Delta>, finish: Finish) -> Vec<String> {
        let (mut frames, tally) = (Frames::default(), ended(finish));
        dialect.started(10, &mut frames).unwrap();
        for delta in deltas {
            let piece = Piece { choice: 0, deltas: vec![delta], token: None, logprob: None };
            dialect.piece(piece, &mut frames).unwrap();
        }
        dialect.choice_ended(0, &tally, &mut frames).unwrap();
        dialect.ended(&tally, &mut frames).unwrap();
        std::iter::from_fn(|| frames.pop()).map(|frame| String::from_utf8(frame.to_vec()).unwrap()).collect()
    }

    /// The data of events, each of which is named as its type says.
    pub(crate) fn events(frames: &[String]) -> Vec<Value> {
        let one = |frame: &String| {
            let (name, data) = frame.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data.strip_suffix("\n\n").unwrap()).unwrap();
            assert_eq!(data["type"], name);
            data
        };
        frames.iter().map(one).collect()
    }

    /// Reasoning, text and two calls.
    pub(crate) fn everything() -> Vec<Delta> {
        let text = str::to_owned;
        let call = |index, id, name| Delta::ToolCall { index, id: text(id), name: text(name) };
        let more = |index, json| Delta::ToolArguments { index, json: text(json) };
        vec![
            Delta::Reasoning(text("h")),
            Delta::Reasoning(text("m")),
            Delta::Content(text("")),
            Delta::Content(text("Hel")),
            Delta::Content(text("lo")),
            call(0, "c0", "f"),
            more(0, "{\"a\":"),
            more(0, "1}"),
            call(1, "c1", "g"),
            more(1, "{}"),
        ]
    }
}
