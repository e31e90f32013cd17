//! A small world in YAML: nodes, agents, models. The planner plans in it, the plan is done to it at once, and what
//! happened is told as text. No part of the product is replaced: the objects are built as the API server would send
//! them and go through the same parsing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::model_node::{
    AgentInfo, AgentUpgrade, AssignmentMode, Device, ModelState, NodeAddress, RawAssignment, RequiredMemory,
};
use altiplano_crds::{ModelDeployment, ModelNodeStatus, names};
use altiplano_operator::clock::Now;
use altiplano_operator::fleet::children::{Children, ServiceStep, children};
use altiplano_operator::fleet::diff::{self, Write};
use altiplano_operator::fleet::filter::explain;
use altiplano_operator::fleet::memory::Memory;
use altiplano_operator::fleet::observe::Fleet;
use altiplano_operator::fleet::plan::{FinalizerStep, NodePlan, Plan, Settings, WantedEntry, plan};
use altiplano_operator::fleet::seen::{
    AgentSeen, Entry, Model, ModelNodeSeen, ModelSeen, NodeModels, NodeSeen, ServiceSeen,
};
use altiplano_operator::fleet::status::status;
use altiplano_operator::upgrade::observe::{Agents, DaemonSetSeen, PodSeen};
use altiplano_operator::upgrade::plan as upgrade;
use altiplano_operator::upgrade::status as upgrade_status;
use altiplano_operator::watch::Seen as _;
use k8s_openapi::api::apps::v1::DaemonSetCondition;
use k8s_openapi::api::core::v1::{Service, Taint};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) const SETTINGS: Settings =
    Settings { stale_after: Duration::from_secs(30), loss_grace: Duration::from_mins(1) };
pub(crate) const EPOCH: i64 = 7;
const GIB: i64 = 1 << 30;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct World {
    pub(crate) nodes: BTreeMap<String, WorldNode>,
    pub(crate) models: BTreeMap<String, WorldModel>,
    /// Services of strangers, by name.
    pub(crate) services: Vec<String>,
    /// Services that the operator has made, by name.
    pub(crate) own_services: BTreeMap<String, Service>,
    /// The agents' DaemonSet; none: nothing is known of it.
    pub(crate) agents: Option<WorldAgents>,
    /// What the operator last said of the agents.
    pub(crate) condition: Option<DaemonSetCondition>,
}

/// The agents' DaemonSet.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "what may be said of it in YAML")]
pub(crate) struct WorldAgents {
    /// Its newest revision.
    pub(crate) current: String,
    /// Nodes that should have a Pod; 0: as many as there are nodes.
    pub(crate) desired: usize,
    pub(crate) rolling_update: bool,
    /// Its controller has not seen the newest template yet.
    pub(crate) behind: bool,
    pub(crate) max_unavailable: usize,
    pub(crate) paused: bool,
    /// The CRD of `ModelNode` is of before spec.upgrade: what is written there does not stay.
    pub(crate) old_crd: bool,
}

impl Default for WorldAgents {
    fn default() -> Self {
        Self {
            current: "r1".to_owned(),
            desired: 0,
            rolling_update: false,
            behind: false,
            max_unavailable: 1,
            paused: false,
            old_crd: false,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "what may be said of a node in YAML")]
pub(crate) struct WorldNode {
    /// Second in which the agent's Lease was last seen to change; negative: no Lease.
    pub(crate) seen: i64,
    pub(crate) contract: u32,
    pub(crate) labels: BTreeMap<String, String>,
    /// "key=value:Effect"
    pub(crate) taints: Vec<String>,
    pub(crate) cordoned: bool,
    /// The Node has been deleted.
    pub(crate) gone: bool,
    /// The ModelNode has been deleted.
    pub(crate) no_model_node: bool,
    /// Memory in GiB; no GPU when 0.
    pub(crate) gpu: i64,
    /// Of the GPU's: what other processes hold.
    pub(crate) foreign: i64,
    pub(crate) host: i64,
    /// Entries of spec.models.
    pub(crate) holds: Vec<Held>,
    /// status.models, by model.
    pub(crate) reports: BTreeMap<String, Report>,
    /// Revision of the agent's Pod; empty: no Pod of the DaemonSet.
    pub(crate) pod: String,
    /// Which Pod of this node it is: another number is another uid.
    pub(crate) pod_number: u32,
    pub(crate) pod_unready: bool,
    /// Why it is not Ready.
    pub(crate) pod_trouble: Option<String>,
    pub(crate) pod_deleting: bool,
    /// The agent that reports is that of an earlier Pod.
    pub(crate) reports_of_before: bool,
    /// status.agent.drain.
    pub(crate) drain: Option<String>,
    /// spec.upgrade.
    pub(crate) upgrade: Option<AgentUpgrade>,
    /// The agent knows no spec.upgrade, and reports the newest generation without a word of it.
    pub(crate) old_agent: bool,
}

impl Default for WorldNode {
    fn default() -> Self {
        Self {
            seen: 0,
            contract: names::CONTRACT_VERSION,
            labels: BTreeMap::new(),
            taints: Vec::new(),
            cordoned: false,
            gone: false,
            no_model_node: false,
            gpu: 0,
            foreign: 0,
            host: 64,
            holds: Vec::new(),
            reports: BTreeMap::new(),
            pod: String::new(),
            pod_number: 1,
            pod_unready: false,
            pod_trouble: None,
            pod_deleting: false,
            reports_of_before: false,
            drain: None,
            upgrade: None,
            old_agent: false,
        }
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct Held {
    /// Name of the model; of one that is not in the world: a stranger.
    pub(crate) model: String,
    pub(crate) estimate: bool,
    /// As it was made; empty: by the plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) raw: Option<Value>,
    /// An older revision than the model's.
    pub(crate) old: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct Report {
    pub(crate) state: String,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    /// GiB that are needed, on the GPU where there is one.
    pub(crate) needs: Option<i64>,
    pub(crate) port: Option<i32>,
    pub(crate) file: bool,
    /// About an older revision.
    pub(crate) old: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct WorldModel {
    /// Second of its creation.
    pub(crate) created: i64,
    pub(crate) finalizer: bool,
    pub(crate) deleting: bool,
    /// Whole spec but for the source.
    pub(crate) spec: Value,
    pub(crate) uri: String,
    /// Nodes in status.placements.
    pub(crate) placements: Vec<String>,
}

impl Default for WorldModel {
    fn default() -> Self {
        Self {
            created: 0,
            finalizer: true,
            deleting: false,
            spec: json!({}),
            uri: "https://example.com/m.gguf".to_owned(),
            placements: Vec::new(),
        }
    }
}

impl World {
    pub(crate) fn model(&self, name: &str) -> Model {
        Model::new(self.model_object(name))
    }

    fn model_object(&self, name: &str) -> ModelDeployment {
        let model = &self.models[name];
        let mut spec = model.spec.clone();
        spec["model"] = json!({"source": {"uri": model.uri}});
        let placement = |node: &String| json!({"node": node, "state": "Ready"});
        let finalizers: &[&str] = if model.finalizer { &[names::FINALIZER] } else { &[] };
        let time = |second: i64| jiff::Timestamp::from_second(second).unwrap().to_string();
        let mut object = json!({
            "apiVersion": "altiplano.dev/v1alpha1", "kind": "ModelDeployment",
            "metadata": {
                "name": name, "namespace": "default", "uid": format!("uid-{name}"), "generation": 1,
                "resourceVersion": "1", "creationTimestamp": time(model.created), "finalizers": finalizers,
            },
            "spec": spec,
            "status": {"placements": model.placements.iter().map(placement).collect::<Vec<_>>()},
        });
        if model.deleting {
            object["metadata"]["deletionTimestamp"] = json!(time(0));
        }
        serde_json::from_value(object).unwrap()
    }

    fn node_object(&self, name: &str) -> NodeSeen {
        let node = &self.nodes[name];
        let taint = |text: &String| {
            let (rest, effect) = text.rsplit_once(':').unwrap();
            let (key, value) = rest.split_once('=').map_or((rest, None), |(k, v)| (k, Some(v.to_owned())));
            Taint { key: key.to_owned(), value, effect: effect.to_owned(), time_added: None }
        };
        NodeSeen {
            uid: format!("uid-{name}"),
            labels: node.labels.clone(),
            taints: node.taints.iter().map(taint).collect(),
            cordoned: node.cordoned,
        }
    }

    fn entry(&self, held: &Held) -> RawAssignment {
        if let Some(raw) = &held.raw {
            return RawAssignment(raw.clone());
        }
        if !self.models.contains_key(&held.model) {
            return RawAssignment(json!({"uid": held.model, "stranger": true}));
        }
        let mut entry = self.model(&held.model).assignment(if held.estimate {
            AssignmentMode::Estimate
        } else {
            AssignmentMode::Serve
        });
        if held.old {
            "old".clone_into(&mut entry.revision);
            entry.context.parallel += 1;
        }
        RawAssignment::try_from(&entry).unwrap()
    }

    fn status(&self, name: &str) -> ModelNodeStatus {
        let node = &self.nodes[name];
        let device = |id: &str, kind: &str, gib: i64| Device {
            id: id.to_owned(),
            name: id.to_owned(),
            backend: id.trim_end_matches('0').to_owned(),
            kind: kind.to_owned(),
            memory_total_bytes: gib * GIB,
            memory_foreign_bytes: if kind == "GPU" { node.foreign * GIB } else { 0 },
            ..Device::default()
        };
        let mut devices = vec![device("CPU", "CPU", node.host)];
        if node.gpu > 0 {
            devices.push(device("CUDA0", "GPU", node.gpu));
        }
        let on = if node.gpu > 0 { "CUDA0" } else { "CPU" };
        let state = |(model, report): (&String, &Report)| ModelState {
            uid: format!("uid-{model}"),
            revision: match self.models.get(model) {
                Some(_) if !report.old => self.model(model).revision,
                _ => "old".to_owned(),
            },
            state: report.state.clone(),
            reason: report.reason.clone(),
            message: report.message.clone(),
            port: report.port,
            required_bytes: report
                .needs
                .map(|gib| RequiredMemory { device: on.to_owned(), bytes: gib * GIB })
                .into_iter()
                .collect(),
            file_present: report.file,
            ..ModelState::default()
        };
        ModelNodeStatus {
            observed_generation: node.old_agent.then_some(1),
            agent: Some(AgentInfo {
                pod_uid: pod_uid(name, node.pod_number - u32::from(node.reports_of_before)),
                drain: node.drain.clone(),
                ..AgentInfo::default()
            }),
            addresses: vec![NodeAddress { family: "IPv4".to_owned(), address: "10.0.0.1".to_owned() }],
            devices,
            models: node.reports.iter().map(state).collect(),
            ..ModelNodeStatus::default()
        }
    }

    pub(crate) fn fleet(&self) -> Fleet {
        let outdated = self.agents().map(|agents| agents.outdated()).unwrap_or_default();
        let mut fleet = Fleet { outdated, ..Fleet::default() };
        for name in self.models.keys() {
            let seen = ModelSeen::Readable(Box::new(self.model(name)));
            fleet.models.insert(format!("uid-{name}"), Arc::new(seen));
        }
        for (name, node) in &self.nodes {
            let there = fleet.node(name);
            if !node.gone {
                there.object = Some(Arc::new(self.node_object(name)));
            }
            if let Ok(seen) = u64::try_from(node.seen) {
                let mut agent = AgentSeen::at(Duration::from_secs(seen), node.contract);
                if !node.pod.is_empty() {
                    agent.pod_uid = Some(pod_uid(name, node.pod_number - u32::from(node.reports_of_before)));
                }
                there.agent = Some(Arc::new(agent));
            }
            if !node.no_model_node {
                there.models = Some(Arc::new(ModelNodeSeen::Readable(Box::new(NodeModels {
                    uid: format!("uid-mn-{name}"),
                    generation: 1,
                    epoch: EPOCH,
                    entries: node.holds.iter().map(|held| Entry::new(self.entry(held))).collect(),
                    upgrade: node.upgrade.clone(),
                    status: Some(self.status(name)),
                }))));
            }
        }
        for name in &self.services {
            let mut service = Service::default();
            service.metadata.uid = Some("stranger".to_owned());
            let seen = ServiceSeen::see(service, None, Duration::ZERO);
            fleet.services.insert(("default".to_owned(), name.clone()), Arc::new(seen));
        }
        for (name, service) in &self.own_services {
            let seen = ServiceSeen::see(service.clone(), None, Duration::ZERO);
            fleet.services.insert(("default".to_owned(), name.clone()), Arc::new(seen));
        }
        fleet
    }

    /// The agents' Pods, as they would be seen.
    fn agents(&self) -> Option<Agents> {
        let there = self.agents.as_ref()?;
        let pod = |(name, node): (&String, &WorldNode)| PodSeen {
            namespace: "system".to_owned(),
            name: format!("agent-{name}"),
            uid: pod_uid(name, node.pod_number),
            owner: Some("ds".to_owned()),
            node: Some(name.clone()),
            hash: node.pod.clone(),
            ready: !node.pod_unready && node.drain.is_none(),
            deleting: node.pod_deleting,
            trouble: node.pod_trouble.clone(),
        };
        let daemon_set = DaemonSetSeen {
            namespace: "system".to_owned(),
            name: "altiplano-agent".to_owned(),
            uid: "ds".to_owned(),
            settled: !there.behind,
            desired: if there.desired == 0 { self.nodes.len() } else { there.desired },
            on_delete: !there.rolling_update,
            max_unavailable: there.max_unavailable,
            paused: there.paused,
            progress_deadline: Duration::from_mins(10),
            condition: self.condition.clone(),
        };
        let pods = self.nodes.iter().filter(|(_, node)| !node.pod.is_empty()).map(pod).collect();
        Some(Agents { daemon_set, current: there.current.clone(), pods })
    }

    /// Plans the upgrade of the agents, does it to the world but for the Pods, and tells.
    fn step_agents(&mut self, plan: &mut Plan, fleet: &Fleet, memory: &mut upgrade::Memory, second: u64) -> String {
        let mut text = String::new();
        let Some(agents) = self.agents() else { return text };
        let old_crd = self.agents.as_ref().is_some_and(|there| there.old_crd);
        let stale = SETTINGS.stale_after;
        let (upgrades, after) = upgrade::plan(Some(&agents), fleet, plan, stale, std::mem::take(memory), now(second));
        *memory = after;
        plan.upgrades.clone_from(&upgrades.marks);
        for pod in &upgrades.delete {
            let _ = writeln!(text, "  {} goes", pod.uid);
        }
        for (name, node) in &mut self.nodes {
            let mark = upgrades.marks.get(name);
            if node.upgrade.as_ref() != mark {
                let told = mark.map_or("none".to_owned(), |mark| {
                    format!("{}{}", mark.pod_uid, if mark.drain { ", drain" } else { "" })
                });
                let _ = writeln!(text, "  {name}: upgrade {told}");
                node.upgrade = mark.filter(|_| !old_crd).cloned();
            }
        }
        if let Some(progress) = &upgrades.progress {
            let condition = upgrade_status::condition(&agents.daemon_set, progress, now(second));
            if let Some(note) = upgrade_status::event(self.condition.as_ref(), &condition) {
                let _ = writeln!(text, "  event {}{}", if note.warning { "Warning " } else { "" }, note.reason);
            }
            let told = |word: &Option<String>| word.clone().unwrap_or_default();
            let (reason, message) = (told(&condition.reason), told(&condition.message));
            let _ = writeln!(text, "  agents: {}/{reason} {message}", condition.status);
            self.condition = Some(condition);
        }
        if let Some(next) = upgrades.next {
            let _ = writeln!(text, "  next look at the agents at {}s", next.as_secs());
        }
        text
    }

    /// Plans at that second, does the plan to the world, and tells.
    pub(crate) fn step(&mut self, memory: &mut Memory, agents: &mut upgrade::Memory, second: u64) -> String {
        let (fleet, mut plan) = self.plan(memory, second);
        let mut text = self.step_agents(&mut plan, &fleet, agents, second);
        for write in diff::nodes(&fleet, &plan, EPOCH) {
            let name = write.object().1;
            if let Write::DeleteModelNode(_) = write {
                let _ = writeln!(text, "  {name}: the ModelNode goes");
                self.nodes.get_mut(&name).unwrap().no_model_node = true;
                continue;
            }
            let before: Vec<String> = self.nodes[&name].holds.iter().map(|held| self.tell(held)).collect();
            self.hold(&plan, &name);
            let after: Vec<String> = self.nodes[&name].holds.iter().map(|held| self.tell(held)).collect();
            let gone = before.iter().filter(|held| !after.contains(held)).map(|held| format!("-{held}"));
            let new = after.iter().filter(|held| !before.contains(held)).map(|held| format!("+{held}"));
            let changes: Vec<String> = gone.chain(new).collect();
            let made = if self.nodes[&name].no_model_node { "new ModelNode " } else { "" };
            if changes.is_empty() && self.agents.is_some() {
                continue;
            }
            let changes = if changes.is_empty() { "(contents)".to_owned() } else { changes.join(" ") };
            let _ = writeln!(text, "  {name}: {made}{changes}");
            self.nodes.get_mut(&name).unwrap().no_model_node = false;
        }
        for (name, model) in self.models.clone() {
            let there = &plan.models[&format!("uid-{name}")];
            let seen = self.model(&name);
            let Children { service, slices } = children(&fleet, &seen, there);
            let status = status(&fleet, &seen, there, &service, "", now(second));
            let condition = |wanted: &str| {
                let condition = status.conditions.iter().find(|condition| condition.type_ == wanted).unwrap();
                format!("{wanted}={}/{}", condition.status, condition.reason)
            };
            let conditions: Vec<String> =
                ["Ready", "Placed", "ModelAvailable", "Progressing", "Degraded"].into_iter().map(condition).collect();
            let _ = writeln!(
                text,
                "  {name}: {} {} | {}",
                status.ready.as_deref().unwrap_or_default(),
                status.state.as_deref().unwrap_or("-"),
                conditions.join(" ")
            );
            if !there.rejections.is_empty() {
                let _ = writeln!(text, "    not chosen: {}", explain(&there.rejections));
            }
            match &service {
                ServiceStep::Keep => {}
                ServiceStep::Create(service) => {
                    text.push_str("    + Service\n");
                    self.own_services.insert(name.clone(), (**service).clone());
                }
                other => {
                    let _ = writeln!(text, "    Service: {other:?}");
                }
            }
            for slice in slices.values() {
                let endpoint = &slice.endpoints[0];
                let is = endpoint.conditions.as_ref().unwrap();
                let words = [(is.ready, "ready"), (is.serving, "serving"), (is.terminating, "terminating")];
                let words: Vec<&str> =
                    words.iter().filter(|(is, _)| *is == Some(true)).map(|(_, word)| *word).collect();
                let _ = writeln!(text, "    endpoint {}: {}", endpoint.node_name.as_deref().unwrap(), words.join(" "));
            }
            match there.finalizer {
                FinalizerStep::Keep => {}
                FinalizerStep::Add => {
                    text.push_str("    + finalizer\n");
                    self.models.get_mut(&name).unwrap().finalizer = true;
                }
                FinalizerStep::Remove => {
                    let late = &there.drain_timed_out;
                    let late = if late.is_empty() { String::new() } else { format!(", without {}", late.join(", ")) };
                    let _ = writeln!(text, "    - finalizer{late}");
                    self.models.get_mut(&name).unwrap().finalizer = false;
                    if model.deleting {
                        self.models.remove(&name);
                    }
                }
            }
        }
        if let Some(next) = plan.next {
            let _ = writeln!(text, "  next look at {}s", next.as_secs());
        }
        text
    }

    pub(crate) fn plan(&self, memory: &mut Memory, second: u64) -> (Fleet, Plan) {
        let fleet = self.fleet();
        let (plan, after) = plan(&fleet, &SETTINGS, std::mem::take(memory), now(second));
        *memory = after;
        (fleet, plan)
    }

    /// Does to a node what the plan says.
    pub(crate) fn hold(&mut self, plan: &Plan, name: &str) {
        let NodePlan::Hold(entries) = &plan.nodes[name] else { return };
        let held = |entry: &WantedEntry| {
            let raw = match entry {
                WantedEntry::Model(assignment) => RawAssignment::try_from(&**assignment).unwrap().0,
                WantedEntry::AsItIs(raw) => raw.0.clone(),
            };
            let uid = raw["uid"].as_str().unwrap_or_default().to_owned();
            let model = uid.strip_prefix("uid-").unwrap_or(&uid).to_owned();
            let old = self.models.contains_key(&model) && raw["revision"] != json!(self.model(&model).revision);
            Held { estimate: raw["mode"] == "Estimate", model, raw: Some(raw), old }
        };
        let holds = entries.iter().map(held).collect();
        self.nodes.get_mut(name).unwrap().holds = holds;
    }

    fn tell(&self, held: &Held) -> String {
        let old = held.old
            || held.raw.as_ref().is_some_and(|raw| {
                self.models.contains_key(&held.model) && raw["revision"] != json!(self.model(&held.model).revision)
            });
        let kind = if held.estimate { "?" } else { "" };
        format!("{}{kind}{}", held.model, if old { "(old)" } else { "" })
    }
}

fn pod_uid(node: &str, number: u32) -> String {
    format!("pod-{node}-{number}")
}

pub(crate) fn now(second: u64) -> Now {
    let wall = jiff::Timestamp::from_second(1_700_000_000 + i64::try_from(second).unwrap()).unwrap();
    Now { mono: Duration::from_secs(second), wall }
}

/// RFC 7396.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut target[key.as_str()], value);
        }
    }
}
