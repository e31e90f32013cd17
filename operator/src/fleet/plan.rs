//! The plan: what every ModelNode should say and where every model stands, as data. Pure; the clock is passed in.
//!
//! All models are planned in one pass over one draft of the fleet, by priority and then by age. The draft holds what
//! this round has already given away, so that two models never take the same gap.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use altiplano_crds::conditions::{reasons, states};
use altiplano_crds::model_node::{AgentUpgrade, AssignmentMode, ModelState, RawAssignment};
use altiplano_crds::{ModelAssignment, ModelNodeStatus};

use super::capacity::{Claim, Need, Pools, Shape};
use super::filter::Why;
use super::memory::Memory;
use super::observe::{Fleet, FleetNode};
use super::seen::{Entry, Model, ModelNodeSeen};
use crate::clock::Now;

/// Times that the administrator sets.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Time without a sign of life after which an agent is stale.
    pub stale_after: Duration,
    /// Time after which models leave a stale node.
    pub loss_grace: Duration,
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// `ModelNode`s, by name. One that is not here is left alone.
    pub nodes: BTreeMap<String, NodePlan>,
    /// Models, by uid.
    pub models: BTreeMap<String, ModelPlan>,
    /// `ModelNode.spec.upgrade`, by node: as it is, until the plan of the upgrade says otherwise.
    pub upgrades: BTreeMap<String, AgentUpgrade>,
    /// When to plan again if nothing happens before.
    pub next: Option<Duration>,
}

/// What should be of a ModelNode.
#[derive(Clone, Debug, PartialEq)]
pub enum NodePlan {
    /// It exists and has these entries.
    Hold(Vec<WantedEntry>),
    /// It goes: the Node has been deleted and nothing is there.
    Delete {
        /// Its uid.
        uid: String,
    },
}

/// An entry of `spec.models`.
#[derive(Clone, Debug, PartialEq)]
pub enum WantedEntry {
    /// A model's.
    Model(Box<ModelAssignment>),
    /// Of a ModelDeployment that this build cannot read: as it is.
    AsItIs(RawAssignment),
}

/// Where a model stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelPlan {
    /// Nodes that should hold it.
    pub wanted: usize,
    /// Nodes that hold it and count, after this plan.
    pub placed: usize,
    /// What happens to the finalizer.
    pub finalizer: FinalizerStep,
    /// Nodes that hold it after this plan.
    pub holders: Vec<Holder>,
    /// Nodes that do not hold it any more and still report it.
    pub draining: Vec<String>,
    /// Nodes that are asked how much memory it needs.
    pub asked: Vec<String>,
    /// Nodes that were not chosen, and why.
    pub rejections: BTreeMap<String, Why>,
    /// A node has room, and the placement waits: for the finalizer, or because too many move at once.
    pub held_back: bool,
    /// Whether moves wait because too many agents are stale.
    pub braked: bool,
    /// Nodes that did not report the model gone in time.
    pub drain_timed_out: Vec<String>,
}

/// What happens to the finalizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FinalizerStep {
    /// Nothing.
    #[default]
    Keep,
    /// It is added, before the first placement.
    Add,
    /// It is removed: nothing is placed any more.
    Remove,
}

/// A node that holds a model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
pub struct Holder {
    /// Its name.
    pub node: String,
    /// Whether its entry is of the newest revision.
    pub updated: bool,
    /// Why the model is to leave it.
    pub leaving: Option<String>,
    /// Whether its agent is stale.
    pub stale: bool,
    /// Whether a request would be accepted there, in whatever revision.
    pub accepts: bool,
    /// Whether its agent is being replaced.
    pub upgrading: bool,
}

/// The draft of a node.
pub(super) struct Draft<'a> {
    pub(super) node: &'a FleetNode,
    /// Its agent has shown no life for [`Settings::stale_after`].
    pub(super) stale: bool,
    /// And neither for the grace period.
    pub(super) lost: bool,
    pub(super) slots: Vec<Slot<'a>>,
    /// What the agent reports, when it is the agent that lives now.
    pub(super) status: Option<&'a ModelNodeStatus>,
    pub(super) pools: Pools,
    pub(super) shape: Shape,
    frozen: bool,
}

/// An entry in the draft.
pub(super) enum Slot<'a> {
    Kept(&'a Entry),
    Serve { model: &'a Model, old: Option<&'a ModelAssignment>, update: bool },
    Estimate { model: &'a Model, old: Option<&'a ModelAssignment> },
}

impl<'a> Draft<'a> {
    fn new(node: &'a FleetNode, fleet: &'a Fleet) -> Self {
        let status = current_status(node);
        let reported = node.node_models().and_then(|models| models.status.as_ref());
        Self {
            node,
            stale: false,
            lost: false,
            slots: slots(node, fleet),
            status,
            pools: reported.map(Pools::of).unwrap_or_default(),
            shape: reported.map(Shape::of).unwrap_or_default(),
            frozen: matches!(node.models.as_deref(), Some(ModelNodeSeen::Unreadable(_))),
        }
    }

    pub(super) fn serves(&self, uid: &str) -> bool {
        self.slots.iter().any(|slot| matches!(slot, Slot::Serve { model, .. } if model.uid == uid))
    }

    pub(super) fn estimates(&self, uid: &str) -> bool {
        self.slots.iter().any(|slot| matches!(slot, Slot::Estimate { model, .. } if model.uid == uid))
    }

    pub(super) fn drop_model(&mut self, uid: &str) {
        self.slots.retain(|slot| slot.uid() != Some(uid));
    }

    /// Puts the model there; an estimate of it becomes its placement, in the same position.
    pub(super) fn put(&mut self, new: Slot<'a>) {
        match self.slots.iter_mut().find(|slot| slot.uid().is_some() && slot.uid() == new.uid()) {
            Some(slot) => *slot = new,
            None => self.slots.push(new),
        }
    }

    /// The agent's word on a revision of a model.
    pub(super) fn state(&self, uid: &str, revision: &str) -> Option<&'a ModelState> {
        self.status?.models.iter().find(|state| state.uid == uid && state.revision == revision)
    }

    /// The agent's words on all revisions of a model.
    pub(super) fn states(&self, uid: &str) -> impl Iterator<Item = &'a ModelState> {
        self.status.into_iter().flat_map(|status| &status.models).filter(move |state| state.uid == uid)
    }
}

impl Slot<'_> {
    fn uid(&self) -> Option<&str> {
        match self {
            Self::Kept(_) => None,
            Self::Serve { model, .. } | Self::Estimate { model, .. } => Some(&model.uid),
        }
    }

    fn render(&self) -> WantedEntry {
        match self {
            Self::Kept(entry) => WantedEntry::AsItIs(entry.raw.clone()),
            Self::Serve { model, old, update } => {
                let mut new = model.assignment(AssignmentMode::Serve);
                if let Some(old) = old.filter(|old| !update && old.revision != new.revision) {
                    // Its turn has not come: it keeps its revision, and takes what needs no new worker.
                    new.revision.clone_from(&old.revision);
                    new.served_name.clone_from(&old.served_name);
                    new.model = old.model.clone();
                    new.context = old.context.clone();
                    new.engine = old.engine.clone();
                }
                WantedEntry::Model(Box::new(settled(new, *old)))
            }
            Self::Estimate { model, old } => {
                WantedEntry::Model(Box::new(settled(model.assignment(AssignmentMode::Estimate), *old)))
            }
        }
    }
}

/// A generation alone (of a change that is nothing to this node) is no reason to write.
fn settled(mut new: ModelAssignment, old: Option<&ModelAssignment>) -> ModelAssignment {
    if let Some(old) = old {
        let generation = std::mem::replace(&mut new.generation, old.generation);
        if new != *old {
            new.generation = generation;
        }
    }
    new
}

/// The status, unless it is what an agent said whose Pod is gone.
pub(super) fn current_status(node: &FleetNode) -> Option<&ModelNodeStatus> {
    let status = node.node_models()?.status.as_ref()?;
    let writer = status.agent.as_ref().map(|agent| agent.pod_uid.as_str()).filter(|uid| !uid.is_empty());
    let alive = node.agent.as_ref().and_then(|agent| agent.pod_uid.as_deref()).filter(|uid| !uid.is_empty());
    let current = writer.is_none() || alive.is_none() || writer == alive;
    current.then_some(status)
}

/// What is there now. A ModelNode that somebody has deleted is made again from what was last reported: an empty one
/// would unload everything.
fn slots<'a>(node: &'a FleetNode, fleet: &'a Fleet) -> Vec<Slot<'a>> {
    if node.node_models().is_none() {
        let placed = |model: &&Model| {
            let mut placements = model.status.placements.iter();
            placements.any(|placement| placement.node == node.name && placement.state != states::DRAINING)
        };
        let held = fleet.models().filter(placed).take(altiplano_crds::names::MAX_MODELS_PER_NODE);
        return held.map(|model| Slot::Serve { model, old: None, update: true }).collect();
    }
    let mut there = BTreeSet::new();
    let known = node.entries().iter().filter(|entry| there.insert(entry.uid()));
    known
        .filter_map(|entry| {
            if fleet.unreadable.contains(entry.uid()) {
                return Some(Slot::Kept(entry));
            }
            let model = fleet.model(entry.uid())?;
            let old = entry.parsed.as_ref().ok();
            Some(match old.map(|old| old.mode) {
                Some(AssignmentMode::Estimate) => Slot::Estimate { model, old },
                Some(AssignmentMode::Serve) | None => Slot::Serve { model, old, update: false },
            })
        })
        .collect()
}

/// One round of planning.
pub(super) struct Round<'a> {
    pub(super) fleet: &'a Fleet,
    pub(super) settings: &'a Settings,
    pub(super) memory: Memory,
    pub(super) now: Now,
    pub(super) nodes: BTreeMap<&'a str, Draft<'a>>,
    pub(super) braked: bool,
    next: Option<Duration>,
}

/// Plans one round.
#[must_use]
pub fn plan(fleet: &Fleet, settings: &Settings, memory: Memory, now: Now) -> (Plan, Memory) {
    let nodes = fleet.nodes.values().map(|node| (node.name.as_str(), Draft::new(node, fleet))).collect();
    let mut round = Round { fleet, settings, memory, now, nodes, braked: false, next: None };
    round.memory.prune(fleet, now.mono);
    round.judge_agents();
    round.learn_estimates();
    round.learn_refusals();
    round.learn_served();
    let mut models: Vec<&Model> = fleet.models().collect();
    models.sort_by(|a, b| {
        let rank = |model: &Model| std::cmp::Reverse(model.spec.placement.priority);
        (rank(a), a.created, &a.uid).cmp(&(rank(b), b.created, &b.uid))
    });
    let models = models.into_iter().map(|model| (model.uid.clone(), round.plan_model(model))).collect();
    let nodes = round.nodes.values().filter_map(|draft| Some((draft.node.name.clone(), node_plan(draft)?))).collect();
    let upgrades = fleet.nodes.values().filter_map(|node| Some((node.name.clone(), node.upgrade()?.clone()))).collect();
    (Plan { nodes, models, upgrades, next: round.next }, round.memory)
}

fn node_plan(draft: &Draft<'_>) -> Option<NodePlan> {
    let Draft { node, stale, slots, frozen, .. } = draft;
    if *frozen {
        return None;
    }
    if let Some(models) = node.node_models() {
        if node.object.is_none() && slots.is_empty() && (node.agent.is_none() || *stale) {
            return Some(NodePlan::Delete { uid: models.uid.clone() });
        }
    } else if node.agent.is_none() || (node.object.is_none() && slots.is_empty()) {
        return None;
    }
    Some(NodePlan::Hold(slots.iter().map(Slot::render).collect()))
}

impl Round<'_> {
    /// Something will have to be decided at that time.
    pub(super) fn look_again(&mut self, at: Duration) {
        if at > self.now.mono {
            self.next = Some(self.next.map_or(at, |next| next.min(at)));
        }
    }

    fn judge_agents(&mut self) {
        let now = self.fleet.blind_since.unwrap_or(self.now.mono);
        let (stale_after, grace) = (self.settings.stale_after, self.settings.loss_grace);
        let (mut known, mut silent) = (0_usize, 0_usize);
        let mut deadlines = Vec::new();
        for (name, draft) in &mut self.nodes {
            let changed = match (&draft.node.agent, &draft.node.models) {
                (Some(agent), _) => agent.changed,
                (None, Some(_)) => *self.memory.absent.entry((*name).to_owned()).or_insert(now),
                (None, None) => {
                    draft.stale = true;
                    continue;
                }
            };
            let (stale_at, lost_at) = (changed + stale_after, changed + stale_after + grace);
            deadlines.extend([stale_at, lost_at]);
            draft.stale = now >= stale_at || draft.node.agent.as_ref().is_some_and(|agent| agent.released);
            draft.lost = now >= lost_at;
            // A machine that was dead before this process came and holds nothing says nothing about today.
            let of_today =
                !draft.stale || !draft.slots.is_empty() || draft.node.agent.as_ref().is_some_and(|a| a.alive);
            if draft.node.models.is_some() && draft.node.object.is_some() && of_today {
                known += 1;
                silent += usize::from(draft.stale);
            }
        }
        // An outage of the API server makes all agents look stale.
        self.braked = known >= 3 && silent * 2 > known;
        for (name, draft) in &self.nodes {
            if draft.lost && !self.braked && draft.node.models.is_some() {
                self.memory.lost.insert((*name).to_owned(), now);
            }
        }
        for at in deadlines {
            self.look_again(at);
        }
    }

    fn learn_estimates(&mut self) {
        let mut seen: BTreeMap<(String, Shape), Need> = BTreeMap::new();
        for draft in self.nodes.values() {
            let Some(status) = draft.status else { continue };
            for state in &status.models {
                let Some(model) = self.fleet.model(&state.uid) else { continue };
                if state.revision != model.revision {
                    continue;
                }
                if let Some(need) = Need::of_state(state, status) {
                    let known = seen.entry((model.settings.clone(), draft.shape.clone())).or_default();
                    *known = known.max(need);
                }
            }
        }
        self.memory.estimates.extend(seen);
    }

    fn learn_refusals(&mut self) {
        let now = self.now.mono;
        for (name, draft) in &self.nodes {
            for slot in &draft.slots {
                let Slot::Serve { model, old, .. } = slot else { continue };
                let revision = old.map_or(model.revision.as_str(), |old| old.revision.as_str());
                let Some(state) = draft.state(&model.uid, revision) else { continue };
                if states::accepts_requests(&state.state) {
                    self.memory.refusals.remove(&(model.uid.clone(), (*name).to_owned()));
                } else if let Some(why) = refusal(model, state) {
                    self.memory.refused(&model.uid, name, revision, why, now);
                }
            }
        }
    }

    /// A model that has served and is loaded again (woken by a request, or after its worker has ended) lets requests
    /// wait: nobody must be sent away then.
    fn learn_served(&mut self) {
        for (name, draft) in self.nodes.iter().filter(|(_, draft)| !draft.stale) {
            for slot in &draft.slots {
                let Slot::Serve { model, .. } = slot else { continue };
                let key = (model.uid.clone(), (*name).to_owned());
                if let Some(state) = draft.states(&model.uid).find(|state| states::accepts_requests(&state.state)) {
                    self.memory.served.insert(key, state.revision.clone());
                } else if !draft.states(&model.uid).any(waits) {
                    self.memory.served.remove(&key);
                }
            }
        }
        let nodes = &self.nodes;
        self.memory.served.retain(|(uid, node), _| nodes.get(node.as_str()).is_some_and(|draft| draft.serves(uid)));
    }

    /// Whether a request would be accepted there: by that revision, or (`None`) by any.
    pub(super) fn accepts(&self, draft: &Draft<'_>, uid: &str, revision: Option<&str>) -> bool {
        let meant = |found: &str| revision.is_none_or(|revision| revision == found);
        let mut states = draft.states(uid).filter(|state| meant(&state.revision));
        states.any(|state| {
            let served = || self.memory.served.get(&(uid.to_owned(), draft.node.name.clone()));
            states::accepts_requests(&state.state) || (waits(state) && served().is_some_and(|served| meant(served)))
        })
    }

    /// What a model needs on that node; `None` before anyone has said.
    pub(super) fn need(&self, model: &Model, draft: &Draft<'_>) -> Option<Need> {
        self.memory.estimates.get(&(model.settings.clone(), draft.shape.clone())).copied()
    }

    /// What is on that node, without the model itself.
    pub(super) fn claims(&self, draft: &Draft<'_>, without: &str) -> Vec<Claim> {
        let serving = draft.slots.iter().filter_map(|slot| match slot {
            Slot::Serve { model, .. } if model.uid != without => Some(*model),
            _ => None,
        });
        serving
            .map(|model| {
                let reported = draft.status.and_then(|status| {
                    let mut states = status.models.iter().filter(|state| state.uid == model.uid);
                    states.find_map(|state| Need::of_state(state, status))
                });
                Claim::of(model, reported.or_else(|| self.need(model, draft)).unwrap_or_default())
            })
            .collect()
    }
}

fn waits(state: &ModelState) -> bool {
    matches!(state.state.as_str(), states::LOADING | states::PENDING)
}

/// The agent has no room for the model now, and lets it take turns with others.
pub(super) fn takes_turns(state: &ModelState) -> bool {
    state.state == states::UNLOADED && state.reason.as_deref() == Some(reasons::INSUFFICIENT_MEMORY)
}

/// The agent's no, if this is one that another node need not repeat.
pub(super) fn refusal<'a>(model: &Model, state: &'a ModelState) -> Option<(&'a str, &'a str)> {
    if !matches!(state.state.as_str(), states::FAILED | states::PENDING) {
        return None;
    }
    let reason = state.reason.as_deref()?;
    let of_the_node = matches!(
        reason,
        reasons::INSUFFICIENT_MEMORY | reasons::NO_DEVICE | reasons::GPU_REQUIRED | reasons::UNSUPPORTED_SPEC
    );
    let local_file = model.spec.model.source.uri.starts_with("file://") && state.state == states::FAILED;
    let missing_here = local_file && !state.file_present && reason != reasons::LOAD_FAILED;
    (of_the_node || missing_here).then(|| (reason, state.message.as_deref().unwrap_or_default()))
}
