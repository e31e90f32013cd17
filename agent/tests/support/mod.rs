//! The agent as a user runs it, for tests that look at its processes.
#![allow(dead_code, reason = "each suite uses a part")]
#![allow(unreachable_pub, reason = "suites are crates that nobody uses")]
#![allow(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

pub mod device;
pub mod gpu;
#[path = "../../../tests/src/ports.rs"]
mod ports;
mod traffic;
mod wait;

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use altiplano_agent::runner::spare::RUNNER;
use altiplano_test_models::toy;
use altiplano_test_vulkan_accounts::Accounts;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

#[allow(unused_imports, reason = "two suites use it")]
pub use traffic::traffic;
#[allow(unused_imports, reason = "some suites use it")]
pub use wait::{PATIENCE, until, within};

const BINARY: &str = env!("CARGO_BIN_EXE_altiplano-agent");

/// A model to serve: name, GGUF file, more of its spec.
pub type Model<'a> = (&'a str, &'a Path, &'a str);

/// An agent that is killed, with everything below it, when the test ends.
pub struct Agent {
    pub child: Child,
    pub shared: SocketAddr,
    pub client: reqwest::Client,
    pub state: PathBuf,
    log: PathBuf,
    said: PathBuf,
    /// The account of its device, where that is its own.
    accounts: Option<Accounts>,
    _folder: TempDir,
}

impl Agent {
    /// Starts `prefix… altiplano-agent role… FILE options…`, and waits until it is ready.
    pub async fn start(
        prefix: &[&str],
        role: &[&str],
        models: &[Model<'_>],
        options: &[&str],
        env: &[(&str, &str)],
    ) -> Self {
        let yaml: Vec<String> = models
            .iter()
            .map(|(name, path, more)| deployment(name, &format!("{{source: {}}}{more}", source(path))))
            .collect();
        Self::start_yaml(prefix, role, &yaml, options, env).await
    }

    /// The same with these `ModelDeployment`s. A port that was free a moment ago is used, so that an agent that is started
    /// again has it too.
    pub async fn start_yaml(
        prefix: &[&str],
        role: &[&str],
        yaml: &[String],
        options: &[&str],
        env: &[(&str, &str)],
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("models.yaml");
        std::fs::write(&file, yaml.join("---\n")).expect("the file is written");
        let words: Vec<&str> = prefix.iter().copied().chain([BINARY]).chain(role.iter().copied()).collect();
        let shared = free_address();
        let mut command = clean(Command::new(words[0]));
        command
            .args(&words[1..])
            .arg(&file)
            .args(["--listen", &shared.to_string(), "--state-dir"])
            .arg(folder.path().join("state"))
            .args(options)
            .envs(env.iter().copied());
        let agent = Self::spawn(&mut command, shared, folder);
        agent.takes_requests().await;
        agent
    }

    /// Starts this command, which listens on `shared` and keeps its state in `state` of the folder. What it leaves in the
    /// temporary directory goes with the folder.
    pub fn spawn(command: &mut Command, shared: SocketAddr, folder: TempDir) -> Self {
        let (state, log, said) = (folder.path().join("state"), folder.path().join("log"), folder.path().join("said"));
        let child = command
            .env("TMPDIR", folder.path())
            .stdout(File::create(&said).expect("a file"))
            .stderr(File::create(&log).expect("a file"))
            .stdin(Stdio::null())
            .spawn()
            .expect("the agent starts");
        // Every test installs it; the first one counts.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { child, shared, client, state, log, said, accounts: None, _folder: folder }
    }

    /// Waits until it answers at all.
    pub async fn answers(&self) {
        self.until("it answers", || async { self.get("/healthz").await.is_some() }).await;
    }

    /// Waits until it is ready. A Pod gets its first request then; before it a model may not be known yet.
    pub async fn takes_requests(&self) {
        self.until("it is ready", || async { self.get("/readyz").await.is_some() }).await;
    }

    pub async fn get(&self, path: &str) -> Option<String> {
        let url = format!("http://{}{path}", self.shared);
        let response = self.client.get(url).timeout(PATIENCE / 4).send().await.ok()?;
        if response.status().is_success() { response.text().await.ok() } else { None }
    }

    /// Waits until it is so.
    pub async fn until<F: Future<Output = bool>>(&self, what: &str, is_so: impl Fn() -> F) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so().await {
            assert!(Instant::now() < deadline, "waited for: {what}; {}", self.story());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What it said on standard output.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap_or_default()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn story(&self) -> String {
        format!("it said:\n{}\nand logged:\n{}", self.said(), self.log())
    }

    /// Waits for a line on standard output.
    pub async fn says(&self, words: &str) {
        self.until(words, || async { self.said().contains(words) }).await;
    }

    /// Waits for the nth line on standard output that begins so.
    pub async fn line(&self, beginning: &str, nth: usize) -> String {
        let find = || self.said().lines().filter(|line| line.starts_with(beginning)).nth(nth - 1).map(str::to_owned);
        self.until(beginning, || async { find().is_some() }).await;
        find().expect("it was there")
    }

    /// Waits until a model of the namespace `default` is Ready for the nth time.
    pub async fn ready(&self, name: &str, nth: usize) -> String {
        self.line(&format!("default/{name}: Ready as"), nth).await
    }

    /// Its shared port, which serves all models.
    pub fn base(&self) -> String {
        format!("http://{}", self.shared)
    }

    /// Sends a chat request as it is.
    pub async fn post(&self, body: &Value) -> reqwest::Result<reqwest::Response> {
        self.post_at(&self.base(), body).await
    }

    /// The same, to another port of it.
    pub async fn post_at(&self, base: &str, body: &Value) -> reqwest::Result<reqwest::Response> {
        self.client.post(format!("{base}/v1/chat/completions")).json(body).timeout(PATIENCE).send().await
    }

    /// The answer and its status.
    pub async fn ask(&self, model: &str, question: &str) -> (u16, Value) {
        self.ask_at(&self.base(), model, question).await
    }

    /// The same, at another port of it.
    pub async fn ask_at(&self, base: &str, model: &str, question: &str) -> (u16, Value) {
        let response = self.post_at(base, &chat(model, question)).await;
        let response = response.unwrap_or_else(|error| panic!("{error:?}; {}", self.story()));
        (response.status().as_u16(), response.json().await.unwrap_or_else(|error| panic!("{error}; {}", self.story())))
    }

    /// Asks a question whose answer is known.
    pub async fn check(&self, model: &str) {
        self.check_at(&self.base(), model).await;
    }

    /// The same, at another port of it.
    pub async fn check_at(&self, base: &str, model: &str) {
        let (question, expected) = question();
        let (status, answer) = self.ask_at(base, model, &question).await;
        assert_eq!(status, 200, "{answer}; {}", self.story());
        assert_eq!(answer["choices"][0]["message"]["content"], expected, "{answer}");
    }

    /// One number of its metrics; 0 where it has not counted yet.
    pub async fn metric(&self, name: &str, labels: &str) -> f64 {
        let text = self.get("/metrics").await.unwrap_or_else(|| panic!("no metrics; {}", self.story()));
        let mut lines = text.lines().filter(|line| line.starts_with(name) && line.contains(labels));
        lines.next().and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub async fn exited(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end; {}", self.story());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let below = below(self.pid());
        let _ = self.child.kill();
        let _ = self.child.wait();
        // They end by themselves; until then they hold the memory, the files and the ports that the next agent wants.
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && below.iter().any(|(pid, _)| is_alive(*pid)) {
            std::thread::sleep(Duration::from_millis(2));
        }
        for (pid, _) in below {
            // Gone meanwhile is as good.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// A `ModelDeployment` with this `spec.model`, and what follows it in the spec.
pub fn deployment(name: &str, model: &str) -> String {
    format!(
        "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: {name}}}\nspec: {{model: {model}}}\n"
    )
}

/// A file as a model's source.
pub fn source(path: &Path) -> String {
    format!("{{uri: 'file://{}'}}", path.display())
}

/// An address on loopback that nobody else listens on or is given.
pub fn free_address() -> SocketAddr {
    ports::free_address().expect("a port")
}

/// The agent's command, free of what this shell sets.
pub fn command() -> Command {
    clean(Command::new(BINARY))
}

fn clean(mut command: Command) -> Command {
    command.env_remove("ALTIPLANO_LISTEN").env_remove("GGML_VK_VISIBLE_DEVICES").env("ALTIPLANO_LOG", "info");
    command
}

/// A request for a whole answer.
pub fn chat(model: &str, question: &str) -> Value {
    json!({"model": model, "temperature": 0, "messages": [{"role": "user", "content": question}]})
}

/// A question and what the toy model answers.
pub fn question() -> (String, String) {
    let question = toy::questions().into_iter().find(|question| question.messages.len() == 1).expect("a question");
    (question.messages[0].content.clone(), question.answer)
}

/// All processes below `pid` with their command lines, zombies left out.
pub fn below(pid: Pid) -> Vec<(Pid, String)> {
    let mut all: Vec<(i32, i32)> = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name, in parentheses, may hold spaces.
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let mut fields = rest.split(' ');
        let (state, parent) = (fields.next(), fields.next().and_then(|parent| parent.parse().ok()));
        if let (Some(state), Some(parent)) = (state, parent)
            && state != "Z"
        {
            all.push((number, parent));
        }
    }
    let mut found = vec![pid.as_raw_nonzero().get()];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(all.iter().filter(|(_, of)| *of == parent).map(|(number, _)| *number));
        next += 1;
    }
    let command = |number: i32| {
        let bytes = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\0', " ")
    };
    found.into_iter().skip(1).filter_map(|number| Some((Pid::from_raw(number)?, command(number)))).collect()
}

/// The processes below `pid` that have a model, or are about to: a spare one has another name.
pub fn workers(pid: Pid) -> Vec<Pid> {
    let is_worker = |pid: &Pid| {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
        name.trim() == RUNNER
    };
    below(pid).into_iter().map(|(pid, _)| pid).filter(is_worker).collect()
}

/// The process below `pid` that is the agent itself.
pub fn agent_process(pid: Pid) -> Option<Pid> {
    let is_agent =
        |command: &str| command.contains(" serve ") && !command.contains(" init ") && !command.contains("unshare");
    below(pid).into_iter().find(|(_, command)| is_agent(command)).map(|(pid, _)| pid)
}

pub fn is_alive(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

pub fn kill(pid: Pid, signal: Signal) {
    kill_process(pid, signal).expect("the signal is sent");
}

pub async fn gone(pid: Pid) {
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid:?} is still there");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
