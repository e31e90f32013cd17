//! What is seen of the agents: their DaemonSet, its revisions and its Pods.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::names;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetCondition};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::watch::{Mirror, Seen};

/// Label of Pods and of the revisions themselves.
const HASH_LABEL: &str = "controller-revision-hash";
/// What a Pod says of its trouble is cut to so many characters.
const LONGEST_TROUBLE: usize = 256;
/// See [`names::UPGRADE_PROGRESS_DEADLINE`].
const PROGRESS_DEADLINE: Duration = Duration::from_mins(10);

/// Mirrors of what is watched for the upgrade. Models are placed without them.
#[derive(Debug, Default)]
pub struct Mirrors {
    /// The agents' DaemonSet.
    pub daemon_sets: Arc<Mirror<DaemonSetSeen>>,
    /// Its revisions.
    pub revisions: Arc<Mirror<RevisionSeen>>,
    /// Its Pods.
    pub pods: Arc<Mirror<PodSeen>>,
}

/// The agents' DaemonSet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DaemonSetSeen {
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub name: String,
    /// metadata.uid.
    pub uid: String,
    /// Whether its controller has seen its newest template.
    pub settled: bool,
    /// Nodes that should have an agent.
    pub desired: usize,
    /// Whether Pods are replaced by this operator, and not by the DaemonSet's own controller.
    pub on_delete: bool,
    /// Agents that may be replaced at the same time.
    pub max_unavailable: usize,
    /// Nothing is to be begun.
    pub paused: bool,
    /// How long models may take to move, and a new agent to serve.
    pub progress_deadline: Duration,
    /// What this operator said last.
    pub condition: Option<DaemonSetCondition>,
}

/// A revision of the DaemonSet's template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevisionSeen {
    /// Uid of the DaemonSet.
    pub owner: Option<String>,
    /// The newest has the highest.
    pub number: i64,
    /// As in the label of its Pods.
    pub hash: String,
}

/// A Pod with an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSeen {
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub name: String,
    /// metadata.uid.
    pub uid: String,
    /// Uid of the DaemonSet.
    pub owner: Option<String>,
    /// The node; `None` before one has been found.
    pub node: Option<String>,
    /// Revision.
    pub hash: String,
    /// Condition Ready.
    pub ready: bool,
    /// Its deletion has been asked for.
    pub deleting: bool,
    /// What keeps it from being Ready, in the kubelet's or the scheduler's words.
    pub trouble: Option<String>,
}

/// The agents at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Agents {
    /// Their DaemonSet.
    pub daemon_set: DaemonSetSeen,
    /// The newest revision.
    pub current: String,
    /// The DaemonSet's Pods.
    pub pods: Vec<PodSeen>,
}

impl Agents {
    /// Takes the snapshot; `None` while something is not known, or there is no DaemonSet.
    #[must_use]
    pub fn observe(mirrors: &Mirrors) -> Option<Self> {
        let Mirrors { daemon_sets, revisions, pods } = mirrors;
        let listed = daemon_sets.listed() && revisions.listed() && pods.listed();
        let blind =
            [daemon_sets.blind_since(), revisions.blind_since(), pods.blind_since()].iter().any(Option::is_some);
        if !listed || blind {
            return None;
        }
        let (_, daemon_set) = daemon_sets.all().into_iter().next()?;
        let ours = |owner: &Option<String>| owner.as_ref() == Some(&daemon_set.uid);
        let revisions = revisions.all().into_iter().map(|(_, revision)| revision).filter(|seen| ours(&seen.owner));
        let current = revisions.max_by_key(|revision| revision.number)?.hash.clone();
        let pods = pods.all().into_iter().map(|(_, pod)| pod).filter(|pod| ours(&pod.owner));
        let mut pods: Vec<PodSeen> = pods.map(|pod| PodSeen::clone(&pod)).collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        Some(Self { daemon_set: DaemonSetSeen::clone(&daemon_set), current, pods })
    }

    /// Nodes whose agent is of an older revision: what is placed there moves again soon.
    #[must_use]
    pub fn outdated(&self) -> BTreeSet<String> {
        let old = self.pods.iter().filter(|pod| pod.hash != self.current && self.daemon_set.settled);
        old.filter_map(|pod| pod.node.clone()).collect()
    }
}

fn owner(metadata: &ObjectMeta) -> Option<String> {
    let mut owners = metadata.owner_references.iter().flatten();
    owners.find(|owner| owner.controller == Some(true) && owner.kind == "DaemonSet").map(|owner| owner.uid.clone())
}

fn label(metadata: &ObjectMeta, key: &str) -> Option<String> {
    metadata.labels.as_ref()?.get(key).cloned()
}

impl Seen for DaemonSetSeen {
    type Object = DaemonSet;
    const KIND: &'static str = "DaemonSet";

    fn see(object: DaemonSet, _: Option<&Self>, _: Duration) -> Self {
        let DaemonSet { metadata, spec, status } = object;
        let note = |key: &str| metadata.annotations.as_ref()?.get(key).map(String::as_str);
        let number = |key: &str| note(key).and_then(|text| text.parse::<u32>().ok()).filter(|number| *number > 0);
        let strategy = spec.and_then(|spec| spec.update_strategy).and_then(|strategy| strategy.type_);
        let status = status.unwrap_or_default();
        let said =
            |condition: &DaemonSetCondition| condition.type_ == altiplano_crds::conditions::types::AGENTS_UP_TO_DATE;
        Self {
            settled: status.observed_generation >= metadata.generation && metadata.deletion_timestamp.is_none(),
            desired: usize::try_from(status.desired_number_scheduled).unwrap_or(0),
            on_delete: strategy.as_deref() == Some("OnDelete"),
            max_unavailable: number(names::UPGRADE_MAX_UNAVAILABLE).map_or(1, |number| number as usize),
            paused: note(names::UPGRADE_PAUSED) == Some("true"),
            progress_deadline: number(names::UPGRADE_PROGRESS_DEADLINE)
                .map_or(PROGRESS_DEADLINE, |seconds| Duration::from_secs(seconds.into())),
            condition: status.conditions.into_iter().flatten().find(said),
            namespace: metadata.namespace.unwrap_or_default(),
            name: metadata.name.unwrap_or_default(),
            uid: metadata.uid.unwrap_or_default(),
        }
    }
}

impl Seen for RevisionSeen {
    type Object = ControllerRevision;
    const KIND: &'static str = "ControllerRevision";

    fn see(object: ControllerRevision, _: Option<&Self>, _: Duration) -> Self {
        let hash = label(&object.metadata, HASH_LABEL).unwrap_or_default();
        Self { owner: owner(&object.metadata), number: object.revision, hash }
    }
}

impl Seen for PodSeen {
    type Object = Pod;
    const KIND: &'static str = "Pod";

    fn see(object: Pod, _: Option<&Self>, _: Duration) -> Self {
        let Pod { metadata, spec, status } = object;
        let status = status.unwrap_or_default();
        Self {
            owner: owner(&metadata),
            node: spec.and_then(|spec| spec.node_name).filter(|node| !node.is_empty()),
            hash: label(&metadata, HASH_LABEL).unwrap_or_default(),
            ready: status.conditions.iter().flatten().any(|is| is.type_ == "Ready" && is.status == "True"),
            deleting: metadata.deletion_timestamp.is_some(),
            trouble: trouble(&status).map(|text| names::clip(&text, LONGEST_TROUBLE)),
            namespace: metadata.namespace.unwrap_or_default(),
            name: metadata.name.unwrap_or_default(),
            uid: metadata.uid.unwrap_or_default(),
        }
    }
}

/// Why the container does not run, or why there is no node for it.
fn trouble(status: &PodStatus) -> Option<String> {
    let of = |container: &ContainerStatus| {
        let state = container.state.as_ref()?;
        let waiting = state.waiting.as_ref().map(|waiting| (&waiting.reason, &waiting.message));
        let (reason, message) =
            waiting.or_else(|| state.terminated.as_ref().map(|ended| (&ended.reason, &ended.message)))?;
        let words: Vec<&str> = [reason, message].into_iter().filter_map(|word| word.as_deref()).collect();
        (!words.is_empty()).then(|| words.join(": "))
    };
    let unscheduled = || {
        let mut conditions = status.conditions.iter().flatten();
        conditions.find(|is| is.type_ == "PodScheduled" && is.status == "False")?.message.clone()
    };
    status.container_statuses.iter().flatten().find_map(of).or_else(unscheduled)
}
