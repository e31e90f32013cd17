//! Little host memory is left: which worker is ended, before the kernel ends one of its own choice, or all of them.

use std::cmp::Reverse;

use altiplano_crds::model_node::ModelAssignment;

use super::super::observe::{HostMemory, Observed};
use super::Step;
use crate::devices::CPU;
use crate::ledger::bytes;
use crate::runner::supervise::WorkerId;

/// More than it had reserved than this is no matter of rounding: 64 MiB.
const OVERSHOOT_BYTES: u64 = 64 << 20;

/// Less than this is not worth a worker's end: 16 MiB.
const WORTHWHILE_BYTES: u64 = 16 << 20;

/// The worker that holds most beyond what it had reserved; where all keep to it, the largest of the lowest priority.
/// One at a time: what it held must be back before anybody else is judged.
pub(super) fn end_the_worst(observed: &Observed) -> Option<Step> {
    let HostMemory { group, held } = observed.short.as_ref().filter(|_| observed.ending.is_none())?;
    let workers = observed.models.iter().flat_map(|(uid, model)| {
        let ids = model.workers.keys().map(move |id| (uid, model.assignment.as_ref(), *id));
        ids.filter_map(|(uid, assignment, id)| Some((uid, assignment, id, *held.get(&id)?)))
    });
    let overshoot = |id: WorkerId, held: u64| {
        let reserved = observed.ledger.holding(id).and_then(|need| need.get(CPU)).copied().unwrap_or(0);
        Some(held.saturating_sub(reserved)).filter(|more| *more >= OVERSHOOT_BYTES).unwrap_or(0)
    };
    let rank = |(_, assignment, id, held): &(&String, &ModelAssignment, WorkerId, u64)| {
        (overshoot(*id, *held), Reverse(assignment.priority), *held)
    };
    let (uid, _, worker, held) = workers.filter(|(.., held)| *held >= WORTHWHILE_BYTES).max_by_key(rank)?;
    let beyond = match overshoot(worker, held) {
        0 => String::new(),
        more => format!(", {} more than it had reserved", bytes(more)),
    };
    let stalled = match group.stalled_percent {
        0 => String::new(),
        percent => format!(" and for {percent} % of ten seconds nobody got on for want of it"),
    };
    let message = format!(
        "{} of the {} of host memory that the agent and its workers may take were in use{stalled}; this worker held \
         {}{beyond}",
        bytes(group.used),
        bytes(group.limit),
        bytes(held),
    );
    Some(Step::End { uid: uid.clone(), worker, message })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use altiplano_crds::model_node::RawAssignment;
    use serde_json::json;

    use super::super::super::observe::Happened;
    use super::super::tests::assignment;
    use super::*;
    use crate::cgroup::GroupMemory;
    use crate::devices::Devices;
    use crate::ledger::Need;
    use crate::runner::adopt::Record;
    use crate::runner::protocol::{MemoryUse, ProbeReport, RunnerConfig, RunnerEvent, RunnerReport};
    use crate::runner::supervise::WorkerEnd;

    const MIB: u64 = 1 << 20;

    /// Workers from 1 on, by (priority, reserved, held) in MiB; who is ended, and what is said of it.
    fn observed(workers: &[(i32, u64, u64)]) -> Observed {
        let now = Instant::now();
        let mut observed = Observed::default();
        let mut held = std::collections::BTreeMap::new();
        for ((priority, reserved, holds), worker) in workers.iter().zip(1..) {
            let raw = assignment(&json!({"name": format!("m{worker}"), "priority": priority}));
            let assignment = RawAssignment(raw).parse().unwrap();
            let predicted = Need::from([(CPU.to_owned(), reserved * MIB)]);
            let config = RunnerConfig { revision: assignment.revision.clone(), ..RunnerConfig::default() };
            observed.found(Record { worker, config, assignment, predicted, note: None }, now);
            held.insert(worker, holds * MIB);
        }
        let group = GroupMemory { limit: 1000 * MIB, used: 990 * MIB, stalled_percent: 0, limit_hits: 0 };
        observed.note("", Happened::Measured(HostMemory { group, held }), now);
        observed
    }

    fn ended(workers: &[(i32, u64, u64)]) -> Option<WorkerId> {
        match end_the_worst(&observed(workers)) {
            Some(Step::End { worker, .. }) => Some(worker),
            _ => None,
        }
    }

    #[test]
    fn who_takes_more_than_it_reserved_goes_first() {
        for (workers, expected) in [
            (&[][..], None),
            (&[(0, 100, 5)], None),
            (&[(0, 100, 90)], Some(1)),
            (&[(0, 100, 90), (0, 800, 700)], Some(2)),
            (&[(0, 100, 190), (0, 800, 700)], Some(1)),
            (&[(0, 100, 130), (0, 800, 700)], Some(2)),
            (&[(0, 100, 90), (5, 800, 700)], Some(1)),
            (&[(5, 100, 200), (0, 800, 700)], Some(1)),
        ] {
            assert_eq!(ended(workers), expected, "{workers:?}");
        }
        let Some(Step::End { uid, message, .. }) = end_the_worst(&observed(&[(0, 100, 190)])) else { panic!("nobody") };
        let expected = "990Mi of the 1000Mi of host memory that the agent and its workers may take were in use; this worker held \
                        190Mi, 90Mi more than it had reserved";
        assert_eq!(message, expected);
        assert_eq!(uid, observed(&[(0, 1, 1)]).models.keys().next().unwrap().as_str());
    }

    #[test]
    fn what_workers_and_others_hold_of_host_memory() {
        // (held, what the group has in use) in MiB; then (held by the ledger, by others). 100 are measured, 60 of them mapped.
        for ((held, used), expected) in [
            ((40, 50), (100, 0)),
            // Less than 16 MiB more is rounding, and less than 64 MiB of others'.
            ((50, 90), (100, 0)),
            ((75, 75), (132, 0)),
            ((40, 40 + 130), (100, 128)),
            ((10, 40 + 130), (100, 128)),
        ] {
            let mut observed = observed(&[(0, 100, 0)]);
            let part = MemoryUse {
                device: CPU.to_owned(),
                weights_bytes: 100 * MIB,
                mapped_bytes: 60 * MIB,
                ..MemoryUse::default()
            };
            let report = RunnerReport { memory: vec![part], ..RunnerReport::default() };
            let now = Instant::now();
            let cpu = ProbeReport::default();
            observed.note("", Happened::Probed(Ok(Devices::new(cpu, 1000 * MIB))), now);
            let uid = observed.models.keys().next().unwrap().clone();
            observed.note(&uid, Happened::WorkerSaid(1, RunnerEvent::Ready(report)), now);
            let group = GroupMemory { limit: 1000 * MIB, used: used * MIB, stalled_percent: 0, limit_hits: 0 };
            observed.hold(&[(1, held * MIB)].into(), Some(group));
            let found = (observed.ledger.held(CPU) / MIB, observed.ledger.foreign(CPU) / MIB);
            assert_eq!(found, expected, "{held} {used}");
            // Models may take less than the group: others have room beside them.
            observed.hold(&[(1, held * MIB)].into(), Some(GroupMemory { limit: 2000 * MIB, ..group }));
            assert_eq!(observed.ledger.foreign(CPU), 0);
        }
    }

    #[test]
    fn a_stall_counts_at_the_own_limit_alone() {
        let group =
            |stalled_percent, limit_hits| GroupMemory { limit: 1 << 30, used: 1 << 20, stalled_percent, limit_hits };
        let before = Some(group(0, 7));
        assert!(HostMemory::is_stalled(group(25, 8), before));
        assert!(!HostMemory::is_stalled(group(24, 8), before));
        assert!(!HostMemory::is_stalled(group(90, 7), before), "others lack memory");
        assert!(!HostMemory::is_stalled(group(90, 8), None));
    }

    #[test]
    fn one_at_a_time_and_never_by_an_old_measurement() {
        let now = Instant::now();
        let mut observed = observed(&[(0, 100, 90), (0, 800, 700)]);
        let again = observed.short.clone().unwrap();
        let step = end_the_worst(&observed).unwrap();
        observed.begin(&step, now);
        assert_eq!(end_the_worst(&observed), None);
        observed.note("", Happened::Measured(again.clone()), now);
        assert_eq!(end_the_worst(&observed), None, "the other one has not ended yet");
        let end = WorkerEnd { how: "was killed by SIGKILL".to_owned(), failure: None, last_lines: String::new() };
        observed.note(step.uid(), Happened::WorkerEnded(2, end), now);
        assert!(end_the_worst(&observed).is_some_and(|next| matches!(next, Step::End { worker: 1, .. })));
    }
}
