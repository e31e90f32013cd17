//! The main job: apply, ready, stream, scale, edit, survive, delete, nothing left.

use std::time::{Duration, Instant};

use altiplano_crds::conditions::{reasons, states, types};
use altiplano_tests::scenario::{SOON, Scenario, toy_question};
use altiplano_tests::{ask, chat, content, http, python, wait_for};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_apply_to_nothing_left() -> Result<()> {
    let mut world = Scenario::start("main-job", 2).await?;
    let (prompt, answer) = toy_question(0)?;

    // Apply and ask, by every client that a user would try first.
    world.apply(&world.toy("toy", "context: {parallel: 2}"))?;
    world.wait_for_ready("toy", "1/1").await?;
    for (kind, reason) in [(types::READY, reasons::SERVING), (types::PLACED, reasons::ALL_PLACED)] {
        world.wait_for_condition("toy", kind, "True", reason).await?;
    }
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let whole = ask(&url, "toy", &prompt).await?;
    assert_eq!(content(&whole)?, answer);
    assert!(whole["usage"]["prompt_tokens"].as_u64() > Some(0), "{whole}");
    assert!(whole["timings"]["predicted_per_second"].as_f64() > Some(0.0), "{whole}");
    let mut pieces = 0;
    let streamed = chat(&url, "toy", &prompt, |_| pieces += 1).await?;
    assert_eq!(streamed.text, answer, "streamed and whole answers are the same");
    assert!(pieces > 3, "{pieces} pieces: {streamed:?}");
    curl_streams(&url, &prompt, &answer).await?;
    openai_sdk(&url, &prompt, &answer).await?;

    // The columns say what is.
    let table = world.cluster.kubectl(&["-n", &world.namespace, "get", "mdep", "-o", "wide"])?;
    assert!(table.contains("1/1") && table.contains("Ready"), "{table}");
    let row: Vec<_> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    assert_eq!(&row[..5], ["toy", "1/1", "Ready", "4096", "4096"], "context and pool are told:\n{table}");
    let nodes = world.cluster.kubectl(&["get", "modelnodes", "-o", "wide"])?;
    assert!(nodes.contains(&world.node(0)), "{nodes}");

    // Scale by kubectl, through the scale subresource.
    world.cluster.kubectl(&["-n", &world.namespace, "scale", "mdep/toy", "--replicas=2"])?;
    world.wait_for_ready("toy", "2/2").await?;
    let endpoints = world.wait_for_endpoints("toy", 2).await?;
    assert_ne!(endpoints[0].node, endpoints[1].node, "two replicas are on two nodes");
    for endpoint in &endpoints {
        assert_eq!(content(&ask(&endpoint.url, "toy", &prompt).await?)?, answer);
    }

    // Edit the context: a new worker, while the model is asked again and again.
    let before = world.get("toy").await?.metadata.generation;
    world.apply(&world.toy("toy", "replicas: 2\ncontext: {parallel: 2, maxTokens: 512}"))?;
    world
        .wait_until("toy", "a context of 512 tokens", SOON, |model| {
            let status = model.status.as_ref().ok_or("no status")?;
            let settled = status.observed_generation > before && status.ready.as_deref() == Some("2/2");
            if settled && status.context_tokens == Some(512) { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await?;
    let endpoint = world.wait_for_endpoints("toy", 2).await?.remove(0);
    assert_eq!(content(&ask(&endpoint.url, "toy", &prompt).await?)?, answer);

    // Off and on again.
    world.cluster.kubectl(&["-n", &world.namespace, "scale", "mdep/toy", "--replicas=0"])?;
    world.wait_for_condition("toy", types::READY, "False", reasons::SCALED_TO_ZERO).await?;
    wait_for("no worker", SOON, || {
        let workers: usize = world.agents.iter().map(|agent| agent.workers().len()).sum();
        std::future::ready(if workers == 0 { Ok(()) } else { Err(format!("{workers} workers")) })
    })
    .await?;
    world.cluster.kubectl(&["-n", &world.namespace, "scale", "mdep/toy", "--replicas=1"])?;
    world.wait_for_ready("toy", "1/1").await?;

    // Gone without a trace.
    world.delete("toy").await?;
    wait_for("no worker, no entry", SOON, || async {
        let workers: usize = world.agents.iter().map(|agent| agent.workers().len()).sum();
        let node = world.model_node(0).await.map_err(|error| error.to_string())?;
        let reported = node.status.map(|status| status.models.len()).unwrap_or_default();
        if workers == 0 && node.spec.models.is_empty() && reported == 0 {
            Ok(())
        } else {
            Err(format!("{workers} workers, {} entries, {reported} reported", node.spec.models.len()))
        }
    })
    .await?;
    for agent in &mut world.agents {
        let status = agent.proc.terminate(SOON).await?;
        ensure!(status.success(), "the agent ended with {status}\n{}", agent.proc.log_tail());
        ensure!(agent.proc.processes().is_empty(), "processes stay: {:?}", agent.proc.processes());
        let sockets = sockets_below(&agent.state_dir);
        ensure!(sockets.is_empty(), "sockets stay: {sockets:?}");
    }
    let status = world.operator.proc.terminate(SOON).await?;
    ensure!(status.success(), "the operator ended with {status}\n{}", world.operator.proc.log_tail());
    Ok(())
}

/// A worker, an agent's process and the operator, each killed in the middle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_killed_comes_back() -> Result<()> {
    let mut world = Scenario::start("killed", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("toy", ""))?;
    world.apply(&world.toy("other", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    world.wait_for_ready("other", "1/1").await?;
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let other = world.wait_for_endpoints("other", 1).await?.remove(0).url;

    // One worker: the other model never notices.
    let victim = worker_of(&world, "toy")?;
    let begun = Instant::now();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(i32::try_from(victim)?).context("a pid")?,
        rustix::process::Signal::KILL,
    )?;
    assert_eq!(content(&ask(&other, "other", &prompt).await?)?, answer);
    wait_for("another worker", SOON, || async {
        let pid = worker_of(&world, "toy").map_err(|error| error.to_string())?;
        if pid == victim { Err(format!("still {pid}")) } else { Ok(()) }
    })
    .await?;
    // A request in between is held or answered, never lost.
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
    println!("kill -9 of a worker to the next answer: {:?}", begun.elapsed());
    // How it ended stands in the status when the model is ready again, and in one event.
    world
        .wait_until("toy", "how the worker ended", SOON, |model| {
            let status = model.status.as_ref().ok_or("no status")?;
            let [placement] = &status.placements[..] else { return Err(format!("{:?}", status.placements)) };
            let end = placement.last_termination.as_ref().ok_or("no end")?;
            let told = end.reason == reasons::WORKER_EXITED && end.message.contains("killed by SIGKILL");
            let ready = placement.state == states::READY && placement.restarts == Some(1);
            if told && ready { Ok(()) } else { Err(format!("{placement:?}")) }
        })
        .await?;
    wait_for("an event about it", SOON, || async {
        let events = world.events("toy").await.map_err(|error| format!("{error:#}"))?;
        let about = events.iter().filter(|event| event.reason.as_deref() == Some(reasons::WORKER_EXITED));
        let said: Vec<_> = about.filter_map(|event| event.message.as_deref()).collect();
        if said.len() == 1 && said[0].contains("killed by SIGKILL") { Ok(()) } else { Err(format!("{said:?}")) }
    })
    .await?;

    // The operator: what serves goes on serving, and another operator goes on where it was.
    world.operator.proc.kill()?;
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
    world.operator = altiplano_tests::Operator::start(world.cluster, &[]).await?;
    world.operator.ready().await?;

    // The agent's process, in mid-stream: its workers go with it, and the next one loads them again.
    let dying = tokio::spawn({
        let url = url.clone();
        async move { chat(&url, "toy", "Tell me a long story about the altiplano.", |_| ()).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let workers_before = world.agents[0].workers();
    world.agents[0].proc.kill()?;
    let _ = dying.await?;
    wait_for("the workers' end", SOON, || {
        let alive = workers_before.iter().filter(|pid| alive(**pid)).count();
        std::future::ready(if alive == 0 { Ok(()) } else { Err(format!("{alive} alive")) })
    })
    .await?;
    world.restart_agent(0).await?;
    world
        .wait_until("toy", "an answer from the new agent", SOON, |model| {
            let status = model.status.as_ref().ok_or("no status")?;
            if status.ready.as_deref() == Some("1/1") { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await?;
    wait_for("an answer", SOON * 2, || async {
        let endpoints = world.wait_for_endpoints("toy", 1).await.map_err(|error| format!("{error:#}"))?;
        let answered = ask(&endpoints[0].url, "toy", &prompt).await.map_err(|error| format!("{error:#}"))?;
        if content(&answered).ok() == Some(&answer) { Ok(()) } else { Err(answered.to_string()) }
    })
    .await?;
    world.delete("toy").await?;
    world.delete("other").await?;
    Ok(())
}

/// An unloaded model is still an endpoint, and a request wakes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_model_leaves_memory_and_a_request_wakes_it() -> Result<()> {
    let world = Scenario::start("idle", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("toy", "unload: {policy: WhenIdle, idleSeconds: 1, minResidentSeconds: 0}"))?;
    world.wait_for_condition("toy", types::READY, "True", reasons::IDLE).await?;
    wait_for("no worker", SOON, || {
        let workers = world.agents[0].workers();
        std::future::ready(if workers.is_empty() { Ok(()) } else { Err(format!("{workers:?}")) })
    })
    .await?;
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let begun = Instant::now();
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
    println!("wake of an unloaded model, request to answer: {:?}", begun.elapsed());

    // Its owner wants it out of memory once, whatever its policy's time.
    let unloads = |at: &str| {
        world.apply(
            &world.toy("toy", &format!("unload: {{idleSeconds: 3600, minResidentSeconds: 0, requestedAt: {at}}}")),
        )
    };
    for at in ["'2026-01-01T00:00:00Z'", "again"] {
        unloads(at)?;
        // Else what comes next could be of its idleness, and the unload after the request that wakes it.
        wait_for("the agent knows that it is wanted", SOON, || async {
            let node = world.model_node(0).await.map_err(|error| error.to_string())?;
            let told = serde_json::to_string(&node.spec.models).map_err(|error| error.to_string())?;
            let seen = node.status.and_then(|status| status.observed_generation);
            let knows = told.contains(at.trim_matches('\'')) && seen == node.metadata.generation;
            if knows { Ok(()) } else { Err(format!("{seen:?} of {:?}: {told}", node.metadata.generation)) }
        })
        .await?;
        world.wait_for_condition("toy", types::READY, "True", reasons::IDLE).await?;
        wait_for("no worker", SOON, || {
            let workers = world.agents[0].workers();
            std::future::ready(if workers.is_empty() { Ok(()) } else { Err(format!("{workers:?}")) })
        })
        .await?;
        assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
        world.wait_for_condition("toy", types::READY, "True", reasons::SERVING).await?;
    }
    world.delete("toy").await
}

/// `curl -N` shows the answer as it comes.
async fn curl_streams(url: &str, prompt: &str, answer: &str) -> Result<()> {
    let body = json!({"model": "toy", "stream": true, "temperature": 0, "stream_options": {"include_usage": true},
                      "messages": [{"role": "user", "content": prompt}]});
    let output = tokio::process::Command::new("curl")
        .args(["--silent", "--show-error", "--no-buffer", "--max-time", "60", "--include", "--noproxy", "*"])
        .args(["-H", "content-type: application/json", "-H", "x-request-id: from-curl", "--data"])
        .arg(body.to_string())
        .arg(format!("{url}/v1/chat/completions"))
        .output()
        .await
        .context("could not start curl")?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "curl: {text}{}", String::from_utf8_lossy(&output.stderr));
    let lower = text.to_lowercase();
    ensure!(lower.contains("content-type: text/event-stream"), "{text}");
    ensure!(lower.contains("x-request-id: from-curl"), "{text}");
    let chunks: Vec<Value> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let said: String =
        chunks.iter().filter_map(|c| c.pointer("/choices/0/delta/content").and_then(Value::as_str)).collect();
    ensure!(said == answer, "curl got: {said}");
    ensure!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    let last = chunks.last().context("no chunk")?;
    ensure!(last["usage"]["completion_tokens"].as_u64() > Some(0), "no usage in the last chunk: {last}");
    Ok(())
}

/// The official OpenAI SDK for Python: listing, whole, streamed, an error by its class.
async fn openai_sdk(url: &str, prompt: &str, answer: &str) -> Result<()> {
    let script = altiplano_tests::repository().join("tests/clients/openai_chat.py");
    let output = tokio::process::Command::new(python()?)
        .arg(&script)
        .args([url, "toy", prompt, answer])
        .output()
        .await
        .context("could not start Python")?;
    ensure!(
        output.status.success(),
        "{}: {}{}",
        script.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// The worker that serves a model: the agent's log names its number, the number its socket, and the kernel its process.
fn worker_of(world: &Scenario, name: &str) -> Result<u32> {
    let agent = &world.agents[0];
    let model = format!("model=\"{}/{name}\"", world.namespace);
    let log = agent.proc.log();
    let loaded = log.lines().rfind(|line| line.contains("loading the model") && line.contains(&model));
    let number = loaded.and_then(|line| line.split_once("worker=")?.1.split(' ').next()).context("never loaded")?;
    let listening = std::fs::read_to_string("/proc/net/unix")?;
    let inodes: Vec<_> = listening
        .lines()
        .filter(|line| line.ends_with(&format!("/{number}.sock")))
        .filter_map(|line| line.split_whitespace().nth(6))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let holds = |pid: &u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files
            .filter_map(|file| std::fs::read_link(file.path()).ok())
            .any(|target| inodes.iter().any(|inode| target.as_os_str() == inode.as_str()))
    };
    agent.workers().into_iter().find(holds).with_context(|| format!("no process has the socket of worker {number}"))
}

fn sockets_below(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut found = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_socket() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

/// Health is not readiness, and metrics are what Prometheus can read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_readiness_and_metrics() -> Result<()> {
    let world = Scenario::start("metrics", 1).await?;
    let (prompt, _) = toy_question(0)?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    ask(&url, "toy", &prompt).await?;
    chat(&url, "toy", &prompt, |_| ()).await?;
    let agent = &world.agents[0];
    for path in ["/healthz", "/readyz"] {
        let response = http()?.get(format!("{}{path}", agent.url)).send().await?;
        assert_eq!(response.status(), 200, "{path}");
    }
    let text = agent.metrics().await?;
    let labels = format!("namespace=\"{}\"", world.namespace);
    for family in [
        "altiplano_time_to_first_token_seconds_bucket",
        "altiplano_inter_token_latency_seconds_bucket",
        "altiplano_e2e_request_latency_seconds_count",
        "altiplano_prompt_tokens_total",
        "altiplano_generation_tokens_total",
        "altiplano_num_requests_running",
        "altiplano_model_memory_measured_bytes",
        "altiplano_model_memory_predicted_bytes",
        "altiplano_model_state",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(family) && line.contains(&labels)),
            "{family} with {labels} is missing:\n{text}"
        );
    }
    promtool_check(&text).await?;
    promtool_check(&world.operator.metrics().await?).await?;
    world.delete("toy").await
}

async fn promtool_check(text: &str) -> Result<()> {
    use tokio::io::AsyncWriteExt as _;
    let mut child = tokio::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .context("promtool is missing: run `cargo xtask setup` (Debian package prometheus)")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    stdin.write_all(text.as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output().await?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && said.trim().is_empty(), "promtool: {said}\n{text}");
    Ok(())
}
