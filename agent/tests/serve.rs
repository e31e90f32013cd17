//! `altiplano-agent serve` as a user runs it: the real binary, real llama.cpp, real HTTP.

mod support;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_agent::runner::spare::SPARE;
use altiplano_agent::runner::spawn::{Runner, SpawnError};
use altiplano_test_models::{BadFile, Lora, Projector, ProjectorKind, Spec, toy};
use futures::StreamExt as _;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use support::{
    Agent, Model, PATIENCE, below, command, deployment, free_address, gone, is_alive, kill, question, source, workers,
};

async fn serve(models: &[Model<'_>]) -> Agent {
    Agent::start(&[], &["serve"], models, &["--drain-seconds", "60"], &[]).await
}

/// The processes below the agent that have a model.
fn children(agent: &Agent) -> Vec<Pid> {
    workers(agent.pid())
}

#[tokio::test(flavor = "multi_thread")]
async fn good_models_serve_while_bad_ones_say_what_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let bad = |kind: BadFile| {
        let path = folder.path().join(format!("{kind:?}.gguf"));
        kind.write(&Spec::default(), &path).expect("a bad file");
        path
    };
    let missing = folder.path().join("missing.gguf");
    let (not_gguf, truncated, unknown) =
        (bad(BadFile::NotGguf), bad(BadFile::Truncated), bad(BadFile::UnknownArchitecture));
    // llama.cpp aborts on this one: the process that reads it dies, and nothing else does.
    let deadly = bad(BadFile::NoLayers);
    let toy = toy::path();
    let mut agent = serve(&[
        ("missing", &missing, ""),
        ("not-gguf", &not_gguf, ""),
        ("truncated", &truncated, ""),
        ("unknown", &unknown, ""),
        ("deadly", &deadly, ""),
        ("needs-gpu", &toy, ", engine: {gpu: Required}"),
        ("toy", &toy, ""),
    ])
    .await;
    let ready = agent.ready("toy", 1).await;
    agent.check("toy").await;
    agent.check("default/toy").await;
    let alone = ready.split("alone at ").nth(1).and_then(|rest| rest.split("/v1").next()).expect("its own port");
    agent.check_at(alone, "toy").await;
    let other = agent.post_at(alone, &json!({"model": "missing", "messages": []})).await.expect("an answer");
    assert_eq!(other.status(), 404, "a model's own port serves that model only");

    for (name, reason) in [("missing", "FileNotFound"), ("needs-gpu", "GPURequired")] {
        let start = format!("default/{name}: Failed ({reason}): ");
        agent.line(&start, 1).await;
    }
    for name in ["not-gguf", "truncated", "unknown", "deadly"] {
        let start = format!("default/{name}: Failed (");
        let line = agent.line(&start, 1).await;
        assert!(line.len() > start.len() + 20, "it says nothing: {line}");
    }
    // A file that comes later is found.
    std::fs::copy(&toy, &missing).expect("a copy");
    agent.ready("missing", 1).await;
    agent.check("missing").await;
    agent.check("toy").await;

    kill(agent.pid(), Signal::TERM);
    assert!(agent.exited().await.success(), "a graceful end is a success");
}

/// Fetched with the model, loaded with it, asked for by name on the shared port.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_served_with_its_adapters() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("odd.gguf");
    Lora { strength: 3.0, ..Lora::of_toy() }.write(&path).expect("an adapter");
    let (toy, adapter) = (source(&toy::path()), source(&path));
    let model = format!(
        "{{source: {toy}, adapters: [{{name: odd, source: {adapter}}}, \
         {{name: nothing, scalePercent: 0, source: {adapter}}}]}}"
    );
    let agent = Agent::start_yaml(&[], &["serve"], &[deployment("toy", &model)], &[], &[]).await;
    agent.ready("toy", 1).await;
    agent.check("toy").await;
    agent.check("toy:nothing").await;
    let (question, answer) = question();
    let (status, odd) = agent.ask("default/toy:odd", &question).await;
    assert_eq!(status, 200, "{odd}");
    assert_ne!(odd["choices"][0]["message"]["content"], answer);
    agent.check("toy").await;
    let models = agent.client.get(format!("http://{}/v1/models", agent.shared)).send().await.expect("an answer");
    let models: Value = models.json().await.expect("JSON");
    let ids: Vec<_> = models["data"].as_array().expect("models").iter().map(|model| model["id"].as_str()).collect();
    assert_eq!(ids, [Some("toy"), Some("toy:odd"), Some("toy:nothing")]);
}

/// Fetched with the model and checked, loaded with it, counted with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_served_with_its_projector() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("mmproj.gguf");
    Projector { layers: 40, ..Projector::of_toy(ProjectorKind::Gemma3) }.write(&path).expect("a projector");
    let (toy, projector) = (source(&toy::path()), source(&path));
    let sum = "0".repeat(64);
    let wrong = format!("{{uri: 'file://{}', sha256: '{sum}'}}", path.display());
    let deployments = [
        deployment("eyes", &format!("{{source: {toy}, projector: {projector}}}")),
        deployment("spoilt", &format!("{{source: {toy}, projector: {wrong}}}")),
        deployment("none", &format!("{{source: {toy}, projector: {toy}}}")),
        deployment("toy", &format!("{{source: {toy}}}")),
    ];
    let agent = Agent::start_yaml(&[], &["serve"], &deployments, &[], &[]).await;
    agent.ready("eyes", 1).await;
    agent.ready("toy", 1).await;
    agent.check("eyes").await;
    let line = agent.line("default/spoilt: Failed (", 1).await;
    assert!(line.contains("ChecksumMismatch") && line.contains("projector") && line.contains(&sum), "{line}");
    let line = agent.line("default/none: Failed (", 1).await;
    assert!(line.contains("projector"), "{line}");
    let image =
        "data:image/bmp;base64,Qk06AAAAAAAAADYAAAAoAAAAAQAAAAEAAAABABgAAAAAAAQAAAAAAAAAAAAAAAAAAAAAAAAA/wAAAA==";
    let body = |model: &str| {
        let part = json!({"type": "image_url", "image_url": {"url": image}});
        json!({"model": model, "messages": [{"role": "user", "content": [part]}], "max_tokens": 4})
    };
    for (model, status) in [("eyes", 200), ("toy", 400)] {
        let answer = agent.post_at(&agent.base(), &body(model)).await.expect("an answer");
        assert_eq!(answer.status(), status, "{model}: {}", answer.text().await.unwrap_or_default());
    }
}

/// Fetched with the model, loaded with it; what it guessed is told, and one that cannot guess is refused with the reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_served_with_a_draft_model() {
    let folder = tempfile::tempdir().expect("a folder");
    let (poor, stranger) = (folder.path().join("poor.gguf"), folder.path().join("stranger.gguf"));
    toy::write_poor(&poor).expect("a model file");
    Spec::default().write(&stranger).expect("a model file");
    let model = |draft: &Path| format!("{{source: {}, draft: {}}}", source(&toy::path()), source(draft));
    let deployments = [deployment("toy", &model(&poor)), deployment("odd", &model(&stranger))];
    let agent = Agent::start_yaml(&[], &["serve"], &deployments, &[], &[]).await;
    agent.ready("toy", 1).await;
    agent.check("toy").await;
    let (status, answer) = agent.ask("default/toy", toy::LONG_QUESTION).await;
    assert_eq!(status, 200, "{answer}");
    let timing = |name: &str| answer["timings"][name].as_u64().unwrap_or_default();
    assert!(timing("draft_n") > 0 && timing("draft_n") >= timing("draft_n_accepted"), "{answer}");
    let line = agent.line("default/odd: Failed (DraftUnfit): ", 1).await;
    assert!(line.contains("its vocabulary has 512 tokens, the model's 1024"), "{line}");
    let metrics = agent.client.get(format!("http://{}/metrics", agent.shared)).send().await.expect("an answer");
    let metrics = metrics.text().await.expect("text");
    let drafted = metrics.lines().find(|line| line.starts_with("altiplano_spec_decode_num_draft_tokens_total{"));
    assert!(drafted.is_some_and(|line| !line.ends_with(" 0")), "{drafted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_comes_back_and_nothing_stays_behind() {
    let mut agent = serve(&[("toy", &toy::path(), ", unload: {policy: Never}")]).await;
    agent.ready("toy", 1).await;
    agent.check("toy").await;
    let workers = children(&agent);
    assert_eq!(workers.len(), 1, "one worker and no other child: {workers:?}");
    kill(workers[0], Signal::KILL);
    agent.says("(WorkerExited)").await;
    let said = agent.said();
    let line = said.lines().find(|line| line.contains("(WorkerExited)")).expect("the restart says why");
    assert!(line.contains("the worker was killed by SIGKILL"), "{line}");
    agent.ready("toy", 2).await;
    agent.check("toy").await;
    let metrics = agent.get("/metrics").await.expect("metrics");
    let restarts = r#"altiplano_worker_restarts_total{model_name="toy",namespace="default"} 1"#;
    assert!(metrics.contains(restarts), "{metrics}");
    assert!(
        metrics.contains(r#"altiplano_model_state{model_name="toy",namespace="default",state="Ready"} 1"#),
        "{metrics}"
    );

    let worker = children(&agent)[0];
    let memory = std::fs::read_to_string(format!("/proc/{}/status", agent.pid().as_raw_nonzero())).expect("status");
    // Its own: the program's pages are the kernel's to drop, and many more without optimisation.
    let own = memory.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    let kib: u64 = own.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 16 * 1024, "the agent takes {kib} KiB:\n{memory}");
    println!("memory of the agent: {} MiB", kib / 1024);

    kill(agent.pid(), Signal::TERM);
    assert!(agent.exited().await.success());
    assert!(!is_alive(worker), "the worker outlives its agent");
    let sockets: Vec<_> =
        std::fs::read_dir(agent.state.join("run")).map(|run| run.flatten().collect()).unwrap_or_default();
    assert!(sockets.is_empty(), "sockets stay behind: {sockets:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_under_way_ends_before_the_agent_does() {
    let mut agent = serve(&[("toy", &toy::path(), "")]).await;
    agent.ready("toy", 1).await;
    let body = json!({
        "model": "toy", "stream": true, "temperature": 0, "max_tokens": 300, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Hello!"}],
    });
    let response = agent.post(&body).await.expect("an answer");
    assert!(response.status().is_success(), "{}", response.status());
    let mut stream = response.bytes_stream();
    let first = stream.next().await.expect("a first part").expect("bytes");
    kill(agent.pid(), Signal::TERM);
    let mut text = String::from_utf8_lossy(&first).into_owned();
    while let Some(part) = stream.next().await {
        text.push_str(&String::from_utf8_lossy(&part.expect("the stream is not cut")));
    }
    assert!(text.trim_end().ends_with("[DONE]"), "the answer is not whole: {text}");
    assert!(text.contains(r#""finish_reason":"length""#), "the answer is not whole: {text}");
    assert!(agent.exited().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_end_with_an_agent_that_is_killed() {
    let mut agent = serve(&[("toy", &toy::path(), "")]).await;
    agent.ready("toy", 1).await;
    agent.until("a spare runner", || async { spare(&agent).is_some() }).await;
    let all = below(agent.pid());
    assert!(all.len() >= 2, "{all:?}");
    kill(agent.pid(), Signal::KILL);
    agent.exited().await;
    for (pid, _) in all {
        gone(pid).await;
    }
}

/// The process that waits for a model.
fn spare(agent: &Agent) -> Option<Pid> {
    let name = |pid: &Pid| std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
    below(agent.pid()).into_iter().map(|(pid, _)| pid).find(|pid| name(pid).trim() == SPARE)
}

/// A wake, or a worker's replacement, does not wait for a process to start; and a spare runner that is killed is no loss.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_takes_the_spare_runner() {
    let agent = serve(&[("toy", &toy::path(), ", unload: {policy: Never}")]).await;
    agent.ready("toy", 1).await;
    agent.until("a spare runner", || async { spare(&agent).is_some() }).await;
    let waits = spare(&agent).expect("it was there");
    let fds = std::fs::read_dir(format!("/proc/{}/fd", waits.as_raw_nonzero())).expect("its files").flatten();
    let devices: Vec<_> = fds
        .filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .filter(|file| file.starts_with("/dev") && !file.starts_with("/dev/null"))
        .collect();
    assert!(devices.is_empty(), "it opens no device: {devices:?}");
    kill(children(&agent)[0], Signal::KILL);
    agent.ready("toy", 2).await;
    assert_eq!(children(&agent), [waits], "it got the model");
    agent.check("toy").await;

    agent.until("another spare runner", || async { spare(&agent).is_some() }).await;
    let another = spare(&agent).expect("it was there");
    kill(another, Signal::KILL);
    gone(another).await;
    kill(waits, Signal::KILL);
    agent.ready("toy", 3).await;
    agent.check("toy").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_wakes_an_unloaded_model() {
    let agent = serve(&[("toy", &toy::path(), ", unload: {policy: AfterRequest, graceSeconds: 1}")]).await;
    agent.ready("toy", 1).await;
    agent.check("toy").await;
    for times in 1..=2 {
        agent.line("default/toy: Unloaded (Idle)", times).await;
        agent.until("the worker ends", || async { children(&agent).is_empty() }).await;
        // The request waits for the model.
        agent.check("toy").await;
    }
}

/// Ollama's `keep_alive`: 0 really ends the worker, by a request of its own or after an answer; the next one wakes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_unloads_a_model_by_keep_alive() {
    let pinned = ", unload: {policy: Never}";
    let agent = serve(&[("toy", &toy::path(), ""), ("pinned", &toy::path(), pinned)]).await;
    agent.ready("toy", 1).await;
    agent.ready("pinned", 1).await;
    let (question, answer) = question();
    let at = |path: &str| format!("http://{}{path}", agent.shared);
    let post = async |path: &str, body: Value| {
        let response = agent.client.post(at(path)).json(&body).timeout(PATIENCE).send().await.expect("an answer");
        (response.status().as_u16(), response.json::<Value>().await.expect("JSON"))
    };
    let loaded = async || {
        let ps: Value = agent.client.get(at("/api/ps")).send().await.expect("an answer").json().await.expect("JSON");
        let names = ps["models"]
            .as_array()
            .expect("models")
            .iter()
            .map(|model| model["name"].as_str().unwrap_or_default().to_owned());
        names.collect::<Vec<_>>()
    };
    let unloaded = async |nth| {
        agent.line("default/toy: Unloaded (Idle)", nth).await;
        agent.until("the worker ends", || async { children(&agent).len() == 1 }).await;
        assert_eq!(loaded().await, ["pinned:latest"]);
    };
    let tags: Value = agent.client.get(at("/api/tags")).send().await.expect("an answer").json().await.expect("JSON");
    assert_eq!(tags["models"].as_array().map(Vec::len), Some(2), "{tags}");
    assert!(tags["models"][1]["size"].as_u64() > Some(0), "{tags}");

    let ask = |more: Value| {
        let mut body = json!({"model": "toy", "stream": false, "options": {"temperature": 0},
                              "messages": [{"role": "user", "content": question}]});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        body
    };
    let (status, said) = post("/api/chat", ask(json!({"keep_alive": 0}))).await;
    assert_eq!((status, said["message"]["content"].as_str()), (200, Some(answer.as_str())));
    unloaded(1).await;
    // What was said was for that worker: this one stays until it is told to go.
    let (status, said) = post("/api/chat", ask(json!({}))).await;
    assert_eq!((status, said["message"]["content"].as_str()), (200, Some(answer.as_str())));
    let times = |name: &str| said[name].as_u64().unwrap_or_default();
    assert!(times("load_duration") > 1_000_000 && times("total_duration") > times("load_duration"), "{said}");
    assert_eq!(loaded().await, ["pinned:latest", "toy:latest"]);
    let (status, said) = post("/api/generate", json!({"model": "toy:latest", "keep_alive": "0"})).await;
    assert_eq!((status, said["done_reason"].as_str()), (200, Some("unload")));
    unloaded(2).await;

    let (status, said) = post("/api/chat", ask(json!({"model": "pinned", "keep_alive": 0}))).await;
    assert_eq!((status, said["message"]["content"].as_str()), (200, Some(answer.as_str())));
    let (status, said) = post("/api/generate", json!({"model": "pinned", "keep_alive": 0})).await;
    assert!(status == 403 && said["error"].as_str().is_some_and(|error| error.contains("kubectl")), "{said}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(loaded().await, ["pinned:latest"], "what the ModelDeployment pins, no client unpins");
}

/// The agent of a node whose API server is away since before it started.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_cut_off_serves_what_it_was_last_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let kubeconfig = folder.path().join("kubeconfig");
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: c, user: u}}}}], \
         users: [{{name: u, user: {{token: t}}}}], \
         clusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]}}",
        // Nobody listens there.
        free_address()
    );
    std::fs::write(&kubeconfig, text).expect("the file is written");
    let state = folder.path().join("state");
    std::fs::create_dir_all(&state).expect("a folder");
    let toy = toy::path();
    let told = json!([{
        "uid": "u1", "revision": "r1", "generation": 1, "namespace": "default", "name": "toy", "servedName": "toy",
        "model": {"source": {"uri": format!("file://{}", toy.display())}},
    }]);
    std::fs::write(state.join("assignments-n1.json"), told.to_string()).expect("the file is written");
    let shared = free_address();
    let mut command = command();
    command
        .args(["node", "--node-name", "n1", "--pod-name", "p", "--pod-uid", "u", "--address", "127.0.0.1"])
        .args(["--listen", &shared.to_string(), "--file-root"])
        .arg(toy.parent().expect("a folder"))
        .arg("--state-dir")
        .arg(&state)
        .env("KUBECONFIG", &kubeconfig);
    // And whose port somebody else still has.
    let other = std::net::TcpListener::bind(shared).expect("the port");
    let mut agent = Agent::spawn(&mut command, shared, folder);
    agent.until("it waits for the port", || async { agent.log().contains("listens on the shared port") }).await;
    drop(other);
    agent.takes_requests().await;
    agent.check("toy").await;
    kill(agent.pid(), Signal::TERM);
    assert!(agent.exited().await.success(), "it ends in good order with no API server to tell");
}

#[test]
fn a_file_with_mistakes_is_refused_with_their_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("bad.yaml");
    let yaml = "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: toy}\n\
                spec: {replica: 2, context: {parallel: 0}, model: {source: {uri: 'file:///toy.gguf'}}}\n";
    std::fs::write(&file, yaml).expect("the file is written");
    let output = command().arg("serve").arg(&file).output().expect("the agent runs");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{log}");
    for expected in ["bad.yaml", "'replica' was unexpected", "spec.context.parallel"] {
        assert!(log.contains(expected), "no {expected:?} in: {log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn short_questions_are_answered_by_children_that_end() {
    let runner = Runner::of(env!("CARGO_BIN_EXE_altiplano-agent").into());
    let probe = runner.probe(PATIENCE).await.expect("a probe");
    assert!(probe.devices.iter().any(|device| device.kind == "CPU" && device.memory_total_bytes > 0), "{probe:?}");

    let config = |model_path: PathBuf| RunnerConfig { model_path, threads: 1, ..RunnerConfig::default() };
    let estimate = runner.estimate(&config(toy::path()), PATIENCE).await.expect("an estimate");
    let size = std::fs::metadata(toy::path()).expect("the toy model").len();
    let bytes: u64 = estimate.memory.iter().map(altiplano_agent::runner::protocol::MemoryUse::total).sum();
    assert!(bytes > size, "{bytes} for a file of {size}: {estimate:?}");

    let missing = runner.estimate(&config("/nonexistent.gguf".into()), PATIENCE).await;
    assert!(matches!(missing, Err(SpawnError::Refused(_))), "{missing:?}");
    let quick = runner.estimate(&config(toy::path()), Duration::from_millis(1)).await;
    assert!(matches!(quick, Err(SpawnError::TimedOut(_))), "{quick:?}");
}

/// `altiplano-agent chat`: the prompt as an argument or on standard input, the only model by default.
#[tokio::test(flavor = "multi_thread")]
async fn the_chat_client_shows_answers_and_timings() {
    let agent = serve(&[("toy", &toy::path(), "")]).await;
    agent.ready("toy", 1).await;
    let (question, answer) = question();
    let url = format!("http://{}", agent.shared);
    let chat = |arguments: &[&str], input: &str| {
        let mut child = command()
            .args(["chat", "--url", &url, "--temperature", "0"])
            .args(arguments)
            .env("NO_PROXY", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the client starts");
        let mut stdin = child.stdin.take().expect("standard input");
        // A client that refuses its arguments does not read.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().expect("the client ends");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let said = format!("{answer}\n");
    let (code, stdout, stderr) = chat(&["--verbose", &question], "");
    assert_eq!((code, &stdout), (Some(0), &said), "{stderr}");
    assert!(stderr.contains("time to first token ") && !stderr.contains('?'), "{stderr}");
    let (code, stdout, stderr) = chat(&["--model", "default/toy"], &question);
    assert_eq!((code, stdout, stderr.as_str()), (Some(0), said, ""));
    let (code, stdout, stderr) = chat(&["--model", "other", "hello"], "");
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("404") && stderr.contains("other"), "{stderr}");
}
