//! What a request says of reasoning, of the answer's form and of its beginning.

use serde_json::{Map, Value, json};

use crate::api::error::{ApiError, clip};
use crate::api::fields::{Fields, wrong_type};
use crate::engine::MAX_BUDGET_TEXT_BYTES;
use crate::engine::chat::Continuation;

/// Bytes of `chat_template_kwargs` as JSON.
pub const MAX_VARIABLES_BYTES: usize = 64 << 10;

/// What the template itself is given: these cannot be replaced by `chat_template_kwargs`.
const GIVEN: [&str; 5] = ["messages", "tools", "bos_token", "eos_token", "add_generation_prompt"];

/// llama-server's names for the tokens that reasoning may take.
const BUDGETS: [&str; 3] = ["reasoning_budget_tokens", "reasoning_budget", "thinking_budget_tokens"];

/// Where reasoning is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ReasoningFormat {
    /// In the content, as the model writes it.
    None,
    /// Apart from the content.
    #[default]
    Apart,
    /// Apart, and in the content of a whole answer too; in the content of a stream.
    Both,
}

/// What the content must be.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum ResponseFormat {
    /// Anything.
    #[default]
    Text,
    /// JSON that this schema allows.
    Schema(Value),
}

#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) reasoning_format: ReasoningFormat,
    pub(super) enable_thinking: bool,
    /// Tokens that each block of reasoning may have, and what is said before its end where they are too few.
    pub(super) budget: Option<(u32, String)>,
    pub(super) response_format: ResponseFormat,
    pub(super) variables: Map<String, Value>,
    pub(super) add_generation_prompt: bool,
    /// `None`: as the last message asks for.
    pub(super) continuation: Option<Continuation>,
}

impl Settings {
    pub(super) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let continuation = continuation(fields)?;
        let goes_on = continuation.is_some_and(|continuation| continuation != Continuation::None);
        let add_generation_prompt = fields.boolean("add_generation_prompt")?;
        if goes_on && add_generation_prompt == Some(true) {
            let message = "'add_generation_prompt' begins a message, and 'continue_final_message' goes on with one: send one of them";
            return Err(ApiError::invalid("add_generation_prompt", message));
        }
        let mut variables = variables(fields)?;
        let budget = budget(fields)?;
        let effort = effort(fields)?;
        let mut enable_thinking = match (fields.boolean("enable_thinking")?, variables.get("enable_thinking")) {
            (Some(enable), _) => enable,
            (None, Some(Value::Bool(enable))) => *enable,
            // Templates test it in their own ways; what is not a boolean is left to them.
            (None, _) => true,
        };
        match effort.as_deref() {
            Some("none") => enable_thinking = false,
            Some(effort) => {
                variables.entry("reasoning_effort").or_insert_with(|| effort.into());
            }
            None => {}
        }
        enable_thinking &= budget != Some(0);
        if variables.get("enable_thinking").is_none_or(Value::is_boolean) {
            variables.insert("enable_thinking".to_owned(), enable_thinking.into());
        }
        Ok(Self {
            reasoning_format: reasoning_format(fields)?,
            enable_thinking,
            budget: budget.map(|tokens| Ok((tokens, budget_message(fields)?))).transpose()?,
            response_format: response_format(fields)?,
            variables,
            add_generation_prompt: add_generation_prompt.unwrap_or(true),
            continuation,
        })
    }
}

fn variables(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    const NAME: &str = "chat_template_kwargs";
    let mut variables = match fields.take(NAME) {
        None => return Ok(Map::new()),
        Some(Value::Object(variables)) => variables,
        Some(other) => return Err(wrong_type(NAME, "an object", &other)),
    };
    variables.retain(|name, _| !GIVEN.contains(&name.as_str()));
    let bytes = Value::Object(variables.clone()).to_string().len();
    if bytes > MAX_VARIABLES_BYTES {
        let message = format!("'{NAME}' has {bytes} bytes of JSON; at most {MAX_VARIABLES_BYTES} are allowed");
        return Err(ApiError::invalid(NAME, message));
    }
    Ok(variables)
}

fn budget(fields: &Fields) -> Result<Option<u32>, ApiError> {
    for name in BUDGETS {
        if let Some(budget) = fields.integer(name, -1..=i64::from(i32::MAX))? {
            // llama-server's -1 is "no limit".
            return Ok(u32::try_from(budget).ok());
        }
    }
    Ok(None)
}

/// llama-server's words before an end of reasoning that was forced.
fn budget_message(fields: &mut Fields) -> Result<String, ApiError> {
    const NAME: &str = "reasoning_budget_message";
    match fields.take(NAME) {
        None => Ok(String::new()),
        Some(Value::String(text)) if text.len() <= MAX_BUDGET_TEXT_BYTES => Ok(text),
        Some(Value::String(_)) => {
            Err(ApiError::invalid(NAME, format!("'{NAME}' may have at most {MAX_BUDGET_TEXT_BYTES} bytes")))
        }
        Some(other) => Err(wrong_type(NAME, "a string", &other)),
    }
}

fn effort(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    const NAME: &str = "reasoning_effort";
    match fields.take(NAME) {
        None => Ok(None),
        Some(Value::String(word))
            if (1..=32).contains(&word.len()) && word.chars().all(|letter| letter.is_ascii_alphanumeric()) =>
        {
            Ok(Some(word))
        }
        Some(Value::String(word)) => {
            let message = format!("'{NAME}' must be a word such as none, low, medium or high, not '{}'", clip(&word));
            Err(ApiError::invalid(NAME, message))
        }
        Some(other) => Err(wrong_type(NAME, "a string", &other)),
    }
}

fn reasoning_format(fields: &mut Fields) -> Result<ReasoningFormat, ApiError> {
    const NAME: &str = "reasoning_format";
    match fields.take(NAME) {
        None => Ok(ReasoningFormat::default()),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Ok(ReasoningFormat::None),
            "auto" | "deepseek" => Ok(ReasoningFormat::Apart),
            "deepseek-legacy" => Ok(ReasoningFormat::Both),
            other => {
                let message =
                    format!("'{NAME}' must be none, auto, deepseek or deepseek-legacy, not '{}'", clip(other));
                Err(ApiError::invalid(NAME, message))
            }
        },
        Some(other) => Err(wrong_type(NAME, "a string", &other)),
    }
}

fn response_format(fields: &mut Fields) -> Result<ResponseFormat, ApiError> {
    const NAME: &str = "response_format";
    let mut format = match fields.take(NAME) {
        None => return Ok(ResponseFormat::Text),
        Some(Value::Object(format)) => format,
        Some(other) => return Err(wrong_type(NAME, "an object", &other)),
    };
    let Some(Value::String(kind)) = format.remove("type") else {
        let param = format!("{NAME}.type");
        return Err(ApiError::invalid(param.clone(), format!("'{param}' must be a string")));
    };
    let (param, schema) = match kind.as_str() {
        "text" => return Ok(ResponseFormat::Text),
        // A schema here is llama-server's.
        "json_object" => {
            let any = json!({"type": "object"});
            let schema = format.remove("schema").filter(|schema| !schema.is_null() && *schema != json!({}));
            (format!("{NAME}.schema"), Some(schema.unwrap_or(any)))
        }
        "json_schema" => {
            let inner = format.get_mut("json_schema").and_then(|inner| inner.get_mut("schema")).map(Value::take);
            // llama-server takes it without the wrapper too.
            (format!("{NAME}.json_schema.schema"), inner.or_else(|| format.remove("schema")))
        }
        other => {
            let message = format!("'{NAME}.type' must be text, json_object or json_schema, not '{}'", clip(other));
            return Err(ApiError::invalid(format!("{NAME}.type"), message));
        }
    };
    match schema {
        Some(schema @ (Value::Object(_) | Value::Bool(true))) => Ok(ResponseFormat::Schema(schema)),
        Some(other) => Err(wrong_type(&param, "a JSON schema", &other)),
        None => Err(ApiError::invalid(param.clone(), format!("'{param}' is missing"))),
    }
}

fn continuation(fields: &mut Fields) -> Result<Option<Continuation>, ApiError> {
    const NAME: &str = "continue_final_message";
    match fields.take(NAME) {
        None => Ok(None),
        Some(Value::Bool(false)) => Ok(Some(Continuation::None)),
        Some(Value::Bool(true)) => Ok(Some(Continuation::Auto)),
        Some(Value::String(word)) if word == "content" => Ok(Some(Continuation::Content)),
        Some(Value::String(word)) if word == "reasoning_content" => Ok(Some(Continuation::Reasoning)),
        Some(other) => {
            let message =
                format!("'{NAME}' must be true, false, content or reasoning_content, not {}", clip(&other.to_string()));
            Err(ApiError::invalid(NAME, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn read(json: &Value) -> Result<Settings, ApiError> {
        Settings::read(&mut Fields(parse_object(json.to_string().as_bytes()).unwrap()))
    }

    #[test]
    fn thinking() {
        let cases = [
            (json!({}), true),
            (json!({"enable_thinking": false}), false),
            (json!({"chat_template_kwargs": {"enable_thinking": false}}), false),
            (json!({"enable_thinking": true, "chat_template_kwargs": {"enable_thinking": false}}), true),
            (json!({"reasoning_effort": "none"}), false),
            (json!({"reasoning_effort": "high"}), true),
            (json!({"reasoning_budget": 0}), false),
            (json!({"reasoning_budget_tokens": -1}), true),
            (json!({"thinking_budget_tokens": 7}), true),
        ];
        for (given, enabled) in cases {
            let settings = read(&given).unwrap();
            assert_eq!(settings.enable_thinking, enabled, "{given}");
            assert_eq!(settings.variables["enable_thinking"], enabled, "{given}");
        }
        assert_eq!(read(&json!({"reasoning_effort": "high"})).unwrap().variables["reasoning_effort"], "high");
        let budget = |given: &Value| read(given).unwrap().budget;
        assert_eq!(budget(&json!({"reasoning_budget": -1, "reasoning_budget_message": "x"})), None);
        assert_eq!(budget(&json!({"reasoning_budget": 0})), Some((0, String::new())));
        let spoken = json!({"thinking_budget_tokens": 7, "reasoning_budget_message": "Enough."});
        assert_eq!(budget(&spoken), Some((7, "Enough.".to_owned())));
        let format = |word: &str| read(&json!({"reasoning_format": word})).unwrap().reasoning_format;
        assert_eq!(format("none"), ReasoningFormat::None);
        assert_eq!((format("auto"), format("deepseek")), (ReasoningFormat::Apart, ReasoningFormat::Apart));
        assert_eq!(format("deepseek-legacy"), ReasoningFormat::Both);
    }

    #[test]
    fn answers_with_a_form() {
        let schema = json!({"type": "object", "properties": {"z": {}, "a": {}}});
        let format = |format: Value| read(&json!({"response_format": format})).unwrap().response_format;
        assert_eq!(format(json!({"type": "text"})), ResponseFormat::Text);
        assert_eq!(format(json!({"type": "json_object"})), ResponseFormat::Schema(json!({"type": "object"})));
        assert_eq!(format(json!({"type": "json_object", "schema": schema})), ResponseFormat::Schema(schema.clone()));
        let wrapped = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
        let ResponseFormat::Schema(found) = format(wrapped) else { panic!("no schema") };
        // The order of the properties is the order in which they are written.
        assert_eq!(found.to_string(), schema.to_string());
    }

    #[test]
    fn beginnings() {
        for (given, expected) in [
            (json!({}), None),
            (json!({"continue_final_message": false}), Some(Continuation::None)),
            (json!({"continue_final_message": true}), Some(Continuation::Auto)),
            (json!({"continue_final_message": "content"}), Some(Continuation::Content)),
            (json!({"continue_final_message": "reasoning_content"}), Some(Continuation::Reasoning)),
        ] {
            assert_eq!(read(&given).unwrap().continuation, expected, "{given}");
        }
    }

    #[test]
    fn variables_replace_nothing_that_is_given() {
        let given = json!({"chat_template_kwargs": {"messages": [], "bos_token": "x", "tools": 1, "mine": 2}});
        let variables = read(&given).unwrap().variables;
        assert_eq!(Value::Object(variables), json!({"mine": 2, "enable_thinking": true}));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = "x".repeat(MAX_VARIABLES_BYTES);
        let cases = [
            (json!({"chat_template_kwargs": []}), "chat_template_kwargs"),
            (json!({"chat_template_kwargs": {"x": long}}), "chat_template_kwargs"),
            (json!({"enable_thinking": "no"}), "enable_thinking"),
            (json!({"reasoning_effort": "not a word"}), "reasoning_effort"),
            (json!({"reasoning_effort": 3}), "reasoning_effort"),
            (json!({"reasoning_format": "loud"}), "reasoning_format"),
            (json!({"reasoning_budget": -2}), "reasoning_budget"),
            (json!({"thinking_budget_tokens": "all"}), "thinking_budget_tokens"),
            (json!({"reasoning_budget": 1, "reasoning_budget_message": 1}), "reasoning_budget_message"),
            (json!({"reasoning_budget": 1, "reasoning_budget_message": "x".repeat(5000)}), "reasoning_budget_message"),
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema.schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"response_format": {"type": "json_object", "schema": 1}}), "response_format.schema"),
            (json!({"continue_final_message": "tail"}), "continue_final_message"),
            (json!({"add_generation_prompt": 1}), "add_generation_prompt"),
            (json!({"add_generation_prompt": true, "continue_final_message": true}), "add_generation_prompt"),
        ];
        for (given, param) in cases {
            let error = read(&given).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
            assert_eq!((error.status.as_u16(), error.code.as_deref()), (400, Some("invalid_value")));
        }
    }
}
