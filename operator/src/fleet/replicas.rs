//! How many, and which: scaling, rollout, moves and deletion of one model. What holds a model goes on holding it unless
//! one of the rules here says otherwise.

use std::cmp::Reverse;
use std::time::Duration;

use altiplano_crds::conditions::states;

use super::filter::{Leave, must_leave, toleration_ends};
use super::memory::MOVE_WINDOW;
use super::place::Survey;
use super::plan::{Draft, FinalizerStep, Holder, ModelPlan, Round, Slot};
use super::seen::Model;

/// Time on top of `drainSeconds` after which nobody is waited for any more.
const DRAIN_MARGIN: Duration = Duration::from_mins(1);
/// A node that was lost this short a time ago may still show what its agent said before.
const FRESHLY_RETURNED: Duration = Duration::from_mins(1);

/// A node that holds the model, in this round.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, and together the order in which nodes go")]
struct Held<'a> {
    name: &'a str,
    /// A request would be accepted there, by the revision that its entry names.
    accepts: bool,
    updated: bool,
    refused: bool,
    /// It has no room there but for turns.
    in_turn: bool,
    stale: bool,
    returned: bool,
    failed: bool,
    /// Its agent is about to be replaced.
    upgrading: bool,
}

impl<'a> Round<'a> {
    pub(super) fn plan_model(&mut self, model: &'a Model) -> ModelPlan {
        let wanted = model.wanted();
        if wanted == 0 {
            return self.off(model);
        }
        let mut plan = ModelPlan { wanted, braked: self.braked, ..ModelPlan::default() };
        if !model.finalized() {
            plan.finalizer = FinalizerStep::Add;
        }

        let (mut counted, lost, mut leaving) = self.holders(model);
        self.leave_turns(model, &mut counted, &mut leaving);
        self.leave_upgrades(model, &mut counted, &mut leaving);
        self.leave_refusals(model, &mut counted);
        let rolling = counted.iter().any(|held| !held.updated);
        self.drop_surplus(model, &mut counted, rolling);
        let surge = self.roll_out(model, &counted, rolling);

        // Replicas that are missing because their node is lost, or must be left, are moves: not too many at a time.
        let mut missing = (wanted + surge).saturating_sub(counted.len());
        let mut moves = missing.min(lost.len() + leaving.len());
        let mut names: Vec<&str> = counted.iter().map(|held| held.name).collect();
        let mut held_back = false;
        let mut survey = if missing > 0 { self.survey(model, &names) } else { Survey::default() };
        while missing > 0
            && let Some(best) = survey.best
        {
            if !model.finalized() {
                held_back = true;
                break;
            }
            if moves > 0 {
                if let Err(at) = self.memory.may_move(self.now.mono) {
                    self.look_again(at);
                    held_back = true;
                    break;
                }
                self.memory.moves.push_back(self.now.mono);
                self.look_again(self.now.mono + MOVE_WINDOW);
                moves -= 1;
            }
            if let Some(draft) = self.nodes.get_mut(best) {
                draft.put(Slot::Serve { model, old: None, update: true });
            }
            names.push(best);
            missing -= 1;
            survey = self.survey(model, &names);
        }
        if missing > 0 && survey.best.is_none() {
            plan.asked = self.ask(model, &mut survey);
        } else if model.finalized() {
            self.stop_asking(model);
        }

        let settled = missing == 0 && counted.len() == names.len() && counted.iter().all(|held| held.accepts);
        let no_hope = missing > 0 && !held_back && plan.asked.is_empty();
        self.let_go(model, &lost, &leaving, settled, no_hope);
        plan.placed = names.len();
        plan.held_back = held_back;
        plan.holders = self.describe(model, &leaving);
        plan.draining = self.still_reporting(model).into_iter().map(str::to_owned).collect();
        if missing > 0 {
            plan.rejections = survey.rejections;
        }
        plan
    }

    /// The nodes that hold the model: those that count, those that are lost, and those that it must leave.
    fn holders(&mut self, model: &Model) -> (Vec<Held<'a>>, Vec<&'a str>, Vec<(&'a str, Leave)>) {
        let (mut counted, mut lost, mut leaving) = (Vec::new(), Vec::new(), Vec::new());
        let mut deadlines = Vec::new();
        for (name, draft) in &self.nodes {
            let name = *name;
            let mut slots = draft.slots.iter();
            let Some(old) = slots.find_map(|slot| match slot {
                Slot::Serve { model: held, old, .. } if held.uid == model.uid => Some(*old),
                _ => None,
            }) else {
                continue;
            };
            if draft.lost && !self.braked {
                lost.push(name);
                continue;
            }
            deadlines.extend(toleration_ends(model, draft.node, self.now.wall).map(|wait| self.now.mono + wait));
            if let Some(leave) = must_leave(model, draft.node, self.now.wall) {
                leaving.push((name, leave));
                continue;
            }
            let revision = old.map_or(model.revision.as_str(), |old| old.revision.as_str());
            let updated = revision == model.revision;
            let state = draft.state(&model.uid, revision);
            let accepts = self.accepts(draft, &model.uid, updated.then_some(revision));
            counted.push(Held {
                name,
                accepts: accepts && !draft.stale,
                updated,
                refused: state.is_some_and(|state| super::plan::refusal(model, state).is_some()),
                in_turn: state.is_some_and(super::plan::takes_turns),
                stale: draft.stale,
                returned: self.memory.lost.get(name).is_some_and(|at| *at + FRESHLY_RETURNED > self.now.mono),
                failed: state.is_some_and(|state| state.state == states::FAILED),
                upgrading: draft.node.is_to_be_replaced(),
            });
        }
        for at in deadlines {
            self.look_again(at);
        }
        (counted, lost, leaving)
    }

    /// A node where it only takes turns with others is left when another has room for all, and when that one serves: before,
    /// its requests wait for its turn.
    fn leave_turns(&mut self, model: &Model, counted: &mut Vec<Held<'a>>, leaving: &mut Vec<(&'a str, Leave)>) {
        let Some(index) = counted.iter().position(|held| held.in_turn).filter(|_| model.finalized()) else { return };
        let others: Vec<&str> =
            counted.iter().map(|held| held.name).filter(|name| *name != counted[index].name).collect();
        // Else on its way there already.
        if others.len() < model.wanted() && self.survey(model, &others).roomy.is_none() {
            return;
        }
        leaving.push((counted[index].name, Leave::Turns));
        counted.remove(index);
    }

    /// A node whose agent is to be replaced is left when another has room for the model, and when that one serves. One where
    /// it fails is no such node, and is not tried again at once.
    fn leave_upgrades(&mut self, model: &Model, counted: &mut Vec<Held<'a>>, leaving: &mut Vec<(&'a str, Leave)>) {
        let upgrading: Vec<&str> = counted.iter().filter(|held| held.upgrading).map(|held| held.name).collect();
        for name in upgrading.into_iter().filter(|_| model.finalized()) {
            let mut others: Vec<&str> = counted.iter().map(|held| held.name).filter(|other| *other != name).collect();
            let failed = counted.iter().find(|held| held.failed && held.name != name).map(|held| held.name);
            if let Some(failed) = failed.filter(|_| others.len() >= model.wanted()) {
                let why = ("UpgradeMoveFailed", "the model failed there when it was to move");
                self.memory.refused(&model.uid, failed, &model.revision, why, self.now.mono);
                others.retain(|other| *other != failed);
                if self.survey(model, &others).roomy.is_none() {
                    continue;
                }
                // Another one at once: the agent would drain meanwhile.
                self.drop_from(model, failed);
                counted.retain(|held| held.name != failed);
            } else if others.len() < model.wanted() && self.survey(model, &others).roomy.is_none() {
                continue;
            }
            leaving.push((name, Leave::Upgrade));
            counted.retain(|held| held.name != name);
        }
    }

    /// A node that refuses the model is left when another has room.
    fn leave_refusals(&mut self, model: &'a Model, counted: &mut [Held<'a>]) {
        if !model.finalized() {
            return;
        }
        for index in 0..counted.len() {
            if !counted[index].refused {
                continue;
            }
            let refusing = counted[index].name;
            let others: Vec<&str> = counted.iter().map(|held| held.name).filter(|name| *name != refusing).collect();
            let Some(best) = self.survey(model, &others).best else { continue };
            self.drop_from(model, refusing);
            if let Some(draft) = self.nodes.get_mut(best) {
                draft.put(Slot::Serve { model, old: None, update: true });
            }
            counted[index] = Held {
                name: best,
                accepts: false,
                updated: true,
                refused: false,
                in_turn: false,
                stale: false,
                returned: false,
                failed: false,
                upgrading: false,
            };
        }
    }

    /// Too many hold it: the worst go. During a rollout an old one goes only when enough others serve.
    fn drop_surplus(&mut self, model: &Model, counted: &mut Vec<Held<'a>>, rolling: bool) {
        let wanted = model.wanted();
        let surge = usize::try_from(model.spec.rollout.max_surge).unwrap_or(0);
        while counted.len() > wanted {
            let serving = counted.iter().filter(|held| held.accepts).count();
            let worst = |held: &&Held<'_>| {
                (held.accepts, !held.stale, !held.returned, held.updated, !held.refused, Reverse(held.name.to_owned()))
            };
            let victim = if !rolling || counted.len() > wanted + surge {
                counted.iter().min_by_key(worst)
            } else if serving > wanted {
                counted.iter().filter(|held| !held.updated).min_by_key(worst)
            } else {
                None
            };
            let Some(victim) = victim.map(|held| held.name) else { break };
            counted.retain(|held| held.name != victim);
            self.drop_from(model, victim);
        }
    }

    /// Lets old replicas take the new revision, no more at a time than `maxUnavailable` allows. Answers how many
    /// replicas more than wanted are needed for the rollout to go on.
    fn roll_out(&mut self, model: &Model, counted: &[Held<'a>], rolling: bool) -> usize {
        let count = |number: i32| usize::try_from(number).unwrap_or(0);
        let rollout = &model.spec.rollout;
        let floor = model.wanted().saturating_sub(count(rollout.max_unavailable));
        let serving = counted.iter().filter(|held| held.accepts).count();
        let mut spare = serving.saturating_sub(floor);
        let mut waits = false;
        for held in counted {
            let mut turn = held.updated || !held.accepts;
            if !turn && spare > 0 {
                spare -= 1;
                turn = true;
            }
            waits |= !turn;
            if let Some(draft) = self.nodes.get_mut(held.name).filter(|_| turn) {
                for slot in &mut draft.slots {
                    if let Slot::Serve { model: there, update, .. } = slot
                        && there.uid == model.uid
                    {
                        *update = true;
                    }
                }
            }
        }
        let all_serve = counted.iter().all(|held| held.accepts);
        if rolling && waits && serving <= floor && (all_serve || counted.len() > model.wanted()) {
            count(rollout.max_surge)
        } else {
            0
        }
    }

    /// Lost nodes and those to be left keep their entry until the replacement serves: an agent that comes back early
    /// has gone on serving, and one that cannot be reached goes on with what it was told.
    fn let_go(&mut self, model: &Model, lost: &[&str], leaving: &[(&str, Leave)], settled: bool, no_hope: bool) {
        for name in lost {
            let gone = self.nodes.get(name).is_none_or(|draft| draft.node.object.is_none());
            if settled || gone {
                self.drop_from(model, name);
            }
        }
        let patience = seconds(model.spec.rollout.drain_seconds) + DRAIN_MARGIN;
        for (name, leave) in leaving {
            let key = (model.uid.clone(), (*name).to_owned());
            let since = *self.memory.leaving.entry(key.clone()).or_insert(self.now.mono);
            let evicted = matches!(leave, Leave::Evicted(_));
            let over = evicted && (no_hope || self.now.mono >= since + patience);
            if settled || over {
                self.drop_from(model, name);
                self.memory.leaving.remove(&key);
            } else if evicted {
                self.look_again(since + patience);
            }
        }
        let still = |name: &str| leaving.iter().any(|(leaving, _)| *leaving == name);
        self.memory.leaving.retain(|(uid, name), _| *uid != model.uid || still(name));
    }

    fn describe(&self, model: &Model, leaving: &[(&str, Leave)]) -> Vec<Holder> {
        let holders = self.nodes.values().filter_map(|draft| {
            let updated = draft.slots.iter().find_map(|slot| match slot {
                Slot::Serve { model: held, old, update } if held.uid == model.uid => {
                    Some(*update || old.is_none_or(|old| old.revision == model.revision))
                }
                _ => None,
            })?;
            let name = &draft.node.name;
            let leave = leaving.iter().find(|(leaving, _)| leaving == name);
            Some(Holder {
                node: name.clone(),
                updated,
                leaving: leave.map(|(_, leave)| leave.to_string()),
                stale: draft.stale,
                accepts: !draft.stale && self.accepts(draft, &model.uid, None),
                upgrading: draft.node.upgrade().is_some(),
            })
        });
        holders.collect()
    }

    /// Nothing is wanted: everything goes, and then the finalizer.
    fn off(&mut self, model: &Model) -> ModelPlan {
        let mut waiting: Vec<&str> = Vec::new();
        for (name, draft) in &self.nodes {
            // An entry that goes in this round has not been seen to be gone.
            if reachable(draft) && draft.serves(&model.uid) {
                waiting.push(name);
            }
        }
        for draft in self.nodes.values_mut() {
            draft.drop_model(&model.uid);
        }
        waiting.extend(self.still_reporting(model));
        waiting.sort_unstable();
        waiting.dedup();
        let draining = waiting.iter().map(|name| (*name).to_owned()).collect();
        let mut plan = ModelPlan { draining, ..ModelPlan::default() };
        if !model.deleting {
            self.memory.deleting.remove(&model.uid);
            if model.finalized() && waiting.is_empty() {
                plan.finalizer = FinalizerStep::Remove;
            }
            return plan;
        }
        if !model.finalized() {
            return plan;
        }
        let since = *self.memory.deleting.entry(model.uid.clone()).or_insert(self.now.mono);
        let deadline = since + seconds(model.spec.rollout.drain_seconds) + DRAIN_MARGIN;
        let over = self.now.mono >= deadline;
        if waiting.is_empty() || over {
            plan.finalizer = FinalizerStep::Remove;
            if over {
                plan.drain_timed_out.clone_from(&plan.draining);
            }
        } else {
            self.look_again(deadline);
        }
        plan
    }

    /// Nodes that should not hold the model and may still do.
    fn still_reporting(&self, model: &Model) -> Vec<&'a str> {
        let reports = |draft: &&Draft<'a>| {
            let Some(models) = draft.node.node_models().filter(|_| reachable(draft)) else { return false };
            let Some(status) = &models.status else { return false };
            // A round ago its entry may have gone, and the agent has not acted on that yet.
            let behind = model.deleting && status.observed_generation.is_some_and(|seen| seen < models.generation);
            let there = |state: &altiplano_crds::model_node::ModelState| {
                state.uid == model.uid && state.state != states::ESTIMATED
            };
            !draft.serves(&model.uid) && !draft.estimates(&model.uid) && (behind || status.models.iter().any(there))
        };
        self.nodes.iter().filter(|(_, draft)| reports(draft)).map(|(name, _)| *name).collect()
    }

    fn drop_from(&mut self, model: &Model, node: &str) {
        if let Some(draft) = self.nodes.get_mut(node) {
            draft.drop_model(&model.uid);
        }
    }

    fn stop_asking(&mut self, model: &Model) {
        for draft in self.nodes.values_mut().filter(|draft| draft.estimates(&model.uid)) {
            draft.drop_model(&model.uid);
        }
    }
}

/// Whether the node's agent can be waited for.
fn reachable(draft: &Draft<'_>) -> bool {
    !draft.stale && draft.node.models.is_some()
}

fn seconds(seconds: i32) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
