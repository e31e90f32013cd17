//! What a model wrote as deltas: content, reasoning and tool calls, as llama.cpp's parser for its format tells them apart.
//!
//! The parser reads an output from its beginning each time. A whole answer is read once, at its end. A stream is read
//! again as it grows, but only when nine times as long as the last reading took has passed since: reading takes a tenth
//! of a CPU at most, however long the output, and what a stream says is late by ten readings at most.

use std::time::{Duration, Instant};

use crate::api::error::ApiError;
use crate::api::output::{Delta, OutputParser};
use crate::engine::chat::{ChatCall, ChatMessage, ChatReader, ThinkingTags};

/// How many times as long as a reading took the next one waits.
const REST: u32 = 9;

/// How an output is to be read.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading {
    /// Deltas are wanted as they come.
    pub(super) streamed: bool,
    /// Functions that can be called.
    pub(super) names: Vec<String>,
    /// Calls at most.
    pub(super) most_calls: usize,
    /// Ids have nine letters and digits, as Mistral's templates demand.
    pub(super) short_ids: bool,
    /// Marks of reasoning, where the format has them.
    pub(super) thinking: Option<ThinkingTags>,
    /// Reasoning is in the content too.
    pub(super) repeat_reasoning: bool,
}

/// Reads one choice.
pub(super) struct ChatParser {
    reader: ChatReader,
    reading: Reading,
    text: String,
    /// What was said already, and what the prompt said before.
    said: ChatMessage,
    /// Content that the prompt has begun.
    beginning: String,
    /// Ids of the calls that have begun.
    begun: usize,
    pace: Pace,
}

impl ChatParser {
    pub(super) fn new(mut reader: ChatReader, reading: Reading) -> Self {
        // The prompt may have begun the answer; that is not said again.
        let mut said = reader.read("", true).unwrap_or_default();
        let (begun, beginning) = (said.calls.len(), said.content.clone());
        trim_starts(&mut said);
        Self { reader, reading, text: String::new(), said, beginning, begun, pace: Pace::default() }
    }

    /// What is new in `message`. Of what is not complete, only that is said which will not change.
    fn deltas(&mut self, mut message: ChatMessage, complete: bool) -> Vec<Delta> {
        self.trim(&mut message, complete);
        let mut deltas = Vec::new();
        if let Some(more) = grown(&mut self.said.reasoning, &message.reasoning) {
            deltas.push(Delta::Reasoning(more));
        }
        if let Some(more) = grown(&mut self.said.content, &message.content) {
            deltas.push(Delta::Content(more));
        }
        let most = message.calls.len().min(self.reading.most_calls);
        for (at, call) in message.calls.iter().take(most).enumerate() {
            let is_last = at + 1 == message.calls.len();
            if at == self.begun {
                if !complete && is_last && !self.is_certain(call) {
                    break;
                }
                let id = if call.id.is_empty() { self.new_id() } else { call.id.clone() };
                deltas.push(Delta::ToolCall { index: index(at), id, name: call.name.clone() });
                self.said.calls.push(ChatCall::default());
                self.begun += 1;
            }
            let Some(said) = self.said.calls.get_mut(at) else { break };
            if let Some(more) = grown(&mut said.arguments, &call.arguments) {
                deltas.push(Delta::ToolArguments { index: index(at), json: more });
            }
        }
        deltas
    }

    /// Takes away the space around marks, which is there for the marks' sake.
    fn trim(&self, message: &mut ChatMessage, complete: bool) {
        trim_starts(message);
        message.reasoning.truncate(message.reasoning.trim_end().len());
        let mark_may_follow = self.reading.most_calls > 0 && !complete;
        if mark_may_follow || !message.calls.is_empty() {
            message.content.truncate(message.content.trim_end().len());
        }
    }

    /// Whether the name of a call that is still written is known to its end.
    fn is_certain(&self, call: &ChatCall) -> bool {
        // A name comes with the brace that the arguments will begin with.
        call.arguments.len() > 1 && (self.reading.names.is_empty() || self.reading.names.contains(&call.name))
    }

    fn new_id(&self) -> String {
        let random = uuid::Uuid::new_v4().simple().to_string();
        if self.reading.short_ids { random[..9].to_owned() } else { format!("call_{}", &random[..24]) }
    }

    /// The whole output. What does not follow the format is still the model's answer.
    fn last(&mut self) -> ChatMessage {
        let mut message = match self.reader.read(&self.text, false) {
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "an output that does not follow its format");
                // Its reasoning is as good as ever.
                let thought = self.end_of_reasoning();
                let reasoning = self.reader.read(&self.text[..thought], true).unwrap_or_default().reasoning;
                let from = if reasoning.is_empty() { 0 } else { thought };
                let content = format!("{}{}", self.beginning, &self.text[from..]);
                ChatMessage { content, reasoning, calls: Vec::new() }
            }
        };
        if let (true, Some(ThinkingTags { start, ends })) = (self.reading.repeat_reasoning, &self.reading.thinking)
            && !message.reasoning.is_empty()
        {
            let end = ends.first().map_or("", String::as_str);
            message.content = format!("{start}{}{end}{}", message.reasoning, message.content);
        }
        message
    }

    /// Where the first mark that ends reasoning ends; 0: there is none.
    fn end_of_reasoning(&self) -> usize {
        let ends = self.reading.thinking.iter().flat_map(|tags| &tags.ends);
        ends.filter_map(|end| self.text.find(end.as_str()).map(|at| at + end.len())).min().unwrap_or(0)
    }
}

impl OutputParser for ChatParser {
    fn push(&mut self, text: &str) -> Result<Vec<Delta>, ApiError> {
        self.text.push_str(text);
        if !self.reading.streamed || text.is_empty() || !self.pace.is_due(Instant::now()) {
            return Ok(Vec::new());
        }
        let started = Instant::now();
        let read = self.reader.read(&self.text, true);
        self.pace.done(started, Instant::now());
        // What cannot be read yet may be readable with more.
        Ok(read.map(|message| self.deltas(message, false)).unwrap_or_default())
    }

    fn finish(&mut self) -> Result<Vec<Delta>, ApiError> {
        let message = self.last();
        Ok(self.deltas(message, true))
    }
}

/// When an output is read again.
#[derive(Debug, Default)]
struct Pace {
    next: Option<Instant>,
}

impl Pace {
    fn is_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| next <= now)
    }

    fn done(&mut self, started: Instant, ended: Instant) {
        let took: Duration = ended.saturating_duration_since(started);
        self.next = Some(ended + took.saturating_mul(REST));
    }
}

fn trim_starts(message: &mut ChatMessage) {
    let trim = |text: &mut String| {
        let space = text.len() - text.trim_start().len();
        text.drain(..space);
    };
    trim(&mut message.reasoning);
    if !message.reasoning.is_empty() {
        trim(&mut message.content);
    }
}

/// What `now` has more than `said`, if it goes on from it.
fn grown(said: &mut String, now: &str) -> Option<String> {
    let more = now.strip_prefix(said.as_str()).filter(|more| !more.is_empty())?.to_owned();
    said.push_str(&more);
    Some(more)
}

fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
