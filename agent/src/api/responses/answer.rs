//! What Responses says: a response of output items, whole or event by event.

use std::time::Instant;

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::{Map, Value, json};

use super::super::ApiState;
use super::super::dialect::{Dialect, Finish, Piece, Tally};
use super::super::error::ApiError;
use super::super::form::Form;
use super::super::frames::Frames;
use super::super::live::Live;
use super::super::output::{Delta, Output, ToolCall};
use super::super::overflow::Truncation;
use super::super::params::Params;
use super::super::wire::{self, TimingsBody};
use super::request::Echo;
use crate::engine::{PromptProgress, TokenLogprob};

/// Answers one request in the terms of Responses.
pub(super) struct Responses {
    id: String,
    created: u64,
    model: String,
    echo: Map<String, Value>,
    live: Live,
    tells_timings: bool,
    /// What was taken from the prompt.
    truncation: Option<Truncation>,

    /// Number of the next event.
    sequence: u64,
    /// Items that have ended.
    items: Vec<Value>,
    open: Option<Item>,
    /// How the choice ended, until the response does.
    status: &'static str,
}

/// The item that is being said.
struct Item {
    id: String,
    kind: Kind,
    /// What it said so far: text, reasoning or arguments.
    text: String,
    logprobs: Vec<TokenLogprob>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Message,
    Reasoning,
    Call { index: u32, call_id: String, name: String },
}

type Done = Result<(), serde_json::Error>;

impl Responses {
    pub(super) fn new(state: &ApiState, echo: Echo, params: &Params) -> Self {
        let Echo(mut echo) = echo;
        let overflow = params.overflow.unwrap_or(state.overflow());
        let truncation = if overflow == OverflowPolicy::Reject { "disabled" } else { "auto" };
        echo.insert("truncation".to_owned(), truncation.into());
        Self {
            id: format!("resp_{}", uuid::Uuid::new_v4().simple()),
            created: super::super::unix_seconds(),
            model: state.served_name().to_owned(),
            live: Live::new(params, Instant::now()),
            tells_timings: params.timings_per_token,
            echo,
            truncation: None,
            sequence: 0,
            items: Vec::new(),
            open: None,
            status: "completed",
        }
    }

    /// The response object as it is now.
    fn response(&self, status: &str, usage: &Value) -> Value {
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": (status == "incomplete").then(|| json!({"reason": "max_output_tokens"})),
            "model": self.model,
            "output": self.items,
            "previous_response_id": null,
            "store": false,
            "usage": usage,
        });
        if let Some(fields) = response.as_object_mut() {
            fields.extend(self.echo.clone());
            if let Some(truncation) = &self.truncation {
                fields.insert("altiplano".to_owned(), truncation.body());
            }
        }
        response
    }

    /// Sends an event: its type and number, and `more`.
    fn event(&mut self, kind: &str, more: Value, frames: &mut Frames) -> Done {
        let mut event = json!({"type": kind, "sequence_number": self.sequence});
        if let (Some(event), Value::Object(more)) = (event.as_object_mut(), more) {
            event.extend(more);
        }
        self.sequence += 1;
        frames.event(kind, &event)
    }

    /// Sends an event about the open item.
    fn item_event(&mut self, kind: &str, more: Value, frames: &mut Frames) -> Done {
        let mut about = json!({"item_id": self.open.as_ref().map(|item| &item.id), "output_index": self.items.len()});
        if let (Some(about), Value::Object(more)) = (about.as_object_mut(), more) {
            about.extend(more);
        }
        self.event(kind, about, frames)
    }

    /// Ends the open item, unless it is of this kind, and begins one that is.
    fn enter(&mut self, kind: Kind, frames: &mut Frames) -> Done {
        if self.open.as_ref().is_some_and(|item| item.kind == kind) {
            return Ok(());
        }
        self.leave("completed", frames)?;
        let item = Item::new(kind);
        let begun = item.body("in_progress");
        let part = item.part();
        self.open = Some(item);
        let output_index = self.items.len();
        self.event("response.output_item.added", json!({"output_index": output_index, "item": begun}), frames)?;
        match part {
            Some(part) => {
                self.item_event("response.content_part.added", json!({"content_index": 0, "part": part}), frames)
            }
            None => Ok(()),
        }
    }

    fn leave(&mut self, status: &'static str, frames: &mut Frames) -> Done {
        let Some(item) = &self.open else { return Ok(()) };
        let (said, part) = (item.text.clone(), item.part());
        let whole = item.body(status);
        let (event, more) = match &item.kind {
            Kind::Message => {
                let logprobs = wire::tokens(&item.logprobs);
                ("response.output_text.done", json!({"content_index": 0, "text": said, "logprobs": logprobs}))
            }
            Kind::Reasoning => ("response.reasoning_text.done", json!({"content_index": 0, "text": said})),
            Kind::Call { name, .. } => {
                ("response.function_call_arguments.done", json!({"name": name, "arguments": said}))
            }
        };
        self.item_event(event, more, frames)?;
        if let Some(part) = part {
            self.item_event("response.content_part.done", json!({"content_index": 0, "part": part}), frames)?;
        }
        let output_index = self.items.len();
        self.event("response.output_item.done", json!({"output_index": output_index, "item": whole}), frames)?;
        self.open = None;
        self.items.push(whole);
        Ok(())
    }

    /// More of the open item.
    fn add(&mut self, text: &str, logprob: Option<TokenLogprob>, frames: &mut Frames) -> Done {
        let Some(item) = &mut self.open else { return Ok(()) };
        item.text.push_str(text);
        let (event, more) = match item.kind {
            Kind::Message => {
                let logprobs = wire::tokens(logprob.as_slice());
                item.logprobs.extend(logprob);
                ("response.output_text.delta", json!({"content_index": 0, "delta": text, "logprobs": logprobs}))
            }
            Kind::Reasoning => ("response.reasoning_text.delta", json!({"content_index": 0, "delta": text})),
            Kind::Call { .. } => ("response.function_call_arguments.delta", json!({"delta": text})),
        };
        let more = with_timings(more, self.live.timings(0).as_ref())?;
        self.item_event(event, more, frames)
    }

    fn say(&mut self, delta: Delta, logprob: Option<TokenLogprob>, frames: &mut Frames) -> Done {
        match delta {
            Delta::Content(text) if text.is_empty() && logprob.is_none() => Ok(()),
            Delta::Content(text) => {
                self.enter(Kind::Message, frames)?;
                self.add(&text, logprob, frames)
            }
            Delta::Reasoning(text) if text.is_empty() => Ok(()),
            Delta::Reasoning(text) => {
                self.enter(Kind::Reasoning, frames)?;
                self.add(&text, None, frames)
            }
            Delta::ToolCall { index, id, name } => self.enter(Kind::Call { index, call_id: id, name }, frames),
            Delta::ToolArguments { index, json } => match &self.open {
                Some(Item { kind: Kind::Call { index: open, .. }, .. }) if *open == index => {
                    self.add(&json, None, frames)
                }
                // Calls come one after the other, so more of one that is not open cannot come.
                _ => Ok(()),
            },
        }
    }
}

impl Item {
    fn new(kind: Kind) -> Self {
        let prefix = match kind {
            Kind::Message => "msg",
            Kind::Reasoning => "rs",
            Kind::Call { .. } => "fc",
        };
        let id = format!("{prefix}_{}", uuid::Uuid::new_v4().simple());
        Self { id, kind, text: String::new(), logprobs: Vec::new() }
    }

    fn of(kind: Kind, text: &str) -> Self {
        Self { text: text.to_owned(), ..Self::new(kind) }
    }

    /// The one part of its content; calls have none.
    fn part(&self) -> Option<Value> {
        match self.kind {
            Kind::Message => {
                let logprobs = wire::tokens(&self.logprobs);
                Some(json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}))
            }
            Kind::Reasoning => Some(json!({"type": "reasoning_text", "text": self.text})),
            Kind::Call { .. } => None,
        }
    }

    fn body(&self, status: &str) -> Value {
        // An item that has just begun has no part yet.
        let content = if status == "in_progress" { None } else { self.part() };
        let content: Vec<Value> = content.into_iter().collect();
        match &self.kind {
            Kind::Message => json!({
                "id": self.id, "type": "message", "status": status, "role": "assistant", "content": content,
            }),
            Kind::Reasoning => json!({
                "id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content,
            }),
            Kind::Call { index: _, call_id, name } => json!({
                "id": self.id, "type": "function_call", "status": status, "call_id": call_id, "name": name,
                "arguments": self.text,
            }),
        }
    }
}

/// The items of a whole answer; the last one is `status`.
fn items(output: &Output, status: &str) -> Vec<Value> {
    let Output { content, reasoning, tool_calls, tokens: _, logprobs } = output;
    let mut items = Vec::new();
    if !reasoning.is_empty() {
        items.push(Item::of(Kind::Reasoning, reasoning));
    }
    if !content.is_empty() {
        items.push(Item { logprobs: logprobs.clone(), ..Item::of(Kind::Message, content) });
    }
    for (index, ToolCall { id, name, arguments }) in (0..).zip(tool_calls) {
        items.push(Item::of(Kind::Call { index, call_id: id.clone(), name: name.clone() }, arguments));
    }
    let last = items.len().saturating_sub(1);
    let status = |at: usize| if at == last { status } else { "completed" };
    items.iter().enumerate().map(|(at, item)| item.body(status(at))).collect()
}

/// llama-server's `timings` beside what an event says.
fn with_timings(mut more: Value, timings: Option<&TimingsBody>) -> Result<Value, serde_json::Error> {
    if let Some(timings) = timings {
        more["timings"] = serde_json::to_value(timings)?;
    }
    Ok(more)
}

fn status(tally: &Tally) -> &'static str {
    match tally.finish(0) {
        Some(Finish::Stop | Finish::ToolCalls) => "completed",
        Some(Finish::Length) | None => "incomplete",
    }
}

fn usage(tally: &Tally) -> Value {
    let (usage, _) = tally.totals();
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        // Tokens are not told apart by what they became.
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    })
}

impl Dialect for Responses {
    fn form(&self) -> Form {
        Form::Responses
    }

    fn prompt_param(&self) -> &'static str {
        "input"
    }

    fn declare(&mut self, truncation: &Truncation) {
        self.truncation = Some(truncation.clone());
    }

    fn whole(&mut self, choices: &[Output], tally: &Tally) -> Result<Vec<u8>, serde_json::Error> {
        let status = status(tally);
        self.items = choices.first().map(|output| items(output, status)).unwrap_or_default();
        serde_json::to_vec(&self.response(status, &usage(tally)))
    }

    fn started(&mut self, _: u64, frames: &mut Frames) -> Done {
        let response = self.response("in_progress", &Value::Null);
        self.event("response.created", json!({"response": response}), frames)?;
        self.event("response.in_progress", json!({"response": response}), frames)
    }

    fn progress(&mut self, _: usize, progress: &PromptProgress, frames: &mut Frames) -> Done {
        let Some(said) = self.live.progress(0, progress, Instant::now()) else { return Ok(()) };
        let response = self.response("in_progress", &Value::Null);
        let more = json!({"response": response, "prompt_progress": said});
        let more = with_timings(more, self.live.timings(0).as_ref())?;
        self.event("response.in_progress", more, frames)
    }

    fn piece(&mut self, piece: Piece, frames: &mut Frames) -> Done {
        let Piece { choice: _, deltas, token, mut logprob } = piece;
        if token.is_some() {
            self.live.token(0, Instant::now());
        }
        for delta in deltas {
            self.say(delta, logprob.take(), frames)?;
        }
        match logprob {
            // The token's text is held back; its probability is not.
            Some(logprob) if self.open.as_ref().is_some_and(|item| item.kind == Kind::Message) => {
                self.say(Delta::Content(String::new()), Some(logprob), frames)
            }
            _ => Ok(()),
        }
    }

    fn choice_ended(&mut self, _: usize, tally: &Tally, frames: &mut Frames) -> Done {
        self.status = status(tally);
        self.leave(self.status, frames)
    }

    fn ended(&mut self, tally: &Tally, frames: &mut Frames) -> Done {
        let response = self.response(self.status, &usage(tally));
        let kind = format!("response.{}", self.status);
        let (_, timings) = tally.totals();
        let more = with_timings(json!({"response": response}), self.tells_timings.then_some(&timings))?;
        self.event(&kind, more, frames)
    }

    /// The error, and then the response with it, as OpenAI says both.
    fn failed(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.raw(self.form().error_frame(error, self.sequence));
        self.sequence += 1;
        let code = if error.status.as_u16() == 429 { "rate_limit_exceeded" } else { "server_error" };
        let mut response = self.response("failed", &Value::Null);
        response["error"] = json!({"code": code, "message": error.message});
        // What was made to say it is plain JSON, which serialises.
        let _ = self.event("response.failed", json!({"response": response}), frames);
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::dialect::testing::{ended, events, everything, streamed};
    use super::super::super::fields::Fields;
    use super::*;
    use crate::engine::SamplingParams;

    #[test]
    fn progress_and_timings_come_where_they_were_asked_for() {
        let mut silent = responses();
        let mut telling = asked(&json!({"stream": true, "return_progress": true, "timings_per_token": true}));
        for (dialect, tells) in [(&mut silent, false), (&mut telling, true)] {
            let mut frames = Frames::default();
            let progress = PromptProgress { total: 9, cached: 2, processed: 5, ..PromptProgress::default() };
            dialect.progress(0, &progress, &mut frames).unwrap();
            let told: Vec<_> =
                std::iter::from_fn(|| frames.pop()).map(|frame| String::from_utf8(frame.to_vec()).unwrap()).collect();
            let told = events(&told);
            assert_eq!(told.len(), usize::from(tells));
            assert!(told.iter().all(|event| event["type"] == "response.in_progress"
                && event["prompt_progress"]["processed"] == 5
                && event["timings"]["prompt_n"] == 3));
            let events = events(&streamed(dialect, everything(), Finish::Stop));
            let timed = |event: &&Value| event.get("timings").is_some();
            let kinds: Vec<_> = events.iter().filter(timed).map(|event| event["type"].as_str().unwrap()).collect();
            assert_eq!(kinds.last().is_some_and(|kind| *kind == "response.completed"), tells, "{kinds:?}");
            assert_eq!(kinds.contains(&"response.output_text.delta"), tells, "{kinds:?}");
        }
    }

    fn responses() -> Responses {
        asked(&json!({}))
    }

    fn asked(fields: &Value) -> Responses {
        let params = Params::read(&Fields(fields.as_object().unwrap().clone()), &SamplingParams::default()).unwrap();
        let echo = Map::from_iter([("instructions".to_owned(), json!("Be brief."))]);
        Responses {
            id: "resp_1".to_owned(),
            created: 7,
            model: "toy".to_owned(),
            echo,
            live: Live::new(&params, Instant::now()),
            tells_timings: params.timings_per_token,
            truncation: None,
            sequence: 0,
            items: Vec::new(),
            open: None,
            status: "completed",
        }
    }

    #[test]
    fn a_stream_is_items_one_after_the_other() {
        let frames = streamed(&mut responses(), everything(), Finish::ToolCalls);
        let events = events(&frames);
        let kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
        let kinds: Vec<_> = kinds.iter().map(|kind| kind.strip_prefix("response.").unwrap()).collect();
        assert_eq!(
            kinds,
            [
                "created",
                "in_progress",
                "output_item.added",
                "content_part.added",
                "reasoning_text.delta",
                "reasoning_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
                "completed",
            ]
        );
        for (number, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], number, "{event}");
        }
        assert_eq!(events[0]["response"]["status"], "in_progress");
        assert_eq!(events[0]["response"]["instructions"], "Be brief.");
        assert_eq!(events[9]["item"]["content"], json!([]));
        let text = &events[13];
        assert_eq!(
            (&text["text"], &text["item_id"], &text["output_index"]),
            (&json!("Hello"), &events[9]["item"]["id"], &json!(1))
        );
        assert_eq!(events[19]["arguments"], "{\"a\":1}");
        let response = &events[25]["response"];
        let done = [8, 15, 20, 24].map(|at: usize| events[at]["item"].clone());
        assert_eq!(response["output"], json!(done), "the last event has all items as they ended");
        assert_eq!(
            response["usage"],
            json!({"input_tokens": 10, "input_tokens_details": {"cached_tokens": 4},
            "output_tokens": 6, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 16})
        );
    }

    #[test]
    fn a_whole_answer_has_the_same_items() {
        let mut output = Output::default();
        for delta in everything() {
            output.push(delta);
        }
        let body = responses().whole(&[output], &ended(Finish::Length)).unwrap();
        let mut body: Value = serde_json::from_slice(&body).unwrap();
        for item in body["output"].as_array_mut().unwrap() {
            assert!(item["id"].take().as_str().unwrap().len() > 30);
        }
        assert_eq!(
            body["output"],
            json!([
                {"id": null, "type": "reasoning", "status": "completed", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"id": null, "type": "message", "status": "completed", "role": "assistant",
                 "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]},
                {"id": null, "type": "function_call", "status": "completed", "call_id": "c0", "name": "f", "arguments": "{\"a\":1}"},
                {"id": null, "type": "function_call", "status": "incomplete", "call_id": "c1", "name": "g", "arguments": "{}"},
            ])
        );
        assert_eq!(body["status"], "incomplete");
        assert_eq!(body["incomplete_details"], json!({"reason": "max_output_tokens"}));
        assert_eq!(body["store"], false);
    }

    #[test]
    fn a_failure_is_said_twice_with_numbers_that_go_on() {
        let (mut responses, mut frames) = (responses(), Frames::default());
        responses.started(10, &mut frames).unwrap();
        responses.failed(&ApiError::internal("broken"), &mut frames);
        let frames: Vec<_> =
            std::iter::from_fn(|| frames.pop()).map(|f| String::from_utf8(f.to_vec()).unwrap()).collect();
        let events = events(&frames);
        assert_eq!(
            events[2],
            json!({"type": "error", "code": "internal_error", "message": "broken", "param": null, "sequence_number": 2})
        );
        assert_eq!((&events[3]["type"], &events[3]["sequence_number"]), (&json!("response.failed"), &json!(3)));
        assert_eq!(events[3]["response"]["error"], json!({"code": "server_error", "message": "broken"}));
    }
}
