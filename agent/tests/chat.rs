//! Chat on real llama.cpp: templates, tools, reasoning and structured answers. The toy model has never seen a tool: what it
//! calls, it calls because the grammar leaves it nothing else.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use altiplano_agent::api::{ApiOptions, ApiState, router};
use altiplano_agent::engine::Engine;
use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_crds::model_deployment::ContextSpec;
use altiplano_test_models::toy;
use axum::Router;
use axum::body::Body;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

/// Longest wait for an answer; what is usual here is a hundredth of it.
const PATIENCE: Duration = Duration::from_mins(2);

const HERMES: &str = include_str!("templates/hermes.jinja");
const DEEPSEEK: &str = include_str!("templates/deepseek-r1.jinja");
const QWEN3: &str = include_str!("templates/qwen3.jinja");
const MISTRAL: &str = include_str!("templates/mistral.jinja");

/// The API of the toy model, with this template instead of its own.
async fn api(chat_template: Option<&str>) -> Router {
    let context = ContextSpec { min_tokens: Some(4096), max_tokens: Some(4096), parallel: 2, ..ContextSpec::default() };
    let config = RunnerConfig {
        namespace: "ml".into(),
        name: "toy".into(),
        served_name: "toy".into(),
        model_path: toy::path(),
        chat_template: chat_template.map(str::to_owned),
        context,
        threads: 2,
        ..RunnerConfig::default()
    };
    let engine = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || Engine::start(&config, &|_| {}).unwrap()).await.unwrap()
    };
    router(ApiState::new(engine, &config, ApiOptions::default()).unwrap())
}

async fn post(api: &Router, body: &Value) -> (StatusCode, String) {
    let request = Request::post("/v1/chat/completions").header("content-type", "application/json");
    let request = request.body(Body::from(body.to_string())).unwrap();
    let answer = async {
        let response = api.clone().oneshot(request).await.unwrap();
        let status = response.status();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    };
    let (status, bytes) = tokio::time::timeout(PATIENCE, answer).await.unwrap();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

/// The choice of a whole answer.
async fn ask(api: &Router, body: &Value) -> Value {
    let (status, text) = post(api, body).await;
    assert_eq!(status, 200, "{text}");
    serde_json::from_str::<Value>(&text).unwrap()["choices"][0].take()
}

/// The same from a stream, put together as OpenAI's clients do.
async fn ask_streamed(api: &Router, body: &Value) -> Value {
    let mut body = body.clone();
    body["stream"] = true.into();
    let (status, text) = post(api, &body).await;
    assert_eq!(status, 200, "{text}");
    let mut events: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(events.pop(), Some("[DONE]"), "{text}");
    let mut message = json!({"content": "", "reasoning_content": ""});
    let mut calls: Vec<Value> = Vec::new();
    let mut finish = Value::Null;
    for event in events {
        let event: Value = serde_json::from_str(event).unwrap();
        let choice = &event["choices"][0];
        for field in ["content", "reasoning_content"] {
            if let Some(more) = choice["delta"][field].as_str() {
                message[field] = format!("{}{more}", message[field].as_str().unwrap()).into();
            }
        }
        for piece in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = usize::try_from(piece["index"].as_u64().unwrap()).unwrap();
            if index == calls.len() {
                assert!(piece["id"].is_string() && piece["type"] == "function", "{piece}");
                calls.push(piece.clone());
                continue;
            }
            let said = calls[index]["function"]["arguments"].as_str().unwrap();
            calls[index]["function"]["arguments"] =
                format!("{said}{}", piece["function"]["arguments"].as_str().unwrap()).into();
        }
        if choice["finish_reason"].is_string() {
            assert!(finish.is_null(), "{text}");
            finish = choice["finish_reason"].clone();
        }
    }
    message["tool_calls"] = calls.into();
    json!({"message": message, "finish_reason": finish})
}

fn weather_schema() -> Value {
    json!({"type": "object", "additionalProperties": false, "required": ["city", "days", "exact"], "properties": {
        "city": {"type": "string", "enum": ["Paris", "La Paz", "Lima"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "exact": {"type": "boolean"},
    }})
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": weather_schema()}},
        {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
    ])
}

fn question(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// Each call is one of a tool that was offered, with arguments that its schema allows.
fn check_calls(choice: &Value, names: &[&str]) {
    let calls = choice["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("no calls: {choice}"));
    assert_eq!((calls.len(), &choice["finish_reason"]), (1, &json!("tool_calls")), "{choice}");
    let schema = jsonschema::validator_for(&weather_schema()).unwrap();
    for call in calls {
        assert!(call["id"].as_str().is_some_and(|id| id.len() >= 9), "{choice}");
        assert_eq!(call["type"], "function");
        let name = call["function"]["name"].as_str().unwrap();
        assert!(names.contains(&name), "{choice}");
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        if name == "get_weather" {
            assert!(schema.is_valid(&arguments), "{choice}");
        } else {
            assert_eq!(arguments, json!({}), "{choice}");
        }
    }
}

#[tokio::test]
async fn a_model_that_must_call_a_tool_calls_one() {
    for template in [HERMES, MISTRAL] {
        let api = api(Some(template)).await;
        for seed in 0..4 {
            let mut body = json!({
                "messages": question("Weather?"), "tools": tools(), "tool_choice": "required", "seed": seed,
                "temperature": 1.5, "top_k": 0, "min_p": 0, "max_tokens": 400, "parallel_tool_calls": false,
            });
            check_calls(&ask(&api, &body).await, &["get_weather", "get_time"]);
            check_calls(&ask_streamed(&api, &body).await, &["get_weather", "get_time"]);
            body["tool_choice"] = json!({"type": "function", "function": {"name": "get_weather"}});
            check_calls(&ask(&api, &body).await, &["get_weather"]);
            check_calls(&ask_streamed(&api, &body).await, &["get_weather"]);
        }
    }
}

#[tokio::test]
async fn a_model_that_may_call_a_tool_answers_as_it_likes() {
    let api = api(Some(HERMES)).await;
    for choice in ["auto", "none"] {
        let body = json!({
            "messages": question("What can you do?"), "tools": tools(), "tool_choice": choice, "max_tokens": 40,
            "temperature": 0,
        });
        let whole = ask(&api, &body).await;
        let streamed = ask_streamed(&api, &body).await;
        assert_eq!(whole["message"]["content"], streamed["message"]["content"], "{choice}");
        assert!(whole["message"]["content"].as_str().is_some_and(|content| !content.is_empty()), "{whole}");
        assert_eq!(whole["finish_reason"], streamed["finish_reason"]);
    }
}

#[tokio::test]
async fn a_conversation_with_calls_and_their_results_is_understood() {
    let api = api(Some(HERMES)).await;
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}});
    let body = json!({
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Noon."},
        ],
        "tools": tools(), "max_tokens": 8,
    });
    assert!(ask(&api, &body).await["message"]["content"].is_string());
}

#[tokio::test]
async fn answers_have_the_form_that_was_asked_for() {
    for template in [None, Some(HERMES)] {
        let api = api(template).await;
        let schema = jsonschema::validator_for(&weather_schema()).unwrap();
        for seed in 0..3 {
            let body = json!({
                "messages": question("Weather?"), "seed": seed, "temperature": 1.5, "max_tokens": 300,
                "response_format": {"type": "json_schema", "json_schema": {"name": "weather", "schema": weather_schema()}},
            });
            for choice in [ask(&api, &body).await, ask_streamed(&api, &body).await] {
                assert_eq!(choice["finish_reason"], "stop", "{choice}");
                let content: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
                assert!(schema.is_valid(&content), "{choice}");
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_was_begun_goes_on() {
    let api = api(None).await;
    let known = toy::questions().into_iter().find(|known| known.messages.len() == 1).unwrap();
    let asked = &known.messages[0].content;
    let middle = known.answer.char_indices().nth(known.answer.chars().count() / 2).unwrap().0;
    // Between words, where a tokenizer would part it too.
    let middle = known.answer[..middle].rfind(' ').unwrap();
    let body = json!({
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": &known.answer[..middle]}],
        "temperature": 0, "max_tokens": 100,
    });
    for choice in [ask(&api, &body).await, ask_streamed(&api, &body).await] {
        assert_eq!(choice["message"]["content"], known.answer[middle..], "{choice}");
    }
}

#[tokio::test]
async fn what_a_template_cannot_is_said() {
    let hello = question("Hi");
    // The template; what is sent; the field at fault; what the message says.
    let cases = [
        (None, json!({"messages": hello, "tools": tools()}), "tools", "no place for tools"),
        (
            Some("{{- raise_exception('Only ' + messages[0].role + 's may not speak!') -}}"),
            json!({"messages": hello}),
            "messages",
            "Only users may not speak! (line 1)",
        ),
        (Some("one\n{% if %}"), json!({"messages": hello}), "messages", "cannot be read"),
        (Some("a\n{{ 'x' * 10000000000 }}"), json!({"messages": hello}), "messages", "more than is allowed (line 2)"),
    ];
    for (template, body, param, says) in cases {
        let (status, text) = post(&api(template).await, &body).await;
        let error = serde_json::from_str::<Value>(&text).unwrap()["error"].take();
        assert_eq!((status.as_u16(), &error["param"]), (400, &json!(param)), "{text}");
        assert!(error["message"].as_str().unwrap().contains(says), "{text}");
    }
    // Without tools that may be called the same template is as good as before.
    let body = json!({"messages": hello, "tools": tools(), "tool_choice": "none", "max_tokens": 4});
    assert!(ask(&api(None).await, &body).await["message"]["content"].is_string());
}

#[tokio::test]
async fn variables_reach_the_template() {
    let api = api(Some(QWEN3)).await;
    let prompt_tokens = |extra: Value| {
        let mut body = json!({"messages": question("Hi"), "max_tokens": 1});
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        let api = api.clone();
        async move {
            let (status, text) = post(&api, &body).await;
            assert_eq!(status, 200, "{text}");
            serde_json::from_str::<Value>(&text).unwrap()["usage"]["prompt_tokens"].as_u64().unwrap()
        }
    };
    let thinking = prompt_tokens(json!({})).await;
    for off in [
        json!({"enable_thinking": false}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
        json!({"reasoning_effort": "none"}),
        json!({"reasoning_budget": 0}),
    ] {
        assert!(prompt_tokens(off.clone()).await > thinking, "{off}");
    }
}

#[tokio::test]
async fn reasoning_ends_when_its_budget_does() {
    // The first template has the model think from its first token, as DeepSeek's; the second leaves it the choice.
    for (template, begins) in [(DEEPSEEK, true), (QWEN3, false)] {
        let api = api(Some(template)).await;
        let body = |more: Value| {
            let mut body = json!({"messages": question("What can you do?"), "temperature": 0, "max_tokens": 60});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            body
        };
        let free = ask(&api, &body(json!({}))).await;
        for budget in ["reasoning_budget", "thinking_budget_tokens", "reasoning_budget_tokens"] {
            let asked = body(json!({budget: 5, "reasoning_budget_message": " Enough."}));
            for choice in [ask(&api, &asked).await, ask_streamed(&api, &asked).await] {
                let message = &choice["message"];
                let reasoning = message["reasoning_content"].as_str().unwrap_or_default();
                if begins {
                    // The toy never ends to think by itself.
                    assert!(free["message"]["reasoning_content"].as_str().unwrap().len() > reasoning.len(), "{free}");
                    assert!(reasoning.ends_with(" Enough."), "{choice}");
                    assert!(message["content"].as_str().is_some_and(|content| !content.is_empty()), "{choice}");
                } else {
                    assert_eq!(message["content"], free["message"]["content"], "it never thought");
                }
            }
        }
        for off in [json!({"reasoning_budget": 0}), json!({"enable_thinking": false})] {
            let none = ask(&api, &body(off)).await;
            assert!(none["message"]["reasoning_content"].as_str().unwrap_or_default().is_empty(), "{none}");
            assert!(none["message"]["content"].as_str().is_some_and(|content| !content.is_empty()), "{none}");
        }
    }
}

#[tokio::test]
async fn messages_think_within_their_budget() {
    let api = api(Some(DEEPSEEK)).await;
    let body = json!({
        "max_tokens": 60, "messages": question("What can you do?"), "temperature": 0,
        "thinking": {"type": "enabled", "budget_tokens": 4},
    });
    let request = Request::post("/v1/messages").header("content-type", "application/json");
    let response = api.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    let answer: Value = serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
    let kinds: Vec<_> = answer["content"].as_array().unwrap().iter().map(|block| &block["type"]).collect();
    assert_eq!(kinds, ["thinking", "text"], "{answer}");
    let thought = answer["content"][0]["thinking"].as_str().unwrap();
    assert!(!thought.is_empty() && thought.split_whitespace().count() <= 4, "{answer}");
}
