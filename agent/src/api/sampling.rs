//! The sampling parameters and the grammar of a request. The table of all fields is in [`params`](super::params).

use serde_json::{Value, json};

use super::error::{ApiError, clip};
use super::fields::{Fields, wrong_type};
use crate::engine::{
    Grammar, MAX_BIAS_TEXT_BYTES, MAX_LOGIT_BIAS, MAX_SAMPLERS, MAX_SEQUENCE_BREAKER_BYTES, MAX_SEQUENCE_BREAKERS,
    Mirostat, SamplerKind, SamplingParams, Token, WHOLE_CONTEXT,
};

/// Most tokens that a parameter may count.
const MANY: i64 = 1 << 20;

/// The request's parameters over `defaults`.
pub(super) fn read(fields: &Fields, defaults: &SamplingParams) -> Result<SamplingParams, ApiError> {
    let mut sampling = defaults.clone();
    let SamplingParams {
        temperature,
        dynatemp_range,
        dynatemp_exponent,
        top_k,
        top_p,
        min_p,
        typical_p,
        top_n_sigma,
        xtc_probability,
        xtc_threshold,
        min_keep,
        repeat_last_n,
        repeat_penalty,
        frequency_penalty,
        presence_penalty,
        dry,
        mirostat,
        mirostat_tau,
        mirostat_eta,
        adaptive_target,
        adaptive_decay,
        samplers,
        seed,
        logit_bias,
        text_bias,
    } = &mut sampling;
    let numbers: [(&'static str, f64, f64, &mut f32); 16] = [
        ("temperature", 0.0, 2.0, temperature),
        ("dynatemp_range", 0.0, 2.0, dynatemp_range),
        ("dynatemp_exponent", 0.0, 10.0, dynatemp_exponent),
        ("top_p", 0.0, 1.0, top_p),
        ("min_p", 0.0, 1.0, min_p),
        ("top_n_sigma", -1.0, 100.0, top_n_sigma),
        ("xtc_probability", 0.0, 1.0, xtc_probability),
        ("xtc_threshold", 0.0, 1.0, xtc_threshold),
        ("frequency_penalty", -2.0, 2.0, frequency_penalty),
        ("presence_penalty", -2.0, 2.0, presence_penalty),
        ("dry_multiplier", 0.0, 100.0, &mut dry.multiplier),
        ("dry_base", 0.0, 100.0, &mut dry.base),
        ("mirostat_tau", 0.0, 100.0, mirostat_tau),
        ("mirostat_eta", 0.0, 1.0, mirostat_eta),
        ("adaptive_target", -1.0, 1.0, adaptive_target),
        ("adaptive_decay", 0.0, 0.99, adaptive_decay),
    ];
    for (name, low, high, value) in numbers {
        if let Some(number) = fields.number(name, low..=high)? {
            *value = number;
        }
    }
    // llama.cpp's name first.
    for (names, low, high, value) in [
        (["repeat_penalty", "repetition_penalty"], 0.01, 10.0, repeat_penalty),
        (["typical_p", "typ_p"], 0.0, 1.0, typical_p),
    ] {
        for name in names {
            if let Some(number) = fields.number(name, low..=high)? {
                *value = number;
                break;
            }
        }
    }
    if let Some(number) = fields.integer("top_k", -1..=1_000_000)? {
        // vLLM says -1, llama.cpp 0 for "all".
        *top_k = u32::try_from(number).unwrap_or(0);
    }
    for (name, low, value) in [
        ("min_keep", 0, min_keep),
        ("repeat_last_n", -1, repeat_last_n),
        ("dry_penalty_last_n", -1, &mut dry.penalty_last_n),
        ("dry_allowed_length", 0, &mut dry.allowed_length),
    ] {
        if let Some(number) = fields.integer(name, low..=MANY)? {
            // -1 is llama.cpp's word for the whole context.
            *value = u32::try_from(number).unwrap_or(WHOLE_CONTEXT);
        }
    }
    match fields.integer("mirostat", 0..=2)? {
        None => {}
        Some(1) => *mirostat = Mirostat::V1,
        Some(2) => *mirostat = Mirostat::V2,
        Some(_) => *mirostat = Mirostat::Off,
    }
    if let Some(number) = fields.integer("seed", i64::MIN..=i64::MAX)? {
        *seed = fold_seed(number);
    }
    if let Some(order) = fields.get("samplers") {
        *samplers = sampler_order(order)?;
    }
    if let Some(breakers) = fields.get("dry_sequence_breakers") {
        dry.sequence_breakers = sequence_breakers(breakers)?;
    }
    if let Some(bias) = fields.get("logit_bias") {
        (*logit_bias, *text_bias) = biases(bias)?;
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

/// Names, or llama.cpp's letters.
fn sampler_order(value: &Value) -> Result<Vec<SamplerKind>, ApiError> {
    const NAME: &str = "samplers";
    let known = || SamplerKind::ALL.map(SamplerKind::name).join(", ");
    let unknown =
        |name: &str| ApiError::invalid(NAME, format!("'{NAME}' has '{}', which is none of {}", clip(name), known()));
    let order: Vec<SamplerKind> = match value {
        Value::String(letters) => letters
            .chars()
            .take(MAX_SAMPLERS + 1)
            .map(|letter| SamplerKind::from_letter(letter).ok_or_else(|| unknown(&letter.to_string())))
            .collect::<Result<_, _>>()?,
        Value::Array(names) => names
            .iter()
            .take(MAX_SAMPLERS + 1)
            .map(|name| {
                let name = name.as_str().ok_or_else(|| wrong_type(NAME, "an array of strings", name))?;
                SamplerKind::from_name(name).ok_or_else(|| unknown(name))
            })
            .collect::<Result<_, _>>()?,
        other => return Err(wrong_type(NAME, "an array of strings", other)),
    };
    if order.len() > MAX_SAMPLERS {
        return Err(ApiError::invalid(NAME, format!("'{NAME}' may have {MAX_SAMPLERS} entries")));
    }
    Ok(order)
}

fn sequence_breakers(value: &Value) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "dry_sequence_breakers";
    let Some(texts) = value.as_array() else { return Err(wrong_type(NAME, "an array of strings", value)) };
    if texts.len() > MAX_SEQUENCE_BREAKERS {
        let message = format!("'{NAME}' may have {MAX_SEQUENCE_BREAKERS} texts, not {}", texts.len());
        return Err(ApiError::invalid(NAME, message));
    }
    let one = |text: &Value| {
        let text = text.as_str().ok_or_else(|| wrong_type(NAME, "an array of strings", text))?;
        if text.is_empty() || text.len() > MAX_SEQUENCE_BREAKER_BYTES || text.contains('\0') {
            let message =
                format!("each text in '{NAME}' must have 1 to {MAX_SEQUENCE_BREAKER_BYTES} bytes, none of them 0");
            return Err(ApiError::invalid(NAME, message));
        }
        Ok(text.to_owned())
    };
    texts.iter().map(one).collect()
}

type Biases = (Vec<(Token, f32)>, Vec<(String, f32)>);

/// OpenAI's object of tokens and numbers, or llama-server's array of pairs; a token may be a text there, and `false`
/// means never.
fn biases(value: &Value) -> Result<Biases, ApiError> {
    const NAME: &str = "logit_bias";
    const EXPECTED: &str = "an object of tokens and numbers, or an array of pairs of them";
    let count = match value {
        Value::Object(entries) => entries.len(),
        Value::Array(entries) => entries.len(),
        other => return Err(wrong_type(NAME, EXPECTED, other)),
    };
    if count > MAX_LOGIT_BIAS {
        return Err(ApiError::invalid(NAME, format!("'{NAME}' may have {MAX_LOGIT_BIAS} entries, not {count}")));
    }
    let (mut tokens, mut texts): Biases = (Vec::new(), Vec::new());
    let mut add = |key: Key<'_>, bias: &Value| {
        let bias = match bias {
            Value::Bool(false) => f32::NEG_INFINITY,
            other => match other.as_f64() {
                #[expect(clippy::cast_possible_truncation, reason = "llama.cpp samples with f32")]
                Some(number) if (-100.0..=100.0).contains(&number) => number as f32,
                _ => {
                    let message =
                        format!("'{NAME}' must be from -100 to 100, or false, not {}", clip(&bias.to_string()));
                    return Err(ApiError::invalid(NAME, message));
                }
            },
        };
        match key {
            Key::Token(token) => tokens.push((token, bias)),
            Key::Text(text) => texts.push((text.to_owned(), bias)),
        }
        Ok(())
    };
    match value {
        Value::Object(entries) => {
            for (key, bias) in entries {
                let token = key.parse::<Token>().ok().filter(|token| *token >= 0);
                add(token.map_or(Key::Text(key), Key::Token), bias)?;
            }
        }
        Value::Array(entries) => {
            for entry in entries {
                let Some([key, bias]) = entry.as_array().map(Vec::as_slice) else {
                    return Err(wrong_type(NAME, EXPECTED, entry));
                };
                let token = key.as_i64().and_then(|token| Token::try_from(token).ok()).filter(|token| *token >= 0);
                let key = match (token, key.as_str()) {
                    (Some(token), _) => Key::Token(token),
                    (None, Some(text)) => Key::Text(text),
                    (None, None) => {
                        let message = format!("'{NAME}' has {}, which is no token", clip(&key.to_string()));
                        return Err(ApiError::invalid(NAME, message));
                    }
                };
                add(key, bias)?;
            }
        }
        _ => {}
    }
    let bytes: usize = texts.iter().map(|(text, _)| text.len()).sum();
    if bytes > MAX_BIAS_TEXT_BYTES || texts.iter().any(|(text, _)| text.is_empty()) {
        let message =
            format!("the texts in '{NAME}' must not be empty, and have {MAX_BIAS_TEXT_BYTES} bytes together at most");
        return Err(ApiError::invalid(NAME, message));
    }
    Ok((tokens, texts))
}

enum Key<'k> {
    Token(Token),
    Text(&'k str),
}

/// What the output must be: `response_format`, or llama-server's `json_schema` and `grammar`.
pub(super) fn grammar(fields: &Fields) -> Result<Option<Grammar>, ApiError> {
    let mut asked = Vec::new();
    if let Some(format) = fields.get("response_format")
        && let Some(schema) = response_format(format)?
    {
        asked.push(("response_format", Grammar::JsonSchema(schema)));
    }
    for name in ["json_schema", "guided_json"] {
        if let Some(schema) = fields.get(name) {
            asked.push((name, Grammar::JsonSchema(schema_of(name, schema)?)));
        }
    }
    match fields.get("grammar") {
        None => {}
        Some(Value::String(source)) if source.is_empty() => {}
        Some(Value::String(source)) => {
            asked.push(("grammar", Grammar::Gbnf { source: source.clone(), lazy: None, prefix: String::new() }));
        }
        Some(other) => return Err(wrong_type("grammar", "a string", other)),
    }
    match asked.as_slice() {
        [(first, _), (second, _), ..] => {
            Err(ApiError::invalid(*second, format!("'{first}' and '{second}' cannot be used together")))
        }
        _ => Ok(asked.pop().map(|(_, grammar)| grammar)),
    }
}

/// `None` for text.
fn response_format(format: &Value) -> Result<Option<Value>, ApiError> {
    const NAME: &str = "response_format";
    let Some(fields) = format.as_object() else { return Err(wrong_type(NAME, "an object", format)) };
    let there = |name: &str| fields.get(name).filter(|value| !value.is_null());
    match there("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        // llama-server takes a schema here too.
        Some("json_object") => match there("schema") {
            None => Ok(Some(json!({"type": "object"}))),
            Some(schema) => schema_of("response_format.schema", schema).map(Some),
        },
        Some("json_schema") => {
            let described = there("json_schema").and_then(|described| described.get("schema"));
            let param = "response_format.json_schema.schema";
            let schema = described.or_else(|| there("schema")).filter(|schema| !schema.is_null());
            let schema = schema.ok_or_else(|| ApiError::invalid(param, format!("you must provide '{param}'")))?;
            schema_of(param, schema).map(Some)
        }
        _ => {
            let param = "response_format.type";
            Err(ApiError::invalid(param, format!("'{param}' must be 'text', 'json_object' or 'json_schema'")))
        }
    }
}

fn schema_of(name: &str, schema: &Value) -> Result<Value, ApiError> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(schema.clone()),
        other => Err(wrong_type(name, "an object", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;
    use crate::engine::DryParams;

    fn fields(json: &str) -> Fields {
        Fields(parse_object(json.as_bytes()).unwrap())
    }

    fn sampled(json: &str) -> Result<SamplingParams, ApiError> {
        read(&fields(json), &SamplingParams::default())
    }

    #[test]
    fn every_parameter_is_honoured() {
        let sampling = sampled(
            r#"{"temperature": 0.5, "dynatemp_range": 0.25, "dynatemp_exponent": 2, "top_k": 7, "top_p": 0.5, "min_p": 0.1,
                "typical_p": 0.75, "top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.25, "min_keep": 2,
                "repeat_last_n": -1, "repeat_penalty": 1.5, "frequency_penalty": -2, "presence_penalty": 1.5,
                "dry_multiplier": 0.5, "dry_base": 2, "dry_allowed_length": 3, "dry_penalty_last_n": 100,
                "dry_sequence_breakers": [".", "\n"], "mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.5,
                "adaptive_target": 0.5, "adaptive_decay": 0.75,
                "samplers": ["top_k", "temp", "min-p", "adaptive-p"], "seed": 42,
                "logit_bias": {"15": -100, "2": 1.5, "Hello": false}}"#,
        )
        .unwrap();
        let expected = SamplingParams {
            temperature: 0.5,
            dynatemp_range: 0.25,
            dynatemp_exponent: 2.0,
            top_k: 7,
            top_p: 0.5,
            min_p: 0.1,
            typical_p: 0.75,
            top_n_sigma: 1.5,
            xtc_probability: 0.5,
            xtc_threshold: 0.25,
            min_keep: 2,
            repeat_last_n: WHOLE_CONTEXT,
            repeat_penalty: 1.5,
            frequency_penalty: -2.0,
            presence_penalty: 1.5,
            dry: DryParams {
                multiplier: 0.5,
                base: 2.0,
                allowed_length: 3,
                penalty_last_n: 100,
                sequence_breakers: vec![".".to_owned(), "\n".to_owned()],
            },
            mirostat: Mirostat::V2,
            mirostat_tau: 4.0,
            mirostat_eta: 0.5,
            adaptive_target: 0.5,
            adaptive_decay: 0.75,
            samplers: vec![SamplerKind::TopK, SamplerKind::Temperature, SamplerKind::MinP, SamplerKind::AdaptiveP],
            seed: Some(42),
            logit_bias: sampling.logit_bias.clone(),
            text_bias: vec![("Hello".to_owned(), f32::NEG_INFINITY)],
        };
        assert_eq!(sampling, expected);
        let mut biases = sampling.logit_bias;
        biases.sort_by_key(|(token, _)| *token);
        assert_eq!(biases, [(2, 1.5), (15, -100.0)]);
        let pairs = sampled(r#"{"logit_bias": [[7, 1.0], [8, false], ["Hello, World!", -0.5]]}"#).unwrap();
        assert_eq!(pairs.logit_bias, [(7, 1.0), (8, f32::NEG_INFINITY)]);
        assert_eq!(pairs.text_bias, [("Hello, World!".to_owned(), -0.5)]);
        assert_eq!(sampled(r#"{"samplers": "kt"}"#).unwrap().samplers, [SamplerKind::TopK, SamplerKind::Temperature]);
        assert_eq!(sampled(r#"{"repetition_penalty": 1.25}"#).unwrap().repeat_penalty.to_bits(), 1.25f32.to_bits());
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
        let long = format!(r#"{{"dry_sequence_breakers": ["{}"]}}"#, "x".repeat(41));
        let many = format!(r#"{{"logit_bias": {:?}}}"#, vec![[1, 1]; 1025]);
        let texts = format!(r#"{{"logit_bias": [["{}", 1]]}}"#, "x".repeat(9000));
        let cases = [
            (r#"{"temperature": 2.1}"#, "temperature", "from 0 to 2"),
            (r#"{"temperature": -0.1}"#, "temperature", "from 0 to 2"),
            (r#"{"temperature": "hot"}"#, "temperature", "a number"),
            (r#"{"dynatemp_range": -1}"#, "dynatemp_range", "from 0 to 2"),
            (r#"{"top_p": 1.5}"#, "top_p", "from 0 to 1"),
            (r#"{"min_p": -1}"#, "min_p", "from 0 to 1"),
            (r#"{"typical_p": 2}"#, "typical_p", "from 0 to 1"),
            (r#"{"top_k": -2}"#, "top_k", "from -1 to 1000000"),
            (r#"{"xtc_probability": 1.5}"#, "xtc_probability", "from 0 to 1"),
            (r#"{"min_keep": -1}"#, "min_keep", "from 0 to 1048576"),
            (r#"{"repeat_last_n": -2}"#, "repeat_last_n", "from -1 to 1048576"),
            (r#"{"frequency_penalty": 2.5}"#, "frequency_penalty", "from -2 to 2"),
            (r#"{"presence_penalty": -2.5}"#, "presence_penalty", "from -2 to 2"),
            (r#"{"repeat_penalty": 0}"#, "repeat_penalty", "from 0.01 to 10"),
            (r#"{"dry_multiplier": -1}"#, "dry_multiplier", "from 0 to 100"),
            (r#"{"dry_sequence_breakers": [""]}"#, "dry_sequence_breakers", "1 to 40 bytes"),
            (r#"{"dry_sequence_breakers": "x"}"#, "dry_sequence_breakers", "an array of strings"),
            (long.as_str(), "dry_sequence_breakers", "1 to 40 bytes"),
            (r#"{"adaptive_target": 1.5}"#, "adaptive_target", "from -1 to 1"),
            (r#"{"adaptive_decay": 1}"#, "adaptive_decay", "from 0 to 0.99"),
            (r#"{"mirostat": 3}"#, "mirostat", "from 0 to 2"),
            (r#"{"samplers": ["top_k", "magic"]}"#, "samplers", "'magic', which is none of penalties, dry"),
            (r#"{"samplers": [1]}"#, "samplers", "an array of strings"),
            (r#"{"samplers": "kkkkkkkkkkkkkkkkkk"}"#, "samplers", "may have 16"),
            (r#"{"seed": 1.5}"#, "seed", "an integer"),
            (r#"{"logit_bias": {"1": 101}}"#, "logit_bias", "from -100 to 100"),
            (r#"{"logit_bias": {"1": true}}"#, "logit_bias", "or false"),
            (r#"{"logit_bias": {"": 1}}"#, "logit_bias", "must not be empty"),
            (r#"{"logit_bias": [1]}"#, "logit_bias", "an array of pairs"),
            (r#"{"logit_bias": [[-1, 2]]}"#, "logit_bias", "no token"),
            (many.as_str(), "logit_bias", "1024 entries, not 1025"),
            (texts.as_str(), "logit_bias", "8192 bytes"),
        ];
        for (json, param, says) in cases {
            let error = sampled(json).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{json}");
            assert!(error.message.contains(says), "{json}: {}", error.message);
        }
    }

    #[test]
    fn grammars_in_every_form() {
        let schema = json!({"type": "integer"});
        let as_schema = |schema: &Value| Some(Grammar::JsonSchema(schema.clone()));
        let gbnf = Grammar::Gbnf { source: "root ::= \"a\"".to_owned(), lazy: None, prefix: String::new() };
        for (json, expected) in [
            ("{}", None),
            (r#"{"response_format": null, "grammar": "", "json_schema": null}"#, None),
            (r#"{"response_format": {"type": "text"}}"#, None),
            (r#"{"response_format": {"type": "json_object"}}"#, as_schema(&json!({"type": "object"}))),
            (r#"{"response_format": {"type": "json_object", "schema": {"type": "integer"}}}"#, as_schema(&schema)),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"type": "integer"}}}}"#,
                as_schema(&schema),
            ),
            (r#"{"response_format": {"type": "json_schema", "schema": {"type": "integer"}}}"#, as_schema(&schema)),
            (r#"{"json_schema": {"type": "integer"}}"#, as_schema(&schema)),
            (r#"{"json_schema": {}}"#, as_schema(&json!({}))),
            (r#"{"grammar": "root ::= \"a\""}"#, Some(gbnf)),
        ] {
            assert_eq!(grammar(&fields(json)).unwrap(), expected, "{json}");
        }
        for (json, param) in [
            (r#"{"response_format": "json"}"#, "response_format"),
            (r#"{"response_format": {"type": "xml"}}"#, "response_format.type"),
            (r#"{"response_format": {"type": "json_schema"}}"#, "response_format.json_schema.schema"),
            (
                r#"{"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}"#,
                "response_format.json_schema.schema",
            ),
            (r#"{"json_schema": "x"}"#, "json_schema"),
            (r#"{"grammar": {}}"#, "grammar"),
            (r#"{"grammar": "root ::= \"a\"", "json_schema": {}}"#, "grammar"),
        ] {
            assert_eq!(grammar(&fields(json)).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }
}
