//! Device memory that another process takes: before a model is placed, between its plan and its load, while it is loaded and
//! while its context would grow. Real workers on Mesa's software driver, under a layer that keeps one account of the device
//! over all processes, as a GPU's driver does.
#![cfg(not(feature = "cuda"))]
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use altiplano_agent::runner::protocol::{MemoryUse, RunnerConfig, RunnerEvent, RunnerFailure, RunnerReport};
use altiplano_crds::model_deployment::{ContextSpec, EngineSpec, FlashAttention};
use altiplano_test_models::{Spec, toy};
use altiplano_test_vulkan_accounts::{Accounts, Holder};
use futures::StreamExt as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::gpu::{DEVICE, ENV, bytes, engine, sharing};
use support::{Agent, PATIENCE, command, gone, kill, question, until, workers};

fn accounts() -> Accounts {
    Accounts::new().expect("a folder")
}

/// Bytes that living processes hold of the device.
fn held(accounts: &Accounts) -> u64 {
    accounts.held().expect("the accounts")
}

/// The number of a metric of the device.
async fn metric(agent: &Agent, name: &str) -> f64 {
    agent.metric(&format!("altiplano_device_memory_{name}_bytes"), DEVICE).await
}

/// Bytes of the device that a model was measured to take, and those that a worker with it was promised.
async fn measured(agent: &Agent, model: &str) -> u64 {
    let name = format!("altiplano_model_memory_measured_bytes{{device=\"{DEVICE}\"");
    bytes(agent.metric(&name, &format!("\"{model}\"")).await)
}

/// Another process has the device when the agent comes: the model is not loaded, and it is said what it needs, what is free
/// and who has the rest. When that process is killed the model loads by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_others_hold_is_waited_for() {
    let accounts = accounts();
    let path = toy::path();
    let must = format!(", {}", engine("Required"));
    let agent = sharing(&accounts, &[("must", &path, &must)], &[]).await;
    agent.ready("must", 1).await;
    let need = measured(&agent, "must").await;
    drop(agent);
    until("its memory is back", || held(&accounts), |held| *held == 0).await;

    let mut holder = Holder::start(&accounts).expect("another process");
    let taken = holder.leave(need / 2).expect("memory");
    let agent = sharing(&accounts, &[("must", &path, &must)], &[]).await;
    let line = agent.line("default/must: Failed (InsufficientMemory)", 1).await;
    for words in [format!("needs {}", size(need)), format!("on {DEVICE}, which has "), size(taken)] {
        assert!(line.contains(&words), "no {words:?} in {line}");
    }
    assert!(line.contains("held by other processes"), "{line}");
    agent.says(&format!("{DEVICE}: others than this agent hold ")).await;
    let foreign = bytes(metric(&agent, "foreign").await);
    assert!(foreign.abs_diff(taken) < 1 << 20, "{foreign} of {taken}");
    let (status, answer) = agent.ask("must", &question().0).await;
    assert_eq!(status, 503, "{answer}");
    assert!(answer["error"]["message"].as_str().is_some_and(|text| text.contains("InsufficientMemory")), "{answer}");
    assert!(workers(agent.pid()).is_empty());

    holder.kill().expect("the signal is sent");
    agent.ready("must", 1).await;
    agent.check("must").await;
    assert!(metric(&agent, "foreign").await < 1.0);
}

/// As the ledger says bytes.
fn size(count: u64) -> String {
    altiplano_agent::ledger::bytes(count)
}

/// Memory goes between the plan and the load, while another model runs: the load fails with a reason and is tried again, the
/// other one answers all the while. What an unloaded or killed worker held is free when the driver has it back.
#[tokio::test(flavor = "multi_thread")]
async fn memory_taken_before_a_load_fails_that_load_alone() {
    let accounts = accounts();
    let path = toy::path();
    let must = format!(", unload: {{minResidentSeconds: 0}}, {}", engine("Required"));
    let stays = format!(", unload: {{policy: Never}}, {}", engine("Required"));
    let agent = sharing(&accounts, &[("toy", &path, &must), ("other", &path, &stays)], &[]).await;
    agent.ready("toy", 1).await;
    agent.ready("other", 1).await;
    let (need, both) = (measured(&agent, "toy").await, held(&accounts));
    let reserved = bytes(metric(&agent, "reserved").await);
    println!("two models: {reserved} bytes reserved, {both} held by the driver's account");
    // But for copies that this driver's shaders do without, a megabyte and a half of each.
    assert!(both.abs_diff(reserved) < both / 5, "the ledger and the driver agree");

    let unload = json!({"model": "toy", "keep_alive": 0});
    let answer = agent.client.post(format!("{}/api/generate", agent.base())).json(&unload).send().await;
    assert_eq!(answer.expect("an answer").status().as_u16(), 200);
    until("the driver has it back", || held(&accounts), |held| *held < both * 3 / 4).await;
    agent.until("it is free", || async { bytes(metric(&agent, "reserved").await) < reserved - need / 2 }).await;

    let mut holder = Holder::start(&accounts).expect("another process");
    holder.leave(need / 2).expect("memory");
    let (status, answer) = agent.ask("toy", &question().0).await;
    assert_eq!(status, 503, "{answer}; {}", agent.story());
    let line = agent.line("default/toy: Failed (InsufficientMemory)", 1).await;
    assert!(line.contains("needs ") && line.contains(" free"), "{line}");
    agent.says("held by other processes").await;
    agent.check("other").await;
    assert_eq!(workers(agent.pid()).len(), 1);

    holder.hold(0).expect("freed");
    agent.ready("toy", 2).await;
    agent.check("toy").await;
    agent.check("other").await;
    assert!(held(&accounts).abs_diff(both) < 1 << 16, "{} of {both}", held(&accounts));
    for worker in workers(agent.pid()) {
        kill(worker, Signal::KILL);
        gone(worker).await;
    }
    agent.ready("toy", 3).await;
    agent.ready("other", 2).await;
    assert!(held(&accounts).abs_diff(both) < 1 << 16, "{} of {both}", held(&accounts));
    assert!(!agent.log().contains("was killed by SIGSEGV") && !agent.log().contains("SIGABRT"), "{}", agent.story());
}

/// A worker without an agent: it loads what it is told to.
fn config(folder: &Path, model_path: PathBuf) -> RunnerConfig {
    let tokens = Some(512);
    RunnerConfig {
        name: "test".to_owned(),
        served_name: "test".to_owned(),
        model_path,
        socket: folder.join("worker.sock"),
        context: ContextSpec { min_tokens: tokens, max_tokens: tokens, parallel: 2, ..ContextSpec::default() },
        engine: EngineSpec {
            batch_tokens: Some(32),
            micro_batch_tokens: Some(32),
            flash_attention: FlashAttention::Off,
            ..EngineSpec::default()
        },
        devices: vec![DEVICE.to_owned()],
        threads: 1,
        ..RunnerConfig::default()
    }
}

/// What becomes of a load, how the process ended, and what the driver's account was when it was ready.
fn load(accounts: &Accounts, config: &RunnerConfig) -> Result<(RunnerReport, u64), (RunnerFailure, Option<i32>)> {
    let mut child = command()
        .args(["runner", "--log-format", "json"])
        .envs(ENV.into_iter().chain(accounts.environment()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("a worker");
    let mut stdin = child.stdin.take().expect("its standard input");
    writeln!(stdin, "{}", serde_json::to_string(config).expect("JSON")).expect("it listens");
    let stdout = BufReader::new(child.stdout.take().expect("its standard output"));
    let mut outcome = None;
    for line in stdout.lines().map_while(Result::ok) {
        match serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")) {
            RunnerEvent::Ready(report) => {
                outcome = Some(Ok((report, held(accounts))));
                break;
            }
            RunnerEvent::Failed(failure) => outcome = Some(Err(failure)),
            _ => {}
        }
    }
    drop(stdin);
    let status = child.wait().expect("its end");
    match outcome {
        Some(Ok(loaded)) => Ok(loaded),
        Some(Err(failure)) => Err((failure, status.code())),
        None => panic!("the worker ended without a word: {status}"),
    }
}

/// Wherever in a load the driver refuses (for weights, the cache, what is computed in, the driver's own temporaries), the
/// worker says that memory is short and exits.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_the_driver_refuses_ends_cleanly_wherever_it_is() {
    let accounts = accounts();
    let folder = tempfile::tempdir().expect("a folder");
    let config = config(folder.path(), toy::path());
    let (report, needed) = load(&accounts, &config).expect("there is room");
    let part = report.memory.iter().find(|part| part.device == DEVICE).expect("it is on the device");
    println!("{needed} bytes by the driver's account: {part:?}");
    let MemoryUse { weights_bytes: weights, context_bytes: cache, compute_bytes: compute, .. } = *part;
    let mut holder = Holder::start(&accounts).expect("another process");
    let lacking = [
        (0, "nothing is free"),
        (weights - 1, "unable to allocate Vulkan0 buffer"),
        (weights + cache - 1, "failed to allocate buffer for kv cache"),
        (weights + cache + compute - 1, "failed to allocate compute"),
        // What ggml computes in for a moment.
        (needed - 1, "ErrorOutOfDeviceMemory"),
    ];
    for (free, words) in lacking {
        holder.leave(free).expect("memory");
        let (failure, code) =
            load(&accounts, &config).err().unwrap_or_else(|| panic!("{free} of {needed} are too few"));
        let RunnerFailure { reason, message } = failure;
        assert_eq!((reason.as_str(), code), ("InsufficientMemory", Some(1)), "{free} bytes: {message}");
        assert!(message.contains(words), "{free} bytes: no {words:?} in {message}");
    }
    holder.leave(needed).expect("memory");
    let (again, _) = load(&accounts, &config).expect("just enough");
    assert_eq!(again.memory.len(), report.memory.len());
}

/// A context that would grow while another process holds the rest of the device: streams go on to their end, who needs more
/// waits and is told why, and has it when it is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_context_grows_when_others_have_left() {
    let accounts = accounts();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    let spec = Spec { layers: 2, embd: 512, heads: 8, kv_heads: 8, ff: 64, endless: true, ..Spec::default() };
    spec.write(&file).expect("a model file");
    let more = format!(
        ", context: {{minTokens: 512, maxTokens: 2048, parallel: 2}}, traffic: {{queueTimeoutSeconds: 120}}, {}",
        engine("Required")
    );
    let agent = sharing(&accounts, &[("grows", &file, &more)], &[]).await;
    agent.ready("grows", 1).await;
    let worker = workers(agent.pid());
    let mut holder = Holder::start(&accounts).expect("another process");
    holder.leave(0).expect("memory");

    let body = |tokens: usize, max_tokens: u32, stream: bool| {
        let prompt: Vec<usize> = (0..tokens).map(|number| 260 + number % 240).collect();
        json!({"model": "grows", "prompt": prompt, "max_tokens": max_tokens, "stream": stream, "temperature": 0})
    };
    let post = |body: &Value| {
        agent.client.post(format!("{}/v1/completions", agent.base())).json(body).timeout(PATIENCE).send()
    };
    let mut stream = post(&body(20, 200, true)).await.expect("an answer").bytes_stream();
    stream.next().await.expect("a first part").expect("bytes");
    let long = body(700, 4, false);
    let waits = post(&long);
    let streams = async {
        let mut text = String::new();
        while let Some(part) = stream.next().await {
            text.push_str(&String::from_utf8_lossy(&part.expect("the stream is not cut")));
        }
        assert!(text.contains("\"finish_reason\":\"length\"") && text.contains("[DONE]"), "{text}");
        agent.says("its context would grow: needs ").await;
        agent.says("held by other processes").await;
        assert_eq!(workers(agent.pid()), worker, "the same process");
        holder.hold(0).expect("freed");
    };
    let (answer, ()) = futures::join!(waits, streams);
    let answer = answer.expect("an answer");
    let status = answer.status().as_u16();
    let answer: Value = answer.json().await.expect("JSON");
    assert_eq!(status, 200, "{answer}; {}", agent.story());
    assert_eq!(answer["usage"]["prompt_tokens"], 700, "{answer}");
    assert_eq!(workers(agent.pid()), worker, "the same process");
}
