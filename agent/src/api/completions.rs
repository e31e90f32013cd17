//! `POST /v1/completions`.

use axum::response::Response;
use serde_json::{Map, Value};

use super::ApiState;
use super::dialect::{ChoiceJob, Job};
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::intake::Intake;
use super::media::{MarkedPrompt, PromptObject};
use super::openai::OpenAi;
use super::output::PlainText;
use super::overflow::fit_prompts;
use super::params::Params;
use super::run;
use super::wire::Shape;
use crate::engine::{MAX_TOP_LOGPROBS, Media, SamplingParams, Token};

/// Prompts that one request may have.
pub const MAX_PROMPTS: usize = 16;

/// Tokens when none are said, as with OpenAI.
pub const DEFAULT_MAX_TOKENS: u32 = 16;

/// The handler.
pub(super) async fn text_completions(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, fields } = intake;
    let CompletionRequest { params, prompts, logprobs, echo } = CompletionRequest::read(fields, state.defaults())?;
    let resolve = move |state: &ApiState| {
        let resolved = prompts.into_iter().map(|prompt| prompt.resolve(state, echo)).collect::<Result<Vec<_>, _>>()?;
        let (resolved, media): (Vec<_>, Vec<Media>) = resolved.into_iter().unzip();
        let (prompts, mut texts): (Vec<_>, Vec<String>) = resolved.into_iter().unzip();
        let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
        let (prompts, truncation) = fit_prompts(state, &params, prompts)?;
        // What is answered is echoed.
        for ((text, prompt), before) in texts.iter_mut().zip(&prompts).zip(lengths) {
            if echo && prompt.len() != before {
                *text = state.engine().detokenize(prompt);
            }
        }
        Ok((params, prompts, media, texts, truncation))
    };
    let (params, prompts, media, texts, truncation) = state.prepare(resolve).await?;
    let per_prompt = params.n as usize;
    let echoes = texts.iter().flat_map(|text| std::iter::repeat_n(text.clone(), per_prompt)).collect();
    let dialect = OpenAi::new(&state, Shape::Text, &params, logprobs.is_some()).echoing(echoes);
    let mut requests = params.requests(logprobs, prompts, &visit);
    params.lend(&mut requests, media);
    let choices = requests.into_iter().map(|request| ChoiceJob { request, parser: Box::new(PlainText) }).collect();
    let stream = params.stream;
    run::answer(&state, visit, Job { dialect: Box::new(dialect), choices, per_prompt, stream, truncation }).await
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<Token>),
    Marked(MarkedPrompt),
}

/// A completion request, checked.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) params: Params,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) logprobs: Option<u32>,
    pub(crate) echo: bool,
}

impl CompletionRequest {
    pub(crate) fn read(mut fields: Fields, defaults: &SamplingParams) -> Result<Self, ApiError> {
        let mut params = Params::read(&fields, defaults)?;
        if fields.get("max_tokens").is_none() && fields.get("max_completion_tokens").is_none() {
            params.max_tokens = Some(DEFAULT_MAX_TOKENS);
        }
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let mut logprobs = fields.integer("logprobs", 0..=i64::from(MAX_TOP_LOGPROBS))?;
        if logprobs.is_none() {
            // llama-server's name, where 0 is off.
            logprobs = fields.integer("n_probs", 0..=i64::from(MAX_TOP_LOGPROBS))?.filter(|top| *top > 0);
        }
        let logprobs = logprobs.and_then(|top| u32::try_from(top).ok());
        if echo && logprobs.is_some() {
            return Err(ApiError::unsupported(
                "echo",
                "'echo' together with 'logprobs' is not supported by this server",
            ));
        }
        let prompts = match fields.take("prompt") {
            None => return Err(ApiError::missing("prompt")),
            Some(prompt) => prompts(prompt)?,
        };
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            let message = format!("'prompt' must have 1 to {MAX_PROMPTS} prompts, not {}", prompts.len());
            return Err(ApiError::invalid("prompt", message));
        }
        Ok(Self { params, prompts, logprobs, echo })
    }
}

impl Prompt {
    /// Tokens and the text to echo, and images and sounds among them.
    fn resolve(self, state: &ApiState, echo: bool) -> Result<((Vec<Token>, String), Media), ApiError> {
        match self {
            Self::Text(text) => {
                let tokens = state.engine().tokenize(&text, true, true);
                let tokens = tokens.map_err(|error| ApiError::internal(error.to_string()))?;
                Ok(((tokens, if echo { text } else { String::new() }), Media::default()))
            }
            Self::Tokens(tokens) => {
                let n_vocab = state.engine().model().n_vocab;
                let known = |token: &&Token| u32::try_from(**token).is_ok_and(|token| token < n_vocab);
                if let Some(stranger) = tokens.iter().find(|token| !known(token)) {
                    let message = format!("token {stranger} is not in the vocabulary of {n_vocab}");
                    return Err(ApiError::invalid("prompt", message));
                }
                let text = if echo { state.engine().detokenize(&tokens) } else { String::new() };
                Ok(((tokens, text), Media::default()))
            }
            Self::Marked(marked) => {
                let (tokens, media) = marked.resolve(state)?;
                Ok(((tokens, if echo { marked.said } else { String::new() }), media))
            }
        }
    }
}

/// A string, strings, tokens, or arrays of tokens.
fn prompts(value: Value) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str =
        "a string, an array of strings, one or more arrays of token ids, or objects with a prompt_string";
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Object(object) => return Ok(vec![marked(object)?]),
        Value::Array(items) => items,
        other => return Err(wrong_type("prompt", EXPECTED, &other)),
    };
    if items.first().is_some_and(Value::is_number) {
        return Ok(vec![Prompt::Tokens(tokens(&items)?)]);
    }
    let one = |item: Value| match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(items) => Ok(Prompt::Tokens(tokens(&items)?)),
        Value::Object(object) => marked(object),
        other => Err(wrong_type("prompt", EXPECTED, &other)),
    };
    items.into_iter().map(one).collect()
}

/// llama-server's form of a prompt with images or sounds.
fn marked(object: Map<String, Value>) -> Result<Prompt, ApiError> {
    Ok(match PromptObject::read("prompt", object)? {
        PromptObject::Text(text) => Prompt::Text(text),
        PromptObject::Marked(marked) => Prompt::Marked(marked),
    })
}

fn tokens(items: &[Value]) -> Result<Vec<Token>, ApiError> {
    let one = |item: &Value| {
        let token = item.as_i64().and_then(|token| Token::try_from(token).ok());
        token.ok_or_else(|| ApiError::invalid("prompt", format!("'prompt' has {item} where a token id is expected")))
    };
    items.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn read(json: &str) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::read(Fields(parse_object(json.as_bytes()).unwrap()), &SamplingParams::default())
    }

    #[test]
    fn prompts_in_every_form() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        for (json, expected) in [
            (r#""hi""#, vec![text("hi")]),
            (r#"["a", "b"]"#, vec![text("a"), text("b")]),
            ("[1, 2]", vec![Prompt::Tokens(vec![1, 2])]),
            (r#"[{"prompt_string": "a"}, "b"]"#, vec![text("a"), text("b")]),
            ("[[1, 2], [3]]", vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]),
        ] {
            let request = read(&format!(r#"{{"prompt": {json}}}"#)).unwrap();
            assert_eq!(request.prompts, expected);
            assert_eq!(request.params.max_tokens, Some(16));
        }
        assert_eq!(read(r#"{"prompt": "a", "max_tokens": -1}"#).unwrap().params.max_tokens, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let seventeen = format!(r#"{{"prompt": {:?}}}"#, vec!["x"; 17]);
        for (json, param, code) in [
            ("{}", "prompt", "missing_required_parameter"),
            (r#"{"prompt": 5}"#, "prompt", "invalid_value"),
            (r#"{"prompt": []}"#, "prompt", "invalid_value"),
            (r#"{"prompt": [1, "a"]}"#, "prompt", "invalid_value"),
            (r#"{"prompt": [[1], {}]}"#, "prompt.prompt_string", "invalid_value"),
            (
                r#"{"prompt": {"prompt_string": "a", "multimodal_data": ["AAAA"]}}"#,
                "prompt.multimodal_data",
                "invalid_value",
            ),
            (r#"{"prompt": [99999999999]}"#, "prompt", "invalid_value"),
            (r#"{"prompt": "a", "logprobs": 21}"#, "logprobs", "invalid_value"),
            (r#"{"prompt": "a", "logprobs": 1, "echo": true}"#, "echo", "unsupported_parameter"),
            (r#"{"prompt": "a", "suffix": "b"}"#, "suffix", "unsupported_parameter"),
            (seventeen.as_str(), "prompt", "invalid_value"),
        ] {
            let error = read(json).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{json}");
        }
    }
}
