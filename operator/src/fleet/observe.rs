//! The snapshot that a round of planning works on: pure data, taken at one moment.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::model_node::{AgentUpgrade, ModelState};
use altiplano_crds::names;

use super::seen::{
    AgentSeen, Entry, Model, ModelNodeSeen, ModelSeen, NodeModels, NodeSeen, ServiceSeen, SliceSeen, Unreadable,
};
use crate::upgrade;
use crate::upgrade::observe::{DaemonSetSeen, PodSeen, RevisionSeen};
use crate::watch::{Key, Mirror};

/// Mirrors of everything that the operator watches.
#[derive(Debug, Default)]
pub struct Mirrors {
    /// `ModelDeployment`s.
    pub models: Arc<Mirror<ModelSeen>>,
    /// `ModelNode`s.
    pub model_nodes: Arc<Mirror<ModelNodeSeen>>,
    /// Nodes.
    pub nodes: Arc<Mirror<NodeSeen>>,
    /// Leases of agents.
    pub agents: Arc<Mirror<AgentSeen>>,
    /// Services of all namespaces.
    pub services: Arc<Mirror<ServiceSeen>>,
    /// `EndpointSlice`s that carry our managed-by label.
    pub slices: Arc<Mirror<SliceSeen>>,
    /// What is watched for the upgrade of the agents.
    pub upgrade: upgrade::observe::Mirrors,
}

impl Mirrors {
    /// Empty ones. `stale_after` is how long an agent's Lease may stay as it is.
    #[must_use]
    pub fn new(stale_after: Duration) -> Self {
        Self { agents: Arc::new(Mirror::with_patience(stale_after)), ..Self::default() }
    }

    /// Kinds whose first list has not come yet. Without those of the upgrade models are placed all the same.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        use crate::watch::Seen;
        let Self { models, model_nodes, nodes, agents, services, slices, upgrade: _ } = self;
        [
            (ModelSeen::KIND, models.listed()),
            (ModelNodeSeen::KIND, model_nodes.listed()),
            (NodeSeen::KIND, nodes.listed()),
            (AgentSeen::KIND, agents.listed()),
            (ServiceSeen::KIND, services.listed()),
            (SliceSeen::KIND, slices.listed()),
        ]
        .into_iter()
        .filter_map(|(kind, listed)| (!listed).then_some(kind))
        .collect()
    }

    /// When each watch has last said anything.
    #[must_use]
    pub fn last_events(&self) -> [(&'static str, Option<Duration>); 9] {
        use crate::watch::Seen;
        let Self { models, model_nodes, nodes, agents, services, slices, upgrade } = self;
        let upgrade::observe::Mirrors { daemon_sets, revisions, pods } = upgrade;
        [
            (ModelSeen::KIND, models.last_event()),
            (ModelNodeSeen::KIND, model_nodes.last_event()),
            (NodeSeen::KIND, nodes.last_event()),
            (AgentSeen::KIND, agents.last_event()),
            (ServiceSeen::KIND, services.last_event()),
            (SliceSeen::KIND, slices.last_event()),
            (DaemonSetSeen::KIND, daemon_sets.last_event()),
            (RevisionSeen::KIND, revisions.last_event()),
            (PodSeen::KIND, pods.last_event()),
        ]
    }

    /// Highest epoch in any ModelNode.
    #[must_use]
    pub fn highest_epoch(&self) -> i64 {
        let epoch = |seen: &ModelNodeSeen| match seen {
            ModelNodeSeen::Readable(models) => models.epoch,
            ModelNodeSeen::Unreadable(_) => 0,
        };
        self.model_nodes.all().iter().map(|(_, seen)| epoch(seen)).max().unwrap_or(0)
    }
}

/// The whole fleet at one moment.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    /// `ModelDeployment`s that can be read, by uid.
    pub models: BTreeMap<String, Arc<ModelSeen>>,
    /// Uids of those that cannot: what runs of them stays.
    pub unreadable: BTreeSet<String>,
    /// Every Node, agent and ModelNode, by the node's name.
    pub nodes: BTreeMap<String, FleetNode>,
    /// Nodes whose agent is of an older revision than the agents' DaemonSet.
    pub outdated: BTreeSet<String>,
    /// Since when the agents' Leases cannot be watched, if they cannot: nobody becomes stale meanwhile.
    pub blind_since: Option<Duration>,
    /// Services by namespace and name.
    pub services: BTreeMap<Key, Arc<ServiceSeen>>,
    /// `EndpointSlice`s by namespace and name.
    pub slices: BTreeMap<Key, Arc<SliceSeen>>,
}

/// A node with everything known about it.
#[derive(Clone, Debug, Default)]
pub struct FleetNode {
    /// Its name.
    pub name: String,
    /// The Node; `None` when it has been deleted.
    pub object: Option<Arc<NodeSeen>>,
    /// The agent's Lease; `None` when there is none.
    pub agent: Option<Arc<AgentSeen>>,
    /// The ModelNode; `None` when there is none.
    pub models: Option<Arc<ModelNodeSeen>>,
}

impl Fleet {
    /// Takes the snapshot.
    #[must_use]
    pub fn observe(mirrors: &Mirrors) -> Self {
        let mut fleet = Self { blind_since: mirrors.agents.blind_since(), ..Self::default() };
        for (_, seen) in mirrors.models.all() {
            match &*seen {
                ModelSeen::Readable(model) => {
                    fleet.models.insert(model.uid.clone(), Arc::clone(&seen));
                }
                ModelSeen::Unreadable(unreadable) => {
                    fleet.unreadable.insert(unreadable.uid.clone());
                }
            }
        }
        for ((_, name), seen) in mirrors.model_nodes.all() {
            fleet.node(&name).models = Some(seen);
        }
        for ((_, lease), seen) in mirrors.agents.all() {
            if let Some(name) = names::node_of_agent_lease(&lease) {
                fleet.node(name).agent = Some(seen);
            }
        }
        for ((_, name), seen) in mirrors.nodes.all() {
            fleet.node(&name).object = Some(seen);
        }
        fleet.services = mirrors.services.all().into_iter().collect();
        fleet.slices = mirrors.slices.all().into_iter().collect();
        fleet
    }

    /// The node of that name, new when it is not known yet.
    pub fn node(&mut self, name: &str) -> &mut FleetNode {
        self.nodes.entry(name.to_owned()).or_insert_with(|| FleetNode { name: name.to_owned(), ..FleetNode::default() })
    }

    /// The models that can be read, by uid.
    pub fn models(&self) -> impl Iterator<Item = &Model> {
        self.models.values().filter_map(|seen| match &**seen {
            ModelSeen::Readable(model) => Some(&**model),
            ModelSeen::Unreadable(Unreadable { .. }) => None,
        })
    }

    /// The model of that uid.
    #[must_use]
    pub fn model(&self, uid: &str) -> Option<&Model> {
        match &**self.models.get(uid)? {
            ModelSeen::Readable(model) => Some(model),
            ModelSeen::Unreadable(_) => None,
        }
    }
}

impl FleetNode {
    /// The ModelNode, when there is one that can be read.
    #[must_use]
    pub fn node_models(&self) -> Option<&NodeModels> {
        match self.models.as_deref()? {
            ModelNodeSeen::Readable(models) => Some(models),
            ModelNodeSeen::Unreadable(_) => None,
        }
    }

    /// Entries of the ModelNode's spec.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        self.node_models().map_or(&[], |models| &models.entries)
    }

    /// The replacement of its agent, if one goes on.
    #[must_use]
    pub fn upgrade(&self) -> Option<&AgentUpgrade> {
        self.node_models()?.upgrade.as_ref()
    }

    /// Whether the agent that is there now is the one to be replaced.
    #[must_use]
    pub fn is_to_be_replaced(&self) -> bool {
        let alive = self.agent.as_ref().and_then(|agent| agent.pod_uid.as_deref());
        self.upgrade().is_some_and(|upgrade| alive.is_none_or(|alive| alive == upgrade.pod_uid))
    }

    /// What the agent says about the model, of any revision.
    pub fn states<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = &'a ModelState> {
        let status = self.node_models().and_then(|models| models.status.as_ref());
        status.into_iter().flat_map(|status| &status.models).filter(move |state| state.uid == uid)
    }

    /// The node's label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.object.as_ref()?.labels.get(key).map(String::as_str)
    }
}
