//! What the scheduler and the kubelets do for the Pods of the agents' DaemonSet, whose controller is the real one: each Pod
//! gets the node that it names, its agent is started with a token of that very Pod, Ready is what the agent's `/readyz`
//! says, and a Pod that is deleted gets SIGTERM, its grace period, SIGKILL.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::control_plane::tls;
use crate::{Agent, AgentOptions, ControlPlane, NAMESPACE, sandbox};

const PAUSE: Duration = Duration::from_millis(100);

/// A Pod whose annotation `broken` is set has an image that cannot be pulled.
const BROKEN: &str = "broken";

/// One Pod's life.
#[derive(Clone, Debug)]
pub struct Life {
    /// Its node.
    pub node: String,
    /// Its uid.
    pub uid: String,
    /// Its agent's process id.
    pub pid: u32,
    /// When its agent was Ready for the first time.
    pub ready: Option<Instant>,
    /// When its deletion was seen.
    pub deleted: Option<Instant>,
    /// When its agent had ended.
    pub ended: Option<Instant>,
    /// Whether it had to be killed.
    pub killed: bool,
}

/// Plays the kubelets of some nodes, and the scheduler, until it is dropped.
pub struct Kubelet {
    lives: Arc<Mutex<Vec<Life>>>,
    task: JoinHandle<()>,
}

/// A Pod's agent, its state as it was last reported, and how it ends.
struct Running {
    agent: Agent,
    reported: Option<bool>,
    kill_at: Option<Instant>,
}

struct Player {
    cluster: &'static ControlPlane,
    pods: Api<Pod>,
    options: AgentOptions,
    /// Each node's files, kept over its Pods.
    nodes: BTreeMap<String, PathBuf>,
    running: BTreeMap<String, Running>,
    lives: Arc<Mutex<Vec<Life>>>,
}

impl Kubelet {
    /// For those nodes, whose Node objects are there. Agents are started with `options`.
    pub async fn start(cluster: &'static ControlPlane, nodes: &[String], options: AgentOptions) -> Result<Self> {
        let mut dirs = BTreeMap::new();
        for node in nodes {
            dirs.insert(node.clone(), sandbox::subdir("agent")?);
        }
        let client: Client = cluster.client().await?;
        let lives = Arc::default();
        let mut player = Player {
            cluster,
            pods: Api::namespaced(client, NAMESPACE),
            options,
            nodes: dirs,
            running: BTreeMap::new(),
            lives: Arc::clone(&lives),
        };
        let task = tokio::spawn(async move {
            let mut said = String::new();
            loop {
                // Tried again, as kubelets do: an API server that is busy is no end.
                let trouble = player.round().await.err().map(|error| format!("{error:#}")).unwrap_or_default();
                if trouble != said {
                    eprintln!("kubelet: {trouble}");
                    said = trouble;
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Ok(Self { lives, task })
    }

    /// All Pods that there were, in the order of their starts.
    #[must_use]
    pub fn lives(&self) -> Vec<Life> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Player {
    async fn round(&mut self) -> Result<()> {
        let ours = ListParams::default().labels("app.kubernetes.io/component=agent");
        for pod in self.pods.list(&ours).await? {
            let from_set = pod.owner_references().iter().any(|owner| owner.kind == "DaemonSet");
            if !from_set {
                continue;
            }
            let bound = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).filter(|node| !node.is_empty());
            match bound {
                None => self.bind(&pod).await?,
                Some(node) if self.nodes.contains_key(&node) => self.see_to(&pod, &node).await?,
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// The DaemonSet's controller names the node in the Pod's affinity.
    async fn bind(&self, pod: &Pod) -> Result<()> {
        let spec = serde_json::to_value(&pod.spec)?;
        let terms = "/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0";
        let node = spec.pointer(&format!("{terms}/matchFields/0/values/0")).and_then(Value::as_str);
        let node = node.context("a Pod of a DaemonSet that names no node")?;
        if pod.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        let name = pod.name_any();
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let _: Value = self.pods.create_subresource("binding", &name, &PostParams::default(), &binding).await?;
        Ok(())
    }

    async fn see_to(&mut self, pod: &Pod, node: &str) -> Result<()> {
        let (name, uid) = (pod.name_any(), pod.uid().context("a Pod without uid")?);
        if pod.metadata.deletion_timestamp.is_some() {
            return self.end(pod, &name, &uid).await;
        }
        if pod.annotations().contains_key(BROKEN) {
            let waiting = json!({"reason": "ImagePullBackOff", "message": "no such image"});
            let status = json!({"phase": "Pending", "containerStatuses": [{
                "name": "agent", "image": "none", "imageID": "", "ready": false, "restartCount": 0, "state": {"waiting": waiting},
            }]});
            if pod.status.as_ref().is_none_or(|status| status.container_statuses.is_none()) {
                self.report(&name, status).await?;
            }
            return Ok(());
        }
        if !self.running.contains_key(&uid) {
            let pod = self.cluster.identity_of(NAMESPACE, "altiplano-agent", &name, &uid).await?;
            let state_dir = self.nodes.get(node).cloned();
            let options = AgentOptions { state_dir, pod: Some(pod), ..self.options.clone() };
            let agent = Agent::start(self.cluster, node, options).await?;
            let (node, uid, pid) = (node.to_owned(), uid.clone(), agent.proc.pid());
            self.running.insert(uid.clone(), Running { agent, reported: None, kill_at: None });
            self.lives().push(Life { node, uid, pid, ready: None, deleted: None, ended: None, killed: false });
        }
        let Some(running) = self.running.get_mut(&uid) else { return Ok(()) };
        running.agent.proc.assert_running()?;
        let ready = is_ready(&format!("{}/readyz", running.agent.url)).await;
        if running.reported != Some(ready) {
            running.reported = Some(ready);
            let word = if ready { "True" } else { "False" };
            let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": word}]});
            self.report(&name, status).await?;
            if ready {
                self.note(&uid, |life| _ = life.ready.get_or_insert_with(Instant::now));
            }
        }
        Ok(())
    }

    /// SIGTERM, time, SIGKILL; then the object goes.
    async fn end(&mut self, pod: &Pod, name: &str, uid: &str) -> Result<()> {
        let grace = pod.metadata.deletion_grace_period_seconds.and_then(|grace| u64::try_from(grace).ok()).unwrap_or(0);
        let mut killed = false;
        if let Some(running) = self.running.get_mut(uid)
            && running.agent.proc.try_wait()?.is_none()
        {
            match running.kill_at {
                None => {
                    running.agent.proc.signal(Signal::TERM)?;
                    running.kill_at = Some(Instant::now() + Duration::from_secs(grace));
                    self.note(uid, |life| life.deleted = Some(Instant::now()));
                    return Ok(());
                }
                Some(at) if Instant::now() < at => return Ok(()),
                Some(_) => {
                    running.agent.proc.kill()?;
                    killed = true;
                }
            }
        }
        if let Some(running) = self.running.remove(uid) {
            ensure!(killed || running.agent.proc.processes().is_empty(), "processes outlive their agent");
            self.note(uid, |life| (life.ended, life.killed) = (Some(Instant::now()), killed));
        }
        self.pods.delete(name, &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }

    async fn report(&self, name: &str, status: Value) -> Result<()> {
        let patch = Patch::Strategic(json!({"status": status}));
        self.pods.patch_status(name, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    fn note(&self, uid: &str, change: impl FnOnce(&mut Life)) {
        if let Some(life) = self.lives().iter_mut().find(|life| life.uid == uid) {
            change(life);
        }
    }

    fn lives(&self) -> std::sync::MutexGuard<'_, Vec<Life>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn is_ready(url: &str) -> bool {
    tls();
    let Ok(client) = reqwest::Client::builder().timeout(Duration::from_secs(10)).build() else { return false };
    client.get(url).send().await.is_ok_and(|answer| answer.status().is_success())
}
