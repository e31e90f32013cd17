//! What a step that was begun, and what happened, change of one model.

use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_crds::conditions::reasons;
use altiplano_crds::model_deployment::Termination;

use super::super::plan::Step;
use super::{Estimate, Failure, FileState, Happened, Leaving, Listener, Model, Phase, RouteTo, Trouble, Worker};
use crate::ledger::Need;
use crate::runner::protocol::RunnerEvent;
use crate::runner::supervise::{WorkerEnd, WorkerId};

/// First wait after a failure; it doubles with each in a row.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

/// The longest wait.
const LONGEST_BACKOFF: Duration = Duration::from_mins(5);

/// A worker that served this long before it ended counts as a success: the next restart is at once again.
const STABLE: Duration = Duration::from_mins(1);

impl Model {
    pub(super) fn begin(&mut self, step: &Step, now: Instant) {
        match step {
            Step::Publish { .. } => {
                self.published = Some(Arc::clone(&self.assignment));
                if self.listener == Listener::Closed {
                    self.listener = Listener::Opening;
                }
            }
            Step::Fetch { .. } | Step::Peek { .. } => self.file = FileState::Fetching { percent: None },
            Step::Estimate { on, .. } => self.estimates.push(Estimate { on: on.clone(), report: None }),
            Step::Load { uid: _, revision, worker, target, need, note } => {
                let worker_state = Worker {
                    revision: revision.clone(),
                    devices: target.devices.clone(),
                    note: note.clone(),
                    predicted: need.clone(),
                    report: None,
                    measured: Need::new(),
                    loaded: Need::new(),
                    mapped_bytes: 0,
                    started: now,
                    phase: Phase::Loading { percent: 0 },
                    requests: 0,
                    adopted: false,
                    shrink_asked: None,
                    leaving: None,
                };
                self.workers.insert(*worker, worker_state);
            }
            Step::Route { to, .. } => self.route = Some(to.clone()),
            Step::Unload { .. } => {
                self.asleep = true;
                self.unload_asked = false;
                self.yields = false;
            }
            Step::Yield { .. } => self.yields = true,
            Step::Resume { .. } => self.yields = false,
            Step::Wake { .. } => self.asleep = false,
            Step::Drain { worker, deadline, .. } => {
                if let Some(worker) = self.workers.get_mut(worker) {
                    worker.leaving.get_or_insert(Leaving {
                        since: now,
                        deadline: *deadline,
                        settled: false,
                        stopped: false,
                    });
                }
            }
            Step::Shrink { worker, .. } => {
                if let Some(worker) = self.workers.get_mut(worker) {
                    worker.shrink_asked = Some(now);
                }
            }
            Step::Stop { worker, .. } => {
                if let Some(leaving) = self.workers.get_mut(worker).and_then(|worker| worker.leaving.as_mut()) {
                    leaving.stopped = true;
                }
            }
            // Its end tells why.
            Step::End { .. } => {}
            Step::Remove { .. } => self.listener = Listener::Closing,
        }
    }

    pub(super) fn note(&mut self, what: Happened, now: Instant) {
        match what {
            Happened::Published(Ok(port)) => {
                if self.listener != Listener::Closing {
                    self.listener = Listener::Open(port);
                }
            }
            Happened::Published(Err(trouble)) => {
                if self.listener == Listener::Opening {
                    self.listener = Listener::Closed;
                }
                self.published = None;
                self.fail(trouble, now);
            }
            Happened::FetchProgress(source, percent) => {
                if let FileState::Fetching { percent: known } = &mut self.file
                    && source == self.source
                {
                    *known = Some(percent);
                }
            }
            Happened::Fetched(source, result) if source == self.source => match result {
                Ok(stored) => self.file = FileState::Present(stored),
                Err(trouble) => {
                    self.file = FileState::Unknown;
                    self.fail(trouble, now);
                }
            },
            Happened::Peeked(source, result) if source == self.source => match result {
                Ok(stored) => self.file = FileState::Peeked(stored),
                Err(trouble) => {
                    self.file = FileState::Unknown;
                    self.fail(trouble, now);
                }
            },
            Happened::Estimated(revision, on, result) if revision == self.assignment.revision => match result {
                Ok(report) => {
                    self.estimates.retain(|estimate| estimate.on != on);
                    self.estimates.push(Estimate { on, report: Some(report) });
                }
                Err(trouble) => self.fail(trouble, now),
            },
            Happened::Woken => self.asleep = false,
            Happened::Activity(activity) => {
                self.waiting_since = (activity.waiting > 0).then(|| self.waiting_since.unwrap_or(now));
                if activity.running == 0 && activity.waiting == 0 {
                    let route = &self.route;
                    let unrouted = self.workers.iter_mut().filter(|(id, _)| *route != Some(RouteTo::Worker(**id)));
                    unrouted
                        .filter_map(|(_, worker)| worker.leaving.as_mut())
                        .for_each(|leaving| leaving.settled = true);
                }
                self.activity = activity;
            }
            // Of a source or revision that is not wanted any more, or not about one model.
            Happened::Fetched(..)
            | Happened::Peeked(..)
            | Happened::Estimated(..)
            | Happened::Probed(_)
            | Happened::Stored(..)
            | Happened::Measured(_)
            | Happened::Withdrawn
            | Happened::WorkerSaid(..)
            | Happened::WorkerEnded(..) => {}
        }
    }

    pub(super) fn worker_said(&mut self, id: WorkerId, event: RunnerEvent, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        match event {
            RunnerEvent::Loading { percent } => {
                if matches!(worker.phase, Phase::Loading { .. }) {
                    worker.phase = Phase::Loading { percent: percent.min(100) };
                }
            }
            RunnerEvent::Ready(report) => {
                if report.load_milliseconds > 0 {
                    self.last_load = Some(Duration::from_millis(report.load_milliseconds));
                }
                worker.report = Some(report);
                worker.phase = Phase::Ready { since: now };
                if worker.revision == self.assignment.revision {
                    self.failure = None;
                    self.failures = 0;
                    // What it takes is measured, and asked for anew before the next load.
                    self.estimates.clear();
                }
            }
            RunnerEvent::Changed(report) => worker.report = Some(report),
            RunnerEvent::Activity { running, waiting } => {
                worker.requests = running.saturating_add(waiting);
                if worker.requests > 0 {
                    // It may grow again.
                    worker.shrink_asked = None;
                }
            }
            // The end that follows has it; the supervisor hears the heart; and the ledger answers.
            RunnerEvent::Failed(_) | RunnerEvent::Heartbeat { .. } | RunnerEvent::Growth { .. } => {}
        }
    }

    pub(super) fn worker_ended(&mut self, id: WorkerId, end: &WorkerEnd, now: Instant) {
        let Some(worker) = self.workers.remove(&id) else { return };
        // One that was sent away ends as it was told to.
        if worker.leaving.is_some() {
            return;
        }
        let why = end.failure.as_ref().map(|failure| format!(": {}", failure.message));
        let message = format!("the worker {}{}", end.how, why.unwrap_or_else(|| log_of(end)));
        let reason = end.failure.as_ref().map_or(reasons::WORKER_EXITED, |failure| &failure.reason).to_owned();
        if matches!(worker.phase, Phase::Ready { .. }) {
            self.restarts = self.restarts.saturating_add(1);
            self.last_termination = Some(Termination { reason: reason.clone(), message: message.clone() });
        }
        if worker.revision != self.assignment.revision {
            return;
        }
        match worker.phase {
            Phase::Loading { .. } => {
                let trouble = match &end.failure {
                    Some(failure) => Trouble { reason: failure.reason.clone(), message: failure.message.clone() },
                    None => Trouble {
                        reason: reasons::LOAD_FAILED.to_owned(),
                        message: format!("the worker {} while it loaded the model{}", end.how, log_of(end)),
                    },
                };
                self.fail(trouble, now);
            }
            Phase::Ready { since } => {
                self.crashes = if now.duration_since(since) >= STABLE { 1 } else { self.crashes + 1 };
                let retry_at = now + self.crashes.checked_sub(2).map_or(Duration::ZERO, backoff);
                self.failure = Some(Failure { reason, message, retry_at });
            }
        }
    }

    /// Also has file and dry runs looked at again before the next try: the cause may lie in the file.
    fn fail(&mut self, trouble: Trouble, now: Instant) {
        let Trouble { reason, message } = trouble;
        let retry_at = now + backoff(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.failure = Some(Failure { reason, message, retry_at });
        if self.file.known().is_some() {
            self.file = FileState::Unknown;
        }
        self.estimates.clear();
    }
}

fn backoff(failures_before: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << failures_before.min(16)).min(LONGEST_BACKOFF)
}

fn log_of(end: &WorkerEnd) -> String {
    if end.last_lines.is_empty() { String::new() } else { format!(": {}", end.last_lines) }
}
