//! The built operator and agent.

use std::{
    path::PathBuf,
    process::{Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{ControlPlane, NAMESPACE, PodIdentity, Proc, control_plane::tls, free_address, sandbox, wait_for};

/// How long a program may take until it answers; it takes far less on an idle machine.
const START: Duration = Duration::from_mins(1);

/// A program of this workspace, from `ALTIPLANO_BIN_DIR` or from the folder that this one was built into.
pub fn program(name: &str) -> Result<PathBuf> {
    let dir = if let Some(dir) = std::env::var_os("ALTIPLANO_BIN_DIR") {
        PathBuf::from(dir)
    } else {
        let this = std::env::current_exe().context("where is this program?")?;
        // A test lies in target/debug/deps, a program in target/debug.
        let dir = this.parent().context("a program without folder")?;
        if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir }.to_path_buf()
    };
    let path = dir.join(name);
    ensure!(path.is_file(), "{} is not built: run `cargo build --workspace --bins`", path.display());
    Ok(path)
}

/// A running operator.
#[derive(Debug)]
pub struct Operator {
    /// The process.
    pub proc: Proc,
    /// Where it answers `/livez`, `/readyz` and `/metrics`.
    pub url: String,
    /// The pod whose token it has.
    pub pod: PodIdentity,
}

impl Operator {
    /// Starts one with the chart's rights and waits for its `/livez`. `arguments` are added to the usual ones.
    pub async fn start(cluster: &ControlPlane, arguments: &[&str]) -> Result<Self> {
        let pod = cluster.pod_identity(NAMESPACE, "altiplano-operator", "altiplano-operator", None).await?;
        let listen = free_address()?.to_string();
        let mut command = Command::new(program("altiplano-operator")?);
        command
            .env("KUBECONFIG", cluster.kubeconfig_for(&pod.token)?)
            .env("RUST_LOG", log_level())
            .args(["--namespace", NAMESPACE, "--listen", &listen, "--identity", &pod.pod])
            .args(arguments);
        let mut proc = Proc::start("operator", command)?;
        let url = format!("http://{listen}");
        answers(&mut proc, &format!("{url}/livez")).await?;
        Ok(Self { proc, url, pod })
    }

    /// Waits until it has seen the world (`/readyz`).
    pub async fn ready(&mut self) -> Result<()> {
        answers(&mut self.proc, &format!("{}/readyz", self.url)).await
    }

    /// Its metrics, in Prometheus' text format.
    pub async fn metrics(&self) -> Result<String> {
        get(&format!("{}/metrics", self.url)).await
    }

    /// SIGTERM, then its exit.
    pub async fn stop(mut self, limit: Duration) -> Result<ExitStatus> {
        self.proc.terminate(limit).await
    }
}

/// How an [`Agent`] differs from the usual one.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// Keep the state of an earlier one; else a fresh folder.
    pub state_dir: Option<PathBuf>,
    /// Be the same pod as an earlier one; else a new pod.
    pub pod: Option<PodIdentity>,
    /// Folders that `file://` sources may name.
    pub file_roots: Vec<PathBuf>,
    /// More arguments.
    pub arguments: Vec<String>,
    /// More environment.
    pub environment: Vec<(String, String)>,
}

/// The address that agents report. An EndpointSlice takes no loopback address, so it is one of the range that is kept
/// for documentation (RFC 5737), and [`reachable`] stands for the network that would lead there.
const ADVERTISED: &str = "192.0.2.10";

/// The URL behind an endpoint's address: agents of this harness listen on loopback, whatever they report.
#[must_use]
pub fn reachable(address: &str, port: i32) -> String {
    let host = if address == ADVERTISED { "127.0.0.1" } else { address };
    format!("http://{host}:{port}")
}

/// A running node agent.
#[derive(Debug)]
pub struct Agent {
    /// The process; models run in processes that descend from it.
    pub proc: Proc,
    /// Its node.
    pub node: String,
    /// Its shared port.
    pub url: String,
    /// Its files.
    pub state_dir: PathBuf,
    /// The pod whose token it has.
    pub pod: PodIdentity,
}

impl Agent {
    /// Starts one for `node`, whose Node object must be there, with the chart's rights, and waits for its `/healthz`.
    pub async fn start(cluster: &ControlPlane, node: &str, options: AgentOptions) -> Result<Self> {
        let AgentOptions { state_dir, pod, file_roots, arguments, environment } = options;
        let state_dir = match state_dir {
            Some(dir) => dir,
            None => sandbox::subdir("agent")?,
        };
        let pod = match pod {
            Some(pod) => pod,
            None => cluster.pod_identity(NAMESPACE, "altiplano-agent", "altiplano-agent", Some(node)).await?,
        };
        let listen = free_address()?.to_string();
        let mut command = Command::new(program("altiplano-agent")?);
        command
            .env("KUBECONFIG", cluster.kubeconfig_for(&pod.token)?)
            .env("ALTIPLANO_LOG", log_level())
            .args(["node", "--node-name", node, "--namespace", NAMESPACE])
            .args(["--pod-name", &pod.pod, "--pod-uid", &pod.uid, "--address", ADVERTISED])
            .args(["--listen", &listen])
            .arg("--state-dir")
            .arg(&state_dir);
        for root in file_roots {
            command.arg("--file-root").arg(root);
        }
        command.args(arguments).envs(environment);
        let mut proc = Proc::start(&format!("agent-{node}"), command)?;
        let url = format!("http://{listen}");
        answers(&mut proc, &format!("{url}/healthz")).await?;
        Ok(Self { proc, node: node.to_owned(), url, state_dir, pod })
    }

    /// Its metrics, in Prometheus' text format.
    pub async fn metrics(&self) -> Result<String> {
        get(&format!("{}/metrics", self.url)).await
    }

    /// Its processes that have a model; the spare runner has another name.
    #[must_use]
    pub fn workers(&self) -> Vec<u32> {
        self.proc.processes().into_iter().filter(|pid| is_worker(*pid)).collect()
    }

    /// What another agent of the same node, pod and files is started with, after this one has ended.
    #[must_use]
    pub fn successor(&self) -> AgentOptions {
        AgentOptions { state_dir: Some(self.state_dir.clone()), pod: Some(self.pod.clone()), ..AgentOptions::default() }
    }

    /// SIGTERM, then its exit.
    pub async fn stop(mut self, limit: Duration) -> Result<ExitStatus> {
        self.proc.terminate(limit).await
    }
}

/// The processes of an agent that have a model, where only its process id is known.
#[must_use]
pub fn workers_of(agent: u32) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold spaces.
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid| is_worker(*pid) && parent(*pid) == Some(agent)).collect()
}

/// Whether a process of an agent has a model, or is about to.
#[must_use]
pub fn is_worker(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "runner")
}

fn log_level() -> String {
    std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into())
}

async fn answers(proc: &mut Proc, url: &str) -> Result<()> {
    let mut ended = Ok(());
    let waited = wait_for(format!("200 from {url}"), START, || {
        ended = proc.assert_running();
        let gone = ended.is_err();
        async move { if gone { Ok(()) } else { get(url).await.map(drop) } }
    })
    .await;
    ended?;
    if let Err(error) = waited {
        bail!("{error:#}\n{}", proc.log_tail());
    }
    Ok(())
}

/// The body of a 200.
async fn get(url: &str) -> Result<String> {
    tls();
    let response = reqwest::Client::builder().timeout(Duration::from_secs(10)).build()?.get(url).send().await?;
    let status = response.status();
    let body = response.text().await?;
    ensure!(status.is_success(), "{url}: {status}: {body}");
    Ok(body)
}
