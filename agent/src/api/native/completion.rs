//! `POST /completion`: llama-server's options in, its answer out.
//!
//! `n_predict`, `n_cmpl`, `n_probs`, `n_indent`, `t_max_predict_ms`, `return_tokens` and `response_fields` are read here; `n_predict: 0` reads the
//! prompt and generates nothing. All other options are those of [`params`](crate::api::params), which has llama.cpp's
//! names. A prompt may have images and sounds: an object of
//! `prompt_string` and `multimodal_data`. Refused: `post_sampling_probs`. Ignored: `id_slot`.

use std::time::Duration;

use axum::response::Response;
use serde_json::{Map, Value, json};

use super::answer::Native;
use super::tokens::{stranger, text_tokens, token};
use crate::api::dialect::{ChoiceJob, Job};
use crate::api::error::{ApiError, clip};
use crate::api::fields::{Fields, wrong_type};
use crate::api::intake::{Intake, Visit};
use crate::api::media::{MarkedPrompt, PromptObject};
use crate::api::output::PlainText;
use crate::api::overflow::{Truncation, fit_prompts};
use crate::api::params::{MAX_CHOICES, Params};
use crate::api::run;
use crate::api::state::ApiState;
use crate::engine::{Grammar, LineLimits, MAX_TOP_LOGPROBS, Media, Mirostat, SamplingParams, Token, WHOLE_CONTEXT};

/// Prompts that one request may have.
const MAX_PROMPTS: usize = 16;

/// Names that `response_fields` may have, and bytes of each.
const MAX_RESPONSE_FIELDS: (usize, usize) = (64, 128);

/// Pieces that one prompt may have.
const MAX_PIECES: usize = 1 << 20;

/// The handler.
pub(in crate::api) async fn completion(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, mut fields } = intake;
    let prompts = prompts(fields.take("prompt").ok_or_else(|| ApiError::missing("prompt"))?)?;
    let options = Options::read(fields, state.defaults())?;
    let prepare = move |state: &ApiState| {
        let prompts = prompts.iter().map(|prompt| resolve(state, prompt)).collect::<Result<Vec<_>, _>>()?;
        let (prompts, media) = prompts.into_iter().unzip();
        Ok((fit_prompts(state, &options.params, prompts)?, media, options))
    };
    let ((prompts, truncation), media, options) = state.prepare(prepare).await?;
    answer(&state, visit, options, prompts, media, truncation).await
}

/// What `/completion` and `/infill` have in common.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) params: Params,
    pub(super) logprobs: Option<u32>,
    pub(super) return_tokens: bool,
    pub(super) lines: LineLimits,
    /// What the client wants of the whole object; empty: all of it.
    pub(super) response_fields: Vec<String>,
}

impl Options {
    pub(super) fn read(mut fields: Fields, defaults: &SamplingParams) -> Result<Self, ApiError> {
        // Below zero both are off, as with llama-server.
        let number =
            |name| Ok(fields.integer(name, i64::MIN..=i64::MAX)?.and_then(|number| u32::try_from(number).ok()));
        let milliseconds = number("t_max_predict_ms")?.filter(|milliseconds| *milliseconds > 0);
        let lines = LineLimits {
            indent: number("n_indent")?.unwrap_or(0),
            time: milliseconds.map(|milliseconds| Duration::from_millis(milliseconds.into())),
        };
        if fields.boolean("post_sampling_probs")? == Some(true) {
            let message = "'post_sampling_probs' is not supported by this server: probabilities are the model's own";
            return Err(ApiError::unsupported("post_sampling_probs", message));
        }
        let n_predict = fields.integer("n_predict", -1..=i64::from(i32::MAX))?;
        let n = fields.integer("n_cmpl", 1..=i64::from(MAX_CHOICES))?;
        let logprobs = fields.integer("n_probs", 0..=i64::from(MAX_TOP_LOGPROBS))?;
        let logprobs = logprobs.and_then(|top| u32::try_from(top).ok()).filter(|top| *top > 0);
        let return_tokens = fields.boolean("return_tokens")?.unwrap_or(false);
        let response_fields = response_fields(fields.take("response_fields"))?;
        if let Some(n) = n {
            fields.0.insert("n".to_owned(), n.into());
        }
        let mut params = Params::read(&fields, defaults)?;
        if let Some(n_predict) = n_predict {
            params.max_tokens = u32::try_from(n_predict).ok();
        }
        Ok(Self { params, logprobs, return_tokens, lines, response_fields })
    }

    /// What an OpenAI request's parameters are here.
    pub(super) fn beside(params: Params, logprobs: Option<u32>) -> Self {
        Self { params, logprobs, return_tokens: false, lines: LineLimits::default(), response_fields: Vec::new() }
    }

    /// As llama-server reports them.
    pub(super) fn settings(&self) -> Map<String, Value> {
        let mut settings = settings(&self.params);
        settings.insert("n_probs".to_owned(), self.logprobs.unwrap_or(0).into());
        settings
    }
}

/// Generates for each of the prompts; `media` are theirs, as far as they have some.
pub(super) async fn answer(
    state: &ApiState,
    visit: Visit,
    options: Options,
    prompts: Vec<Vec<Token>>,
    media: Vec<Media>,
    truncation: Option<Truncation>,
) -> Result<Response, ApiError> {
    let stream = options.params.stream;
    let mut requests = options.params.requests(options.logprobs, prompts, &visit);
    for request in &mut requests {
        request.every_token = options.return_tokens || stream;
        request.lines = options.lines;
    }
    let per_prompt = options.params.n as usize;
    options.params.lend(&mut requests, media);
    let dialect = Native::new(state, &options, &requests, per_prompt);
    let choices = requests.into_iter().map(|request| ChoiceJob { request, parser: Box::new(PlainText) }).collect();
    run::answer(state, visit, Job { dialect: Box::new(dialect), choices, per_prompt, stream, truncation }).await
}

fn response_fields(given: Option<Value>) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "response_fields";
    let (most, bytes) = MAX_RESPONSE_FIELDS;
    let names = match given {
        None => return Ok(Vec::new()),
        Some(Value::Array(names)) if names.len() <= most => names,
        Some(Value::Array(names)) => {
            return Err(ApiError::invalid(NAME, format!("'{NAME}' may have {most} names, not {}", names.len())));
        }
        Some(other) => return Err(wrong_type(NAME, "an array of strings", &other)),
    };
    let one = |name: Value| match name {
        Value::String(name) if name.len() <= bytes => Ok(name),
        Value::String(_) => Err(ApiError::invalid(NAME, format!("a name in '{NAME}' may have {bytes} bytes"))),
        other => Err(wrong_type(NAME, "an array of strings", &other)),
    };
    names.into_iter().map(one).collect()
}

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Token(Token),
    /// A whole prompt.
    Marked(MarkedPrompt),
}

/// A string, an array of tokens and strings, an object with `prompt_string`, or an array of these.
fn prompts(value: Value) -> Result<Vec<Vec<Part>>, ApiError> {
    let prompts = match value {
        Value::Array(items) if items.iter().any(Value::is_number) => vec![mixed(&items)?],
        Value::Array(items) => items.into_iter().map(one).collect::<Result<Vec<_>, _>>()?,
        other => vec![one(other)?],
    };
    if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
        let message = format!("'prompt' must have 1 to {MAX_PROMPTS} prompts, not {}", prompts.len());
        return Err(ApiError::invalid("prompt", message));
    }
    Ok(prompts)
}

fn one(value: Value) -> Result<Vec<Part>, ApiError> {
    match value {
        Value::String(text) => Ok(vec![Part::Text(text)]),
        Value::Array(items) => mixed(&items),
        Value::Object(object) => Ok(vec![match PromptObject::read("prompt", object)? {
            PromptObject::Text(text) => Part::Text(text),
            PromptObject::Marked(marked) => Part::Marked(marked),
        }]),
        other => Err(wrong_type("prompt", "a string, an array of token ids and strings, or several of these", &other)),
    }
}

fn mixed(items: &[Value]) -> Result<Vec<Part>, ApiError> {
    if items.len() > MAX_PIECES {
        return Err(ApiError::invalid("prompt", format!("'prompt' may have {MAX_PIECES} pieces")));
    }
    let part = |item: &Value| match item {
        Value::String(text) => Some(Part::Text(text.clone())),
        number => token(number).map(Part::Token),
    };
    let wrong = |item: &Value| {
        let message = format!("'prompt' has {} where a token id or a string is expected", clip(&item.to_string()));
        ApiError::invalid("prompt", message)
    };
    items.iter().map(|item| part(item).ok_or_else(|| wrong(item))).collect()
}

/// The model's own first token comes first where a text does.
fn resolve(state: &ApiState, prompt: &[Part]) -> Result<(Vec<Token>, Media), ApiError> {
    let mut tokens = Vec::new();
    for (at, part) in prompt.iter().enumerate() {
        match part {
            Part::Text(text) => tokens.extend(text_tokens(state, text, at == 0, true)?),
            Part::Token(token) if state.engine().piece(*token).is_some() => tokens.push(*token),
            Part::Token(token) => return Err(stranger(state, "prompt", *token)),
            Part::Marked(marked) => return marked.resolve(state),
        }
    }
    Ok((tokens, Media::default()))
}

/// The options as llama-server reports them.
pub(super) fn settings(params: &Params) -> Map<String, Value> {
    let sampling = &params.sampling;
    let n_predict = params.max_tokens.map_or(-1, i64::from);
    let number = |number: f32| Value::from(f64::from(number));
    // Minus infinity, which forbids a token, is null in JSON, as with llama-server.
    let tokens = sampling.logit_bias.iter().map(|(token, bias)| json!({"token": token, "bias": number(*bias)}));
    let texts = sampling.text_bias.iter().map(|(text, bias)| json!({"text": text, "bias": number(*bias)}));
    let grammar = match &params.grammar {
        None => Value::from(""),
        Some(Grammar::Gbnf { source, .. }) => source.as_str().into(),
        Some(Grammar::JsonSchema(schema)) => schema.to_string().into(),
    };
    // llama.cpp's word for all of the context.
    let window = |tokens: u32| Value::from(if tokens == WHOLE_CONTEXT { -1 } else { i64::from(tokens) });
    let mirostat = match sampling.mirostat {
        Mirostat::Off => 0,
        Mirostat::V1 => 1,
        Mirostat::V2 => 2,
    };
    let entries = [
        // llama.cpp's LLAMA_DEFAULT_SEED: another one each time.
        ("seed", sampling.seed.unwrap_or(u32::MAX).into()),
        ("temperature", number(sampling.temperature)),
        ("dynatemp_range", number(sampling.dynatemp_range)),
        ("dynatemp_exponent", number(sampling.dynatemp_exponent)),
        ("top_k", sampling.top_k.into()),
        ("top_p", number(sampling.top_p)),
        ("min_p", number(sampling.min_p)),
        ("top_n_sigma", number(sampling.top_n_sigma)),
        ("xtc_probability", number(sampling.xtc_probability)),
        ("xtc_threshold", number(sampling.xtc_threshold)),
        ("typical_p", number(sampling.typical_p)),
        ("repeat_last_n", window(sampling.repeat_last_n)),
        ("repeat_penalty", number(sampling.repeat_penalty)),
        ("presence_penalty", number(sampling.presence_penalty)),
        ("frequency_penalty", number(sampling.frequency_penalty)),
        ("dry_multiplier", number(sampling.dry.multiplier)),
        ("dry_base", number(sampling.dry.base)),
        ("dry_allowed_length", sampling.dry.allowed_length.into()),
        ("dry_penalty_last_n", window(sampling.dry.penalty_last_n)),
        ("dry_sequence_breakers", sampling.dry.sequence_breakers.clone().into()),
        ("mirostat", mirostat.into()),
        ("mirostat_tau", number(sampling.mirostat_tau)),
        ("mirostat_eta", number(sampling.mirostat_eta)),
        ("adaptive_target", number(sampling.adaptive_target)),
        ("adaptive_decay", number(sampling.adaptive_decay)),
        ("stop", params.stop.clone().into()),
        ("n_predict", n_predict.into()),
        ("max_tokens", n_predict.into()),
        ("n_keep", 0.into()),
        ("n_discard", 0.into()),
        ("ignore_eos", params.ignore_eos.into()),
        ("stream", params.stream.into()),
        ("n_probs", 0.into()),
        ("min_keep", sampling.min_keep.into()),
        ("grammar", grammar),
        ("samplers", sampling.samplers.iter().map(|kind| kind.name()).collect()),
        ("logit_bias", tokens.chain(texts).collect()),
        ("timings_per_token", params.timings_per_token.into()),
        ("post_sampling_probs", false.into()),
        ("lora", Value::Array(Vec::new())),
    ];
    entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn fields(json: &str) -> Fields {
        Fields(parse_object(json.as_bytes()).unwrap())
    }

    #[test]
    fn prompts_in_every_form() {
        let text = |text: &str| Part::Text(text.to_owned());
        for (json, expected) in [
            (r#""hi""#, vec![vec![text("hi")]]),
            ("[1, 2]", vec![vec![Part::Token(1), Part::Token(2)]]),
            (r#"[1, "a", 2]"#, vec![vec![Part::Token(1), text("a"), Part::Token(2)]]),
            (r#"["a", "b"]"#, vec![vec![text("a")], vec![text("b")]]),
            (
                r#"[[1, "a"], "b", {"prompt_string": "c", "multimodal_data": []}]"#,
                vec![vec![Part::Token(1), text("a")], vec![text("b")], vec![text("c")]],
            ),
        ] {
            assert_eq!(prompts(serde_json::from_str(json).unwrap()).unwrap(), expected, "{json}");
        }
        let seventeen = format!("{:?}", vec!["x"; 17]);
        for bad in [
            "5",
            "[]",
            "null",
            "[[{}]]",
            "[1, null]",
            "[99999999999]",
            r#"{"multimodal_data": ["x"]}"#,
            r#"{"prompt_string": "<__media__>", "multimodal_data": "x"}"#,
            r#"{"prompt_string": "<__media__>", "multimodal_data": [1]}"#,
            r#"{"prompt_string": "no place", "multimodal_data": ["AAAA"]}"#,
            r#"{"prompt_string": "<__media__><__media__>", "multimodal_data": ["AAAA"]}"#,
            "{}",
            seventeen.as_str(),
        ] {
            let error = prompts(serde_json::from_str(bad).unwrap()).unwrap_err();
            assert!(
                error.status == 400 && error.param.as_deref().is_some_and(|param| param.starts_with("prompt")),
                "{bad}"
            );
        }
    }

    #[test]
    fn options_have_llama_servers_names() {
        let read = |json: &str| Options::read(fields(json), &SamplingParams::default());
        let options =
            read(r#"{"n_predict": 7, "n_cmpl": 2, "n_probs": 3, "return_tokens": true, "id_slot": 4}"#).unwrap();
        assert_eq!((&options.settings()["n_predict"], &options.settings()["n_probs"]), (&json!(7), &json!(3)));
        let Options { params, logprobs, return_tokens, lines, response_fields } = options;
        assert_eq!(lines, LineLimits::default());
        assert_eq!((params.max_tokens, params.n, logprobs, return_tokens), (Some(7), 2, Some(3), true));
        assert_eq!(response_fields, Vec::<String>::new());
        let settings = read(
            r#"{"logit_bias": [[3, 1.5], [4, false], ["x", -1]], "samplers": ["top_k"], "grammar": "root ::= \"a\"",
            "response_fields": ["content", "generation_settings/seed"]}"#,
        )
        .unwrap();
        assert_eq!(settings.response_fields, ["content", "generation_settings/seed"]);
        let settings = settings.settings();
        let biases = json!([{"token": 3, "bias": 1.5}, {"token": 4, "bias": null}, {"text": "x", "bias": -1.0}]);
        assert_eq!((&settings["logit_bias"], &settings["samplers"]), (&biases, &json!(["top_k"])));
        assert_eq!(settings["grammar"], "root ::= \"a\"");
        let lines = |json: &str| read(json).unwrap().lines;
        assert_eq!(lines(r#"{"n_indent": -1, "t_max_predict_ms": -1}"#), LineLimits::default());
        let limits = LineLimits { indent: 4, time: Some(Duration::from_secs(1)) };
        assert_eq!(lines(r#"{"n_indent": 4, "t_max_predict_ms": 1000}"#), limits);
        assert_eq!(read(r#"{"n_predict": -1}"#).unwrap().params.max_tokens, None);
        assert_eq!(read(r#"{"n_predict": 0}"#).unwrap().params.max_tokens, Some(0));
        for (json, param) in [
            (r#"{"n_predict": -2}"#, "n_predict"),
            (r#"{"n_cmpl": 9}"#, "n_cmpl"),
            (r#"{"n_probs": 21}"#, "n_probs"),
            (r#"{"response_fields": "content"}"#, "response_fields"),
            (r#"{"response_fields": [1]}"#, "response_fields"),
            (r#"{"post_sampling_probs": true}"#, "post_sampling_probs"),
            (r#"{"t_max_predict_ms": "1 s"}"#, "t_max_predict_ms"),
            (r#"{"n_indent": []}"#, "n_indent"),
        ] {
            assert_eq!(read(json).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }
}
