//! What the operator keeps of each object: parsed and checked once, when it arrives.

use std::collections::BTreeMap;
use std::time::Duration;

use altiplano_crds::model_node::{AgentUpgrade, RawAssignment, UnsupportedAssignment};
use altiplano_crds::{ModelAssignment, ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus};
use altiplano_crds::{ModelNode, ModelNodeStatus, names, revision};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Service, ServicePort, Taint};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};

use crate::watch::{Outage, Seen};

/// A ModelDeployment.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelSeen {
    /// One that this build understands.
    Readable(Box<Model>),
    /// One that it does not. What runs of it is left alone.
    Unreadable(Unreadable),
}

/// A ModelDeployment that this build understands.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// metadata.uid.
    pub uid: String,
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub name: String,
    /// metadata.generation.
    pub generation: i64,
    /// metadata.resourceVersion, for the change of finalizers.
    pub resource_version: String,
    /// metadata.creationTimestamp.
    pub created: Option<Timestamp>,
    /// Whether its deletion has been asked for.
    pub deleting: bool,
    /// metadata.finalizers.
    pub finalizers: Vec<String>,
    /// What the user wants.
    pub spec: ModelDeploymentSpec,
    /// What the operator said last.
    pub status: ModelDeploymentStatus,
    /// Hash of what needs a new worker.
    pub revision: String,
    /// The same without the served name: models of equal settings need equal memory.
    pub settings: String,
}

/// A ModelDeployment that this build cannot read.
#[derive(Clone, Debug, PartialEq)]
pub struct Unreadable {
    /// metadata.uid.
    pub uid: String,
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub name: String,
    /// Why.
    pub error: String,
}

impl Model {
    /// Name that clients ask for.
    #[must_use]
    pub fn served_name(&self) -> &str {
        self.spec.served_name.as_deref().unwrap_or(&self.name)
    }

    /// Whether our finalizer is on it.
    #[must_use]
    pub fn finalized(&self) -> bool {
        self.finalizers.iter().any(|finalizer| finalizer == names::FINALIZER)
    }

    /// Nodes that should hold it: none when it is going.
    #[must_use]
    pub fn wanted(&self) -> usize {
        if self.deleting { 0 } else { usize::try_from(self.spec.replicas).unwrap_or(0) }
    }

    /// The entry for a node.
    #[must_use]
    pub fn assignment(&self, mode: altiplano_crds::model_node::AssignmentMode) -> ModelAssignment {
        let spec = &self.spec;
        ModelAssignment {
            uid: self.uid.clone(),
            revision: self.revision.clone(),
            generation: self.generation,
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            served_name: self.served_name().to_owned(),
            mode,
            priority: spec.placement.priority,
            model: spec.model.clone(),
            context: spec.context.clone(),
            unload: spec.unload.clone(),
            engine: spec.engine.clone(),
            rollout: spec.rollout.clone(),
            traffic: spec.traffic.clone(),
        }
    }

    /// Reads the object.
    #[must_use]
    pub fn new(object: ModelDeployment) -> Self {
        let ModelDeployment { metadata, spec, status } = object;
        let name = metadata.name.unwrap_or_default();
        let served_name = spec.served_name.as_deref().unwrap_or(&name);
        Self {
            revision: revision::revision(served_name, &spec.model, &spec.context, &spec.engine),
            settings: revision::revision("", &spec.model, &spec.context, &spec.engine),
            uid: metadata.uid.unwrap_or_default(),
            namespace: metadata.namespace.unwrap_or_default(),
            name,
            generation: metadata.generation.unwrap_or_default(),
            resource_version: metadata.resource_version.unwrap_or_default(),
            created: metadata.creation_timestamp.map(|time| time.0),
            deleting: metadata.deletion_timestamp.is_some(),
            finalizers: metadata.finalizers.unwrap_or_default(),
            spec,
            status: status.unwrap_or_default(),
        }
    }
}

impl Seen for ModelSeen {
    type Object = DeserializeGuard<ModelDeployment>;
    const KIND: &'static str = "ModelDeployment";

    fn see(object: Self::Object, _: Option<&Self>, _: Duration) -> Self {
        match object.0 {
            Ok(object) => Self::Readable(Box::new(Model::new(object))),
            Err(invalid) => Self::Unreadable(Unreadable {
                uid: invalid.metadata.uid.unwrap_or_default(),
                namespace: invalid.metadata.namespace.unwrap_or_default(),
                name: invalid.metadata.name.unwrap_or_default(),
                error: invalid.error,
            }),
        }
    }
}

/// A Node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeSeen {
    /// metadata.uid.
    pub uid: String,
    /// metadata.labels.
    pub labels: BTreeMap<String, String>,
    /// spec.taints.
    pub taints: Vec<Taint>,
    /// spec.unschedulable: no new placements.
    pub cordoned: bool,
}

impl Seen for NodeSeen {
    type Object = Node;
    const KIND: &'static str = "Node";

    fn see(object: Node, _: Option<&Self>, _: Duration) -> Self {
        let spec = object.spec.unwrap_or_default();
        Self {
            uid: object.metadata.uid.unwrap_or_default(),
            labels: object.metadata.labels.unwrap_or_default(),
            taints: spec.taints.unwrap_or_default(),
            cordoned: spec.unschedulable.unwrap_or_default(),
        }
    }
}

/// An agent, known by its Lease.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentSeen {
    /// Contract version that it speaks; `None` when its label says nothing readable.
    pub contract: Option<u32>,
    /// Uid of its Pod.
    pub pod_uid: Option<String>,
    /// Operator's monotonic time when it last saw the Lease change, or could look again after an outage.
    pub changed: Duration,
    /// The agent has said goodbye.
    pub released: bool,
    /// This process has seen the Lease change.
    pub alive: bool,
    renewed: Option<MicroTime>,
}

impl AgentSeen {
    /// For tests and tools: an agent last seen at `changed`.
    #[must_use]
    pub fn at(changed: Duration, contract: u32) -> Self {
        Self { contract: Some(contract), pod_uid: None, changed, released: false, alive: true, renewed: None }
    }
}

/// Renewals this close to the one before are no news: the planner has a later deadline for that agent.
const QUIET_RENEWAL: Duration = Duration::from_secs(15);

impl Seen for AgentSeen {
    type Object = Lease;
    const KIND: &'static str = "Lease";

    fn see(object: Lease, previous: Option<&Self>, now: Duration) -> Self {
        let label = |key: &str| object.labels().get(key).cloned();
        let renewed = object.spec.as_ref().and_then(|spec| spec.renew_time.clone());
        let changed = previous.filter(|previous| previous.renewed == renewed).map_or(now, |previous| previous.changed);
        let holder = object.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        Self {
            released: holder.is_none_or(str::is_empty),
            alive: previous.is_some_and(|previous| previous.alive || previous.renewed != renewed),
            contract: label(names::AGENT_CONTRACT_LABEL).and_then(|text| text.parse().ok()),
            pod_uid: label(names::AGENT_POD_UID_LABEL),
            changed,
            renewed,
        }
    }

    fn is_news(&self, previous: &Self) -> bool {
        self.contract != previous.contract
            || self.pod_uid != previous.pod_uid
            || self.released != previous.released
            || self.changed.saturating_sub(previous.changed) >= QUIET_RENEWAL
    }

    /// The time does not count. Who was alive before starts anew, since its own tries come late after an outage; who was
    /// stale stays so.
    fn outage_over(&mut self, Outage { from, to, patience }: Outage) {
        let was_alive = from < self.changed + patience;
        self.changed = if was_alive { to } else { self.changed + to.saturating_sub(from) };
    }
}

/// A ModelNode.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelNodeSeen {
    /// One that this build understands.
    Readable(Box<NodeModels>),
    /// One that it does not; the node gets nothing and loses nothing.
    Unreadable(String),
}

/// What should be and what is on a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeModels {
    /// metadata.uid.
    pub uid: String,
    /// metadata.generation.
    pub generation: i64,
    /// spec.epoch.
    pub epoch: i64,
    /// spec.models.
    pub entries: Vec<Entry>,
    /// spec.upgrade: the agent's Pod is being replaced.
    pub upgrade: Option<AgentUpgrade>,
    /// What the agent says; `None` before it has said anything.
    pub status: Option<ModelNodeStatus>,
}

/// An entry of `spec.models`.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// As it came.
    pub raw: RawAssignment,
    /// As this build reads it.
    pub parsed: Result<ModelAssignment, UnsupportedAssignment>,
}

impl Entry {
    /// Reads an entry.
    #[must_use]
    pub fn new(raw: RawAssignment) -> Self {
        Self { parsed: raw.parse(), raw }
    }

    /// Uid of its ModelDeployment; empty when it has none.
    #[must_use]
    pub fn uid(&self) -> &str {
        match &self.parsed {
            Ok(assignment) => &assignment.uid,
            Err(unsupported) => &unsupported.uid,
        }
    }
}

impl Seen for ModelNodeSeen {
    type Object = DeserializeGuard<ModelNode>;
    const KIND: &'static str = "ModelNode";

    fn see(object: Self::Object, _: Option<&Self>, _: Duration) -> Self {
        match object.0 {
            Ok(ModelNode { metadata, spec, status }) => Self::Readable(Box::new(NodeModels {
                uid: metadata.uid.unwrap_or_default(),
                generation: metadata.generation.unwrap_or_default(),
                epoch: spec.epoch,
                entries: spec.models.into_iter().map(Entry::new).collect(),
                upgrade: spec.upgrade,
                status,
            })),
            Err(invalid) => Self::Unreadable(invalid.error),
        }
    }
}

/// Who controls an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The ModelDeployment of this uid.
    Model(String),
    /// Somebody else, or nobody.
    Stranger(String),
}

impl Owner {
    fn of(metadata: &ObjectMeta) -> Self {
        let controller = metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        match controller {
            Some(owner) if is_model(owner) => Self::Model(owner.uid.clone()),
            Some(owner) => Self::Stranger(format!("{} {}", owner.kind, owner.name)),
            None => Self::Stranger("nobody".to_owned()),
        }
    }
}

fn is_model(owner: &OwnerReference) -> bool {
    owner.kind == ModelDeployment::kind(&()) && owner.api_version.split('/').next() == Some(names::GROUP)
}

/// A Service: of strangers' ones only that they are there.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceSeen {
    /// metadata.uid.
    pub uid: String,
    /// Who controls it.
    pub owner: Owner,
    /// Of ours: labels and ports, to be compared with what they should be.
    pub shape: Option<ServiceShape>,
}

/// What the operator cares about in a Service of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceShape {
    /// metadata.labels.
    pub labels: BTreeMap<String, String>,
    /// spec.ports.
    pub ports: Vec<ServicePort>,
    /// Whether somebody has put a selector on it, which would route requests to Pods.
    pub has_selector: bool,
}

impl Seen for ServiceSeen {
    type Object = Service;
    const KIND: &'static str = "Service";

    fn see(object: Service, _: Option<&Self>, _: Duration) -> Self {
        let owner = Owner::of(&object.metadata);
        let spec = object.spec.unwrap_or_default();
        let shape = matches!(owner, Owner::Model(_)).then(|| ServiceShape {
            labels: object.metadata.labels.unwrap_or_default(),
            ports: spec.ports.unwrap_or_default(),
            has_selector: spec.selector.is_some_and(|selector| !selector.is_empty()),
        });
        Self { uid: object.metadata.uid.unwrap_or_default(), owner, shape }
    }
}

/// An EndpointSlice with our managed-by label.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceSeen {
    /// metadata.uid.
    pub uid: String,
    /// Who controls it.
    pub owner: Owner,
    /// The object: labels, address type, endpoints and ports are compared with what they should be.
    pub object: EndpointSlice,
}

impl Seen for SliceSeen {
    type Object = EndpointSlice;
    const KIND: &'static str = "EndpointSlice";

    fn see(object: EndpointSlice, _: Option<&Self>, _: Duration) -> Self {
        Self { uid: object.uid().unwrap_or_default(), owner: Owner::of(&object.metadata), object }
    }

    fn is_news(&self, previous: &Self) -> bool {
        self.uid != previous.uid
            || self.owner != previous.owner
            || self.object.endpoints != previous.object.endpoints
            || self.object.ports != previous.object.ports
            || self.object.metadata.labels != previous.object.metadata.labels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_makes_nobody_stale_and_revives_nobody() {
        let seconds = Duration::from_secs;
        let outage = Outage { from: seconds(100), to: seconds(280), patience: seconds(30) };
        let after = |changed| {
            let mut agent = AgentSeen::at(seconds(changed), 1);
            agent.outage_over(outage);
            agent.changed.as_secs()
        };
        assert_eq!(after(95), 280, "alive when the watch broke off");
        assert_eq!(after(60), 240, "stale for 10 s before, and 40 s old after as before");
    }
}
