//! Carries writes out. No decisions here, but for two: nothing is written without the leader's Lease, and what fails is
//! tried again later and later.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::{ModelDeployment, ModelNode, names};
use futures::StreamExt;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::DeserializeGuard;
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde_json::json;
use tracing::{debug, warn};

use super::diff::{Target, Write};
use super::observe::Mirrors;
use crate::clock::Clock;
use crate::leader::Leadership;
use crate::metrics::Metrics;

/// Writes that are under way at the same time.
const CONCURRENT: usize = 8;
/// Longest time that a write may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// First pause after a write has failed, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// Why a write was not done.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A newer leader has written the object.
    #[error("a newer leader has written {0}")]
    Fenced(String),
    /// The leader's Lease has not been renewed in time.
    #[error("this process does not lead any more")]
    NotLeader,
    /// The API server did not answer.
    #[error("the API server did not answer within {} s", TIMEOUT.as_secs())]
    TimedOut,
    /// The API server refused.
    #[error("the API server refused")]
    Api(#[from] kube::Error),
}

impl WriteError {
    /// Name of the variant, for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Fenced(_) => "Fenced",
            Self::NotLeader => "NotLeader",
            Self::TimedOut => "TimedOut",
            Self::Api(kube::Error::Api(status)) if status.is_conflict() => "Conflict",
            Self::Api(kube::Error::Api(status)) if status.is_not_found() => "NotFound",
            Self::Api(kube::Error::Api(status)) if status.is_forbidden() => "Forbidden",
            Self::Api(kube::Error::Api(status)) if status.is_invalid() => "Invalid",
            Self::Api(_) => "Api",
        }
    }

    /// Whether this process must stop at once.
    #[must_use]
    pub fn ends_leadership(&self) -> bool {
        matches!(self, Self::Fenced(_) | Self::NotLeader)
    }
}

/// An error with all its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some libraries repeat their source in their own text.
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// Writes to the API server and keeps the mirrors up to date with its answers.
#[derive(Clone)]
pub struct Writer {
    /// The API server.
    pub client: Client,
    /// Where the answers go.
    pub mirrors: Arc<Mirrors>,
    /// The clock.
    pub clock: Clock,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// The right to write.
    pub leadership: Leadership,
}

impl Writer {
    /// Does all writes, several at a time. The answers come in the order of the writes.
    pub async fn write_all(&self, writes: Vec<Write>) -> Vec<(Write, Result<(), WriteError>)> {
        let done = writes.into_iter().map(|write| async {
            let result = self.write(&write).await;
            (write, result)
        });
        futures::stream::iter(done).buffered(CONCURRENT).collect().await
    }

    async fn write(&self, write: &Write) -> Result<(), WriteError> {
        // Checked just before: a process that was stopped for a while must not go on where it was.
        if !self.leadership.held(self.clock.mono()) {
            return Err(WriteError::NotLeader);
        }
        let (kind, verb) = write.labels();
        self.metrics.write(kind, verb);
        let (namespace, name) = write.object();
        debug!(kind, verb, namespace, name, "writing");
        match tokio::time::timeout(TIMEOUT, self.send(write)).await {
            Err(_) => Err(WriteError::TimedOut),
            Ok(Err(kube::Error::Api(status))) if fenced(write, &status) => Err(WriteError::Fenced(name)),
            Ok(result) => {
                if let Err(kube::Error::Api(status)) = &result
                    && status.is_not_found()
                {
                    self.forget(write);
                }
                result.map_err(WriteError::Api)
            }
        }
    }

    /// What a write has not found is gone, whatever the watch has said so far.
    fn forget(&self, write: &Write) {
        let mirrors = &self.mirrors;
        match write {
            Write::Finalizers { target, .. } | Write::Status { target, .. } => {
                mirrors.models.forget(&target.namespace, &target.name, &target.uid)
            }
            Write::DeletePod(target) => mirrors.upgrade.pods.forget(&target.namespace, &target.name, &target.uid),
            Write::RestoreService(target, _) => mirrors.services.forget(&target.namespace, &target.name, &target.uid),
            Write::ApplySlice(target, _) => mirrors.slices.forget(&target.namespace, &target.name, &target.uid),
            _ => false,
        };
    }

    async fn send(&self, write: &Write) -> kube::Result<()> {
        let mirrors = &self.mirrors;
        let now = || self.clock.mono();
        match write {
            Write::Finalizers { target, resource_version, finalizers } => {
                let patch = json!({"metadata": {
                    "uid": target.uid, "resourceVersion": resource_version, "finalizers": finalizers,
                }});
                let answer = self.models(target).patch(&target.name, &merge(), &Patch::Merge(&patch)).await?;
                mirrors.models.insert(answer, now());
            }
            Write::Status { target, status } => {
                let patch = json!({
                    "apiVersion": ModelDeployment::api_version(&()), "kind": ModelDeployment::kind(&()),
                    "metadata": {"name": target.name, "uid": target.uid}, "status": status,
                });
                let api = self.models(target);
                let answer = api.patch_status(&target.name, &force(), &Patch::Apply(&patch)).await?;
                mirrors.models.insert(answer, now());
            }
            Write::ModelNode { name, models, upgrade } => {
                let mut patch = json!({
                    "apiVersion": ModelNode::api_version(&()), "kind": ModelNode::kind(&()),
                    "metadata": {"name": name}, "spec": {"epoch": self.leadership.epoch(), "models": models},
                });
                if let Some(upgrade) = upgrade {
                    patch["spec"]["upgrade"] = json_of(upgrade);
                }
                let api: Api<DeserializeGuard<ModelNode>> = Api::all(self.client.clone());
                let answer = match api.patch(name, &force(), &Patch::Apply(&patch)).await {
                    // The models matter more; the upgrade says what is wrong.
                    Err(kube::Error::Api(status)) if upgrade.is_some() && too_new(&status) => {
                        warn!(name, "the CRD of ModelNodes is older than this operator and knows no spec.upgrade");
                        if let Some(spec) = patch["spec"].as_object_mut() {
                            spec.remove("upgrade");
                        }
                        api.patch(name, &force(), &Patch::Apply(&patch)).await?
                    }
                    answer => answer?,
                };
                mirrors.model_nodes.insert(answer, now());
            }
            Write::DeleteModelNode(target) => {
                let api: Api<DeserializeGuard<ModelNode>> = Api::all(self.client.clone());
                delete(&api, target).await?;
                mirrors.model_nodes.forget("", &target.name, &target.uid);
            }
            Write::CreateService(service) => {
                let api: Api<Service> = self.namespaced(service);
                mirrors.services.insert(api.create(&create(), service).await?, now());
            }
            Write::RestoreService(target, service) => {
                // A merge, since an apply would not take away what another manager has put there.
                let mut patch = json_of(service);
                patch["metadata"]["uid"] = json!(target.uid);
                patch["spec"]["selector"] = serde_json::Value::Null;
                let api: Api<Service> = self.namespaced(service);
                let answer = api.patch(&target.name, &merge(), &Patch::Merge(&patch)).await?;
                mirrors.services.insert(answer, now());
            }
            Write::DeleteService(target) => {
                delete(&Api::<Service>::namespaced(self.client.clone(), &target.namespace), target).await?;
                mirrors.services.forget(&target.namespace, &target.name, &target.uid);
            }
            Write::CreateSlice(slice) => {
                let api: Api<EndpointSlice> = self.namespaced(slice);
                mirrors.slices.insert(api.create(&create(), slice).await?, now());
            }
            Write::ApplySlice(target, slice) => {
                let mut patch = json_of(slice);
                patch["apiVersion"] = json!(EndpointSlice::api_version(&()));
                patch["kind"] = json!(EndpointSlice::kind(&()));
                patch["metadata"]["uid"] = json!(target.uid);
                let api: Api<EndpointSlice> = self.namespaced(slice);
                let answer = api.patch(&target.name, &force(), &Patch::Apply(&patch)).await?;
                mirrors.slices.insert(answer, now());
            }
            Write::DeletePod(target) => {
                // It is gone when the watch says so: until then its agent ends.
                delete(&Api::<Pod>::namespaced(self.client.clone(), &target.namespace), target).await?;
            }
            Write::AgentsStatus { target, condition } => {
                let patch = json!({
                    "apiVersion": DaemonSet::api_version(&()), "kind": DaemonSet::kind(&()),
                    "metadata": {"name": target.name, "uid": target.uid}, "status": {"conditions": [condition]},
                });
                let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), &target.namespace);
                let answer = api.patch_status(&target.name, &force(), &Patch::Apply(&patch)).await?;
                mirrors.upgrade.daemon_sets.insert(answer, now());
            }
            Write::DeleteSlice(target) => {
                delete(&Api::<EndpointSlice>::namespaced(self.client.clone(), &target.namespace), target).await?;
                mirrors.slices.forget(&target.namespace, &target.name, &target.uid);
            }
        }
        Ok(())
    }

    fn models(&self, target: &Target) -> Api<DeserializeGuard<ModelDeployment>> {
        Api::namespaced(self.client.clone(), &target.namespace)
    }

    fn namespaced<K>(&self, object: &K) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), object.meta().namespace.as_deref().unwrap_or_default())
    }
}

fn merge() -> PatchParams {
    PatchParams { field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

fn force() -> PatchParams {
    PatchParams::apply(names::OPERATOR_FIELD_MANAGER).force()
}

fn create() -> PostParams {
    PostParams { field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

// Plain data with string keys: cannot fail.
fn json_of(object: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(object).unwrap_or_default()
}

/// Deletes that object and no other of its name; one that is gone already is as good.
async fn delete<K>(api: &Api<K>, target: &Target) -> kube::Result<()>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let preconditions = Some(Preconditions { uid: Some(target.uid.clone()), resource_version: None });
    let parameters = DeleteParams { preconditions, ..DeleteParams::default() };
    match api.delete(&target.name, &parameters).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        result => result.map(drop),
    }
}

/// The transition rule on ModelNode.spec.epoch has refused the write.
fn fenced(write: &Write, status: &kube::core::Status) -> bool {
    matches!(write, Write::ModelNode { .. }) && status.is_invalid() && status.message.contains("epoch must not go back")
}

/// The CRD that the API server has is of before `spec.upgrade`: such a write is refused as a whole.
fn too_new(status: &kube::core::Status) -> bool {
    status.message.contains(".spec.upgrade: field not declared in schema")
}

/// Writes that have failed, and when they are due again; and writes that were done, so that one that must be done again
/// and again (because somebody else changes the object back) is done more and more seldom.
#[derive(Debug, Default)]
pub struct Pauses {
    failed: BTreeMap<PauseKey, Tried>,
    done: BTreeMap<PauseKey, Tried>,
}

/// What was written, how often in a row, and until when it is not to be written again. Another content is another write.
#[derive(Debug)]
struct Tried {
    content: u64,
    times: u32,
    until: Duration,
}

fn content(write: &Write) -> u64 {
    let mut hasher = DefaultHasher::new();
    format!("{write:?}").hash(&mut hasher);
    hasher.finish()
}

fn pause(tries: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << tries.min(10)).min(LONGEST_PAUSE)
}

type PauseKey = (&'static str, &'static str, String, String);

impl Pauses {
    fn key(write: &Write) -> PauseKey {
        let ((kind, verb), (namespace, name)) = (write.labels(), write.object());
        (kind, verb, namespace, name)
    }

    /// Whether the write may be tried; if not, when.
    ///
    /// # Errors
    /// The time from which it may.
    pub fn due(&self, write: &Write, now: Duration) -> Result<(), Duration> {
        let key = Self::key(write);
        let mut tried = self.failed.get(&key).into_iter().chain(self.done.get(&key)).filter(|tried| tried.until > now);
        match tried.find(|tried| tried.content == content(write)) {
            Some(tried) => Err(tried.until),
            None => Ok(()),
        }
    }

    /// Notes how a write went; answers when it may be tried again if it failed.
    pub fn note(&mut self, write: &Write, result: &Result<(), WriteError>, now: Duration) -> Option<Duration> {
        let (key, content) = (Self::key(write), content(write));
        let times =
            |tried: Option<&Tried>| tried.filter(|tried| tried.content == content).map_or(0, |tried| tried.times);
        let Err(error) = result else {
            self.failed.remove(&key);
            let repeats = times(self.done.get(&key));
            self.done.insert(key, Tried { content, times: repeats + 1, until: now + pause(repeats) });
            return None;
        };
        let tries = times(self.failed.get(&key));
        // Something newer is on its way here: no reason to wait long.
        let conflict = matches!(error.reason(), "Conflict" | "NotFound");
        let pause = if conflict { pause(tries) / 10 } else { pause(tries) };
        if tries == 0 && !conflict || (tries + 1).is_power_of_two() {
            let (kind, verb, namespace, name) = &key;
            warn!(kind, verb, namespace, name, tries, error = %chain(error), "write failed; trying again");
        }
        self.failed.insert(key, Tried { content, times: tries + 1, until: now + pause });
        Some(now + pause)
    }

    /// Forgets what is long past.
    pub fn prune(&mut self, now: Duration) {
        self.failed.retain(|_, tried| tried.until + LONGEST_PAUSE * 2 > now);
        self.done.retain(|_, tried| tried.until + LONGEST_PAUSE * 2 > now);
    }
}

/// At most one write a second for each ModelDeployment's status, but for the one that says that it has become ready, or
/// is so no more: whoever waits for that must not wait for the limit.
#[derive(Debug, Default)]
pub struct Throttle {
    last: BTreeMap<String, Duration>,
}

/// See [`Throttle`].
pub const STATUS_INTERVAL: Duration = Duration::from_secs(1);

impl Throttle {
    /// Whether a status may be written; if not, when.
    ///
    /// # Errors
    /// The time from which it may.
    pub fn due(&self, uid: &str, urgent: bool, now: Duration) -> Result<(), Duration> {
        match self.last.get(uid).map(|last| *last + STATUS_INTERVAL) {
            Some(due) if due > now && !urgent => Err(due),
            _ => Ok(()),
        }
    }

    /// Notes a write.
    pub fn wrote(&mut self, uid: &str, now: Duration) {
        self.last.retain(|_, last| *last + STATUS_INTERVAL > now);
        self.last.insert(uid.to_owned(), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write() -> Write {
        Write::DeleteModelNode(Target { namespace: String::new(), name: "n".into(), uid: "u".into() })
    }

    #[test]
    fn failures_back_off_and_success_forgets_them() {
        let mut pauses = Pauses::default();
        let mut now = Duration::ZERO;
        let mut waits = Vec::new();
        for _ in 0..9 {
            let until = pauses.note(&write(), &Err(WriteError::TimedOut), now).unwrap();
            assert_eq!(pauses.due(&write(), now), Err(until));
            waits.push(until.saturating_sub(now).as_millis());
            now = until;
            assert_eq!(pauses.due(&write(), now), Ok(()));
        }
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]);
        assert_eq!(pauses.note(&write(), &Ok(()), now), None);
        assert!(pauses.failed.is_empty());
    }

    #[test]
    fn a_write_that_somebody_undoes_is_repeated_more_and_more_seldom() {
        let mut pauses = Pauses::default();
        let mut now = Duration::ZERO;
        let mut waits = Vec::new();
        for _ in 0..3 {
            assert_eq!(pauses.due(&write(), now), Ok(()));
            pauses.note(&write(), &Ok(()), now);
            let until = pauses.due(&write(), now).unwrap_err();
            waits.push(until.saturating_sub(now).as_millis());
            now = until;
        }
        assert_eq!(waits, [500, 1000, 2000]);
        let other = Write::DeleteModelNode(Target { namespace: String::new(), name: "n".into(), uid: "v".into() });
        pauses.note(&write(), &Ok(()), now);
        assert_eq!(pauses.due(&other, now), Ok(()), "another content is another write");
    }

    #[test]
    fn a_status_waits_a_second_unless_it_is_about_readiness() {
        let mut throttle = Throttle::default();
        let at = Duration::from_millis;
        assert_eq!(throttle.due("m", false, at(0)), Ok(()));
        throttle.wrote("m", at(0));
        assert_eq!(throttle.due("m", false, at(300)), Err(at(1000)));
        assert_eq!(throttle.due("m", true, at(300)), Ok(()));
        assert_eq!(throttle.due("other", false, at(300)), Ok(()));
        assert_eq!(throttle.due("m", false, at(1000)), Ok(()));
    }
}
