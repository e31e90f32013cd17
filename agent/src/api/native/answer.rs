//! What `/completion` says: llama-server's object, once or piece by piece.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::completion::Options;
use crate::api::dialect::{ChoiceJob, Dialect, Finish, Piece, Tally};
use crate::api::error::ApiError;
use crate::api::form::Form;
use crate::api::frames::Frames;
use crate::api::live::Live;
use crate::api::output::{Delta, Output};
use crate::api::overflow::Truncation;
use crate::api::params::Params;
use crate::api::state::ApiState;
use crate::api::wire;
use crate::engine::{GenerateRequest, PromptProgress, Token, TokenLogprob};

/// Answers one request in llama-server's own terms.
pub(in crate::api) struct Native {
    model: String,
    settings: Map<String, Value>,
    /// Prompts as text, by prompt.
    prompts: Vec<String>,
    per_prompt: usize,
    return_tokens: bool,
    n_probs: Option<u32>,
    /// What the client wants of the whole object; empty: all of it.
    response_fields: Vec<String>,
    live: Live,
    /// What was taken from the prompts.
    truncation: Option<Truncation>,
    /// By choice.
    said: Vec<Said>,
}

#[derive(Clone, Default)]
struct Said {
    tokens: Vec<Token>,
    has_new_line: bool,
}

impl Native {
    pub(super) fn new(state: &ApiState, options: &Options, requests: &[GenerateRequest], per_prompt: usize) -> Self {
        let prompts = requests.iter().map(|request| request.prompt.as_slice());
        Self::of(state, options, prompts, per_prompt)
    }

    /// What a request in OpenAI's terms would be told here, for its `__verbose`.
    pub(in crate::api) fn beside(state: &ApiState, params: Params, choices: &[ChoiceJob], per_prompt: usize) -> Self {
        let logprobs = choices.first().and_then(|choice| choice.request.logprobs);
        let prompts = choices.iter().map(|choice| choice.request.prompt.as_slice());
        Self::of(state, &Options::beside(params, logprobs), prompts, per_prompt)
    }

    /// `prompts`: of each choice.
    fn of<'a>(
        state: &ApiState,
        options: &Options,
        prompts: impl ExactSizeIterator<Item = &'a [Token]>,
        per_prompt: usize,
    ) -> Self {
        let text = |tokens: &[Token]| {
            let bytes: Vec<u8> =
                tokens.iter().flat_map(|&token| state.engine().piece(token).unwrap_or_default()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let said = vec![Said::default(); prompts.len()];
        let mut settings = options.settings();
        settings.insert("n_ctx".to_owned(), state.engine().report().max_tokens.into());
        Self {
            model: state.served_name().to_owned(),
            settings,
            prompts: prompts.step_by(per_prompt.max(1)).map(text).collect(),
            per_prompt: per_prompt.max(1),
            return_tokens: options.return_tokens,
            n_probs: options.logprobs,
            response_fields: options.response_fields.clone(),
            live: Live::new(&options.params, Instant::now()),
            truncation: None,
            said,
        }
    }

    fn said(&mut self, choice: usize) -> Option<&mut Said> {
        self.said.get_mut(choice)
    }

    /// The last object of a choice, which in a stream has no content.
    pub(in crate::api) fn end(&self, choice: usize, content: &str, tally: &Tally) -> Value {
        let said = self.said.get(choice).cloned().unwrap_or_default();
        let (usage, timings) = tally.of(choice).map_or_else(Default::default, |end| (end.usage, end.timings));
        let (_, timings) = wire::totals(&[(usage, timings)], 1);
        let stop = tally.of(choice).and_then(|end| end.stop.as_deref());
        let stop_type = match (tally.finish(choice), stop) {
            (Some(Finish::Length), _) => "limit",
            (Some(_), Some(_)) => "word",
            (Some(_), None) => "eos",
            (None, _) => "none",
        };
        let mut end = json!({
            "index": choice,
            "content": content,
            "tokens": if self.return_tokens { said.tokens } else { Vec::new() },
            "id_slot": -1,
            "stop": true,
            "model": self.model,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "generation_settings": self.settings,
            "prompt": self.prompts.get(choice / self.per_prompt).map_or("", String::as_str),
            "has_new_line": said.has_new_line || content.contains('\n'),
            "truncated": self.truncation.is_some(),
            "stop_type": stop_type,
            "stopping_word": stop.unwrap_or_default(),
            "tokens_cached": usage.cached_tokens,
            "timings": timings,
        });
        if let Some(truncation) = &self.truncation {
            end["altiplano"] = truncation.body();
        }
        end
    }

    fn probabilities(logprobs: &[TokenLogprob], tokens: &[Token]) -> Value {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let one = |at: usize, logprob: &TokenLogprob| {
            let top = logprob.top.iter().map(|top| {
                json!({"id": top.token, "token": text(&top.bytes), "bytes": top.bytes, "logprob": finite(top.logprob)})
            });
            json!({
                "id": tokens.get(at),
                "token": text(&logprob.bytes),
                "bytes": logprob.bytes,
                "logprob": finite(logprob.logprob),
                "top_logprobs": top.collect::<Vec<_>>(),
            })
        };
        logprobs.iter().enumerate().map(|(at, logprob)| one(at, logprob)).collect()
    }
}

/// The fields that were asked for, in that order: `generation_settings/n_predict` is the one within the other, under
/// that name. One that is not there is left out, as llama-server does.
fn chosen(answer: Value, fields: &[String]) -> Value {
    if fields.is_empty() {
        return answer;
    }
    let find = |path: &String| Some((path.clone(), answer.pointer(&format!("/{path}"))?.clone()));
    fields.iter().filter_map(find).collect::<Map<_, _>>().into()
}

/// JSON has no infinity.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

fn text_of(deltas: &[Delta]) -> String {
    deltas
        .iter()
        .filter_map(|delta| if let Delta::Content(text) = delta { Some(text.as_str()) } else { None })
        .collect()
}

impl Dialect for Native {
    fn form(&self) -> Form {
        Form::OpenAi
    }

    fn prompt_param(&self) -> &'static str {
        "prompt"
    }

    fn declare(&mut self, truncation: &Truncation) {
        self.truncation = Some(truncation.clone());
    }

    fn whole(&mut self, choices: &[Output], tally: &Tally) -> Result<Vec<u8>, serde_json::Error> {
        let mut answers = Vec::with_capacity(choices.len());
        for (choice, output) in choices.iter().enumerate() {
            if let Some(said) = self.said(choice) {
                said.tokens.clone_from(&output.tokens);
            }
            let mut answer = self.end(choice, &output.content, tally);
            if self.n_probs.is_some() {
                answer["completion_probabilities"] = Self::probabilities(&output.logprobs, &output.tokens);
            }
            answers.push(chosen(answer, &self.response_fields));
        }
        match answers.as_slice() {
            [one] => serde_json::to_vec(one),
            several => serde_json::to_vec(several),
        }
    }

    fn progress(
        &mut self,
        choice: usize,
        progress: &PromptProgress,
        frames: &mut Frames,
    ) -> Result<(), serde_json::Error> {
        let Some(said) = self.live.progress(choice, progress, Instant::now()) else { return Ok(()) };
        let mut frame = json!({
            "index": choice,
            "content": "",
            "tokens": [],
            "stop": false,
            "id_slot": -1,
            "tokens_predicted": 0,
            "tokens_evaluated": progress.total,
            "prompt_progress": said,
        });
        if let Some(timings) = self.live.timings(choice) {
            frame["timings"] = serde_json::to_value(timings)?;
        }
        frames.data(&frame)
    }

    fn piece(&mut self, piece: Piece, frames: &mut Frames) -> Result<(), serde_json::Error> {
        let Piece { choice, deltas, token, logprob } = piece;
        let content = text_of(&deltas);
        if token.is_some() {
            self.live.token(choice, Instant::now());
        }
        let Some(said) = self.said(choice) else { return Ok(()) };
        said.has_new_line |= content.contains('\n');
        said.tokens.extend(token);
        let mut frame = json!({
            "index": choice,
            "content": content,
            "tokens": token.into_iter().collect::<Vec<_>>(),
            "stop": false,
            "id_slot": -1,
            "tokens_predicted": said.tokens.len(),
        });
        if let (Some(logprob), Some(token)) = (logprob, token) {
            frame["completion_probabilities"] = Self::probabilities(&[logprob], &[token]);
        }
        if let Some(timings) = self.live.timings(choice) {
            frame["timings"] = serde_json::to_value(timings)?;
        }
        frames.data(&frame)
    }

    fn choice_ended(&mut self, choice: usize, tally: &Tally, frames: &mut Frames) -> Result<(), serde_json::Error> {
        frames.data(&chosen(self.end(choice, "", tally), &self.response_fields))
    }

    /// The last object says that it is the last; there is no `[DONE]`.
    fn ended(&mut self, _: &Tally, _: &mut Frames) -> Result<(), serde_json::Error> {
        Ok(())
    }

    fn failed(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.raw(self.form().error_frame(error, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_the_fields_that_were_asked_for() {
        let answer = json!({"content": "x", "stop": true, "generation_settings": {"n_predict": 7, "seed": 1}});
        let fields = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(chosen(answer.clone(), &[]), answer);
        let some = fields(&["generation_settings/n_predict", "nothing", "content", "content/x"]);
        assert_eq!(chosen(answer, &some), json!({"generation_settings/n_predict": 7, "content": "x"}));
    }
}
