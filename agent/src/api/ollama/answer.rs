//! What Ollama's API says: one object, or one for each piece and a last one with the figures.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::api::dialect::{Dialect, Finish, Piece, Tally};
use crate::api::form::Form;
use crate::api::frames::Frames;
use crate::api::intake::Visit;
use crate::api::output::{Delta, Output, ToolCall};
use crate::api::overflow::Truncation;
use crate::engine::TokenLogprob;

/// Which of the two endpoints speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Generate,
}

/// Answers one request in Ollama's terms.
pub(super) struct Ollama {
    kind: Kind,
    model: String,
    arrived: Instant,
    held: Duration,
    /// What was taken from the prompt.
    truncation: Option<Truncation>,
    /// Calls whose arguments are still being said: Ollama's clients get them whole.
    calls: Vec<ToolCall>,
}

/// What stands in every object.
pub(super) fn head(model: &str) -> Map<String, Value> {
    Map::from_iter([("model".to_owned(), model.into()), ("created_at".to_owned(), Timestamp::now().to_string().into())])
}

impl Ollama {
    pub(super) fn new(kind: Kind, model: String, visit: &Visit) -> Self {
        Self { kind, model, arrived: visit.arrived, held: visit.held, truncation: None, calls: Vec::new() }
    }

    fn said(&self, content: &str, thinking: &str, calls: &[ToolCall]) -> Map<String, Value> {
        let mut object = head(&self.model);
        match self.kind {
            Kind::Chat => {
                let mut message = json!({"role": "assistant", "content": content});
                if !thinking.is_empty() {
                    message["thinking"] = thinking.into();
                }
                if !calls.is_empty() {
                    message["tool_calls"] = calls.iter().map(call).collect();
                }
                object.insert("message".to_owned(), message);
            }
            Kind::Generate => {
                object.insert("response".to_owned(), content.into());
                if !thinking.is_empty() {
                    object.insert("thinking".to_owned(), thinking.into());
                }
            }
        }
        object.insert("done".to_owned(), false.into());
        object
    }

    /// Reason and figures of an answer that is complete.
    fn finish(&self, object: &mut Map<String, Value>, tally: &Tally) {
        let (usage, timings) = tally.of(0).map_or_else(Default::default, |end| (end.usage, end.timings));
        let reason = if tally.finish(0) == Some(Finish::Length) { "length" } else { "stop" };
        let nanoseconds = |time: Duration| Value::from(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        for (name, value) in [
            ("done", true.into()),
            ("done_reason", reason.into()),
            ("total_duration", nanoseconds(self.held + self.arrived.elapsed())),
            ("load_duration", nanoseconds(self.held)),
            ("prompt_eval_count", usage.prompt_tokens.into()),
            ("prompt_eval_duration", nanoseconds(timings.prefill)),
            ("eval_count", usage.completion_tokens.into()),
            ("eval_duration", nanoseconds(timings.decode)),
        ] {
            object.insert(name.to_owned(), value);
        }
        if let Some(truncation) = &self.truncation {
            object.insert("altiplano".to_owned(), truncation.body());
        }
    }

    fn flush_calls(&mut self, frames: &mut Frames) -> Result<(), serde_json::Error> {
        if self.calls.is_empty() {
            return Ok(());
        }
        let calls = std::mem::take(&mut self.calls);
        frames.line(&self.said("", "", &calls))
    }
}

/// A call with its arguments as an object. A model that writes none, against its grammar, is passed on as it is.
fn call(call: &ToolCall) -> Value {
    let ToolCall { id, name, arguments } = call;
    let arguments = match serde_json::from_str(if arguments.trim().is_empty() { "{}" } else { arguments }) {
        Ok(arguments @ Value::Object(_)) => arguments,
        _ => json!({"arguments": arguments}),
    };
    json!({"id": id, "function": {"name": name, "arguments": arguments}})
}

fn logprobs(tokens: &[TokenLogprob]) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let one = |bytes: &[u8], logprob: f32| {
        // JSON has no infinity.
        json!({"token": text(bytes), "logprob": logprob.max(-9999.0), "bytes": bytes})
    };
    let with_top = |token: &TokenLogprob| {
        let mut body = one(&token.bytes, token.logprob);
        if !token.top.is_empty() {
            body["top_logprobs"] = token.top.iter().map(|top| one(&top.bytes, top.logprob)).collect();
        }
        body
    };
    tokens.iter().map(with_top).collect()
}

impl Dialect for Ollama {
    fn form(&self) -> Form {
        Form::Ollama
    }

    fn prompt_param(&self) -> &'static str {
        match self.kind {
            Kind::Chat => "messages",
            Kind::Generate => "prompt",
        }
    }

    fn declare(&mut self, truncation: &Truncation) {
        self.truncation = Some(truncation.clone());
    }

    fn whole(&mut self, choices: &[Output], tally: &Tally) -> Result<Vec<u8>, serde_json::Error> {
        let nothing = Output::default();
        let output = choices.first().unwrap_or(&nothing);
        let mut object = self.said(&output.content, &output.reasoning, &output.tool_calls);
        if !output.logprobs.is_empty() {
            object.insert("logprobs".to_owned(), logprobs(&output.logprobs));
        }
        self.finish(&mut object, tally);
        serde_json::to_vec(&object)
    }

    fn piece(&mut self, piece: Piece, frames: &mut Frames) -> Result<(), serde_json::Error> {
        let Piece { deltas, logprob, .. } = piece;
        let mut logprob = logprob;
        for delta in deltas {
            let object = match delta {
                Delta::Content(text) => {
                    self.flush_calls(frames)?;
                    Some(self.said(&text, "", &[]))
                }
                Delta::Reasoning(text) => Some(self.said("", &text, &[])),
                Delta::ToolCall { index: _, id, name } => {
                    self.flush_calls(frames)?;
                    self.calls.push(ToolCall { id, name, arguments: String::new() });
                    None
                }
                Delta::ToolArguments { index: _, json } => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments.push_str(&json);
                    }
                    None
                }
            };
            if let Some(mut object) = object {
                if let Some(logprob) = logprob.take() {
                    object.insert("logprobs".to_owned(), logprobs(&[logprob]));
                }
                frames.line(&object)?;
            }
        }
        match logprob {
            // The token's text is held back; its probability is not.
            Some(logprob) => {
                let mut object = self.said("", "", &[]);
                object.insert("logprobs".to_owned(), logprobs(&[logprob]));
                frames.line(&object)
            }
            None => Ok(()),
        }
    }

    fn choice_ended(&mut self, _: usize, _: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error> {
        self.flush_calls(frames)
    }

    fn ended(&mut self, tally: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error> {
        let mut object = self.said("", "", &[]);
        self.finish(&mut object, tally);
        frames.line(&object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::dialect::End;
    use crate::engine::{Timings, Usage};

    fn ollama(kind: Kind) -> Ollama {
        let held = Duration::from_millis(40);
        Ollama {
            kind,
            model: "toy:latest".to_owned(),
            arrived: Instant::now(),
            held,
            truncation: None,
            calls: Vec::new(),
        }
    }

    fn tally(finish: Finish) -> Tally {
        let mut tally = Tally::new(1, 1);
        let usage = Usage { prompt_tokens: 10, cached_tokens: 4, completion_tokens: 3 };
        let milliseconds = Duration::from_millis;
        let timings = Timings {
            queue: milliseconds(1),
            prefill: milliseconds(20),
            time_to_first_token: milliseconds(21),
            decode: milliseconds(30),
            ..Timings::default()
        };
        tally.end(0, End { finish, stop: None, usage, timings });
        tally
    }

    fn lines(frames: &mut Frames) -> Vec<Value> {
        let mut lines = Vec::new();
        while let Some(line) = frames.pop() {
            assert!(line.ends_with(b"\n"));
            let mut line: Value = serde_json::from_slice(&line).unwrap();
            let object = line.as_object_mut().unwrap();
            assert_eq!(object.remove("model"), Some("toy:latest".into()));
            object.remove("created_at").unwrap().as_str().unwrap().parse::<Timestamp>().unwrap();
            lines.push(line);
        }
        lines
    }

    fn piece(deltas: Vec<Delta>) -> Piece {
        Piece { choice: 0, deltas, token: None, logprob: None }
    }

    #[test]
    fn a_stream_of_lines_with_whole_calls_and_figures() {
        let (mut ollama, mut frames) = (ollama(Kind::Chat), Frames::default());
        let call = |id: &str| Delta::ToolCall { index: 0, id: id.into(), name: "weather".into() };
        let arguments = |json: &str| Delta::ToolArguments { index: 0, json: json.into() };
        for deltas in [
            vec![Delta::Reasoning("hm".into())],
            vec![Delta::Content("Hi".into())],
            vec![call("1"), arguments("{\"city\": ")],
            vec![arguments("\"Paris\"}"), call("2")],
        ] {
            ollama.piece(piece(deltas), &mut frames).unwrap();
        }
        let tally = tally(Finish::ToolCalls);
        ollama.choice_ended(0, &tally, &mut frames).unwrap();
        ollama.ended(&tally, &mut frames).unwrap();
        let mut found = lines(&mut frames);
        let last = found.pop().unwrap();
        let message = |message: Value| json!({"message": message, "done": false});
        let called = |id: &str, arguments: Value| {
            let function = json!({"name": "weather", "arguments": arguments});
            message(json!({"role": "assistant", "content": "", "tool_calls": [{"id": id, "function": function}]}))
        };
        assert_eq!(
            found,
            [
                message(json!({"role": "assistant", "content": "", "thinking": "hm"})),
                message(json!({"role": "assistant", "content": "Hi"})),
                called("1", json!({"city": "Paris"})),
                called("2", json!({})),
            ]
        );
        assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("stop")));
        assert_eq!((&last["prompt_eval_count"], &last["eval_count"]), (&json!(10), &json!(3)));
        assert_eq!((&last["prompt_eval_duration"], &last["eval_duration"]), (&json!(20_000_000), &json!(30_000_000)));
        assert_eq!(last["load_duration"], 40_000_000);
        assert!(last["total_duration"].as_u64().unwrap() > 40_000_000);
    }

    #[test]
    fn a_whole_answer_of_each_kind() {
        let output = Output { content: "Hi".into(), reasoning: "hm".into(), ..Output::default() };
        let whole = |kind| {
            let body = ollama(kind).whole(std::slice::from_ref(&output), &tally(Finish::Length)).unwrap();
            serde_json::from_slice::<Value>(&body).unwrap()
        };
        let chat = whole(Kind::Chat);
        assert_eq!(chat["message"], json!({"role": "assistant", "content": "Hi", "thinking": "hm"}));
        assert_eq!(chat["done_reason"], "length");
        let generate = whole(Kind::Generate);
        assert_eq!((&generate["response"], &generate["thinking"]), (&json!("Hi"), &json!("hm")));
    }

    #[test]
    fn arguments_that_are_no_object_are_passed_on() {
        let of = |arguments: &str| call(&ToolCall { id: String::new(), name: "f".into(), arguments: arguments.into() });
        assert_eq!(of(" ")["function"]["arguments"], json!({}));
        assert_eq!(of("[1]")["function"]["arguments"], json!({"arguments": "[1]"}));
    }
}
