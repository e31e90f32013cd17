//! Whose turn it is and what happens to it. Pure; the clock is passed in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use altiplano_crds::conditions::{reasons, states};
use altiplano_crds::model_node::{AgentUpgrade, AssignmentMode, ModelState};

use super::observe::{Agents, PodSeen};
use crate::clock::Now;
use crate::fleet::diff::Target;
use crate::fleet::observe::{Fleet, FleetNode};
use crate::fleet::plan::Plan;

/// Time on top of the models' `drainSeconds` after which an agent that has not said that it is drained loses its Pod all the
/// same.
const DRAIN_MARGIN: Duration = Duration::from_mins(1);
/// Time that the API server may take to show a mark that was written.
const MARK_PATIENCE: Duration = Duration::from_secs(30);
/// The chart lets no agent drain for longer.
const LONGEST_DRAIN: Duration = Duration::from_hours(1);

/// What should happen to the agents.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Upgrades {
    /// `ModelNode.spec.upgrade`, by node; none for the others.
    pub marks: BTreeMap<String, AgentUpgrade>,
    /// Pods that go.
    pub delete: Vec<Target>,
    /// How far it is; `None` where nothing can be said.
    pub progress: Option<Progress>,
    /// When to look again if nothing happens before.
    pub next: Option<Duration>,
}

/// How far the upgrade is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Agents that there are.
    pub agents: usize,
    /// Those of the newest revision.
    pub updated: usize,
    /// What goes on where; by node, or by Pod where it has none.
    pub steps: BTreeMap<String, Step>,
    /// What has gone on for so long that nothing else is begun.
    pub blocked: BTreeSet<String>,
    /// Nothing is to be begun.
    pub paused: bool,
}

/// What goes on at a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The mark does not stay: the CRD is of before it.
    Unmarked,
    /// Models move to other nodes.
    Move(Vec<String>),
    /// Running requests end.
    Drain,
    /// The Pod is being deleted.
    Delete,
    /// The Pod is gone, and there is no other yet.
    Gone,
    /// The new agent does not serve yet.
    Start(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unmarked => {
                f.write_str("its ModelNode does not keep spec.upgrade: its CRD is older than this operator")
            }
            Self::Move(models) if models.is_empty() => f.write_str("its turn has come"),
            Self::Move(models) => write!(f, "moving to other nodes: {}", models.join(", ")),
            Self::Drain => f.write_str("its running requests end"),
            Self::Delete => f.write_str("its Pod is being deleted"),
            Self::Gone => f.write_str("its Pod is gone, and there is no new one yet"),
            Self::Start(why) => f.write_str(why),
        }
    }
}

/// What is remembered between rounds. It can be lost: a new leader waits anew, and takes a model that has failed for one
/// that had failed before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// Since when something goes on, by Pod and step.
    since: BTreeMap<(String, &'static str), Duration>,
    /// Models that were served by a node before its turn.
    served: BTreeMap<String, BTreeSet<String>>,
}

struct Round<'a> {
    agents: &'a Agents,
    fleet: &'a Fleet,
    placed: &'a Plan,
    stale_after: Duration,
    now: Duration,
    before: Memory,
    memory: Memory,
    progress: Progress,
    plan: Upgrades,
}

/// Plans one round. `placed` is what the fleet's planner has decided on the same snapshot: it tells which models are on
/// their way off a node.
#[must_use]
pub fn plan(
    agents: Option<&Agents>,
    fleet: &Fleet,
    placed: &Plan,
    stale_after: Duration,
    memory: Memory,
    now: Now,
) -> (Upgrades, Memory) {
    let Some(agents) = agents.filter(|agents| agents.daemon_set.settled && fleet.blind_since.is_none()) else {
        let marks = fleet.nodes.values().filter_map(|node| Some((node.name.clone(), node.upgrade()?.clone())));
        return (Upgrades { marks: marks.collect(), ..Upgrades::default() }, memory);
    };
    let mut round = Round {
        agents,
        fleet,
        placed,
        stale_after,
        now: now.mono,
        memory: Memory { served: memory.served.clone(), ..Memory::default() },
        before: memory,
        progress: Progress { agents: agents.pods.len(), paused: agents.daemon_set.paused, ..Progress::default() },
        plan: Upgrades::default(),
    };
    round.plan();
    let Round { mut plan, mut memory, progress, .. } = round;
    memory.served.retain(|node, _| plan.marks.contains_key(node));
    plan.progress = Some(progress);
    (plan, memory)
}

impl<'a> Round<'a> {
    fn plan(&mut self) {
        let Agents { daemon_set, current, pods } = self.agents;
        let mut unavailable = 0;
        let mut outdated = Vec::new();
        for pod in pods {
            if pod.deleting {
                unavailable += 1;
                self.goes_on(pod, Step::Delete, "delete");
            } else if pod.hash != *current {
                outdated.push(pod);
                continue;
            } else if let Err(why) = self.serves(pod) {
                unavailable += 1;
                self.goes_on(pod, Step::Start(why), "start");
            }
            self.progress.updated += usize::from(pod.hash == *current);
        }
        let missing = daemon_set.desired.saturating_sub(pods.len());
        self.progress.agents += missing;
        self.keep_marks(missing > 0);
        if outdated.is_empty() {
            // Whatever an agent does that was not just replaced, no upgrade is to blame.
            let marks = &self.plan.marks;
            // One without a node yet may be what a mark waits for.
            let unbound = |place: &str| pods.iter().any(|pod| pod.node.is_none() && pod.name == place);
            let counts = |place: &str| marks.contains_key(place) || !marks.is_empty() && unbound(place);
            self.progress.steps.retain(|place, _| counts(place));
            self.progress.blocked.retain(|place| counts(place));
        }
        if !daemon_set.on_delete || daemon_set.paused || !self.progress.blocked.is_empty() {
            if !daemon_set.on_delete {
                self.plan.marks.clear();
            }
            return;
        }
        let mut free = daemon_set.max_unavailable.saturating_sub(unavailable + missing);
        outdated.sort_by_key(|pod| {
            let node = self.node(pod);
            let models = node.map_or(0, |node| node.entries().len());
            (self.mark(pod).is_none(), self.is_alive(pod), models, pod.node.as_deref(), pod.name.as_str())
        });
        for pod in outdated {
            // Whose turn it is keeps it, though another agent may be away at the moment.
            if free == 0 && self.mark(pod).is_none() {
                break;
            }
            free = free.saturating_sub(1);
            self.take(pod);
        }
    }

    /// Something goes on, and for how long already.
    fn goes_on(&mut self, pod: &PodSeen, step: Step, kind: &'static str) {
        let place = pod.node.as_ref().unwrap_or(&pod.name).clone();
        if self.is_over(&pod.uid, kind, self.agents.daemon_set.progress_deadline) {
            self.progress.blocked.insert(place.clone());
        }
        self.progress.steps.insert(place, step);
    }

    fn is_over(&mut self, uid: &str, kind: &'static str, patience: Duration) -> bool {
        let key = (uid.to_owned(), kind);
        let since = self.before.since.get(&key).copied().unwrap_or(self.now);
        self.memory.since.insert(key, since);
        let ends = since + patience;
        if ends > self.now {
            self.plan.next = Some(self.plan.next.map_or(ends, |next| next.min(ends)));
        }
        ends <= self.now
    }

    fn node(&self, pod: &PodSeen) -> Option<&'a FleetNode> {
        self.fleet.nodes.get(pod.node.as_ref()?)
    }

    /// The mark that names that Pod.
    fn mark(&self, pod: &PodSeen) -> Option<&'a AgentUpgrade> {
        self.node(pod)?.upgrade().filter(|mark| mark.pod_uid == pod.uid)
    }

    /// Whether the agent in that Pod can be spoken to.
    fn is_alive(&self, pod: &PodSeen) -> bool {
        let lease = self.node(pod).and_then(|node| node.agent.as_ref());
        let renews = lease.is_some_and(|lease| {
            let its = lease.pod_uid.as_deref() == Some(pod.uid.as_str());
            its && !lease.released && self.now < lease.changed + self.stale_after
        });
        // An agent that drains is not Ready, and says so.
        renews && (pod.ready || self.mark(pod).is_some_and(|mark| mark.drain))
    }

    /// Whether a new agent is where the old one was; an error says what is missing.
    fn serves(&self, pod: &PodSeen) -> Result<(), String> {
        if !pod.ready {
            let trouble = pod.trouble.as_ref().map(|trouble| format!(": {trouble}")).unwrap_or_default();
            return Err(format!("its new Pod is not Ready{trouble}"));
        }
        let Some(node) = self.node(pod).filter(|_| self.is_alive(pod)) else {
            return Err("its new agent does not renew its Lease".to_owned());
        };
        let models = node.node_models();
        let status = models.and_then(|models| models.status.as_ref());
        let Some(status) = status.filter(|status| writer(status) == Some(&pod.uid)) else {
            return Err("its new agent has not reported yet".to_owned());
        };
        // Only just after its turn: later loads are nothing to the upgrade.
        if node.upgrade().is_none() {
            return Ok(());
        }
        let served = self.before.served.get(&node.name);
        for entry in node.entries() {
            if entry.parsed.as_ref().is_ok_and(|entry| entry.mode == AssignmentMode::Estimate) {
                continue;
            }
            let name = entry.parsed.as_ref().map_or(entry.uid(), |entry| &entry.name);
            let told: Vec<&ModelState> = status.models.iter().filter(|state| state.uid == entry.uid()).collect();
            let has_served = served.is_some_and(|served| served.contains(entry.uid()));
            if let Some(failed) = told.iter().find(|state| state.state == states::FAILED).filter(|_| has_served) {
                let why = failed.message.as_deref().or(failed.reason.as_deref()).unwrap_or_default();
                return Err(format!("{name} was served before and has failed in its new agent: {why}"));
            }
            if !told.iter().any(|state| is_settled(state)) {
                return Err(format!("{name} is being loaded by its new agent"));
            }
        }
        Ok(())
    }

    /// Marks of Pods that are gone, or on their way: they stay until the new agent serves.
    fn keep_marks(&mut self, missing: bool) {
        for node in self.fleet.nodes.values() {
            let Some(mark) = node.upgrade() else { continue };
            let old = self.agents.pods.iter().find(|pod| pod.uid == mark.pod_uid);
            let new = self.agents.pods.iter().find(|pod| pod.node.as_ref() == Some(&node.name));
            let stays = match (old, new) {
                (Some(old), _) => old.deleting,
                (None, Some(_)) => self.progress.steps.contains_key(&node.name),
                (None, None) => {
                    // Made, and without a node yet: its own step tells of that.
                    let unbound = self.agents.pods.iter().any(|pod| pod.node.is_none());
                    if missing && !unbound {
                        let gone =
                            PodSeen { uid: mark.pod_uid.clone(), node: Some(node.name.clone()), ..PodSeen::default() };
                        self.goes_on(&gone, Step::Gone, "gone");
                    }
                    missing || unbound
                }
            };
            if stays {
                self.plan.marks.insert(node.name.clone(), mark.clone());
            }
        }
    }

    /// The next step of an agent whose turn it is.
    fn take(&mut self, pod: &'a PodSeen) {
        let target = Target { namespace: pod.namespace.clone(), name: pod.name.clone(), uid: pod.uid.clone() };
        let place = pod.node.as_ref().unwrap_or(&pod.name).clone();
        let (step, drain) = match self.mark(pod) {
            // Nobody there who could be asked, and nothing that could be interrupted.
            mark if !self.is_alive(pod) => {
                self.plan.delete.push(target);
                (Step::Delete, mark.is_some_and(|mark| mark.drain))
            }
            None if self.never_marked(pod) => {
                self.progress.blocked.insert(place.clone());
                (Step::Unmarked, false)
            }
            None => (Step::Move(self.leaving(&place)), false),
            Some(AgentUpgrade { drain: false, .. }) => {
                self.remember(&place);
                let leaving = self.leaving(&place);
                let is_over = self.is_over(&pod.uid, "move", self.agents.daemon_set.progress_deadline);
                if leaving.is_empty() || is_over { (Step::Drain, true) } else { (Step::Move(leaving), false) }
            }
            Some(AgentUpgrade { drain: true, .. }) => {
                let is_over = self.is_over(&pod.uid, "drain", self.patience(&place));
                if self.is_drained(pod) || is_over {
                    self.plan.delete.push(target);
                    (Step::Delete, true)
                } else {
                    (Step::Drain, true)
                }
            }
        };
        if let Some(node) = &pod.node {
            let mark = AgentUpgrade { pod_uid: pod.uid.clone(), drain };
            // Without a ModelNode nothing is there that could be moved or drained.
            if self.fleet.nodes.get(node).is_some_and(|node| node.node_models().is_some()) {
                self.plan.marks.insert(node.clone(), mark);
            }
        }
        self.progress.steps.insert(place, step);
    }

    /// Whether the mark, which goes out in each round, has not been seen for too long.
    fn never_marked(&mut self, pod: &PodSeen) -> bool {
        let has_node = self.node(pod).is_some_and(|node| node.node_models().is_some());
        has_node && self.is_over(&pod.uid, "mark", MARK_PATIENCE)
    }

    /// Models that the fleet's planner is moving off that node.
    fn leaving(&self, node: &str) -> Vec<String> {
        let moving = self
            .placed
            .models
            .iter()
            .filter(|(_, plan)| plan.holders.iter().any(|holder| holder.node == node && holder.leaving.is_some()));
        moving.map(|(uid, _)| self.fleet.model(uid).map_or(uid.clone(), |model| model.name.clone())).collect()
    }

    fn remember(&mut self, node: &str) {
        let status = self.fleet.nodes.get(node).and_then(|node| node.node_models()?.status.as_ref());
        let told = status.into_iter().flat_map(|status| &status.models);
        let served = told.filter(|state| states::accepts_requests(&state.state)).map(|state| state.uid.clone());
        self.memory.served.insert(node.to_owned(), served.collect());
    }

    /// Drained, or too old to know what that is: then it drains when its Pod is deleted.
    fn is_drained(&self, pod: &PodSeen) -> bool {
        let Some(models) = self.node(pod).and_then(FleetNode::node_models) else { return true };
        let Some(status) = models.status.as_ref().filter(|status| writer(status) == Some(&pod.uid)) else {
            return false;
        };
        match status.agent.as_ref().and_then(|agent| agent.drain.as_deref()) {
            Some(drain) => drain == states::DRAINED,
            None => status.observed_generation.is_some_and(|seen| seen >= models.generation),
        }
    }

    fn patience(&self, node: &str) -> Duration {
        let entries = self.fleet.nodes.get(node).map_or(&[][..], FleetNode::entries);
        let seconds = entries.iter().filter_map(|entry| entry.parsed.as_ref().ok()).map(|e| e.rollout.drain_seconds);
        let seconds = seconds.max().and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(0);
        Duration::from_secs(seconds).min(LONGEST_DRAIN) + DRAIN_MARGIN
    }
}

fn writer(status: &altiplano_crds::ModelNodeStatus) -> Option<&String> {
    status.agent.as_ref().map(|agent| &agent.pod_uid)
}

/// Served, or in a state that waiting does not change.
fn is_settled(state: &ModelState) -> bool {
    let short = matches!(state.reason.as_deref(), Some(reasons::INSUFFICIENT_MEMORY | reasons::NO_DEVICE));
    match state.state.as_str() {
        states::FAILED => true,
        states::PENDING => short,
        state => states::accepts_requests(state),
    }
}
