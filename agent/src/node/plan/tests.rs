//! Scenarios in YAML, played on the real `adopt`, `plan`, `begin` and `note`; what happened stands beside them as a
//! snapshot. Ports, files and dry runs answer at once unless the scenario says otherwise; workers do what it says.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_crds::model_node::RawAssignment;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::observe::{Activity, Desired, Happened, Observed, RouteTo, StoredFiles, Trouble};
use super::super::status::{Identity, status};
use super::{Limits, Plan, Step, plan};
use crate::devices::{Devices, Trial};
use crate::front::KeepAlive;
use crate::ledger::bytes;
use crate::runner::protocol::{
    EstimateReport, MemoryUse, Part, PartEstimate, ProbeReport, ProbedDevice, RunnerEvent, RunnerFailure, RunnerReport,
};
use crate::runner::supervise::{WorkerEnd, WorkerId};
use crate::store::{GgufHeader, StoredModel};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Scenario {
    about: String,
    /// Device to GiB; the name tells the kind.
    devices: BTreeMap<String, u64>,
    /// Model to place to GiB: "gpu" (of the first of its devices), "cpu", and "host" (beside the GPU).
    needs: BTreeMap<String, BTreeMap<String, u64>>,
    /// Models of which parts can be on GPUs, to their layers.
    #[serde(default)]
    layers: BTreeMap<String, u32>,
    /// Models whose files do not come by themselves.
    #[serde(default)]
    slow_files: Vec<String>,
    script: Vec<Scene>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scene {
    /// Seconds since the start.
    at: f64,
    /// All that is wanted from now on.
    want: Option<Vec<Value>>,
    /// What happens.
    #[serde(default, rename = "do")]
    happens: Vec<String>,
    /// Shows the whole status afterwards.
    #[serde(default)]
    status: bool,
}

struct World {
    start: Instant,
    now: Instant,
    needs: BTreeMap<String, BTreeMap<String, u64>>,
    layers: BTreeMap<String, u32>,
    slow_files: Vec<String>,
    desired: Desired,
    observed: Observed,
    /// Of each device, GiB that other processes hold.
    others: BTreeMap<String, u64>,
    /// Drivers do not give back what ended workers held.
    slow_drivers: bool,
    shown: BTreeMap<String, String>,
    text: String,
}

fn play(yaml: &str) -> String {
    let scenario: Scenario = serde_saphyr::from_str(yaml).unwrap();
    let start = Instant::now();
    let mut world = World {
        start,
        now: start,
        needs: scenario.needs,
        layers: scenario.layers,
        slow_files: scenario.slow_files,
        desired: Desired::default(),
        observed: Observed::default(),
        others: BTreeMap::new(),
        slow_drivers: false,
        shown: BTreeMap::new(),
        text: format!("{}\n", scenario.about.trim()),
    };
    let devices = scenario.devices.iter().map(|(id, gib)| ProbedDevice {
        id: id.clone(),
        description: format!("{gib} GiB"),
        backend: id.trim_end_matches(char::is_numeric).to_owned(),
        kind: if id == "CPU" { "CPU" } else { "GPU" }.to_owned(),
        memory_total_bytes: gib << 30,
        memory_free_bytes: gib << 30,
        driver: "a driver 1.2".to_owned(),
        ..ProbedDevice::default()
    });
    let report = ProbeReport { backends: Vec::new(), devices: devices.collect() };
    world.observed.note("", Happened::Probed(Ok(Devices::new(report, u64::MAX))), start);
    for Scene { at, want, happens, status } in scenario.script {
        world.now = start + Duration::from_secs_f64(at);
        let _ = writeln!(world.text, "\n[{at} s]");
        if let Some(want) = want {
            world.want(&want);
        }
        for event in &happens {
            let _ = writeln!(world.text, "  * {event}");
            world.happen(event);
        }
        let decided = world.settle();
        if status {
            world.show_status(&decided);
        }
    }
    world.text
}

impl World {
    fn want(&mut self, models: &[Value]) {
        let raw: Vec<RawAssignment> = models.iter().map(|model| RawAssignment(assignment(model))).collect();
        let names: Vec<String> =
            raw.iter().map(|r| format!("{}@{}", text(&r.0, "uid"), text(&r.0, "revision"))).collect();
        let _ = writeln!(
            self.text,
            "  * wanted: {}",
            if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
        );
        self.desired = Desired::new(Some(1), &raw);
    }

    fn happen(&mut self, event: &str) {
        let words: Vec<&str> = event.splitn(4, ' ').collect();
        let (what, uid) = (words[0], words[1]);
        let rest = |index: usize| words.get(index).copied().unwrap_or_default().to_owned();
        // "a" is a's newest worker that is wanted, "a#3" is worker 3.
        let (uid, worker) = match uid.split_once('#') {
            Some((uid, number)) => (uid, number.parse::<WorkerId>().ok()),
            None => (uid, self.observed.models.get(uid).and_then(|m| m.workers.keys().next_back().copied())),
        };
        match what {
            "others" => {
                self.others.insert(uid.to_owned(), rest(2).parse().unwrap());
                return;
            }
            "drivers" => {
                self.slow_drivers = uid == "keep";
                return;
            }
            "look" => return self.look(),
            // Its context wants so many GiB more of its device.
            "asks" => {
                let worker = worker.unwrap();
                let device = self.observed.models[uid].workers[&worker].devices[0].clone();
                let gib: u64 = rest(2).parse().unwrap();
                let more = MemoryUse { device, context_bytes: gib << 30, ..MemoryUse::default() };
                let granted = self.observed.grow(uid, worker, 1, &[more], self.now);
                let said = granted.map_or_else(|refusal| refusal.reason, |()| "granted".to_owned());
                let _ = writeln!(self.text, "    {said}");
                return;
            }
            _ => {}
        }
        let worker_did = || worker.unwrap_or_else(|| panic!("{event}: no such worker"));
        let happened = match what {
            "file" => Happened::Fetched(self.observed.models[uid].source.clone(), Ok(stored())),
            "no-file" => {
                let trouble = Trouble { reason: rest(2), message: rest(3) };
                Happened::Fetched(self.observed.models[uid].source.clone(), Err(trouble))
            }
            "progress" => Happened::FetchProgress(self.observed.models[uid].source.clone(), rest(2).parse().unwrap()),
            "loads" => Happened::WorkerSaid(worker_did(), RunnerEvent::Loading { percent: rest(2).parse().unwrap() }),
            // With the seconds that its load took.
            "ready" => {
                let load_milliseconds = rest(2).parse::<u64>().unwrap_or(0) * 1000;
                let report = RunnerReport { load_milliseconds, ..RunnerReport::default() };
                Happened::WorkerSaid(worker_did(), RunnerEvent::Ready(report))
            }
            // What it took is what the dry run said.
            "loaded" => Happened::WorkerSaid(worker_did(), RunnerEvent::Ready(self.grown(uid, worker_did(), 0))),
            // By so many GiB, counted from there.
            "grows" => {
                let gib = rest(2).parse().unwrap();
                Happened::WorkerSaid(worker_did(), RunnerEvent::Changed(self.grown(uid, worker_did(), gib)))
            }
            "measures" => Happened::WorkerSaid(worker_did(), RunnerEvent::Changed(self.measured(uid, worker_did()))),
            "busy" => self.requests(worker_did(), uid, 1),
            "quiet" => self.requests(worker_did(), uid, 0),
            "waits" => {
                let activity = Activity { waiting: 1, ..self.observed.models[uid].activity };
                Happened::Activity(activity)
            }
            "gives-up" => Happened::Activity(Activity { waiting: 0, ..self.observed.models[uid].activity }),
            // What Ollama's clients say: seconds, -1 for ever.
            "keeps" => {
                let seconds: i64 = rest(2).parse().unwrap();
                let time = u64::try_from(seconds).map(Duration::from_secs);
                let keep_alive = Some(time.map_or(KeepAlive::Forever, KeepAlive::For));
                Happened::Activity(Activity { keep_alive, ..self.observed.models[uid].activity })
            }
            "wakes" => Happened::Woken,
            "fails" => {
                let failure = RunnerFailure { reason: rest(2), message: rest(3) };
                let end = WorkerEnd {
                    how: "exited with code 1".to_owned(),
                    failure: Some(failure),
                    last_lines: String::new(),
                };
                Happened::WorkerEnded(worker_did(), end)
            }
            "dies" => {
                let end = WorkerEnd {
                    how: format!("was killed by {}", rest(2)),
                    failure: None,
                    last_lines: "last words".to_owned(),
                };
                Happened::WorkerEnded(worker_did(), end)
            }
            "ends" => {
                let end = WorkerEnd { how: "exited with code 0".to_owned(), failure: None, last_lines: String::new() };
                Happened::WorkerEnded(worker_did(), end)
            }
            other => panic!("nobody knows what {other:?} means"),
        };
        self.observed.note(uid, happened, self.now);
    }

    /// A quarter more than the dry run said.
    fn measured(&self, uid: &str, worker: WorkerId) -> RunnerReport {
        let predicted = &self.observed.models[uid].workers[&worker].predicted;
        let memory = predicted.iter().map(|(device, bytes)| MemoryUse {
            device: device.clone(),
            weights_bytes: *bytes,
            compute_bytes: bytes / 4,
            ..MemoryUse::default()
        });
        RunnerReport {
            context_tokens: 8192,
            max_tokens: 4096,
            parallel: 4,
            layers_offloaded: 33,
            layers_total: 33,
            memory: memory.collect(),
            load_milliseconds: 1234,
            notes: vec!["flash attention is off: the device lacks it".to_owned()],
        }
    }

    /// What the dry run said, and so many GiB more on the first of its devices.
    fn grown(&self, uid: &str, worker: WorkerId, gib: u64) -> RunnerReport {
        let worker = &self.observed.models[uid].workers[&worker];
        let first = worker.devices.first().map_or("CPU", String::as_str);
        let part = |(device, bytes): (&String, &u64)| MemoryUse {
            device: device.clone(),
            weights_bytes: *bytes,
            context_bytes: if device == first { gib << 30 } else { 0 },
            ..MemoryUse::default()
        };
        RunnerReport { memory: worker.predicted.iter().map(part).collect(), ..RunnerReport::default() }
    }

    /// The worker counts its requests, and so does the listener.
    fn requests(&mut self, worker: WorkerId, uid: &str, running: u32) -> Happened {
        let event = RunnerEvent::Activity { running, waiting: 0 };
        self.observed.note(uid, Happened::WorkerSaid(worker, event), self.now);
        let keep_alive = self.observed.models[uid].activity.keep_alive;
        Happened::Activity(Activity { running, waiting: 0, last_request: Some(self.now), keep_alive })
    }

    fn settle(&mut self) -> Plan {
        self.observed.adopt(&self.desired);
        let limits = Limits { loading: 2, lame_duck: Duration::from_secs(1), drain: Duration::from_mins(1) };
        for _ in 0..20 {
            if self.observed.look_at.is_some_and(|at| at <= self.now) {
                self.look();
            }
            let decided = plan(&self.desired, &self.observed, limits, self.now);
            if decided.steps.is_empty() {
                self.show(&decided);
                return decided;
            }
            for step in &decided.steps {
                let line = self.describe(step);
                let _ = writeln!(self.text, "    {line}");
                self.observed.begin(step, self.now);
            }
            for step in decided.steps {
                self.answer(&step);
            }
        }
        panic!("the plan never settles:\n{}", self.text);
    }

    /// The drivers are asked: what workers hold is in use, and what the scenario says.
    fn look(&mut self) {
        let mut devices = self.observed.devices.clone().unwrap();
        for device in &mut devices.list {
            let ledger = &self.observed.ledger;
            let missing = ledger.missing(&device.id);
            let mut used = ledger.held(&device.id) - if self.slow_drivers { 0 } else { missing };
            used += self.others.get(&device.id).copied().unwrap_or(0) << 30;
            device.memory_free_bytes = device.memory_total_bytes.saturating_sub(used);
        }
        self.observed.note("", Happened::Probed(Ok(devices)), self.now);
    }

    fn answer(&mut self, step: &Step) {
        let uid = step.uid();
        let happened = match step {
            Step::Publish { .. } => {
                let number = self.observed.models.keys().position(|known| known == uid).unwrap_or_default();
                Happened::Published(Ok(4000 + u16::try_from(number).unwrap()))
            }
            Step::Fetch { .. } if self.slow_files.iter().any(|slow| slow == uid) => return,
            Step::Fetch { .. } => Happened::Fetched(self.observed.models[uid].source.clone(), Ok(stored())),
            Step::Peek { .. } => Happened::Peeked(self.observed.models[uid].source.clone(), Ok(stored())),
            Step::Estimate { revision, on, .. } => {
                Happened::Estimated(revision.clone(), on.clone(), self.dry_run(uid, on))
            }
            // As the listener does.
            Step::Route { to: RouteTo::Unloaded, .. } => {
                Happened::Activity(Activity { keep_alive: None, ..self.observed.models[uid].activity })
            }
            Step::Remove { .. } => Happened::Withdrawn,
            _ => return,
        };
        self.observed.note(uid, happened, self.now);
    }

    fn dry_run(&self, uid: &str, Trial { devices: on, parts }: &Trial) -> Result<EstimateReport, Trouble> {
        let refused = || Trouble { reason: "LoadFailed".to_owned(), message: "llama.cpp cannot read it".to_owned() };
        let need = self.needs.get(uid).ok_or_else(refused)?;
        let part = |device: &str, gib: u64| MemoryUse {
            device: device.to_owned(),
            weights_bytes: gib << 30,
            ..MemoryUse::default()
        };
        let gib = |place: &str| need.get(place).copied().unwrap_or(0);
        let memory = if on.is_empty() {
            vec![part("CPU", gib("cpu"))]
        } else {
            let share = gib("gpu") / on.len() as u64;
            on.iter().map(|device| part(device, share)).chain([part("CPU", gib("host"))]).collect()
        };
        let layers = self.layers.get(uid).copied().filter(|_| *parts).unwrap_or(0);
        let of = |gpu_layers: u32| {
            let there = gib("gpu") * u64::from(gpu_layers) / u64::from(layers) / on.len() as u64;
            let host = part("CPU", gib("host") + gib("gpu") - there * on.len() as u64);
            let memory = on.iter().map(|device| part(device, there)).chain([host]).collect();
            let part = Part { gpu_layers, expert_layers_on_cpu: 0, layers_total: layers };
            PartEstimate { part, memory }
        };
        Ok(EstimateReport { memory, parts: (1..layers).rev().map(of).collect(), ..EstimateReport::default() })
    }

    fn describe(&self, step: &Step) -> String {
        let seconds = |at: Instant| at.duration_since(self.start).as_secs_f64();
        let place = |devices: &[String]| if devices.is_empty() { "the CPU".to_owned() } else { devices.join("+") };
        match step {
            Step::Publish { uid } => format!("publish {uid}"),
            Step::Fetch { uid } => format!("fetch {uid}"),
            Step::Peek { uid } => format!("peek {uid}"),
            Step::Estimate { uid, revision, on: Trial { devices, parts } } => {
                let what = if *parts { "parts of " } else { "" };
                format!("estimate {what}{uid}@{revision} on {}", place(devices))
            }
            Step::Load { uid, revision, worker, target, need, note } => {
                let need: Vec<String> =
                    need.iter().filter(|(_, b)| **b > 0).map(|(d, b)| format!("{} of {d}", bytes(*b))).collect();
                let note = note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default();
                format!("load {uid}@{revision} as #{worker} on {}, {}{note}", place(&target.devices), need.join(", "))
            }
            Step::Route { uid, to } => format!(
                "route {uid} to {}",
                match to {
                    RouteTo::Worker(worker) => format!("#{worker}"),
                    RouteTo::Unavailable { reason, .. } => format!("nowhere ({reason})"),
                    other => format!("{other:?}"),
                }
            ),
            Step::Unload { uid, why, .. } => format!("unload {uid}: {why}"),
            Step::Yield { uid } => format!("{uid} yields"),
            Step::Resume { uid } => format!("{uid} resumes"),
            Step::Wake { uid } => format!("wake {uid}"),
            Step::Shrink { uid, worker, why } => format!("shrink {uid}#{worker}: {why}"),
            Step::Drain { uid, worker, deadline } => format!("drain {uid}#{worker} until {} s", seconds(*deadline)),
            Step::Stop { uid, worker, kill_at } => format!("stop {uid}#{worker}, kill at {} s", seconds(*kill_at)),
            Step::End { uid, worker, message } => format!("end {uid}#{worker}: {message}"),
            Step::Remove { uid } => format!("remove {uid}"),
        }
    }

    fn show_status(&mut self, decided: &Plan) {
        let identity = Identity {
            pod_uid: "pod-1".to_owned(),
            started_at: jiff::Timestamp::UNIX_EPOCH,
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap(), "10.0.0.2".parse().unwrap()],
            port: 8420,
        };
        let status = status(&identity, &self.desired, &self.observed, decided);
        let mut value = serde_json::to_value(&status).unwrap();
        value.sort_all_objects();
        value["agent"]["version"] = "this one".into();
        let yaml = serde_saphyr::to_string(&value).unwrap();
        self.text.extend(yaml.lines().map(|line| format!("  | {line}\n")));
    }

    /// What has changed since the last look.
    fn show(&mut self, decided: &Plan) {
        let mut now = BTreeMap::new();
        for (uid, verdict) in &decided.verdicts {
            let mut line = verdict.state.to_owned();
            if let Some(percent) = verdict.percent {
                let _ = write!(line, " {percent} %");
            }
            if let Some(reason) = &verdict.reason {
                let _ = write!(line, " {reason}");
            }
            if let Some(message) = &verdict.message {
                let _ = write!(line, ": {message}");
            }
            for (device, need) in verdict.required.iter().filter(|(_, need)| **need > 0) {
                let _ = write!(line, " {device} {}", bytes(*need));
            }
            now.insert(uid.clone(), line);
        }
        for (uid, line) in &now {
            if self.shown.get(uid) != Some(line) {
                let _ = writeln!(self.text, "  {uid}: {line}");
            }
        }
        for uid in self.shown.keys().filter(|uid| !now.contains_key(*uid)) {
            let _ = writeln!(self.text, "  {uid}: gone");
        }
        self.shown = now;
        if let Some(at) = decided.wake_at {
            assert!(at > self.now, "the next look is not in the future:\n{}", self.text);
            let _ = writeln!(self.text, "  next look at {} s", at.duration_since(self.start).as_secs_f64());
        }
    }
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// A short form of an assignment, filled up: name is uid.
pub(super) fn assignment(short: &Value) -> Value {
    let name = text(short, "name");
    let mut full = json!({
        "uid": name,
        "revision": "r1",
        "generation": 1,
        "namespace": "ns",
        "name": name,
        "servedName": name,
        "model": {"source": {"uri": format!("file:///models/{name}.gguf")}},
    });
    if let (Some(full), Some(short)) = (full.as_object_mut(), short.as_object()) {
        full.extend(short.clone());
    }
    full
}

pub(super) fn stored() -> Arc<StoredFiles> {
    let header = GgufHeader {
        architecture: "llama".to_owned(),
        name: None,
        quantization: "Q8_0".to_owned(),
        trained_context_tokens: Some(4096),
        block_count: Some(4),
        parameter_count: 1,
        tensor_count: 1,
        has_chat_template: true,
        split_count: 1,
        needed_bytes: 1,
    };
    let model = StoredModel { path: "/models/m.gguf".into(), size_bytes: 1, sha256: None, header };
    Arc::new(StoredFiles { model, projector: None, draft: None, adapters: Vec::new() })
}

macro_rules! scenarios {
    ($($name:ident),+ $(,)?) => {$(
        #[test]
        fn $name() {
            let story = play(include_str!(concat!("scenarios/", stringify!($name), ".yaml")));
            insta::with_settings!({omit_expression => true, prepend_module_to_snapshot => false}, {
                insta::assert_snapshot!(stringify!($name), story);
            });
        }
    )+};
}

scenarios!(
    first_load,
    whole_status,
    estimate_only,
    bad_entry,
    file_missing,
    load_fails,
    worker_dies,
    new_revision_beside,
    new_revision_instead,
    idle_unload_and_wake,
    keep_alive,
    unload_asked,
    room_from_idle_models,
    idle_contexts_shrink_first,
    shrinking_spares_some,
    by_score,
    exclusive_in_turn,
    exclusive_without_residency,
    a_turn_for_who_waits,
    nobody_waits_any_more,
    nothing_helps,
    no_room,
    gpu_policies,
    a_part_on_the_gpu,
    memory_comes_back_late,
    others_hold_memory,
    removal_drains,
    loads_in_turn,
);
