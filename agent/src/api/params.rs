//! The parameters that chat and completions share, validated.
//!
//! | field | values | |
//! |---|---|---|
//! | `max_completion_tokens`, `max_tokens`, `n_predict` | ≥ 1 (`n_predict`: ≥ 0); -1: no limit | clamped to what the context leaves |
//! | `n` | 1 to 8 | choices; with a seed each has its own, so they can be repeated |
//! | `stop` | a text, or 16 of 1 to 512 bytes | found across tokens, never shown |
//! | `ignore_eos` | | goes on after the model's end; with a grammar only the grammar ends |
//! | `seed` | an integer; -1: another each time | same seed and same schedule, same text |
//! | `temperature` | 0 to 2 | 0 is greedy |
//! | `dynatemp_range`, `dynatemp_exponent` | 0 to 2, 0 to 10 | the temperature moves with the entropy |
//! | `top_k` | -1 to 1,000,000 | 0 and -1 keep all |
//! | `top_p`, `min_p`, `typical_p` | 0 to 1 | 1, 0 and 1 are off |
//! | `top_n_sigma` | -1 to 100 | 0 and less are off |
//! | `xtc_probability`, `xtc_threshold` | 0 to 1 | probability 0 is off |
//! | `min_keep` | 0 to 2^20 | what `top_p`, `min_p`, `typical_p` and XTC keep at least |
//! | `repeat_penalty` (`repetition_penalty`) | 0.01 to 10 | 1 is off |
//! | `frequency_penalty`, `presence_penalty` | -2 to 2 | 0 is off |
//! | `repeat_last_n` | -1 to 2^20 | tokens that these look back; -1: the whole context |
//! | `dry_multiplier`, `dry_base`, `dry_allowed_length`, `dry_penalty_last_n`, `dry_sequence_breakers` | 0 to 100, 0 to 100, counts to 2^20, 16 texts of 40 bytes | multiplier 0 is off |
//! | `mirostat`, `mirostat_tau`, `mirostat_eta` | 0, 1, 2; 0 to 100; 0 to 1 | takes the place of `samplers` |
//! | `adaptive_target`, `adaptive_decay` | -1 to 1, 0 to 0.99 | with `adaptive_p` among the `samplers`: tokens near this probability, over time |
//! | `samplers` | names as llama-server's, or its letters | the order; one that is not named is not used |
//! | `logit_bias` | an object, or an array of pairs: token or text, and -100 to 100 or `false` (never) | 1024 entries |
//! | `response_format` | `text`, `json_object` (may have a `schema`), `json_schema` | valid JSON, whatever the model |
//! | `json_schema`, `guided_json` | a schema | the same, in llama-server's and vLLM's words |
//! | `grammar` | GBNF | from its rule `root` |
//! | `return_progress`, `timings_per_token` | | of streams: chunks that say how far the prompt has been read, `timings` in every chunk |
//! | `verbose` | | of chat and completions: `__verbose`, what `/completion` would have said: the prompt as text and the settings |
//! | `altiplano` | `overflow`: `Reject`, `DropOldest`, `DropMiddle` | what happens to a prompt that is too long; else as `spec.context.overflow` says |
//! | `cache_prompt`, `cache_salt` | true or false; a text of 256 bytes | whether, and with whom, computed prefixes are shared |
//!
//! Sampling parameters that a request does not name are the deployment's `spec.engine.sampling`, else the ones in the
//! model file (`general.sampling.*`), else llama.cpp's. A schema or grammar that cannot be compiled, or is too large or
//! too ambiguous, is 400; `oneOf` is read as `anyOf`, `not` and look-around in patterns are not known, and `$ref` stays
//! within the schema.
//!
//! Other fields are of two kinds: those in [`UNSUPPORTED`] change what the answer would be and cannot be honoured, so a
//! value other than the neutral one is 400 `unsupported_parameter`; all others are ignored, as OpenAI does, so that
//! clients may send fields that are newer than this server.

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::intake::Visit;
use super::overflow;
use super::sampling;
use crate::engine::{CacheKey, GenerateRequest, Grammar, LineLimits, Media, SamplingParams, Token};

/// Choices that one request may ask for.
pub const MAX_CHOICES: u32 = 8;

/// Stop texts that one request may have.
pub const MAX_STOPS: usize = 16;

/// Bytes of one stop text.
pub const MAX_STOP_BYTES: usize = 512;

/// Bytes of `cache_salt`, as in vLLM.
pub const MAX_SALT_BYTES: usize = 256;

/// What chat and completions share.
#[expect(clippy::struct_excessive_bools, reason = "clients may say so many things with true or false")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Params {
    pub(crate) max_tokens: Option<u32>,
    pub(crate) sampling: SamplingParams,
    pub(crate) grammar: Option<Grammar>,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    /// llama-server's `cache_prompt`: false reads the whole prompt.
    pub(crate) cache_prompt: bool,
    /// vLLM's `cache_salt`: prompts share computed prefixes only with prompts of the same salt.
    pub(crate) cache_salt: String,
    pub(crate) n: u32,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Chunks in a stream that say how far the prompt has been read.
    pub(crate) return_progress: bool,
    /// `timings` in every chunk of a stream.
    pub(crate) timings_per_token: bool,
    /// `__verbose` beside the answer.
    pub(crate) verbose: bool,
    /// `num_ctx`: tokens of context to aim for, whatever the sizing's formula says. Never a limit, never a reload.
    pub(crate) aim_tokens: Option<u32>,
    /// What happens to a prompt that is too long; `None`: what the deployment says.
    pub(crate) overflow: Option<OverflowPolicy>,
}

impl Params {
    /// Reads the fields; `defaults` are the deployment's sampling parameters.
    pub(crate) fn read(fields: &Fields, defaults: &SamplingParams) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let n = fields.integer("n", 1..=i64::from(MAX_CHOICES))?.unwrap_or(1);
        Ok(Self {
            max_tokens: max_tokens(fields)?,
            sampling: sampling::read(fields, defaults)?,
            grammar: sampling::grammar(fields)?,
            stop: stop(fields)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            cache_prompt: fields.boolean("cache_prompt")?.unwrap_or(true),
            cache_salt: cache_salt(fields)?,
            n: u32::try_from(n).unwrap_or(1),
            stream,
            include_usage: include_usage(fields, stream)?,
            return_progress: fields.boolean("return_progress")?.unwrap_or(false),
            timings_per_token: fields.boolean("timings_per_token")?.unwrap_or(false),
            verbose: fields.boolean("verbose")?.unwrap_or(false),
            aim_tokens: fields.integer("num_ctx", 1..=i64::from(i32::MAX))?.and_then(|aim| u32::try_from(aim).ok()),
            overflow: overflow::read(fields)?,
        })
    }

    /// Gives each prompt's requests its images and sounds.
    pub(crate) fn lend(&self, requests: &mut [GenerateRequest], media: Vec<Media>) {
        for (requests, media) in requests.chunks_mut(self.n.max(1) as usize).zip(media) {
            for request in requests {
                request.media.clone_from(&media);
            }
        }
    }

    /// `n` generations for each prompt. With a seed, each choice has its own, so that they differ and can be repeated.
    pub(crate) fn requests(
        &self,
        logprobs: Option<u32>,
        prompts: Vec<Vec<Token>>,
        visit: &Visit,
    ) -> Vec<GenerateRequest> {
        let Self {
            max_tokens,
            sampling,
            grammar,
            stop,
            ignore_eos,
            cache_prompt,
            cache_salt,
            n,
            stream,
            include_usage: _,
            return_progress,
            timings_per_token,
            verbose: _,
            aim_tokens,
            overflow: _,
        } = self;
        let cache = CacheKey { salt: cache_salt.clone(), ..CacheKey::default() };
        let mut requests = Vec::with_capacity(prompts.len() * *n as usize);
        for prompt in prompts {
            for choice in 0..*n {
                let seed = sampling.seed.map(|seed| seed.wrapping_add(choice).min(u32::MAX - 1));
                requests.push(GenerateRequest {
                    media: Media::default(),
                    id: visit.request_id.clone(),
                    prompt: prompt.clone(),
                    max_tokens: *max_tokens,
                    sampling: SamplingParams { seed, ..sampling.clone() },
                    grammar: grammar.clone(),
                    reasoning: None,
                    stop: stop.clone(),
                    lines: LineLimits::default(),
                    preserved: Vec::new(),
                    ignore_eos: *ignore_eos,
                    logprobs,
                    deadline: Some(visit.queue_deadline),
                    cache: cache.clone(),
                    cache_prompt: *cache_prompt,
                    borders: Vec::new(),
                    aim_tokens: *aim_tokens,
                    progress: (*return_progress || *timings_per_token) && *stream,
                    every_token: false,
                    adapter: visit.adapter,
                });
            }
        }
        requests
    }
}

fn max_tokens(fields: &Fields) -> Result<Option<u32>, ApiError> {
    // llama-server's name last.
    for name in ["max_completion_tokens", "max_tokens", "n_predict"] {
        let Some(tokens) = fields.integer(name, -1..=i64::from(i32::MAX))? else { continue };
        // llama.cpp's word for "until the model ends".
        if tokens == -1 {
            return Ok(None);
        }
        // To llama-server, 0 is "only read the prompt".
        if tokens == 0 && name != "n_predict" {
            return Err(ApiError::invalid(name, format!("'{name}' must be at least 1, or -1 for no limit, not 0")));
        }
        return Ok(u32::try_from(tokens).ok());
    }
    Ok(None)
}

fn cache_salt(fields: &Fields) -> Result<String, ApiError> {
    match fields.get("cache_salt") {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(salt)) if salt.len() <= MAX_SALT_BYTES => Ok(salt.clone()),
        Some(Value::String(_)) => {
            Err(ApiError::invalid("cache_salt", format!("'cache_salt' may have at most {MAX_SALT_BYTES} bytes")))
        }
        Some(other) => Err(wrong_type("cache_salt", "a string", other)),
    }
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "stop";
    let texts = match fields.get(NAME) {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(texts)) => texts
            .iter()
            .map(|text| text.as_str().map(str::to_owned).ok_or_else(|| wrong_type(NAME, "an array of strings", text)))
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type(NAME, "a string or an array of strings", other)),
    };
    if texts.len() > MAX_STOPS {
        return Err(ApiError::invalid(NAME, format!("'{NAME}' may have {MAX_STOPS} texts, not {}", texts.len())));
    }
    if texts.iter().any(|text| text.is_empty() || text.len() > MAX_STOP_BYTES) {
        return Err(ApiError::invalid(NAME, format!("each text in '{NAME}' must have 1 to {MAX_STOP_BYTES} bytes")));
    }
    Ok(texts)
}

fn include_usage(fields: &Fields, stream: bool) -> Result<bool, ApiError> {
    const NAME: &str = "stream_options";
    let Some(options) = fields.get(NAME) else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid(NAME, format!("'{NAME}' is only allowed when 'stream' is true")));
    }
    let Some(options) = options.as_object() else { return Err(wrong_type(NAME, "an object", options)) };
    match options.get("include_usage") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(include)) => Ok(*include),
        Some(other) => Err(wrong_type("stream_options.include_usage", "true or false", other)),
    }
}

/// Whether a value asks for nothing.
pub type IsNeutral = fn(&Value) -> bool;

/// Fields that cannot be honoured, with the test for a value that asks for nothing.
pub const UNSUPPORTED: [(&str, IsNeutral); 24] = [
    ("tools", is_empty),
    ("functions", is_empty),
    ("tool_choice", is_none_word),
    ("function_call", is_none_word),
    ("structured_outputs", never),
    ("guided_regex", never),
    ("guided_choice", never),
    ("guided_grammar", never),
    ("audio", never),
    ("modalities", is_text_only),
    ("prediction", never),
    ("web_search_options", never),
    ("reasoning_effort", is_none_word),
    ("verbosity", is_medium),
    ("suffix", is_empty),
    ("best_of", is_one),
    ("use_beam_search", is_false),
    ("min_tokens", is_zero),
    ("continue_final_message", is_false),
    ("prompt_logprobs", is_zero_or_false),
    ("lora", is_empty),
    ("image_data", is_empty),
    ("n_keep", is_zero),
    ("truncation", never),
];

fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    for (name, is_neutral) in UNSUPPORTED {
        if let Some(value) = fields.get(name)
            && !is_neutral(value)
        {
            return Err(ApiError::unsupported(name, format!("'{name}' is not supported by this server")));
        }
    }
    Ok(())
}

fn never(_: &Value) -> bool {
    false
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn is_none_word(value: &Value) -> bool {
    value.as_str() == Some("none")
}

fn is_medium(value: &Value) -> bool {
    value.as_str() == Some("medium")
}

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|items| items.iter().all(|item| item.as_str() == Some("text")))
}

fn is_false(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_zero_or_false(value: &Value) -> bool {
    is_zero(value) || is_false(value)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn read(json: &str) -> Result<Params, ApiError> {
        Params::read(&Fields(parse_object(json.as_bytes()).unwrap()), &SamplingParams::default())
    }

    #[test]
    fn nothing_said_means_the_deployments_defaults() {
        let params = read("{}").unwrap();
        assert_eq!(params.sampling, SamplingParams::default());
        assert_eq!((params.max_tokens, params.n, params.stream, params.include_usage), (None, 1, false, false));
    }

    #[test]
    fn everything_said_is_honoured() {
        let params = read(
            r#"{"max_tokens": 5, "max_completion_tokens": 7, "temperature": 0, "seed": 42, "stop": ["a", "b"], "n": 3,
                "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true}, "user": "me",
                "response_format": {"type": "json_object"}, "some_future_field": {}}"#,
        )
        .unwrap();
        assert_eq!(params.max_tokens, Some(7));
        let expected = SamplingParams { temperature: 0.0, seed: Some(42), ..SamplingParams::default() };
        assert_eq!(params.sampling, expected);
        assert_eq!(params.stop, ["a", "b"]);
        assert!(params.grammar.is_some() && params.ignore_eos && params.stream && params.include_usage);
        assert_eq!(params.n, 3);
        assert_eq!(read(r#"{"max_tokens": -1}"#).unwrap().max_tokens, None);
        assert_eq!(read(r#"{"n_predict": 9}"#).unwrap().max_tokens, Some(9));
        assert_eq!(read(r#"{"stop": "x"}"#).unwrap().stop, ["x"]);
    }

    #[test]
    fn the_cache_is_the_clients_choice() {
        let params = read(r#"{"cache_prompt": false, "cache_salt": "mine"}"#).unwrap();
        assert_eq!((params.cache_prompt, params.cache_salt.as_str()), (false, "mine"));
        let params = read(r#"{"cache_salt": null}"#).unwrap();
        assert_eq!((params.cache_prompt, params.cache_salt.as_str()), (true, ""));
        let long = format!(r#"{{"cache_salt": "{}"}}"#, "x".repeat(MAX_SALT_BYTES + 1));
        for (body, words) in [(long.as_str(), "at most 256 bytes"), (r#"{"cache_salt": 7}"#, "a string")] {
            let error = read(body).unwrap_err();
            assert!(error.message.contains(words), "{}", error.message);
        }
    }

    #[test]
    fn what_is_out_of_range_is_named_with_its_limits() {
        let seventeen = format!(r#"{{"stop": {:?}}}"#, vec!["x"; 17]);
        let long = format!(r#"{{"stop": "{}"}}"#, "x".repeat(513));
        let cases = [
            (r#"{"n": 9}"#, "n", "from 1 to 8"),
            (r#"{"num_ctx": 0}"#, "num_ctx", "from 1 to"),
            (r#"{"return_progress": 1}"#, "return_progress", "true or false"),
            (r#"{"n": 0}"#, "n", "from 1 to 8"),
            (r#"{"max_tokens": 0}"#, "max_tokens", "at least 1"),
            (r#"{"max_completion_tokens": -2}"#, "max_completion_tokens", "from -1"),
            (seventeen.as_str(), "stop", "16 texts, not 17"),
            (long.as_str(), "stop", "1 to 512 bytes"),
            (r#"{"stop": [""]}"#, "stop", "1 to 512 bytes"),
            (r#"{"stop": [1]}"#, "stop", "an array of strings"),
            (r#"{"logit_bias": [1]}"#, "logit_bias", "an object"),
            (r#"{"stream": "yes"}"#, "stream", "true or false"),
            (r#"{"stream_options": {"include_usage": true}}"#, "stream_options", "only allowed when 'stream' is true"),
            (
                r#"{"stream": true, "stream_options": {"include_usage": 1}}"#,
                "stream_options.include_usage",
                "true or false",
            ),
        ];
        for (json, param, says) in cases {
            let error = read(json).unwrap_err();
            assert_eq!(error.status, 400, "{json}");
            assert_eq!(error.kind, "invalid_request_error", "{json}");
            assert_eq!(error.param.as_deref(), Some(param), "{json}");
            assert!(error.message.contains(says), "{json}: {}", error.message);
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_unless_it_asks_for_nothing() {
        let cases = [
            ("tools", r#"[{"type": "function", "function": {"name": "f"}}]"#, "[]"),
            ("tool_choice", r#""required""#, r#""none""#),
            ("function_call", r#"{"name": "f"}"#, r#""none""#),
            ("modalities", r#"["text", "audio"]"#, r#"["text"]"#),
            ("audio", r#"{"voice": "alloy"}"#, "null"),
            ("best_of", "3", "1"),
            ("suffix", r#""end""#, r#""""#),
            ("use_beam_search", "true", "false"),
        ];
        for (name, asks, neutral) in cases {
            let error = read(&format!(r#"{{"{name}": {asks}}}"#)).unwrap_err();
            assert_eq!(error.code.as_deref(), Some("unsupported_parameter"), "{name}");
            assert_eq!(error.param.as_deref(), Some(name));
            read(&format!(r#"{{"{name}": {neutral}}}"#)).unwrap_or_else(|error| panic!("{name}: {}", error.message));
        }
    }
}
