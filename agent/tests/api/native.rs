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
    let progress: Vec<&Value> = pieces.iter().filter_map(|piece| piece.get("prompt_progress")).collect();
    let (first, done) = (progress[0], progress[progress.len() - 1]);
    assert_eq!(first["cache"], first["processed"], "the first one comes before anything was read");
    assert_eq!((&done["total"], &done["processed"]), (&whole["tokens_evaluated"], &whole["tokens_evaluated"]));
    assert!(pieces.iter().all(|piece| piece.get("timings").is_none()), "nobody asked for them");
    let some = ask(json!({"n_predict": 3, "response_fields": ["content", "generation_settings/n_predict", "x"]})).await;
    assert_eq!(some, json!({"content": limit["content"], "generation_settings/n_predict": 3}));

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

#[tokio::test(flavor = "multi_thread")]
async fn paths_without_a_version_are_llama_servers() {
    let node = Node::start().await;
    let chat = chat(QUESTION);
    assert_eq!(node.json("/chat/completions", &chat).await["choices"][0]["message"]["content"], ANSWER);
    let input = json!({"input": QUESTION});
    assert_eq!(node.json("/responses", &input).await["output"][0]["content"][0]["text"], ANSWER);
    let used = node.json(CHAT, &chat).await["usage"]["prompt_tokens"].clone();
    for (path, body) in [("chat/completions", &chat), ("responses", &input)] {
        for root in ["/v1", ""] {
            let counted = node.json(&format!("{root}/{path}/input_tokens"), body).await;
            assert_eq!(counted, json!({"object": "response.input_tokens", "input_tokens": used}), "{root}/{path}");
        }
    }
    let error = refused(&node, "/responses", &json!({})).await;
    assert_eq!(error["param"], "input");
}

#[tokio::test(flavor = "multi_thread")]
async fn verbose_answers_tell_the_prompt_and_the_settings() {
    let node = Node::start().await;
    let verbose = json!({"verbose": true, "seed": 7});
    let rendered = node.json("/apply-template", &chat(QUESTION)).await["prompt"].clone();
    let check = |beside: &Value, prompt: &Value, content: &str| {
        assert_eq!((&beside["prompt"], &beside["content"]), (prompt, &json!(content)), "{beside}");
        assert_eq!((&beside["generation_settings"]["seed"], &beside["stop_type"]), (&json!(7), &json!("eos")));
        assert!(beside["tokens_predicted"].as_u64().unwrap() > 5, "{beside}");
    };
    let asked = with(chat(QUESTION), verbose.clone());
    let answer = node.json(CHAT, &asked).await;
    check(&answer["__verbose"], &rendered, ANSWER);
    let chunks = node.events(CHAT, &with(asked, json!({"stream": true}))).await;
    let (told, untold): (Vec<_>, Vec<_>) = chunks.iter().partition(|chunk| chunk.get("__verbose").is_some());
    assert_eq!((told.len(), untold.is_empty()), (1, false), "{chunks:?}");
    check(&told[0]["__verbose"], &rendered, "");
    assert_eq!(told[0]["choices"][0]["finish_reason"], "stop");

    let asked = json!({"prompt": prompt(), "max_tokens": 100});
    let answer = node.json("/v1/completions", &with(asked.clone(), verbose)).await;
    check(&answer["__verbose"], &json!(prompt()), ANSWER);
    assert!(node.json("/v1/completions", &asked).await.get("__verbose").is_none());
    assert!(node.json(CHAT, &chat(QUESTION)).await.get("__verbose").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_tell_their_timings_where_they_are_asked_to() {
    let node = Node::start().await;
    let asks = json!({"stream": true, "timings_per_token": true, "cache_prompt": false});
    let chunks = node.events(CHAT, &with(chat(QUESTION), asks.clone())).await;
    assert!(chunks[0].get("timings").is_none(), "the role says nothing yet: {}", chunks[0]);
    assert!(chunks.iter().all(|chunk| chunk.get("prompt_progress").is_none()));
    let said = |chunk: &&Value| chunk["choices"][0]["delta"]["content"].is_string();
    let predicted: Vec<u64> =
        chunks.iter().filter(said).map(|chunk| chunk["timings"]["predicted_n"].as_u64().unwrap()).collect();
    assert!(predicted.len() > 5 && predicted.windows(2).all(|pair| pair[0] < pair[1]), "{predicted:?}");
    let (first, last) = (chunks.iter().find(said).unwrap(), chunks.last().unwrap());
    for field in ["prompt_n", "cache_n"] {
        assert_eq!(first["timings"][field], last["timings"][field], "{field}");
    }
    assert!(first["timings"]["prompt_per_token_ms"].as_f64().unwrap() > 0.0, "{first}");
    assert!(last["timings"]["predicted_per_token_ms"].as_f64().unwrap() > 0.0, "{last}");

    let asks = with(asks, json!({"prompt": prompt(), "return_progress": true, "n_predict": 4}));
    let pieces = stream(&node, "/completion", &asks).await;
    let start = &pieces[0]["timings"];
    assert_eq!((&start["prompt_n"], &start["prompt_ms"], &start["predicted_n"]), (&json!(0), &json!(0.0), &json!(0)));
    assert!(pieces.iter().all(|piece| piece["timings"]["predicted_n"].is_u64()), "{pieces:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_models_own_port_has_its_metrics_under_llama_servers_names_too() {
    let node = Node::start().await;
    let mut generated = 0;
    for tokens in [1, 4, 9] {
        let asked = json!({"prompt": prompt(), "n_predict": tokens});
        generated += node.json("/completion", &asked).await["timings"]["predicted_n"].as_u64().unwrap();
    }
    let scrape = async |base: String| {
        let response = node.client.get(format!("{base}/metrics")).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let started = response.headers().get("process-start-time-unix").cloned();
        (started, response.text().await.unwrap())
    };
    let (started, own) = scrape(node.url.clone()).await;
    assert!(started.unwrap().to_str().unwrap().parse::<u64>().unwrap() > 1_700_000_000);
    for line in [format!("llamacpp:tokens_predicted_total {generated}"), "llamacpp:requests_processing 0".to_owned()] {
        assert!(own.lines().any(|there| there == line), "no {line} in:\n{own}");
    }
    assert!(own.contains("altiplano_generation_tokens_total{"), "{own}");
    let (_, shared) = scrape(format!("http://{}", node.front.address())).await;
    assert!(!shared.contains("llamacpp:") && shared.contains("altiplano_generation_tokens_total{"), "{shared}");
    node.front.route("uid", Route::Unloaded);
    let (_, gone) = scrape(node.url.clone()).await;
    assert!(gone.starts_with("# the model is not loaded"), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deployments_seed_is_every_requests() {
    let sampling = altiplano_crds::model_deployment::SamplingSpec {
        temperature: Some("2".into()),
        seed: Some(42),
        ..Default::default()
    };
    let node = Node::start_with(|config| config.engine.sampling = Some(sampling)).await;
    let (_, props) = get(&node, "/props").await;
    let params = &props["default_generation_settings"]["params"];
    assert_eq!((&params["seed"], &params["temperature"]), (&json!(42), &json!(2.0)));
    let ask = async |more: Value| {
        // Everything the model could say, and not only what it says best.
        let wide = json!({"top_k": 0, "top_p": 1, "min_p": 0, "cache_prompt": false});
        let body = with(with(json!({"prompt": "The", "n_predict": 48}), wide), more);
        node.json("/completion", &body).await["content"].clone()
    };
    let (one, same, other) = (ask(json!({})).await, ask(json!({})).await, ask(json!({"seed": 7})).await);
    assert_eq!(one, same);
    assert_ne!(one, other);
}

/// What editors send to have a block of code completed.
#[tokio::test(flavor = "multi_thread")]
async fn lines_end_an_answer() {
    let node = Node::start().await;
    let asked = |grammar: &str, more: Value| {
        let body = json!({"prompt": prompt(), "grammar": grammar, "n_predict": 400, "temperature": 0});
        with(body, more)
    };
    let block = r#"root ::= "a\n  b\n c\nd""#;
    let whole = node.json("/completion", &asked(block, json!({"n_indent": 0, "t_max_predict_ms": -1}))).await;
    assert_eq!(whole["content"], "a\n  b\n c\nd", "{whole}");
    let cut = node.json("/completion", &asked(block, json!({"n_indent": 2}))).await;
    assert_eq!((&cut["content"], &cut["stop_type"]), (&"a\n  b\n ".into(), &"limit".into()), "{cut}");
    let events = stream(&node, "/completion", &asked(block, json!({"n_indent": 2}))).await;
    let said: String = events.iter().filter_map(|event| event["content"].as_str()).collect();
    assert_eq!(said, "a\n  b\n ", "nothing of what was cut was streamed");

    let late = node.json("/completion", &asked(r#"root ::= ("a\n")+"#, json!({"t_max_predict_ms": 1}))).await;
    let content = late["content"].as_str().unwrap();
    assert!(content.ends_with('\n') && content.len() < 200 && late["stop_type"] == "limit", "{late}");
    // The samplers of llama.vim, and an order without a bound on the candidates.
    for samplers in [json!(["top_k", "top_p", "infill"]), json!(["infill"])] {
        let body = json!({"prompt": prompt(), "samplers": samplers, "n_predict": 8, "top_k": 40, "top_p": 0.9});
        let answer = node.json("/completion", &body).await;
        assert!(answer["tokens_predicted"].as_u64().unwrap() > 0, "{answer}");
        assert_eq!(answer["generation_settings"]["samplers"], samplers);
    }
}
