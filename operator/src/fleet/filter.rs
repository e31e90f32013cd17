//! Why a node is not chosen.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use altiplano_crds::conditions::reasons;
use altiplano_crds::model_deployment::GpuPolicy;
use altiplano_crds::names;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Taint, Toleration};

use super::capacity::{Pool, Pools, Shortage, quantity};
use super::observe::FleetNode;
use super::seen::Model;

/// Why a node is not chosen for a model. Nothing in it changes by itself: it ends up in a status.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// Not enough memory.
    Memory(Box<MemoryShortage>),
    /// The agent refused, with its words.
    Refused {
        /// Reason in the node's status.
        reason: String,
        /// Message in the node's status.
        message: String,
    },
    /// The model needs a GPU and the node has none.
    NoGpu,
    /// 64 models are there.
    ListFull,
    /// It would make the replicas uneven.
    Spread(String),
    /// A taint is not tolerated.
    Taint(String),
    /// Cordoned.
    Cordoned,
    /// Its agent is being replaced.
    Upgrade,
    /// It was asked how much memory the model needs and could not tell.
    EstimateFailed(String),
    /// The agent has stopped renewing its Lease.
    Stale,
    /// The agent has not said yet what it has.
    NotReported,
    /// The agent speaks a contract that this operator does not.
    Contract(String),
    /// The Node has been deleted.
    NodeGone,
    /// A label is missing.
    Selector(String),
    /// No agent runs there.
    NoAgent,
}

/// The numbers of a shortage.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemoryShortage {
    /// Which memory.
    pub pool: Pool,
    /// Bytes needed.
    pub required: i64,
    /// Bytes that there are.
    pub total: i64,
    /// Bytes held by others.
    pub held: i64,
}

impl From<Shortage> for Why {
    fn from(Shortage { pool, required, total, held }: Shortage) -> Self {
        Self::Memory(Box::new(MemoryShortage { pool, required, total, held }))
    }
}

impl Why {
    /// The reason of the condition when this is what stands in the way.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Memory(_) => reasons::INSUFFICIENT_MEMORY,
            Self::Refused { reason, .. } if reason == reasons::INSUFFICIENT_MEMORY => reasons::INSUFFICIENT_MEMORY,
            Self::NoGpu => reasons::NO_DEVICE,
            Self::Refused { reason, .. } if reason == reasons::GPU_REQUIRED || reason == reasons::NO_DEVICE => {
                reasons::NO_DEVICE
            }
            Self::ListFull => reasons::NODE_FULL,
            Self::Stale | Self::Upgrade | Self::NotReported | Self::NoAgent | Self::Contract(_) => {
                reasons::AGENT_UNAVAILABLE
            }
            Self::Refused { .. }
            | Self::Spread(_)
            | Self::Taint(_)
            | Self::Cordoned
            | Self::EstimateFailed(_)
            | Self::NodeGone
            | Self::Selector(_) => reasons::NO_NODE_MATCHES,
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(shortage) => {
                let MemoryShortage { pool, required, total, held } = **shortage;
                let kind = match pool {
                    Pool::Accelerator => "GPU memory",
                    Pool::Host => "memory",
                };
                let free = total.saturating_sub(held).max(0);
                let [required, free, held, total] = [required, free, held, total].map(quantity);
                write!(f, "needs {required} of {kind}, {free} free ({held} of {total} held by other models)")
            }
            Self::Refused { reason, message } if message.is_empty() => write!(f, "refused ({reason})"),
            Self::Refused { reason, message } => write!(f, "refused ({reason}): {message}"),
            Self::NoGpu => f.write_str("has no GPU"),
            Self::ListFull => write!(f, "holds {} models already", names::MAX_MODELS_PER_NODE),
            Self::Spread(text) | Self::EstimateFailed(text) => f.write_str(text),
            Self::Taint(taint) => write!(f, "has the taint {taint}, which is not tolerated"),
            Self::Cordoned => f.write_str("is cordoned"),
            Self::Upgrade => f.write_str("its agent is being replaced"),
            Self::Stale => f.write_str("its agent has stopped renewing its Lease"),
            Self::NotReported => f.write_str("its agent has not reported yet"),
            Self::Contract(version) => write!(f, "its agent speaks contract {version}, which this operator does not"),
            Self::NodeGone => f.write_str("the Node has been deleted"),
            Self::Selector(label) => write!(f, "lacks the label {label}"),
            Self::NoAgent => f.write_str("no agent runs there"),
        }
    }
}

/// Why the model may not be put on that node, as far as node, taints and agent go. `stale` is known to the caller.
#[must_use]
pub fn unsuitable(model: &Model, node: &FleetNode, stale: bool, now: Timestamp) -> Option<Why> {
    let Some(object) = &node.object else { return Some(Why::NodeGone) };
    if let Some(label) = missing_label(&model.spec.placement.node_selector, &object.labels) {
        return Some(Why::Selector(label));
    }
    let Some(agent) = &node.agent else { return Some(Why::NoAgent) };
    if stale {
        return Some(Why::Stale);
    }
    let tolerations = &model.spec.placement.tolerations;
    let repelled = object.taints.iter().find(|taint| {
        matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute") && !tolerated(taint, tolerations, now)
    });
    if object.cordoned {
        return Some(Why::Cordoned);
    }
    if node.upgrade().is_some() {
        return Some(Why::Upgrade);
    }
    if let Some(taint) = repelled {
        return Some(Why::Taint(taint_text(taint)));
    }
    let spoken = names::CONTRACT_VERSION.saturating_sub(1)..=names::CONTRACT_VERSION;
    if !agent.contract.is_some_and(|version| spoken.contains(&version)) {
        return Some(Why::Contract(agent.contract.map_or_else(|| "unknown".to_owned(), |version| version.to_string())));
    }
    let Some(status) = node.node_models().and_then(|models| models.status.as_ref()) else {
        return Some(Why::NotReported);
    };
    if status.agent.is_none() || status.devices.is_empty() {
        return Some(Why::NotReported);
    }
    if model.spec.engine.gpu == GpuPolicy::Required && Pools::of(status).accelerator == 0 {
        return Some(Why::NoGpu);
    }
    None
}

/// Why the model must leave a node that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leave {
    /// The selector no longer matches; it serves on until another node has taken over.
    Selector(String),
    /// It only takes turns with others there, and another node has room for all; it serves on as above.
    Turns,
    /// Its agent is about to be replaced, and another node has room; it serves on as above.
    Upgrade,
    /// A `NoExecute` taint: it leaves even if no other node can take it.
    Evicted(String),
}

impl fmt::Display for Leave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Selector(label) => write!(f, "lacks the label {label}"),
            Self::Turns => f.write_str("has room only in turn with other models"),
            Self::Upgrade => f.write_str("is about to get a new agent"),
            Self::Evicted(taint) => write!(f, "has the taint {taint}, which is not tolerated"),
        }
    }
}

/// Taints by which the control plane says that it does not hear from the kubelet. Whether the agent lives, the operator
/// knows from the agent's own Lease, with its own grace period and its own brake.
const LIFE_SIGNS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];

/// Whether the model must leave the node that holds it.
#[must_use]
pub fn must_leave(model: &Model, node: &FleetNode, now: Timestamp) -> Option<Leave> {
    let object = node.object.as_ref()?;
    let tolerations = &model.spec.placement.tolerations;
    let evicting = object.taints.iter().find(|taint| {
        taint.effect == "NoExecute" && !LIFE_SIGNS.contains(&taint.key.as_str()) && !tolerated(taint, tolerations, now)
    });
    if let Some(taint) = evicting {
        return Some(Leave::Evicted(taint_text(taint)));
    }
    missing_label(&model.spec.placement.node_selector, &object.labels).map(Leave::Selector)
}

/// When a toleration with a time limit ends on that node, if one does.
#[must_use]
pub fn toleration_ends(model: &Model, node: &FleetNode, now: Timestamp) -> Option<Duration> {
    let object = node.object.as_ref()?;
    let tolerations = &model.spec.placement.tolerations;
    let ends = object.taints.iter().filter(|taint| taint.effect == "NoExecute").filter_map(|taint| {
        let limit = tolerations.iter().filter(|toleration| matches(taint, toleration)).map(|t| t.toleration_seconds);
        // One toleration without a limit tolerates for ever.
        let limit = limit.collect::<Option<Vec<i64>>>()?.into_iter().max()?;
        let elapsed = now.as_second().saturating_sub(taint.time_added.as_ref()?.0.as_second());
        u64::try_from(limit.saturating_sub(elapsed)).ok().filter(|seconds| *seconds > 0)
    });
    ends.min().map(Duration::from_secs)
}

/// Whether the node's labels are what the model asks for.
#[must_use]
pub fn selects(model: &Model, node: &FleetNode) -> bool {
    let selector = &model.spec.placement.node_selector;
    node.object.as_ref().is_some_and(|object| missing_label(selector, &object.labels).is_none())
}

fn missing_label(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> Option<String> {
    let missing = selector.iter().find(|(key, value)| labels.get(*key) != Some(value));
    missing.map(|(key, value)| format!("{key}={value}"))
}

/// A toleration with `tolerationSeconds` ends that long after the taint was set.
fn tolerated(taint: &Taint, tolerations: &[Toleration], now: Timestamp) -> bool {
    tolerations.iter().filter(|toleration| matches(taint, toleration)).any(|toleration| {
        let limit = toleration.toleration_seconds.filter(|_| taint.effect == "NoExecute");
        let Some(limit) = limit else { return true };
        let added = taint.time_added.as_ref().map(|time| time.0.as_second());
        added.is_none_or(|added| now.as_second().saturating_sub(added) < limit.max(0))
    })
}

fn matches(taint: &Taint, toleration: &Toleration) -> bool {
    let Toleration { effect, key, operator, toleration_seconds: _, value } = toleration;
    let set = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(str::to_owned);
    if set(effect).is_some_and(|effect| effect != taint.effect) {
        return false;
    }
    let exists = operator.as_deref() == Some("Exists");
    match set(key) {
        None => exists,
        Some(key) if key != taint.key => false,
        Some(_) => exists || value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default(),
    }
}

fn taint_text(taint: &Taint) -> String {
    match taint.value.as_deref().filter(|value| !value.is_empty()) {
        Some(value) => format!("{}={value}:{}", taint.key, taint.effect),
        None => format!("{}:{}", taint.key, taint.effect),
    }
}

/// Nodes that are named for one and the same reason.
const MOST_NAMED: usize = 10;

/// The nodes that were not chosen, alike ones together, the most telling first: "gpu-1: needs …; gpu-2, gpu-3: is
/// cordoned".
#[must_use]
pub fn explain(rejections: &BTreeMap<String, Why>) -> String {
    let mut groups: BTreeMap<&Why, Vec<&str>> = BTreeMap::new();
    for (node, why) in rejections {
        groups.entry(why).or_default().push(node);
    }
    let texts = groups.iter().map(|(why, nodes)| {
        let more = nodes.len().saturating_sub(MOST_NAMED);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        format!("{}{more}: {why}", nodes.iter().take(MOST_NAMED).copied().collect::<Vec<_>>().join(", "))
    });
    texts.collect::<Vec<_>>().join("; ")
}

/// Prefers nodes without an untolerated `PreferNoSchedule` taint.
#[must_use]
pub fn rather_not(model: &Model, node: &FleetNode, now: Timestamp) -> bool {
    let tolerations = &model.spec.placement.tolerations;
    node.object.as_ref().is_some_and(|object| {
        object.taints.iter().any(|taint| taint.effect == "PreferNoSchedule" && !tolerated(taint, tolerations, now))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(text: &str) -> Taint {
        let (rest, effect) = text.rsplit_once(':').unwrap();
        let (key, value) = rest.split_once('=').map_or((rest, None), |(key, value)| (key, Some(value.to_owned())));
        Taint { key: key.to_owned(), value, effect: effect.to_owned(), time_added: None }
    }

    #[test]
    fn table_of_tolerations() {
        let cases = [
            ("gpu=a:NoSchedule", "{key: gpu, operator: Exists}", true),
            ("gpu=a:NoSchedule", "{key: gpu, value: a}", true),
            ("gpu=a:NoSchedule", "{key: gpu, operator: Equal, value: b}", false),
            ("gpu=a:NoSchedule", "{key: gpu, operator: Exists, effect: NoExecute}", false),
            ("gpu=a:NoSchedule", "{operator: Exists}", true),
            ("gpu=a:NoSchedule", "{operator: Equal}", false),
            ("gpu:NoExecute", "{key: gpu}", true),
            ("gpu:NoExecute", "{key: other, operator: Exists}", false),
        ];
        for (text, toleration, expected) in cases {
            let toleration: Toleration = serde_saphyr::from_str(toleration).unwrap();
            let actual = tolerated(&taint(text), std::slice::from_ref(&toleration), Timestamp::UNIX_EPOCH);
            assert_eq!(actual, expected, "{text} {toleration:?}");
        }
    }

    #[test]
    fn a_toleration_with_a_limit_ends() {
        let toleration: Toleration =
            serde_saphyr::from_str("{key: gpu, operator: Exists, tolerationSeconds: 30}").unwrap();
        let mut taint = taint("gpu:NoExecute");
        let at = |second| Timestamp::from_second(second).unwrap();
        taint.time_added = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(100)));
        assert!(tolerated(&taint, std::slice::from_ref(&toleration), at(129)));
        assert!(!tolerated(&taint, std::slice::from_ref(&toleration), at(130)));
    }
}
