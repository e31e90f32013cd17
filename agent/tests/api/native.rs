//! llama-server's own endpoints, on the real engine.

use altiplano_agent::front::Route;
use altiplano_test_models::Spec;
use serde_json::{Value, json};

use super::{ANSWER, CHAT, Node, QUESTION, chat, with};

async fn get(node: &Node, path: &str) -> (u16, Value) {
    let response = node.client.get(format!("{}{path}", node.url)).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn refused(node: &Node, path: &str, body: &Value) -> Value {
    let response = node.post(path, body).await;
    assert_eq!(response.status(), 400, "{path} {body}");
    response.json::<Value>().await.unwrap()["error"].clone()
}

/// The objects of a stream of llama-server's own: the last one says so, there is no `[DONE]`.
async fn stream(node: &Node, path: &str, body: &Value) -> Vec<Value> {
    let response = node.post(path, &with(body.clone(), json!({"stream": true}))).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["content-type"]),
        (200, &"text/event-stream".parse().unwrap())
    );
    let text = response.text().await.unwrap();
    text.split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

fn prompt() -> String {
    format!("<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_there_and_back() {
    let node = Node::start().await;
    let tokens = node.json("/tokenize", &json!({"content": prompt()})).await;
    assert_eq!(tokens["tokens"], json!(node.engine.tokenize(&prompt(), false, true).unwrap()));
    assert_eq!(node.json("/detokenize", &tokens).await, json!({"content": prompt()}), "control tokens too");
    let literal = node.json("/tokenize", &json!({"content": prompt(), "parse_special": false})).await;
    assert!(literal["tokens"].as_array().unwrap().len() > tokens["tokens"].as_array().unwrap().len());
    assert_eq!(node.json("/tokenize", &json!({})).await, json!({"tokens": []}));

    let pieces = node.json("/tokenize", &json!({"content": "llama ☃", "with_pieces": true})).await;
    let mut bytes = Vec::new();
    for token in pieces["tokens"].as_array().unwrap() {
        assert!(token["id"].is_u64(), "{token}");
        match &token["piece"] {
            Value::String(text) => bytes.extend_from_slice(text.as_bytes()),
            Value::Array(numbers) => {
                bytes.extend(numbers.iter().map(|byte| u8::try_from(byte.as_u64().unwrap()).unwrap()));
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), "llama ☃");
    for (path, body, param) in [
        ("/tokenize", json!({"content": 5}), "content"),
        ("/tokenize", json!({"content": "x", "with_pieces": 1}), "with_pieces"),
        ("/detokenize", json!({"tokens": ["x"]}), "tokens[…]"),
        ("/detokenize", json!({"tokens": [99_999_999]}), "tokens"),
        ("/apply-template", json!({}), "messages"),
    ] {
        assert_eq!(refused(&node, path, &body).await["param"], param, "{path}");
    }
    let messages = json!({"messages": [{"role": "user", "content": QUESTION}]});
    assert_eq!(node.json("/apply-template", &messages).await["prompt"].as_str().unwrap(), prompt());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_is_llama_servers() {
    let node = Node::start().await;
    let ask = async |more: Value| node.json("/completion", &with(json!({"prompt": prompt()}), more)).await;
    let whole = ask(json!({"return_tokens": true, "n_probs": 2})).await;
    assert_eq!(whole["content"], ANSWER);
    assert_eq!(
        (&whole["stop"], &whole["stop_type"], &whole["stopping_word"]),
        (&json!(true), &json!("eos"), &json!(""))
    );
    let tokens = whole["tokens"].as_array().unwrap();
    assert_eq!(node.json("/detokenize", &json!({"tokens": tokens})).await["content"], ANSWER, "every token");
    assert_eq!(whole["tokens_predicted"], tokens.len() + 1, "the end counts");
    assert_eq!(whole["tokens_evaluated"], node.engine.tokenize(&prompt(), true, true).unwrap().len());
    assert_eq!(whole["prompt"], prompt());
    assert_eq!(whole["generation_settings"]["temperature"], 0.0);
    let probabilities = whole["completion_probabilities"].as_array().unwrap();
    assert_eq!(probabilities.len(), tokens.len());
    for (probability, token) in probabilities.iter().zip(tokens) {
        assert_eq!(
            (&probability["id"], &probability["top_logprobs"][0]["id"]),
            (token, token),
            "greedy takes the best"
        );
    }

    let word = ask(json!({"stop": ["never", " the altiplano"]})).await;
    assert_eq!((&word["stop_type"], &word["stopping_word"]), (&json!("word"), &json!(" the altiplano")));
    let limit = ask(json!({"n_predict": 3})).await;
    assert_eq!(
        (&limit["stop_type"], &limit["tokens_predicted"], &limit["tokens"]),
        (&json!("limit"), &json!(3), &json!([]))
    );
    let nothing = ask(json!({"n_predict": 0})).await;
    assert_eq!((&nothing["content"], &nothing["tokens_predicted"]), (&json!(""), &json!(0)));
    let first = &tokens[0];
    let banned = ask(json!({"logit_bias": [[first, false]], "n_predict": 4, "return_tokens": true})).await;
    assert_ne!(&banned["tokens"][0], first);

    let control = node.engine.tokenize("<|im_start|>", false, true).unwrap()[0];
    let mixed = json!([control, format!("user\n{QUESTION}"), "<|im_end|>\n<|im_start|>assistant\n"]);
    assert_eq!(node.json("/completion", &json!({"prompt": mixed})).await["content"], ANSWER);
    let several = node.json("/completion", &json!({"prompt": [prompt(), prompt()], "n_cmpl": 2, "n_predict": 2})).await;
    let indices: Vec<_> = several.as_array().unwrap().iter().map(|answer| answer["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);

    let streamed = stream(&node, "/completion", &json!({"prompt": prompt(), "return_progress": true})).await;
    let (last, pieces) = streamed.split_last().unwrap();
    assert_eq!((&last["stop"], &last["content"], &last["stop_type"]), (&json!(true), &json!(""), &json!("eos")));
    assert_eq!(last["tokens_predicted"], whole["tokens_predicted"]);
    let text: String = pieces.iter().map(|piece| piece["content"].as_str().unwrap()).collect();
    assert_eq!(text, ANSWER);
    let ids: Vec<&Value> = pieces.iter().flat_map(|piece| piece["tokens"].as_array().unwrap()).collect();
    assert_eq!(ids, tokens.iter().collect::<Vec<_>>());
    let progress = &pieces[0]["prompt_progress"];
    assert_eq!((&progress["total"], &progress["processed"]), (&whole["tokens_evaluated"], &whole["tokens_evaluated"]));

    for (body, param) in [
        (json!({}), "prompt"),
        (json!({"prompt": {"prompt_string": "x", "multimodal_data": ["AAAA"]}}), "prompt.multimodal_data"),
        (json!({"prompt": [99_999_999]}), "prompt"),
        (json!({"prompt": "x", "n_probs": 99}), "n_probs"),
    ] {
        assert_eq!(refused(&node, "/completion", &body).await["param"], param, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_tells_how_far_its_prompt_is() {
    let node = Node::start().await;
    let long = "the llama and the alpaca of the altiplano ".repeat(60);
    let asked = with(chat(&long), json!({"stream": true, "return_progress": true, "max_tokens": 2}));
    let chunks = node.events(CHAT, &asked).await;
    let progress: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk.get("prompt_progress")).collect();
    let last = progress.last().unwrap();
    assert!(last["total"].as_u64().unwrap() > 100 && last["processed"] == last["total"], "{last}");
    assert!(last["time_ms"].is_u64() && last["cache"].is_u64(), "{last}");
    let without = node.events(CHAT, &with(chat(QUESTION), json!({"stream": true}))).await;
    assert!(without.iter().all(|chunk| chunk.get("prompt_progress").is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn infilling_is_for_models_that_can() {
    let toy = Node::start().await;
    let body = json!({"input_prefix": "def f(a):\n", "input_suffix": "    return b\n", "n_predict": 8});
    let error = refused(&toy, "/infill", &body).await;
    assert_eq!((&error["param"], &error["code"]), (&json!("input_prefix"), &json!("unsupported_parameter")));
    assert!(error["message"].as_str().unwrap().contains("infilling"), "{error}");
    assert_eq!(toy.post("/api/generate", &json!({"prompt": "a", "suffix": "b"})).await.status(), 400);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("infill.gguf");
    Spec { infill: true, ..Spec::default() }.write(&path).unwrap();
    let node = Node::start_with(|config| config.model_path = path).await;
    let text = |text: &str| node.engine.tokenize(text, false, false).unwrap();
    let (before, after) = (text("def f(a):\n"), text("    return b\n"));
    let expected = [vec![300], before, vec![301], after, vec![302], text("    b")].concat();
    let answer = node.json("/infill", &with(body, json!({"prompt": "    b", "return_tokens": true}))).await;
    assert_eq!(answer["tokens_evaluated"], expected.len());
    let same = node.json("/completion", &json!({"prompt": expected, "n_predict": 8, "return_tokens": true})).await;
    assert_eq!((&answer["tokens"], &answer["prompt"]), (&same["tokens"], &same["prompt"]), "this is the prompt");
    let ollama =
        json!({"prompt": "def f(a):\n", "suffix": "    return b\n", "stream": false, "options": {"num_predict": 8}});
    let ollama = node.json("/api/generate", &ollama).await;
    assert_eq!((&ollama["done_reason"], &ollama["eval_count"]), (&json!("length"), &json!(8)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_worker_says_of_itself() {
    let node = Node::start().await;
    let (status, props) = get(&node, "/props").await;
    assert_eq!((status, &props["total_slots"], &props["is_sleeping"]), (200, &json!(4), &json!(false)));
    assert!(props["chat_template"].as_str().unwrap().contains("im_start"));
    assert_eq!(props["model_path"], "altiplano-toy.gguf", "the name alone");
    assert_eq!(props["default_generation_settings"]["n_ctx"], 1024);
    assert_eq!(props["default_generation_settings"]["params"]["temperature"], 0.0);
    let (_, slots) = get(&node, "/slots?fail_on_no_slot=1").await;
    assert_eq!(slots.as_array().unwrap().len(), 4);
    for path in ["/health", "/v1/health"] {
        assert_eq!(get(&node, path).await, (200, json!({"status": "ok", "state": "Ready"})));
    }
    let (_, models) = get(&node, "/v1/models").await;
    let meta = &models["data"][0]["meta"];
    for name in ["n_ctx_train", "n_params", "size", "n_vocab", "n_embd", "vocab_type", "n_ctx"] {
        assert!(meta[name].as_u64().unwrap() > 0, "{name}: {meta}");
    }
    assert_eq!(get(&node, "/v1/models/toy-chat:latest").await.1["id"], "toy-chat");

    // Asking does not wake.
    let mut wakes = node.front.wakes().unwrap();
    node.front.route("uid", Route::Unloaded);
    assert_eq!(get(&node, "/props").await, (200, json!({"model_alias": "toy-chat", "is_sleeping": true})));
    assert_eq!(get(&node, "/slots").await.0, 503);
    assert_eq!(get(&node, "/health").await.1["status"], "ok", "a request would be accepted");
    node.front.route("uid", Route::Loading);
    let (status, health) = get(&node, "/health").await;
    let expected = json!({"code": 503, "message": "Loading model", "type": "unavailable_error"});
    assert_eq!((status, &health["error"]), (503, &expected));
    assert!(wakes.try_recv().is_err());
}
