//! Models on a GPU, by a whole agent with real workers: what is offloaded, who has room and who makes it, what the agent
//! itself leaves alone. On Mesa's software driver; on an NVIDIA GPU with `--features cuda`.
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::path::Path;
use std::process::Command;

use altiplano_test_models::{Quantization, Spec, toy};
use rustix::process::Pid;
use support::gpu::{DEVICE, accounts, agent, bytes, engine, environment, need};
use support::{Agent, Model, chat, traffic, until, workers};

/// What a process has of a GPU: its driver and its files.
#[cfg(not(feature = "cuda"))]
const TRACES: [&str; 6] = ["libvulkan_", "libcuda.so", "libnvidia-", "/dev/nvidia", "/dev/dri", "/dev/kfd"];

/// What a process has of a GPU: its files. Whoever asks CUDA anything has its library.
#[cfg(feature = "cuda")]
const TRACES: [&str; 2] = ["/dev/nvidia", "/dev/dri"];

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
    let limit = need().await.workers_and_a_half(1).to_string();
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
    let limit = need().await.workers_and_a_half(4).to_string();
    let more =
        format!(", unload: {{minResidentSeconds: 1}}, traffic: {{queueTimeoutSeconds: 120}}, {}", engine("Required"));
    let accounts = accounts();
    let env = environment(accounts.as_ref());
    traffic(&more, &["--device-memory-limit-bytes", &limit], &env, 60).await;
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
