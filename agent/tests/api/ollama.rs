//! Ollama's API over HTTP, on the real engine. The official client is in `tests/clients/ollama_chat.py`.

use std::time::Duration;

use altiplano_agent::front::{KeepAlive, ModelCard, Route};
use altiplano_crds::model_deployment::ContextSpec;
use altiplano_test_models::Spec;
use serde_json::{Value, json};

use super::{ANSWER, Node, QUESTION, with};

fn ask() -> Value {
    json!({"model": "toy-chat:latest", "messages": [{"role": "user", "content": QUESTION}]})
}

async fn lines(node: &Node, path: &str, body: &Value) -> Vec<Value> {
    let response = node.post(path, body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let text = response.text().await.unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn error(node: &Node, path: &str, body: &Value) -> (u16, String) {
    let response = node.post(path, body).await;
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
    (status, body["error"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_in_lines_and_whole() {
    let node = Node::start().await;
    let whole = node.json("/api/chat", &with(ask(), json!({"stream": false}))).await;
    assert_eq!(whole["message"], json!({"role": "assistant", "content": ANSWER}));
    assert_eq!((&whole["model"], &whole["done_reason"]), (&json!("toy-chat:latest"), &json!("stop")));
    for figure in ["total_duration", "prompt_eval_duration", "eval_duration", "prompt_eval_count", "eval_count"] {
        assert!(whole[figure].as_u64().unwrap() > 0, "{figure}: {whole}");
    }
    let total = whole["total_duration"].as_u64().unwrap();
    let parts = ["prompt_eval_duration", "eval_duration", "load_duration"].map(|part| whole[part].as_u64().unwrap());
    assert!(total >= parts.iter().sum::<u64>(), "{whole}");

    let streamed = lines(&node, "/api/chat", &ask()).await;
    let (last, pieces) = streamed.split_last().unwrap();
    let text: String = pieces.iter().map(|piece| piece["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(text, ANSWER);
    assert!(pieces.len() > 3 && pieces.iter().all(|piece| piece["done"] == false));
    assert_eq!((&last["done"], &last["eval_count"]), (&json!(true), &whole["eval_count"]));

    let options = json!({"options": {"num_predict": 3, "num_ctx": 512, "num_gpu": 99}, "stream": false});
    let short = node.json("/api/chat", &with(ask(), options)).await;
    assert_eq!((&short["done_reason"], &short["eval_count"]), (&json!("length"), &json!(3)));
    let logprobs = json!({"logprobs": true, "top_logprobs": 2, "options": {"num_predict": 2}, "stream": false});
    let logprobs = node.json("/api/chat", &with(ask(), logprobs)).await;
    assert_eq!(logprobs["logprobs"][1]["top_logprobs"].as_array().unwrap().len(), 2, "{logprobs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_templated_or_raw() {
    let node = Node::start().await;
    let generate = async |body: Value| node.json("/api/generate", &with(body, json!({"stream": false}))).await;
    assert_eq!(generate(json!({"prompt": QUESTION})).await["response"], ANSWER);
    let raw = format!("<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(generate(json!({"prompt": raw, "raw": true})).await["response"], ANSWER);
    let streamed = lines(&node, "/api/generate", &json!({"prompt": QUESTION})).await;
    let text: String = streamed.iter().map(|line| line["response"].as_str().unwrap()).collect();
    assert_eq!(text, ANSWER);
    let load = generate(json!({})).await;
    assert_eq!((&load["response"], &load["done_reason"]), (&json!(""), &json!("load")));
    let load = node.json("/api/chat", &json!({"messages": []})).await;
    assert_eq!((&load["message"]["content"], &load["done_reason"]), (&json!(""), &json!("load")));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_ollamas_form() {
    let node = Node::start().await;
    for (path, body, status, says) in [
        ("/api/chat", with(ask(), json!({"model": "nothing"})), 404, "'nothing' does not exist"),
        ("/api/chat", with(ask(), json!({"options": {"temperature": 9}})), 400, "'temperature' must be from 0 to 2"),
        ("/api/chat", with(ask(), json!({"options": {"num_ctx": 0}})), 400, "'num_ctx' must be"),
        ("/api/chat", with(ask(), json!({"format": "xml"})), 400, "'format' must be"),
        ("/api/chat", with(ask(), json!({"keep_alive": "soon"})), 400, "'keep_alive' must be"),
        ("/api/chat", json!({"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}), 400, "messages[0]"),
        ("/api/generate", json!({"prompt": "x", "context": [1]}), 400, "send the conversation to /api/chat"),
        ("/api/pull", json!({"model": "llama3"}), 403, "kubectl apply"),
        ("/api/create", json!({"model": "x"}), 403, "kubectl apply"),
        ("/api/show", json!({"model": "nothing"}), 404, "does not exist"),
        ("/api/nothing", json!({}), 404, "unknown path"),
        ("/api/tags", json!({}), 405, "not allowed"),
    ] {
        let (got, message) = error(&node, path, &body).await;
        assert!(got == status && message.contains(says), "{path} {body}: {got} {message}");
    }
    let delete =
        node.client.delete(format!("{}/api/delete", node.url)).json(&json!({"model": "x"})).send().await.unwrap();
    assert_eq!(delete.status(), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_and_what_is_loaded() {
    let node = Node::start().await;
    let get = async |path: &str| {
        let response = node.client.get(format!("{}{path}", node.url)).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response.json::<Value>().await.unwrap()
    };
    let idle_limit = Some(Duration::from_mins(5));
    node.front.describe("uid", ModelCard { memory_bytes: 7, max_tokens: 1024, idle_limit, ..ModelCard::default() });
    let tags = get("/api/tags").await;
    assert_eq!(
        (&tags["models"][0]["name"], &tags["models"][0]["model"]),
        (&json!("toy-chat:latest"), &json!("toy-chat:latest"))
    );
    assert_eq!(tags["models"][0]["digest"].as_str().unwrap().len(), 64);
    let expires = async || {
        let ps = get("/api/ps").await;
        let model = &ps["models"][0];
        assert_eq!((&model["size"], &model["context_length"]), (&json!(7), &json!(1024)));
        let expires: jiff::Timestamp = model["expires_at"].as_str().unwrap().parse().unwrap();
        expires.duration_since(jiff::Timestamp::now()).as_secs()
    };
    assert!((200..=300).contains(&expires().await));
    node.json("/api/chat", &with(ask(), json!({"stream": false, "keep_alive": "10m"}))).await;
    assert_eq!(node.front.activity("uid").unwrap().keep_alive, Some(KeepAlive::For(Duration::from_mins(10))));
    assert!((500..=600).contains(&expires().await));
    node.json("/api/chat", &with(ask(), json!({"stream": false}))).await;
    assert!((500..=600).contains(&expires().await), "who says nothing changes nothing");
    node.json("/api/generate", &json!({"keep_alive": -1})).await;
    assert!(expires().await > 1_000_000_000);

    let show = node.json("/api/show", &json!({"model": "ml/toy:latest"})).await;
    assert!(show["template"].as_str().unwrap().contains("im_start"), "{show}");
    assert!(show["capabilities"].as_array().unwrap().contains(&json!("completion")));
    assert!(get("/api/version").await["version"].is_string());

    // To unload is for the agent: it is not sent to the worker, and wakes nobody.
    let unload = node.json("/api/generate", &json!({"model": "toy-chat", "keep_alive": 0})).await;
    assert_eq!((&unload["done"], &unload["done_reason"]), (&json!(true), &json!("unload")));
    assert_eq!(node.front.activity("uid").unwrap().keep_alive, Some(KeepAlive::For(Duration::ZERO)));
    let mut wakes = node.front.wakes().unwrap();
    node.front.route("uid", Route::Unloaded);
    assert_eq!(get("/api/ps").await, json!({"models": []}));
    node.json("/api/chat", &json!({"messages": [], "keep_alive": "0s"})).await;
    assert_eq!(node.front.activity("uid").unwrap().keep_alive, None, "there is no worker to unload");
    assert_eq!(node.json("/api/show", &json!({"name": "toy-chat"})).await["template"], "");
    assert!(wakes.try_recv().is_err());
    node.front.describe("uid", ModelCard { is_pinned: true, ..ModelCard::default() });
    assert_eq!(error(&node, "/api/chat", &json!({"messages": [], "keep_alive": 0})).await.0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_of_texts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("embedder.gguf");
    Spec::embedder().write(&path).unwrap();
    let node = Node::start_with(|config| {
        config.model_path = path;
        config.context = ContextSpec::default();
    })
    .await;
    let numbers =
        |vector: &Value| -> Vec<f64> { vector.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect() };
    let length = |vector: &[f64]| vector.iter().map(|number| number * number).sum::<f64>().sqrt();
    let both = node.json("/api/embed", &json!({"model": "toy-chat:latest", "input": ["the llama", "a plain"]})).await;
    assert_eq!(both["embeddings"].as_array().unwrap().len(), 2);
    assert!(both["prompt_eval_count"].as_u64().unwrap() > 2 && both["total_duration"].as_u64().unwrap() > 0, "{both}");
    let first = numbers(&both["embeddings"][0]);
    assert!((length(&first) - 1.0).abs() < 1e-3, "{}", length(&first));
    let openai = node.json("/v1/embeddings", &json!({"input": "the llama"})).await;
    let openai = numbers(&openai["data"][0]["embedding"]);
    assert!(first.iter().zip(&openai).all(|(left, right)| (left - right).abs() < 1e-3), "the same vector");
    // The older form has it as the model makes it: the same direction.
    let raw = numbers(&node.json("/api/embeddings", &json!({"prompt": "the llama"})).await["embedding"]);
    let scale = length(&raw);
    assert!(raw.iter().zip(&first).all(|(raw, unit)| (raw / scale - unit).abs() < 1e-3));
    assert_eq!(node.json("/api/embed", &json!({})).await["embeddings"], json!([]), "loads the model");
    assert_eq!(node.json("/api/embeddings", &json!({"prompt": ""})).await, json!({"embedding": []}));

    let long = "llama ".repeat(5000);
    let (status, message) = error(&node, "/api/embed", &json!({"input": long})).await;
    assert!(status == 400 && message.contains("tokens"), "{message}");
    assert_eq!(
        node.json("/api/embed", &json!({"input": long, "truncate": true})).await["embeddings"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(error(&node, "/api/embed", &json!({"input": 5})).await.0, 400);
    let chat = error(&node, "/api/chat", &with(ask(), json!({}))).await;
    assert_eq!(chat.0, 400, "{chat:?}");
    let toy = Node::start().await;
    assert_eq!(error(&toy, "/api/embed", &json!({"input": "x"})).await.0, 400);
}
