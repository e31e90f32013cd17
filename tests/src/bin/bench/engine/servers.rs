//! Ours and theirs, started alike.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use altiplano_test_models::Spec;
use altiplano_tests::{Proc, free_address, http, is_worker, program, sandbox, wait_for};
use anyhow::{Context as _, Result, bail, ensure};

use serde_json::Value;

const START: Duration = Duration::from_mins(1);

/// A generated file.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) vocabulary: u32,
    /// YAML of our deployment: what follows the source in `spec.model`, and what follows the first field of `spec.engine`.
    pub(crate) files: String,
    pub(crate) engine: String,
}

impl Model {
    pub(crate) fn write(dir: &Path, name: &str, spec: &Spec) -> Result<Self> {
        let path = dir.join(format!("{name}.gguf"));
        spec.write(&path).with_context(|| format!("could not write {}", path.display()))?;
        let (files, engine) = (String::new(), String::new());
        Ok(Self { name: name.to_owned(), path, vocabulary: spec.vocab, files, engine })
    }
}

/// A server that answers.
pub(crate) struct Server {
    /// What it is, for the table.
    pub(crate) name: String,
    /// Altiplano, or the peer.
    pub(crate) is_ours: bool,
    pub(crate) address: SocketAddr,
    pub(crate) model: String,
    pub(crate) proc: Proc,
}

impl Server {
    /// The process that has the model.
    pub(crate) fn worker(&self) -> Result<u32> {
        if !self.is_ours {
            return Ok(self.proc.pid());
        }
        self.workers().first().copied().context("no worker runs")
    }

    /// The processes that have models; a spare one has another name.
    pub(crate) fn workers(&self) -> Vec<u32> {
        self.proc.processes().into_iter().filter(|pid| is_worker(*pid)).collect()
    }

    /// The agent's process, which may be below `init`.
    pub(crate) fn agent(&self) -> Result<u32> {
        let is_agent = |pid: &u32| role(*pid).is_some_and(|role| role == "serve");
        self.proc.processes().into_iter().find(is_agent).context("no agent runs")
    }

    /// Waits until its log has these words so many times.
    pub(crate) async fn logs(&mut self, times: usize, words: &str) -> Result<()> {
        wait_for(format!("{words:?}, {times} times"), START, || {
            let said = self.proc.assert_running().map(|()| self.proc.log());
            std::future::ready(match said {
                Ok(log) if log.matches(words).count() >= times => Ok(()),
                Ok(_) => Err(anyhow::anyhow!("{}", self.proc.log_tail())),
                Err(error) => Err(error),
            })
        })
        .await
    }
}

/// What `altiplano-agent` was started as.
fn role(pid: u32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    line.split(|byte| *byte == 0).nth(1).map(|word| String::from_utf8_lossy(word).into_owned())
}

/// How many threads both compute with: the machine's cores, as the agent does by itself.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What `altiplano-agent runner FLAG` prints for this question.
pub(crate) fn runner(flag: &str, question: &Value) -> Result<Value> {
    let mut child = Command::new(program("altiplano-agent")?)
        .args(["runner", flag])
        .env("ALTIPLANO_LOG", "warn")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    writeln!(child.stdin.take().context("no standard input")?, "{question}")?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "runner {flag} failed: {said}");
    serde_json::from_str(&said).with_context(|| format!("{said:?} is no report"))
}

/// Altiplano, its whole path, with the model loaded for good. `context` is the YAML of `spec.context`.
pub(crate) async fn ours(model: &Model, context: &str) -> Result<Server> {
    let spec = format!("context: {context}\n  unload: {{policy: Never}}");
    let mut server = serve(&["serve"], &[(model, &spec)], &[]).await?;
    server.name = format!("ours, {context}");
    server.logs(1, ": Ready as ").await?;
    Ok(server)
}

/// `altiplano-agent ROLE… FILE ARGUMENTS…`, with these models and the rest of their specs, on the CPU. It answers; its models
/// may be on their way. The first one is asked.
pub(crate) async fn serve(role: &[&str], models: &[(&Model, &str)], arguments: &[&str]) -> Result<Server> {
    let dir = sandbox::subdir("serve")?;
    let file = dir.join("models.yaml");
    let deployments: Vec<String> = models
        .iter()
        .map(|(Model { name, path, files, engine, .. }, spec)| {
            format!(
                "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: {name}}}\n\
                 spec:\n  model: {{source: {{uri: 'file://{}'}}{files}}}\n  {spec}\n  engine: {{gpu: Never{engine}}}\n\
                 \x20 traffic: {{requestTimeoutSeconds: 3600}}\n",
                path.display()
            )
        })
        .collect();
    std::fs::write(&file, deployments.join("---\n"))?;
    let address = free_address()?;
    let mut command = Command::new(program("altiplano-agent")?);
    command
        .args(role)
        .arg(&file)
        .args(["--listen", &address.to_string(), "--state-dir"])
        .arg(dir.join("state"))
        .args(arguments)
        .env("ALTIPLANO_LOG", "info");
    let proc = Proc::start("altiplano", command)?;
    let model = models.first().map(|(model, _)| model.name.clone()).unwrap_or_default();
    let mut server = Server { name: "ours".to_owned(), is_ours: true, address, model, proc };
    server.logs(1, "listening on ").await?;
    Ok(server)
}

/// llama-server with `cells` of context and more arguments.
pub(crate) async fn theirs(model: &Model, cells: usize, arguments: &[&str]) -> Result<Server> {
    let address = free_address()?;
    let threads = threads().to_string();
    let mut command = Command::new(peer("llama-server")?);
    command
        .arg("--model")
        .arg(&model.path)
        .args(["--alias", &model.name, "--host", "127.0.0.1", "--port", &address.port().to_string()])
        .args(["--threads", &threads, "--threads-batch", &threads, "--ctx-size", &cells.to_string()])
        .args(arguments);
    let mut proc = Proc::start("llama-server", command)?;
    let client = http()?;
    let mut ended = Ok(());
    wait_for("llama-server's /health", START, || {
        ended = proc.assert_running();
        let gone = ended.is_err();
        let asked = client.get(format!("http://{address}/health")).send();
        async move {
            if gone {
                return Ok(());
            }
            match asked.await {
                Ok(response) if response.status().is_success() => Ok(()),
                Ok(response) => Err(response.status().to_string()),
                Err(error) => Err(error.to_string()),
            }
        }
    })
    .await?;
    ended?;
    let name = if arguments.is_empty() { "default".to_owned() } else { arguments.join(" ") };
    Ok(Server { name: format!("llama-server {name}"), is_ours: false, address, model: model.name.clone(), proc })
}

/// The three settings of llama-server that a fair comparison takes the best of.
pub(crate) async fn peers(model: &Model, parallel: usize, cells: usize) -> Result<Vec<Server>> {
    let number = parallel.to_string();
    Ok(vec![
        theirs(model, cells, &[]).await?,
        theirs(model, cells, &["-np", &number, "-kvu"]).await?,
        theirs(model, cells, &["-np", &number, "--no-kv-unified"]).await?,
    ])
}

/// Tokens a second that llama-bench generates at this depth.
pub(crate) async fn llama_bench(model: &Model, depth: usize, generate: u32) -> Result<f64> {
    let output = tokio::process::Command::new(peer("llama-bench")?)
        .arg("--model")
        .arg(&model.path)
        .args(["--threads", &threads().to_string(), "--n-prompt", "0", "--n-gen", &generate.to_string()])
        .args(["--n-depth", &depth.to_string(), "--repetitions", "1", "--output", "json"])
        .output()
        .await?;
    if !output.status.success() {
        bail!("llama-bench: {}", String::from_utf8_lossy(&output.stderr));
    }
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("llama-bench's JSON")?;
    report.pointer("/0/avg_ts").and_then(serde_json::Value::as_f64).context("llama-bench without avg_ts")
}

/// The version that set-up has built.
pub(crate) fn version() -> Result<String> {
    let version = std::fs::read_to_string(peer("VERSION")?)?;
    ensure!(!version.trim().is_empty(), "llama-server's VERSION is empty");
    Ok(version.trim().to_owned())
}

/// The version of llama.cpp that the agent was built with: its source is named where it was built.
pub(crate) fn our_version() -> Result<String> {
    let builds = xtask::target_dir().join("debug/build");
    let caches = std::fs::read_dir(&builds)?
        .map_while(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("llama-cpp-sys-2-"))
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("out/build/CMakeCache.txt")).ok());
    let source = |cache: &str| {
        cache.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL=").map(PathBuf::from))
    };
    let versions: std::collections::BTreeSet<String> =
        caches.filter_map(|cache| xtask::llama_cpp_version(&source(&cache)?)).collect();
    ensure!(!versions.is_empty(), "no build of llama.cpp under {}", builds.display());
    Ok(versions.into_iter().collect::<Vec<_>>().join(" or "))
}

/// A program that set-up has built.
pub(crate) fn peer(name: &str) -> Result<PathBuf> {
    let path = xtask::llama_server_dir().join(name);
    ensure!(path.exists(), "{} is not there: run `cargo xtask bench engine`", path.display());
    Ok(path)
}
