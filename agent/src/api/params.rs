//! The parameters that chat and completions share, validated.
//!
//! Three kinds of fields: those below are honoured within the documented ranges; those in [`UNSUPPORTED`] change what
//! the answer would be and cannot be honoured, so a value other than the neutral one is 400 `unsupported_parameter`;
//! all others are ignored, as OpenAI does, so that clients may send fields that are newer than this server.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::intake::Visit;
use crate::engine::{CacheKey, GenerateRequest, MAX_LOGIT_BIAS, SamplingParams, Token};

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
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    /// llama-server's `cache_prompt`: false reads the whole prompt.
    pub(crate) cache_prompt: bool,
    /// vLLM's `cache_salt`: prompts share computed prefixes only with prompts of the same salt.
    pub(crate) cache_salt: String,
    pub(crate) n: u32,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

impl Params {
    /// Reads the fields; `defaults` are the deployment's sampling parameters.
    pub(crate) fn read(fields: &Fields, defaults: &SamplingParams) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let n = fields.integer("n", 1..=i64::from(MAX_CHOICES))?.unwrap_or(1);
        Ok(Self {
            max_tokens: max_tokens(fields)?,
            sampling: sampling(fields, defaults)?,
            stop: stop(fields)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            cache_prompt: fields.boolean("cache_prompt")?.unwrap_or(true),
            cache_salt: cache_salt(fields)?,
            n: u32::try_from(n).unwrap_or(1),
            stream,
            include_usage: include_usage(fields, stream)?,
        })
    }
}

impl Params {
    /// `n` generations for each prompt. With a seed, each choice has its own, so that they differ and can be repeated.
    pub(crate) fn requests(
        &self,
        logprobs: Option<u32>,
        prompts: Vec<Vec<Token>>,
        visit: &Visit,
    ) -> Vec<GenerateRequest> {
        let Self { max_tokens, sampling, stop, ignore_eos, cache_prompt, cache_salt, n, stream: _, include_usage: _ } =
            self;
        let cache = CacheKey { salt: cache_salt.clone(), ..CacheKey::default() };
        let mut requests = Vec::with_capacity(prompts.len() * *n as usize);
        for prompt in prompts {
            for choice in 0..*n {
                let seed = sampling.seed.map(|seed| seed.wrapping_add(choice).min(u32::MAX - 1));
                requests.push(GenerateRequest {
                    id: visit.request_id.clone(),
                    prompt: prompt.clone(),
                    max_tokens: *max_tokens,
                    sampling: SamplingParams { seed, ..sampling.clone() },
                    grammar: None,
                    stop: stop.clone(),
                    preserved: Vec::new(),
                    ignore_eos: *ignore_eos,
                    logprobs,
                    deadline: Some(visit.queue_deadline),
                    cache: cache.clone(),
                    cache_prompt: *cache_prompt,
                });
            }
        }
        requests
    }
}

fn max_tokens(fields: &Fields) -> Result<Option<u32>, ApiError> {
    for name in ["max_completion_tokens", "max_tokens"] {
        let Some(tokens) = fields.integer(name, -1..=i64::from(i32::MAX))? else { continue };
        // llama.cpp's word for "until the model ends".
        if tokens == -1 {
            return Ok(None);
        }
        if tokens == 0 {
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

fn sampling(fields: &Fields, defaults: &SamplingParams) -> Result<SamplingParams, ApiError> {
    let mut sampling = defaults.clone();
    if let Some(temperature) = fields.number("temperature", 0.0..=2.0)? {
        sampling.temperature = temperature;
    }
    if let Some(top_p) = fields.number("top_p", 0.0..=1.0)? {
        sampling.top_p = top_p;
    }
    if let Some(min_p) = fields.number("min_p", 0.0..=1.0)? {
        sampling.min_p = min_p;
    }
    if let Some(top_k) = fields.integer("top_k", -1..=1_000_000)? {
        // vLLM says -1, llama.cpp 0 for "all".
        sampling.top_k = u32::try_from(top_k).unwrap_or(0);
    }
    for name in ["frequency_penalty", "presence_penalty"] {
        if let Some(penalty) = fields.number(name, -2.0..=2.0)? {
            match name {
                "frequency_penalty" => sampling.frequency_penalty = penalty,
                _ => sampling.presence_penalty = penalty,
            }
        }
    }
    // llama.cpp's name first, vLLM's second.
    for name in ["repeat_penalty", "repetition_penalty"] {
        if let Some(penalty) = fields.number(name, 0.01..=10.0)? {
            sampling.repeat_penalty = penalty;
            break;
        }
    }
    if let Some(seed) = fields.integer("seed", i64::MIN..=i64::MAX)? {
        sampling.seed = fold_seed(seed);
    }
    if let Some(bias) = fields.get("logit_bias") {
        sampling.logit_bias = logit_bias(bias)?;
    }
    Ok(sampling)
}

/// llama.cpp's seeds have 32 bits: smaller ones stay as they are, -1 is "another one each time" as with llama-server.
fn fold_seed(seed: i64) -> Option<u32> {
    if seed == -1 {
        return None;
    }
    let bits = seed.cast_unsigned();
    #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
    let folded = (bits ^ (bits >> 32)) as u32;
    // u32::MAX is llama.cpp's LLAMA_DEFAULT_SEED, which means a random one.
    Some(folded.min(u32::MAX - 1))
}

fn logit_bias(value: &Value) -> Result<Vec<(Token, f32)>, ApiError> {
    const NAME: &str = "logit_bias";
    let Some(entries) = value.as_object() else {
        return Err(wrong_type(NAME, "an object of token ids and numbers", value));
    };
    if entries.len() > MAX_LOGIT_BIAS {
        let message = format!("'{NAME}' may have {MAX_LOGIT_BIAS} entries, not {}", entries.len());
        return Err(ApiError::invalid(NAME, message));
    }
    let entry = |(token, bias): (&String, &Value)| {
        let token: Token = token.parse().ok().filter(|token| *token >= 0).ok_or_else(|| {
            ApiError::invalid(
                NAME,
                format!("'{NAME}' has the key '{}', which is no token id", super::error::clip(token)),
            )
        })?;
        match bias.as_f64() {
            #[expect(clippy::cast_possible_truncation, reason = "llama.cpp samples with f32")]
            Some(number) if (-100.0..=100.0).contains(&number) => Ok((token, number as f32)),
            _ => {
                Err(ApiError::invalid(NAME, format!("'{NAME}' of token {token} must be from -100 to 100, not {bias}")))
            }
        }
    };
    entries.iter().map(entry).collect()
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
pub const UNSUPPORTED: [(&str, IsNeutral); 34] = [
    ("tools", is_empty),
    ("functions", is_empty),
    ("tool_choice", is_none_word),
    ("function_call", is_none_word),
    ("response_format", is_text_format),
    ("structured_outputs", never),
    ("json_schema", never),
    ("grammar", is_empty),
    ("guided_json", never),
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
    ("typical_p", is_one),
    ("top_n_sigma", is_not_positive),
    ("mirostat", is_zero),
    ("dynatemp_range", is_zero),
    ("dry_multiplier", is_zero),
    ("xtc_probability", is_zero),
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

fn is_text_format(value: &Value) -> bool {
    value.get("type").and_then(Value::as_str) == Some("text")
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

fn is_not_positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number <= 0.0)
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
            r#"{"max_tokens": 5, "max_completion_tokens": 7, "temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1,
                "seed": 42, "stop": ["a", "b"], "frequency_penalty": -2, "presence_penalty": 1.5, "repeat_penalty": 1.1,
                "logit_bias": {"15": -100, "2": 1.5}, "n": 3, "ignore_eos": true, "stream": true,
                "stream_options": {"include_usage": true}, "user": "me", "some_future_field": {}}"#,
        )
        .unwrap();
        assert_eq!(params.max_tokens, Some(7));
        let SamplingParams { logit_bias, seed, .. } = &params.sampling;
        assert_eq!(*seed, Some(42));
        assert!(logit_bias.contains(&(15, -100.0)), "{logit_bias:?}");
        let expected = SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 0.5,
            min_p: 0.1,
            repeat_penalty: 1.1,
            frequency_penalty: -2.0,
            presence_penalty: 1.5,
            seed: Some(42),
            logit_bias: logit_bias.clone(),
            ..SamplingParams::default()
        };
        assert_eq!(params.sampling, expected);
        assert_eq!(params.stop, ["a", "b"]);
        assert!(params.ignore_eos && params.stream && params.include_usage);
        assert_eq!(params.n, 3);
        assert_eq!(read(r#"{"max_tokens": -1}"#).unwrap().max_tokens, None);
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
    fn seeds_keep_32_bits() {
        for (seed, expected) in
            [(0, Some(0)), (7, Some(7)), (-1, None), (1 << 32, Some(1)), (4_294_967_295, Some(4_294_967_294))]
        {
            assert_eq!(fold_seed(seed), expected, "{seed}");
        }
        assert_ne!(fold_seed(i64::MIN), None);
    }

    #[test]
    fn what_is_out_of_range_is_named_with_its_limits() {
        let seventeen = format!(r#"{{"stop": {:?}}}"#, vec!["x"; 17]);
        let long = format!(r#"{{"stop": "{}"}}"#, "x".repeat(513));
        let cases = [
            (r#"{"temperature": 2.1}"#, "temperature", "from 0 to 2"),
            (r#"{"temperature": -0.1}"#, "temperature", "from 0 to 2"),
            (r#"{"temperature": "hot"}"#, "temperature", "a number"),
            (r#"{"top_p": 1.5}"#, "top_p", "from 0 to 1"),
            (r#"{"min_p": -1}"#, "min_p", "from 0 to 1"),
            (r#"{"top_k": -2}"#, "top_k", "from -1 to 1000000"),
            (r#"{"n": 9}"#, "n", "from 1 to 8"),
            (r#"{"n": 0}"#, "n", "from 1 to 8"),
            (r#"{"max_tokens": 0}"#, "max_tokens", "at least 1"),
            (r#"{"max_completion_tokens": -2}"#, "max_completion_tokens", "from -1"),
            (r#"{"frequency_penalty": 2.5}"#, "frequency_penalty", "from -2 to 2"),
            (r#"{"presence_penalty": -2.5}"#, "presence_penalty", "from -2 to 2"),
            (r#"{"repeat_penalty": 0}"#, "repeat_penalty", "from 0.01 to 10"),
            (r#"{"seed": 1.5}"#, "seed", "an integer"),
            (seventeen.as_str(), "stop", "16 texts, not 17"),
            (long.as_str(), "stop", "1 to 512 bytes"),
            (r#"{"stop": [""]}"#, "stop", "1 to 512 bytes"),
            (r#"{"stop": [1]}"#, "stop", "an array of strings"),
            (r#"{"logit_bias": {"1": 101}}"#, "logit_bias", "from -100 to 100"),
            (r#"{"logit_bias": {"a": 1}}"#, "logit_bias", "no token id"),
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
            ("response_format", r#"{"type": "json_object"}"#, r#"{"type": "text"}"#),
            ("modalities", r#"["text", "audio"]"#, r#"["text"]"#),
            ("audio", r#"{"voice": "alloy"}"#, "null"),
            ("best_of", "3", "1"),
            ("suffix", r#""end""#, r#""""#),
            ("typical_p", "0.5", "1.0"),
            ("mirostat", "2", "0"),
            ("xtc_probability", "0.1", "0"),
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
