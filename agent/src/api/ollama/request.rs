//! Ollama's requests in OpenAI's terms: what [`ChatRequest`](super::super::chat::ChatRequest) and
//! [`Params`](super::super::params::Params) read.

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::{Map, Value, json};

use super::options;
use crate::api::chat::MAX_MESSAGES;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, wrong_type};
use crate::api::media::{MAX_MEDIA, first_bytes, is_audio};
use crate::api::overflow;
use crate::engine::MAX_TOP_LOGPROBS;

/// What `/api/generate` asks for.
#[derive(Debug, PartialEq)]
pub(super) enum Wanted {
    /// Nothing: only that the model is loaded.
    Nothing,
    /// A turn of a conversation.
    Chat(Fields),
    /// To go on from a text.
    Text {
        /// The text.
        prompt: String,
        /// Parameters.
        fields: Fields,
    },
    /// What stands between two texts.
    Gap {
        /// Before it.
        prefix: String,
        /// After it.
        suffix: String,
        /// Parameters.
        fields: Fields,
    },
}

/// A chat; `None` without any message.
pub(super) fn chat(fields: &mut Fields) -> Result<Option<Fields>, ApiError> {
    let messages = match fields.take("messages") {
        None => return Ok(None),
        Some(Value::Array(messages)) if messages.is_empty() => return Ok(None),
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong_type("messages", "an array of messages", &other)),
    };
    let mut openai = common(fields)?;
    // Ollama's clients cannot say the last two; who can is understood.
    for name in ["tools", "tool_choice", "parallel_tool_calls"] {
        if let Some(value) = fields.take(name) {
            openai.insert(name.to_owned(), value);
        }
    }
    openai.insert("messages".to_owned(), translate(messages)?.into());
    Ok(Some(Fields(openai)))
}

/// A prompt. `has_template`: whether a turn of a conversation can be made of it.
pub(super) fn generate(fields: &mut Fields, has_template: bool) -> Result<Wanted, ApiError> {
    for (name, instead) in [
        ("template", "set spec.model.chatTemplate of the ModelDeployment, or send a 'raw' prompt"),
        ("context", "send the conversation to /api/chat"),
    ] {
        let is_empty = |value: &Value| *value == json!("") || *value == json!([]);
        if fields.take(name).is_some_and(|value| !is_empty(&value)) {
            return Err(ApiError::unsupported(name, format!("'{name}' is not supported by this server: {instead}")));
        }
    }
    let mut text = |name: &'static str| match fields.take(name) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong_type(name, "a string", &other)),
    };
    let (prompt, suffix, system) = (text("prompt")?, text("suffix")?, text("system")?);
    let raw = fields.boolean("raw")?.unwrap_or(false);
    let images = fields.take("images").filter(|images| *images != json!([]));
    if prompt.is_empty() && suffix.is_empty() && images.is_none() {
        return Ok(Wanted::Nothing);
    }
    let mut openai = common(fields)?;
    let as_it_is = raw || !has_template;
    if as_it_is || !suffix.is_empty() {
        if images.is_some() {
            let message =
                "'images' can be sent with a chat only: not with 'raw' or 'suffix', nor to a model without a template";
            return Err(ApiError::unsupported("images", message));
        }
        if !system.is_empty() {
            let message = "'system' needs the model's template: it cannot be sent with 'raw' or 'suffix', nor to a model without one";
            return Err(ApiError::unsupported("system", message));
        }
        let fields = Fields(openai);
        return Ok(if suffix.is_empty() {
            Wanted::Text { prompt, fields }
        } else {
            Wanted::Gap { prefix: prompt, suffix, fields }
        });
    }
    let mut messages = Vec::new();
    if !system.is_empty() {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": content("images", &prompt, images)?}));
    openai.insert("messages".to_owned(), messages.into());
    Ok(Wanted::Chat(Fields(openai)))
}

/// `logprobs` and `top_logprobs`, for prompts that are no chat.
pub(super) fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let top = fields.integer("top_logprobs", 0..=i64::from(MAX_TOP_LOGPROBS))?;
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    Ok(wanted.then(|| top.and_then(|top| u32::try_from(top).ok()).unwrap_or(0)))
}

/// What both have: stream, options, format, think, log-probabilities.
fn common(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let mut openai = Map::new();
    options::take(fields, &mut openai)?;
    openai.insert("stream".to_owned(), fields.boolean("stream")?.unwrap_or(true).into());
    for name in ["logprobs", "top_logprobs", "cache_salt", "altiplano"] {
        if let Some(value) = fields.take(name) {
            openai.insert(name.to_owned(), value);
        }
    }
    if let Some(truncate) = fields.boolean("truncate")? {
        let policy = if truncate { OverflowPolicy::DropOldest } else { OverflowPolicy::Reject };
        overflow::wish(&mut openai, policy);
    }
    match fields.take("format") {
        None => {}
        Some(Value::String(format)) if format.is_empty() => {}
        Some(Value::String(format)) if format == "json" => {
            openai.insert("response_format".to_owned(), json!({"type": "json_object"}));
        }
        Some(schema @ Value::Object(_)) => {
            let format = json!({"type": "json_schema", "json_schema": {"name": "format", "schema": schema}});
            openai.insert("response_format".to_owned(), format);
        }
        Some(other) => return Err(wrong_type("format", "\"json\" or a JSON schema", &other)),
    }
    match fields.take("think") {
        None => {}
        Some(Value::Bool(think)) => {
            openai.insert("enable_thinking".to_owned(), think.into());
        }
        Some(Value::String(effort)) if matches!(effort.as_str(), "low" | "medium" | "high") => {
            openai.insert("enable_thinking".to_owned(), true.into());
            openai.insert("reasoning_effort".to_owned(), effort.into());
        }
        Some(other) => {
            return Err(wrong_type("think", "true, false, \"low\", \"medium\" or \"high\"", &other));
        }
    }
    Ok(openai)
}

/// Messages in OpenAI's form. A result names its tool, not its call, so each goes to the earliest call of that tool
/// that has none; without a name to the earliest of all.
fn translate(messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if messages.len() > MAX_MESSAGES {
        let message = format!("'messages' must have 1 to {MAX_MESSAGES} messages, not {}", messages.len());
        return Err(ApiError::invalid("messages", message));
    }
    // Calls without a result: id and name.
    let mut open: Vec<(String, String)> = Vec::new();
    let mut calls = 0;
    let mut openai = Vec::with_capacity(messages.len());
    for (at, message) in messages.into_iter().enumerate() {
        let name = format!("messages[{at}]");
        let Value::Object(message) = message else { return Err(wrong_type(&name, "an object", &message)) };
        let mut message = Fields(message);
        let text = match message.take("content") {
            None => String::new(),
            Some(Value::String(text)) => text,
            Some(other) => return Err(wrong_type(&format!("{name}.content"), "a string", &other)),
        };
        let role = message.take("role").unwrap_or_default();
        let mut translated = Map::new();
        let content = content(&format!("{name}.images"), &text, message.take("images"))?;
        translated.insert("content".to_owned(), content);
        if let Some(thinking @ Value::String(_)) = message.take("thinking") {
            translated.insert("reasoning_content".to_owned(), thinking);
        }
        if let Some(called) = message.take("tool_calls") {
            let name = format!("{name}.tool_calls");
            let Value::Array(called) = called else { return Err(wrong_type(&name, "an array of calls", &called)) };
            let mut all = Vec::with_capacity(called.len());
            for call in called {
                calls += 1;
                let (call, function) = tool_call(&name, &call, calls)?;
                open.push((call["id"].as_str().unwrap_or_default().to_owned(), function));
                all.push(call);
            }
            if !all.is_empty() {
                translated.insert("tool_calls".to_owned(), all.into());
            }
        }
        if role == "tool" {
            let given = message.take("tool_call_id");
            let tool = message.take("tool_name").or_else(|| message.take("name"));
            let tool = tool.as_ref().and_then(Value::as_str);
            let place = match given.as_ref().and_then(Value::as_str) {
                Some(id) => open.iter().position(|(known, _)| known == id),
                None => open.iter().position(|(_, known)| tool.is_none_or(|tool| tool == known)),
            };
            let found = place.map(|place| open.remove(place));
            let id = given.or_else(|| found.as_ref().map(|(id, _)| id.as_str().into()));
            translated.insert("tool_call_id".to_owned(), id.unwrap_or_else(|| "call_0".into()));
            if let Some(tool) = tool.map(str::to_owned).or(found.map(|(_, tool)| tool)) {
                translated.insert("name".to_owned(), tool.into());
            }
        }
        translated.insert("role".to_owned(), role);
        openai.push(translated.into());
    }
    Ok(openai)
}

/// A call with its arguments as text, and the function's name.
fn tool_call(name: &str, call: &Value, number: usize) -> Result<(Value, String), ApiError> {
    let wrong = || {
        let message = format!("each of '{name}' must have a 'function' with a 'name' and the object 'arguments'");
        ApiError::invalid(name, message)
    };
    let function = call.get("function").ok_or_else(wrong)?;
    let called = function.get("name").and_then(Value::as_str).ok_or_else(wrong)?.to_owned();
    let arguments = match function.get("arguments") {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(arguments @ Value::Object(_)) => arguments.to_string(),
        Some(_) => return Err(wrong()),
    };
    let id = call.get("id").and_then(Value::as_str).map_or_else(|| format!("call_{number}"), str::to_owned);
    let call = json!({"id": id, "type": "function", "function": {"name": called, "arguments": arguments}});
    Ok((call, called))
}

/// Text alone, or text and images as parts. As with Ollama, sound stands among the images.
fn content(name: &str, text: &str, images: Option<Value>) -> Result<Value, ApiError> {
    let images = match images {
        None => return Ok(text.into()),
        Some(Value::Array(images)) if images.is_empty() => return Ok(text.into()),
        Some(Value::Array(images)) if images.len() <= MAX_MEDIA => images,
        Some(Value::Array(images)) => {
            let message = format!("'{name}' may have {MAX_MEDIA} images, not {}", images.len());
            return Err(ApiError::invalid(name, message));
        }
        Some(other) => return Err(wrong_type(name, "an array of images in base64", &other)),
    };
    let mut parts = Vec::with_capacity(images.len() + 1);
    if !text.is_empty() {
        parts.push(json!({"type": "text", "text": text}));
    }
    for image in images {
        let Value::String(data) = image else { return Err(wrong_type(name, "an array of images in base64", &image)) };
        if data.starts_with("data:audio/") || is_audio(&first_bytes(&data)) {
            parts.push(json!({"type": "input_audio", "input_audio": {"data": data}}));
            continue;
        }
        let url = if data.starts_with("data:") { data } else { format!("data:{};base64,{data}", kind_of(&data)) };
        parts.push(json!({"type": "image_url", "image_url": {"url": url}}));
    }
    Ok(parts.into())
}

/// The kind of an image by its first bytes, in base64.
fn kind_of(base64: &str) -> &'static str {
    match base64 {
        data if data.starts_with("/9j/") => "image/jpeg",
        data if data.starts_with("R0lG") => "image/gif",
        data if data.starts_with("UklG") => "image/webp",
        data if data.starts_with("Qk") => "image/bmp",
        _ => "image/png",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn fields(json: &Value) -> Fields {
        Fields(parse_object(json.to_string().as_bytes()).unwrap())
    }

    fn chatted(given: &Value) -> Value {
        chat(&mut fields(given)).unwrap().unwrap().0.into()
    }

    #[test]
    fn a_chat_in_openais_terms() {
        let given = json!({
            "model": "toy", "think": false, "format": "json", "keep_alive": "5m", "logprobs": true,
            "options": {"temperature": 0, "num_predict": 7},
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather in Paris and Rome?"},
                {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [
                    {"function": {"name": "weather", "arguments": {"city": "Paris"}}},
                    {"function": {"name": "weather", "arguments": {"city": "Rome"}}},
                    {"function": {"name": "time"}},
                ]},
                {"role": "tool", "content": "12", "tool_name": "time"},
                {"role": "tool", "content": "rain", "tool_name": "weather"},
                {"role": "tool", "content": "sun"},
            ],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        });
        let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let result = |id: &str, name: &str, content: &str| json!({"role": "tool", "content": content, "tool_call_id": id, "name": name});
        let expected = json!({
            "stream": true, "temperature": 0, "max_tokens": 7, "logprobs": true,
            "response_format": {"type": "json_object"},
            "enable_thinking": false,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather in Paris and Rome?"},
                {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                    call("call_1", "weather", r#"{"city":"Paris"}"#),
                    call("call_2", "weather", r#"{"city":"Rome"}"#),
                    call("call_3", "time", "{}"),
                ]},
                result("call_3", "time", "12"),
                result("call_1", "weather", "rain"),
                result("call_2", "weather", "sun"),
            ],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        });
        assert_eq!(chatted(&given), expected);
    }

    #[test]
    fn a_schema_an_effort_and_images() {
        let hello = json!([{"role": "user", "content": "hi", "images": ["/9j/4AAQ", "iVBORw0KGgo"]}]);
        let found =
            chatted(&json!({"messages": hello, "format": {"type": "object"}, "think": "high", "stream": false}));
        assert_eq!(found["response_format"]["json_schema"]["schema"], json!({"type": "object"}));
        assert_eq!((&found["enable_thinking"], &found["reasoning_effort"]), (&json!(true), &json!("high")));
        assert_eq!(found["stream"], false);
        let content = &found["messages"][0]["content"];
        assert_eq!(content[0], json!({"type": "text", "text": "hi"}));
        assert_eq!(content[1]["image_url"]["url"], "data:image/jpeg;base64,/9j/4AAQ");
        assert_eq!(content[2]["image_url"]["url"], "data:image/png;base64,iVBORw0KGgo");
        assert!(chat(&mut fields(&json!({}))).unwrap().is_none());
        assert!(chat(&mut fields(&json!({"messages": []}))).unwrap().is_none());
    }

    #[test]
    fn a_prompt_becomes_what_it_asks_for() {
        let wanted = |given: Value, has_template| generate(&mut fields(&given), has_template).unwrap();
        let nothing = json!({"prompt": "", "keep_alive": 5, "template": "", "context": []});
        assert_eq!(wanted(nothing, true), Wanted::Nothing);
        let Wanted::Chat(Fields(chat)) = wanted(json!({"prompt": "hi", "system": "Be brief."}), true) else {
            panic!("no chat")
        };
        let expected = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]);
        assert_eq!((&chat["messages"], &chat["stream"]), (&expected, &json!(true)));
        for (given, has_template) in [(json!({"prompt": "hi", "raw": true}), true), (json!({"prompt": "hi"}), false)] {
            assert!(matches!(wanted(given, has_template), Wanted::Text { prompt, .. } if prompt == "hi"));
        }
        let gap = wanted(json!({"prompt": "a", "suffix": "b"}), true);
        assert!(matches!(gap, Wanted::Gap { prefix, suffix, .. } if prefix == "a" && suffix == "b"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let many: Vec<Value> = vec![json!({"role": "user"}); 4097];
        for (given, param) in [
            (json!({"messages": {}}), "messages"),
            (json!({"messages": [1]}), "messages[0]"),
            (json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "images": [1]}]}), "messages[0].images"),
            (json!({"messages": [{"role": "user", "images": vec!["x"; 65]}]}), "messages[0].images"),
            (json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}), "messages[0].tool_calls"),
            (json!({"messages": many}), "messages"),
            (json!({"messages": [{}], "format": "xml"}), "format"),
            (json!({"messages": [{}], "think": "much"}), "think"),
            (json!({"messages": [{}], "stream": 1}), "stream"),
        ] {
            let error = chat(&mut fields(&given)).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{given:.80}");
        }
        for (given, param) in [
            (json!({"prompt": 1}), "prompt"),
            (json!({"prompt": "a", "template": "{{ .Prompt }}"}), "template"),
            (json!({"prompt": "a", "context": [1]}), "context"),
            (json!({"prompt": "a", "suffix": "b", "system": "c"}), "system"),
            (json!({"prompt": "a", "raw": true, "images": ["x"]}), "images"),
        ] {
            let error = generate(&mut fields(&given), true).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{given}");
        }
    }
}
