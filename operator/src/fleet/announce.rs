//! Publishes Events, beside the planner: nobody waits for them, and what happens again and again is told seldom.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::{ModelDeployment, names};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tokio::sync::mpsc;
use tracing::warn;

use super::apply::chain;
use super::diff::Target;
use super::events::Note;
use crate::clock::Clock;
use crate::metrics::Metrics;

/// Events that may wait to be published; more are dropped and counted.
const QUEUE: usize = 256;
/// The same reason of the same object is told once in this time.
const QUIET: Duration = Duration::from_mins(10);
/// Longest time that publishing one may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An Event about an object.
#[derive(Clone, Debug)]
pub struct Announcement {
    regarding: ObjectReference,
    note: Note,
}

impl Announcement {
    /// About a ModelDeployment.
    #[must_use]
    pub fn about(target: &Target, note: Note) -> Self {
        Self::of::<ModelDeployment>(target, note)
    }

    /// About the agents' DaemonSet.
    #[must_use]
    pub fn about_agents(target: &Target, note: Note) -> Self {
        Self::of::<DaemonSet>(target, note)
    }

    fn of<K: Resource<DynamicType = ()>>(target: &Target, note: Note) -> Self {
        let regarding = ObjectReference {
            api_version: Some(K::api_version(&()).into_owned()),
            kind: Some(K::kind(&()).into_owned()),
            namespace: Some(target.namespace.clone()),
            name: Some(target.name.clone()),
            uid: Some(target.uid.clone()),
            ..ObjectReference::default()
        };
        Self { regarding, note }
    }
}

/// Takes announcements.
#[derive(Clone)]
pub struct Announcer {
    queue: mpsc::Sender<Announcement>,
    metrics: Arc<Metrics>,
}

impl Announcer {
    /// A way in, and the task that publishes what comes; it ends when all ways in are gone.
    pub fn new(
        client: Client,
        identity: &str,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (queue, incoming) = mpsc::channel(QUEUE);
        let reporter =
            Reporter { controller: names::MANAGED_BY.to_owned(), instance: Some(names::clip(identity, 128)) };
        let publish = publish(Recorder::new(client, reporter), incoming, clock, Arc::clone(&metrics));
        (Self { queue, metrics }, publish)
    }

    /// Takes an announcement, or drops it when too many wait.
    pub fn announce(&self, announcement: Announcement) {
        if self.queue.try_send(announcement).is_err() {
            self.metrics.error("EventDropped");
        }
    }
}

async fn publish(recorder: Recorder, mut incoming: mpsc::Receiver<Announcement>, clock: Clock, metrics: Arc<Metrics>) {
    let mut told: BTreeMap<(String, String), Duration> = BTreeMap::new();
    while let Some(Announcement { regarding, note }) = incoming.recv().await {
        let now = clock.mono();
        told.retain(|_, at| *at + QUIET > now);
        let key = (regarding.uid.clone().unwrap_or_default(), note.reason.clone());
        // Good news may follow bad news of the same kind; bad news is told once in a while.
        if note.warning && told.contains_key(&key) {
            continue;
        }
        let event = Event {
            type_: if note.warning { EventType::Warning } else { EventType::Normal },
            action: note.reason.clone(),
            reason: note.reason,
            note: Some(note.note),
            secondary: None,
        };
        metrics.write("Event", "create");
        match tokio::time::timeout(TIMEOUT, recorder.publish(&event, &regarding)).await {
            Ok(Ok(())) => {
                told.insert(key, now);
            }
            Ok(Err(error)) => {
                metrics.error("Event");
                warn!(reason = event.reason, error = %chain(&error), "cannot publish an Event");
            }
            Err(_) => {
                metrics.error("Event");
                warn!(reason = event.reason, "cannot publish an Event in time");
            }
        }
    }
}
