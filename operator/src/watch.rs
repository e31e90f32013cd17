//! Watches: a small mirror of each kind that the operator looks at, and the wake-up of the planner.
//!
//! Objects are reduced to what the planner reads as they arrive ([`Seen`]), so that a cluster with thousands of
//! Services costs little, and a heartbeat that changes nothing wakes nobody. What the operator itself writes goes into
//! the mirror at once: the planner never decides on a state older than its own last write.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::clock::Clock;
use crate::metrics::Metrics;

/// What the operator keeps of an object.
pub trait Seen: Clone + PartialEq + Send + Sync + 'static {
    /// The object.
    type Object: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static;

    /// Name of the kind in metrics and logs.
    const KIND: &'static str;

    /// Reduces the object; `now` is the operator's monotonic time.
    fn see(object: Self::Object, previous: Option<&Self>, now: Duration) -> Self;

    /// Whether the planner must look again.
    fn is_news(&self, previous: &Self) -> bool {
        self != previous
    }

    /// Nothing could be seen for a while, and now it can: time during which nobody looked must not count.
    fn outage_over(&mut self, _outage: Outage) {}
}

/// A time in which the API server could not be watched.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// When the watch broke off.
    pub from: Duration,
    /// When it was back.
    pub to: Duration,
    /// How long an object of this kind may stay as it is before something is concluded from that.
    pub patience: Duration,
}

/// Namespace (empty for kinds of the cluster) and name.
pub type Key = (String, String);

/// The last seen state of all objects of a kind.
#[derive(Debug)]
pub struct Mirror<S> {
    state: RwLock<State<S>>,
    patience: Duration,
}

#[derive(Debug)]
struct State<S> {
    objects: HashMap<Key, Kept<S>>,
    /// What has been deleted lately. The answer to a write may come after the news of the deletion that followed it, and
    /// must not bring the object back.
    deleted: HashMap<Key, (u64, Duration)>,
    listed: bool,
    last_event: Option<Duration>,
    blind_since: Option<Duration>,
}

#[derive(Clone, Debug)]
struct Kept<S> {
    version: u64,
    uid: Option<String>,
    seen: Arc<S>,
}

impl<S> Default for Mirror<S> {
    fn default() -> Self {
        Self::with_patience(Duration::ZERO)
    }
}

impl<S> Mirror<S> {
    /// An empty mirror; see [`Outage::patience`].
    #[must_use]
    pub fn with_patience(patience: Duration) -> Self {
        Self {
            state: RwLock::new(State {
                objects: HashMap::new(),
                deleted: HashMap::new(),
                listed: false,
                last_event: None,
                blind_since: None,
            }),
            patience,
        }
    }
}

/// Resource versions are numbers that grow, by Kubernetes' documentation since 1.35 and in practice since etcd 3.
fn version(object: &impl Resource) -> u64 {
    object.meta().resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(u64::MAX)
}

fn key(object: &impl Resource) -> Key {
    let meta = object.meta();
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

impl<S: Seen> Mirror<S> {
    /// Everything, in no order.
    pub fn all(&self) -> Vec<(Key, Arc<S>)> {
        self.read(|state| state.objects.iter().map(|(key, kept)| (key.clone(), Arc::clone(&kept.seen))).collect())
    }

    /// Whether the first list has come.
    pub fn listed(&self) -> bool {
        self.read(|state| state.listed)
    }

    /// Time of the last event, list or bookmark.
    pub fn last_event(&self) -> Option<Duration> {
        self.read(|state| state.last_event)
    }

    /// Takes in what the API server has answered to a write. True when the planner must look again.
    pub fn insert(&self, object: S::Object, now: Duration) -> bool {
        self.write(|state| state.insert(object, now))
    }

    /// Forgets an object that is gone: the operator has deleted it, or a write has not found it. True when the planner must look again.
    pub fn forget(&self, namespace: &str, name: &str, uid: &str) -> bool {
        let key = (namespace.to_owned(), name.to_owned());
        self.write(|state| {
            let ours = state.objects.get(&key).is_some_and(|kept| kept.uid.as_deref() == Some(uid));
            ours && state.objects.remove(&key).is_some()
        })
    }

    /// Since when the watch is broken, if it is.
    pub fn blind_since(&self) -> Option<Duration> {
        self.read(|state| state.blind_since)
    }

    /// Nothing can be concluded from silence from now on. True for the first of several failures in a row.
    pub fn broke_off(&self, now: Duration) -> bool {
        self.write(|state| state.blind_since.replace(state.blind_since.unwrap_or(now)).is_none())
    }

    /// Silence means something again. True when it did not before.
    pub fn is_back(&self, now: Duration) -> bool {
        self.write(|state| {
            let Some(from) = state.blind_since.take() else { return false };
            let outage = Outage { from, to: now, patience: self.patience };
            for kept in state.objects.values_mut() {
                let mut seen = S::clone(&kept.seen);
                seen.outage_over(outage);
                kept.seen = Arc::new(seen);
            }
            true
        })
    }

    // A poisoned lock holds a whole state all the same: every change of it is one insert or remove.
    fn read<T>(&self, read: impl FnOnce(&State<S>) -> T) -> T {
        read(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, write: impl FnOnce(&mut State<S>) -> T) -> T {
        write(&mut self.state.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: Seen> State<S> {
    fn insert(&mut self, object: S::Object, now: Duration) -> bool {
        let (key, version, uid) = (key(&object), version(&object), object.uid());
        let previous = self.objects.get(&key);
        if previous.is_some_and(|kept| kept.version > version && version != u64::MAX) {
            return false;
        }
        if self.deleted.get(&key).is_some_and(|(deleted, _)| *deleted >= version) {
            return false;
        }
        let seen = S::see(object, previous.map(|kept| &*kept.seen), now);
        let news = previous.is_none_or(|kept| kept.uid != uid || seen.is_news(&kept.seen));
        self.objects.insert(key, Kept { version, uid, seen: Arc::new(seen) });
        news
    }

    fn remove(&mut self, object: &S::Object, now: Duration) -> bool {
        let (key, version) = (key(object), version(object));
        self.deleted.retain(|_, (_, at)| *at + LATE_ANSWER > now);
        self.deleted.insert(key.clone(), (version, now));
        let newer = self.objects.get(&key).is_some_and(|kept| kept.version > version);
        !newer && self.objects.remove(&key).is_some()
    }

    /// Everything that a whole list did not hold is gone.
    fn retain_listed(&mut self, listed: &HashSet<Key>) -> bool {
        let before = self.objects.len();
        self.objects.retain(|key, _| listed.contains(key));
        let first = !std::mem::replace(&mut self.listed, true);
        first || self.objects.len() != before
    }
}

/// How late the answer to a write may come.
const LATE_ANSWER: Duration = Duration::from_mins(1);

/// Pauses between tries of a broken watch. A short cap: after an outage of the API server, seconds count more than its
/// load by a handful of watches.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Time without another failure after which a broken watch counts as mended.
const QUIET_MEANS_BACK: Duration = Duration::from_secs(5);

/// Follows a kind for ever and wakes the planner when something has changed. Ends only when dropped.
pub async fn follow<S: Seen>(
    api: Api<S::Object>,
    config: watcher::Config,
    mirror: Arc<Mirror<S>>,
    clock: Clock,
    wake: Arc<Notify>,
    metrics: Arc<Metrics>,
) {
    let events = watcher(api, config).map_ok(|event| {
        event.modify(|object| {
            object.managed_fields_mut().clear();
            object.meta_mut().managed_fields = None;
        })
    });
    let mut events = Box::pin(events);
    let mut pause = FIRST_PAUSE;
    let mut listed: HashSet<Key> = HashSet::new();
    loop {
        // A watch that goes on where it broke off says nothing until something changes.
        let limit = if mirror.blind_since().is_some() { QUIET_MEANS_BACK } else { Duration::MAX };
        let Ok(next) = tokio::time::timeout(limit, events.next()).await else {
            if mirror.is_back(clock.mono()) {
                wake.notify_one();
            }
            continue;
        };
        let Some(event) = next else { return };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                if mirror.broke_off(clock.mono()) {
                    warn!(kind = S::KIND, error = %crate::fleet::apply::chain(&error), "watch broke off; trying again");
                }
                metrics.error("Watch");
                // The stream starts again when polled again.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            }
        };
        pause = FIRST_PAUSE;
        let now = clock.mono();
        // A list that has only begun says nothing yet.
        let back = !matches!(event, Event::Init | Event::InitApply(_)) && mirror.is_back(now);
        if back {
            info!(kind = S::KIND, "watch is back");
        }
        let news = mirror.write(|state| {
            state.last_event = Some(now);
            match event {
                Event::Init => {
                    listed.clear();
                    false
                }
                Event::InitApply(object) => {
                    listed.insert(key(&object));
                    state.insert(object, now)
                }
                Event::InitDone => state.retain_listed(&std::mem::take(&mut listed)),
                Event::Apply(object) => state.insert(object, now),
                Event::Delete(object) => state.remove(&object, now),
            }
        });
        if news || back {
            wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Node;

    use super::*;
    use crate::fleet::seen::NodeSeen;

    fn node(version: &str, cordoned: bool) -> Node {
        let mut node = Node::default();
        node.metadata.name = Some("a".to_owned());
        node.metadata.uid = Some("u".to_owned());
        node.metadata.resource_version = Some(version.to_owned());
        node.spec.get_or_insert_default().unschedulable = Some(cordoned);
        node
    }

    #[test]
    fn the_newest_version_stays_whatever_order_it_comes_in() {
        let mirror = Mirror::<NodeSeen>::default();
        assert!(mirror.insert(node("9", true), Duration::ZERO), "news");
        assert!(!mirror.insert(node("10", true), Duration::ZERO), "a heartbeat is no news");
        assert!(!mirror.insert(node("9", false), Duration::ZERO), "older");
        assert!(mirror.all()[0].1.cordoned);
    }

    #[test]
    fn a_late_answer_does_not_bring_back_what_is_deleted() {
        let mirror = Mirror::<NodeSeen>::default();
        mirror.insert(node("5", false), Duration::ZERO);
        assert!(mirror.write(|state| state.remove(&node("7", false), Duration::ZERO)));
        assert!(!mirror.insert(node("6", false), Duration::ZERO), "the answer to a write before the deletion");
        assert!(mirror.all().is_empty());
        assert!(mirror.insert(node("8", false), Duration::ZERO), "made again");
        assert!(
            !mirror.write(|state| state.remove(&node("7", false), Duration::ZERO)),
            "the deletion of the one before"
        );
        assert_eq!(mirror.all().len(), 1);
    }
}
