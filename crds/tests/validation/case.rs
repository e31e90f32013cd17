//! A row of `cases.yaml`; the suite against the real API server includes this file too.

use serde::Deserialize;
use serde_json::Value;

/// A ModelDeployment, and what an API server says to it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Case {
    /// What the row is about.
    #[serde(rename = "case")]
    pub(crate) title: String,
    /// `metadata.name`, where it matters.
    pub(crate) name: Option<String>,
    pub(crate) spec: Value,
    /// A part of the refusal; absent: accepted.
    pub(crate) refused: Option<String>,
    /// Only the API server sees it, when it validates strictly.
    #[serde(default)]
    pub(crate) strict_only: bool,
}

/// The table.
pub(crate) fn all() -> Result<Vec<Case>, serde_saphyr::Error> {
    serde_saphyr::from_str(include_str!("cases.yaml"))
}
