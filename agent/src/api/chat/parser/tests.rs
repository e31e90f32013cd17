use serde_json::{Map, Value, json};

use super::*;
use crate::api::output::{Output, ToolCall};
use crate::engine::chat::{ChatFormat, ChatInput, ChatTemplates, Continuation, ToolChoice};

fn format(source: &str, tools: &[Value], parse_reasoning: bool) -> ChatFormat {
    let templates = ChatTemplates::compile(source, "<s>", "</s>").unwrap();
    let variables = Map::new();
    let input = ChatInput {
        messages: &[json!({"role": "user", "content": "Hi"})],
        tools,
        tool_choice: &ToolChoice::Auto,
        parallel_tool_calls: true,
        json_schema: None,
        add_generation_prompt: true,
        continuation: Continuation::None,
        enable_thinking: true,
        parse_reasoning,
        variables: &variables,
    };
    ChatFormat::clone(&templates.render(&input).unwrap().format)
}

fn tools() -> Vec<Value> {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]});
    let no_parameters = json!({"type": "object", "properties": {}});
    vec![
        json!({"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": parameters}}),
        json!({"type": "function", "function": {"name": "get_time", "description": "d", "parameters": no_parameters}}),
    ]
}

fn reading(format: &ChatFormat, streamed: bool) -> Reading {
    Reading {
        streamed,
        names: vec!["get_weather".to_owned(), "get_time".to_owned()],
        most_calls: 16,
        thinking: format.thinking.clone(),
        ..Reading::default()
    }
}

/// What comes of these pieces; each call begins before its arguments and has an id of its own.
fn read(format: &ChatFormat, reading: Reading, pieces: impl Iterator<Item = String>) -> Output {
    let mut parser = ChatParser::new(format.reader().unwrap(), reading);
    let mut output = Output::default();
    let mut take = |deltas: Vec<Delta>| {
        for delta in deltas {
            if let Delta::ToolArguments { index, .. } = &delta {
                assert!((*index as usize) < output.tool_calls.len(), "{delta:?}");
            }
            output.push(delta);
        }
    };
    for piece in pieces {
        // As if the last reading had been long ago.
        parser.pace = Pace::default();
        take(parser.push(&piece).unwrap());
    }
    take(parser.finish().unwrap());
    output
}

fn letters(text: &str) -> impl Iterator<Item = String> {
    text.chars().map(String::from)
}

/// A template, what the model writes, and what it says: content, reasoning, calls.
type Case<'a> = (&'a str, &'a str, &'a str, &'a str, &'a [(&'a str, &'a str)]);

const HERMES: &str = include_str!("../../../../tests/templates/hermes.jinja");
const QWEN3: &str = include_str!("../../../../tests/templates/qwen3.jinja");
const LLAMA3: &str = include_str!("../../../../tests/templates/llama3.jinja");
const MISTRAL: &str = include_str!("../../../../tests/templates/mistral.jinja");
const FUNCTIONARY: &str = include_str!("../../../../tests/templates/functionary.jinja");
const DEEPSEEK_R1: &str = include_str!("../../../../tests/templates/deepseek-r1.jinja");

#[test]
fn known_families_letter_by_letter_and_whole() {
    const PARIS: &str = r#"{"city": "Paris", "days": 2}"#;
    let cases: [Case<'_>; 14] = [
        (HERMES, "Just text, {with} <odd> [marks].\n\nEnd", "Just text, {with} <odd> [marks].\n\nEnd", "", &[]),
        // The beginning of a mark is no text.
        (HERMES, "A beginning <tool_c", "A beginning ", "", &[]),
        (
            HERMES,
            "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}\n</tool_call>",
            "",
            "",
            &[("get_weather", PARIS)],
        ),
        (
            HERMES,
            "Let me look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"get_time\", \"arguments\": {}}\n</tool_call>",
            "Let me look.",
            "",
            &[("get_weather", PARIS), ("get_time", "{}")],
        ),
        // Cut by max_tokens.
        (
            HERMES,
            "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Par",
            "",
            "",
            &[("get_weather", r#"{"city": "Par"#)],
        ),
        (QWEN3, "<think>\nHm. A < b.\n</think>\n\nParis, é☃.", "Paris, é☃.", "Hm. A < b.", &[]),
        (QWEN3, "No thought.", "No thought.", "", &[]),
        (QWEN3, "<think>\nNever done", "", "Never done", &[]),
        (
            QWEN3,
            "<think>\nHm.\n</think>\n\nLook:\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}\n</tool_call>",
            "Look:",
            "Hm.",
            &[("get_weather", PARIS)],
        ),
        (
            LLAMA3,
            r#"{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}"#,
            "",
            "",
            &[("get_weather", PARIS)],
        ),
        // Not a call, though it looks like the beginning of one.
        (LLAMA3, "A set {1, 2} of numbers.", "A set {1, 2} of numbers.", "", &[]),
        (
            MISTRAL,
            r#"[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}, "id": "123456789"}]"#,
            "",
            "",
            &[("get_weather", PARIS)],
        ),
        (FUNCTIONARY, "get_weather\n{\"city\": \"Paris\", \"days\": 2}", "", "", &[("get_weather", PARIS)]),
        (DEEPSEEK_R1, "Hm, so\n</think>\n\nParis.", "Paris.", "Hm, so", &[]),
    ];
    let tools = tools();
    for (source, written, content, reasoning, calls) in cases {
        let tools = if source == DEEPSEEK_R1 { &[] } else { tools.as_slice() };
        let format = format(source, tools, true);
        let streamed = read(&format, reading(&format, true), letters(written));
        let whole = read(&format, reading(&format, false), std::iter::once(written.to_owned()));
        for (how, output) in [("streamed", &streamed), ("whole", &whole)] {
            assert_eq!(output.content, content, "{how}: {written}");
            assert_eq!(output.reasoning, reasoning, "{how}: {written}");
            let found: Vec<_> =
                output.tool_calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
            assert_eq!(found, calls, "{how}: {written}");
        }
    }
}

#[test]
fn ids_are_the_models_or_new() {
    let format = format(HERMES, &tools(), true);
    let call =
        |name: &str| format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{\"city\": \"x\"}}}}\n</tool_call>");
    let two = call("get_weather") + &call("get_weather");
    let ids = |reading: Reading| {
        let output = read(&format, reading, letters(&two));
        output.tool_calls.into_iter().map(|ToolCall { id, .. }| id).collect::<Vec<_>>()
    };
    let new = ids(reading(&format, true));
    assert!(new.iter().all(|id| id.starts_with("call_") && id.len() == 29) && new[0] != new[1], "{new:?}");
    let short = ids(Reading { short_ids: true, ..reading(&format, true) });
    assert!(
        short.iter().all(|id| id.len() == 9 && id.chars().all(|letter| letter.is_ascii_alphanumeric())),
        "{short:?}"
    );
    assert_eq!(ids(Reading { most_calls: 1, ..reading(&format, true) }).len(), 1);

    let mistral = self::format(MISTRAL, &tools(), true);
    let written = r#"[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "x"}, "id": "abcdef123"}]"#;
    let output = read(&mistral, reading(&mistral, false), std::iter::once(written.to_owned()));
    assert_eq!(output.tool_calls[0].id, "abcdef123");
}

#[test]
fn reasoning_stands_where_it_was_asked_for() {
    let written = "<think>\nHm.\n</think>\n\nParis.";
    let whole = || std::iter::once(written.to_owned());
    let inline = format(QWEN3, &[], false);
    let output = read(&inline, Reading { most_calls: 0, ..reading(&inline, true) }, letters(written));
    assert_eq!((output.content.as_str(), output.reasoning.as_str()), (written, ""));
    let apart = format(QWEN3, &[], true);
    let both = Reading { repeat_reasoning: true, ..reading(&apart, false) };
    let output = read(&apart, both, whole());
    assert_eq!((output.content.as_str(), output.reasoning.as_str()), ("<think>Hm.\n</think>Paris.", "Hm."));
}

#[test]
fn what_follows_no_format_is_content() {
    let format = format(QWEN3, &tools(), true);
    let written =
        "<think>\nHm.\n</think>\n\n<tool_call>\n{\"name\": \"no_such_tool\", \"arguments\": {}}\n</tool_call>";
    for (streamed, pieces) in [(true, letters(written).collect()), (false, vec![written.to_owned()])] {
        let output = read(&format, reading(&format, streamed), pieces.into_iter());
        assert!(output.tool_calls.is_empty(), "{output:?}");
        assert_eq!(output.reasoning, "Hm.", "{streamed}");
        assert!(output.content.contains("no_such_tool"), "{streamed}: {output:?}");
    }
}

#[test]
fn reading_takes_a_tenth_of_the_time_at_most() {
    let start = Instant::now();
    let at = |milliseconds| start + Duration::from_millis(milliseconds);
    let mut pace = Pace::default();
    assert!(pace.is_due(start));
    pace.done(start, at(2));
    assert!(!pace.is_due(at(19)));
    assert!(pace.is_due(at(20)));
    pace.done(at(20), at(20));
    assert!(pace.is_due(at(20)));
}
