//! One test's world: a namespace, nodes of its own with real agents, a real operator, and the questions that a user
//! would ask of them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use altiplano_crds::{ModelDeployment, ModelNode};
use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard};

use crate::{Agent, AgentOptions, ControlPlane, NAMESPACE, Operator, reachable, repository, sandbox, wait_for};

/// How long anything may take that should take about a second on an idle machine.
pub const SOON: Duration = Duration::from_mins(1);

/// Operators elect one leader in a cluster and agents load real models: one scenario at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// A namespace, an operator, and agents on nodes of this scenario's own.
pub struct Scenario {
    /// The control plane.
    pub cluster: &'static ControlPlane,
    /// An administrator's client.
    pub client: Client,
    /// The namespace; also the value of the label `test` on this scenario's nodes.
    pub namespace: String,
    /// The operator.
    pub operator: Operator,
    /// The agents, in the order of their nodes.
    pub agents: Vec<Agent>,
    files: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

/// What an EndpointSlice of ours says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it is reached: `http://host:port`.
    pub url: String,
    /// Name of the node.
    pub node: String,
    /// Whether load balancers send requests there.
    pub ready: bool,
}

/// The toy chat model.
#[must_use]
pub fn toy_model() -> PathBuf {
    repository().join("tests/models/toy/altiplano-toy.gguf")
}

/// What the toy model is asked in one message, and what it answers, word for word.
pub fn toy_question(index: usize) -> Result<(String, String)> {
    let text = std::fs::read_to_string(repository().join("tests/models/toy/questions.json"))?;
    let dialogues: Vec<Value> = serde_json::from_str(&text)?;
    let mut questions = dialogues.iter().filter_map(|dialogue| {
        let [message] = dialogue.get("messages")?.as_array()?.as_slice() else { return None };
        Some((message.get("content")?.as_str()?.to_owned(), dialogue.get("answer")?.as_str()?.to_owned()))
    });
    questions.nth(index).context("the toy model has fewer questions")
}

impl Scenario {
    /// Starts one with an agent on each of `nodes` nodes.
    pub async fn start(prefix: &str, nodes: usize) -> Result<Self> {
        Self::start_with(prefix, nodes, &[]).await
    }

    /// Starts one whose operator gets further arguments.
    pub async fn start_with(prefix: &str, nodes: usize, operator: &[&str]) -> Result<Self> {
        let turn = ONE_AT_A_TIME.lock().await;
        let cluster = ControlPlane::shared_with_chart().await?;
        let client = cluster.client().await?;
        let namespace = cluster.namespace(prefix).await?;
        release_leadership(&client).await?;
        let mut operator = Operator::start(cluster, operator).await?;
        operator.ready().await?;
        let files = sandbox::subdir("files")?;
        let mut scenario = Self { cluster, client, namespace, operator, agents: Vec::new(), files, _turn: turn };
        for index in 0..nodes {
            let node = scenario.node(index);
            cluster.create_node(&node, &[("test", &scenario.namespace)], &[]).await?;
            let agent = Agent::start(cluster, &node, scenario.agent_options()).await?;
            scenario.agents.push(agent);
        }
        for index in 0..nodes {
            scenario.wait_for_devices(&scenario.node(index)).await?;
        }
        Ok(scenario)
    }

    /// The name of the node with this index.
    #[must_use]
    pub fn node(&self, index: usize) -> String {
        format!("{}-node-{index}", self.namespace)
    }

    /// How this scenario's agents are started.
    #[must_use]
    pub fn agent_options(&self) -> AgentOptions {
        AgentOptions {
            file_roots: toy_model().parent().map(PathBuf::from).into_iter().chain([self.files()]).collect(),
            arguments: vec!["--allow-http".into(), "--allow-private-networks".into()],
            ..AgentOptions::default()
        }
    }

    /// A folder whose files this scenario's agents may load.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.files.clone()
    }

    /// Starts the agent of node `index` again, after its process has ended, as the kubelet would.
    pub async fn restart_agent(&mut self, index: usize) -> Result<()> {
        let old = self.agents.remove(index);
        let options = AgentOptions {
            file_roots: self.agent_options().file_roots,
            arguments: self.agent_options().arguments,
            ..old.successor()
        };
        let node = old.node.clone();
        drop(old);
        let agent = Agent::start(self.cluster, &node, options).await?;
        self.agents.insert(index, agent);
        Ok(())
    }

    /// Waits until the agent on `node` has reported its devices.
    pub async fn wait_for_devices(&self, node: &str) -> Result<()> {
        let nodes = Api::<ModelNode>::all(self.client.clone());
        wait_for(format!("the devices of {node}"), SOON, || async {
            let node = nodes.get(node).await.map_err(|error| error.to_string())?;
            match &node.status {
                Some(status) if !status.devices.is_empty() => Ok(()),
                status => Err(format!("{status:?}")),
            }
        })
        .await
    }

    /// A manifest of the toy model; `spec` is further YAML for its spec, one field a line.
    #[must_use]
    pub fn toy(&self, name: &str, spec: &str) -> String {
        self.manifest(name, &format!("file://{}", toy_model().display()), spec)
    }

    /// A manifest of the model at `uri`, for this scenario's nodes.
    #[must_use]
    pub fn manifest(&self, name: &str, uri: &str, spec: &str) -> String {
        let spec = spec.lines().fold(String::new(), |spec, line| spec + "  " + line + "\n");
        let placement = if spec.contains("placement:") {
            String::new()
        } else {
            format!("  placement: {{nodeSelector: {{test: {}}}}}\n", self.namespace)
        };
        format!(
            "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: {name}, namespace: {}}}\nspec:\n  \
             model: {{source: {{uri: \"{uri}\"}}}}\n{placement}{spec}",
            self.namespace
        )
    }

    /// `kubectl apply`.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.cluster.kubectl_with(&["apply", "-f", "-"], manifest)
    }

    /// The ModelDeployment as it is now.
    pub async fn get(&self, name: &str) -> Result<ModelDeployment> {
        Ok(Api::<ModelDeployment>::namespaced(self.client.clone(), &self.namespace).get(name).await?)
    }

    /// The ModelNode of node `index` as it is now.
    pub async fn model_node(&self, index: usize) -> Result<ModelNode> {
        Ok(Api::<ModelNode>::all(self.client.clone()).get(&self.node(index)).await?)
    }

    /// What should be on each node: uid and revision of every entry, node by node.
    pub async fn placed(&self) -> Result<Vec<Vec<(String, String)>>> {
        let mut all = Vec::new();
        for index in 0..self.agents.len() {
            let node = self.model_node(index).await?;
            let entries = node.spec.models.iter().filter_map(|entry| entry.parse().ok());
            all.push(entries.map(|entry| (entry.uid, entry.revision)).collect());
        }
        Ok(all)
    }

    /// Waits until `check` finds what it wants in the ModelDeployment; its error is what it saw instead.
    pub async fn wait_until<T>(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        check: impl Fn(&ModelDeployment) -> Result<T, String>,
    ) -> Result<T> {
        let waited = wait_for(format!("{name}: {what}"), limit, || async {
            let model = self.get(name).await.map_err(|error| format!("{error:#}"))?;
            check(&model)
        })
        .await;
        match waited {
            Ok(value) => Ok(value),
            Err(error) => {
                let agents: Vec<_> = self.agents.iter().map(|agent| agent.proc.log_tail()).collect();
                bail!("{error:#}\n{}\n{}", self.operator.proc.log_tail(), agents.join("\n"))
            }
        }
    }

    /// Waits for a condition; returns its message.
    pub async fn wait_for_condition(&self, name: &str, kind: &str, status: &str, reason: &str) -> Result<String> {
        self.wait_until(name, &format!("{kind}={status} ({reason})"), SOON, |model| {
            let conditions = model.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
            match conditions.iter().find(|condition| condition.type_ == kind) {
                Some(found) if found.status == status && found.reason == reason => Ok(found.message.clone()),
                _ => Err(conditions_text(model)),
            }
        })
        .await
    }

    /// Waits until `status.ready` reads so, such as "1/1", of the newest generation.
    pub async fn wait_for_ready(&self, name: &str, ready: &str) -> Result<()> {
        self.wait_until(name, &format!("ready {ready}"), SOON * 2, |model| {
            let status = model.status.as_ref().ok_or("no status")?;
            let newest = status.observed_generation == model.metadata.generation;
            let updated = status.updated_replicas == status.replicas;
            if newest && updated && status.ready.as_deref() == Some(ready) {
                Ok(())
            } else {
                Err(conditions_text(model))
            }
        })
        .await
    }

    /// The endpoints of a model's Service.
    pub async fn endpoints(&self, name: &str) -> Result<Vec<Endpoint>> {
        let slices = Api::<EndpointSlice>::namespaced(self.client.clone(), &self.namespace)
            .list(&ListParams::default().labels(&format!("kubernetes.io/service-name={name}")))
            .await?;
        let mut endpoints = Vec::new();
        for slice in slices {
            let port = slice.ports.iter().flatten().find_map(|port| port.port).context("a slice without port")?;
            for endpoint in slice.endpoints {
                let address = endpoint.addresses.first().context("an endpoint without address")?;
                let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true);
                let node = endpoint.node_name.unwrap_or_default();
                endpoints.push(Endpoint { url: reachable(address, port), node, ready });
            }
        }
        endpoints.sort_by(|a, b| a.node.cmp(&b.node));
        Ok(endpoints)
    }

    /// Waits until operator and agents have written nothing for so long: what the last change set off has come.
    pub async fn wait_for_quiet(&self, time: Duration) -> Result<()> {
        let (mut known, mut since) = (usize::MAX, Instant::now());
        wait_for(format!("{time:?} without a write"), SOON * 2, || {
            std::future::ready((|| {
                let writes = self.cluster.writes().map_err(|error| format!("{error:#}"))?;
                let (count, last) = (writes.len(), writes.iter().rfind(|write| write.is_ours()));
                let ours = writes.iter().filter(|write| write.is_ours()).count();
                if ours != known {
                    (known, since) = (ours, Instant::now());
                }
                let last = last.map(ToString::to_string).unwrap_or_default();
                if since.elapsed() >= time { Ok(()) } else { Err(format!("{ours} of {count} writes, at last {last}")) }
            })())
        })
        .await
    }

    /// Waits until that many endpoints are ready; returns them.
    pub async fn wait_for_endpoints(&self, name: &str, count: usize) -> Result<Vec<Endpoint>> {
        wait_for(format!("{count} ready endpoints of {name}"), SOON, || async {
            let all = self.endpoints(name).await.map_err(|error| format!("{error:#}"))?;
            let ready: Vec<_> = all.iter().filter(|endpoint| endpoint.ready).cloned().collect();
            if ready.len() == count { Ok(ready) } else { Err(format!("{all:?}")) }
        })
        .await
    }

    /// The messages of Warning events about an object of this namespace, by reason.
    pub async fn events(&self, name: &str) -> Result<Vec<Event>> {
        let events = Api::<Event>::namespaced(self.client.clone(), &self.namespace);
        Ok(events.list(&ListParams::default().fields(&format!("involvedObject.name={name}"))).await?.items)
    }

    /// Deletes a ModelDeployment and waits until it, its Service and its slices are gone.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let models = Api::<ModelDeployment>::namespaced(self.client.clone(), &self.namespace);
        models.delete(name, &DeleteParams::default()).await?;
        let services = Api::<Service>::namespaced(self.client.clone(), &self.namespace);
        wait_for(format!("the end of {name}"), SOON * 2, || async {
            let (model, service) = (models.get_opt(name).await, services.get_opt(name).await);
            let slices = self.endpoints(name).await;
            match (&model, &service, &slices) {
                (Ok(None), Ok(None), Ok(slices)) if slices.is_empty() => Ok(()),
                _ => Err(format!(
                    "{:?} {:?} {slices:?}",
                    model.map(|m| m.map(|m| m.status)),
                    service.map(|s| s.is_some())
                )),
            }
        })
        .await
    }
}

impl Drop for Scenario {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.files);
    }
}

/// The last scenario's operator was killed: nobody gives its leadership back, and its time is not worth waiting for.
async fn release_leadership(client: &Client) -> Result<()> {
    let leases = Api::<Lease>::namespaced(client.clone(), NAMESPACE);
    match leases.delete(altiplano_crds::names::LEADER_LEASE, &DeleteParams::default()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Conditions and placements, for error messages.
#[must_use]
pub fn conditions_text(model: &ModelDeployment) -> String {
    let Some(status) = &model.status else { return "no status".into() };
    let conditions: Vec<_> = status
        .conditions
        .iter()
        .map(|condition| {
            format!("{}={} {}: {}", condition.type_, condition.status, condition.reason, condition.message)
        })
        .collect();
    format!(
        "generation {:?} observed {:?} ready {:?} state {:?}; {}; {:?}",
        model.metadata.generation,
        status.observed_generation,
        status.ready,
        status.state,
        conditions.join("; "),
        status.placements
    )
}
