//! What to do next. Pure: what is wanted, what is, and the time in; steps, a verdict on each model and the time of the
//! next look out. Everything that is chosen is chosen here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use altiplano_crds::conditions::{reasons, states};
use altiplano_crds::model_deployment::{ModelSpec, UnloadPolicy};
use altiplano_crds::model_node::{AssignmentMode, ModelAssignment};

pub use self::step::Step;
use super::observe::{Desired, Entry, FileState, Listener, Model, Observed, Phase, RouteTo, Worker};
use crate::front::KeepAlive;
use crate::ledger::{Ledger, Need};
use crate::runner::protocol::WARM_UP_PERCENT;
use crate::runner::supervise::WorkerId;

mod leave;
mod pressure;
#[cfg(test)]
mod progress;
mod room;
mod shrink;
mod step;
#[cfg(test)]
mod tests;
mod victims;

/// Bounds that do not come from a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Models that are loaded at the same time.
    pub loading: usize,
    /// How long a model that leaves this node still accepts requests, for those who have not heard of it yet.
    pub lame_duck: Duration,
    /// Longest time that requests get to end when a model leaves.
    pub drain: Duration,
}

/// What the plan thinks of a model; becomes its status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// One of [`states`].
    pub state: &'static str,
    /// CamelCase.
    pub reason: Option<String>,
    /// For people.
    pub message: Option<String>,
    /// Of fetching or loading.
    pub percent: Option<u8>,
    /// The answer to an estimate, bytes per device.
    pub required: Need,
    /// When a request that comes now may expect an answer, where that is known; the time of a load comes on top where
    /// the model is [`states::UNLOADED`].
    pub ready_at: Option<Instant>,
}

impl Verdict {
    fn new(state: &'static str) -> Self {
        Self { state, ..Self::default() }
    }

    fn because(state: &'static str, reason: &str, message: impl fmt::Display) -> Self {
        Self { state, reason: Some(reason.to_owned()), message: Some(message.to_string()), ..Self::default() }
    }
}

/// What to do, what to say, when to look again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// By uid.
    pub verdicts: BTreeMap<String, Verdict>,
    /// When to plan again even if nothing happens.
    pub wake_at: Option<Instant>,
}

/// Decides.
#[must_use]
pub fn plan(desired: &Desired, observed: &Observed, limits: Limits, now: Instant) -> Plan {
    let mut soon = observed.ledger.clone();
    let leaving = observed.models.values().flat_map(|model| &model.workers).filter(|(_, w)| w.leaving.is_some());
    leaving.for_each(|(id, _)| soon.release(*id));
    soon.expect_back();
    let shrinking = shrink::expect(observed, &mut soon, now);
    let loads = |model: &Model| model.workers.values().filter(|w| matches!(w.phase, Phase::Loading { .. })).count();
    let mut planner = Planner {
        observed,
        limits,
        now,
        next_worker: observed.next_worker,
        loading: observed.models.values().map(loads).sum(),
        held: observed.ledger.clone(),
        soon,
        unloaded: BTreeSet::new(),
        yielding: BTreeSet::new(),
        plan: Plan { wake_at: shrinking, ..Plan::default() },
    };
    let wanted: BTreeSet<&str> = desired.entries.iter().map(Entry::uid).collect();
    for (uid, model) in observed.models.iter().filter(|(uid, _)| !wanted.contains(uid.as_str())) {
        let verdict = planner.remove(uid, model);
        planner.plan.verdicts.insert(uid.clone(), verdict);
    }
    let models = desired.entries.iter().filter_map(|entry| match entry {
        Entry::Model(assignment) => observed.models.get(&assignment.uid).map(|model| (assignment.as_ref(), model)),
        Entry::Unsupported(_) => None,
    });
    let mut models: Vec<(&ModelAssignment, &Model)> = models.collect();
    // Of equal priority those that are waited for, whoever waits longest first: so each gets its turn.
    models.sort_by_key(|(assignment, model)| {
        let waiting = model.waiting_since.filter(|_| !model.is_served());
        (std::cmp::Reverse(assignment.priority), waiting.is_none(), waiting)
    });
    for (assignment, model) in models {
        let verdict = planner.model(assignment, model);
        planner.plan.verdicts.insert(assignment.uid.clone(), verdict);
    }
    for entry in &desired.entries {
        if let Entry::Unsupported(unsupported) = entry {
            // What it was goes on as it was.
            if let Some(model) = observed.models.get(&unsupported.uid) {
                planner.model(&model.assignment, model);
            }
            let verdict = Verdict::because(states::FAILED, reasons::UNSUPPORTED_SPEC, &unsupported.message);
            planner.plan.verdicts.insert(unsupported.uid.clone(), verdict);
        }
    }
    planner.settle_turns();
    planner.stop_drained(&wanted);
    planner.plan.steps.extend(pressure::end_the_worst(observed));
    planner.plan
}

struct Planner<'a> {
    observed: &'a Observed,
    limits: Limits,
    now: Instant,
    next_worker: WorkerId,
    /// Models that are being loaded.
    loading: usize,
    /// What is promised, this plan's loads included.
    held: Ledger,
    /// The same after all workers on their way out have gone and those that were asked to shrink have done so, with what
    /// waits for that room.
    soon: Ledger,
    /// Models that this plan unloads to make room.
    unloaded: BTreeSet<String>,
    /// Busy models that are to become idle, because another waits for their memory.
    yielding: BTreeSet<String>,
    plan: Plan,
}

impl Planner<'_> {
    fn model(&mut self, wanted: &ModelAssignment, model: &Model) -> Verdict {
        if model.listener == Listener::Closing {
            // It is taken up anew when its port is closed.
            return Verdict::because(states::PENDING, reasons::DRAINING, "the model was removed and is wanted again");
        }
        match wanted.mode {
            AssignmentMode::Serve => self.serve(wanted, model),
            AssignmentMode::Estimate => self.estimate(wanted, model),
        }
    }

    fn serve(&mut self, wanted: &ModelAssignment, model: &Model) -> Verdict {
        let uid = &wanted.uid;
        if let Some(message) = unsupported(&wanted.model) {
            return self.routed(wanted, model, Verdict::because(states::FAILED, reasons::UNSUPPORTED_SPEC, message));
        }
        let is_news = model.published.as_deref().is_none_or(|told| listener_cares(told, wanted));
        if is_news && model.listener != Listener::Opening && self.is_due(model) {
            self.plan.steps.push(Step::Publish { uid: uid.clone() });
        }
        let is_woken = model.asleep && (model.activity.waiting > 0 || wanted.unload.policy == UnloadPolicy::Never);
        if is_woken {
            self.plan.steps.push(Step::Wake { uid: uid.clone() });
        }
        // One that is not ready yet will never be needed.
        for (former, worker) in model.former(&wanted.revision) {
            if matches!(worker.phase, Phase::Loading { .. }) {
                self.plan.steps.push(Step::Drain { uid: uid.clone(), worker: former, deadline: self.now });
                self.soon.release(former);
            }
        }
        let is_unloaded = self.unloaded.contains(uid);
        let asleep = is_unloaded || (model.asleep && !is_woken);

        let verdict = match model.staying(&wanted.revision).filter(|_| !is_unloaded) {
            Some((id, worker)) => match worker.phase {
                Phase::Ready { since } => self.ready(wanted, model, id, worker, since),
                Phase::Loading { percent } => Verdict {
                    percent: Some(percent),
                    message: (percent >= WARM_UP_PERCENT).then(|| "warms up".to_owned()),
                    ready_at: Some(worker.started + model.load_time()),
                    ..Verdict::new(states::LOADING)
                },
            },
            None => match self.file(wanted, model) {
                Err(verdict) => verdict,
                Ok(()) if asleep => Verdict::because(states::UNLOADED, reasons::IDLE, "a request loads the model"),
                Ok(()) => self.place(wanted, model),
            },
        };
        self.routed(wanted, model, after_failure(model, verdict))
    }

    /// A worker of the wanted revision serves.
    fn ready(
        &mut self,
        wanted: &ModelAssignment,
        model: &Model,
        id: WorkerId,
        worker: &Worker,
        since: Instant,
    ) -> Verdict {
        for (former, _) in model.former(&wanted.revision) {
            self.drain(wanted, former);
        }
        self.room_to_grow(wanted, model);
        if model.unload_asked && wanted.unload.policy != UnloadPolicy::Never && is_idle(model) {
            let why = "its owner asked for it (unload.requestedAt)".to_owned();
            return self.unload_ready(wanted, id, why);
        }
        if let Some(idle) = idle_limit(wanted, model)
            && is_idle(model)
        {
            let due = last_use(model, since) + idle;
            if self.now >= due {
                return self.unload_ready(wanted, id, format!("no request for {} s", idle.as_secs()));
            }
            self.look_again(due);
        }
        let said: Vec<String> = worker.note.clone().into_iter().chain(self.wish(model)).collect();
        Verdict { message: (!said.is_empty()).then(|| said.join("; ")), ..Verdict::new(states::READY) }
    }

    /// Sees to the model's file; an error is what keeps it from being there.
    fn file(&mut self, wanted: &ModelAssignment, model: &Model) -> Result<(), Verdict> {
        self.file_or(wanted, model, |uid| Step::Fetch { uid }, |file| matches!(file, FileState::Present(_)))
    }

    /// The same for its header alone.
    fn header(&mut self, wanted: &ModelAssignment, model: &Model) -> Result<(), Verdict> {
        self.file_or(wanted, model, |uid| Step::Peek { uid }, |file| file.known().is_some())
    }

    fn file_or(
        &mut self,
        wanted: &ModelAssignment,
        model: &Model,
        step: impl FnOnce(String) -> Step,
        is_enough: impl FnOnce(&FileState) -> bool,
    ) -> Result<(), Verdict> {
        if !self.is_due(model)
            && let Some(failure) = &model.failure
        {
            let failed = Verdict::because(states::FAILED, &failure.reason, &failure.message);
            return Err(Verdict { ready_at: Some(failure.retry_at), ..failed });
        }
        match &model.file {
            file if is_enough(file) => Ok(()),
            FileState::Fetching { percent } => Err(Verdict { percent: *percent, ..Verdict::new(states::FETCHING) }),
            FileState::Unknown | FileState::Peeked(_) | FileState::Present(_) => {
                self.plan.steps.push(step(wanted.uid.clone()));
                Err(Verdict::new(states::FETCHING))
            }
        }
    }

    /// Whether nothing has gone wrong, or long enough ago to try again.
    fn is_due(&mut self, model: &Model) -> bool {
        let Some(failure) = &model.failure else { return true };
        let due = self.now >= failure.retry_at;
        if !due {
            self.look_again(failure.retry_at);
        }
        due
    }

    /// Answers how much memory the model would take.
    fn estimate(&mut self, wanted: &ModelAssignment, model: &Model) -> Verdict {
        if let Some(message) = unsupported(&wanted.model) {
            return Verdict::because(states::FAILED, reasons::UNSUPPORTED_SPEC, message);
        }
        let required = self.header(wanted, model).and_then(|()| self.best_estimate(wanted, model));
        match required {
            Err(verdict) => after_failure(model, verdict),
            Ok(required) => Verdict { required, ..Verdict::new(states::ESTIMATED) },
        }
    }

    /// Sends the requests where the verdict says.
    fn routed(&mut self, wanted: &ModelAssignment, model: &Model, verdict: Verdict) -> Verdict {
        let drained = |id: WorkerId| {
            self.plan.steps.iter().any(|step| matches!(step, Step::Drain { worker, .. } if *worker == id))
        };
        let ready = |(id, worker): &(WorkerId, &Worker)| matches!(worker.phase, Phase::Ready { .. }) && !drained(*id);
        let current = model.staying(&wanted.revision).filter(|worker| ready(worker));
        let to = match current.or_else(|| model.former(&wanted.revision).find(ready)) {
            Some(_) if model.yields => RouteTo::Loading,
            Some((id, _)) => RouteTo::Worker(id),
            None if verdict.state == states::UNLOADED => RouteTo::Unloaded,
            None if verdict.state == states::FAILED => RouteTo::Unavailable {
                reason: verdict.reason.clone().unwrap_or_default(),
                message: verdict.message.clone().unwrap_or_default(),
            },
            None => RouteTo::Loading,
        };
        self.route(&wanted.uid, model, to);
        verdict
    }

    fn route(&mut self, uid: &str, model: &Model, to: RouteTo) {
        // Without a listener there is nothing to tell.
        if matches!(model.listener, Listener::Open(_)) && model.route.as_ref() != Some(&to) {
            self.plan.steps.push(Step::Route { uid: uid.to_owned(), to });
        }
    }

    fn look_again(&mut self, at: Instant) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |earlier| earlier.min(at)));
    }
}

/// Says what went wrong for as long as it is being tried again, so that a status does not flap.
fn after_failure(model: &Model, verdict: Verdict) -> Verdict {
    let is_trying = matches!(verdict.state, states::PENDING | states::FETCHING | states::LOADING);
    match &model.failure {
        Some(failure) if is_trying && model.is_failing() => {
            Verdict::because(states::FAILED, &failure.reason, &failure.message)
        }
        Some(failure) if is_trying => {
            Verdict { reason: Some(failure.reason.clone()), message: Some(failure.message.clone()), ..verdict }
        }
        _ => verdict,
    }
}

/// What this build cannot do with a model.
fn unsupported(model: &ModelSpec) -> Option<String> {
    // No `..`: whoever adds a field says here whether it is read.
    let ModelSpec { source, secret_ref: _, projector, draft, adapters, chat_template: _ } = model;
    let field = if draft.as_ref().is_some_and(|draft| !draft.files.is_empty()) {
        "model.draft.files"
    } else if !source.files.is_empty() {
        "model.source.files"
    } else if projector.as_ref().is_some_and(|projector| !projector.files.is_empty()) {
        "model.projector.files"
    } else if adapters.iter().any(|adapter| !adapter.source.files.is_empty()) {
        "model.adapters[].source.files"
    } else {
        return None;
    };
    Some(format!("{field} is not supported by version {} of the agent", env!("CARGO_PKG_VERSION")))
}

/// Whether the listener must be told of the difference.
fn listener_cares(told: &ModelAssignment, wanted: &ModelAssignment) -> bool {
    let adapters =
        |a: &ModelAssignment| a.model.adapters.iter().map(|adapter| adapter.name.clone()).collect::<Vec<_>>();
    let names = |a: &ModelAssignment| (a.namespace.clone(), a.name.clone(), a.served_name.clone(), adapters(a));
    let of = |a: &ModelAssignment| (names(a), a.traffic.clone());
    of(told) != of(wanted)
}

/// Time without requests after which a model leaves memory: what a client said last, else its policy's. What the policy
/// pins, no client unpins.
fn idle_limit(wanted: &ModelAssignment, model: &Model) -> Option<Duration> {
    let by_policy = policy_idle_limit(wanted)?;
    match model.activity.keep_alive {
        None => Some(by_policy),
        Some(KeepAlive::For(time)) => Some(time),
        Some(KeepAlive::Forever) => None,
    }
}

/// Time without requests after which the policy unloads a model.
pub(super) fn policy_idle_limit(wanted: &ModelAssignment) -> Option<Duration> {
    match wanted.unload.policy {
        UnloadPolicy::Never => None,
        UnloadPolicy::WhenIdle => Some(seconds(wanted.unload.idle_seconds)),
        UnloadPolicy::AfterRequest => Some(seconds(wanted.unload.grace_seconds)),
    }
}

fn is_idle(model: &Model) -> bool {
    model.activity.waiting == 0 && has_none(model)
}

/// Idle, or made to wait so that it can be unloaded.
fn is_quiet(model: &Model) -> bool {
    (model.activity.waiting == 0 || model.yields) && has_none(model)
}

/// Whether no worker has a request.
fn has_none(model: &Model) -> bool {
    model.activity.running == 0 && model.workers.values().all(|worker| worker.requests == 0)
}

fn last_use(model: &Model, ready_since: Instant) -> Instant {
    model.activity.last_request.map_or(ready_since, |last| last.max(ready_since))
}

fn seconds(count: i32) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or(0))
}
