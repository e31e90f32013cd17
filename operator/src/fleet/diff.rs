//! The writes that bring what is to what should be. Pure: a settled fleet has none.

use altiplano_crds::model_node::{AgentUpgrade, RawAssignment};
use altiplano_crds::{ModelDeploymentStatus, names};
use k8s_openapi::api::apps::v1::DaemonSetCondition;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::children::{Children, ServiceStep};
use super::observe::{Fleet, FleetNode};
use super::plan::{FinalizerStep, ModelPlan, NodePlan, Plan, WantedEntry};
use super::seen::{Model, Owner};

/// Namespace, name and uid of an object that is to be changed or deleted, and of no other of that name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Namespace; empty for kinds of the cluster.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Uid; empty for one that is yet to be made.
    pub uid: String,
}

/// A write to the API server.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// metadata.finalizers of a ModelDeployment, if it has not changed in between.
    Finalizers {
        /// The ModelDeployment.
        target: Target,
        /// Its resourceVersion.
        resource_version: String,
        /// All finalizers that it should have.
        finalizers: Vec<String>,
    },
    /// A ModelNode's spec; makes the ModelNode where it is missing.
    ModelNode {
        /// Its name.
        name: String,
        /// spec.models.
        models: Vec<RawAssignment>,
        /// spec.upgrade.
        upgrade: Option<AgentUpgrade>,
    },
    /// A ModelNode goes.
    DeleteModelNode(Target),
    /// A new Service.
    CreateService(Box<Service>),
    /// A Service of ours that somebody has changed.
    RestoreService(Target, Box<Service>),
    /// A Service of ours goes.
    DeleteService(Target),
    /// A new EndpointSlice.
    CreateSlice(Box<EndpointSlice>),
    /// An EndpointSlice of ours.
    ApplySlice(Target, Box<EndpointSlice>),
    /// An EndpointSlice of ours goes.
    DeleteSlice(Target),
    /// A ModelDeployment's status.
    Status {
        /// The ModelDeployment.
        target: Target,
        /// The status.
        status: Box<ModelDeploymentStatus>,
    },
    /// An agent's Pod goes.
    DeletePod(Target),
    /// The condition of the agents' DaemonSet.
    AgentsStatus {
        /// The DaemonSet.
        target: Target,
        /// Its condition.
        condition: Box<DaemonSetCondition>,
    },
}

impl Write {
    /// Kind and verb, as they stand in metrics.
    #[must_use]
    pub fn labels(&self) -> (&'static str, &'static str) {
        match self {
            Self::Finalizers { .. } => ("ModelDeployment", "patch"),
            Self::ModelNode { .. } => ("ModelNode", "apply"),
            Self::DeleteModelNode(_) => ("ModelNode", "delete"),
            Self::CreateService(_) => ("Service", "create"),
            Self::RestoreService(..) => ("Service", "apply"),
            Self::DeleteService(_) => ("Service", "delete"),
            Self::CreateSlice(_) => ("EndpointSlice", "create"),
            Self::ApplySlice(..) => ("EndpointSlice", "apply"),
            Self::DeleteSlice(_) => ("EndpointSlice", "delete"),
            Self::Status { .. } => ("ModelDeploymentStatus", "apply"),
            Self::DeletePod(_) => ("Pod", "delete"),
            Self::AgentsStatus { .. } => ("DaemonSetStatus", "apply"),
        }
    }

    /// Namespace and name of what is written.
    #[must_use]
    pub fn object(&self) -> (String, String) {
        let named = |target: &Target| (target.namespace.clone(), target.name.clone());
        let of = |meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
            (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
        };
        match self {
            Self::ModelNode { name, .. } => (String::new(), name.clone()),
            Self::CreateService(service) => of(&service.metadata),
            Self::CreateSlice(slice) => of(&slice.metadata),
            Self::Finalizers { target, .. }
            | Self::DeleteModelNode(target)
            | Self::RestoreService(target, _)
            | Self::DeleteService(target)
            | Self::ApplySlice(target, _)
            | Self::DeleteSlice(target)
            | Self::DeletePod(target)
            | Self::AgentsStatus { target, .. }
            | Self::Status { target, .. } => named(target),
        }
    }
}

fn target(model: &Model) -> Target {
    Target { namespace: model.namespace.clone(), name: model.name.clone(), uid: model.uid.clone() }
}

/// `ModelNode`s that differ from the plan. `epoch` is the leader's term: its first act is to put it on every ModelNode.
#[must_use]
pub fn nodes(fleet: &Fleet, plan: &Plan, epoch: i64) -> Vec<Write> {
    let writes = plan.nodes.iter().filter_map(|(name, wanted)| {
        let node = fleet.nodes.get(name)?;
        match wanted {
            NodePlan::Delete { uid } => {
                let target = Target { namespace: String::new(), name: name.clone(), uid: uid.clone() };
                Some(Write::DeleteModelNode(target))
            }
            NodePlan::Hold(entries) => {
                let upgrade = plan.upgrades.get(name);
                let there = node.node_models().is_some_and(|models| models.epoch == epoch) && same(node, entries);
                let there = there && node.upgrade() == upgrade;
                let write = || Write::ModelNode { name: name.clone(), models: raw(entries), upgrade: upgrade.cloned() };
                (!there).then(write)
            }
        }
    });
    writes.collect()
}

fn same(node: &FleetNode, wanted: &[WantedEntry]) -> bool {
    let there = node.entries();
    there.len() == wanted.len()
        && there.iter().zip(wanted).all(|(there, wanted)| match wanted {
            WantedEntry::Model(wanted) => there.parsed.as_ref() == Ok(&**wanted),
            WantedEntry::AsItIs(wanted) => there.raw == *wanted,
        })
}

fn raw(entries: &[WantedEntry]) -> Vec<RawAssignment> {
    let raw = entries.iter().filter_map(|entry| match entry {
        // Plain data with string keys: it can always be written as JSON.
        WantedEntry::Model(assignment) => RawAssignment::try_from(&**assignment).ok(),
        WantedEntry::AsItIs(raw) => Some(raw.clone()),
    });
    raw.collect()
}

/// The finalizer of a model.
#[must_use]
pub fn finalizer(model: &Model, plan: &ModelPlan) -> Option<Write> {
    let mut finalizers = model.finalizers.clone();
    match plan.finalizer {
        FinalizerStep::Keep => return None,
        FinalizerStep::Add => finalizers.push(names::FINALIZER.to_owned()),
        FinalizerStep::Remove => finalizers.retain(|finalizer| finalizer != names::FINALIZER),
    }
    let resource_version = model.resource_version.clone();
    Some(Write::Finalizers { target: target(model), resource_version, finalizers })
}

/// Service and `EndpointSlice`s of a model.
#[must_use]
pub fn children(fleet: &Fleet, model: &Model, wanted: &Children) -> Vec<Write> {
    let mut writes = Vec::new();
    match &wanted.service {
        ServiceStep::Keep | ServiceStep::Taken { .. } => {}
        ServiceStep::Create(service) => writes.push(Write::CreateService(service.clone())),
        ServiceStep::Restore(service) => {
            let key = (model.namespace.clone(), model.name.clone());
            let uid = fleet.services.get(&key).map(|there| there.uid.clone()).unwrap_or_default();
            writes.push(Write::RestoreService(Target { uid, ..target(model) }, service.clone()));
        }
        ServiceStep::Delete { uid } => {
            writes.push(Write::DeleteService(Target { uid: uid.clone(), ..target(model) }));
        }
    }
    for (name, slice) in &wanted.slices {
        let there = fleet.slices.get(&(model.namespace.clone(), name.clone()));
        match there {
            None if model.deleting => {}
            None => writes.push(Write::CreateSlice(Box::new(slice.clone()))),
            Some(there) if there.owner == Owner::Model(model.uid.clone()) => {
                let (is, should) = (&there.object, slice);
                if is.endpoints != should.endpoints
                    || is.ports != should.ports
                    || is.metadata.labels != should.metadata.labels
                {
                    let target = Target { name: name.clone(), uid: there.uid.clone(), ..target(model) };
                    writes.push(Write::ApplySlice(target, Box::new(slice.clone())));
                }
            }
            // Another incarnation's: the garbage collector takes it away.
            Some(_) => {}
        }
    }
    for ((namespace, name), there) in &fleet.slices {
        let ours = *namespace == model.namespace && there.owner == Owner::Model(model.uid.clone());
        if ours && !wanted.slices.contains_key(name) {
            let target = Target { name: name.clone(), uid: there.uid.clone(), ..target(model) };
            writes.push(Write::DeleteSlice(target));
        }
    }
    writes
}

/// The status of a model.
#[must_use]
pub fn status(model: &Model, wanted: ModelDeploymentStatus) -> Option<Write> {
    (model.status != wanted).then(|| Write::Status { target: target(model), status: Box::new(wanted) })
}
