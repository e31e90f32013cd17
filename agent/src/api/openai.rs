//! OpenAI's two older dialects: chat completions and completions. They differ in how a choice stands in a chunk.

use std::time::Instant;

use super::ApiState;
use super::dialect::{ChoiceJob, Dialect, Piece, Tally};
use super::form::{DONE, Form};
use super::frames::Frames;
use super::live::Live;
use super::native::answer::Native;
use super::output::{Delta, Output};
use super::overflow::Truncation;
use super::params::Params;
use super::wire::{
    self, Answer, CallBody, ChoiceBody, Content, FINGERPRINT, FunctionBody, Message, Said, Shape, UsageSlot,
};
use crate::engine::{PromptProgress, TokenLogprob};

/// Answers one request in OpenAI's terms.
pub(crate) struct OpenAi {
    shape: Shape,
    id: String,
    created: u64,
    model: String,
    include_usage: bool,
    wants_logprobs: bool,
    live: Live,
    /// What was taken from the prompts.
    truncation: Option<Truncation>,
    /// Where `verbose` was asked for; first how, then what `/completion` would say.
    verbose: Option<Verbose>,
    /// Texts that stand before the answers, by choice; empty unless `echo` was asked for.
    echoes: Vec<String>,
    /// By choice: whether it has begun, and the characters it has said, for the offsets of log-probabilities.
    progress: Vec<(bool, usize)>,
}

/// `__verbose`: the parameters until the prompts are known, then all of it.
enum Verbose {
    Asked(Box<Params>),
    Known(Box<Native>),
}

impl OpenAi {
    /// `wants_logprobs`: for whole answers, which have the field only then.
    pub(crate) fn new(state: &ApiState, shape: Shape, params: &Params, wants_logprobs: bool) -> Self {
        Self {
            shape,
            id: format!("{}{}", shape.id_prefix(), uuid::Uuid::new_v4().simple()),
            created: super::unix_seconds(),
            model: state.served_name().to_owned(),
            include_usage: params.include_usage,
            wants_logprobs,
            live: Live::new(params, Instant::now()),
            truncation: None,
            verbose: params.verbose.then(|| Verbose::Asked(Box::new(params.clone()))),
            echoes: Vec::new(),
            progress: Vec::new(),
        }
    }

    /// With texts before the answers, one for each choice.
    pub(crate) fn echoing(self, echoes: Vec<String>) -> Self {
        Self { echoes, ..self }
    }

    fn echo(&self, choice: usize) -> &str {
        self.echoes.get(choice).map_or("", String::as_str)
    }

    fn progress(&mut self, choice: usize) -> &mut (bool, usize) {
        if self.progress.len() <= choice {
            self.progress.resize(choice + 1, (false, 0));
        }
        &mut self.progress[choice]
    }

    fn head<'a>(&'a self, streamed: bool, choices: Vec<ChoiceBody<'a>>) -> Answer<'a> {
        Answer {
            id: &self.id,
            object: self.shape.object(streamed),
            created: self.created,
            model: &self.model,
            system_fingerprint: FINGERPRINT.as_str(),
            choices,
            usage: None,
            timings: None,
            prompt_progress: None,
            altiplano: None,
            verbose: None,
        }
    }

    /// `__verbose` of a choice with this content.
    fn verbose(&self, choice: usize, content: &str, tally: &Tally) -> Option<serde_json::Value> {
        match &self.verbose {
            Some(Verbose::Known(native)) => Some(native.end(choice, content, tally)),
            _ => None,
        }
    }

    /// What was taken from the prompts, as a whole answer and the last chunk of a streamed one say it.
    fn notice(&self) -> Option<serde_json::Value> {
        self.truncation.as_ref().map(Truncation::body)
    }

    fn chunk<'a>(&'a self, choice: ChoiceBody<'a>) -> Answer<'a> {
        Answer { usage: self.include_usage.then_some(UsageSlot::Later), ..self.head(true, vec![choice]) }
    }

    /// The first chunk of a choice: the role and no text yet, or what `echo` asks for.
    fn begin(&mut self, choice: usize, frames: &mut Frames) -> Result<(), serde_json::Error> {
        if std::mem::replace(&mut self.progress(choice).0, true) {
            return Ok(());
        }
        let echo = self.echo(choice);
        let said = match self.shape {
            Shape::Chat => {
                Said::Delta(Message { role: Some("assistant"), content: Content::Null, ..Message::default() })
            }
            Shape::Text if echo.is_empty() => return Ok(()),
            Shape::Text => Said::Text(echo),
        };
        frames.data(&self.chunk(ChoiceBody { index: choice, said, logprobs: None, finish_reason: None }))
    }

    fn say(
        &mut self,
        choice: usize,
        delta: &Delta,
        logprob: Option<&TokenLogprob>,
        frames: &mut Frames,
    ) -> Result<(), serde_json::Error> {
        let offset = self.echo(choice).chars().count() + self.progress(choice).1;
        let said = match self.shape {
            Shape::Chat => Said::Delta(chat_delta(delta)),
            Shape::Text => Said::Text(if let Delta::Content(text) = delta { text } else { "" }),
        };
        let logprobs = logprob.map(|logprob| wire::logprobs(self.shape, std::slice::from_ref(logprob), offset));
        let mut chunk = self.chunk(ChoiceBody { index: choice, said, logprobs, finish_reason: None });
        chunk.timings = self.live.timings(choice);
        frames.data(&chunk)?;
        if let Delta::Content(text) = delta {
            self.progress(choice).1 += text.chars().count();
        }
        Ok(())
    }
}

fn chat_delta(delta: &Delta) -> Message<'_> {
    match delta {
        Delta::Content(text) => Message { content: Content::Text(text), ..Message::default() },
        Delta::Reasoning(text) => Message { reasoning_content: Some(text), ..Message::default() },
        Delta::ToolCall { index, id, name } => Message {
            tool_calls: vec![CallBody {
                index: Some(*index),
                id: Some(id),
                kind: Some("function"),
                function: FunctionBody { name: Some(name), arguments: "" },
            }],
            ..Message::default()
        },
        Delta::ToolArguments { index, json } => Message {
            tool_calls: vec![CallBody {
                index: Some(*index),
                id: None,
                kind: None,
                function: FunctionBody { name: None, arguments: json },
            }],
            ..Message::default()
        },
    }
}

fn whole_message(output: &Output) -> Message<'_> {
    let Output { content, reasoning, tool_calls, tokens: _, logprobs: _ } = output;
    let calls = tool_calls.iter().map(|call| CallBody {
        index: None,
        id: Some(&call.id),
        kind: Some("function"),
        function: FunctionBody { name: Some(&call.name), arguments: &call.arguments },
    });
    Message {
        role: Some("assistant"),
        content: if tool_calls.is_empty() || !content.is_empty() { Content::Text(content) } else { Content::Null },
        reasoning_content: (!reasoning.is_empty()).then_some(reasoning),
        tool_calls: calls.collect(),
    }
}

impl Dialect for OpenAi {
    fn form(&self) -> Form {
        Form::OpenAi
    }

    fn prompt_param(&self) -> &'static str {
        self.shape.prompt_param()
    }

    fn asked(&mut self, state: &ApiState, choices: &[ChoiceJob], per_prompt: usize) {
        if let Some(Verbose::Asked(params)) = self.verbose.take() {
            self.verbose = Some(Verbose::Known(Box::new(Native::beside(state, *params, choices, per_prompt))));
        }
    }

    fn declare(&mut self, truncation: &Truncation) {
        self.truncation = Some(truncation.clone());
        if let Some(Verbose::Known(native)) = &mut self.verbose {
            native.declare(truncation);
        }
    }

    fn whole(&mut self, choices: &[Output], tally: &Tally) -> Result<Vec<u8>, serde_json::Error> {
        let (usage, timings) = tally.totals();
        let texts: Vec<_> = choices
            .iter()
            .enumerate()
            .map(|(index, output)| match self.shape {
                Shape::Chat => String::new(),
                Shape::Text => format!("{}{}", self.echo(index), output.content),
            })
            .collect();
        let bodies = choices.iter().zip(&texts).enumerate().map(|(index, (output, text))| ChoiceBody {
            index,
            said: match self.shape {
                Shape::Chat => Said::Message(whole_message(output)),
                Shape::Text => Said::Text(text),
            },
            logprobs: self.wants_logprobs.then(|| wire::logprobs(self.shape, &output.logprobs, 0)),
            finish_reason: tally.finish(index).map(wire::finish_word),
        });
        let mut answer = self.head(false, bodies.collect());
        answer.usage = Some(UsageSlot::Now(usage));
        answer.timings = Some(timings);
        answer.altiplano = self.notice();
        // As llama-server's: of the first choice.
        answer.verbose = choices.first().and_then(|output| self.verbose(0, &output.content, tally));
        serde_json::to_vec(&answer)
    }

    fn progress(
        &mut self,
        choice: usize,
        progress: &PromptProgress,
        frames: &mut Frames,
    ) -> Result<(), serde_json::Error> {
        let Some(said_progress) = self.live.progress(choice, progress, Instant::now()) else { return Ok(()) };
        self.begin(choice, frames)?;
        let said = match self.shape {
            Shape::Chat => Said::Delta(Message::default()),
            Shape::Text => Said::Text(""),
        };
        let mut chunk = self.chunk(ChoiceBody { index: choice, said, logprobs: None, finish_reason: None });
        chunk.prompt_progress = Some(said_progress);
        chunk.timings = self.live.timings(choice);
        frames.data(&chunk)
    }

    fn piece(&mut self, piece: Piece, frames: &mut Frames) -> Result<(), serde_json::Error> {
        let Piece { choice, deltas, token, logprob } = piece;
        if token.is_some() {
            self.live.token(choice, Instant::now());
        }
        self.begin(choice, frames)?;
        let mut logprob = logprob;
        for delta in &deltas {
            self.say(choice, delta, logprob.take().as_ref(), frames)?;
        }
        match logprob {
            // The token's text is held back; its probability is not.
            Some(logprob) => self.say(choice, &Delta::Content(String::new()), Some(&logprob), frames),
            None => Ok(()),
        }
    }

    fn choice_ended(&mut self, choice: usize, tally: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error> {
        self.begin(choice, frames)?;
        let said = match self.shape {
            Shape::Chat => Said::Delta(Message::default()),
            Shape::Text => Said::Text(""),
        };
        let finish_reason = tally.finish(choice).map(wire::finish_word);
        let mut chunk = self.chunk(ChoiceBody { index: choice, said, logprobs: None, finish_reason });
        chunk.verbose = self.verbose(choice, "", tally);
        // Without a chunk for usage, the last one of all tells the timings, as llama-server's does.
        if !self.include_usage && tally.all_ended() {
            chunk.timings = Some(tally.totals().1);
            chunk.altiplano = self.notice();
        }
        frames.data(&chunk)
    }

    fn ended(&mut self, tally: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error> {
        if self.include_usage {
            let (usage, timings) = tally.totals();
            let mut last = self.head(true, Vec::new());
            last.usage = Some(UsageSlot::Now(usage));
            last.timings = Some(timings);
            last.altiplano = self.notice();
            frames.data(&last)?;
        }
        frames.raw(DONE);
        Ok(())
    }
}
