//! Who gives back what its context has grown by, so that nobody has to be unloaded.
//!
//! Only growth: what a model had when it was loaded is its own. Whoever has no request is asked, pinned and important ones
//! too, because they lose nothing that they use; once, until its next request. Until a worker has answered, or
//! has had its time, what it was asked for counts as on its way.

use std::cmp::Reverse;
use std::time::Instant;

use altiplano_crds::model_deployment::UnloadPolicy;
use altiplano_crds::model_node::ModelAssignment;

use super::super::observe::{Model, Observed, Phase};
use super::victims::Room;
use super::{Planner, Step, is_quiet, last_use};
use crate::ledger::{Ledger, Need};
use crate::runner::supervise::WorkerId;

/// A model that can give something back.
pub(super) struct Grown {
    uid: String,
    worker: WorkerId,
    bytes: Need,
}

/// Takes from the ledger what workers were asked for. Returns when the first of them has had its time.
pub(super) fn expect(observed: &Observed, soon: &mut Ledger, now: Instant) -> Option<Instant> {
    let mut first: Option<Instant> = None;
    for (id, worker) in observed.models.values().flat_map(|model| &model.workers) {
        let (bytes, until) = (worker.grown(), worker.shrinks_until(now));
        if let Some(until) = until.filter(|_| !bytes.is_empty()) {
            soon.expect_less(*id, &bytes);
            first = Some(first.map_or(until, |first| first.min(until)));
        }
    }
    first
}

impl Planner<'_> {
    /// Who would have to be unloaded for `need`, and who is to shrink before that: those who make it fewer.
    pub(super) fn room(&self, wanted: &ModelAssignment, soon: &Ledger, need: &Need) -> (Room, Vec<Grown>) {
        let direct = self.victims(wanted, soon, need);
        let grown = self.grown(wanted);
        if grown.is_empty() {
            return (direct, Vec::new());
        }
        let mut small = soon.clone();
        for one in &grown {
            small.expect_less(one.worker, &one.bytes);
        }
        let Room::Now(victims) = self.victims(wanted, &small, need) else { return (direct, Vec::new()) };
        if matches!(&direct, Room::Now(all) if all.len() <= victims.len()) {
            return (direct, Vec::new());
        }
        // No more than need be.
        let mut left = soon.clone();
        for id in victims.iter().filter_map(|uid| self.observed.models.get(uid)).flat_map(|model| model.workers.keys())
        {
            left.release(*id);
        }
        let mut asked = Vec::new();
        for one in grown.into_iter().filter(|one| !victims.contains(&one.uid)) {
            let helps = need.iter().any(|(device, bytes)| *bytes > left.free(device) && one.bytes.contains_key(device));
            if helps {
                left.expect_less(one.worker, &one.bytes);
                asked.push(one);
            }
        }
        (Room::Now(victims), asked)
    }

    /// Asks them.
    pub(super) fn shrink(&mut self, asked: Vec<Grown>, for_whom: &Model) {
        for Grown { uid, worker, bytes } in asked {
            self.soon.expect_less(worker, &bytes);
            let why = format!("{} needs the memory", for_whom.label());
            self.plan.steps.push(Step::Shrink { uid, worker, why });
        }
    }

    /// Who can give something back and has not been asked: first who may also be unloaded, then who was used longest ago.
    fn grown(&self, wanted: &ModelAssignment) -> Vec<Grown> {
        let others =
            self.observed.models.iter().filter(|(uid, _)| **uid != wanted.uid && !self.unloaded.contains(*uid));
        let mut found: Vec<_> = others
            .filter(|(_, model)| is_quiet(model))
            .filter_map(|(uid, model)| {
                let (id, worker) = model.staying(&model.assignment.revision)?;
                let Phase::Ready { since } = worker.phase else { return None };
                let bytes = worker.grown();
                if bytes.is_empty() || worker.shrink_asked.is_some() || self.is_asked(id) {
                    return None;
                }
                let assignment = &model.assignment;
                let is_pinned = assignment.unload.policy == UnloadPolicy::Never;
                let order = (is_pinned || assignment.priority > wanted.priority, last_use(model, since), Reverse(id));
                Some((order, Grown { uid: uid.clone(), worker: id, bytes }))
            })
            .collect();
        found.sort_by_key(|(order, _)| *order);
        found.into_iter().map(|(_, one)| one).collect()
    }

    /// Whether this plan asks it.
    fn is_asked(&self, id: WorkerId) -> bool {
        self.plan.steps.iter().any(|step| matches!(step, Step::Shrink { worker, .. } if *worker == id))
    }
}

#[cfg(test)]
mod tests {
    use altiplano_crds::model_node::RawAssignment;
    use serde_json::json;

    use super::super::super::observe::Happened;
    use super::super::tests::assignment;
    use super::*;
    use crate::devices::{CPU, Devices};
    use crate::runner::adopt::Record;
    use crate::runner::protocol::{MemoryUse, ProbeReport, RunnerConfig, RunnerEvent, RunnerReport};

    /// What was taken over has grown by what it holds beyond what was predicted for it.
    #[test]
    fn a_worker_of_another_agent_can_give_back_too() {
        for (predicted, holds, expected) in [(60, 100, Some(40)), (100, 100, None), (120, 100, None)] {
            let now = Instant::now();
            let mut observed = Observed::default();
            observed.note("", Happened::Probed(Ok(Devices::new(ProbeReport::default(), 1000))), now);
            let assignment = RawAssignment(assignment(&json!({"name": "m"}))).parse().unwrap();
            let predicted = Need::from([(CPU.to_owned(), predicted)]);
            let config = RunnerConfig { revision: assignment.revision.clone(), ..RunnerConfig::default() };
            observed.found(Record { worker: 1, config, assignment, predicted, note: None }, now);
            let part = MemoryUse { device: CPU.to_owned(), context_bytes: holds, ..MemoryUse::default() };
            let report = RunnerReport { memory: vec![part], ..RunnerReport::default() };
            observed.note("m", Happened::WorkerSaid(1, RunnerEvent::Ready(report)), now);
            let grown = observed.models["m"].workers[&1].grown();
            assert_eq!(grown.get(CPU).copied(), expected);
        }
    }
}
