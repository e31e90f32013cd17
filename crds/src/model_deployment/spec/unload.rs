//! When the model's memory is given back.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::{idle_seconds, thirty, two};

/// When the model leaves memory. An unloaded model is loaded again by the first request, which waits for it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct UnloadSpec {
    /// Never keeps it in memory; `WhenIdle` unloads after `idleSeconds` without a request; `AfterRequest` unloads
    /// `graceSeconds` after the last one ended.
    #[serde(default)]
    pub policy: UnloadPolicy,

    /// Seconds without a request before `WhenIdle` unloads.
    #[serde(default = "idle_seconds")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub idle_seconds: i32,

    /// Seconds after the last request before `AfterRequest` unloads.
    #[serde(default = "two")]
    #[schemars(range(min = 0, max = 3600))]
    pub grace_seconds: i32,

    /// Seconds after a load during which the model is not unloaded to make room for another.
    #[serde(default = "thirty")]
    #[schemars(range(min = 0, max = 86_400))]
    pub min_resident_seconds: i32,

    /// Unloads the model once, each time that this changes, as soon as no request runs; the next request loads it
    /// again. Any text, usually the time. Without effect while `policy` is Never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub requested_at: Option<String>,
}

impl Default for UnloadSpec {
    fn default() -> Self {
        Self {
            policy: UnloadPolicy::default(),
            idle_seconds: idle_seconds(),
            grace_seconds: two(),
            min_resident_seconds: thirty(),
            requested_at: None,
        }
    }
}

/// When a model leaves memory.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnloadPolicy {
    /// Stays in memory.
    Never,
    /// Leaves after a time without requests, or when another model needs the room.
    #[default]
    WhenIdle,
    /// Leaves as soon as nobody uses it.
    AfterRequest,
}
