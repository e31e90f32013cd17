//! What should stand beside a ModelDeployment: its Service and an EndpointSlice per node and address family. Pure.
//!
//! Only what carries our ownerReference is ever changed. A Service of that name that somebody else has made is left
//! alone, and the ModelDeployment says so.

use std::collections::BTreeMap;
use std::net::IpAddr;

use altiplano_crds::conditions::states;
use altiplano_crds::model_node::ModelState;
use altiplano_crds::{ModelDeployment, names};
use k8s_openapi::api::core::v1::{ObjectReference, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use sha2::{Digest, Sha256};

use super::observe::{Fleet, FleetNode};
use super::plan::{ModelPlan, current_status};
use super::seen::{Model, Owner};

const ZONE: &str = "topology.kubernetes.io/zone";

/// What should stand beside a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Children {
    /// What to do about the Service.
    pub service: ServiceStep,
    /// `EndpointSlice`s by name.
    pub slices: BTreeMap<String, EndpointSlice>,
}

/// What to do about the Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ServiceStep {
    /// Nothing: it is as it should be, or the model is going.
    #[default]
    Keep,
    /// It is made.
    Create(Box<Service>),
    /// It is brought back to what it should be.
    Restore(Box<Service>),
    /// It belongs to a ModelDeployment of that name that has been deleted, and goes.
    Delete {
        /// Its uid.
        uid: String,
    },
    /// Somebody else's.
    Taken {
        /// Who controls it.
        by: String,
    },
}

/// What should stand beside the model.
#[must_use]
pub fn children(fleet: &Fleet, model: &Model, plan: &ModelPlan) -> Children {
    let service = service_step(fleet, model);
    // A slice belongs to a Service by a label: with our Service missing it would route a stranger's traffic to us.
    let ours = matches!(service, ServiceStep::Keep | ServiceStep::Restore(_));
    let slices = if ours { slices(fleet, model, plan) } else { BTreeMap::new() };
    Children { service, slices }
}

fn service_step(fleet: &Fleet, model: &Model) -> ServiceStep {
    if model.deleting {
        return ServiceStep::Keep;
    }
    let wanted = service(model);
    let key = (model.namespace.clone(), model.name.clone());
    let Some(there) = fleet.services.get(&key) else { return ServiceStep::Create(Box::new(wanted)) };
    match (&there.owner, &there.shape) {
        (Owner::Model(uid), Some(shape)) if *uid == model.uid => {
            let ports = wanted.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
            let same_ports = ports.clone().count() == shape.ports.len()
                && ports.zip(&shape.ports).all(|(wanted, there)| {
                    (&wanted.name, wanted.port) == (&there.name, there.port)
                        && there.protocol.as_deref().unwrap_or("TCP") == "TCP"
                });
            let labels = wanted.metadata.labels.iter().flatten();
            let same_labels = labels.clone().all(|(key, value)| shape.labels.get(key) == Some(value));
            if same_ports && same_labels && !shape.has_selector {
                ServiceStep::Keep
            } else {
                ServiceStep::Restore(Box::new(wanted))
            }
        }
        (Owner::Model(_), _) => ServiceStep::Delete { uid: there.uid.clone() },
        (Owner::Stranger(by), _) => ServiceStep::Taken { by: by.clone() },
    }
}

fn labels(model: &Model) -> BTreeMap<String, String> {
    BTreeMap::from([
        ("app.kubernetes.io/managed-by".to_owned(), names::MANAGED_BY.to_owned()),
        (names::MODEL_LABEL.to_owned(), model.uid.clone()),
        (names::MODEL_NAME_LABEL.to_owned(), model.name.clone()),
    ])
}

fn owner(model: &Model) -> OwnerReference {
    OwnerReference {
        api_version: ModelDeployment::api_version(&()).into_owned(),
        kind: ModelDeployment::kind(&()).into_owned(),
        name: model.name.clone(),
        uid: model.uid.clone(),
        controller: Some(true),
        block_owner_deletion: None,
    }
}

fn metadata(model: &Model, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(model.namespace.clone()),
        labels: Some(labels),
        owner_references: Some(vec![owner(model)]),
        ..ObjectMeta::default()
    }
}

/// No selector: the operator keeps the `EndpointSlice`s, since models run inside the agents' Pods.
fn service(model: &Model) -> Service {
    Service {
        metadata: metadata(model, model.name.clone(), labels(model)),
        spec: Some(ServiceSpec {
            ports: Some(vec![ServicePort {
                name: Some(names::PORT_NAME.to_owned()),
                port: names::SERVICE_PORT,
                protocol: Some("TCP".to_owned()),
                app_protocol: Some("http".to_owned()),
                ..ServicePort::default()
            }]),
            ip_family_policy: Some("PreferDualStack".to_owned()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn slices(fleet: &Fleet, model: &Model, plan: &ModelPlan) -> BTreeMap<String, EndpointSlice> {
    let mut slices = BTreeMap::new();
    let holders = plan.holders.iter().map(|holder| (&holder.node, Some(holder)));
    let draining = plan.draining.iter().map(|node| (node, None));
    for (name, holder) in holders.chain(draining) {
        let Some(node) = fleet.nodes.get(name) else { continue };
        let Some(state) = speaking(node, &model.uid) else { continue };
        let Some(port) = state.port else { continue };
        let conditions = match holder {
            Some(holder) => {
                let current = current_status(node).is_some();
                let accepts = holder.accepts && current;
                let draining = state.state == states::DRAINING && current && !holder.stale;
                conditions(accepts, accepts || draining, draining)
            }
            // Taken off this node: new requests go elsewhere, those that come all the same are still served.
            None => conditions(false, current_status(node).is_some(), true),
        };
        let status = node.node_models().and_then(|models| models.status.as_ref());
        for address in status.into_iter().flat_map(|status| &status.addresses) {
            let Ok(ip) = address.address.parse::<IpAddr>() else { continue };
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let slice = slice(model, node, family, ip, port, conditions.clone());
            slices.insert(slice.metadata.name.clone().unwrap_or_default(), slice);
        }
    }
    slices
}

fn conditions(ready: bool, serving: bool, terminating: bool) -> EndpointConditions {
    EndpointConditions { ready: Some(ready), serving: Some(serving), terminating: Some(terminating) }
}

/// Of what a node says about several revisions of a model, what a request would meet.
#[must_use]
pub fn speaking<'a>(node: &'a FleetNode, uid: &'a str) -> Option<&'a ModelState> {
    let rank = |state: &&ModelState| match state.state.as_str() {
        states::READY => 0,
        states::UNLOADED => 1,
        states::DRAINING => 3,
        _ => 2,
    };
    node.states(uid).filter(|state| state.state != states::ESTIMATED).min_by_key(rank)
}

fn slice(
    model: &Model,
    node: &FleetNode,
    family: &str,
    ip: IpAddr,
    port: i32,
    conditions: EndpointConditions,
) -> EndpointSlice {
    let digest = Sha256::digest(format!("{}/{}/{family}", model.uid, node.name));
    let hash = digest.iter().take(5).fold(String::new(), |mut hex, byte| {
        use std::fmt::Write as _;
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let mut labels = labels(model);
    labels.insert("kubernetes.io/service-name".to_owned(), model.name.clone());
    labels.insert("endpointslice.kubernetes.io/managed-by".to_owned(), names::MANAGED_BY.to_owned());
    EndpointSlice {
        metadata: metadata(model, format!("{}-{hash}", model.name), labels),
        address_type: family.to_owned(),
        endpoints: vec![Endpoint {
            addresses: vec![ip.to_string()],
            conditions: Some(conditions),
            node_name: Some(node.name.clone()),
            zone: node.label(ZONE).map(str::to_owned),
            target_ref: Some(ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(node.name.clone()),
                uid: node.object.as_ref().map(|object| object.uid.clone()),
                ..ObjectReference::default()
            }),
            ..Endpoint::default()
        }],
        ports: Some(vec![EndpointPort {
            name: Some(names::PORT_NAME.to_owned()),
            port: Some(port),
            protocol: Some("TCP".to_owned()),
            app_protocol: Some("http".to_owned()),
        }]),
    }
}
