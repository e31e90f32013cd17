//! The Kubernetes side of a node: its own ModelNode is watched, and its status is written.
//!
//! The agent has no right to create a ModelNode. While there is none, it keeps what it serves and writes nothing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use altiplano_crds::conditions::states;
use altiplano_crds::names::AGENT_FIELD_MANAGER;
use altiplano_crds::{ModelNode, ModelNodeStatus};
use futures::TryStreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::api::{Api, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::observe::Desired;
use super::recall::Recall;

/// Time between two writes, on average.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// Writes that may follow each other at once after a quiet time: a model that is estimated, loaded and ready within a
/// second is not to be reported a second late.
const WRITE_BURST: u32 = 4;

/// Changes that come within this time are one write: those that somebody waits for, and steps on the way.
const GATHER: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));

/// Writes that steps on the way leave to what somebody waits for.
const KEPT_WRITES: u32 = 2;

/// The longest wait after a write that failed.
const LONGEST_BACKOFF: Duration = Duration::from_secs(15);

/// The longest that a write may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The ModelNode as it was last seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// metadata.uid; `None` while there is no ModelNode.
    pub object: Option<String>,
    /// Its status.
    pub status: ModelNodeStatus,
}

/// Watches the ModelNode called `node`. What it wants goes to `wanted`; its absence goes nowhere, so that what is
/// served stays.
pub async fn watch_own(
    api: Api<DeserializeGuard<ModelNode>>,
    node: &str,
    wanted: watch::Sender<Option<Desired>>,
    seen: watch::Sender<Seen>,
    recall: Recall,
    shutdown: CancellationToken,
) {
    let config = watcher::Config::default().fields(&format!("metadata.name={node}"));
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    let mut last: Option<(Option<String>, Option<i64>)> = None;
    let mut found = false;
    loop {
        let event = tokio::select! {
            () = shutdown.cancelled() => return,
            event = events.try_next() => event,
        };
        let object = match event {
            Ok(Some(Event::Apply(object))) => object,
            Ok(Some(Event::InitApply(object))) => {
                found = true;
                object
            }
            Ok(Some(Event::Init)) => {
                found = false;
                continue;
            }
            Ok(Some(Event::InitDone)) if found => continue,
            Ok(Some(Event::Delete(_) | Event::InitDone)) => {
                tracing::info!(node, "there is no ModelNode; what is served stays");
                seen.send_replace(Seen::default());
                continue;
            }
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(error = %super::apply::chain(&error), "cannot watch the ModelNode; what is served stays");
                continue;
            }
        };
        let object = match object.0 {
            Ok(object) => object,
            Err(error) => {
                tracing::error!(%error, node, "the ModelNode cannot be read; what is served stays");
                continue;
            }
        };
        let (uid, generation) = (object.uid(), object.metadata.generation);
        seen.send_if_modified(|seen| {
            let now = Seen { object: uid.clone(), status: object.status.clone().unwrap_or_default() };
            let changed = *seen != now;
            *seen = now;
            changed
        });
        // Our own status comes back as an event, too.
        let version = (uid, generation);
        if last.as_ref() != Some(&version) {
            last = Some(version);
            wanted.send_replace(Some(Desired::of(generation, &object.spec)));
            recall.save(&object.spec.models).await;
        }
    }
}

/// Writes the status until `shutdown`, while there is a ModelNode and this agent holds the Lease.
pub async fn write_status(
    api: Api<ModelNode>,
    node: &str,
    mut status: watch::Receiver<ModelNodeStatus>,
    mut seen: watch::Receiver<Seen>,
    mut held: watch::Receiver<Option<Instant>>,
    shutdown: CancellationToken,
) {
    let mut writer = Writer::default();
    let mut bucket = Bucket::new(Instant::now());
    let mut backoff = Backoff::default();
    let mut due_since = None;
    loop {
        let now = status.borrow_and_update().clone();
        let object = seen.borrow_and_update().clone();
        let holds = held.borrow_and_update().is_some();
        let due = if holds { writer.due(&now, &object) } else { None };
        if due.is_none() {
            due_since = None;
        }
        let wait = due.as_ref().map(|(_, urgency)| {
            let (kept, gather) = match urgency {
                Urgency::Awaited => (0, GATHER.0),
                Urgency::OnTheWay => (KEPT_WRITES, GATHER.1),
            };
            // From the first change on: a stream of changes must not put the write off for ever.
            let gathered = due_since.get_or_insert_with(Instant::now).elapsed();
            let now = Instant::now();
            bucket.wait(kept, now).max(backoff.wait(now)).max(gather.saturating_sub(gathered))
        });
        tokio::select! {
            () = shutdown.cancelled() => break,
            changed = status.changed() => if changed.is_err() { break },
            changed = seen.changed() => if changed.is_err() { break },
            changed = held.changed() => if changed.is_err() { break },
            () = pause(wait) => {
                if let Some((due, _)) = due {
                    due_since = None;
                    bucket.take(Instant::now());
                    let result = write(&api, node, &due).await;
                    writer.note(due, object.object, result, &mut backoff);
                }
            }
        }
    }
    // The last words: what is leaving.
    let (now, object) = (status.borrow().clone(), seen.borrow().clone());
    if held.borrow().is_some()
        && let Some((due, _)) = writer.due(&now, &object)
        && let Err(error) = write(&api, node, &due).await
    {
        tracing::warn!(error = %super::apply::chain(&error), "the last status could not be written");
    }
}

async fn pause(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// Why a status was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("the API server refused or did not get the status")]
    Api(#[from] kube::Error),
    #[error("the API server did not answer within {} s", CALL_TIMEOUT.as_secs())]
    TimedOut(#[from] tokio::time::error::Elapsed),
}

async fn write(api: &Api<ModelNode>, node: &str, status: &ModelNodeStatus) -> Result<(), WriteError> {
    let patch = json!({
        "apiVersion": "altiplano.dev/v1alpha1",
        "kind": "ModelNode",
        "metadata": {"name": node},
        "status": status,
    });
    let parameters = PatchParams::apply(AGENT_FIELD_MANAGER).force();
    tokio::time::timeout(CALL_TIMEOUT, api.patch_status(node, &parameters, &Patch::Apply(&patch))).await??;
    Ok(())
}

/// What was written last, and into which object.
#[derive(Default)]
struct Writer {
    last: Option<(String, ModelNodeStatus)>,
}

impl Writer {
    /// What is to be written; nothing while there is no object, or when it is there already.
    fn due(&self, now: &ModelNodeStatus, seen: &Seen) -> Option<(ModelNodeStatus, Urgency)> {
        let object = seen.object.as_ref()?;
        let written = match &self.last {
            Some((of, status)) if of == object => status,
            _ => &seen.status,
        };
        let due = with_transitions(now.clone(), written);
        let urgency = urgency(&due, written);
        (due != *written).then_some((due, urgency))
    }

    fn note(
        &mut self,
        status: ModelNodeStatus,
        object: Option<String>,
        result: Result<(), WriteError>,
        backoff: &mut Backoff,
    ) {
        match result {
            Ok(()) => {
                self.last = object.map(|object| (object, status));
                *backoff = Backoff::default();
            }
            Err(error) => {
                if backoff.failures.is_power_of_two() || backoff.failures == 0 {
                    let error = super::apply::chain(&error);
                    tracing::warn!(error, failures = backoff.failures, "the status is not written");
                }
                backoff.failed(Instant::now());
            }
        }
    }
}

/// How much somebody waits for a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Urgency {
    /// The operator acts on it.
    Awaited,
    /// People like to see it.
    OnTheWay,
}

/// A model that has come to where it stays for a time or left it, one that is gone, another agent, a drained one or other
/// devices are awaited.
fn urgency(now: &ModelNodeStatus, written: &ModelNodeStatus) -> Urgency {
    let settled = |status: &ModelNodeStatus| -> BTreeSet<(String, String, String)> {
        let passing = [states::PENDING, states::FETCHING, states::LOADING];
        let models = status.models.iter().filter(|model| !passing.contains(&model.state.as_str()));
        models.map(|model| (model.uid.clone(), model.revision.clone(), model.state.clone())).collect()
    };
    let known = |status: &ModelNodeStatus| -> BTreeSet<(String, String)> {
        status.models.iter().map(|model| (model.uid.clone(), model.revision.clone())).collect()
    };
    let devices = |status: &ModelNodeStatus| status.devices.iter().map(|device| device.id.clone()).collect::<Vec<_>>();
    let agent =
        |status: &ModelNodeStatus| status.agent.as_ref().map(|agent| (agent.pod_uid.clone(), agent.drain.clone()));
    let is_awaited = agent(now) != agent(written)
        || devices(now) != devices(written)
        || settled(now) != settled(written)
        || !known(written).is_subset(&known(now));
    if is_awaited { Urgency::Awaited } else { Urgency::OnTheWay }
}

/// A condition's time is that of its last change.
fn with_transitions(mut now: ModelNodeStatus, before: &ModelNodeStatus) -> ModelNodeStatus {
    for condition in &mut now.conditions {
        let same = before.conditions.iter().find(|old| old.type_ == condition.type_ && old.status == condition.status);
        // Whole seconds, as the API server keeps it.
        let current =
            jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        condition.last_transition_time = same.map_or(Time(current), |old| old.last_transition_time.clone());
    }
    now
}

/// At most a burst at once and one per interval in the long run.
struct Bucket {
    /// Writes left, in milliseconds of interval each.
    left: Duration,
    at: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { left: WRITE_INTERVAL * WRITE_BURST, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at);
        self.left = (self.left + gained).min(WRITE_INTERVAL * WRITE_BURST);
        self.at = now;
    }

    /// Until a write that leaves `kept` to others.
    fn wait(&mut self, kept: u32, now: Instant) -> Duration {
        self.refill(now);
        (WRITE_INTERVAL * (kept + 1)).saturating_sub(self.left)
    }

    fn take(&mut self, now: Instant) {
        self.refill(now);
        self.left = self.left.saturating_sub(WRITE_INTERVAL);
    }
}

#[derive(Default)]
struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    fn failed(&mut self, now: Instant) {
        let wait = Duration::from_millis(250).saturating_mul(1 << self.failures.min(10)).min(LONGEST_BACKOFF);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + wait);
    }

    fn wait(&self, now: Instant) -> Duration {
        self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use altiplano_crds::model_node::ModelState;

    use super::*;

    fn status(summary: &str) -> ModelNodeStatus {
        ModelNodeStatus { model_summary: Some(summary.to_owned()), ..ModelNodeStatus::default() }
    }

    #[test]
    fn settled_is_silent() {
        let mut writer = Writer::default();
        let seen = Seen { object: Some("u1".to_owned()), status: status("0/0") };
        assert_eq!(writer.due(&status("0/0"), &Seen::default()), None, "no ModelNode, no write");
        assert_eq!(writer.due(&status("0/0"), &seen), None, "it is there from before a restart");
        assert_eq!(writer.due(&status("1/1"), &seen), Some((status("1/1"), Urgency::OnTheWay)));
        writer.note(status("1/1"), seen.object.clone(), Ok(()), &mut Backoff::default());
        assert_eq!(writer.due(&status("1/1"), &seen), None, "also before the watch has seen it");
        let again = Seen { object: Some("u2".to_owned()), status: ModelNodeStatus::default() };
        assert_eq!(
            writer.due(&status("1/1"), &again),
            Some((status("1/1"), Urgency::OnTheWay)),
            "the object was made anew"
        );
    }

    #[test]
    fn one_write_a_second_after_the_burst() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let mut now = start;
        let mut writes = 0;
        while now < start + Duration::from_mins(1) {
            if bucket.wait(0, now).is_zero() {
                bucket.take(now);
                writes += 1;
            }
            now += Duration::from_millis(10);
        }
        assert!((60..=60 + WRITE_BURST).contains(&writes), "{writes} writes in a minute");
        now += Duration::from_mins(10);
        let burst = (0..20).filter(|_| {
            let may = bucket.wait(0, now).is_zero();
            if may {
                bucket.take(now);
            }
            may
        });
        assert_eq!(burst.count(), WRITE_BURST as usize, "a quiet time saves up no more than the burst");
    }

    #[test]
    fn what_somebody_waits_for_goes_first() {
        let model = |uid: &str, state: &str| ModelState {
            uid: uid.to_owned(),
            revision: "r1".to_owned(),
            state: state.to_owned(),
            ..ModelState::default()
        };
        let with = |models: &[ModelState]| ModelNodeStatus { models: models.to_vec(), ..ModelNodeStatus::default() };
        let written = with(&[model("a", "Ready"), model("b", "Loading")]);
        let cases = [
            (vec![model("a", "Ready"), model("b", "Ready")], Urgency::Awaited),
            (vec![model("a", "Ready"), model("b", "Failed")], Urgency::Awaited),
            (vec![model("a", "Ready")], Urgency::Awaited),
            (vec![model("a", "Loading"), model("b", "Loading")], Urgency::Awaited),
            (vec![model("a", "Ready"), model("b", "Pending")], Urgency::OnTheWay),
            (vec![model("a", "Ready"), model("b", "Loading"), model("c", "Fetching")], Urgency::OnTheWay),
        ];
        for (models, expected) in cases {
            assert_eq!(urgency(&with(&models), &written), expected, "{models:?}");
        }
        let now = Instant::now();
        let mut bucket = Bucket::new(now);
        bucket.take(now);
        bucket.take(now);
        assert!(!bucket.wait(KEPT_WRITES, now).is_zero(), "steps on the way leave room");
        assert!(bucket.wait(0, now).is_zero());
    }

    #[test]
    fn failures_wait_longer_up_to_a_cap() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.wait(now), Duration::ZERO);
        backoff.failed(now);
        assert_eq!(backoff.wait(now), Duration::from_millis(250));
        (0..20).for_each(|_| backoff.failed(now));
        assert_eq!(backoff.wait(now), LONGEST_BACKOFF);
    }
}
