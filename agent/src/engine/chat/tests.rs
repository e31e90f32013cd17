use std::sync::LazyLock;

use serde_json::json;

use super::*;

static NO_VARIABLES: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);

macro_rules! template {
    ($name:literal) => {
        include_str!(concat!("../../../tests/templates/", $name, ".jinja"))
    };
}

fn compile(source: &str) -> ChatTemplates {
    ChatTemplates::compile(source, "<s>", "</s>").unwrap()
}

fn weather() -> Vec<Value> {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    vec![json!({"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": parameters}})]
}

fn hello() -> Vec<Value> {
    vec![json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "<b>Hi</b> & \"you\""})]
}

/// Renders with this change of what is usual.
fn render<'r>(
    templates: &ChatTemplates,
    messages: &'r [Value],
    change: impl FnOnce(&mut ChatInput<'r>),
) -> Result<Rendered, ChatError> {
    let mut input = ChatInput {
        messages,
        tools: &[],
        tool_choice: &ToolChoice::Auto,
        parallel_tool_calls: false,
        json_schema: None,
        add_generation_prompt: true,
        continuation: Continuation::None,
        enable_thinking: true,
        parse_reasoning: true,
        variables: &NO_VARIABLES,
    };
    change(&mut input);
    templates.render(&input)
}

fn prompt(source: &str, messages: &[Value]) -> String {
    render(&compile(source), messages, |_| ()).unwrap().prompt
}

#[test]
fn prompts_of_known_families() {
    let cases = [
        (
            template!("chatml"),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>Hi</b> & \"you\"<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            template!("llama3"),
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n\
             <b>Hi</b> & \"you\"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (template!("mistral"), "<s>[INST]Be brief.\n\n<b>Hi</b> & \"you\"[/INST]"),
        (template!("deepseek-r1"), "<s>Be brief.<｜User｜><b>Hi</b> & \"you\"<｜Assistant｜><think>\n"),
    ];
    for (source, expected) in cases {
        assert_eq!(prompt(source, &hello()), expected);
    }
}

#[test]
fn tools_and_calls_are_rendered_in_the_order_they_were_sent() {
    let templates = compile(template!("hermes"));
    assert!(templates.capabilities().supports_tools && templates.capabilities().supports_parallel_tool_calls);
    assert!(!compile(template!("chatml")).capabilities().supports_tools);
    let messages = [
        json!({"role": "user", "content": "Weather?"}),
        json!({"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": "{\"z\": 1, \"a\": \"ü<\"}"}},
        ]}),
        json!({"role": "tool", "content": "Sunny", "tool_call_id": "1"}),
    ];
    let tools = weather();
    let Rendered { prompt, format } = render(&templates, &messages, |input| input.tools = &tools).unwrap();
    let tool = r#"{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}"#;
    assert!(prompt.contains(tool), "{prompt}");
    assert!(
        prompt.contains(
            "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"z\": 1, \"a\": \"ü<\"}}\n</tool_call>"
        ),
        "{prompt}"
    );
    assert!(
        prompt.ends_with("<tool_response>\nSunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        "{prompt}"
    );
    assert!(format.grammar_lazy && !format.grammar.is_empty() && !format.plain);
    assert_eq!(format.triggers, [Trigger::Word("<tool_call>\n".to_owned())]);
    assert!(format.preserved_tokens.contains(&"<tool_call>".to_owned()));
}

#[test]
fn a_named_tool_changes_no_prompt() {
    let templates = compile(template!("hermes"));
    let mut tools = weather();
    tools.push(json!({"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}));
    let auto = render(&templates, &hello(), |input| input.tools = &tools).unwrap();
    let choice = ToolChoice::Named("get_time".to_owned());
    let named = render(&templates, &hello(), |input| {
        input.tools = &tools;
        input.tool_choice = &choice;
    });
    let named = named.unwrap();
    assert_eq!(named.prompt, auto.prompt);
    assert!(!named.format.grammar_lazy);
    assert!(named.format.grammar.contains("get_time") && !named.format.grammar.contains("get_weather"));
    assert!(auto.format.grammar.contains("get_weather"));
}

#[test]
fn thinking_is_known_and_can_be_switched_off() {
    let templates = compile(template!("qwen3"));
    let on = render(&templates, &hello(), |_| ()).unwrap();
    let tags = ThinkingTags { start: "<think>".to_owned(), ends: vec!["</think>".to_owned()] };
    assert_eq!(on.format.thinking, Some(tags));
    assert!(on.prompt.ends_with("<|im_start|>assistant\n"), "{}", on.prompt);
    let off = render(&templates, &hello(), |input| input.enable_thinking = false).unwrap();
    assert!(off.prompt.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "{}", off.prompt);
    assert_eq!(render(&compile(template!("hermes")), &hello(), |_| ()).unwrap().format.thinking, None);
}

#[test]
fn what_the_assistant_began_goes_on() {
    let templates = compile(template!("qwen3"));
    let mut messages = hello();
    messages.push(json!({"role": "assistant", "content": "Well, I"}));
    let Rendered { prompt, format } =
        render(&templates, &messages, |input| input.continuation = Continuation::Auto).unwrap();
    assert!(prompt.ends_with("Well, I"), "{prompt}");
    let read = format.reader().unwrap().read(" think so.", false).unwrap();
    assert_eq!(read.content.trim_start(), "Well, I think so.");
}

#[test]
fn the_same_settings_have_one_format() {
    let templates = compile(template!("hermes"));
    let tools = weather();
    let with_tools = |messages: &[Value]| render(&templates, messages, |input| input.tools = &tools).unwrap().format;
    let first = with_tools(&hello());
    let second = with_tools(&[json!({"role": "user", "content": "Something else"})]);
    assert!(Arc::ptr_eq(&first, &second));
    assert!(!Arc::ptr_eq(&first, &render(&templates, &hello(), |_| ()).unwrap().format));
    assert_eq!(templates.kept.lock().unwrap().formats.len(), 2);
}

#[test]
fn what_is_kept_is_bounded() {
    let mut kept = Kept::default();
    let format = |bytes: usize| Arc::new(ChatFormat { parser: "x".repeat(bytes), ..ChatFormat::default() });
    kept.put("too large".to_owned(), format(KEPT_BYTES));
    assert!(kept.formats.is_empty());
    for number in 0..40 {
        kept.put(number.to_string(), format(KEPT_BYTES / 16));
    }
    assert!(kept.bytes <= KEPT_BYTES && kept.formats.len() == kept.order.len(), "{}", kept.bytes);
    assert!(kept.get("39").is_some() && kept.get("0").is_none());
}

#[test]
fn only_an_answer_without_marks_is_plain() {
    for (source, plain) in [
        (template!("chatml"), true),
        (template!("llama3"), true),
        (template!("hermes"), false),
        (template!("qwen3"), false),
        (template!("deepseek-r1"), false),
        (template!("functionary"), false),
    ] {
        assert_eq!(render(&compile(source), &hello(), |_| ()).unwrap().format.plain, plain, "{source}");
    }
}

#[test]
fn a_template_that_cannot_be_read_names_the_line() {
    let cases = [
        ("one\n{% if %}", 2),
        ("one\ntwo\n{% frobnicate %}\nthree\nfour", 3),
        ("x\n\n{% for m of messages %}\n{% endfor %}\n", 3),
        ("one\n{% for m in messages %}\n{{ m.content }}\n", 2),
        ("one\ntwo\n{{ 'unclosed }}\nthree", 3),
    ];
    for (source, expected) in cases {
        let error = ChatTemplates::compile(source, "", "").unwrap_err();
        let ChatError::Syntax { line, message } = &error else { panic!("{source}: {error:?}") };
        assert_eq!(*line, expected, "{source}: {error}");
        assert!(!message.is_empty() && error.to_string().starts_with("the chat template cannot be read: "), "{error}");
    }
}

#[test]
fn a_template_that_fails_names_the_line_and_its_own_words() {
    let refused = render(&compile("a\nb\n{{ raise_exception('No ' + messages[0].role + '!') }}"), &hello(), |_| ());
    // llama.cpp puts a system message before the first one of a user where the template knows none.
    assert_eq!(refused.unwrap_err(), ChatError::Raised { line: 3, message: "No user!".to_owned() });
    let failed = render(&compile("one\n\n{{ messages | nothing }}"), &hello(), |_| ()).unwrap_err();
    let ChatError::Failed { line: 3, message } = &failed else { panic!("{failed:?}") };
    assert!(message.contains("nothing"), "{message}");
    let twice = [
        json!({"role": "user", "content": "a"}),
        json!({"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]}),
    ];
    let error = render(&compile(template!("llama3")), &twice, |_| ()).unwrap_err().to_string();
    assert!(
        error.starts_with("the chat template refuses these messages: This model only supports single tool-calls"),
        "{error}"
    );
}

/// Each would take all of the memory, all of the stack, or for ever.
#[test]
fn hostile_templates_end() {
    let deep = |open: &str, middle: &str, close: &str| {
        format!("{{{{ {}{middle}{} }}}}", open.repeat(8_000), close.repeat(8_000))
    };
    let cases = [
        "{% for i in range(1000000000) %}x{% endfor %}".to_owned(),
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}".to_owned(),
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
            .to_owned(),
        "{{ 'x' * 10000000000 }}".to_owned(),
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}".to_owned(),
        deep("(", "1", ")"),
        deep("[", "", "]"),
        deep("not ", "x", ""),
        deep("a+", "a", ""),
        "{{ x".repeat(30_000),
    ];
    for source in cases {
        let started = std::time::Instant::now();
        let name = &source[..40.min(source.len())];
        let outcome =
            ChatTemplates::compile(&source, "", "").and_then(|templates| render(&templates, &hello(), |_| ()));
        // Some are only strange, and render.
        if let Err(error) = &outcome {
            let said = error.to_string();
            assert!(!said.is_empty() && said.len() < 8192, "{name}: {said}");
        }
        assert!(started.elapsed() < std::time::Duration::from_mins(2), "{name}: {:?}", started.elapsed());
    }
    let error = ChatTemplates::compile(&"x".repeat(MAX_TEMPLATE_BYTES + 1), "", "").unwrap_err();
    assert!(error.to_string().contains("more than 131072"), "{error}");
    let exhausted = render(&compile("{{ 'x' * 10000000000 }}"), &hello(), |_| ()).unwrap_err().to_string();
    assert!(exhausted.contains("it takes more than is allowed (line 1)"), "{exhausted}");
}

#[test]
fn an_output_that_nests_without_end_is_refused() {
    let templates = compile(template!("hermes"));
    let tools = weather();
    let format = render(&templates, &hello(), |input| input.tools = &tools).unwrap().format;
    let mut reader = format.reader().unwrap();
    let call = |nested: &str| format!("<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {{\"city\": {nested}");
    assert!(reader.read(&call(&"[".repeat(900)), true).is_ok());
    for depth in [1001, 1_000_000] {
        let error = reader.read(&call(&"[".repeat(depth)), true).unwrap_err();
        assert!(error.to_string().contains("more than 1000 open brackets"), "{error}");
    }
}

/// What a client sends may be as large as a body.
#[test]
fn a_conversation_as_large_as_a_body_is_rendered() {
    let text = "word ".repeat(400);
    let roles = ["user", "assistant"];
    let messages: Vec<_> = (0..4095).map(|at| json!({"role": roles[at % 2], "content": text})).collect();
    let prompt = prompt(template!("qwen3"), &messages);
    assert!(prompt.len() > 8_000_000, "{}", prompt.len());
}
