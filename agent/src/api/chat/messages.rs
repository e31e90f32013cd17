//! Chat messages: what a client may send, and what a template is given.

use serde_json::{Map, Value, json};

use super::media::{self, Attachment};
use crate::api::error::{ApiError, clip};
use crate::api::fields::wrong_type;

/// Messages that one conversation may have.
pub const MAX_MESSAGES: usize = 4096;

/// Tool calls that one message may have.
pub const MAX_CALLS: usize = 128;

/// Bytes of a name or an id.
const MAX_NAME_BYTES: usize = 256;

/// Messages in OpenAI's form, checked, and nothing in them that a template does not know: content is one string, the
/// arguments of calls are JSON text. Images and sounds are put aside; words stand for them.
pub(crate) fn read(value: Option<Value>, media: &mut Vec<Attachment>) -> Result<Vec<Value>, ApiError> {
    let messages = match value {
        None => return Err(ApiError::missing("messages")),
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong_type("messages", "an array of messages", &other)),
    };
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let message = format!("'messages' must have 1 to {MAX_MESSAGES} messages, not {}", messages.len());
        return Err(ApiError::invalid("messages", message));
    }
    messages.into_iter().enumerate().map(|(at, message)| read_one(at, message, media)).collect()
}

fn read_one(at: usize, message: Value, media: &mut Vec<Attachment>) -> Result<Value, ApiError> {
    let name = |field: &str| format!("messages[{at}].{field}");
    let Value::Object(mut fields) = message else {
        return Err(wrong_type(&format!("messages[{at}]"), "an object", &message));
    };
    let Some(Value::String(role)) = fields.remove("role") else {
        return Err(ApiError::invalid(name("role"), format!("'{}' must be a string", name("role"))));
    };
    match role.as_str() {
        "system" | "developer" | "user" | "assistant" | "tool" => {}
        "function" => {
            let message = format!("'{}' is 'function', which 'tool' has replaced", name("role"));
            return Err(ApiError::unsupported(name("role"), message));
        }
        other => {
            let message =
                format!("'{}' must be system, developer, user, assistant or tool, not '{}'", name("role"), clip(other));
            return Err(ApiError::invalid(name("role"), message));
        }
    }
    for field in ["function_call", "audio"] {
        if fields.get(field).is_some_and(|value| !value.is_null()) {
            let message = format!("'{}' is not supported by this server", name(field));
            return Err(ApiError::unsupported(name(field), message));
        }
    }
    let is_assistant = role == "assistant";
    let calls = match fields.remove("tool_calls").filter(|calls| !calls.is_null() && *calls != json!([])) {
        Some(calls) if is_assistant => Some(read_calls(&name("tool_calls"), calls)?),
        Some(_) => {
            let message = format!("'{}' is only allowed in messages of the assistant", name("tool_calls"));
            return Err(ApiError::invalid(name("tool_calls"), message));
        }
        None => None,
    };
    let content = match fields.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => join_parts(&name("content"), &parts, media)?,
        // OpenAI lets the assistant's content be absent; a template would print "none".
        None | Some(Value::Null) if is_assistant => String::new(),
        None | Some(Value::Null) => {
            return Err(ApiError::invalid(name("content"), format!("'{}' is missing", name("content"))));
        }
        Some(other) => return Err(wrong_type(&name("content"), "a string or an array of parts", &other)),
    };
    let mut clean = Map::new();
    clean.insert("role".to_owned(), role.into());
    clean.insert("content".to_owned(), content.into());
    for field in ["name", "tool_call_id"] {
        if let Some(text) = short_text(&name(field), fields.remove(field))? {
            clean.insert(field.to_owned(), text.into());
        }
    }
    // vLLM's and OpenRouter's name for it second.
    for field in ["reasoning_content", "reasoning"] {
        match fields.remove(field) {
            Some(text @ Value::String(_)) => {
                clean.entry("reasoning_content").or_insert(text);
            }
            None | Some(Value::Null) => {}
            Some(other) if field == "reasoning_content" => return Err(wrong_type(&name(field), "a string", &other)),
            Some(_) => {}
        }
    }
    if let Some(calls) = calls {
        clean.insert("tool_calls".to_owned(), calls.into());
    }
    Ok(Value::Object(clean))
}

/// Calls that the assistant made before.
fn read_calls(name: &str, calls: Value) -> Result<Vec<Value>, ApiError> {
    let Value::Array(calls) = calls else { return Err(wrong_type(name, "an array of tool calls", &calls)) };
    if calls.len() > MAX_CALLS {
        let message = format!("'{name}' may have {MAX_CALLS} calls, not {}", calls.len());
        return Err(ApiError::invalid(name, message));
    }
    calls.into_iter().enumerate().map(|(at, call)| read_call(&format!("{name}[{at}]"), call)).collect()
}

fn read_call(name: &str, call: Value) -> Result<Value, ApiError> {
    let Value::Object(mut call) = call else { return Err(wrong_type(name, "an object", &call)) };
    match call.get("type").and_then(Value::as_str) {
        None | Some("function") => {}
        Some(other) => {
            let message = format!("'{name}.type' must be function, not '{}'", clip(other));
            return Err(ApiError::unsupported(format!("{name}.type"), message));
        }
    }
    let Some(Value::Object(mut function)) = call.remove("function") else {
        let name = format!("{name}.function");
        return Err(ApiError::invalid(name.clone(), format!("'{name}' must be an object")));
    };
    let called = format!("{name}.function.name");
    let Some(called) = short_text(&called, function.remove("name"))? else {
        return Err(ApiError::invalid(called.clone(), format!("'{called}' must be a string")));
    };
    let mut clean = json!({"type": "function", "function": {"name": called}});
    clean["function"]["arguments"] =
        arguments(&format!("{name}.function.arguments"), function.remove("arguments"))?.into();
    if let Some(id) = short_text(&format!("{name}.id"), call.remove("id"))? {
        clean["id"] = id.into();
    }
    Ok(clean)
}

/// JSON text of an object. Some clients send the object itself, and nothing for a function without arguments.
fn arguments(name: &str, value: Option<Value>) -> Result<String, ApiError> {
    let text = match value {
        None | Some(Value::Null) => return Ok("{}".to_owned()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok("{}".to_owned()),
        Some(Value::String(text)) => text,
        Some(object @ Value::Object(_)) => return Ok(object.to_string()),
        Some(other) => return Err(wrong_type(name, "a string with a JSON object", &other)),
    };
    match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(_)) => Ok(text),
        Ok(other) => Err(wrong_type(name, "a string with a JSON object", &other)),
        Err(error) => Err(ApiError::invalid(name, format!("'{name}' is not JSON: {error}"))),
    }
}

fn short_text(name: &str, value: Option<Value>) -> Result<Option<String>, ApiError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.len() <= MAX_NAME_BYTES => Ok(Some(text)),
        Some(Value::String(text)) => {
            let message = format!("'{name}' has {} bytes; at most {MAX_NAME_BYTES} are allowed", text.len());
            Err(ApiError::invalid(name, message))
        }
        Some(other) => Err(wrong_type(name, "a string", &other)),
    }
}

/// Parts, a line each, as llama-server and vLLM join them.
fn join_parts(name: &str, parts: &[Value], media: &mut Vec<Attachment>) -> Result<String, ApiError> {
    let mut text = String::new();
    for (at, part) in parts.iter().enumerate() {
        let name = format!("{name}[{at}]");
        let said = match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text" | "input_text" | "output_text"), Some(said)) => said,
            (Some("text" | "input_text" | "output_text"), None) => {
                return Err(ApiError::invalid(format!("{name}.text"), format!("'{name}.text' must be a string")));
            }
            // What the assistant would not say stands for its content.
            (Some("refusal"), _) => part.get("refusal").and_then(Value::as_str).unwrap_or_default(),
            (Some("image_url"), _) => &media::take_image(&name, part, media)?,
            (Some("input_audio"), _) => &media::take_audio(&name, part, media)?,
            (Some(kind), _) => {
                let message = format!("'{name}' is of type '{}': this server reads text, images and audio", clip(kind));
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
            {"role": "assistant", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}, "index": 0},
                {"function": {"name": "g", "arguments": ""}},
                {"function": {"name": "h", "arguments": {"z": 1, "y": 2}}},
            ], "reasoning": "so"},
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
        ]);
        assert_eq!(
            read(Some(given), &mut Vec::new()).unwrap(),
            [
                json!({"role": "developer", "content": "Be brief."}),
                json!({"role": "user", "content": "a\nb", "name": "Ada"}),
                json!({"role": "assistant", "content": "", "reasoning_content": "hm"}),
                json!({"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}, "id": "c1"},
                    {"type": "function", "function": {"name": "g", "arguments": "{}"}},
                    {"type": "function", "function": {"name": "h", "arguments": "{\"z\":1,\"y\":2}"}},
                ]}),
                json!({"role": "tool", "content": "7", "tool_call_id": "c1"}),
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let part = |part: Value| Some(json!([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]));
        let address = json!({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}});
        let calls = |calls: Value| Some(json!([{"role": "assistant", "tool_calls": calls}]));
        let call = |function: Value| calls(json!([{"id": "c", "type": "function", "function": function}]));
        let cases = [
            (None, "messages", "missing_required_parameter"),
            (Some(json!([])), "messages", "invalid_value"),
            (Some(json!("hi")), "messages", "invalid_value"),
            (Some(json!(["hi"])), "messages[0]", "invalid_value"),
            (Some(json!([{"content": "x"}])), "messages[0].role", "invalid_value"),
            (Some(json!([{"role": "robot", "content": "x"}])), "messages[0].role", "invalid_value"),
            (Some(json!([{"role": "function", "content": "x"}])), "messages[0].role", "unsupported_parameter"),
            (Some(json!([{"role": "tool"}])), "messages[0].content", "invalid_value"),
            (
                Some(json!([{"role": "tool", "content": "x", "tool_call_id": 7}])),
                "messages[0].tool_call_id",
                "invalid_value",
            ),
            (Some(json!([{"role": "user"}])), "messages[0].content", "invalid_value"),
            (Some(json!([{"role": "user", "content": 1}])), "messages[0].content", "invalid_value"),
            (part(json!({"type": "video_url"})), "messages[0].content[1]", "unsupported_parameter"),
            (part(json!({"type": "input_audio"})), "messages[0].content[1].input_audio", "invalid_value"),
            (
                part(json!({"type": "image_url", "image_url": {}})),
                "messages[0].content[1].image_url.url",
                "invalid_value",
            ),
            (part(address), "messages[0].content[1].image_url.url", "unsupported_parameter"),
            (
                Some(json!([{"role": "user", "content": [{"type": "text"}]}])),
                "messages[0].content[0].text",
                "invalid_value",
            ),
            (Some(json!([{"role": "user", "content": ["x"]}])), "messages[0].content[0].type", "invalid_value"),
            (
                Some(json!([{"role": "user", "content": "x", "tool_calls": [{}]}])),
                "messages[0].tool_calls",
                "invalid_value",
            ),
            (calls(json!({})), "messages[0].tool_calls", "invalid_value"),
            (calls(json!([7])), "messages[0].tool_calls[0]", "invalid_value"),
            (calls(json!(vec![json!({}); 129])), "messages[0].tool_calls", "invalid_value"),
            (calls(json!([{"type": "custom"}])), "messages[0].tool_calls[0].type", "unsupported_parameter"),
            (calls(json!([{"id": "c"}])), "messages[0].tool_calls[0].function", "invalid_value"),
            (call(json!({})), "messages[0].tool_calls[0].function.name", "invalid_value"),
            (call(json!({"name": "x".repeat(257)})), "messages[0].tool_calls[0].function.name", "invalid_value"),
            (
                call(json!({"name": "f", "arguments": "{"})),
                "messages[0].tool_calls[0].function.arguments",
                "invalid_value",
            ),
            (
                call(json!({"name": "f", "arguments": "[1]"})),
                "messages[0].tool_calls[0].function.arguments",
                "invalid_value",
            ),
            (
                Some(json!([{"role": "assistant", "reasoning_content": []}])),
                "messages[0].reasoning_content",
                "invalid_value",
            ),
            (Some(json!(vec![json!({"role": "user", "content": "x"}); 4097])), "messages", "invalid_value"),
        ];
        for (given, param, code) in cases {
            let error = read(given.clone(), &mut Vec::new()).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{}", error.message);
            assert_eq!(error.status, 400);
        }
    }
}
