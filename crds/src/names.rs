//! Names that operator, agent and chart must agree on: labels, finalizer, field managers, leases.

/// API group of every kind of ours.
pub const GROUP: &str = "altiplano.dev";

/// Version of the operator/agent contract that this build speaks. An operator speaks to agents of its own version
/// and of the one before.
pub const CONTRACT_VERSION: u32 = 1;

/// Label with the ModelDeployment's uid on everything made for it; also `status.selector`, which matches no Pod.
pub const MODEL_LABEL: &str = "altiplano.dev/model";

/// Label with the ModelDeployment's name, for people.
pub const MODEL_NAME_LABEL: &str = "altiplano.dev/model-name";

/// Finalizer on a ModelDeployment, there only while it is placed.
pub const FINALIZER: &str = "altiplano.dev/placement";

/// Value of `app.kubernetes.io/managed-by` and of `endpointslice.kubernetes.io/managed-by` on the operator's objects.
pub const MANAGED_BY: &str = "altiplano-operator";

/// Field manager of the operator's server-side applies.
pub const OPERATOR_FIELD_MANAGER: &str = "altiplano-operator";

/// Field manager of the agent's server-side applies.
pub const AGENT_FIELD_MANAGER: &str = "altiplano-agent";

/// Name of the port in a model's Service and `EndpointSlice`s.
pub const PORT_NAME: &str = "http";

/// Port of every model's Service.
pub const SERVICE_PORT: i32 = 80;

/// Prefix of the name of an agent's Lease; the rest is the node's name.
pub const AGENT_LEASE_PREFIX: &str = "altiplano-agent-";

/// Label on an agent's Lease that tells it from other Leases.
pub const AGENT_LEASE_LABEL: (&str, &str) = ("app.kubernetes.io/component", "agent");

/// Label on an agent's Lease: version of the agent.
pub const AGENT_VERSION_LABEL: &str = "altiplano.dev/agent-version";

/// Label on an agent's Lease: contract version that the agent speaks.
pub const AGENT_CONTRACT_LABEL: &str = "altiplano.dev/contract";

/// Label on an agent's Lease: uid of the Pod that the agent runs in.
pub const AGENT_POD_UID_LABEL: &str = "altiplano.dev/pod-uid";

/// Annotation on the agents' DaemonSet: agents that may be replaced at the same time; 1 without it.
pub const UPGRADE_MAX_UNAVAILABLE: &str = "altiplano.dev/upgrade-max-unavailable";

/// Annotation on the agents' DaemonSet: "true" holds the upgrade of the agents.
pub const UPGRADE_PAUSED: &str = "altiplano.dev/upgrade-paused";

/// Annotation on the agents' DaemonSet: seconds that models may take to move away, and after which a new agent that does
/// not serve is called blocked; 600 without it.
pub const UPGRADE_PROGRESS_DEADLINE: &str = "altiplano.dev/upgrade-progress-deadline-seconds";

/// Name of the Lease with which operators elect a leader.
pub const LEADER_LEASE: &str = "altiplano-operator";

/// Most entries in `ModelNode.spec.models`, `ModelNode.status.models` and `ModelDeployment.status.placements`.
pub const MAX_MODELS_PER_NODE: usize = 64;

/// Longest message that the agent writes into a status, in characters; longer ones are clipped.
pub const MAX_MESSAGE_CHARS: usize = 1024;

/// The name of the Lease that the agent on `node` renews.
#[must_use]
pub fn agent_lease(node: &str) -> String {
    format!("{AGENT_LEASE_PREFIX}{node}")
}

/// The node whose agent renews the Lease called `lease`; `None` when it is not an agent's Lease.
#[must_use]
pub fn node_of_agent_lease(lease: &str) -> Option<&str> {
    lease.strip_prefix(AGENT_LEASE_PREFIX).filter(|node| !node.is_empty())
}

/// `text` cut to at most `limit` characters, with an ellipsis where something was cut.
#[must_use]
pub fn clip(text: &str, limit: usize) -> String {
    if text.chars().count() <= limit {
        return text.to_owned();
    }
    let mut clipped: String = text.chars().take(limit.saturating_sub(1)).collect();
    clipped.push('…');
    clipped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_names_lead_back_to_their_node() {
        assert_eq!(node_of_agent_lease(&agent_lease("gpu-1.example.com")), Some("gpu-1.example.com"));
        assert_eq!(node_of_agent_lease("altiplano-agent-"), None);
        assert_eq!(node_of_agent_lease("altiplano-operator"), None);
    }

    #[test]
    fn clip_counts_characters_not_bytes() {
        assert_eq!(clip("høyfjell", 8), "høyfjell");
        assert_eq!(clip("høyfjell", 4), "høy…");
    }
}
