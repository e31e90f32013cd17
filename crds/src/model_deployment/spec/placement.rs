//! Where replicas run, and how many.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::{four, idle_seconds, one, thirty};
use crate::schema;

/// Which nodes may hold the model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PlacementSpec {
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,

    /// Taints of nodes that are tolerated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::tolerations")]
    pub tolerations: Vec<Toleration>,

    /// Label of nodes whose values replicas are spread over, such as `topology.kubernetes.io/zone`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub topology_key: Option<String>,

    /// By how many replicas two values of `topologyKey` may differ. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_skew: Option<i32>,

    /// Models of higher priority are placed first, and keep their memory.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: i32,
}

/// Bounds and aim of the built-in autoscaler.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.minReplicas <= self.maxReplicas").message("minReplicas must not be greater than maxReplicas")
)]
pub struct AutoscalingSpec {
    /// Fewest replicas.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub min_replicas: i32,

    /// Most replicas.
    #[schemars(range(min = 1, max = 64))]
    pub max_replicas: i32,

    /// Concurrent requests (running and waiting) that one replica should have.
    #[serde(default = "four")]
    #[schemars(range(min = 1, max = 1000))]
    pub target_concurrency: i32,

    /// Seconds during which the highest wish counts, before replicas are taken away.
    #[serde(default = "idle_seconds")]
    #[schemars(range(min = 0, max = 86_400))]
    pub scale_down_stabilization_seconds: i32,
}

/// How a change reaches the replicas.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.maxSurge) || !has(self.maxUnavailable) || self.maxSurge > 0 || self.maxUnavailable > 0").message("maxSurge and maxUnavailable must not both be 0")
)]
pub struct RolloutSpec {
    /// Replicas above `replicas` that may be loaded during a change.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub max_surge: i32,

    /// Replicas that may be missing during a change.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub max_unavailable: i32,

    /// Seconds that running requests get to end before a replica goes.
    #[serde(default = "thirty")]
    #[schemars(range(min = 0, max = 86_400))]
    pub drain_seconds: i32,
}

impl Default for RolloutSpec {
    fn default() -> Self {
        Self { max_surge: one(), max_unavailable: one(), drain_seconds: thirty() }
    }
}
