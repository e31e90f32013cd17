//! Prompts that are longer than the context of a request: what goes, and that every API says so.

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::{Value, json};

use super::{ANSWER, CHAT, MESSAGES, Node, QUESTION, RESPONSES, TEXT, named_events, with};

/// Tokens that one request may use.
const LIMIT: u64 = 256;

const MARK: &str = "[... cut ...]";

async fn node(policy: OverflowPolicy) -> Node {
    Node::start_with(|config| {
        config.context.max_tokens = Some(256);
        config.context.min_tokens = Some(256);
        config.context.overflow = policy;
    })
    .await
}

/// A system message, many turns, and a question.
fn conversation() -> Vec<Value> {
    let mut messages = vec![json!({"role": "system", "content": "You are a helpful assistant."})];
    for turn in 0..20 {
        messages.push(json!({"role": "user", "content": format!("What is {turn} plus {turn}?")}));
        messages.push(json!({"role": "assistant", "content": format!("{turn} plus {turn} is {}.", 2 * turn)}));
    }
    messages.push(json!({"role": "user", "content": QUESTION}));
    messages
}

/// One message that is too long for itself.
fn essay() -> String {
    let words: Vec<String> = (0..200).map(|number| format!("llama{number}")).collect();
    format!("Begin {} end", words.join(" "))
}

fn chat(messages: impl Into<Value>, overflow: Option<&str>) -> Value {
    let mut body = json!({"model": "toy-chat", "messages": messages.into(), "max_tokens": 40});
    if let Some(overflow) = overflow {
        body["altiplano"] = json!({"overflow": overflow});
    }
    body
}

/// An answer that declares a truncation, in the header too.
async fn cut(node: &Node, path: &str, body: &Value) -> (Value, Value) {
    let response = node.post(path, body).await;
    let status = response.status();
    let header = response.headers().get("x-altiplano-truncated-tokens").cloned();
    let answer: Value = response.json().await.unwrap();
    assert_eq!(status, 200, "{path}: {answer}");
    let truncation = answer["altiplano"]["truncation"].clone();
    check(&truncation, header.as_ref());
    (answer, truncation)
}

fn check(truncation: &Value, header: Option<&http::HeaderValue>) {
    let number = |field: &str| truncation[field].as_u64().unwrap_or_else(|| panic!("{field} of {truncation}"));
    assert_eq!(number("limit"), LIMIT);
    assert!(number("tokens_before") >= LIMIT && number("tokens_after") < LIMIT, "{truncation}");
    let gone = (number("tokens_before") - number("tokens_after")).to_string();
    assert_eq!(header.unwrap().to_str().unwrap(), gone);
}

async fn refused(node: &Node, path: &str, body: &Value) -> String {
    let response = node.post(path, body).await;
    assert_eq!(response.status(), 400);
    assert!(response.headers().get("x-altiplano-truncated-tokens").is_none());
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["code"], "context_length_exceeded", "{error}");
    error["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_unless_somebody_says_so() {
    let node = node(OverflowPolicy::Reject).await;
    let message = refused(&node, CHAT, &chat(conversation(), None)).await;
    let tokens = node.json("/v1/messages/count_tokens", &json!({"messages": conversation()})).await;
    for number in [tokens["input_tokens"].to_string(), LIMIT.to_string()] {
        assert!(message.contains(&number), "{message} has no {number}");
    }
    // What fits has nothing to declare, whatever the policy.
    let short = chat([json!({"role": "user", "content": QUESTION})], Some("DropOldest"));
    let answer = node.json(CHAT, &short).await;
    assert_eq!(answer["choices"][0]["message"]["content"], ANSWER);
    assert!(answer.get("altiplano").is_none());
    let wrong = node.post(CHAT, &chat(conversation(), Some("DropNewest"))).await;
    let error: Value = wrong.json().await.unwrap();
    assert_eq!(error["error"]["param"], "altiplano.overflow");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_messages_go() {
    let node = node(OverflowPolicy::DropOldest).await;
    let (answer, truncation) = cut(&node, CHAT, &chat(conversation(), None)).await;
    assert_eq!(truncation["policy"], "DropOldest");
    assert_eq!(answer["usage"]["prompt_tokens"], truncation["tokens_after"]);
    let dropped = truncation["dropped_messages"].as_u64().unwrap();
    assert!(dropped > 10 && dropped.is_multiple_of(2), "whole turns: {truncation}");
    // What is left is what a client gets that leaves out the same.
    let mut left = conversation();
    left.drain(1..=usize::try_from(dropped).unwrap());
    let same = node.json(CHAT, &chat(left, None)).await;
    assert!(same.get("altiplano").is_none());
    assert_eq!(same["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens"]);
    assert_eq!(same["choices"][0]["message"], answer["choices"][0]["message"]);
    // The next turn begins like this one.
    let mut next = conversation();
    next.push(json!({"role": "assistant", "content": "Much."}));
    next.push(json!({"role": "user", "content": "Say hello in Spanish."}));
    let (next, _) = cut(&node, CHAT, &chat(next, None)).await;
    assert!(next["timings"]["cache_n"].as_u64().unwrap() > 20, "{}", next["timings"]);

    // A request may say otherwise, and a question that is too long by itself has nothing before it that could go.
    refused(&node, CHAT, &chat(conversation(), Some("Reject"))).await;
    refused(&node, CHAT, &chat([json!({"role": "user", "content": essay()})], None)).await;

    let streamed = with(chat(conversation(), None), json!({"stream": true}));
    let response = node.post(CHAT, &streamed).await;
    let header = response.headers().get("x-altiplano-truncated-tokens").cloned();
    let text = response.text().await.unwrap();
    let chunks: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: {")).collect();
    let (last, others) = chunks.split_last().unwrap();
    assert!(others.iter().all(|chunk| !chunk.contains("altiplano\":")));
    let last: Value = serde_json::from_str(&format!("{{{last}")).unwrap();
    check(&last["altiplano"]["truncation"], header.as_ref());
    let usage = with(streamed, json!({"stream_options": {"include_usage": true}}));
    let chunks = node.events(CHAT, &usage).await;
    assert_eq!(chunks.last().unwrap()["altiplano"], last["altiplano"]);

    let url = format!("http://{}/metrics", node.front.address());
    let metrics = node.client.get(url).send().await.unwrap().text().await.unwrap();
    let series = |policy| {
        format!("altiplano_context_truncations_total{{model_name=\"toy\",namespace=\"ml\",policy=\"{policy}\"}}")
    };
    let count =
        |policy| metrics.lines().find_map(|line| line.strip_prefix(&series(policy)).map(str::trim)).unwrap().to_owned();
    assert_eq!((count("DropOldest").as_str(), count("DropMiddle").as_str()), ("4", "0"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_middle_goes() {
    let node = node(OverflowPolicy::DropMiddle).await;
    let (answer, truncation) = cut(&node, CHAT, &chat([json!({"role": "user", "content": essay()})], None)).await;
    assert_eq!((&truncation["policy"], &truncation["dropped_messages"]), (&json!("DropMiddle"), &json!(0)));
    assert_eq!(answer["usage"]["prompt_tokens"], truncation["tokens_after"]);
    let (_, truncation) = cut(&node, CHAT, &chat(conversation(), None)).await;
    assert!(truncation["dropped_messages"].as_u64().unwrap() > 10, "{truncation}");

    // Of a text as of tokens; of two prompts the sums are told.
    let body = json!({"prompt": essay(), "echo": true, "max_tokens": 4});
    let (answer, one) = cut(&node, TEXT, &body).await;
    let text = answer["choices"][0]["text"].as_str().unwrap();
    let (head, tail) = text.split_once(MARK).unwrap_or_else(|| panic!("{text}"));
    assert!(head.starts_with("Begin llama0 ") && tail.contains("llama199 end"), "{text}");
    let tokens = node.engine.tokenize(&essay(), true, true).unwrap();
    assert_eq!(one["tokens_before"], tokens.len());
    let (_, of_tokens) = cut(&node, TEXT, &with(body.clone(), json!({"prompt": tokens}))).await;
    assert_eq!(of_tokens, one);
    let two = node.json(TEXT, &with(body.clone(), json!({"prompt": [essay(), "short", essay()]}))).await;
    assert_eq!(two["altiplano"]["truncation"]["tokens_before"], 2 * tokens.len());

    let oldest = with(body, json!({"altiplano": {"overflow": "DropOldest"}}));
    let (answer, _) = cut(&node, TEXT, &oldest).await;
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.contains("llama199 end") && !text.contains("Begin") && !text.contains(MARK), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_api_says_what_went() {
    let node = node(OverflowPolicy::Reject).await;
    let ours = json!({"altiplano": {"overflow": "DropOldest"}});
    let (_, expected) = cut(&node, CHAT, &chat(conversation(), Some("DropOldest"))).await;

    let items: Vec<Value> = conversation();
    let body = json!({"input": items, "truncation": "auto", "max_output_tokens": 40});
    let (answer, truncation) = cut(&node, RESPONSES, &body).await;
    assert_eq!((&truncation, &answer["truncation"]), (&expected, &json!("auto")));
    let events = named_events(&node, RESPONSES, &with(body.clone(), json!({"stream": true}))).await;
    for event in [&events[0], events.last().unwrap()] {
        assert_eq!(event["response"]["altiplano"]["truncation"], expected, "{event}");
    }
    refused(&node, RESPONSES, &with(body.clone(), json!({"truncation": null}))).await;
    let fits = node.json(RESPONSES, &json!({"input": QUESTION, "truncation": "disabled"})).await;
    assert_eq!(fits["truncation"], "disabled");

    let body = with(json!({"messages": conversation(), "max_tokens": 40}), ours.clone());
    let (_, truncation) = cut(&node, MESSAGES, &body).await;
    assert_eq!(truncation, expected);
    let events = named_events(&node, MESSAGES, &with(body.clone(), json!({"stream": true}))).await;
    assert_eq!(events[0]["message"]["altiplano"]["truncation"], expected);
    let counted = node.json("/v1/messages/count_tokens", &body).await;
    assert_eq!(counted["input_tokens"], expected["tokens_before"], "what is counted is not cut");

    let options = json!({"options": {"num_predict": 40}, "stream": false, "truncate": true});
    let (_, truncation) = cut(&node, "/api/chat", &with(json!({"messages": conversation()}), options.clone())).await;
    assert_eq!(truncation, expected);
    let (_, truncation) = cut(&node, "/api/generate", &with(json!({"prompt": essay(), "raw": true}), options)).await;
    assert_eq!(truncation["policy"], "DropOldest");
    let lines = json!({"messages": conversation(), "options": {"num_predict": 4}, "truncate": true});
    let text = node.post("/api/chat", &lines).await.text().await.unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(last["altiplano"]["truncation"].is_object() && last["done"] == true, "{last}");
    let never = with(lines, json!({"truncate": false}));
    assert_eq!(node.post("/api/chat", &never).await.status(), 400);

    let (answer, truncation) = cut(&node, "/completion", &with(json!({"prompt": essay(), "n_predict": 4}), ours)).await;
    assert_eq!((&answer["truncated"], &truncation["policy"]), (&json!(true), &json!("DropOldest")));
}
