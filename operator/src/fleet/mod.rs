//! The fleet: one serial planner for all models and nodes.
//!
//! Serial, because two models that are placed at the same time could take the same gap. What it writes is in its
//! mirrors before it plans again.

pub mod announce;
pub mod apply;
pub mod capacity;
pub mod children;
pub mod diff;
pub mod events;
pub mod filter;
pub mod memory;
pub mod observe;
mod place;
pub mod plan;
mod replicas;
pub mod seen;
pub mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::ModelDeploymentStatus;
use altiplano_crds::conditions::{reasons, types};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use announce::{Announcement, Announcer};
use apply::{Pauses, Throttle, WriteError, Writer};
use diff::{Target, Write};
use events::Note;
use memory::Memory;
use observe::Fleet;
use plan::{FinalizerStep, ModelPlan, Plan, Settings};
use seen::{Model, ModelSeen};

use crate::clock::Now;
use crate::upgrade;
use crate::upgrade::observe::Agents;
use crate::upgrade::plan::Upgrades;

/// The planner with what it needs to act.
pub struct Planner {
    writer: Writer,
    announcer: Announcer,
    settings: Settings,
    url_suffix: String,
    memory: Memory,
    upgrade: upgrade::plan::Memory,
    pauses: Pauses,
    throttle: Throttle,
    unreadable: BTreeSet<(String, String)>,
}

/// What a round has found to do.
#[derive(Default)]
struct Round {
    writes: Vec<Write>,
    /// What to announce once the write to that object has been done, by uid.
    notes: BTreeMap<String, Vec<Note>>,
    next: Option<Duration>,
}

impl Planner {
    /// A planner that leads. `cluster_domain` may be empty.
    #[must_use]
    pub fn new(writer: Writer, announcer: Announcer, settings: Settings, cluster_domain: &str) -> Self {
        let url_suffix = if cluster_domain.is_empty() { String::new() } else { format!(".{cluster_domain}") };
        Self {
            writer,
            announcer,
            settings,
            url_suffix,
            memory: Memory::default(),
            upgrade: upgrade::plan::Memory::default(),
            pauses: Pauses::default(),
            throttle: Throttle::default(),
            unreadable: BTreeSet::new(),
        }
    }

    /// Plans and acts whenever something has changed or a deadline has come, until `shutdown`.
    ///
    /// # Errors
    /// When this process must not lead any more.
    pub async fn run(&mut self, wake: &Notify, shutdown: &CancellationToken) -> Result<(), WriteError> {
        loop {
            let next = self.round().await?;
            let now = self.writer.clock.mono();
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep(at.saturating_sub(now)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = wake.notified() => {}
                () = sleep => {}
            }
        }
    }

    /// One round; answers when the next one is due even if nothing happens.
    async fn round(&mut self) -> Result<Option<Duration>, WriteError> {
        let metrics = Arc::clone(&self.writer.metrics);
        let timer = metrics.round();
        let now = self.writer.clock.now();
        let agents = Agents::observe(&self.writer.mirrors.upgrade);
        let mut fleet = Fleet::observe(&self.writer.mirrors);
        fleet.outdated = agents.as_ref().map(Agents::outdated).unwrap_or_default();
        let (mut plan, memory) = plan::plan(&fleet, &self.settings, std::mem::take(&mut self.memory), now);
        self.memory = memory;
        let (stale_after, memory) = (self.settings.stale_after, std::mem::take(&mut self.upgrade));
        let (upgrades, memory) = upgrade::plan::plan(agents.as_ref(), &fleet, &plan, stale_after, memory, now);
        self.upgrade = memory;
        plan.upgrades.clone_from(&upgrades.marks);
        let mut round = self.decide(&fleet, &plan, now);
        if let Some(agents) = &agents {
            self.decide_agents(agents, upgrades, &mut round, now);
        }
        timer.observe_duration();
        self.announce_unreadable();
        self.act(round).await
    }

    /// All writes that are due.
    fn decide(&self, fleet: &Fleet, plan: &Plan, now: Now) -> Round {
        let mut round = Round { next: plan.next, ..Round::default() };
        for write in diff::nodes(fleet, plan, self.writer.leadership.epoch()) {
            round.add(&self.pauses, write, now.mono);
        }
        for model in fleet.models() {
            if let Some(model_plan) = plan.models.get(&model.uid) {
                self.decide_model(fleet, model, model_plan, &mut round, now);
            }
        }
        round
    }

    fn decide_agents(&self, agents: &Agents, upgrades: Upgrades, round: &mut Round, now: Now) {
        let Upgrades { marks: _, delete, progress, next } = upgrades;
        if let Some(at) = next {
            round.look_again(at);
        }
        for pod in delete {
            round.add(&self.pauses, Write::DeletePod(pod), now.mono);
        }
        let Some(progress) = progress else { return };
        self.writer.metrics.agents(progress.updated, progress.agents, !progress.blocked.is_empty());
        let daemon_set = &agents.daemon_set;
        let condition = upgrade::status::condition(daemon_set, &progress, now);
        if daemon_set.condition.as_ref() == Some(&condition) {
            return;
        }
        let event = upgrade::status::event(daemon_set.condition.as_ref(), &condition);
        let (namespace, name, uid) = (daemon_set.namespace.clone(), daemon_set.name.clone(), daemon_set.uid.clone());
        let target = Target { namespace, name, uid: uid.clone() };
        if let Err(at) = self.throttle.due(&uid, event.is_some(), now.mono) {
            round.look_again(at);
        } else if round.add(&self.pauses, Write::AgentsStatus { target, condition: Box::new(condition) }, now.mono) {
            round.notes.entry(uid).or_default().extend(event);
        }
    }

    fn decide_model(&self, fleet: &Fleet, model: &Model, plan: &ModelPlan, round: &mut Round, now: Now) {
        let mut notes = Vec::new();
        let finalizes = diff::finalizer(model, plan).is_some_and(|write| round.add(&self.pauses, write, now.mono));
        if finalizes && !plan.drain_timed_out.is_empty() {
            let note = format!("deleted without waiting any longer for {}", plan.drain_timed_out.join(", "));
            notes.push(Note { warning: true, reason: reasons::DRAIN_TIMED_OUT.to_owned(), note });
        }
        let children = children::children(fleet, model, plan);
        for write in diff::children(fleet, model, &children) {
            round.add(&self.pauses, write, now.mono);
        }
        let status = status::status(fleet, model, plan, &children.service, &self.url_suffix, now);
        let urgent = readiness(&model.status) != readiness(&status);
        let news = events::events(&model.status, &status);
        // Both at a time would be a conflict; and with its finalizer a deleted model goes.
        let gone = model.deleting && plan.finalizer == FinalizerStep::Remove;
        if let Some(write) = diff::status(model, status).filter(|_| !finalizes && !gone) {
            match self.throttle.due(&model.uid, urgent, now.mono) {
                Ok(()) if round.add(&self.pauses, write, now.mono) => notes.extend(news),
                Ok(()) => {}
                Err(at) => round.look_again(at),
            }
        }
        if !notes.is_empty() {
            round.notes.insert(model.uid.clone(), notes);
        }
    }

    /// Does the writes. A failure is tried again later; only the loss of leadership ends the round.
    async fn act(&mut self, round: Round) -> Result<Option<Duration>, WriteError> {
        let Round { writes, mut notes, mut next } = round;
        for (write, result) in self.writer.write_all(writes).await {
            let now = self.writer.clock.mono();
            if let Err(error) = &result {
                self.writer.metrics.error(error.reason());
            }
            if let Some(at) = self.pauses.note(&write, &result, now) {
                next = Some(earlier(next, at));
            }
            match result {
                Err(error) if error.ends_leadership() => return Err(error),
                Err(_) => {}
                Ok(()) => {
                    // Its answer is in the mirror: what follows from it is planned at once.
                    next = Some(earlier(next, now));
                    if let Write::Status { target, .. } | Write::AgentsStatus { target, .. } = &write {
                        self.throttle.wrote(&target.uid, now);
                    }
                    if let Write::Status { target, .. } | Write::Finalizers { target, .. } = &write {
                        for note in notes.remove(&target.uid).into_iter().flatten() {
                            self.announcer.announce(Announcement::about(target, note));
                        }
                    }
                    if let Write::AgentsStatus { target, .. } = &write {
                        for note in notes.remove(&target.uid).into_iter().flatten() {
                            self.announcer.announce(Announcement::about_agents(target, note));
                        }
                    }
                }
            }
        }
        self.pauses.prune(self.writer.clock.mono());
        Ok(next)
    }

    /// A ModelDeployment that this build cannot read blocks no other; it is told of once.
    fn announce_unreadable(&mut self) {
        let mut there = BTreeSet::new();
        for (_, seen) in self.writer.mirrors.models.all() {
            let ModelSeen::Unreadable(unreadable) = &*seen else { continue };
            let key = (unreadable.uid.clone(), unreadable.error.clone());
            if !self.unreadable.contains(&key) {
                let seen::Unreadable { uid, namespace, name, error } = unreadable.clone();
                warn!(namespace, name, error, "cannot read this ModelDeployment; what runs of it is left alone");
                self.writer.metrics.error("Unreadable");
                let note = format!("this operator cannot read it; what runs of it is left alone: {error}");
                let note = altiplano_crds::names::clip(&note, events::LONGEST_NOTE);
                let note = Note { warning: true, reason: reasons::UNSUPPORTED_SPEC.to_owned(), note };
                let target = diff::Target { namespace, name, uid };
                self.announcer.announce(Announcement::about(&target, note));
            }
            there.insert(key);
        }
        self.unreadable = there;
    }
}

impl Round {
    /// Takes the write in, if it is not to be tried later only.
    fn add(&mut self, pauses: &Pauses, write: Write, now: Duration) -> bool {
        match pauses.due(&write, now) {
            Ok(()) => self.writes.push(write),
            Err(at) => {
                self.look_again(at);
                return false;
            }
        }
        true
    }

    fn look_again(&mut self, at: Duration) {
        self.next = Some(earlier(self.next, at));
    }
}

fn earlier(next: Option<Duration>, at: Duration) -> Duration {
    next.map_or(at, |next| next.min(at))
}

/// Status of the condition that others wait for.
fn readiness(status: &ModelDeploymentStatus) -> Option<&str> {
    status.conditions.iter().find(|condition| condition.type_ == types::READY).map(|ready| ready.status.as_str())
}
