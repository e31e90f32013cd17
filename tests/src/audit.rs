//! Who wrote what: the API server's audit log.

use std::{fmt, path::Path};

use anyhow::{Context as _, Result};
use serde::Deserialize;

/// Every request that may change something, once it is answered, without bodies.
pub(crate) const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted, Panic]
rules:
- level: Metadata
  verbs: [create, update, patch, delete, deletecollection]
- level: None
";

/// One request that may have changed something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Who: `system:serviceaccount:altiplano-system:altiplano-operator`.
    pub user: String,
    /// `create`, `update`, `patch`, `delete` or `deletecollection`.
    pub verb: String,
    /// The plural, with its subresource if there is one: `modelnodes/status`.
    pub resource: String,
    /// Empty for what is cluster-scoped.
    pub namespace: String,
    /// Empty when the API server chose it.
    pub name: String,
    /// The HTTP status that it was answered with.
    pub code: u16,
}

impl Write {
    /// By the operator or an agent, and more than a sign of life.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.user.starts_with("system:serviceaccount:altiplano-system:") && self.resource != "leases"
    }
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, verb, resource, namespace, name, code } = self;
        write!(f, "{user}: {verb} {resource} {namespace}/{name}: {code}")
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Event {
    verb: String,
    user: User,
    object_ref: Object,
    response_status: Status,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct User {
    username: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Object {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
}

pub(crate) fn read(log: &Path) -> Result<Vec<Write>> {
    let log = std::fs::read_to_string(log).context("no audit log")?;
    // A line without an end is still being written.
    log.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(parse).collect()
}

fn parse(line: &str) -> Result<Write> {
    let Event { verb, user, object_ref, response_status } =
        serde_json::from_str(line).with_context(|| format!("not an audit event: {line}"))?;
    let Object { mut resource, subresource, namespace, name } = object_ref;
    if !subresource.is_empty() {
        resource = format!("{resource}/{subresource}");
    }
    Ok(Write { user: user.username, verb, resource, namespace, name, code: response_status.code })
}
