//! Chat messages: what a client may send, and what a template is given.

use serde_json::{Map, Value, json};

use super::error::{ApiError, clip};
use super::fields::wrong_type;

/// Messages that one conversation may have.
pub const MAX_MESSAGES: usize = 4096;

/// Messages in the form that chat templates know: `role`, `content` as one string, and `name` or `reasoning_content`
/// where they were sent. OpenAI's `developer` becomes `system`, which is what it replaced.
pub(crate) fn read(value: Option<Value>) -> Result<Vec<Value>, ApiError> {
    let messages = match value {
        None => return Err(ApiError::missing("messages")),
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong_type("messages", "an array of messages", &other)),
    };
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let message = format!("'messages' must have 1 to {MAX_MESSAGES} messages, not {}", messages.len());
        return Err(ApiError::invalid("messages", message));
    }
    messages.into_iter().enumerate().map(|(at, message)| read_one(at, message)).collect()
}

fn read_one(at: usize, message: Value) -> Result<Value, ApiError> {
    let name = |field: &str| format!("messages[{at}].{field}");
    let Value::Object(mut fields) = message else {
        return Err(wrong_type(&format!("messages[{at}]"), "an object", &message));
    };
    let role = match fields.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some(tool @ ("tool" | "function")) => {
            let message = format!("'{}' is '{tool}', but tools are not supported by this server", name("role"));
            return Err(ApiError::unsupported(name("role"), message));
        }
        Some(other) => {
            let message =
                format!("'{}' must be system, developer, user or assistant, not '{}'", name("role"), clip(other));
            return Err(ApiError::invalid(name("role"), message));
        }
        None => return Err(ApiError::invalid(name("role"), format!("'{}' must be a string", name("role")))),
    };
    for field in ["tool_calls", "function_call", "audio"] {
        if fields.get(field).is_some_and(|value| !value.is_null() && *value != json!([])) {
            let message = format!("'{}' is not supported by this server", name(field));
            return Err(ApiError::unsupported(name(field), message));
        }
    }
    let content = match fields.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join_parts(&name("content"), &parts)?,
        // OpenAI lets the assistant's content be absent; a template would print "none".
        None | Some(Value::Null) if role == "assistant" => String::new(),
        None | Some(Value::Null) => {
            return Err(ApiError::invalid(name("content"), format!("'{}' is missing", name("content"))));
        }
        Some(other) => return Err(wrong_type(&name("content"), "a string or an array of parts", &other)),
    };
    let mut clean = Map::new();
    clean.insert("role".to_owned(), role.into());
    clean.insert("content".to_owned(), content.into());
    for kept in ["name", "reasoning_content"] {
        if let Some(text @ Value::String(_)) = fields.remove(kept) {
            clean.insert(kept.to_owned(), text);
        }
    }
    Ok(Value::Object(clean))
}

/// Text parts, a line each, as llama-server and vLLM join them.
fn join_parts(name: &str, parts: &[Value]) -> Result<String, ApiError> {
    let mut text = String::new();
    for (at, part) in parts.iter().enumerate() {
        let name = format!("{name}[{at}]");
        let said = match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text" | "input_text" | "output_text"), Some(said)) => said,
            (Some("text" | "input_text" | "output_text"), None) => {
                return Err(ApiError::invalid(format!("{name}.text"), format!("'{name}.text' must be a string")));
            }
            (Some(kind), _) => {
                let message = format!("'{name}' is of type '{}', but this model reads text only", clip(kind));
                return Err(ApiError::unsupported(name, message));
            }
            (None, _) => {
                return Err(ApiError::invalid(format!("{name}.type"), format!("'{name}.type' must be a string")));
            }
        };
        if at > 0 {
            text.push('\n');
        }
        text.push_str(said);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_what_templates_know() {
        let given = json!([
            {"role": "developer", "content": "Be brief.", "extra": 1},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ada"},
            {"role": "assistant", "content": null, "tool_calls": [], "reasoning_content": "hm"},
        ]);
        assert_eq!(
            read(Some(given)).unwrap(),
            [
                json!({"role": "system", "content": "Be brief."}),
                json!({"role": "user", "content": "a\nb", "name": "Ada"}),
                json!({"role": "assistant", "content": "", "reasoning_content": "hm"}),
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let image = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]);
        let cases = [
            (None, "messages", "missing_required_parameter"),
            (Some(json!([])), "messages", "invalid_value"),
            (Some(json!("hi")), "messages", "invalid_value"),
            (Some(json!(["hi"])), "messages[0]", "invalid_value"),
            (Some(json!([{"content": "x"}])), "messages[0].role", "invalid_value"),
            (Some(json!([{"role": "robot", "content": "x"}])), "messages[0].role", "invalid_value"),
            (Some(json!([{"role": "tool", "content": "x"}])), "messages[0].role", "unsupported_parameter"),
            (Some(json!([{"role": "user"}])), "messages[0].content", "invalid_value"),
            (Some(json!([{"role": "user", "content": 1}])), "messages[0].content", "invalid_value"),
            (Some(image), "messages[0].content[1]", "unsupported_parameter"),
            (
                Some(json!([{"role": "user", "content": [{"type": "text"}]}])),
                "messages[0].content[0].text",
                "invalid_value",
            ),
            (Some(json!([{"role": "user", "content": ["x"]}])), "messages[0].content[0].type", "invalid_value"),
            (
                Some(json!([{"role": "assistant", "tool_calls": [{}]}])),
                "messages[0].tool_calls",
                "unsupported_parameter",
            ),
            (Some(json!(vec![json!({"role": "user", "content": "x"}); 4097])), "messages", "invalid_value"),
        ];
        for (given, param, code) in cases {
            let error = read(given.clone()).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{}", error.message);
            assert_eq!(error.status, 400);
        }
    }
}
