//! Embedders whose texts are longer than any before, in a node whose memory others hold, with real workers: what the ledger
//! is asked and says, who waits, who makes room, and that short texts go on.
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use altiplano_test_models::Spec;
use rustix::process::Pid;
use serde_json::{Value, json};
use support::{Agent, Model, PATIENCE, workers};
use tempfile::TempDir;

/// A longer text has more tokens than an embedder has room for at first.
const LONG: usize = 1500;

/// Two model files: an embedder, and one that generates and takes 4 KiB a token.
struct Files {
    embedder: PathBuf,
    chat: PathBuf,
    _folder: TempDir,
}

impl Files {
    fn written() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (embedder, chat) = (folder.path().join("embedder.gguf"), folder.path().join("chat.gguf"));
        Spec { context: 4096, ..Spec::embedder() }.write(&embedder).expect("a model file");
        let spec = Spec { layers: 2, embd: 512, heads: 8, kv_heads: 8, ff: 64, context: 16_384, ..Spec::default() };
        spec.write(&chat).expect("a model file");
        Self { embedder, chat, _folder: folder }
    }
}

/// What an embedder's spec says besides its source: nobody unloads it, and its requests wait for so many seconds.
fn stays(seconds: u32) -> String {
    format!(
        ", unload: {{policy: Never}}, engine: {{gpu: Never, threads: 1}}, traffic: {{queueTimeoutSeconds: {seconds}}}"
    )
}

async fn start(models: &[Model<'_>], limit: Option<f64>) -> Agent {
    let limit = limit.map(|bytes| format!("{bytes:.0}"));
    let options: Vec<&str> = limit.iter().flat_map(|limit| ["--memory-limit-bytes", limit.as_str()]).collect();
    let agent = Agent::start(&[], &["serve"], models, &options, &[]).await;
    for (name, _, _) in models {
        agent.ready(name, 1).await;
    }
    agent
}

/// The vector of a text of so many tokens, or what is said instead.
async fn embed(agent: &Agent, model: &str, tokens: usize) -> (u16, Value) {
    let text: Vec<usize> = (0..tokens).map(|at| 200 + at * 7 % 300).collect();
    let body = json!({"model": model, "input": [text]});
    let asked = agent.client.post(format!("{}/v1/embeddings", agent.base())).json(&body).timeout(PATIENCE).send();
    let response = asked.await.unwrap_or_else(|error| panic!("{error:?}; {}", agent.story()));
    let status = response.status().as_u16();
    let answer: Value = response.json().await.expect("JSON");
    assert!(status != 200 || answer["usage"]["prompt_tokens"] == tokens, "{answer}");
    (status, answer)
}

async fn embeds(agent: &Agent, model: &str, tokens: usize) {
    let (status, answer) = embed(agent, model, tokens).await;
    assert_eq!(status, 200, "{answer}; {}", agent.story());
}

async fn reserved(agent: &Agent) -> f64 {
    agent.metric("altiplano_device_memory_reserved_bytes", "\"CPU\"").await
}

async fn cells(agent: &Agent, model: &str) -> f64 {
    agent.metric("altiplano_context_tokens{", &format!("\"{model}\"")).await
}

/// Bytes of memory that are a process's own.
fn held(pid: Pid) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a field of its status");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") * 1024.0
}

/// Where there is room the ledger grants a growth, and knows afterwards what it took: no less than the process did.
#[tokio::test(flavor = "multi_thread")]
async fn an_embedder_grows_by_the_ledgers_leave() {
    let files = Files::written();
    // With flash attention the mask is most of what is taken, without it scores and their copy.
    for (attention, least) in [("On", 2.0 * 1536.0 * 1536.0), ("Off", 6.0 * 1536.0 * 1536.0 * 2.0)] {
        let more = stays(60).replace("threads: 1", &format!("threads: 1, flashAttention: '{attention}'"));
        let agent = start(&[("embedder", &files.embedder, &more)], None).await;
        let [worker] = workers(agent.pid())[..] else { panic!("one worker: {}", agent.story()) };
        embeds(&agent, "embedder", 500).await;
        let (cells_before, before, held_before) =
            (cells(&agent, "embedder").await, reserved(&agent).await, held(worker));
        assert!(cells_before < 600.0, "{cells_before}; {}", agent.story());
        embeds(&agent, "embedder", LONG).await;
        assert!((cells(&agent, "embedder").await - 1536.0).abs() < 1.0, "{}", agent.story());
        agent.until("the growth is measured", || async { reserved(&agent).await > before }).await;
        let labels = "altiplano_model_memory_measured_bytes{device=\"CPU\"";
        let measured = agent.metric(labels, "\"embedder\"").await;
        assert!((reserved(&agent).await - measured).abs() < 1.0, "what was granted is settled: {}", agent.story());
        let (grown, taken) = (measured - before, held(worker) - held_before);
        println!("flash attention {attention}: the ledger says {grown} bytes more, the process took {taken}");
        assert!(grown > least && taken <= grown + f64::from(4 << 20), "{grown} {taken}");
        assert!(agent.log().contains("the worker asked for more memory"), "{}", agent.story());
    }
}

/// A text for which there is no memory, whoever leaves, fails at once and says why; the model goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_never_fits_is_refused_with_the_numbers() {
    let files = Files::written();
    let more = stays(60);
    let models = [("embedder", files.embedder.as_path(), more.as_str())];
    let needed = {
        let agent = start(&models, None).await;
        reserved(&agent).await
    };
    let agent = start(&models, Some(needed + f64::from(4 << 20))).await;
    let (status, answer) = embed(&agent, "embedder", LONG).await;
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert_eq!(status, 503, "{answer}");
    for words in ["1500 tokens", "needs ", " on CPU, which has ", " free", "held by default/embedder"] {
        assert!(message.contains(words), "no {words:?} in {message}");
    }
    embeds(&agent, "embedder", 300).await;
    assert!(cells(&agent, "embedder").await < 600.0, "{}", agent.story());
}

/// Memory that a busy model holds is waited for: short texts go on meanwhile, who may not wait for long is told by whom it
/// is held, and when that model is idle it makes room.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_text_waits_for_what_a_busy_model_holds() {
    let files = Files::written();
    let (hasty, patient) = (stays(4), stays(120));
    let busy = ", unload: {minResidentSeconds: 0}, engine: {gpu: Never, threads: 1}, \
                context: {sizing: Fixed, maxTokens: 16384, parallel: 1}";
    let models: [Model<'_>; 3] =
        [("hasty", &files.embedder, &hasty), ("patient", &files.embedder, &patient), ("busy", &files.chat, busy)];
    let (needed, growth) = {
        let agent = start(&models, None).await;
        let before = reserved(&agent).await;
        embeds(&agent, "patient", LONG).await;
        agent.until("the growth is measured", || async { reserved(&agent).await > before }).await;
        (before, reserved(&agent).await - before)
    };
    let agent = Arc::new(start(&models, Some(needed + growth / 2.0)).await);
    // A reader that does not read: its model is busy for as long as it is there.
    let body = json!({"model": "busy", "prompt": "Hello", "max_tokens": 16000, "stream": true});
    let stream = agent.client.post(format!("{}/v1/completions", agent.base())).json(&body).send().await;
    let stream = stream.expect("an answer");
    assert_eq!(stream.status(), 200, "{}", agent.story());

    let long = tokio::spawn({
        let agent = Arc::clone(&agent);
        async move { embeds(&agent, "patient", LONG).await }
    });
    let waits = async || agent.metric("altiplano_context_waits_total{", "\"patient\"").await;
    agent.until("the long text waits", || async { waits().await >= 1.0 }).await;
    for _ in 0..20 {
        embeds(&agent, "patient", 300).await;
    }
    let (status, answer) = embed(&agent, "hasty", LONG).await;
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert_eq!(status, 503, "{answer}");
    for words in ["1500 tokens", "needs ", " on CPU, which has ", " free", "held by default/busy"] {
        assert!(message.contains(words), "no {words:?} in {message}");
    }
    assert!(!long.is_finished(), "it waits");
    assert!(cells(&agent, "hasty").await < 600.0 && cells(&agent, "patient").await < 600.0, "{}", agent.story());

    drop(stream);
    long.await.expect("an answer");
    assert!((cells(&agent, "patient").await - 1536.0).abs() < 1.0, "{}", agent.story());
    let evictions = agent.metric("altiplano_model_evictions_total", "\"busy\"").await;
    assert!(evictions >= 1.0, "{evictions}; {}", agent.story());
    assert!(waits().await < 2.0, "a text that waits is counted once");
}

/// What an idle model's context has grown by goes first, in both directions: nobody is unloaded for it.
#[tokio::test(flavor = "multi_thread")]
async fn idle_contexts_shrink_for_each_other() {
    let files = Files::written();
    let embedder = stays(120);
    let chat = ", unload: {minResidentSeconds: 0}, engine: {gpu: Never, threads: 1}, traffic: {queueTimeoutSeconds: 120}, \
                context: {minTokens: 1024, parallel: 1}";
    let models: [Model<'_>; 2] = [("embedder", &files.embedder, &embedder), ("chat", &files.chat, chat)];
    let prompt: Vec<usize> = (0..6000).map(|at| 260 + at % 240).collect();
    let body = json!({"model": "chat", "prompt": prompt, "max_tokens": 1});
    let read = async |agent: &Agent| {
        let url = format!("{}/v1/completions", agent.base());
        let answer = agent.client.post(url).json(&body).timeout(PATIENCE).send().await.expect("an answer");
        assert_eq!(answer.status(), 200, "{}", agent.story());
    };
    let (needed, growth) = {
        let agent = start(&models, None).await;
        let before = reserved(&agent).await;
        read(&agent).await;
        agent.until("the growth is measured", || async { reserved(&agent).await > before }).await;
        (before, reserved(&agent).await - before)
    };
    // Room for the chat's growth and for what its state moves through, not for the embedder's besides.
    let agent = start(&models, Some(needed + growth + f64::from(24 << 20))).await;
    let processes = workers(agent.pid());
    let at_first = cells(&agent, "chat").await;
    read(&agent).await;
    assert!(cells(&agent, "chat").await > 6000.0, "{}", agent.story());
    embeds(&agent, "embedder", 3500).await;
    assert!((cells(&agent, "chat").await - at_first).abs() < 1.0, "{}", agent.story());
    assert!(cells(&agent, "embedder").await > 3400.0, "{}", agent.story());
    read(&agent).await;
    assert!(cells(&agent, "embedder").await < 600.0, "{}", agent.story());
    assert_eq!(workers(agent.pid()), processes, "nobody was unloaded: {}", agent.story());
}
