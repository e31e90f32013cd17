//! A Messages request in OpenAI's terms: what [`ChatRequest`](super::super::chat::ChatRequest) reads.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::fields::{Fields, string, unsupported_type, wrong_type};

/// Fields of OpenAI's that would change what the answer looks like; Messages has no such thing.
const DROPPED: [&str; 10] = [
    "n",
    "stop",
    "logprobs",
    "top_logprobs",
    "max_completion_tokens",
    "stream_options",
    "response_format",
    "functions",
    "function_call",
    "continue_final_message",
];

/// Translates. `counts`: the tokens are to be counted only, so that `max_tokens` may be missing.
pub(super) fn translate(mut fields: Fields, counts: bool) -> Result<Fields, ApiError> {
    for name in DROPPED {
        fields.0.remove(name);
    }
    for name in ["mcp_servers", "container"] {
        if fields.take(name).is_some_and(|value| value != json!([])) {
            return Err(ApiError::unsupported(name, format!("'{name}' is not supported by this server")));
        }
    }
    if !counts && fields.get("max_tokens").is_none() {
        return Err(ApiError::missing("max_tokens"));
    }
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({"role": "system", "content": text_of("system", system)?}));
    }
    match fields.take("messages") {
        None => return Err(ApiError::missing("messages")),
        Some(Value::Array(given)) if !given.is_empty() => read_messages(given, &mut messages)?,
        Some(other) => return Err(wrong_type("messages", "a non-empty array of messages", &other)),
    }
    let prefills = messages.last().is_some_and(|last| last["role"] == "assistant" && last.get("tool_calls").is_none());
    if prefills {
        // As with Anthropic, the answer goes on where the last message ends.
        fields.0.insert("continue_final_message".to_owned(), true.into());
    }
    fields.0.insert("messages".to_owned(), messages.into());
    if let Some(stop) = fields.take("stop_sequences") {
        fields.0.insert("stop".to_owned(), stop);
    }
    tools(&mut fields)?;
    thinking(&mut fields)?;
    output_format(&mut fields)?;
    Ok(fields)
}

fn read_messages(given: Vec<Value>, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    // Results name the call; many templates want the function's name.
    let mut called = HashMap::new();
    for (at, message) in given.into_iter().enumerate() {
        let name = format!("messages[{at}]");
        let Value::Object(mut message) = message else { return Err(wrong_type(&name, "an object", &message)) };
        let content = message.remove("content").unwrap_or_default();
        match message.get("role").and_then(Value::as_str) {
            Some("user") => user(&format!("{name}.content"), content, &called, messages)?,
            Some("assistant") => messages.push(assistant(&format!("{name}.content"), content, &mut called)?),
            Some("system") => {
                let text = text_of(&format!("{name}.content"), content)?;
                messages.push(json!({"role": "system", "content": text}));
            }
            _ => {
                let message = format!("'{name}.role' must be user or assistant");
                return Err(ApiError::invalid(format!("{name}.role"), message));
            }
        }
    }
    Ok(())
}

/// A user's turn may hold results of tools, which are messages of their own with OpenAI.
fn user(
    name: &str,
    content: Value,
    called: &HashMap<String, String>,
    messages: &mut Vec<Value>,
) -> Result<(), ApiError> {
    let blocks = match content {
        Value::String(text) => {
            messages.push(json!({"role": "user", "content": text}));
            return Ok(());
        }
        Value::Array(blocks) if !blocks.is_empty() => blocks,
        other => return Err(wrong_type(name, "a string or a non-empty array of blocks", &other)),
    };
    let mut parts = Vec::new();
    for (at, block) in blocks.into_iter().enumerate() {
        let name = format!("{name}[{at}]");
        let (kind, mut block) = typed(&name, block)?;
        if kind != "tool_result" {
            parts.push(part(&name, &kind, &mut block)?);
            continue;
        }
        flush(&mut parts, messages);
        let id = string(&name, "tool_use_id", &mut block)?;
        let content = match block.remove("content") {
            None | Some(Value::Null) => Value::String(String::new()),
            Some(text @ Value::String(_)) => text,
            Some(Value::Array(blocks)) => {
                let name = format!("{name}.content");
                let mut parts = Vec::with_capacity(blocks.len());
                for (at, block) in blocks.into_iter().enumerate() {
                    let name = format!("{name}[{at}]");
                    let (kind, mut block) = typed(&name, block)?;
                    parts.push(part(&name, &kind, &mut block)?);
                }
                joined(parts)
            }
            Some(other) => {
                return Err(wrong_type(&format!("{name}.content"), "a string or an array of blocks", &other));
            }
        };
        let mut message = json!({"role": "tool", "tool_call_id": id, "content": content});
        if let (Some(function), Some(fields)) = (called.get(&id), message.as_object_mut()) {
            fields.insert("name".to_owned(), function.as_str().into());
        }
        messages.push(message);
    }
    flush(&mut parts, messages);
    Ok(())
}

fn flush(parts: &mut Vec<Value>, messages: &mut Vec<Value>) {
    if !parts.is_empty() {
        messages.push(json!({"role": "user", "content": joined(std::mem::take(parts))}));
    }
}

/// One text is a string, so that models without vision read it too.
fn joined(mut parts: Vec<Value>) -> Value {
    match parts.as_mut_slice() {
        [only] if only["type"] == "text" => only["text"].take(),
        [] => Value::String(String::new()),
        _ => Value::Array(parts),
    }
}

/// A block that is a part of a message with OpenAI too.
fn part(name: &str, kind: &str, block: &mut Map<String, Value>) -> Result<Value, ApiError> {
    match kind {
        "text" => Ok(json!({"type": "text", "text": string(name, "text", block)?})),
        "image" => {
            let (source, mut fields) = typed(&format!("{name}.source"), block.remove("source").unwrap_or_default())?;
            let name = format!("{name}.source");
            let url = match source.as_str() {
                "base64" => {
                    let media = string(&name, "media_type", &mut fields)?;
                    format!("data:{media};base64,{}", string(&name, "data", &mut fields)?)
                }
                "url" => string(&name, "url", &mut fields)?,
                other => return Err(unsupported_type(&name, other)),
            };
            Ok(json!({"type": "image_url", "image_url": {"url": url}}))
        }
        "document" => {
            let (source, mut fields) = typed(&format!("{name}.source"), block.remove("source").unwrap_or_default())?;
            match source.as_str() {
                "text" => Ok(json!({"type": "text", "text": string(&format!("{name}.source"), "data", &mut fields)?})),
                other => Err(unsupported_type(&format!("{name}.source"), other)),
            }
        }
        other => Err(unsupported_type(name, other)),
    }
}

fn assistant(name: &str, content: Value, called: &mut HashMap<String, String>) -> Result<Value, ApiError> {
    let blocks = match content {
        Value::String(text) => return Ok(json!({"role": "assistant", "content": text})),
        Value::Array(blocks) => blocks,
        other => return Err(wrong_type(name, "a string or an array of blocks", &other)),
    };
    let (mut text, mut thinking, mut calls) = (String::new(), String::new(), Vec::new());
    for (at, block) in blocks.into_iter().enumerate() {
        let name = format!("{name}[{at}]");
        let (kind, mut block) = typed(&name, block)?;
        match kind.as_str() {
            "text" => text.push_str(&string(&name, "text", &mut block)?),
            "thinking" => thinking.push_str(&string(&name, "thinking", &mut block)?),
            // Only Anthropic can read it.
            "redacted_thinking" => {}
            "tool_use" => {
                let (id, function) = (string(&name, "id", &mut block)?, string(&name, "name", &mut block)?);
                let input = block.remove("input").unwrap_or_else(|| json!({}));
                let arguments = json!({"name": function, "arguments": input.to_string()});
                calls.push(json!({"id": id, "type": "function", "function": arguments}));
                called.insert(id, function);
            }
            other => return Err(unsupported_type(&name, other)),
        }
    }
    let mut message = Map::new();
    message.insert("role".to_owned(), "assistant".into());
    message.insert("content".to_owned(), text.into());
    if !thinking.is_empty() {
        message.insert("reasoning_content".to_owned(), thinking.into());
    }
    if !calls.is_empty() {
        message.insert("tool_calls".to_owned(), calls.into());
    }
    Ok(Value::Object(message))
}

fn tools(fields: &mut Fields) -> Result<(), ApiError> {
    match fields.take("tools") {
        None => {}
        Some(Value::Array(given)) => {
            let tools = given.into_iter().enumerate().map(|(at, tool)| one_tool(&format!("tools[{at}]"), tool));
            let tools: Vec<Value> = tools.collect::<Result<_, _>>()?;
            fields.0.insert("tools".to_owned(), tools.into());
        }
        Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
    }
    let Some(choice) = fields.take("tool_choice") else { return Ok(()) };
    let (kind, mut choice) = typed("tool_choice", choice)?;
    let translated = match kind.as_str() {
        "auto" => json!("auto"),
        "any" => json!("required"),
        "none" => json!("none"),
        "tool" => json!({"type": "function", "function": {"name": string("tool_choice", "name", &mut choice)?}}),
        other => return Err(unsupported_type("tool_choice", other)),
    };
    fields.0.insert("tool_choice".to_owned(), translated);
    match choice.remove("disable_parallel_tool_use") {
        None | Some(Value::Null) => {}
        Some(Value::Bool(disable)) => {
            fields.0.insert("parallel_tool_calls".to_owned(), (!disable).into());
        }
        Some(other) => return Err(wrong_type("tool_choice.disable_parallel_tool_use", "true or false", &other)),
    }
    Ok(())
}

fn one_tool(name: &str, tool: Value) -> Result<Value, ApiError> {
    let Value::Object(mut tool) = tool else { return Err(wrong_type(name, "an object", &tool)) };
    match tool.remove("type") {
        None | Some(Value::Null) => {}
        Some(Value::String(kind)) if kind == "custom" => {}
        Some(Value::String(kind)) => return Err(unsupported_type(name, &kind)),
        Some(other) => return Err(wrong_type(&format!("{name}.type"), "a string", &other)),
    }
    let mut function = Map::new();
    function.insert("name".to_owned(), string(name, "name", &mut tool)?.into());
    for (theirs, ours) in [("description", "description"), ("input_schema", "parameters"), ("strict", "strict")] {
        if let Some(value) = tool.remove(theirs).filter(|value| !value.is_null()) {
            function.insert(ours.to_owned(), value);
        }
    }
    Ok(json!({"type": "function", "function": function}))
}

/// Thinking is off unless it is asked for, as with Anthropic; a template without the switch thinks as it does.
fn thinking(fields: &mut Fields) -> Result<(), ApiError> {
    let enabled = match fields.take("thinking") {
        None => false,
        Some(thinking) => {
            let (kind, mut thinking) = typed("thinking", thinking)?;
            match kind.as_str() {
                "enabled" => {
                    let budget = Fields(std::mem::take(&mut thinking));
                    let budget = budget.integer("budget_tokens", 1..=i64::from(i32::MAX))?;
                    if let Some(budget) = budget {
                        fields.0.insert(THINKING_BUDGET.to_owned(), budget.into());
                    }
                    true
                }
                "adaptive" => true,
                "disabled" => false,
                other => return Err(unsupported_type("thinking", other)),
            }
        }
    };
    let variables = fields.0.entry("chat_template_kwargs").or_insert_with(|| json!({}));
    if let Some(variables) = variables.as_object_mut() {
        variables.entry("enable_thinking").or_insert(enabled.into());
    }
    Ok(())
}

/// llama-server's name for the tokens that reasoning may take.
const THINKING_BUDGET: &str = "thinking_budget_tokens";

/// `output_config`: how hard to think, and `format`, which was `output_format` while it was new.
fn output_format(fields: &mut Fields) -> Result<(), ApiError> {
    let nested = match fields.take("output_config") {
        None => None,
        Some(Value::Object(mut config)) => {
            if let Some(effort) = config.remove("effort").filter(|effort| !effort.is_null()) {
                fields.0.insert("reasoning_effort".to_owned(), effort);
            }
            config.remove("format").filter(|format| !format.is_null())
        }
        Some(other) => return Err(wrong_type("output_config", "an object", &other)),
    };
    let old = fields.take("output_format");
    let Some(format) = nested.or(old) else { return Ok(()) };
    let (kind, mut format) = typed("output_config.format", format)?;
    if kind != "json_schema" {
        return Err(unsupported_type("output_config.format", &kind));
    }
    let Some(schema) = format.remove("schema") else {
        let message = "'output_config.format.schema' is missing";
        return Err(ApiError::invalid("output_config.format.schema", message));
    };
    let schema = json!({"name": "output", "schema": schema, "strict": true});
    fields.0.insert("response_format".to_owned(), json!({"type": "json_schema", "json_schema": schema}));
    Ok(())
}

/// The text of a string or of text blocks.
fn text_of(name: &str, value: Value) -> Result<String, ApiError> {
    let blocks = match value {
        Value::String(text) => return Ok(text),
        Value::Array(blocks) => blocks,
        other => return Err(wrong_type(name, "a string or an array of text blocks", &other)),
    };
    let mut text = String::new();
    for (at, block) in blocks.into_iter().enumerate() {
        let name = format!("{name}[{at}]");
        let (kind, mut block) = typed(&name, block)?;
        if kind != "text" {
            return Err(unsupported_type(&name, &kind));
        }
        if at > 0 {
            text.push('\n');
        }
        text.push_str(&string(&name, "text", &mut block)?);
    }
    Ok(text)
}

fn typed(name: &str, value: Value) -> Result<(String, Map<String, Value>), ApiError> {
    let Value::Object(mut fields) = value else { return Err(wrong_type(name, "an object", &value)) };
    let kind = string(name, "type", &mut fields)?;
    Ok((kind, fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Value, ApiError> {
        let Value::Object(fields) = body else { panic!("not an object") };
        translate(Fields(fields), false).map(|fields| Value::Object(fields.0))
    }

    #[test]
    fn a_conversation_with_tools_becomes_openais() {
        let body = json!({
            "model": "toy", "max_tokens": 64, "stop_sequences": ["X"], "top_k": 5, "n": 3, "metadata": {"user_id": "u"},
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Be kind."}],
            "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "thinking": {"type": "enabled", "budget_tokens": 2048},
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "La Paz"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "8 °C"}]},
                    {"type": "text", "text": "And"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]},
            ],
        });
        assert_eq!(
            read(body).unwrap(),
            json!({
                "model": "toy", "max_tokens": 64, "stop": ["X"], "top_k": 5, "metadata": {"user_id": "u"},
                "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}],
                "tool_choice": "required", "parallel_tool_calls": false,
                "thinking_budget_tokens": 2048, "chat_template_kwargs": {"enable_thinking": true},
                "messages": [
                    {"role": "system", "content": "Be brief.\nBe kind."},
                    {"role": "user", "content": "Weather?"},
                    {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [
                        {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"La Paz\"}"}}]},
                    {"role": "tool", "tool_call_id": "t1", "content": "8 °C", "name": "weather"},
                    {"role": "user", "content": [
                        {"type": "text", "text": "And"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
                ],
            })
        );
    }

    #[test]
    fn what_is_said_otherwise_by_openai() {
        let with = |more: Value| {
            let mut body = json!({"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            read(body).unwrap()
        };
        assert_eq!(with(json!({}))["chat_template_kwargs"], json!({"enable_thinking": false}));
        let own = json!({"chat_template_kwargs": {"enable_thinking": true, "x": 1}});
        assert_eq!(with(own)["chat_template_kwargs"], json!({"enable_thinking": true, "x": 1}));
        let named = with(json!({"tool_choice": {"type": "tool", "name": "f"}}));
        assert_eq!(named["tool_choice"], json!({"type": "function", "function": {"name": "f"}}));
        let format = json!({"type": "json_schema", "schema": {"type": "object"}});
        let expected = json!({"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}, "strict": true}});
        assert_eq!(with(json!({"output_config": {"format": format, "effort": "low"}}))["response_format"], expected);
        assert_eq!(with(json!({"output_format": format}))["response_format"], expected);
        let goes_on = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "{"}]});
        let goes_on = with(goes_on);
        assert_eq!(goes_on["continue_final_message"], true);
        assert_eq!(goes_on["messages"][1], json!({"role": "assistant", "content": "{"}));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let user = |content: Value| json!({"max_tokens": 1, "messages": [{"role": "user", "content": content}]});
        let hi = |more: Value| {
            let mut body = user(json!("hi"));
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            body
        };
        for (body, param) in [
            (json!({"messages": []}), "max_tokens"),
            (json!({"max_tokens": 1}), "messages"),
            (json!({"max_tokens": 1, "messages": "hi"}), "messages"),
            (json!({"max_tokens": 1, "messages": [], "system": "x"}), "messages"),
            (json!({"max_tokens": 1, "messages": ["hi"]}), "messages[0]"),
            (json!({"max_tokens": 1, "messages": [{"role": "robot", "content": "x"}]}), "messages[0].role"),
            (user(json!(null)), "messages[0].content"),
            (user(json!([])), "messages[0].content"),
            (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
            (user(json!([{"type": "video"}])), "messages[0].content[0]"),
            (user(json!([{"type": "image"}])), "messages[0].content[0].source"),
            (user(json!([{"type": "image", "source": {"type": "file"}}])), "messages[0].content[0].source"),
            (user(json!([{"type": "tool_result", "content": "x"}])), "messages[0].content[0].tool_use_id"),
            (hi(json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]})), "tools[0]"),
            (hi(json!({"tools": [{}]})), "tools[0].name"),
            (hi(json!({"tool_choice": "auto"})), "tool_choice"),
            (hi(json!({"tool_choice": {"type": "maybe"}})), "tool_choice"),
            (hi(json!({"thinking": {"type": "enabled", "budget_tokens": 0}})), "budget_tokens"),
            (hi(json!({"mcp_servers": [{}]})), "mcp_servers"),
            (hi(json!({"system": 5})), "system"),
            (hi(json!({"output_format": {"type": "json_schema"}})), "output_config.format.schema"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
        }
    }
}
