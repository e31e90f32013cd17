//! Where a model could go: every node looked at, with the reason for each that is not chosen.

use std::collections::BTreeMap;

use altiplano_crds::conditions::states;
use altiplano_crds::model_node::ModelState;
use altiplano_crds::names;

use super::capacity::{Claim, fits};
use super::filter::{Why, rather_not, selects, unsuitable};
use super::plan::{Draft, Round, Slot};
use super::seen::Model;

/// Nodes that are asked at the same time how much memory a model needs, when those asked before cannot tell.
const MOST_ASKED: usize = 8;

/// Points of a node, in thousandths of a full one; the fewest win. For each model that it holds …
const CROWD: i64 = 10;
/// … for a taint that says that others are to be preferred …
const RATHER_NOT: i64 = 500;
/// … and off, when the file is there already.
const FILE_PRESENT: i64 = 250;

/// What was found.
#[derive(Default)]
pub(super) struct Survey<'a> {
    /// The best node with room.
    pub(super) best: Option<&'a str>,
    /// Nodes that might do, once it is known how much memory the model needs there; the best first.
    pub(super) unknown: Vec<&'a str>,
    /// The best of those where it has room beside everything that is there, on the kind of device that it prefers.
    pub(super) roomy: Option<&'a str>,
    /// The others, and why not.
    pub(super) rejections: BTreeMap<String, Why>,
}

impl<'a> Round<'a> {
    /// Looks at every node that does not hold the model. `counting` are the nodes whose replicas count for the spread.
    pub(super) fn survey(&mut self, model: &Model, counting: &[&str]) -> Survey<'a> {
        let mut survey = Survey::default();
        let (mut fitting, mut roomy, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        let mut deadlines = Vec::new();
        let spread = self.spread(model, counting);
        for (name, draft) in &self.nodes {
            if draft.serves(&model.uid) {
                continue;
            }
            // A node that neither matches nor has a living agent is no candidate that anyone would miss.
            if draft.stale && !selects(model, draft.node) {
                continue;
            }
            let verdict = self.look_at(model, draft, &spread);
            match verdict {
                Ok(Verdict::Fits { rank, roomy: is_roomy }) => {
                    fitting.push((rank, *name));
                    if is_roomy {
                        roomy.push((rank, *name));
                    }
                }
                Ok(Verdict::Unknown(rank)) => unknown.push((rank, *name)),
                Err(why) => {
                    if let Why::Refused { .. } = why {
                        let refusal = self.memory.refusal(&model.uid, name, &model.revision, self.now.mono);
                        deadlines.extend(refusal.map(|refusal| refusal.until));
                    }
                    survey.rejections.insert((*name).to_owned(), why);
                }
            }
        }
        for at in deadlines {
            self.look_again(at);
        }
        unknown.sort_unstable();
        survey.best = fitting.into_iter().min().map(|(_, name)| name);
        survey.roomy = roomy.into_iter().min().map(|(_, name)| name);
        survey.unknown = unknown.into_iter().map(|(_, name)| name).collect();
        survey
    }

    fn look_at(&self, model: &Model, draft: &Draft<'_>, spread: &Spread) -> Result<Verdict, Why> {
        let node = draft.node;
        if let Some(why) = unsuitable(model, node, draft.stale, self.now.wall) {
            return Err(why);
        }
        if draft.status.is_none() {
            // A new agent has the Lease and the old one's status is still there.
            return Err(Why::NotReported);
        }
        let room = draft.slots.len() < names::MAX_MODELS_PER_NODE || draft.estimates(&model.uid);
        if !room {
            return Err(Why::ListFull);
        }
        spread.check(node.label(&spread.key))?;
        if let Some(refusal) = self.memory.refusal(&model.uid, &node.name, &model.revision, self.now.mono) {
            return Err(Why::Refused { reason: refusal.reason.clone(), message: refusal.message.clone() });
        }
        let claims = self.claims(draft, &model.uid);
        // Small models fill no memory and still share what computes.
        let mut rank = CROWD.saturating_mul(i64::try_from(claims.len()).unwrap_or(i64::MAX));
        // What goes to an agent that is yet to be replaced moves twice.
        if rather_not(model, node, self.now.wall) || self.fleet.outdated.contains(&node.name) {
            rank += RATHER_NOT;
        }
        if file_present(model, draft) {
            rank -= FILE_PRESENT;
        }
        let Some(need) = self.need(model, draft) else {
            // Without the need: as full as it is now.
            let held: i64 = claims.iter().map(|claim| claim.need.total() >> 20).sum();
            let total = draft.pools.accelerator.saturating_add(draft.pools.host.min(1 << 50)) >> 20;
            return Ok(Verdict::Unknown(rank + held.saturating_mul(1000) / total.max(1)));
        };
        let fit = fits(draft.pools, &claims, Claim::of(model, need), model.spec.engine.gpu)?;
        // Models that would take turns, and a CPU where a GPU is preferred, only when nothing else is left.
        let turns = if fit.permille > 1000 { 2000 } else { 0 };
        let fallback = if fit.fallback { 4000 } else { 0 };
        let roomy = turns == 0 && fallback == 0;
        Ok(Verdict::Fits { rank: rank + fit.permille.min(10_000) + turns + fallback, roomy })
    }

    /// Asks a node how much memory the model needs. Nodes that were asked stay asked until one answers: their agents
    /// try again by themselves, and the first answer is good for all nodes of its kind.
    pub(super) fn ask(&mut self, model: &'a Model, survey: &mut Survey<'a>) -> Vec<String> {
        let asked = |round: &Self, name: &&str| round.nodes.get(name).is_some_and(|draft| draft.estimates(&model.uid));
        let mut asking: Vec<&str> = survey.unknown.iter().copied().filter(|name| asked(self, name)).collect();
        let mut open = false;
        for name in &asking {
            let state = self.nodes.get(name).and_then(|draft| draft.state(&model.uid, &model.revision));
            match state.filter(|state| state.state == states::FAILED) {
                Some(state) => {
                    survey.rejections.insert((*name).to_owned(), Why::EstimateFailed(words(state)));
                    // What is wrong with a remote file is wrong everywhere.
                    open |= !model.spec.model.source.uri.starts_with("file://") && !node_is_to_blame(state);
                }
                None => open = true,
            }
        }
        if !open && asking.len() < MOST_ASKED {
            asking.extend(survey.unknown.iter().copied().find(|name| !asking.contains(name)));
        }
        for (name, draft) in &mut self.nodes {
            if !asking.contains(name) {
                if draft.estimates(&model.uid) {
                    draft.drop_model(&model.uid);
                }
            } else if !draft.estimates(&model.uid) {
                draft.put(Slot::Estimate { model, old: None });
            }
        }
        asking.sort_unstable();
        asking.into_iter().map(str::to_owned).collect()
    }

    fn spread(&self, model: &Model, counting: &[&str]) -> Spread {
        let placement = &model.spec.placement;
        let Some(key) = placement.topology_key.clone() else { return Spread::default() };
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for (name, draft) in &self.nodes {
            let holds = counting.contains(name);
            let Some(value) = draft.node.label(&key) else { continue };
            if holds || unsuitable(model, draft.node, draft.stale, self.now.wall).is_none() {
                *counts.entry(value.to_owned()).or_default() += usize::from(holds);
            }
        }
        let skew = placement.max_skew.and_then(|skew| usize::try_from(skew).ok()).unwrap_or(1);
        Spread { key, skew, counts }
    }
}

enum Verdict {
    /// There is room.
    Fits {
        /// The lower the better.
        rank: i64,
        /// Nobody would have to take turns, nor use a CPU in a GPU's place.
        roomy: bool,
    },
    /// Nobody knows what the model needs there.
    Unknown(i64),
}

/// Replicas per value of the topology key, over the nodes that come into question.
#[derive(Default)]
struct Spread {
    key: String,
    skew: usize,
    counts: BTreeMap<String, usize>,
}

impl Spread {
    fn check(&self, value: Option<&str>) -> Result<(), Why> {
        if self.key.is_empty() {
            return Ok(());
        }
        let Some(value) = value else {
            return Err(Why::Spread(format!("lacks the label {}, over which replicas are spread", self.key)));
        };
        let here = self.counts.get(value).copied().unwrap_or(0) + 1;
        let fewest = self.counts.iter().min_by_key(|(_, count)| **count);
        match fewest {
            Some((other, count)) if here > count + self.skew => Err(Why::Spread(format!(
                "would make {here} replicas in {}={value} against {count} in {other}, more than maxSkew {} allows",
                self.key, self.skew
            ))),
            _ => Ok(()),
        }
    }
}

/// Whether the file is on the node already: of this model, or of another with the same source.
fn file_present(model: &Model, draft: &Draft<'_>) -> bool {
    let same_source = |uid: &str| {
        draft.slots.iter().any(|slot| {
            matches!(slot, Slot::Serve { model: other, .. }
                if other.uid == uid && other.spec.model.source == model.spec.model.source)
        })
    };
    draft.status.is_some_and(|status| {
        let mut present = status.models.iter().filter(|state| state.file_present);
        present.any(|state| state.uid == model.uid || same_source(&state.uid))
    })
}

fn node_is_to_blame(state: &ModelState) -> bool {
    use altiplano_crds::conditions::reasons;
    let reason = state.reason.as_deref().unwrap_or_default();
    matches!(reason, reasons::INSUFFICIENT_MEMORY | reasons::NO_DEVICE | reasons::UNSUPPORTED_SPEC)
}

/// Reason and message of a state in one line.
pub(super) fn words(state: &ModelState) -> String {
    match (state.reason.as_deref(), state.message.as_deref()) {
        (Some(reason), Some(message)) => format!("{reason}: {message}"),
        (Some(text), None) | (None, Some(text)) => text.to_owned(),
        (None, None) => state.state.clone(),
    }
}
