//! A Responses request in the terms of chat completions: what [`ChatRequest`](super::super::chat::ChatRequest) reads.

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::fields::{Fields, string, unsupported_type, wrong_type};
use super::super::overflow;

/// Fields of chat completions that Responses says otherwise, or not at all.
const DROPPED: [&str; 9] = [
    "n",
    "messages",
    "logprobs",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
    "reasoning_effort",
    "functions",
    "function_call",
];

/// What needs a server that keeps conversations or runs tools, and what to do instead.
const REFUSED: [(&str, &str); 4] = [
    ("previous_response_id", "this server keeps no responses: send the conversation as 'input'"),
    ("conversation", "this server keeps no conversations: send the conversation as 'input'"),
    ("prompt", "this server keeps no prompts: send 'instructions' and 'input'"),
    ("max_tool_calls", "this server runs no tools itself"),
];

/// What an answer says again of its request.
#[derive(Debug)]
pub(super) struct Echo(pub(super) Map<String, Value>);

/// Translates.
pub(super) fn translate(mut fields: Fields) -> Result<(Fields, Echo), ApiError> {
    for (name, instead) in REFUSED {
        if fields.get(name).is_some() {
            return Err(ApiError::unsupported(name, format!("'{name}' is not supported: {instead}")));
        }
    }
    if fields.boolean("background")? == Some(true) {
        return Err(ApiError::unsupported(
            "background",
            "'background' is not supported: this server keeps no responses",
        ));
    }
    match fields.take("truncation").as_ref().map(Value::as_str) {
        None => {}
        Some(Some("auto")) => overflow::wish(&mut fields.0, OverflowPolicy::DropOldest),
        Some(Some("disabled")) => overflow::wish(&mut fields.0, OverflowPolicy::Reject),
        Some(_) => return Err(ApiError::invalid("truncation", "'truncation' must be 'auto' or 'disabled'")),
    }
    for name in DROPPED {
        fields.0.remove(name);
    }
    let echo = echo(&fields);
    let mut messages = Vec::new();
    match fields.take("instructions") {
        None => {}
        Some(Value::String(text)) => messages.push(json!({"role": "system", "content": text})),
        Some(other) => return Err(wrong_type("instructions", "a string", &other)),
    }
    match fields.take("input") {
        None => return Err(ApiError::missing("input")),
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) => read_items(items, &mut messages)?,
        Some(other) => return Err(wrong_type("input", "a string or an array of items", &other)),
    }
    fields.0.insert("messages".to_owned(), messages.into());
    // The API has a lower limit of 16 because its models think; there is no reason for one here.
    if let Some(most) = fields.integer("max_output_tokens", 1..=i64::from(i32::MAX))? {
        fields.0.insert("max_completion_tokens".to_owned(), most.into());
    }
    tools(&mut fields)?;
    text(&mut fields)?;
    if let Some(effort) = fields.take("reasoning").and_then(|mut reasoning| Some(reasoning.get_mut("effort")?.take())) {
        fields.0.insert("reasoning_effort".to_owned(), effort);
    }
    logprobs(&mut fields)?;
    // The one option, padding against eavesdroppers, is for the public internet; usage always comes.
    fields.0.remove("stream_options");
    Ok((fields, echo))
}

/// `include` asks for log-probabilities, `top_logprobs` says how many.
fn logprobs(fields: &mut Fields) -> Result<(), ApiError> {
    let wants = match fields.take("include") {
        None => false,
        Some(Value::Array(names)) => names.iter().any(|name| name == "message.output_text.logprobs"),
        Some(other) => return Err(wrong_type("include", "an array of strings", &other)),
    };
    if wants {
        fields.0.insert("logprobs".to_owned(), true.into());
    } else {
        // The official clients send it alone, which asks for nothing.
        fields.0.remove("top_logprobs");
    }
    Ok(())
}

fn echo(fields: &Fields) -> Echo {
    let mut echo = Map::new();
    let mut say = |name: &str, default: Value| {
        echo.insert(name.to_owned(), fields.get(name).cloned().unwrap_or(default));
    };
    say("instructions", Value::Null);
    say("max_output_tokens", Value::Null);
    say("metadata", json!({}));
    say("parallel_tool_calls", json!(true));
    say("reasoning", json!({"effort": null, "summary": null}));
    say("temperature", Value::Null);
    say("text", json!({"format": {"type": "text"}}));
    say("tool_choice", json!("auto"));
    say("tools", json!([]));
    say("top_p", Value::Null);
    say("user", Value::Null);
    Echo(echo)
}

fn read_items(items: Vec<Value>, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    // What the model thought belongs to what it said next.
    let mut thought = String::new();
    for (at, item) in items.into_iter().enumerate() {
        let name = format!("input[{at}]");
        let Value::Object(mut item) = item else { return Err(wrong_type(&name, "an object", &item)) };
        let kind = match item.remove("type") {
            None | Some(Value::Null) => "message".to_owned(),
            Some(Value::String(kind)) => kind,
            Some(other) => return Err(wrong_type(&format!("{name}.type"), "a string", &other)),
        };
        match kind.as_str() {
            "message" => {
                let role = string(&name, "role", &mut item)?;
                let content = content(&format!("{name}.content"), item.remove("content").unwrap_or_default())?;
                let mut message = json!({"role": role, "content": content});
                if role == "assistant" {
                    think(&mut message, &mut thought);
                }
                messages.push(message);
            }
            "reasoning" => thought.push_str(&reasoning(&item)),
            "function_call" => {
                let function = json!({
                    "name": string(&name, "name", &mut item)?,
                    "arguments": string(&name, "arguments", &mut item)?,
                });
                let call =
                    json!({"id": string(&name, "call_id", &mut item)?, "type": "function", "function": function});
                call_by_assistant(call, &mut thought, messages);
            }
            "function_call_output" => {
                let id = string(&name, "call_id", &mut item)?;
                let output = content(&format!("{name}.output"), item.remove("output").unwrap_or_default())?;
                messages.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
            }
            "item_reference" => {
                let message = format!("'{name}' refers to an item, but this server keeps none: send the item itself");
                return Err(ApiError::unsupported(name, message));
            }
            other => return Err(unsupported_type(&name, other)),
        }
    }
    Ok(())
}

/// A call is a part of the assistant's message before it, or of a message without text.
fn call_by_assistant(call: Value, thought: &mut String, messages: &mut Vec<Value>) {
    if let Some(last) = messages.last_mut().filter(|last| last["role"] == "assistant") {
        think(last, thought);
        match last.get_mut("tool_calls").and_then(Value::as_array_mut) {
            Some(calls) => calls.push(call),
            None => last["tool_calls"] = json!([call]),
        }
        return;
    }
    let mut message = json!({"role": "assistant", "content": "", "tool_calls": [call]});
    think(&mut message, thought);
    messages.push(message);
}

fn think(message: &mut Value, thought: &mut String) {
    if !thought.is_empty() {
        message["reasoning_content"] = std::mem::take(thought).into();
    }
}

/// The text of a reasoning item: its content, or else its summary.
fn reasoning(item: &Map<String, Value>) -> String {
    let text = |field: &str| {
        let parts = item.get(field).and_then(Value::as_array);
        let texts = parts.into_iter().flatten().filter_map(|part| part.get("text")?.as_str());
        texts.collect::<Vec<_>>().join("\n")
    };
    let content = text("content");
    if content.is_empty() { text("summary") } else { content }
}

fn content(name: &str, value: Value) -> Result<Value, ApiError> {
    let parts = match value {
        Value::String(_) => return Ok(value),
        Value::Array(parts) => parts,
        other => return Err(wrong_type(name, "a string or an array of parts", &other)),
    };
    let parts = parts.into_iter().enumerate().map(|(at, part)| one_part(&format!("{name}[{at}]"), part));
    let mut parts: Vec<Value> = parts.collect::<Result<_, _>>()?;
    // One text is a string, so that templates without parts read it too.
    Ok(match parts.as_mut_slice() {
        [only] if only["type"] == "text" => only["text"].take(),
        [] => Value::String(String::new()),
        _ => Value::Array(parts),
    })
}

fn one_part(name: &str, part: Value) -> Result<Value, ApiError> {
    let Value::Object(mut part) = part else { return Err(wrong_type(name, "an object", &part)) };
    let kind = string(name, "type", &mut part)?;
    match kind.as_str() {
        "input_text" | "output_text" | "text" => Ok(json!({"type": "text", "text": string(name, "text", &mut part)?})),
        "refusal" => Ok(json!({"type": "text", "text": string(name, "refusal", &mut part)?})),
        "input_image" => {
            if part.get("image_url").is_none_or(Value::is_null) {
                let message = format!("'{name}.image_url' is missing: this server keeps no files");
                return Err(ApiError::invalid(format!("{name}.image_url"), message));
            }
            Ok(json!({"type": "image_url", "image_url": {"url": string(name, "image_url", &mut part)?}}))
        }
        "input_audio" => {
            let audio = part.remove("input_audio").unwrap_or_default();
            Ok(json!({"type": "input_audio", "input_audio": audio}))
        }
        other => Err(unsupported_type(name, other)),
    }
}

fn tools(fields: &mut Fields) -> Result<(), ApiError> {
    let mut tools = match fields.take("tools") {
        None => Vec::new(),
        Some(Value::Array(given)) => {
            let tools = given.into_iter().enumerate().map(|(at, tool)| one_tool(&format!("tools[{at}]"), tool));
            tools.collect::<Result<Vec<_>, _>>()?
        }
        Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
    };
    let choice = match fields.take("tool_choice") {
        Some(Value::Object(mut choice)) => {
            let kind = string("tool_choice", "type", &mut choice)?;
            Some(match kind.as_str() {
                "function" => {
                    json!({"type": "function", "function": {"name": string("tool_choice", "name", &mut choice)?}})
                }
                "allowed_tools" => {
                    let allowed = choice.get("tools").and_then(Value::as_array).cloned().unwrap_or_default();
                    tools.retain(|tool| allowed.iter().any(|one| one["name"] == tool["function"]["name"]));
                    choice.remove("mode").unwrap_or_else(|| json!("auto"))
                }
                other => return Err(unsupported_type("tool_choice", other)),
            })
        }
        other => other,
    };
    if !tools.is_empty() {
        fields.0.insert("tools".to_owned(), tools.into());
    }
    if let Some(choice) = choice {
        fields.0.insert("tool_choice".to_owned(), choice);
    }
    Ok(())
}

fn one_tool(name: &str, tool: Value) -> Result<Value, ApiError> {
    let Value::Object(mut tool) = tool else { return Err(wrong_type(name, "an object", &tool)) };
    let kind = string(name, "type", &mut tool)?;
    if kind != "function" {
        return Err(unsupported_type(name, &kind));
    }
    let mut function = Map::new();
    function.insert("name".to_owned(), string(name, "name", &mut tool)?.into());
    for field in ["description", "parameters", "strict"] {
        if let Some(value) = tool.remove(field).filter(|value| !value.is_null()) {
            function.insert(field.to_owned(), value);
        }
    }
    Ok(json!({"type": "function", "function": function}))
}

fn text(fields: &mut Fields) -> Result<(), ApiError> {
    let mut text = match fields.take("text") {
        None => return Ok(()),
        Some(Value::Object(text)) => text,
        Some(other) => return Err(wrong_type("text", "an object", &other)),
    };
    if let Some(verbosity) = text.remove("verbosity").filter(|value| !value.is_null()) {
        fields.0.insert("verbosity".to_owned(), verbosity);
    }
    let mut format = match text.remove("format") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Object(format)) => format,
        Some(other) => return Err(wrong_type("text.format", "an object", &other)),
    };
    let format = match string("text.format", "type", &mut format)?.as_str() {
        "text" => return Ok(()),
        "json_object" => json!({"type": "json_object"}),
        "json_schema" => json!({"type": "json_schema", "json_schema": format}),
        other => return Err(unsupported_type("text.format", other)),
    };
    fields.0.insert("response_format".to_owned(), format);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<(Value, Value), ApiError> {
        let Value::Object(fields) = body else { panic!("not an object") };
        translate(Fields(fields)).map(|(fields, echo)| (Value::Object(fields.0), Value::Object(echo.0)))
    }

    #[test]
    fn a_conversation_with_tools_becomes_chats() {
        let body = json!({
            "model": "toy", "instructions": "Be brief.", "max_output_tokens": 64, "top_k": 5, "store": true, "n": 3,
            "tools": [{"type": "function", "name": "weather", "description": null, "parameters": {"type": "object"}, "strict": true}],
            "tool_choice": {"type": "function", "name": "weather"}, "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": true}},
            "include": ["reasoning.encrypted_content", "message.output_text.logprobs"], "top_logprobs": 2,
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                 "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "8 °C"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "9 °C"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
                {"type": "function_call", "call_id": "c3", "name": "weather", "arguments": "{}"},
                {"role": "user", "content": [{"type": "input_text", "text": "See"}, {"type": "input_image", "image_url": "data:x"}]},
            ],
        });
        let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "weather", "arguments": "{}"}});
        let (fields, echo) = read(body).unwrap();
        assert_eq!(
            fields,
            json!({
                "model": "toy", "max_output_tokens": 64, "max_completion_tokens": 64, "top_k": 5, "store": true,
                "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "strict": true}}],
                "tool_choice": {"type": "function", "function": {"name": "weather"}}, "reasoning_effort": "low",
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": true}},
                "logprobs": true, "top_logprobs": 2,
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Weather?"},
                    {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [call("c1"), call("c2")]},
                    {"role": "tool", "tool_call_id": "c1", "content": "8 °C"},
                    {"role": "tool", "tool_call_id": "c2", "content": "9 °C"},
                    {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [call("c3")]},
                    {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "data:x"}}]},
                ],
            })
        );
        assert_eq!((&echo["instructions"], &echo["max_output_tokens"]), (&json!("Be brief."), &json!(64)));
        assert_eq!((&echo["temperature"], &echo["tools"][0]["name"]), (&Value::Null, &json!("weather")));
    }

    #[test]
    fn what_asks_for_nothing_is_left_out() {
        let body = json!({"input": "hi", "truncation": null, "background": false, "previous_response_id": null,
            "top_logprobs": 0, "include": [], "text": {"format": {"type": "text"}}, "tools": [], "stream_options": {}});
        let (fields, _) = read(body).unwrap();
        assert_eq!(
            fields,
            json!({"messages": [{"role": "user", "content": "hi"}], "background": false, "previous_response_id": null})
        );
        let tool = |name: &str| json!({"type": "function", "name": name});
        let allowed = json!({"type": "allowed_tools", "mode": "required", "tools": [tool("b")]});
        let (fields, _) =
            read(json!({"input": "hi", "tools": [tool("a"), tool("b")], "tool_choice": allowed})).unwrap();
        assert_eq!(fields["tools"], json!([{"type": "function", "function": {"name": "b"}}]));
        assert_eq!(fields["tool_choice"], "required");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let items = |item: Value| json!({"input": [item]});
        let hi = |more: Value| {
            let mut body = json!({"input": "hi"});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            body
        };
        for (body, param) in [
            (json!({}), "input"),
            (json!({"input": 5}), "input"),
            (items(json!("hi")), "input[0]"),
            (items(json!({"content": "x"})), "input[0].role"),
            (items(json!({"role": "user"})), "input[0].content"),
            (items(json!({"role": "user", "content": [{"type": "input_file"}]})), "input[0].content[0]"),
            (
                items(json!({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]})),
                "input[0].content[0].image_url",
            ),
            (items(json!({"type": "item_reference", "id": "x"})), "input[0]"),
            (items(json!({"type": "web_search_call"})), "input[0]"),
            (items(json!({"type": "function_call", "name": "f", "arguments": "{}"})), "input[0].call_id"),
            (hi(json!({"previous_response_id": "resp_1"})), "previous_response_id"),
            (hi(json!({"conversation": "c"})), "conversation"),
            (hi(json!({"background": true})), "background"),
            (hi(json!({"truncation": "never"})), "truncation"),
            (hi(json!({"truncation": true})), "truncation"),
            (hi(json!({"max_output_tokens": 0})), "max_output_tokens"),
            (hi(json!({"instructions": []})), "instructions"),
            (hi(json!({"tools": [{"type": "web_search"}]})), "tools[0]"),
            (hi(json!({"tools": [{"type": "function"}]})), "tools[0].name"),
            (hi(json!({"tool_choice": {"type": "mcp"}})), "tool_choice"),
            (hi(json!({"text": {"format": {"type": "yaml"}}})), "text.format"),
            (hi(json!({"include": "x"})), "include"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{body}");
        }
    }
}
