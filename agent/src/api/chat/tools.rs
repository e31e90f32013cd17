//! Tools: what a client offers, and which the model may or must call.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::api::error::{ApiError, clip};
use crate::api::fields::{Fields, wrong_type};
use crate::engine::chat::ToolChoice;

/// Tools that one request may have.
pub const MAX_TOOLS: usize = 128;

/// Bytes of a tool's name.
pub const MAX_TOOL_NAME_BYTES: usize = 128;

/// Bytes of all tools as JSON.
pub const MAX_TOOLS_BYTES: usize = 512 << 10;

/// What may be called.
#[derive(Debug, Default)]
pub(super) struct Tools {
    /// In OpenAI's form: `type` is `function`, `parameters` is a schema.
    pub(super) list: Vec<Value>,
    pub(super) choice: ToolChoice,
    /// `None`: as the template can.
    pub(super) parallel: Option<bool>,
}

impl Tools {
    pub(super) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let parallel = fields.boolean("parallel_tool_calls")?;
        let list = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(tools)) => read_tools(tools)?,
            Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
        };
        let choice = read_choice(fields.take("tool_choice"), &list)?;
        Ok(Self { list, choice, parallel })
    }

    /// A call may come.
    pub(super) fn may_call(&self) -> bool {
        !self.list.is_empty() && self.choice != ToolChoice::None
    }

    /// A call must come.
    pub(super) fn must_call(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.list.iter().filter_map(|tool| name_of(tool).map(str::to_owned)).collect()
    }
}

fn name_of(tool: &Value) -> Option<&str> {
    tool.get("function")?.get("name")?.as_str()
}

fn read_tools(tools: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if tools.len() > MAX_TOOLS {
        return Err(ApiError::invalid("tools", format!("'tools' may have {MAX_TOOLS} tools, not {}", tools.len())));
    }
    let list = tools.into_iter().enumerate().map(|(at, tool)| read_tool(&format!("tools[{at}]"), tool));
    let list = list.collect::<Result<Vec<_>, _>>()?;
    let bytes: usize = list.iter().map(|tool| tool.to_string().len()).sum();
    if bytes > MAX_TOOLS_BYTES {
        let message = format!("'tools' has {bytes} bytes of JSON; at most {MAX_TOOLS_BYTES} are allowed");
        return Err(ApiError::invalid("tools", message));
    }
    let mut seen = HashSet::new();
    for (at, name) in list.iter().filter_map(name_of).enumerate() {
        if !seen.insert(name) {
            let param = format!("tools[{at}].function.name");
            return Err(ApiError::invalid(param, format!("'tools' has two tools of the name '{name}'")));
        }
    }
    Ok(list)
}

fn read_tool(name: &str, tool: Value) -> Result<Value, ApiError> {
    let Value::Object(mut tool) = tool else { return Err(wrong_type(name, "an object", &tool)) };
    match tool.get("type").and_then(Value::as_str) {
        Some("function") => {}
        Some(other) => {
            let message = format!("'{name}.type' is '{}'; only functions can be called here", clip(other));
            return Err(ApiError::unsupported(format!("{name}.type"), message));
        }
        None => return Err(ApiError::invalid(format!("{name}.type"), format!("'{name}.type' must be function"))),
    }
    let function = format!("{name}.function");
    let Some(Value::Object(mut fields)) = tool.remove("function") else {
        return Err(ApiError::invalid(function.clone(), format!("'{function}' must be an object")));
    };
    let called = match fields.remove("name") {
        Some(Value::String(called)) if is_name(&called) => called,
        _ => {
            let message = format!(
                "'{function}.name' must have 1 to {MAX_TOOL_NAME_BYTES} letters, digits, or '_', '-', '.', ':', '/'"
            );
            return Err(ApiError::invalid(format!("{function}.name"), message));
        }
    };
    let mut clean = json!({"type": "function", "function": {"name": called}});
    match fields.remove("description") {
        None | Some(Value::Null) => {}
        Some(text @ Value::String(_)) => clean["function"]["description"] = text,
        Some(other) => return Err(wrong_type(&format!("{function}.description"), "a string", &other)),
    }
    clean["function"]["parameters"] = match fields.remove("parameters") {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(schema @ Value::Object(_)) => schema,
        Some(other) => return Err(wrong_type(&format!("{function}.parameters"), "a JSON schema", &other)),
    };
    Ok(clean)
}

fn is_name(name: &str) -> bool {
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || "_-.:/".contains(letter);
    (1..=MAX_TOOL_NAME_BYTES).contains(&name.len()) && name.chars().all(is_letter)
}

fn read_choice(choice: Option<Value>, tools: &[Value]) -> Result<ToolChoice, ApiError> {
    const NAME: &str = "tool_choice";
    let choice = match choice {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            // Anthropic's and Mistral's word second.
            "required" | "any" => ToolChoice::Required,
            other => {
                let message = format!("'{NAME}' must be auto, none, required or an object, not '{}'", clip(other));
                return Err(ApiError::invalid(NAME, message));
            }
        },
        Some(Value::Object(choice)) => {
            if let Some(other) = choice.get("type").and_then(Value::as_str).filter(|kind| *kind != "function") {
                let message = format!("'{NAME}.type' must be function, not '{}'", clip(other));
                return Err(ApiError::unsupported(format!("{NAME}.type"), message));
            }
            let named = choice.get("function").and_then(|function| function.get("name")).and_then(Value::as_str);
            let Some(named) = named else {
                let param = format!("{NAME}.function.name");
                return Err(ApiError::invalid(param.clone(), format!("'{param}' must be a string")));
            };
            if !tools.iter().any(|tool| name_of(tool) == Some(named)) {
                let message = format!("'{NAME}' names '{}', which is not among 'tools'", clip(named));
                return Err(ApiError::invalid(NAME, message));
            }
            ToolChoice::Named(named.to_owned())
        }
        Some(other) => return Err(wrong_type(NAME, "a string or an object", &other)),
    };
    if choice == ToolChoice::Required && tools.is_empty() {
        return Err(ApiError::invalid(NAME, format!("'{NAME}' is required, but there are no 'tools'")));
    }
    Ok(choice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn read(json: &Value) -> Result<Tools, ApiError> {
        Tools::read(&mut Fields(parse_object(json.to_string().as_bytes()).unwrap()))
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    #[test]
    fn tools_are_what_templates_know_in_the_order_they_were_sent() {
        let parameters = json!({"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}});
        let given = json!({"tools": [
            {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": parameters, "strict": true}},
            {"type": "function", "function": {"name": "mcp__x.y:z/1", "parameters": null}},
        ]});
        let tools = read(&given).unwrap();
        assert_eq!(
            tools.list[0],
            json!({"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": parameters}})
        );
        assert!(tools.list[0].to_string().contains(r#"{"z":{"type":"string"},"a":"#), "{}", tools.list[0]);
        assert_eq!(tools.names(), ["get_weather", "mcp__x.y:z/1"]);
        assert_eq!((tools.choice.clone(), tools.parallel), (ToolChoice::Auto, None));
        assert!(tools.may_call() && !tools.must_call());
    }

    #[test]
    fn choices() {
        let named = json!({"type": "function", "function": {"name": "f"}});
        for (choice, expected) in [
            (json!(null), ToolChoice::Auto),
            (json!("auto"), ToolChoice::Auto),
            (json!("none"), ToolChoice::None),
            (json!("required"), ToolChoice::Required),
            (json!("any"), ToolChoice::Required),
            (named, ToolChoice::Named("f".to_owned())),
        ] {
            let tools = read(&json!({"tools": [tool("f")], "tool_choice": choice})).unwrap();
            assert_eq!(tools.choice, expected);
        }
        assert!(!read(&json!({"tool_choice": "auto"})).unwrap().may_call());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |change: Value| json!({"tools": [tool("f"), change]});
        let function = |function: Value| with(json!({"type": "function", "function": function}));
        let cases = [
            (json!({"tools": {}}), "tools", "invalid_value"),
            (json!({"tools": vec![tool("f"); 129]}), "tools", "invalid_value"),
            (with(tool("f")), "tools[1].function.name", "invalid_value"),
            (with(json!(7)), "tools[1]", "invalid_value"),
            (with(json!({})), "tools[1].type", "invalid_value"),
            (with(json!({"type": "web_search"})), "tools[1].type", "unsupported_parameter"),
            (with(json!({"type": "function"})), "tools[1].function", "invalid_value"),
            (function(json!({})), "tools[1].function.name", "invalid_value"),
            (function(json!({"name": "a b"})), "tools[1].function.name", "invalid_value"),
            (function(json!({"name": "x".repeat(129)})), "tools[1].function.name", "invalid_value"),
            (function(json!({"name": "g", "description": 1})), "tools[1].function.description", "invalid_value"),
            (function(json!({"name": "g", "parameters": []})), "tools[1].function.parameters", "invalid_value"),
            (function(json!({"name": "g", "description": "x".repeat(MAX_TOOLS_BYTES)})), "tools", "invalid_value"),
            (json!({"tool_choice": "required"}), "tool_choice", "invalid_value"),
            (json!({"tool_choice": "perhaps"}), "tool_choice", "invalid_value"),
            (json!({"tool_choice": 1}), "tool_choice", "invalid_value"),
            (json!({"tool_choice": {"type": "custom"}}), "tool_choice.type", "unsupported_parameter"),
            (json!({"tool_choice": {"type": "function"}}), "tool_choice.function.name", "invalid_value"),
            (
                json!({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice",
                "invalid_value",
            ),
            (json!({"parallel_tool_calls": "yes"}), "parallel_tool_calls", "invalid_value"),
        ];
        for (given, param, code) in cases {
            let error = read(&given).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{}", error.message);
            assert_eq!(error.status, 400);
        }
    }
}
