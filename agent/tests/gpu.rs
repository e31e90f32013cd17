//! Models on a GPU, by a whole agent with real workers: what is offloaded, who has room and who makes it, what the agent
//! itself leaves alone. On Mesa's software driver; on an NVIDIA GPU with `--features cuda`.
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::Command;

use altiplano_test_models::{Quantization, Spec, toy};
use rustix::process::Pid;
use support::{Agent, Model, chat, question, traffic, until, workers};

#[cfg(feature = "cuda")]
const DEVICE: &str = "CUDA0";
#[cfg(feature = "cuda")]
const ENV: [(&str, &str); 1] = [("CUDA_VISIBLE_DEVICES", "0")];

#[cfg(not(feature = "cuda"))]
const DEVICE: &str = "Vulkan0";
#[cfg(not(feature = "cuda"))]
const ENV: [(&str, &str); 1] = [("GGML_VK_VISIBLE_DEVICES", "0")];

/// What a process has of a GPU: its driver and its files.
const TRACES: [&str; 6] = ["libvulkan_", "libcuda.so", "libnvidia-", "/dev/nvidia", "/dev/dri", "/dev/kfd"];

/// Small batches and no flash attention need few shaders, and compiling those is what takes the time here.
fn engine(gpu: &str) -> String {
    format!("engine: {{gpu: {gpu}, batchTokens: 32, microBatchTokens: 32, flashAttention: 'Off'}}")
}

async fn agent(models: &[Model<'_>], options: &[&str]) -> Agent {
    Agent::start(&[], &["serve"], models, options, &ENV).await
}

/// Bytes that the toy model takes on the device.
async fn need() -> u64 {
    let more = format!(", {}", engine("Required"));
    let agent = agent(&[("toy", &toy::path(), &more)], &[]).await;
    agent.ready("toy", 1).await;
    bytes(agent.metric("altiplano_model_memory_measured_bytes", DEVICE).await)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes in a metric")]
fn bytes(metric: f64) -> u64 {
    assert!(metric > 0.0, "nothing was measured");
    metric as u64
}

/// What a process has open or mapped that belongs to a GPU.
fn traces(pid: Pid) -> Vec<String> {
    let number = pid.as_raw_nonzero();
    let maps = std::fs::read_to_string(format!("/proc/{number}/maps")).expect("its maps");
    let files = std::fs::read_dir(format!("/proc/{number}/fd")).expect("its files").flatten();
    let files = files.filter_map(|file| Some(std::fs::read_link(file.path()).ok()?.display().to_string()));
    let lines = maps.lines().map(str::to_owned).chain(files);
    lines.filter(|line| TRACES.iter().any(|trace| line.contains(trace))).collect()
}

/// All layers, some, none: each says so, takes what was predicted, and answers right. The agent has no part of a GPU.
#[tokio::test(flavor = "multi_thread")]
async fn models_go_to_the_gpu_whole_in_part_or_not() {
    let whole = format!(", {}", engine("Required"));
    let part = whole.replace("gpu: Required", "gpu: Preferred, gpuLayers: 2");
    let path = toy::path();
    let models: [Model<'_>; 3] =
        [("whole", &path, &whole), ("part", &path, &part), ("never", &path, ", engine: {gpu: Never}")];
    let agent = agent(&models, &[]).await;
    for (name, device) in [("whole", DEVICE), ("part", DEVICE), ("never", "CPU")] {
        let line = agent.ready(name, 1).await;
        assert!(line.ends_with(&format!("on {device}")), "{line}");
        agent.check(name).await;
    }
    let on_device = async |model: &str, what: &str| {
        agent
            .metric(&format!("altiplano_model_memory_{what}_bytes{{device=\"{DEVICE}\""), &format!("\"{model}\""))
            .await
    };
    let (all, some) = (on_device("whole", "measured").await, on_device("part", "measured").await);
    assert!(all > some && some > 0.0, "{all} {some}");
    assert!(on_device("never", "measured").await < 1.0);
    // A driver aligns compute buffers in a way that no dry run knows.
    assert!(on_device("whole", "error").await.abs() <= 4096.0);
    // Of host memory: what a process takes beside the weights differs from one run to the next.
    let host = agent.metric("altiplano_model_memory_error_bytes{device=\"CPU\"", "\"whole\"").await;
    assert!(host.abs() < 16_777_216.0, "{host}");

    let held: Vec<Vec<String>> = workers(agent.pid()).into_iter().map(traces).collect();
    assert_eq!(held.iter().filter(|traces| !traces.is_empty()).count(), 2, "the test sees drivers: {held:?}");
    assert_eq!(traces(agent.pid()), Vec::<String>::new(), "the agent has opened a device");
    let log = agent.log();
    let found = log.lines().find(|line| line.contains("looked at the devices")).expect("the devices are told");
    assert!(found.contains(DEVICE) && found.contains("driver"), "{found}");
    #[cfg(not(feature = "cuda"))]
    assert!(found.contains("llvmpipe") && found.contains("Mesa"), "{found}");
}

/// What does not fit: who must have a GPU is refused with the numbers, who prefers one has as many layers there as there is
/// room for and says so; one that has no room for any runs on the CPU and says why. All answer right.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_fit_is_refused_or_goes_in_part_or_to_the_cpu() {
    let need = need().await;
    let (must, may) = (format!(", {}", engine("Required")), format!(", {}", engine("Preferred")));
    let path = toy::path();
    let models: [Model<'_>; 2] = [("must", &path, &must), ("may", &path, &may)];
    let limit = (need * 3 / 4).to_string();
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
    assert!(held <= need * 3 / 4 && held > need / 8, "{held} of {need}");
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
    let need = bytes(all.metric(&labels, "\"whole\"").await);
    drop(all);
    // 4 layers of 8 experts with 3 matrices of 64 KiB: one layer's are 1.5 MiB.
    let limit = (need - (2 << 20)).to_string();
    let some = agent(&[("part", &file, &part)], &["--device-memory-limit-bytes", &limit]).await;
    let line = some.ready("part", 1).await;
    let words = "runs in part on the CPU (the experts of 2 of 5 layers are there): it needs ";
    assert!(line.contains(words) && line.contains(&format!("on {DEVICE}")), "{line}");
    text(&some, "part").await;
    let held = bytes(some.metric(&labels, "\"part\"").await);
    assert!(need - held > 2 << 20 && need - held < 4 << 20, "{held} of {need}");
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
        let need = bytes(all.metric(&labels, "\"whole\"").await);
        drop(all);
        let limit = need - need / 8;
        let some = agent(&[("part", &file, &part)], &["--device-memory-limit-bytes", &limit.to_string()]).await;
        let line = some.ready("part", 1).await;
        assert!(line.contains("runs in part on the CPU (") && line.contains(&format!("on {DEVICE}")), "{line}");
        near(&expected, &embed(&some, "part").await);
        let held = bytes(some.metric(&labels, "\"part\"").await);
        assert!(held <= limit, "{held} of {limit}");
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
#[cfg(not(feature = "cuda"))]
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_split_over_two_devices() {
    const BOTH: [&str; 2] = ["Vulkan0", "Vulkan1"];
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
        Agent::start(&[], &["serve"], &[model], &options, &[("GGML_VK_VISIBLE_DEVICES", "0,0")]).await
    };
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
    drop(one);

    // Its half of the model and its buffer are a little less than all of it.
    let limit = need * 24 / 25;
    let whole = start(("must", &path, &must), limit).await;
    let line = whole.ready("must", 1).await;
    assert!(line.contains("on Vulkan0+Vulkan1") && !line.contains("in part"), "{line}");
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
    let part = start(("may", &path, &may), limit).await;
    let line = part.ready("may", 1).await;
    assert!(line.contains("on Vulkan0+Vulkan1") && line.contains("runs in part on the CPU ("), "{line}");
    part.check("may").await;
    let held: Vec<u64> = held(&part, "may").await.into_iter().map(bytes).collect();
    assert!(held.iter().all(|&bytes| bytes <= limit), "{held:?} of {limit}");
    drop(part);
    let none = start(("must", &path, &must), limit).await;
    let line = none.line("default/must: Failed (InsufficientMemory)", 1).await;
    assert!(line.contains("needs ") && line.contains(" free"), "{line}");
}

/// The warm-up takes what the deepest request needs: a prompt that fills the pool takes nothing more. Without flash
/// attention the scores of a micro-batch at this depth are 16 MiB, which are touched by then, and the driver's temporaries are
/// half as large; on a software driver all of it is the worker's memory.
#[cfg(not(feature = "cuda"))]
#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_takes_no_more_than_the_warm_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    let spec = Spec { layers: 1, heads: 8, kv_heads: 8, endless: true, ..Spec::default() };
    spec.write(&file).expect("a model file");
    let more = ", context: {minTokens: 2048, maxTokens: 2048, parallel: 1}, \
                engine: {gpu: Required, batchTokens: 256, microBatchTokens: 256, flashAttention: 'Off'}";
    let agent = agent(&[("deep", &file, more)], &[]).await;
    agent.ready("deep", 1).await;
    let pids = workers(agent.pid());
    assert_eq!(pids.len(), 1, "{pids:?}");
    let read = async |token: i32, length: u32| {
        let body = serde_json::json!({"model": "deep", "prompt": vec![token; length as usize], "max_tokens": 8});
        let url = format!("{}/v1/completions", agent.base());
        let answer = agent.client.post(url).json(&body).send().await.expect("an answer");
        let answer: serde_json::Value = answer.json().await.expect("JSON");
        assert_eq!(answer["usage"]["total_tokens"], length + 8, "{answer}");
        held(pids[0])
    };
    // Shaders for steps of all sizes are compiled by a short one.
    let before = read(60, 256 + 44).await;
    let after = read(61, 256 * 7 + 44).await;
    println!("{before} bytes after a short prompt, {after} after one that fills the pool");
    assert!(after < before + (8 << 20), "{before} {after}");
}

/// Bytes of memory that are a process's own, shared ones counted.
fn held(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).expect("its status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of its status");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    };
    field("RssAnon:") + field("RssShmem:")
}

/// Device memory decides who is unloaded for whom, and what a worker held is waited for until the driver has it back.
#[tokio::test(flavor = "multi_thread")]
async fn models_take_turns_on_the_gpu() {
    let limit = (need().await * 3 / 2).to_string();
    let more = format!(", unload: {{minResidentSeconds: 0}}, {}", engine("Required"));
    let path = toy::path();
    let agent = agent(&[("a", &path, &more), ("b", &path, &more)], &["--device-memory-limit-bytes", &limit]).await;
    for model in ["a", "b", "a", "b"] {
        agent.check(model).await;
        assert!(workers(agent.pid()).len() <= 2);
    }
    let evictions = agent.metric("altiplano_model_evictions_total", "\"a\"").await;
    assert!(evictions >= 1.0, "{evictions}; {}", agent.story());
    let reserved = agent.metric("altiplano_device_memory_reserved_bytes", DEVICE).await;
    agent
        .until("one holds the device", || async {
            let reserved = bytes(agent.metric("altiplano_device_memory_reserved_bytes", DEVICE).await);
            reserved < limit.parse().expect("a number")
        })
        .await;
    assert!(reserved > 0.0);
}

/// Twelve models where four fit on the device. Longer with `ALTIPLANO_SOAK_SECONDS`.
#[tokio::test(flavor = "multi_thread")]
async fn twelve_models_share_a_device_with_room_for_four() {
    let limit = (need().await * 9 / 2).to_string();
    let more =
        format!(", unload: {{minResidentSeconds: 1}}, traffic: {{queueTimeoutSeconds: 120}}, {}", engine("Required"));
    traffic(&more, &["--device-memory-limit-bytes", &limit], &ENV, 60).await;
}

/// A file that is on a device needs no copy in the kernel's memory.
#[tokio::test(flavor = "multi_thread")]
async fn weights_do_not_linger_as_page_cache() {
    // Not on a file system in memory, whose pages are the file.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let file = folder.path().join("model.gguf");
    let spec = Spec {
        layers: 8,
        embd: 512,
        heads: 8,
        kv_heads: 8,
        ff: 1408,
        quantization: Quantization::F16,
        ..Spec::default()
    };
    let size = spec.write(&file).expect("a model file");
    assert!(size > 32 << 20, "{size}");
    std::fs::File::open(&file).and_then(|file| file.sync_all()).expect("it is on the disk");
    let (gpu, cpu) = (format!(", {}", engine("Required")), ", engine: {gpu: Never}");
    let mapped = agent(&[("large", &file, cpu)], &[]).await;
    mapped.ready("large", 1).await;
    assert!(cached(&file) > size / 2, "mapped weights are cached: {} of {size}", cached(&file));
    drop(mapped);
    let offloaded = agent(&[("large", &file, &gpu)], &[]).await;
    offloaded.ready("large", 1).await;
    let left = cached(&file);
    assert!(left < size / 4, "{left} of {size} bytes are still cached");
    // What the host computes, the embeddings, is read again.
    let mut body = chat("large", "Hello");
    body["max_tokens"] = 2.into();
    let answer = offloaded.post(&body).await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 200);
}

/// Bytes of a file in the kernel's cache.
fn cached(file: &Path) -> u64 {
    let output = Command::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(file).output();
    let output = output.expect("fincore, of util-linux");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    text.parse().unwrap_or_else(|error| panic!("{error}: {text:?}"))
}

/// The agent remembers nothing of models that it has served, beyond what is bounded.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_does_not_grow_with_the_models_it_serves() {
    let path = toy::path();
    let more = ", engine: {gpu: Never}, unload: {policy: AfterRequest, graceSeconds: 0}";
    let names: Vec<String> = (0..8).map(|number| format!("m{number}")).collect();
    let models: Vec<Model<'_>> = names.iter().map(|name| (name.as_str(), path.as_path(), more)).collect();
    let agent = Agent::start(&[], &["serve"], &models, &[], &[]).await;
    let mut after = Vec::new();
    for round in 0..4 {
        for name in &names {
            agent.check(name).await;
        }
        agent.until("all are unloaded", || async { workers(agent.pid()).is_empty() }).await;
        after.push(held(agent.pid()));
        println!("after round {round}: {} KiB", after[round] / 1024);
    }
    // The first round makes what is made once. What a worker's end lets go is let go a moment later.
    let before = after[1];
    let seen = || (before, held(agent.pid()));
    until("16 loads have taken less than 2 MiB", seen, |(_, now)| now.saturating_sub(before) < 2 << 20).await;
}
