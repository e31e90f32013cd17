//! The APIs of others over the same model: Anthropic's and OpenAI's Responses.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_answered_in_anthropics_form() {
    let node = Node::start().await;
    let body = json!({"model": "toy-chat", "max_tokens": 100, "messages": [{"role": "user", "content": QUESTION}]});
    let answer = node.json(MESSAGES, &body).await;
    assert_eq!(
        (&answer["type"], &answer["role"], &answer["model"]),
        (&json!("message"), &json!("assistant"), &json!("toy-chat"))
    );
    assert_eq!(answer["content"], json!([{"type": "text", "text": ANSWER}]));
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("end_turn"), &Value::Null));
    let prompt = answer["usage"]["input_tokens"].as_u64().unwrap()
        + answer["usage"]["cache_read_input_tokens"].as_u64().unwrap();
    let counted = node.json("/v1/messages/count_tokens", &with(body.clone(), json!({"max_tokens": null}))).await;
    assert_eq!(counted, json!({"input_tokens": prompt}));

    let events = named_events(&node, MESSAGES, &with(body.clone(), json!({"stream": true}))).await;
    assert_eq!(events[0]["message"]["usage"]["input_tokens"], prompt);
    assert_eq!(events[1]["content_block"], json!({"type": "text", "text": ""}));
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(text, ANSWER);
    let end: Vec<_> = events[events.len() - 3..].iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(end, ["content_block_stop", "message_delta", "message_stop"]);
    assert_eq!(events[events.len() - 2]["usage"]["output_tokens"], answer["usage"]["output_tokens"]);

    let cut = node.json(MESSAGES, &with(body.clone(), json!({"max_tokens": 2}))).await;
    assert_eq!((&cut["stop_reason"], &cut["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(2)));
    for (more, status, kind) in [
        (json!({"model": "claude"}), 404, "not_found_error"),
        (json!({"max_tokens": null}), 400, "invalid_request_error"),
        (json!({"messages": "hi"}), 400, "invalid_request_error"),
    ] {
        let response = node.post(MESSAGES, &with(body.clone(), more)).await;
        assert_eq!(response.status(), status);
        let id = response.headers()["request-id"].to_str().unwrap().to_owned();
        assert_eq!(response.headers()["x-request-id"], id);
        let error: Value = response.json().await.unwrap();
        assert_eq!(
            (&error["type"], &error["error"]["type"], &error["request_id"]),
            (&json!("error"), &json!(kind), &json!(id))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_are_answered_without_state() {
    let node = Node::start().await;
    let body = json!({"model": "toy-chat", "input": QUESTION, "store": true});
    let answer = node.json(RESPONSES, &body).await;
    assert_eq!(
        (&answer["object"], &answer["status"], &answer["store"]),
        (&json!("response"), &json!("completed"), &json!(false))
    );
    assert_eq!(
        answer["output"][0]["content"],
        json!([{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}])
    );
    let usage = &answer["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap()
    );

    let items =
        json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}], "stream": true});
    let events = named_events(&node, RESPONSES, &with(body.clone(), items)).await;
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let text: String = deltas.filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(text, ANSWER);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let last = &events[events.len() - 1];
    assert_eq!(
        (&last["type"], &last["response"]["output"][0]["content"]),
        (&json!("response.completed"), &answer["output"][0]["content"])
    );

    let cut = node.json(RESPONSES, &with(body.clone(), json!({"max_output_tokens": 2}))).await;
    assert_eq!(
        (&cut["status"], &cut["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    let probable = with(
        body.clone(),
        json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 2}),
    );
    let probable = node.json(RESPONSES, &probable).await;
    let tokens = probable["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    assert_eq!((tokens.len(), tokens[0]["top_logprobs"].as_array().unwrap().len()), (2, 2));
    let refused = node.post(RESPONSES, &with(body, json!({"previous_response_id": "resp_1"}))).await;
    assert_eq!(refused.status(), 400);
    let error: Value = refused.json().await.unwrap();
    assert_eq!(
        (&error["error"]["param"], &error["error"]["code"]),
        (&json!("previous_response_id"), &json!("unsupported_parameter"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_the_form_that_was_asked_for() {
    let node = Node::start().await;
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["name", "legs"],
        "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "animal", "strict": true, "schema": schema}});
    let body = with(chat(QUESTION), json!({"response_format": format, "max_tokens": 200}));
    let is_animal = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
        assert!(
            value["name"].is_string() && value["legs"].is_u64() && value.as_object().unwrap().len() == 2,
            "{value}"
        );
    };
    let several = with(body.clone(), json!({"n": 3, "temperature": 1.5, "seed": 1}));
    let answer = node.json(CHAT, &several).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    for choice in choices {
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        is_animal(choice["message"]["content"].as_str().unwrap());
    }
    let events = node.events(CHAT, &with(body, json!({"stream": true}))).await;
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    is_animal(&text);

    let plain = |more: Value| with(json!({"prompt": "The answer is", "max_tokens": 40, "temperature": 1.0}), more);
    let said = async |more: Value| node.json(TEXT, &plain(more)).await["choices"][0].clone();
    let grammar = said(json!({"grammar": "root ::= \"yes\" | \"no\""})).await;
    assert!(
        ["yes", "no"].contains(&grammar["text"].as_str().unwrap()) && grammar["finish_reason"] == "stop",
        "{grammar}"
    );
    let date = said(json!({"json_schema": {"type": "string", "format": "date"}})).await;
    assert_eq!(date["text"].as_str().map(str::len), Some(12), "{date}");
    let any = said(json!({"response_format": {"type": "json_object"}})).await;
    assert!(any["text"].as_str().unwrap().starts_with('{'), "{any}");
    let never = said(json!({"logit_bias": [[" plain", false]], "temperature": 0, "n_probs": 2})).await;
    assert!(!never["text"].as_str().unwrap().contains(" plain") && never["logprobs"].is_object(), "{never}");
}
