//! Models of which a GPU holds a part, and models that several GPUs share, by a whole agent with real workers. On Mesa's
//! software driver; on an NVIDIA GPU with `--features cuda`.
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use altiplano_test_models::{Spec, toy};
use support::gpu::{BOTH, DEVICE, TWICE, agent, bytes, engine, need, taken};
use support::{Agent, Model, chat, question, workers};

/// What does not fit: who must have a GPU is refused with the numbers, who prefers one has as many layers there as there is
/// room for and says so; one that has no room for any runs on the CPU and says why. All answer right.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_fit_is_refused_or_goes_in_part_or_to_the_cpu() {
    let need = need().await;
    let (must, may) = (format!(", {}", engine("Required")), format!(", {}", engine("Preferred")));
    let path = toy::path();
    let models: [Model<'_>; 2] = [("must", &path, &must), ("may", &path, &may)];
    let limit = need.quarters(3).to_string();
    let part = agent(&models, &["--device-memory-limit-bytes", &limit]).await;
    let line = part.ready("may", 1).await;
    let shortage = format!(" on {DEVICE}, which has ");
    for words in [&format!("on {DEVICE}"), "runs in part on the CPU (", " layers are on the GPU): it needs ", &shortage]
    {
        assert!(line.contains(words), "no {words:?} in {line}");
    }
    part.check("may").await;
    let labels = format!("altiplano_model_memory_measured_bytes{{device=\"{DEVICE}\"");
    let held = bytes(part.metric(&labels, "\"may\"").await);
    assert!(held <= need.model * 3 / 4 && held > need.model / 8, "{held} of {need:?}");
    let line = part.line("default/must: Failed (InsufficientMemory)", 1).await;
    assert!(line.contains("needs ") && line.contains(" free"), "{line}");
    let (status, answer) = part.ask("must", &question().0).await;
    assert_eq!(status, 503, "{answer}");
    assert!(!part.said().contains("default/must: Ready"), "{}", part.story());
    drop(part);

    let none = agent(&models, &["--device-memory-limit-bytes", "65536"]).await;
    let line = none.ready("may", 1).await;
    for words in ["on CPU", "runs on the CPU: it needs ", &shortage] {
        assert!(line.contains(words), "no {words:?} in {line}");
    }
    none.check("may").await;
}

/// A mixture of experts keeps all layers on a GPU that has room for them without some of the experts.
#[tokio::test(flavor = "multi_thread")]
async fn experts_make_room_before_layers() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("experts.gguf");
    let spec = Spec { layers: 4, embd: 128, ff: 256, experts: 8, ..Spec::default() };
    spec.write(&file).expect("a model file");
    let (whole, part) = (format!(", {}", engine("Required")), format!(", {}", engine("Preferred")));
    let body = |model: &str| {
        let mut body = chat(model, "Hello");
        body["max_tokens"] = 12.into();
        body
    };
    let text = async |agent: &Agent, model: &str| {
        let answer = agent.post(&body(model)).await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 200, "{}", agent.story());
        let answer: serde_json::Value = answer.json().await.expect("JSON");
        assert_eq!(answer["usage"]["completion_tokens"], 12, "{answer}");
    };
    let labels = format!("altiplano_model_memory_measured_bytes{{device=\"{DEVICE}\"");
    let all = agent(&[("whole", &file, &whole)], &[]).await;
    all.ready("whole", 1).await;
    text(&all, "whole").await;
    let need = taken(&all, "whole").await;
    drop(all);
    // 4 layers of 8 experts with 3 matrices of 64 KiB: one layer's are 1.5 MiB.
    let limit = (need.quarters(4) - (2 << 20)).to_string();
    let some = agent(&[("part", &file, &part)], &["--device-memory-limit-bytes", &limit]).await;
    let line = some.ready("part", 1).await;
    let words = "runs in part on the CPU (the experts of 2 of 5 layers are there): it needs ";
    assert!(line.contains(words) && line.contains(&format!("on {DEVICE}")), "{line}");
    text(&some, "part").await;
    let held = bytes(some.metric(&labels, "\"part\"").await);
    let less = need.model.saturating_sub(held);
    assert!(less > 2 << 20 && less < 4 << 20, "{held} of {need:?}");
}

/// A model that is there in part stays so when the room for all of it comes, and is there whole when it is loaded again.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_stays_until_the_next_load() {
    // Room for two processes, and seven quarters of the model.
    let need = need().await;
    let limit = need.process + need.quarters(7);
    let [first, may] =
        ["Required", "Preferred"].map(|gpu| format!(", unload: {{minResidentSeconds: 0}}, {}", engine(gpu)));
    let path = toy::path();
    let models: [Model<'_>; 2] = [("first", &path, &first), ("may", &path, &may)];
    let agent = agent(&models, &["--device-memory-limit-bytes", &limit.to_string()]).await;
    let unload = async |model: &str, left: usize| {
        let body = serde_json::json!({"model": model, "keep_alive": 0});
        let url = format!("{}/api/generate", agent.base());
        let answer = agent.client.post(url).json(&body).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 200, "{}", agent.story());
        agent.until("it is unloaded", || async { workers(agent.pid()).len() == left }).await;
    };
    agent.ready("first", 1).await;
    agent.ready("may", 1).await;
    // Whichever came first has all it wants.
    unload("may", 1).await;
    agent.check("may").await;
    let line = agent.ready("may", 2).await;
    assert!(line.contains("in part on the CPU"), "{line}");

    unload("first", 1).await;
    agent.check("may").await;
    let ready = agent.said().lines().filter(|line| line.starts_with("default/may: Ready as")).count();
    assert_eq!(ready, 2, "{}", agent.story());
    unload("may", 0).await;
    agent.check("may").await;
    let line = agent.ready("may", 3).await;
    assert!(!line.contains("in part") && line.contains(&format!("on {DEVICE}")), "{line}");
}

/// An embedder that prefers a GPU and does not fit is there in part, too, and says the same as on the CPU: an encoder, and a
/// decoder of which the last token counts.
#[tokio::test(flavor = "multi_thread")]
async fn embedders_are_there_in_part() {
    let folder = tempfile::tempdir().expect("a folder");
    for spec in [Spec::embedder(), Spec::causal_embedder()] {
        let file = folder.path().join("embedder.gguf");
        let spec = Spec { embd: 256, ff: 768, heads: 8, kv_heads: 8, layers: 4, ..spec };
        spec.write(&file).expect("a model file");
        let (whole, part, never) = (engine("Required"), engine("Preferred"), "engine: {gpu: Never}");
        let [whole, part, never] = [&whole, &part, never].map(|engine| format!(", {engine}"));
        let labels = format!("altiplano_model_memory_measured_bytes{{device=\"{DEVICE}\"");
        let all = agent(&[("whole", &file, &whole), ("never", &file, &never)], &[]).await;
        all.ready("whole", 1).await;
        let expected = embed(&all, "never").await;
        near(&expected, &embed(&all, "whole").await);
        let need = taken(&all, "whole").await;
        drop(all);
        let limit = need.quarters(4) - need.model / 8;
        let some = agent(&[("part", &file, &part)], &["--device-memory-limit-bytes", &limit.to_string()]).await;
        let line = some.ready("part", 1).await;
        assert!(line.contains("runs in part on the CPU (") && line.contains(&format!("on {DEVICE}")), "{line}");
        near(&expected, &embed(&some, "part").await);
        let held = bytes(some.metric(&labels, "\"part\"").await);
        assert!(held <= need.model - need.model / 8, "{held} of {need:?}");
        let error = some.metric(&labels.replace("measured", "error"), "\"part\"").await;
        assert!(error.abs() <= 4096.0, "{error}");
    }
}

/// The vector of a text.
async fn embed(agent: &Agent, model: &str) -> Vec<f64> {
    let body = serde_json::json!({"model": model, "input": "the llama walks on the high plain"});
    let answer = agent.client.post(format!("{}/v1/embeddings", agent.base())).json(&body).send().await;
    let answer: serde_json::Value = answer.expect("an answer").json().await.expect("JSON");
    let vector = answer["data"][0]["embedding"].as_array().unwrap_or_else(|| panic!("{answer}; {}", agent.story()));
    vector.iter().map(|number| number.as_f64().expect("a number")).collect()
}

/// Vectors of length 1 that point in the same direction.
fn near(one: &[f64], other: &[f64]) {
    let product: f64 = one.iter().zip(other).map(|(a, b)| a * b).sum();
    assert!(one.len() == other.len() && product > 0.999, "{product}");
}

/// The same device twice is two devices for llama.cpp: a model that fits on neither alone is on both, one that does not fit on
/// both is there in part on both, and none has more than its own limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_split_over_two_devices() {
    let path = toy::path();
    // Buffers for computing, which each device has as large as one alone, are to be small beside what is split.
    let spec = |gpu: &str| {
        format!(
            ", context: {{minTokens: 512, maxTokens: 512, parallel: 2}}, \
             engine: {{gpu: {gpu}, batchTokens: 32, microBatchTokens: 32, flashAttention: 'Off'}}"
        )
    };
    let (must, may) = (spec("Required"), spec("Preferred"));
    let start = async |model: Model<'_>, limit: u64| {
        let options = ["--device-memory-limit-bytes", &limit.to_string()];
        Agent::start(&[], &["serve"], &[model], &options, &TWICE).await
    };
    let both = BOTH.join("+");
    let held = async |agent: &Agent, model: &str| {
        let mut held = Vec::new();
        for device in BOTH {
            let labels = format!("altiplano_model_memory_measured_bytes{{device=\"{device}\"");
            held.push(agent.metric(&labels, &format!("\"{model}\"")).await);
        }
        held
    };
    let one = start(("must", &path, &must), 1 << 30).await;
    let line = one.ready("must", 1).await;
    assert!(!line.contains('+'), "one device has room for all: {line}");
    let need = bytes(held(&one, "must").await.iter().sum());
    let mut process = 0;
    for device in BOTH {
        let reserved = one.metric("altiplano_device_memory_reserved_bytes", device).await;
        process += if reserved > 0.0 { bytes(reserved) } else { 0 };
    }
    let process = process.saturating_sub(need);
    drop(one);

    // Its half of the model and its buffer are a little less than all of it.
    let limit = need * 24 / 25;
    let whole = start(("must", &path, &must), process + limit).await;
    let line = whole.ready("must", 1).await;
    assert!(line.contains(&format!("on {both}")) && !line.contains("in part"), "{line}");
    whole.check("must").await;
    let split: Vec<u64> = held(&whole, "must").await.into_iter().map(bytes).collect();
    assert!(split.iter().all(|&bytes| bytes <= limit) && split.iter().sum::<u64>() >= need, "{split:?} of {need}");
    for device in BOTH {
        let labels = format!("altiplano_model_memory_error_bytes{{device=\"{device}\"");
        let error = whole.metric(&labels, "\"must\"").await;
        // Of what devices hand on to each other a dry run counts a little more.
        assert!(error.abs() <= 131_072.0, "{device}: {error}");
    }
    drop(whole);

    let limit = split.iter().max().expect("two") * 7 / 8;
    let part = start(("may", &path, &may), process + limit).await;
    let line = part.ready("may", 1).await;
    assert!(line.contains(&format!("on {both}")) && line.contains("runs in part on the CPU ("), "{line}");
    part.check("may").await;
    let held: Vec<u64> = held(&part, "may").await.into_iter().map(bytes).collect();
    assert!(held.iter().all(|&bytes| bytes <= limit), "{held:?} of {limit}");
    drop(part);
    let none = start(("must", &path, &must), process + limit).await;
    let line = none.line("default/must: Failed (InsufficientMemory)", 1).await;
    assert!(line.contains("needs ") && line.contains(" free"), "{line}");
}
