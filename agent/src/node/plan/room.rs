//! Where a model goes, and who makes room for it.
//!
//! Tier after tier of places (one GPU, all of them, a part of the model on them, the CPU), and in each: room that is there; room that workers on
//! their way out will leave; room that idle models' contexts have grown into (`shrink`); room that the model's own former
//! revision holds; room that idle models hold which may be unloaded (`victims`). Where only time or patience lacks, requests wait; where nothing helps, the numbers are said.

use std::time::{Duration, Instant};

use altiplano_crds::conditions::{reasons, states};
use altiplano_crds::model_deployment::GpuPolicy;
use altiplano_crds::model_node::ModelAssignment;

use super::super::observe::Model;
use super::victims::Room;
use super::{Planner, Step, Verdict};
use crate::devices::{Devices, Share, Target};
use crate::ledger::{Ledger, Need, Shortage};
use crate::runner::protocol::{MemoryUse, PartEstimate};

/// A place and what the model would take there.
type Choice = (Target, Need);

/// How long a request waits for room that others keep using before they get no new requests until it has had its turn.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a context that was refused more memory is taken to want it still.
const GROWTH_INTEREST: Duration = Duration::from_secs(15);

/// What a model waits for whose room is being made by contexts that shrink.
const GIVEN_BACK: &str = "waits for memory that idle models' contexts give back";

/// How long a request waits for room before nobody who is planned later may take any of it.
const CLAIM: Duration = Duration::from_secs(10);

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
        let mut later: Option<Later> = None;
        for tier in tiers {
            let choices = match self.choices(wanted, model, devices, tier) {
                Ok(choices) => choices,
                Err(verdict) => return verdict,
            };
            match self.take(wanted, model, &choices, shortage.as_ref()) {
                Taken::Verdict(verdict) => return verdict,
                Taken::Later(found) => later = later.or(Some(found)),
                Taken::Nothing => {}
            }
            let short = choices.first().and_then(|(_, need)| self.held.check(need).err());
            shortage = shortage.or(short);
        }
        let shortage = shortage.map(|shortage| self.explained(wanted, shortage));
        if let Some(later) = later {
            return self.wait_for_room(model, later, shortage);
        }
        match shortage {
            Some(shortage) => Verdict::because(states::FAILED, reasons::INSUFFICIENT_MEMORY, shortage),
            // Room that is there but spoken for.
            None => Verdict::because(states::PENDING, reasons::LOADING, "waits for a model of higher priority"),
        }
    }

    /// Nobody can be unloaded now, but in time: those who use the room have not had it for long enough, or are busy.
    fn wait_for_room(&mut self, model: &Model, later: Later, shortage: Option<Shortage>) -> Verdict {
        let Later { need, at, busy } = later;
        if let Some(at) = at {
            self.look_again(at);
        }
        let message = shortage.map_or_else(|| "waits for room".to_owned(), |shortage| shortage.to_string());
        let Some(since) = model.waiting_since else {
            // Loaded by the first request for it: that has a right to a turn.
            return Verdict {
                ready_at: at,
                ..Verdict::because(states::UNLOADED, reasons::INSUFFICIENT_MEMORY, message)
            };
        };
        // Idle by then, they are unloaded like any other. No request of theirs is cut.
        if self.has_come(since + PATIENCE) {
            self.yielding.extend(busy);
        }
        if self.has_come(since + CLAIM) {
            let worker = self.next_worker;
            self.next_worker += 1;
            self.soon.claim(worker, &model.label(), need);
        }
        let verdict = Verdict::because(states::LOADING, reasons::INSUFFICIENT_MEMORY, message);
        Verdict { ready_at: Some(at.unwrap_or(self.now).max(self.now) + model.load_time()), ..verdict }
    }

    /// Whether it is that late; if not, the next look is no later.
    fn has_come(&mut self, at: Instant) -> bool {
        if self.now < at {
            self.look_again(at);
        }
        self.now >= at
    }

    /// Has idle models shrink, or unloads them, for a context that lately wanted to grow and could not; it asks again.
    pub(super) fn room_to_grow(&mut self, wanted: &ModelAssignment, model: &Model) {
        let Some((need, asked)) = &model.wants_more else { return };
        if self.now < *asked + GROWTH_INTEREST
            && self.soon.check(need).is_err()
            && let (Room::Now(victims), shrinking) = self.room(wanted, &self.soon, need)
        {
            self.shrink(shrinking, model);
            for victim in &victims {
                self.unload(victim, model);
            }
        }
    }

    /// What keeps a context from growing that lately wanted to, for people.
    pub(super) fn wish(&mut self, model: &Model) -> Option<String> {
        let (need, asked) = model.wants_more.as_ref()?;
        let shortage = self.held.check(need).err().filter(|_| self.now < *asked + GROWTH_INTEREST)?;
        self.look_again(*asked + GROWTH_INTEREST);
        Some(format!("its context would grow: {shortage}"))
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
        let (mut choices, mut parts) = (Vec::new(), Vec::new());
        for target in tier {
            let trial = target.trial();
            let estimate = model.estimate(&trial);
            let Some(report) = estimate.and_then(|estimate| estimate.report.as_ref()) else {
                if estimate.is_none() {
                    let (uid, revision) = (wanted.uid.clone(), wanted.revision.clone());
                    self.plan.steps.push(Step::Estimate { uid, revision, on: trial });
                }
                let message = Some("llama.cpp works out how much memory the model needs".to_owned());
                return Err(Verdict { message, reason: Some(reasons::ESTIMATING.to_owned()), ..pending() });
            };
            let need = |memory: &[MemoryUse]| devices.worker_need(&target.translate(memory.to_vec()));
            if target.share == Share::Fitting {
                parts.extend(report.parts.iter().enumerate().map(|(place, PartEstimate { part, memory })| {
                    (place, (Target { share: Share::Part(*part), ..target.clone() }, need(memory)))
                }));
            } else {
                let need = need(&report.memory);
                choices.push((target, need));
            }
        }
        // The largest part first, wherever there is room for it.
        parts.sort_by_key(|(place, _)| *place);
        choices.extend(parts.into_iter().map(|(_, choice)| choice));
        Ok(choices)
    }

    /// Loads the model at one of these places, or has room made there; `None` when there can be none.
    fn take(
        &mut self,
        wanted: &ModelAssignment,
        model: &Model,
        choices: &[Choice],
        before: Option<&Shortage>,
    ) -> Taken {
        let fits = |ledger: &Ledger, (_, need): &&Choice| ledger.check(need).is_ok();
        if let Some((target, need)) = choices.iter().find(|choice| fits(&self.held, choice) && fits(&self.soon, choice))
        {
            return Taken::Verdict(self.load(wanted, model, target, need, before));
        }
        if let Some((_, need)) = choices.iter().find(|choice| fits(&self.soon, choice)) {
            self.speak_for(model, need);
            let mut workers = self.observed.models.values().flat_map(|model| model.workers.values());
            let message = if !self.observed.ledger.is_settled() {
                "waits for memory that a model has left and that the driver has not given back yet"
            } else if workers.any(|worker| worker.leaving.is_some()) {
                "waits for memory that a model on its way out still holds"
            } else {
                GIVEN_BACK
            };
            return Taken::Verdict(waiting(message));
        }
        for (_, need) in choices {
            if let (Room::Now(victims), shrinking) = self.room(wanted, &self.soon, need)
                && victims.is_empty()
            {
                self.shrink(shrinking, model);
                self.speak_for(model, need);
                return Taken::Verdict(waiting(GIVEN_BACK));
            }
        }
        let mut without_former = self.soon.clone();
        model.former(&wanted.revision).for_each(|(id, _)| without_former.release(id));
        if let Some((_, need)) = choices.iter().find(|choice| fits(&without_former, choice)) {
            for (id, _) in model.former(&wanted.revision) {
                self.drain(wanted, id);
            }
            self.speak_for(model, need);
            return Taken::Verdict(waiting("waits for memory that the former revision still holds"));
        }
        let mut later = None;
        for (_, need) in choices {
            let (room, shrinking) = self.room(wanted, &without_former, need);
            match room {
                Room::Now(victims) => {
                    self.shrink(shrinking, model);
                    for (id, _) in model.former(&wanted.revision) {
                        self.drain(wanted, id);
                    }
                    for victim in &victims {
                        self.unload(victim, model);
                    }
                    self.speak_for(model, need);
                    return Taken::Verdict(waiting(&format!("waits until {} idle models are unloaded", victims.len())));
                }
                Room::Later { at, busy } => {
                    later = later.or_else(|| Some(Later { need: need.clone(), at, busy }));
                }
                Room::Never => {}
            }
        }
        later.map_or(Taken::Nothing, Taken::Later)
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
        let note = match (target.share, before) {
            (Share::Part(part), Some(shortage)) => Some(format!("runs in part on the CPU ({part}): it {shortage}")),
            (Share::Part(part), None) => Some(format!("runs in part on the CPU ({part})")),
            (_, Some(shortage)) if target.is_cpu() && may_use_gpu => Some(format!("runs on the CPU: it {shortage}")),
            (_, None) if target.is_cpu() && may_use_gpu => Some("runs on the CPU: this node has no GPU".to_owned()),
            _ => None,
        };
        self.plan.steps.push(Step::Load {
            uid: wanted.uid.clone(),
            revision: wanted.revision.clone(),
            worker,
            target: target.clone(),
            need: need.clone(),
            note,
        });
        let ready_at = Some(self.now + model.load_time());
        Verdict { percent: Some(0), ready_at, ..Verdict::new(states::LOADING) }
    }

    /// Keeps room that will be there from those who are planned later.
    fn speak_for(&mut self, model: &Model, need: &Need) {
        let worker = self.next_worker;
        self.next_worker += 1;
        // Where it does not fit it is not kept, and the next plan finds out.
        let _ = self.soon.reserve(worker, &model.label(), need.clone());
    }

    fn unload(&mut self, uid: &str, for_whom: &Model) {
        let observed = self.observed;
        let Some(victim) = observed.models.get(uid) else { return };
        let why = format!("{} needs the memory", for_whom.label());
        self.plan.steps.push(Step::Unload { uid: uid.to_owned(), why, for_room: true });
        for id in victim.workers.keys() {
            self.drain(&victim.assignment, *id);
        }
        self.unloaded.insert(uid.to_owned());
        // Its own turn may have been before this: then its route goes with the next plan, which `begin` calls for.
        self.look_again(self.now);
    }
}

/// What became of a try to place a model in a tier.
enum Taken {
    /// It is decided.
    Verdict(Verdict),
    /// There will be room.
    Later(Later),
    /// There is no room, and nobody who could make any.
    Nothing,
}

/// Room that others will leave.
struct Later {
    need: Need,
    /// When somebody may be unloaded who may not now; `None`: when they have nothing to do.
    at: Option<Instant>,
    /// Models that keep using the room.
    busy: Vec<String>,
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
