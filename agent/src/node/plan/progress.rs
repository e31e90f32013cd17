//! Random traffic on a device that does not hold all models, played on the real `plan`, `begin` and `note`: never over
//! capacity, nobody unloaded who may not be, and everybody served within a time that can be said beforehand.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use altiplano_crds::model_deployment::UnloadPolicy;
use altiplano_crds::model_node::RawAssignment;
use proptest::prelude::*;
use serde_json::json;

use super::super::observe::{Activity, Desired, Happened, Observed, Phase, RouteTo};
use super::tests::{assignment, stored};
use super::{Limits, Step, plan};
use crate::devices::Devices;
use crate::runner::protocol::{EstimateReport, MemoryUse, ProbeReport, ProbedDevice, RunnerEvent, RunnerReport};
use crate::runner::supervise::{WorkerEnd, WorkerId};

const TICK: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
struct Given {
    bytes: u64,
    min_resident: u64,
    load: u64,
    pinned: bool,
    /// What its context grows by with a request, if it gets it.
    grows: u64,
    /// It does not shrink when it is asked to.
    deaf: bool,
}

#[derive(Clone, Debug)]
struct Request {
    model: usize,
    arrives: u64,
    takes: u64,
    waits_since: Option<Instant>,
    ends: Option<Instant>,
    done: bool,
}

struct Sim {
    given: Vec<Given>,
    capacity: u64,
    start: Instant,
    now: Instant,
    desired: Desired,
    observed: Observed,
    loading: BTreeMap<WorkerId, (String, Instant, u64)>,
    ending: BTreeMap<WorkerId, (String, Instant)>,
    shrinking: BTreeMap<WorkerId, (String, Instant)>,
    requests: Vec<Request>,
    /// Memory is on its way back, and the driver will say so.
    looking: Option<Devices>,
    /// What was done lately.
    story: std::collections::VecDeque<String>,
}

impl Sim {
    fn new(given: Vec<Given>, capacity: u64, requests: Vec<Request>, now: Instant) -> Self {
        let raw: Vec<RawAssignment> = given
            .iter()
            .enumerate()
            .map(|(index, model)| {
                let policy = if model.pinned { "Never" } else { "WhenIdle" };
                let unload = json!({"policy": policy, "idleSeconds": 60, "minResidentSeconds": model.min_resident});
                let short = json!({"name": format!("m{index}"), "unload": unload, "engine": {"gpu": "Required"}});
                RawAssignment(assignment(&short))
            })
            .collect();
        let gpu = ProbedDevice {
            id: "GPU0".to_owned(),
            kind: "GPU".to_owned(),
            memory_total_bytes: capacity,
            memory_free_bytes: capacity,
            ..ProbedDevice::default()
        };
        let mut observed = Observed::default();
        let report = ProbeReport { backends: Vec::new(), devices: vec![gpu] };
        observed.note("", Happened::Probed(Ok(Devices::new(report, u64::MAX))), now);
        let desired = Desired::new(Some(1), &raw);
        Self {
            given,
            capacity,
            start: now,
            now,
            desired,
            observed,
            loading: BTreeMap::new(),
            ending: BTreeMap::new(),
            shrinking: BTreeMap::new(),
            requests,
            looking: None,
            story: std::collections::VecDeque::new(),
        }
    }

    fn tick(&mut self, seconds: u64) {
        let due: Vec<WorkerId> =
            self.loading.iter().filter(|(_, (_, at, _))| *at <= self.now).map(|(id, _)| *id).collect();
        for id in due {
            let Some((uid, _, load)) = self.loading.remove(&id) else { continue };
            let report = RunnerReport { load_milliseconds: load * 1000, ..self.report(&uid, 0) };
            self.observed.note(&uid, Happened::WorkerSaid(id, RunnerEvent::Ready(report)), self.now);
        }
        let due: Vec<WorkerId> =
            self.shrinking.iter().filter(|(_, (_, at))| *at <= self.now).map(|(id, _)| *id).collect();
        for id in due {
            let Some((uid, _)) = self.shrinking.remove(&id) else { continue };
            // Who has got a request meanwhile needs it.
            if self.observed.models[&uid].activity.running == 0 {
                let report = self.report(&uid, 0);
                self.observed.note(&uid, Happened::WorkerSaid(id, RunnerEvent::Changed(report)), self.now);
            }
        }
        let due: Vec<WorkerId> = self.ending.iter().filter(|(_, (_, at))| *at <= self.now).map(|(id, _)| *id).collect();
        for id in due {
            let Some((uid, _)) = self.ending.remove(&id) else { continue };
            self.loading.remove(&id);
            let end = WorkerEnd { how: "exited with code 0".to_owned(), failure: None, last_lines: String::new() };
            self.observed.note(&uid, Happened::WorkerEnded(id, end), self.now);
        }
        // The driver gives memory back a tick after the worker has ended, and is asked a tick after that.
        if !self.observed.ledger.is_settled()
            && let Some(mut devices) = std::mem::replace(&mut self.looking, self.observed.devices.clone())
        {
            let used = self.observed.ledger.held("GPU0") - self.observed.ledger.missing("GPU0");
            devices.list[0].memory_free_bytes = self.capacity - used;
            self.observed.note("", Happened::Probed(Ok(devices)), self.now);
            self.looking = None;
        }
        for request in &mut self.requests {
            if request.arrives <= seconds && request.waits_since.is_none() {
                request.waits_since = Some(self.now);
            }
            if request.ends.is_some_and(|ends| ends <= self.now) {
                request.done = true;
            }
        }
        self.count();
        self.settle();
        // Whoever has a route runs from now on.
        for index in 0..self.given.len() {
            let uid = format!("m{index}");
            let routed = matches!(self.observed.models[&uid].route, Some(RouteTo::Worker(_)));
            let waiting = self.requests.iter_mut().filter(|r| r.model == index && r.waits_since.is_some());
            for request in waiting.filter(|request| routed && request.ends.is_none()) {
                request.ends = Some(self.now + Duration::from_secs(request.takes));
            }
        }
        self.count();
        self.grow();
        self.settle();
    }

    fn report(&self, uid: &str, grown: u64) -> RunnerReport {
        let index: usize = uid[1..].parse().unwrap();
        let part = MemoryUse {
            device: "GPU0".to_owned(),
            weights_bytes: self.given[index].bytes,
            context_bytes: grown,
            ..MemoryUse::default()
        };
        RunnerReport { memory: vec![part], ..RunnerReport::default() }
    }

    /// Contexts with requests grow, if they may.
    fn grow(&mut self) {
        for (index, given) in self.given.clone().into_iter().enumerate() {
            let uid = format!("m{index}");
            let model = &self.observed.models[&uid];
            let worker = model.workers.iter().find(|(_, worker)| worker.requests > 0 && worker.grown().is_empty());
            let Some(id) = worker.map(|(id, _)| *id).filter(|_| given.grows > 0) else { continue };
            let more = MemoryUse { device: "GPU0".to_owned(), context_bytes: given.grows, ..MemoryUse::default() };
            if self.observed.grow(&uid, id, 1, &[more], self.now).is_ok() {
                let report = self.report(&uid, given.grows);
                self.observed.note(&uid, Happened::WorkerSaid(id, RunnerEvent::Changed(report)), self.now);
            }
        }
    }

    /// Nobody is unloaded for `whom` who could be spared by others that shrink.
    fn check_spared(&self, step: &Step, whom: &str) {
        let others_wait = self.observed.models.iter().any(|(uid, model)| uid != whom && model.waiting_since.is_some());
        let model = &self.observed.models[whom];
        if others_wait || !self.observed.ledger.is_settled() {
            return;
        }
        let index: usize = whom[1..].parse().unwrap();
        let need = match &model.wants_more {
            Some((need, _)) if model.is_served() => need["GPU0"],
            _ => self.given[index].bytes,
        };
        let idle = self.observed.models.iter().filter(|(uid, model)| *uid != whom && model.activity.running == 0);
        let workers = idle.flat_map(|(_, model)| model.workers.values());
        let could = workers.filter(|w| w.leaving.is_none() && w.requests == 0 && w.shrink_asked.is_none());
        let could: u64 = could.filter_map(|worker| worker.grown().get("GPU0").copied()).sum();
        let free = self.observed.ledger.free("GPU0");
        assert!(
            could == 0 || free + could < need,
            "{step:?}: {could} of {need} could be given back: {:#?}",
            self.story
        );
    }

    /// Worker and listener count the requests.
    fn count(&mut self) {
        for index in 0..self.given.len() {
            let uid = format!("m{index}");
            let of = |what: fn(&Request) -> bool| {
                let mine = self.requests.iter().filter(|r| r.model == index && !r.done && what(r));
                u32::try_from(mine.count()).unwrap()
            };
            let running = of(|r| r.ends.is_some());
            let waiting = of(|r| r.waits_since.is_some() && r.ends.is_none());
            let Some(model) = self.observed.models.get(&uid) else { continue };
            let before = model.activity;
            let changed = (before.running, before.waiting) != (running, waiting);
            let last_request = if changed { Some(self.now) } else { before.last_request };
            let worker = model.workers.keys().next_back().copied();
            let mut activity: Activity = before;
            (activity.running, activity.waiting, activity.last_request) = (running, waiting, last_request);
            self.observed.note(&uid, Happened::Activity(activity), self.now);
            if let Some(worker) = worker {
                let event = RunnerEvent::Activity { running, waiting: 0 };
                self.observed.note(&uid, Happened::WorkerSaid(worker, event), self.now);
            }
        }
    }

    fn settle(&mut self) {
        self.observed.adopt(&self.desired);
        let limits = Limits { loading: 2, lame_duck: Duration::ZERO, drain: Duration::from_mins(1) };
        for _ in 0..40 {
            let decided = plan(&self.desired, &self.observed, limits, self.now);
            if decided.steps.is_empty() {
                assert!(self.observed.ledger.held("GPU0") <= self.capacity);
                return;
            }
            for step in decided.steps {
                self.check(&step);
                self.story.push_back(format!("{:?} {}", self.now - self.start, brief(&step)));
                if self.story.len() > 60 {
                    self.story.pop_front();
                }
                self.observed.begin(&step, self.now);
                self.answer(&step);
            }
        }
        panic!("the plan never settles: {:#?}", self.story);
    }

    fn check(&self, step: &Step) {
        let model = &self.observed.models[step.uid()];
        let busy = model.activity.running > 0 || model.workers.values().any(|worker| worker.requests > 0);
        match step {
            Step::Unload { for_room, .. } => {
                assert!(!busy, "a busy model is unloaded: {step:?}");
                assert_ne!(model.assignment.unload.policy, UnloadPolicy::Never, "a pinned model is unloaded");
                let least = Duration::from_secs(u64::try_from(model.assignment.unload.min_resident_seconds).unwrap());
                let young = |phase| matches!(phase, Phase::Ready { since } if self.now < since + least);
                assert!(!for_room || !model.workers.values().any(|worker| young(worker.phase)), "{step:?} is young");
                if let Step::Unload { why, for_room: true, .. } = step {
                    self.check_spared(step, why.trim_start_matches("ns/").split(' ').next().unwrap());
                }
            }
            Step::Shrink { worker, .. } => {
                let worker = &model.workers[worker];
                assert!(!busy && worker.leaving.is_none(), "a busy context is to shrink: {step:?}");
                assert!(!worker.grown().is_empty() && worker.shrink_asked.is_none(), "{step:?} for nothing");
            }
            Step::Stop { .. } => assert!(!busy, "a busy worker is stopped: {step:?}"),
            Step::Yield { .. } => assert_ne!(model.assignment.unload.policy, UnloadPolicy::Never),
            _ => {}
        }
    }

    fn answer(&mut self, step: &Step) {
        let uid = step.uid().to_owned();
        let index: usize = uid[1..].parse().unwrap();
        let happened = match step {
            Step::Publish { .. } => Happened::Published(Ok(4000)),
            Step::Fetch { .. } => Happened::Fetched(self.observed.models[&uid].source.clone(), Ok(stored())),
            Step::Estimate { revision, on, .. } => {
                let part = MemoryUse {
                    device: "GPU0".to_owned(),
                    weights_bytes: self.given[index].bytes,
                    ..MemoryUse::default()
                };
                let report = EstimateReport { memory: vec![part], ..EstimateReport::default() };
                Happened::Estimated(revision.clone(), on.clone(), Ok(report))
            }
            Step::Load { worker, .. } => {
                let load = self.given[index].load;
                self.loading.insert(*worker, (uid, self.now + Duration::from_secs(load), load));
                return;
            }
            Step::Shrink { worker, .. } => {
                if !self.given[index].deaf {
                    self.shrinking.insert(*worker, (uid, self.now + TICK));
                }
                return;
            }
            Step::Stop { worker, .. } => {
                self.shrinking.remove(worker);
                self.ending.insert(*worker, (uid, self.now + TICK));
                return;
            }
            _ => return,
        };
        self.observed.note(&uid, happened, self.now);
    }
}

fn brief(step: &Step) -> String {
    format!("{step:?}").chars().take(60).collect()
}

fn models() -> impl Strategy<Value = Vec<Given>> {
    let one = (1_u64..10, 0_u64..20, 0_u64..6, 0_u64..8, 0_u8..4);
    let one = one.prop_map(|(bytes, min_resident, load, grows, deaf)| Given {
        bytes,
        min_resident,
        load,
        pinned: false,
        // Half of them.
        grows: grows.saturating_sub(4),
        deaf: deaf == 0,
    });
    prop::collection::vec(one, 2..7)
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let one = (0_usize..64, 0_u64..200, 1_u64..15).prop_map(|(model, arrives, takes)| Request {
        model,
        arrives,
        takes,
        waits_since: None,
        ends: None,
        done: false,
    });
    prop::collection::vec(one, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn everybody_is_served(mut given in models(), spare in 0_u64..12, pin: bool, mut requests in requests()) {
        let largest = given.iter().map(|model| model.bytes).max().unwrap();
        let mut capacity = largest + spare;
        if pin {
            // It keeps its room for ever, so there must be room beside it.
            given[0].pinned = true;
            // What it has grown by it gives back only while it is idle, and not if it does not listen.
            given[0].grows = 0;
            capacity += given[0].bytes;
        }
        let count = given.len();
        for request in &mut requests {
            request.model %= count;
        }
        // Each of the others may have its turn before, with requests that run to their end, and again.
        let turn = 20 + 6 + 15 + 15;
        let patience = Duration::from_secs(turn * 2 * count as u64);
        let start = Instant::now();
        let mut sim = Sim::new(given, capacity, requests, start);
        let end = 200 + patience.as_secs();
        for second in 0..=end {
            sim.now = start + Duration::from_secs(second);
            sim.tick(second);
            if sim.requests.iter().all(|request| request.done) {
                break;
            }
            for request in sim.requests.iter().filter(|request| request.ends.is_none()) {
                let Some(since) = request.waits_since else { continue };
                prop_assert!(sim.now - since <= patience, "{request:?} waits for long: {:#?}", sim.story);
            }
        }
        prop_assert!(sim.requests.iter().all(|request| request.done));
    }
}
