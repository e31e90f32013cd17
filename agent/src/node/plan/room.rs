//! Where a model goes, and who makes room for it.
//!
//! Tier after tier of places (one GPU, all of them, the CPU), and in each: room that is there; room that workers on
//! their way out will leave; room that the model's own former revision holds; room that idle models hold which may be
//! unloaded. Never a busy model, a pinned one, one just loaded, or one of higher priority.

use std::time::Instant;

use altiplano_crds::conditions::{reasons, states};
use altiplano_crds::model_deployment::{GpuPolicy, UnloadPolicy};
use altiplano_crds::model_node::{AssignmentMode, ModelAssignment};

use super::super::observe::{Model, Phase};
use super::{Planner, Step, Verdict, is_idle, last_use, seconds};
use crate::devices::{Devices, Target};
use crate::ledger::{Ledger, Need, Shortage};

/// A place and what the model would take there.
type Choice = (Target, Need);

impl<'a> Planner<'a> {
    /// Finds a place for the wanted revision and starts a worker there, or says what it waits for.
    pub(super) fn place(&mut self, wanted: &ModelAssignment, model: &Model) -> Verdict {
        let devices = match self.devices() {
            Ok(devices) => devices,
            Err(verdict) => return verdict,
        };
        let tiers = devices.tiers(&wanted.engine, &self.held);
        if tiers.is_empty() {
            return gpu_required();
        }
        let mut shortage: Option<Shortage> = None;
        for tier in tiers {
            let choices = match self.choices(wanted, model, devices, tier) {
                Ok(choices) => choices,
                Err(verdict) => return verdict,
            };
            if let Some(verdict) = self.take(wanted, model, &choices, shortage.as_ref()) {
                return verdict;
            }
            let short = choices.first().and_then(|(_, need)| self.held.check(need).err());
            shortage = shortage.or(short);
        }
        match shortage {
            Some(shortage) => Verdict::because(states::FAILED, reasons::INSUFFICIENT_MEMORY, shortage),
            // Room that is there but spoken for.
            None => Verdict::because(states::PENDING, reasons::LOADING, "waits for a model of higher priority"),
        }
    }

    /// What the model would take where it would go now; else where it could ever go; else at the first choice.
    pub(super) fn best_estimate(&mut self, wanted: &ModelAssignment, model: &Model) -> Result<Need, Verdict> {
        let devices = self.devices()?;
        let tiers = devices.tiers(&wanted.engine, &self.held);
        let mut all = Vec::new();
        for tier in tiers {
            let choices = self.choices(wanted, model, devices, tier)?;
            if let Some((_, need)) = choices.iter().find(|(_, need)| self.held.check(need).is_ok()) {
                return Ok(need.clone());
            }
            all.extend(choices);
        }
        let possible = all.iter().find(|(_, need)| self.held.check_empty(need).is_ok());
        possible.or(all.first()).map(|(_, need)| need.clone()).ok_or_else(gpu_required)
    }

    fn devices(&self) -> Result<&'a Devices, Verdict> {
        let waiting = || match &self.observed.probe_error {
            Some(error) => Verdict::because(states::PENDING, reasons::NO_DEVICE, error),
            None => Verdict { message: Some("the devices are being looked at".to_owned()), ..pending() },
        };
        self.observed.devices.as_ref().ok_or_else(waiting)
    }

    /// The places of a tier with their dry runs; an error while one is missing.
    fn choices(
        &mut self,
        wanted: &ModelAssignment,
        model: &Model,
        devices: &Devices,
        tier: Vec<Target>,
    ) -> Result<Vec<Choice>, Verdict> {
        let mut choices = Vec::new();
        for target in tier {
            let estimate = model.estimate(&target.estimate_on);
            let Some(report) = estimate.and_then(|estimate| estimate.report.as_ref()) else {
                if estimate.is_none() {
                    let (uid, revision) = (wanted.uid.clone(), wanted.revision.clone());
                    self.plan.steps.push(Step::Estimate { uid, revision, on: target.estimate_on });
                }
                let message = Some("llama.cpp works out how much memory the model needs".to_owned());
                return Err(Verdict { message, reason: Some(reasons::ESTIMATING.to_owned()), ..pending() });
            };
            let need = devices.need(&target.translate(report.memory.clone()));
            choices.push((target, need));
        }
        Ok(choices)
    }

    /// Loads the model at one of these places, or has room made there; `None` when there can be none.
    fn take(
        &mut self,
        wanted: &ModelAssignment,
        model: &Model,
        choices: &[Choice],
        before: Option<&Shortage>,
    ) -> Option<Verdict> {
        let fits = |ledger: &Ledger, (_, need): &&Choice| ledger.check(need).is_ok();
        if let Some((target, need)) = choices.iter().find(|choice| fits(&self.held, choice) && fits(&self.soon, choice))
        {
            return Some(self.load(wanted, model, target, need, before));
        }
        if let Some((_, need)) = choices.iter().find(|choice| fits(&self.soon, choice)) {
            self.speak_for(model, need);
            return Some(waiting("waits for memory that a model on its way out still holds"));
        }
        let mut without_former = self.soon.clone();
        model.former(&wanted.revision).for_each(|(id, _)| without_former.release(id));
        if let Some((_, need)) = choices.iter().find(|choice| fits(&without_former, choice)) {
            for (id, _) in model.former(&wanted.revision) {
                self.drain(wanted, id);
            }
            self.speak_for(model, need);
            return Some(waiting("waits for memory that the former revision still holds"));
        }
        for (_, need) in choices {
            let Some(victims) = self.victims(wanted, &without_former, need) else { continue };
            for (id, _) in model.former(&wanted.revision) {
                self.drain(wanted, id);
            }
            for victim in &victims {
                self.unload(victim, model);
            }
            self.speak_for(model, need);
            return Some(waiting(&format!("waits until {} idle models have been unloaded", victims.len())));
        }
        None
    }

    fn load(
        &mut self,
        wanted: &ModelAssignment,
        model: &Model,
        target: &Target,
        need: &Need,
        before: Option<&Shortage>,
    ) -> Verdict {
        if self.loading >= self.limits.loading {
            self.speak_for(model, need);
            return waiting("waits until other models have been loaded");
        }
        let worker = self.next_worker;
        // Both were asked a moment ago.
        let reserved = self.held.reserve(worker, &model.label(), need.clone());
        if let Err(shortage) = reserved {
            return Verdict::because(states::FAILED, reasons::INSUFFICIENT_MEMORY, shortage);
        }
        self.speak_for(model, need);
        self.loading += 1;
        let may_use_gpu = wanted.engine.gpu == GpuPolicy::Preferred && wanted.engine.gpu_layers != Some(0);
        let note = (target.is_cpu() && may_use_gpu).then(|| match before {
            Some(shortage) => format!("runs on the CPU: it {shortage}"),
            None => "runs on the CPU: this node has no GPU".to_owned(),
        });
        self.plan.steps.push(Step::Load {
            uid: wanted.uid.clone(),
            revision: wanted.revision.clone(),
            worker,
            target: target.clone(),
            need: need.clone(),
            note,
        });
        Verdict { percent: Some(0), ..Verdict::new(states::LOADING) }
    }

    /// Keeps room that will be there from those who are planned later.
    fn speak_for(&mut self, model: &Model, need: &Need) {
        let worker = self.next_worker;
        self.next_worker += 1;
        // Where it does not fit it is not kept, and the next plan finds out.
        let _ = self.soon.reserve(worker, &model.label(), need.clone());
    }

    /// Idle models whose room would do, those unused for longest first.
    fn victims(&mut self, wanted: &ModelAssignment, soon: &Ledger, need: &Need) -> Option<Vec<String>> {
        let mut idle: Vec<(Instant, &String, &Model)> = Vec::new();
        let mut next_look = None;
        for (uid, other) in &self.observed.models {
            let assignment = &other.assignment;
            let may_go = *uid != wanted.uid
                && assignment.mode == AssignmentMode::Serve
                && assignment.unload.policy != UnloadPolicy::Never
                && assignment.priority <= wanted.priority
                && is_idle(other)
                && !self.unloaded.contains(uid);
            let ready = other.staying(&assignment.revision).and_then(|(_, worker)| match worker.phase {
                Phase::Ready { since } => Some(since),
                Phase::Loading { .. } => None,
            });
            let (true, Some(since)) = (may_go, ready) else { continue };
            let resident_until = since + seconds(assignment.unload.min_resident_seconds);
            if self.now < resident_until {
                next_look = Some(next_look.map_or(resident_until, |at: Instant| at.min(resident_until)));
            } else {
                idle.push((last_use(other, since), uid, other));
            }
        }
        idle.sort_by_key(|(used, uid, _)| (*used, (*uid).clone()));
        let mut without = soon.clone();
        let mut victims = Vec::new();
        for (_, uid, other) in idle {
            let frees = |device: &String| {
                let held = |id| without.holding(id).and_then(|held| held.get(device)).is_some_and(|held| *held > 0);
                other.workers.keys().any(|id| held(*id))
            };
            let helps = need.iter().any(|(device, bytes)| *bytes > without.free(device) && frees(device));
            if helps {
                other.workers.keys().for_each(|id| without.release(*id));
                victims.push(uid.clone());
            }
            if without.check(need).is_ok() {
                return Some(victims);
            }
        }
        if let Some(at) = next_look {
            self.look_again(at);
        }
        None
    }

    fn unload(&mut self, uid: &str, for_whom: &Model) {
        let observed = self.observed;
        let Some(victim) = observed.models.get(uid) else { return };
        let why = format!("{} needs the memory", for_whom.label());
        self.plan.steps.push(Step::Unload { uid: uid.to_owned(), why });
        for id in victim.workers.keys() {
            self.drain(&victim.assignment, *id);
        }
        self.unloaded.insert(uid.to_owned());
        // Its own turn may have been before this: then its route goes with the next plan, which `begin` calls for.
        self.look_again(self.now);
    }
}

fn pending() -> Verdict {
    Verdict::new(states::PENDING)
}

fn waiting(message: &str) -> Verdict {
    Verdict::because(states::LOADING, reasons::LOADING, message)
}

fn gpu_required() -> Verdict {
    Verdict::because(
        states::FAILED,
        reasons::GPU_REQUIRED,
        "engine.gpu is Required and llama.cpp sees no GPU on this node",
    )
}
