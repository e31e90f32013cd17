//! What clients may ask for.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::{max_queued, sixty, ten_minutes};

/// What stands before the model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct TrafficSpec {
    /// Requests that may wait on one replica; more get 429 at once.
    #[serde(default = "max_queued")]
    #[schemars(range(min = 0, max = 10_000))]
    pub max_queued: i32,

    /// Seconds that a request waits before it gets 503 with Retry-After.
    #[serde(default = "sixty")]
    #[schemars(range(min = 1, max = 3600))]
    pub queue_timeout_seconds: i32,

    /// Seconds that a request may take in all.
    #[serde(default = "ten_minutes")]
    #[schemars(range(min = 1, max = 86_400))]
    pub request_timeout_seconds: i32,

    /// Limits per client.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub rate_limits: Vec<RateLimit>,
}

impl Default for TrafficSpec {
    fn default() -> Self {
        Self {
            max_queued: max_queued(),
            queue_timeout_seconds: sixty(),
            request_timeout_seconds: ten_minutes(),
            rate_limits: Vec::new(),
        }
    }
}

/// A limit for one client, or for each.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.requestsPerMinute) || has(self.tokensPerMinute)").message("a rate limit needs requestsPerMinute or tokensPerMinute")
)]
pub struct RateLimit {
    /// Client that the limit is for. Default: each client on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub client: Option<String>,

    /// Requests in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub requests_per_minute: Option<i32>,

    /// Prompt and answer tokens in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub tokens_per_minute: Option<i32>,
}
