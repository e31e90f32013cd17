//! What Messages says: a message of content blocks, whole or event by event.

use serde_json::{Value, json};

use super::super::ApiState;
use super::super::dialect::{Dialect, Finish, Piece, Tally};
use super::super::form::Form;
use super::super::frames::Frames;
use super::super::output::{Delta, Output};
use super::super::overflow::Truncation;

/// Answers one request in Anthropic's terms.
pub(super) struct Messages {
    id: String,
    model: String,
    /// The client's own stop texts.
    stops: Vec<String>,
    /// What was taken from the prompt.
    truncation: Option<Truncation>,
    /// Index of the next block, which is one more than that of the open one.
    next: usize,
    open: Option<Block>,
}

/// The kind of a block that is being said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
    /// Which call of the choice.
    Tool(u32),
}

impl Messages {
    pub(super) fn new(state: &ApiState, stops: Vec<String>) -> Self {
        let id = format!("msg_{}", uuid::Uuid::new_v4().simple());
        Self { id, model: state.served_name().to_owned(), stops, truncation: None, next: 0, open: None }
    }

    /// `stop_reason` and `stop_sequence`.
    fn stop(&self, tally: &Tally) -> (Option<&'static str>, Option<String>) {
        let Some(end) = tally.of(0) else { return (None, None) };
        match end.finish {
            Finish::Stop => match end.stop.as_ref().filter(|stop| self.stops.contains(stop)) {
                Some(stop) => (Some("stop_sequence"), Some(stop.clone())),
                None => (Some("end_turn"), None),
            },
            Finish::Length => (Some("max_tokens"), None),
            Finish::ToolCalls => (Some("tool_use"), None),
        }
    }

    fn message(&self, content: &[Value], stop: (Option<&'static str>, Option<String>), usage: &Value) -> Value {
        let (stop_reason, stop_sequence) = stop;
        let mut message = json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        });
        if let Some(truncation) = &self.truncation {
            message["altiplano"] = truncation.body();
        }
        message
    }

    /// Ends the open block, unless it is `kind`, and begins one of that kind.
    fn enter(&mut self, kind: Block, begin: &Value, frames: &mut Frames) -> Result<(), serde_json::Error> {
        if self.open == Some(kind) {
            return Ok(());
        }
        self.leave(frames)?;
        let event = json!({"type": "content_block_start", "index": self.next, "content_block": begin});
        self.open = Some(kind);
        self.next += 1;
        frames.event("content_block_start", &event)
    }

    fn leave(&mut self, frames: &mut Frames) -> Result<(), serde_json::Error> {
        if self.open.take().is_none() {
            return Ok(());
        }
        frames.event("content_block_stop", &json!({"type": "content_block_stop", "index": self.next - 1}))
    }

    fn add(&self, delta: &Value, frames: &mut Frames) -> Result<(), serde_json::Error> {
        let index = self.next.saturating_sub(1);
        frames.event("content_block_delta", &json!({"type": "content_block_delta", "index": index, "delta": delta}))
    }

    fn say(&mut self, delta: &Delta, frames: &mut Frames) -> Result<(), serde_json::Error> {
        match delta {
            Delta::Content(text) if text.is_empty() => Ok(()),
            Delta::Content(text) => {
                self.enter(Block::Text, &json!({"type": "text", "text": ""}), frames)?;
                self.add(&json!({"type": "text_delta", "text": text}), frames)
            }
            Delta::Reasoning(text) if text.is_empty() => Ok(()),
            Delta::Reasoning(text) => {
                let begin = json!({"type": "thinking", "thinking": "", "signature": ""});
                self.enter(Block::Thinking, &begin, frames)?;
                self.add(&json!({"type": "thinking_delta", "thinking": text}), frames)
            }
            Delta::ToolCall { index, id, name } => {
                let begin = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                self.enter(Block::Tool(*index), &begin, frames)
            }
            // Calls come one after the other, so more of one that is not open cannot come.
            Delta::ToolArguments { index, json } if self.open == Some(Block::Tool(*index)) => {
                self.add(&json!({"type": "input_json_delta", "partial_json": json}), frames)
            }
            Delta::ToolArguments { .. } => Ok(()),
        }
    }
}

/// Anthropic counts what came from the cache apart from what was computed.
fn usage(prompt: u64, cached: u64, output: u64) -> Value {
    json!({
        "input_tokens": prompt.saturating_sub(cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
    })
}

fn total(tally: &Tally) -> Value {
    let (total, _) = tally.totals();
    usage(total.prompt_tokens, total.prompt_tokens_details.cached_tokens, total.completion_tokens)
}

fn blocks(output: &Output) -> Vec<Value> {
    let Output { content, reasoning, tool_calls, tokens: _, logprobs: _ } = output;
    let mut blocks = Vec::new();
    if !reasoning.is_empty() {
        blocks.push(json!({"type": "thinking", "thinking": reasoning, "signature": ""}));
    }
    if !content.is_empty() {
        blocks.push(json!({"type": "text", "text": content}));
    }
    for call in tool_calls {
        // Arguments that were cut off are no JSON; then the text is what there is.
        let input = serde_json::from_str(&call.arguments).unwrap_or_else(|_| match call.arguments.as_str() {
            "" => json!({}),
            text => json!(text),
        });
        blocks.push(json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input}));
    }
    blocks
}

impl Dialect for Messages {
    fn form(&self) -> Form {
        Form::Anthropic
    }

    fn prompt_param(&self) -> &'static str {
        "messages"
    }

    fn declare(&mut self, truncation: &Truncation) {
        self.truncation = Some(truncation.clone());
    }

    fn whole(&mut self, choices: &[Output], tally: &Tally) -> Result<Vec<u8>, serde_json::Error> {
        let content = choices.first().map(blocks).unwrap_or_default();
        serde_json::to_vec(&self.message(&content, self.stop(tally), &total(tally)))
    }

    fn started(&mut self, prompt_tokens: u64, frames: &mut Frames) -> Result<(), serde_json::Error> {
        let event =
            json!({"type": "message_start", "message": self.message(&[], (None, None), &usage(prompt_tokens, 0, 0))});
        frames.event("message_start", &event)
    }

    fn piece(&mut self, piece: Piece, frames: &mut Frames) -> Result<(), serde_json::Error> {
        piece.deltas.iter().try_for_each(|delta| self.say(delta, frames))
    }

    fn choice_ended(&mut self, _: usize, tally: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error> {
        self.leave(frames)?;
        let (stop_reason, stop_sequence) = self.stop(tally);
        let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
        frames.event("message_delta", &json!({"type": "message_delta", "delta": delta, "usage": total(tally)}))
    }

    fn ended(&mut self, _: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error> {
        frames.event("message_stop", &json!({"type": "message_stop"}))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::dialect::testing::{ended, events, everything, streamed};
    use super::*;

    fn messages() -> Messages {
        Messages {
            id: "msg_1".to_owned(),
            model: "toy".to_owned(),
            stops: Vec::new(),
            truncation: None,
            next: 0,
            open: None,
        }
    }

    #[test]
    fn a_stream_is_blocks_one_after_the_other() {
        let frames = streamed(&mut messages(), everything(), Finish::ToolCalls);
        let start =
            |index: u32, block: Value| json!({"type": "content_block_start", "index": index, "content_block": block});
        let delta = |index: u32, delta: Value| json!({"type": "content_block_delta", "index": index, "delta": delta});
        let stop = |index: u32| json!({"type": "content_block_stop", "index": index});
        let usage = |input: u32, cached: u32, output: u32| json!({"input_tokens": input, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached, "output_tokens": output});
        let message = json!({"id": "msg_1", "type": "message", "role": "assistant", "model": "toy", "content": [],
            "stop_reason": null, "stop_sequence": null, "usage": usage(10, 0, 0)});
        assert_eq!(
            events(&frames),
            [
                json!({"type": "message_start", "message": message}),
                start(0, json!({"type": "thinking", "thinking": "", "signature": ""})),
                delta(0, json!({"type": "thinking_delta", "thinking": "h"})),
                delta(0, json!({"type": "thinking_delta", "thinking": "m"})),
                stop(0),
                start(1, json!({"type": "text", "text": ""})),
                delta(1, json!({"type": "text_delta", "text": "Hel"})),
                delta(1, json!({"type": "text_delta", "text": "lo"})),
                stop(1),
                start(2, json!({"type": "tool_use", "id": "c0", "name": "f", "input": {}})),
                delta(2, json!({"type": "input_json_delta", "partial_json": "{\"a\":"})),
                delta(2, json!({"type": "input_json_delta", "partial_json": "1}"})),
                stop(2),
                start(3, json!({"type": "tool_use", "id": "c1", "name": "g", "input": {}})),
                delta(3, json!({"type": "input_json_delta", "partial_json": "{}"})),
                stop(3),
                json!({"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null}, "usage": usage(6, 4, 6)}),
                json!({"type": "message_stop"}),
            ]
        );
    }

    #[test]
    fn a_whole_answer_has_the_same_blocks() {
        let mut output = Output::default();
        for delta in everything() {
            output.push(delta);
        }
        let body = messages().whole(&[output], &ended(Finish::Stop)).unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            body["content"],
            json!([
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Hello"},
                {"type": "tool_use", "id": "c0", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "c1", "name": "g", "input": {}},
            ])
        );
        assert_eq!((&body["stop_reason"], &body["usage"]["input_tokens"]), (&json!("end_turn"), &json!(6)));
        let own = Messages { stops: vec!["X".to_owned()], ..messages() }.whole(&[], &ended(Finish::Stop)).unwrap();
        let own: Value = serde_json::from_slice(&own).unwrap();
        assert_eq!((&own["stop_reason"], &own["stop_sequence"]), (&json!("stop_sequence"), &json!("X")));
        let cut = Output {
            tool_calls: vec![super::super::super::output::ToolCall { arguments: "{\"a".into(), ..Default::default() }],
            ..Output::default()
        };
        let body = messages().whole(&[cut], &ended(Finish::Length)).unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["stop_reason"], &body["content"][0]["input"]), (&json!("max_tokens"), &json!("{\"a")));
    }
}
