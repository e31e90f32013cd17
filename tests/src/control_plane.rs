//! etcd, kube-apiserver and kube-controller-manager.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, ServiceAccount, Taint};
use kube::{
    Api, Client, Config,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use rustix::process::Signal;
use serde_json::json;
use tokio::sync::OnceCell;

use crate::{Proc, audit, free_address, pki::Pki, sandbox, wait_for};

/// How long a start may take on a busy machine with two cores; it takes some four seconds on an idle one.
const START: Duration = Duration::from_secs(90);
const STOP: Duration = Duration::from_secs(30);

/// A control plane of one's own. It has no scheduler and no kubelet: pods are objects, and the controllers that judge
/// nodes by their kubelet are off, so that a node is as healthy as the test says.
#[derive(Debug)]
pub struct ControlPlane {
    dir: PathBuf,
    pki: Pki,
    port: u16,
    etcd_url: String,
    admin: PathBuf,
    api_server: Mutex<Option<Proc>>,
    controller_manager: Proc,
    etcd: Proc,
}

impl ControlPlane {
    /// Starts one and waits until it answers and its controllers work.
    pub async fn start() -> Result<Self> {
        let dir = sandbox::subdir("control-plane")?;
        let pki = Pki::generate(&dir)?;
        fs::write(dir.join("audit-policy.yaml"), audit::POLICY)?;
        let token = sandbox::random_hex()?;
        fs::write(dir.join("tokens.csv"), format!("{token},admin,admin,\"system:masters\"\n"))?;

        let port = || anyhow::Ok(free_address()?.port());
        let (client_port, peer_port, port, manager_port) = (port()?, port()?, port()?, port()?);
        let admin = dir.join("admin.kubeconfig");
        fs::write(&admin, kubeconfig(port, &pki.ca, &token))?;

        let etcd_url = format!("http://127.0.0.1:{client_port}");
        let etcd = Proc::start("etcd", etcd(&dir, &etcd_url, peer_port)?)?;
        let mut api_server = Proc::start("kube-apiserver", api_server(&dir, &pki, port, &etcd_url)?)?;
        // It needs nobody to be there first, and tries until somebody is.
        let mut controller_manager =
            Proc::start("kube-controller-manager", controller_manager(&admin, &pki, manager_port)?)?;

        let ready = ready(&admin, &mut api_server).await;
        let controllers = match ready {
            Ok(()) => controllers(&admin, &mut controller_manager).await,
            error => error,
        };
        if let Err(error) = controllers {
            let logs = [&etcd, &api_server, &controller_manager].map(Proc::log_tail).join("\n");
            bail!("the control plane did not start: {error:#}\n{logs}");
        }
        Ok(Self { dir, pki, port, etcd_url, admin, api_server: Mutex::new(Some(api_server)), controller_manager, etcd })
    }

    /// The one that all tests of this binary share: give each test a [`namespace`](Self::namespace) of its own. It
    /// ends with the process.
    pub async fn shared() -> Result<&'static Self> {
        static SHARED: OnceCell<ControlPlane> = OnceCell::const_new();
        SHARED.get_or_try_init(Self::start).await
    }

    /// [`shared`](Self::shared), with the chart's objects in it.
    pub async fn shared_with_chart() -> Result<&'static Self> {
        static INSTALLED: OnceCell<()> = OnceCell::const_new();
        let shared = Self::shared().await?;
        INSTALLED.get_or_try_init(|| shared.install_chart(&[])).await?;
        Ok(shared)
    }

    /// An administrator's kubeconfig: for kubectl and for what a cluster's users do, never for operator or agent.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.admin
    }

    /// An administrator's client. Make one per test: it belongs to the runtime that it is first used in.
    pub async fn client(&self) -> Result<Client> {
        client(&self.admin).await
    }

    /// A client with this token.
    pub async fn client_with(&self, token: &str) -> Result<Client> {
        client(&self.kubeconfig_for(token)?).await
    }

    /// Writes a kubeconfig with this token.
    pub fn kubeconfig_for(&self, token: &str) -> Result<PathBuf> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let path = self.dir.join(format!("{}.kubeconfig", COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::write(&path, kubeconfig(self.port, &self.pki.ca, token))?;
        Ok(path)
    }

    /// The API server's address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Makes a namespace whose name begins with `prefix` and waits until pods can be made in it.
    pub async fn namespace(&self, prefix: &str) -> Result<String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{prefix}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let client = self.client().await?;
        let object = Namespace { metadata: named(&name), ..Namespace::default() };
        Api::<Namespace>::all(client.clone()).create(&PostParams::default(), &object).await?;
        let accounts = Api::<ServiceAccount>::namespaced(client, &name);
        wait_for(format!("the default service account of {name}"), START, || accounts.get("default")).await?;
        Ok(name)
    }

    /// Makes a Node object with these labels and taints, ready as its kubelet and the node controller would have it.
    pub async fn create_node(&self, name: &str, labels: &[(&str, &str)], taints: &[Taint]) -> Result<Node> {
        let mut labels: BTreeMap<_, _> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        labels.entry("kubernetes.io/hostname".to_owned()).or_insert_with(|| name.to_owned());
        let node = Node { metadata: ObjectMeta { labels: Some(labels), ..named(name) }, ..Node::default() };
        let nodes = Api::<Node>::all(self.client().await?);
        nodes.create(&PostParams::default(), &node).await.with_context(|| format!("could not create node {name}"))?;
        let ready = json!([{
            "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "the test says so",
            "lastHeartbeatTime": null, "lastTransitionTime": null,
        }]);
        let status = Patch::Merge(json!({"status": {"conditions": ready}}));
        nodes.patch_status(name, &PatchParams::default(), &status).await?;
        // Admission taints a new node as not ready, and the controller that would end that is off.
        let spec = Patch::Merge(json!({"spec": {"taints": taints}}));
        Ok(nodes.patch(name, &PatchParams::default(), &spec).await?)
    }

    /// Runs kubectl as administrator; returns what it printed. An exit code other than 0 is an error with its message.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "")
    }

    /// [`kubectl`](Self::kubectl) with a standard input, for `apply -f -`.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = Command::new(tool("kubectl")?)
            .arg("--kubeconfig")
            .arg(&self.admin)
            // Nothing in the user's home, and an end even when the API server hangs.
            .args(["--cache-dir", &self.dir.join("kubectl").to_string_lossy(), "--request-timeout=60s"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("could not start kubectl")?;
        if let Some(mut stdin) = child.stdin.take() {
            // It may end without reading; its own message tells why.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output()?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "kubectl {}: {}{}",
            arguments.join(" "),
            stdout,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(stdout)
    }

    /// The API server's own metrics, in Prometheus' text format.
    pub async fn api_server_metrics(&self) -> Result<String> {
        let request = http_get("/metrics")?;
        Ok(self.client().await?.request_text(request).await?)
    }

    /// The writes that reached the API server since it first started, oldest first, read-only requests left out.
    pub fn writes(&self) -> Result<Vec<audit::Write>> {
        audit::read(&self.dir.join("audit.log"))
    }

    /// Stops the API server as a crash would: connections break, then are refused. Data stays.
    pub fn kill_api_server(&self) -> Result<()> {
        // Dropping kills and reaps.
        self.locked().take().map(drop).context("the API server does not run")
    }

    /// SIGSTOP: the API server accepts connections and answers nothing.
    pub fn pause_api_server(&self) -> Result<()> {
        self.locked().as_mut().context("the API server does not run")?.signal(Signal::STOP)
    }

    /// SIGCONT after [`pause_api_server`](Self::pause_api_server).
    pub fn resume_api_server(&self) -> Result<()> {
        self.locked().as_mut().context("the API server does not run")?.signal(Signal::CONT)
    }

    /// Starts it again after [`kill_api_server`](Self::kill_api_server), on the same port and data, and waits for it.
    pub async fn restart_api_server(&self) -> Result<()> {
        ensure!(self.locked().is_none(), "the API server runs already");
        let mut proc = Proc::start("kube-apiserver", api_server(&self.dir, &self.pki, self.port, &self.etcd_url)?)?;
        ready(&self.admin, &mut proc).await?;
        *self.locked() = Some(proc);
        Ok(())
    }

    /// Ends it in order, with time to write. Dropping it does without the time.
    pub async fn stop(mut self) -> Result<()> {
        // First the one whose watches the API server would wait for, last the one that the API server writes to.
        self.controller_manager.terminate(STOP).await?;
        let api_server = self.locked().take();
        if let Some(mut api_server) = api_server {
            api_server.terminate(STOP).await?;
        }
        self.etcd.terminate(STOP).await.map(drop)
    }

    fn locked(&self) -> MutexGuard<'_, Option<Proc>> {
        self.api_server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn tool(name: &str) -> Result<PathBuf> {
    xtask::control_plane_tool(name).with_context(|| {
        format!("{name} is missing: run `cargo xtask setup`, or set KUBEBUILDER_ASSETS to a folder that has it")
    })
}

/// Names the process's TLS library, which reqwest does not do by itself.
pub(crate) fn tls() {
    // An error means that one is named already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

pub(crate) fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
}

pub(crate) async fn client(kubeconfig: &Path) -> Result<Client> {
    tls();
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

fn kubeconfig(port: u16, ca: &Path, token: &str) -> String {
    let ca = ca.display();
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: tests\n\
         clusters: [{{name: tests, cluster: {{server: \"https://127.0.0.1:{port}\", certificate-authority: \"{ca}\"}}}}]\n\
         users: [{{name: tests, user: {{token: \"{token}\"}}}}]\n\
         contexts: [{{name: tests, context: {{cluster: tests, user: tests}}}}]\n"
    )
}

fn etcd(dir: &Path, url: &str, peer_port: u16) -> Result<Command> {
    let peer = format!("http://127.0.0.1:{peer_port}");
    let mut etcd = Command::new(tool("etcd")?);
    etcd.args(["--name=tests", "--unsafe-no-fsync", "--log-level=warn"])
        .arg(format!("--data-dir={}", dir.join("etcd").display()))
        .args([format!("--listen-client-urls={url}"), format!("--advertise-client-urls={url}")])
        .args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")])
        .arg(format!("--initial-cluster=tests={peer}"));
    Ok(etcd)
}

fn api_server(dir: &Path, pki: &Pki, port: u16, etcd: &str) -> Result<Command> {
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    let mut server = Command::new(tool("kube-apiserver")?);
    server
        .arg(format!("--etcd-servers={etcd}"))
        .arg(format!("--secure-port={port}"))
        // An address for the `kubernetes` Service that nobody uses; loopback is refused.
        .args(["--bind-address=127.0.0.1", "--advertise-address=192.0.2.2", "--service-cluster-ip-range=10.96.0.0/16"])
        .args([
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
        ])
        .arg("--service-account-issuer=https://kubernetes.default.svc.cluster.local")
        .arg(file("cert-dir", &dir.join("apiserver")))
        .arg(file("tls-cert-file", &pki.server_certificate))
        .arg(file("tls-private-key-file", &pki.server_key))
        .arg(file("client-ca-file", &pki.ca))
        .arg(file("token-auth-file", &dir.join("tokens.csv")))
        .arg(file("service-account-key-file", &pki.account_public_key))
        .arg(file("service-account-signing-key-file", &pki.account_key))
        .arg(file("audit-policy-file", &dir.join("audit-policy.yaml")))
        .arg(file("audit-log-path", &dir.join("audit.log")));
    Ok(server)
}

fn controller_manager(kubeconfig: &Path, pki: &Pki, port: u16) -> Result<Command> {
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    let mut manager = Command::new(tool("kube-controller-manager")?);
    manager
        .args(
            ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"].map(|flag| file(flag, kubeconfig)),
        )
        .arg(file("service-account-private-key-file", &pki.account_key))
        .arg(file("root-ca-file", &pki.ca))
        .args(["--bind-address=127.0.0.1", "--leader-elect=false", "--use-service-account-credentials=true"])
        .arg(format!("--secure-port={port}"))
        // Else it ends when the API server is not there yet at its start.
        .arg("--authentication-skip-lookup=true")
        // No kubelet reports here: these would call every node lost, taint it and evict its pods.
        .arg("--controllers=*,-node-lifecycle-controller,-taint-eviction-controller,-node-ipam-controller");
    Ok(manager)
}

async fn ready(admin: &Path, api_server: &mut Proc) -> Result<()> {
    let client = client(admin).await?;
    let mut ended = Ok(());
    let waited = wait_for("kube-apiserver's /readyz", START, || {
        ended = api_server.assert_running();
        let (client, gone) = (client.clone(), ended.is_err());
        async move {
            if gone {
                return Ok(());
            }
            let request = http_get("/readyz")?;
            client.request_text(request).await.map(drop).context("/readyz")
        }
    })
    .await;
    ended?;
    waited
}

/// The controllers work when they have made the first service account.
async fn controllers(admin: &Path, manager: &mut Proc) -> Result<()> {
    let accounts = Api::<ServiceAccount>::namespaced(client(admin).await?, "default");
    let waited = wait_for("the default service account", START, || accounts.get("default")).await;
    manager.assert_running()?;
    waited.map(drop)
}

fn http_get(path: &str) -> Result<http::Request<Vec<u8>>> {
    Ok(http::Request::get(path).body(Vec::new())?)
}
