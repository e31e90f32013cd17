//! Who is unloaded to make room for another.
//!
//! By score, the highest first: `idle time ÷ (load time × weight)`, where a model's weight doubles with each step of its
//! priority. Never a busy model, one whose policy is `Never`, one of higher priority than the one that needs the room,
//! or one that has not been resident for its `minResidentSeconds` (and, unless those are 0, for as long as its load
//! took: two models that exclude each other and are asked for in turn must not spend their time loading).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use altiplano_crds::model_deployment::UnloadPolicy;
use altiplano_crds::model_node::{AssignmentMode, ModelAssignment};

use super::super::observe::{Model, Phase, Worker};
use super::{Planner, is_idle, is_quiet, last_use, seconds};
use crate::ledger::{Ledger, Need, Shortage};

/// A model that was just loaded gets at least so long, unless it has served: those who waited for it must reach it.
const SHORTEST_TURN: Duration = Duration::from_secs(1);

/// Whether others can make room.
pub(super) enum Room {
    /// If these are unloaded.
    Now(Vec<String>),
    /// Not yet.
    Later {
        /// When one of them may be unloaded who may not now; `None`: none of them is too young.
        at: Option<Instant>,
        /// Busy ones that have been resident for long enough and would do, had they no requests.
        busy: Vec<String>,
    },
    /// Not by those who may be unloaded.
    Never,
}

/// Why a model keeps its memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Hold {
    /// It does not: it may go, by this score.
    Idle(f64),
    /// Since when it has been resident.
    Busy(Instant),
    /// Resident until then at least.
    Young(Instant),
    Loading,
    Pinned,
    Higher,
    Leaving,
}

impl Hold {
    /// Only what does not change with every request: this goes into a status.
    fn word(self) -> Option<&'static str> {
        match self {
            Self::Pinned => Some("pinned"),
            Self::Higher => Some("of higher priority"),
            Self::Idle(_) | Self::Busy(_) | Self::Young(_) | Self::Loading | Self::Leaving => None,
        }
    }
}

impl Planner<'_> {
    /// Who of the others would have to go for `need`; `soon` is what is promised without those on their way out.
    pub(super) fn victims(&self, wanted: &ModelAssignment, soon: &Ledger, need: &Need) -> Room {
        let mut without = soon.clone();
        let others = || self.observed.models.iter().filter(|(uid, _)| **uid != wanted.uid);
        let mut idle: Vec<(f64, &String, &Model)> = others()
            .filter_map(|(uid, other)| match self.hold(wanted, uid, other) {
                Hold::Idle(score) => Some((score, uid, other)),
                _ => None,
            })
            .collect();
        idle.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        let mut chosen: Vec<&(f64, &String, &Model)> = Vec::new();
        for one in &idle {
            if without.check(need).is_ok() {
                break;
            }
            if frees(&without, one.2, need) {
                release(&mut without, one.2);
                chosen.push(one);
            }
        }
        if without.check(need).is_ok() {
            return Room::Now(spared(soon, need, &chosen));
        }
        // What is spoken for by others will in its time be given up too; only these are not.
        let mut for_good = BTreeSet::new();
        let mut at: Option<Instant> = None;
        let mut used: Vec<(bool, Instant, &String, &Model)> = Vec::new();
        for (uid, other) in &self.observed.models {
            match self.hold(wanted, uid, other) {
                Hold::Pinned | Hold::Higher if *uid != wanted.uid => for_good.extend(other.workers.keys().copied()),
                Hold::Young(until) => at = Some(at.map_or(until, |at| at.min(until))),
                Hold::Busy(since) => used.push((!other.yields, since, uid, other)),
                Hold::Idle(_) | Hold::Pinned | Hold::Higher | Hold::Loading | Hold::Leaving => {}
            }
        }
        // Who has begun to give way goes on with it, then who has been there for longest; no more than need be.
        used.sort_by_key(|(is_new, since, uid, _)| (*is_new, *since, (*uid).clone()));
        // Of the idle ones, who has given way must not take requests again before the others have none either.
        let given_way = chosen.iter().filter(|(_, _, other)| other.yields);
        let mut busy: Vec<String> = given_way.map(|(_, uid, _)| (*uid).clone()).collect();
        for (_, _, uid, other) in used {
            if without.check(need).is_err() && frees(&without, other, need) {
                release(&mut without, other);
                busy.push(uid.clone());
            }
        }
        if without.check(need).is_err() {
            busy.clear();
        }
        let mut left = self.held.clone();
        left.keep(|worker| for_good.contains(&worker));
        // For good they have what they had when they were loaded.
        for (id, worker) in self.observed.models.values().flat_map(|model| &model.workers) {
            left.expect_less(*id, &worker.grown());
        }
        if left.check(need).is_ok() { Room::Later { at, busy } } else { Room::Never }
    }

    fn hold(&self, wanted: &ModelAssignment, uid: &str, other: &Model) -> Hold {
        let assignment = &other.assignment;
        let Some((_, worker)) = other.staying(&assignment.revision).filter(|_| !self.unloaded.contains(uid)) else {
            return Hold::Leaving;
        };
        if assignment.unload.policy == UnloadPolicy::Never || assignment.mode != AssignmentMode::Serve {
            return Hold::Pinned;
        }
        if assignment.priority > wanted.priority {
            return Hold::Higher;
        }
        let Phase::Ready { since } = worker.phase else { return Hold::Loading };
        let until = since + residency(assignment, other, worker, since);
        if self.now < until {
            Hold::Young(until)
        } else if is_quiet(other) {
            Hold::Idle(score(other, since, self.now))
        } else {
            Hold::Busy(since)
        }
    }

    /// A shortage with a word on who keeps the memory for good.
    pub(super) fn explained(&self, wanted: &ModelAssignment, mut shortage: Shortage) -> Shortage {
        for holder in &mut shortage.holders {
            let of = |(_, model): &(&String, &Model)| model.label() == holder.who;
            if let Some((uid, model)) = self.observed.models.iter().find(of) {
                holder.why = if *uid == wanted.uid { None } else { self.hold(wanted, uid, model).word() };
            }
        }
        shortage
    }
}

/// Least time that a model keeps its memory, which it has been able to use `since`.
fn residency(assignment: &ModelAssignment, model: &Model, worker: &Worker, since: Instant) -> Duration {
    match seconds(assignment.unload.min_resident_seconds) {
        // Those who waited for it have their answers.
        Duration::ZERO if is_idle(model) && last_use(model, since) > since => Duration::ZERO,
        Duration::ZERO => SHORTEST_TURN,
        least => least.max(worker.load_time().unwrap_or_else(|| model.load_time())),
    }
}

fn score(model: &Model, since: Instant, now: Instant) -> f64 {
    let idle = now.saturating_duration_since(last_use(model, since)).as_secs_f64();
    let weight = f64::from(model.assignment.priority.clamp(-64, 64)).exp2();
    idle / (model.load_time().as_secs_f64().max(0.1) * weight)
}

fn release(ledger: &mut Ledger, model: &Model) {
    model.workers.keys().for_each(|id| ledger.release(*id));
}

/// Whether the model holds something of what lacks.
fn frees(ledger: &Ledger, model: &Model, need: &Need) -> bool {
    let held = |id, device: &String| ledger.holding(id).and_then(|held| held.get(device)).is_some_and(|held| *held > 0);
    let lacks = need.iter().filter(|(device, bytes)| **bytes > ledger.free(device));
    lacks.into_iter().any(|(device, _)| model.workers.keys().any(|id| held(*id, device)))
}

/// Those of `chosen` without whom it does not do; who is worth most is spared first.
fn spared(soon: &Ledger, need: &Need, chosen: &[&(f64, &String, &Model)]) -> Vec<String> {
    let mut kept: Vec<bool> = vec![true; chosen.len()];
    for index in (0..chosen.len()).rev() {
        kept[index] = false;
        let mut ledger = soon.clone();
        chosen.iter().zip(&kept).filter(|(_, goes)| **goes).for_each(|(one, _)| release(&mut ledger, one.2));
        kept[index] = ledger.check(need).is_err();
    }
    chosen.iter().zip(kept).filter(|(_, goes)| *goes).map(|(one, _)| one.1.clone()).collect()
}
