//! How workers go: their requests end first.

use std::collections::BTreeSet;
use std::time::Duration;

use altiplano_crds::conditions::{reasons, states};
use altiplano_crds::model_node::ModelAssignment;

use super::super::observe::{Listener, Model, Phase, RouteTo};
use super::{Planner, Step, Verdict, seconds};
use crate::runner::supervise::WorkerId;

/// How long requests that were on their way to a worker get to reach it after it has lost its route, where the listener
/// cannot say that there are none.
const SETTLE: Duration = Duration::from_millis(200);

/// How long a worker has to end after it was asked to, when it has no request any more.
const STOP_GRACE: Duration = Duration::from_secs(5);

impl Planner<'_> {
    /// The model is not wanted any more.
    pub(super) fn remove(&mut self, uid: &str, model: &Model) -> Verdict {
        let message = "the model leaves this node";
        let verdict = Verdict::because(states::DRAINING, reasons::DRAINING, message);
        if model.listener == Listener::Closing {
            return verdict;
        }
        let drain = seconds(model.assignment.rollout.drain_seconds).min(self.limits.drain);
        let mut last_route_ends = None;
        for (id, worker) in &model.workers {
            let is_ready = matches!(worker.phase, Phase::Ready { .. });
            let since = worker.leaving.map_or(self.now, |leaving| leaving.since);
            if worker.leaving.is_none() {
                let deadline = if is_ready { self.now + drain } else { self.now };
                self.plan.steps.push(Step::Drain { uid: uid.to_owned(), worker: *id, deadline });
            }
            if model.route == Some(RouteTo::Worker(*id)) {
                let lame_duck = self.limits.lame_duck.min(drain);
                last_route_ends = Some(since + lame_duck).filter(|_| is_ready);
            }
        }
        match last_route_ends {
            Some(ends) if self.now < ends => self.look_again(ends),
            _ => self.route(uid, model, RouteTo::Draining),
        }
        if model.workers.is_empty() {
            self.plan.steps.push(Step::Remove { uid: uid.to_owned() });
        }
        verdict
    }

    pub(super) fn unload_ready(&mut self, wanted: &ModelAssignment, worker: WorkerId, why: String) -> Verdict {
        self.plan.steps.push(Step::Unload { uid: wanted.uid.clone(), why, for_room: false });
        self.drain(wanted, worker);
        Verdict::because(states::UNLOADED, reasons::IDLE, "a request loads the model")
    }

    pub(super) fn drain(&mut self, wanted: &ModelAssignment, worker: WorkerId) {
        let time = seconds(wanted.rollout.drain_seconds).min(self.limits.drain);
        self.plan.steps.push(Step::Drain { uid: wanted.uid.clone(), worker, deadline: self.now + time });
        self.soon.release(worker);
    }

    /// Who must stop taking requests because another waits for the memory, and who may take them again.
    pub(super) fn settle_turns(&mut self) {
        for (uid, model) in &self.observed.models {
            match (self.yielding.contains(uid), model.yields) {
                (true, false) => self.plan.steps.push(Step::Yield { uid: uid.clone() }),
                (false, true) if !self.unloaded.contains(uid) => {
                    self.plan.steps.push(Step::Resume { uid: uid.clone() });
                }
                _ => {}
            }
        }
    }

    /// Asks the workers to end that are on their way out and have no request any more.
    pub(super) fn stop_drained(&mut self, wanted: &BTreeSet<&str>) {
        for (uid, model) in &self.observed.models {
            for (id, worker) in &model.workers {
                let Some(leaving) = worker.leaving.filter(|leaving| !leaving.stopped) else { continue };
                let is_routed = model.route == Some(RouteTo::Worker(*id));
                let lame_duck = if wanted.contains(uid.as_str()) { Duration::ZERO } else { self.limits.lame_duck };
                let settle = if leaving.settled { Duration::ZERO } else { SETTLE };
                let quiet_from = (leaving.since + lame_duck + settle).min(leaving.deadline);
                let is_quiet = worker.requests == 0 && !is_routed && self.now >= quiet_from;
                if is_quiet || self.now >= leaving.deadline {
                    let kill_at = leaving.deadline.max(self.now + STOP_GRACE);
                    self.plan.steps.push(Step::Stop { uid: uid.clone(), worker: *id, kill_at });
                } else {
                    let next = if self.now < quiet_from { quiet_from } else { leaving.deadline };
                    self.plan.wake_at = Some(self.plan.wake_at.map_or(next, |at| at.min(next)));
                }
            }
        }
    }
}
