//! `altiplano-agent serve` as a user runs it: the real binary, real llama.cpp, real HTTP.

#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use altiplano_agent::runner::protocol::RunnerConfig;
use altiplano_agent::runner::spawn::{Runner, SpawnError};
use altiplano_test_models::{BadFile, Lora, Spec, toy};
use futures::StreamExt as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest wait for anything; what is usual here is a hundredth of it.
const PATIENCE: Duration = Duration::from_mins(2);

/// An agent that is killed when the test ends.
struct Agent {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    shared: SocketAddr,
    state: PathBuf,
    client: reqwest::Client,
    _folder: TempDir,
}

impl Agent {
    /// Starts with models (name, GGUF file, more of the spec).
    async fn serve(models: &[(&str, &Path, &str)]) -> Self {
        let yaml: Vec<String> = models
            .iter()
            .map(|(name, path, more)| {
                format!(
                    "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: {name}}}\n\
                     spec: {{model: {{source: {{uri: 'file://{}'}}}}{more}}}\n",
                    path.display()
                )
            })
            .collect();
        Self::serve_yaml(&yaml).await
    }

    /// Starts with these `ModelDeployment`s.
    async fn serve_yaml(yaml: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("models.yaml");
        std::fs::write(&file, yaml.join("---\n")).expect("the file is written");
        let state = folder.path().join("state");
        let mut child = command()
            .arg("serve")
            .arg(&file)
            .args(["--listen", "127.0.0.1:0", "--drain-seconds", "60", "--state-dir"])
            .arg(&state)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the agent starts");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let stdout = child.stdout.take().expect("standard output");
        let into = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                into.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        let client = client();
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut agent = Self { child, lines, shared: nowhere, state, client, _folder: folder };
        let line = agent.line("it listens", |line| line.starts_with("listening on ")).await;
        let address = line.trim_start_matches("listening on http://").trim_end_matches("/v1");
        agent.shared = address.parse().expect("an address");
        agent
    }

    fn said(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first line that is so.
    async fn line(&self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        self.nth_line(what, 1, is_so).await
    }

    async fn nth_line(&self, what: &str, nth: usize, is_so: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.said().iter().filter(|line| is_so(line)).nth(nth - 1) {
                return line.clone();
            }
            assert!(Instant::now() < deadline, "waited for: {what}; the agent said:\n{}", self.said().join("\n"));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn ready(&self, name: &str, nth: usize) -> String {
        let start = format!("default/{name}: Ready as");
        self.nth_line(&format!("{name} is ready"), nth, |line| line.starts_with(&start)).await
    }

    fn chat_at(&self, base: &str, body: &Value) -> reqwest::RequestBuilder {
        self.client.post(format!("{base}/v1/chat/completions")).json(body).timeout(PATIENCE)
    }

    /// The model's whole answer over the shared port.
    async fn ask(&self, model: &str, question: &str) -> String {
        self.ask_at(&format!("http://{}", self.shared), model, question).await
    }

    async fn ask_at(&self, base: &str, model: &str, question: &str) -> String {
        let body = json!({
            "model": model, "temperature": 0, "messages": [{"role": "user", "content": question}],
        });
        let response = self.chat_at(base, &body).send().await.expect("an answer");
        let status = response.status();
        let answer: Value = response.json().await.expect("JSON");
        assert!(status.is_success(), "{status}: {answer}");
        answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no content: {answer}")).to_owned()
    }

    async fn metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.shared);
        self.client.get(url).send().await.expect("metrics").text().await.expect("text")
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a signal");
    }

    async fn exited(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end; it said:\n{}", self.said().join("\n"));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn client() -> reqwest::Client {
    // Every test installs it; the first one counts.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().expect("a client")
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_altiplano-agent"));
    command.env_remove("ALTIPLANO_LISTEN").env("ALTIPLANO_LOG", "info");
    command
}

/// Processes whose parent is `pid`.
fn children(pid: Pid) -> Vec<Pid> {
    let parent = pid.as_raw_nonzero().to_string();
    std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name, in parentheses, may hold spaces.
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let (state, of) = (fields.next()?, fields.next()?);
            (of == parent && state != "Z").then(|| Pid::from_raw(number))?
        })
        .collect()
}

fn is_alive(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

async fn gone(pid: Pid) {
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid:?} is still there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A question and what the toy model answers.
fn question() -> (String, String) {
    let question = toy::questions().into_iter().find(|question| question.messages.len() == 1).expect("a question");
    (question.messages[0].content.clone(), question.answer)
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
    let mut agent = Agent::serve(&[
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
    let (question, answer) = question();
    assert_eq!(agent.ask("toy", &question).await, answer);
    assert_eq!(agent.ask("default/toy", &question).await, answer);
    let alone = ready.split("alone at ").nth(1).and_then(|rest| rest.split("/v1").next()).expect("its own port");
    assert_eq!(agent.ask_at(alone, "toy", &question).await, answer);
    let other = agent.chat_at(alone, &json!({"model": "missing", "messages": []})).send().await.expect("an answer");
    assert_eq!(other.status(), 404, "a model's own port serves that model only");

    for (name, reason) in [("missing", "FileNotFound"), ("needs-gpu", "GPURequired")] {
        let start = format!("default/{name}: Failed ({reason}): ");
        agent.line(&start, |line| line.starts_with(&start)).await;
    }
    for name in ["not-gguf", "truncated", "unknown", "deadly"] {
        let start = format!("default/{name}: Failed (");
        let line = agent.line(&start, |line| line.starts_with(&start)).await;
        assert!(line.len() > start.len() + 20, "it says nothing: {line}");
    }
    // A file that comes later is found.
    std::fs::copy(&toy, &missing).expect("a copy");
    agent.ready("missing", 1).await;
    assert_eq!(agent.ask("missing", &question).await, answer);
    assert_eq!(agent.ask("toy", &question).await, answer);

    agent.signal(Signal::TERM);
    assert!(agent.exited().await.success(), "a graceful end is a success");
}

/// Fetched with the model, loaded with it, asked for by name on the shared port.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_served_with_its_adapters() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("odd.gguf");
    Lora { strength: 3.0, ..Lora::of_toy() }.write(&path).expect("an adapter");
    let model = format!(
        "{{source: {{uri: 'file://{}'}}, adapters: [{{name: odd, source: {{uri: 'file://{}'}}}}, \
         {{name: nothing, scalePercent: 0, source: {{uri: 'file://{}'}}}}]}}",
        toy::path().display(),
        path.display(),
        path.display()
    );
    let agent = Agent::serve_yaml(&[format!(
        "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: toy}}\nspec: {{model: {model}}}\n"
    )])
    .await;
    agent.ready("toy", 1).await;
    let (question, answer) = question();
    assert_eq!(agent.ask("toy", &question).await, answer);
    assert_eq!(agent.ask("toy:nothing", &question).await, answer);
    assert_ne!(agent.ask("default/toy:odd", &question).await, answer);
    assert_eq!(agent.ask("toy", &question).await, answer);
    let models = agent.client.get(format!("http://{}/v1/models", agent.shared)).send().await.expect("an answer");
    let models: Value = models.json().await.expect("JSON");
    let ids: Vec<_> = models["data"].as_array().expect("models").iter().map(|model| model["id"].as_str()).collect();
    assert_eq!(ids, [Some("toy"), Some("toy:odd"), Some("toy:nothing")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_comes_back_and_nothing_stays_behind() {
    let mut agent = Agent::serve(&[("toy", &toy::path(), ", unload: {policy: Never}")]).await;
    agent.ready("toy", 1).await;
    let (question, answer) = question();
    assert_eq!(agent.ask("toy", &question).await, answer);
    let workers = children(agent.pid());
    assert_eq!(workers.len(), 1, "one worker and no other child: {workers:?}");
    kill_process(workers[0], Signal::KILL).expect("a signal");
    let line = agent.line("the restart says why", |line| line.contains("(WorkerExited)")).await;
    assert!(line.contains("the worker was killed by SIGKILL"), "{line}");
    agent.ready("toy", 2).await;
    assert_eq!(agent.ask("toy", &question).await, answer);
    let metrics = agent.metrics().await;
    let restarts = r#"altiplano_worker_restarts_total{model_name="toy",namespace="default"} 1"#;
    assert!(metrics.contains(restarts), "{metrics}");
    assert!(
        metrics.contains(r#"altiplano_model_state{model_name="toy",namespace="default",state="Ready"} 1"#),
        "{metrics}"
    );

    let worker = children(agent.pid())[0];
    let memory = std::fs::read_to_string(format!("/proc/{}/status", agent.pid().as_raw_nonzero())).expect("status");
    let resident = memory.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(kib < 60 * 1024, "the agent takes {kib} KiB:\n{memory}");
    println!("resident memory of the agent: {} MiB", kib / 1024);

    agent.signal(Signal::TERM);
    assert!(agent.exited().await.success());
    assert!(!is_alive(worker), "the worker outlives its agent");
    let sockets: Vec<_> =
        std::fs::read_dir(agent.state.join("run")).map(|run| run.flatten().collect()).unwrap_or_default();
    assert!(sockets.is_empty(), "sockets stay behind: {sockets:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_under_way_ends_before_the_agent_does() {
    let mut agent = Agent::serve(&[("toy", &toy::path(), "")]).await;
    agent.ready("toy", 1).await;
    let body = json!({
        "model": "toy", "stream": true, "temperature": 0, "max_tokens": 300, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Hello!"}],
    });
    let base = format!("http://{}", agent.shared);
    let response = agent.chat_at(&base, &body).send().await.expect("an answer");
    assert!(response.status().is_success(), "{}", response.status());
    let mut stream = response.bytes_stream();
    let first = stream.next().await.expect("a first part").expect("bytes");
    agent.signal(Signal::TERM);
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
    let mut agent = Agent::serve(&[("toy", &toy::path(), "")]).await;
    agent.ready("toy", 1).await;
    let workers = children(agent.pid());
    assert_eq!(workers.len(), 1);
    agent.signal(Signal::KILL);
    agent.exited().await;
    gone(workers[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_wakes_an_unloaded_model() {
    let agent = Agent::serve(&[("toy", &toy::path(), ", unload: {policy: AfterRequest, graceSeconds: 1}")]).await;
    agent.ready("toy", 1).await;
    let (question, answer) = question();
    assert_eq!(agent.ask("toy", &question).await, answer);
    for times in 1..=2 {
        agent.nth_line("it is unloaded", times, |line| line.starts_with("default/toy: Unloaded (Idle)")).await;
        let deadline = Instant::now() + PATIENCE;
        while !children(agent.pid()).is_empty() {
            assert!(Instant::now() < deadline, "the worker of an unloaded model stays");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(agent.ask("toy", &question).await, answer, "the request waits for the model");
    }
}

/// Ollama's `keep_alive`: 0 really ends the worker, by a request of its own or after an answer; the next one wakes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_unloads_a_model_by_keep_alive() {
    let pinned = ", unload: {policy: Never}";
    let agent = Agent::serve(&[("toy", &toy::path(), ""), ("pinned", &toy::path(), pinned)]).await;
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
        agent.nth_line("toy is unloaded", nth, |line| line.starts_with("default/toy: Unloaded (Idle)")).await;
        let deadline = Instant::now() + PATIENCE;
        while children(agent.pid()).len() > 1 {
            assert!(Instant::now() < deadline, "the worker of an unloaded model stays");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
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
    // A port that nobody listens on: it was free a moment ago.
    let port = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("an address").port()
    };
    let kubeconfig = folder.path().join("kubeconfig");
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: c, user: u}}}}], \
         users: [{{name: u, user: {{token: t}}}}], \
         clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{}'}}}}]}}",
        port()
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
    let shared = SocketAddr::from(([127, 0, 0, 1], port()));
    let child = command()
        .args(["node", "--node-name", "n1", "--pod-name", "p", "--pod-uid", "u", "--address", "127.0.0.1"])
        .args(["--listen", &shared.to_string(), "--file-root"])
        .arg(toy.parent().expect("a folder"))
        .arg("--state-dir")
        .arg(&state)
        .env("KUBECONFIG", &kubeconfig)
        .spawn()
        .expect("the agent starts");
    let client = client();
    let mut agent = Agent { child, lines: Arc::default(), shared, state, client, _folder: folder };
    let deadline = Instant::now() + PATIENCE;
    let url = format!("http://{shared}/readyz");
    loop {
        let answer = agent.client.get(&url).send().await;
        if answer.as_ref().is_ok_and(|answer| answer.status().is_success()) {
            break;
        }
        assert!(Instant::now() < deadline, "the agent is not ready: {answer:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (question, answer) = question();
    assert_eq!(agent.ask("toy", &question).await, answer);
    agent.signal(Signal::TERM);
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
    let agent = Agent::serve(&[("toy", &toy::path(), "")]).await;
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
