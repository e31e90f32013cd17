//! What is still there after ten thousand requests, a third of them hung up on in mid-stream; and what sixteen streams
//! hold that run for ten minutes.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use altiplano_test_models::{Quantization, Spec};
use altiplano_tests::report::{Report, Row};
use altiplano_tests::{http, sandbox, wait_for};
use anyhow::{Context as _, Result};

use crate::engine::client::{Question, ask_all, ask_telling, count, questions, random_tokens};
use crate::engine::servers::{Model, Server, ours};

const REQUESTS: u64 = 10_000;
/// Before the first look: allocators and pools take what they will use.
const WARM_UP: u64 = 1_000;
const CLIENTS: u64 = 16;
const STREAMS: usize = 16;
const STREAM_TIME: Duration = Duration::from_mins(10);
/// Tokens of the prompts that come before the streams: more than a stream gets in its time. llama.cpp's buffers are reserved,
/// and counted, for the whole context, but their pages are touched as far as cells are used.
const DEPTH: usize = 5000;
/// Connections to workers are kept for a minute, and threads for blocking work for ten seconds, when they have had none.
const IDLE: Duration = Duration::from_secs(70);
const KEPT: &str = "altiplano_prefix_cache_host_bytes";

pub(crate) async fn run() -> Result<Report> {
    let dir = sandbox::subdir("models")?;
    let tiny = Model::write(&dir, "tiny", &Spec::default())?;
    let mut rows = requests(&tiny).await?;
    let slow = Spec {
        vocab: 8192,
        layers: 12,
        embd: 768,
        heads: 12,
        kv_heads: 4,
        ff: 2048,
        context: 16_384,
        quantization: Quantization::Q4_0,
        ..Spec::default()
    };
    rows.extend(streams(&Model::write(&dir, "slow", &slow)?).await?);
    Ok(Report {
        name: "leaks".into(),
        setting: format!(
            "{REQUESTS} requests by {CLIENTS} clients after {WARM_UP} others, every third hung up on in mid-stream; then \
             {STREAMS} streams for {STREAM_TIME:?}. Memory: anonymous resident bytes of agent and worker, less the beginnings \
             that the worker keeps in host memory, which are bounded and counted by a metric. Before the streams, each has a \
             prompt of {DEPTH} tokens, so that the pages of the context's buffers have been touched."
        ),
        rows,
    })
}

async fn requests(model: &Model) -> Result<Vec<Row>> {
    let server = ours(model, "{sizing: Fixed, maxTokens: 512, parallel: 8}").await?;
    many(&server, model, 0, WARM_UP).await?;
    settled(&server).await?;
    let before = Held::by(&server).await?;
    many(&server, model, WARM_UP, REQUESTS).await?;
    settled(&server).await?;
    let after = Held::by(&server).await?;
    let grown = |pick: fn(&Held) -> f64| pick(&after) - pick(&before);
    Ok(vec![
        Row::new("agent: growth a request", "KiB", grown(|held| held.agent_kib) / count_of(REQUESTS)).below(1.0),
        Row::new("worker: growth a request", "KiB", grown(|held| held.worker_kib) / count_of(REQUESTS)).below(1.0),
        Row::new("open files more than before", "", grown(|held| held.files)).below(1.0),
        Row::new("threads more than before", "", grown(|held| held.threads)).below(1.0),
    ])
}

async fn streams(model: &Model) -> Result<Vec<Row>> {
    let server = ours(model, "{sizing: Fixed, maxTokens: 16384, parallel: 16}").await?;
    let question = |seed| Question { prompt: random_tokens(seed, 32, model.vocabulary), generate: 16_000 };
    let run = async |seconds: Duration, seed: u64| -> Result<usize> {
        let end = Instant::now() + seconds;
        let questions: Vec<_> = (0..STREAMS).map(|n| question(seed + n as u64)).collect();
        let all = questions.iter().map(|question| {
            ask_telling(&server, question, |_| {
                if Instant::now() < end { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
        });
        let answers = futures::future::try_join_all(all).await?;
        Ok(answers.iter().map(|answer| answer.tokens.len()).sum())
    };
    run(Duration::from_secs(10), 100).await?;
    settled(&server).await?;
    let begun = Held::by(&server).await?;
    let deep: Vec<_> = questions(model, 300, &[DEPTH; STREAMS], 2);
    ask_all(&server, &deep).await?;
    settled(&server).await?;
    let before = Held::by(&server).await?;
    // Looked at while they run, at their end.
    let look = async {
        tokio::time::sleep(STREAM_TIME.saturating_sub(Duration::from_secs(2))).await;
        Held::by(&server).await
    };
    let (tokens, during) = futures::future::try_join(run(STREAM_TIME, 200), look).await?;
    settled(&server).await?;
    let after = Held::by(&server).await?;
    let a_stream = |held: &Held| (held.both_kib() - before.both_kib()) / count(STREAMS);
    let touched = (before.both_kib() - begun.both_kib()) / count(STREAMS);
    Ok(vec![
        Row::new(format!("pages touched by prompts of {DEPTH} tokens, a stream"), "KiB", touched),
        Row::new("held by a stream after ten minutes, agent and worker", "KiB", a_stream(&during)).below(100.0),
        Row::new("the same after it has ended", "KiB", a_stream(&after)).below(100.0),
        Row::new("tokens of a stream in that time", "", count(tokens / STREAMS)),
    ])
}

/// `total` requests by all clients together, each with another prompt.
async fn many(server: &Server, model: &Model, first: u64, total: u64) -> Result<()> {
    let next = AtomicU64::new(first);
    let client = async || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= first + total {
                return Ok(());
            }
            let length = 8 + usize::try_from(number % 120)?;
            let prompt = random_tokens(number, length, model.vocabulary);
            let hang_up = number.is_multiple_of(3);
            ask_telling(server, &Question { prompt, generate: 24 }, |said| {
                if hang_up && said == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .await?;
        }
    };
    futures::future::try_join_all((0..CLIENTS).map(|_| client())).await.map(drop)
}

/// Waits until nothing runs or waits, by the worker's own metrics.
async fn settled(server: &Server) -> Result<()> {
    wait_for("nothing to run or wait", Duration::from_mins(1), || async {
        let text = metrics(server).await.map_err(|error| error.to_string())?;
        let busy: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("num_requests_running") || line.contains("num_requests_waiting"))
            .filter(|line| !line.starts_with('#'))
            .collect();
        let idle = !busy.is_empty() && busy.iter().all(|line| line.ends_with(" 0"));
        if idle { Ok(()) } else { Err(format!("{busy:?}")) }
    })
    .await?;
    tokio::time::sleep(IDLE).await;
    Ok(())
}

async fn metrics(server: &Server) -> Result<String> {
    Ok(http()?.get(format!("http://{}/metrics", server.address)).send().await?.text().await?)
}

/// Bytes of prompts' beginnings in the worker's host memory.
async fn kept(server: &Server) -> Result<f64> {
    let text = metrics(server).await?;
    let line = text.lines().find(|line| line.starts_with(KEPT)).context("no metric of what is kept")?;
    line.rsplit(' ').next().and_then(|bytes| bytes.parse().ok()).with_context(|| format!("{line:?} has no bytes"))
}

/// What the processes hold.
struct Held {
    agent_kib: f64,
    worker_kib: f64,
    files: f64,
    threads: f64,
}

impl Held {
    async fn by(server: &Server) -> Result<Self> {
        let (agent, worker) = (server.proc.pid(), server.worker()?);
        let [agent_status, worker_status] = [agent, worker].map(status);
        let (agent_status, worker_status) = (agent_status?, worker_status?);
        let of = |status: &BTreeMap<String, f64>, name: &str| status.get(name).copied().context("not in /proc");
        let files = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
        Ok(Self {
            agent_kib: of(&agent_status, "RssAnon")?,
            worker_kib: of(&worker_status, "RssAnon")? - kept(server).await? / 1024.0,
            files: count(files(agent)? + files(worker)?),
            threads: of(&agent_status, "Threads")? + of(&worker_status, "Threads")?,
        })
    }

    fn both_kib(&self) -> f64 {
        self.agent_kib + self.worker_kib
    }
}

fn status(pid: u32) -> Result<BTreeMap<String, f64>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let number = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?))
    };
    Ok(text.lines().filter_map(number).collect())
}

fn count_of(number: u64) -> f64 {
    count(usize::try_from(number).unwrap_or(usize::MAX))
}
