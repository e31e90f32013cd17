//! A ModelDeployment's status: what is, computed from the plan and from what the nodes report. Pure.
//!
//! Nothing in it changes by itself (no ages, no free memory), so a settled model is never written.

use altiplano_crds::conditions::{reasons, states, types};
use altiplano_crds::model_deployment::{Address, EngineSpec, GpuPolicy, Placement};
use altiplano_crds::model_node::ModelState;
use altiplano_crds::{ModelDeploymentStatus, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::capacity::{Pools, quantity};
use super::children::{ServiceStep, speaking};
use super::filter::{Why, explain};
use super::observe::Fleet;
use super::plan::{Holder, ModelPlan};
use super::seen::Model;
use crate::clock::Now;

/// A node that has something to say about the model.
struct Site<'a> {
    node: &'a str,
    holder: Option<&'a Holder>,
    state: Option<&'a ModelState>,
    has_gpu: bool,
}

impl Site<'_> {
    fn is_ready(&self) -> bool {
        self.holder.is_some_and(|holder| holder.accepts)
    }

    fn is_stale(&self) -> bool {
        self.holder.is_some_and(|holder| holder.stale)
    }

    /// What a person should think of it.
    fn shown(&self) -> &str {
        match self.state {
            // The answer to an estimate is what it has said last, and says nothing of what it does now.
            Some(state) if !self.is_stale() && state.state != states::ESTIMATED => &state.state,
            _ => states::PENDING,
        }
    }

    /// It serves nothing at the moment, because its agent is being replaced.
    fn is_upgrading(&self) -> bool {
        self.holder.is_some_and(|holder| holder.upgrading && !holder.accepts)
    }

    fn failed(&self) -> Option<&ModelState> {
        self.state.filter(|state| state.state == states::FAILED && !self.is_stale())
    }

    /// Failed, or waiting for something that has a name.
    fn trouble(&self) -> Option<&ModelState> {
        let named = |state: &&ModelState| {
            let known = matches!(state.reason.as_deref(), Some(reasons::INSUFFICIENT_MEMORY | reasons::NO_DEVICE));
            state.state == states::FAILED || (state.state == states::PENDING && known)
        };
        self.state.filter(|_| !self.is_stale()).filter(named)
    }
}

/// Reasons that are not the file's fault.
fn is_about_the_file(state: &ModelState) -> bool {
    let not_the_file = [
        reasons::INSUFFICIENT_MEMORY,
        reasons::UNSUPPORTED_SPEC,
        reasons::GPU_REQUIRED,
        reasons::NO_DEVICE,
        reasons::LOAD_FAILED,
        reasons::WORKER_EXITED,
    ];
    !state.file_present && !not_the_file.contains(&state.reason.as_deref().unwrap_or_default())
}

/// Status, reason and message of a condition.
struct Verdict {
    status: &'static str,
    reason: String,
    message: String,
}

impl Verdict {
    fn new(status: &'static str, reason: &str, message: impl Into<String>) -> Self {
        Self { status, reason: reason.to_owned(), message: message.into() }
    }

    fn yes(reason: &str, message: impl Into<String>) -> Self {
        Self::new("True", reason, message)
    }

    fn no(reason: &str, message: impl Into<String>) -> Self {
        Self::new("False", reason, message)
    }

    /// Where an agent has said something, in its words.
    fn told(state: &ModelState, node: &str) -> Self {
        let reason = state.reason.as_deref().filter(|reason| !reason.is_empty()).unwrap_or(reasons::LOAD_FAILED);
        Self::no(reason, format!("{node}: {}", state.message.as_deref().unwrap_or(reason)))
    }
}

/// The status of a model after a plan. `url_suffix` is what follows `<name>.<namespace>.svc` in its address.
#[must_use]
pub fn status(
    fleet: &Fleet,
    model: &Model,
    plan: &ModelPlan,
    service: &ServiceStep,
    url_suffix: &str,
    now: Now,
) -> ModelDeploymentStatus {
    let held = sites(fleet, model, plan);
    let asked: Vec<Site<'_>> = plan.asked.iter().map(|node| site(fleet, model, node, None)).collect();
    let ready = held.iter().filter(|site| site.is_ready()).count();
    let stays = |site: &&Site<'_>| site.holder.is_some_and(|holder| holder.leaving.is_none());
    let available = held.iter().filter(|site| site.is_ready()).filter(stays).count();
    let serves_newest = |state: &ModelState| state.revision == model.revision && states::accepts_requests(&state.state);
    let holding = held.iter().filter(|site| site.holder.is_some());
    let updated = holding.filter(|site| site.state.is_some_and(serves_newest)).count();
    let verdicts = [
        (types::READY, ready_verdict(model, plan, &held, &asked, service)),
        (types::PLACED, placed_verdict(plan, &asked)),
        (types::MODEL_AVAILABLE, file_verdict(plan, &held, &asked)),
        (types::PROGRESSING, progress_verdict(plan, &held, &asked)),
        (types::DEGRADED, degraded_verdict(model, plan, &held, ready)),
    ];
    let conditions = verdicts.map(|(type_, verdict)| condition(model, type_, verdict, now)).into();
    let best = held.iter().chain(&asked).find_map(|site| site.state.filter(|state| state.max_tokens.is_some()));
    let known = held.iter().chain(&asked).filter_map(|site| site.state);
    ModelDeploymentStatus {
        observed_generation: Some(model.generation),
        conditions,
        replicas: count(plan.placed),
        ready_replicas: count(ready),
        available_replicas: count(available),
        updated_replicas: count(updated),
        selector: Some(format!("{}={}", names::MODEL_LABEL, model.uid)),
        address: Some(Address { url: format!("http://{}.{}.svc{url_suffix}", model.name, model.namespace) }),
        ready: Some(format!("{ready}/{}", plan.wanted)),
        state: worst(&held, &asked, plan),
        memory: known.clone().filter_map(memory).max().map(quantity),
        context_tokens: best.and_then(|state| state.max_tokens),
        pool_tokens: held.iter().filter_map(|site| site.state?.context_tokens).max(),
        model: { known }.find_map(|state| state.model.clone()).or_else(|| model.status.model.clone()),
        placements: held.iter().map(placement).take(names::MAX_MODELS_PER_NODE).collect(),
    }
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn site<'a>(fleet: &'a Fleet, model: &'a Model, node: &'a str, holder: Option<&'a Holder>) -> Site<'a> {
    let there = fleet.nodes.get(node);
    let newest = there.and_then(|there| there.states(&model.uid).find(|state| state.revision == model.revision));
    let status = there.and_then(|there| there.node_models()).and_then(|models| models.status.as_ref());
    Site {
        node,
        holder,
        state: newest.or_else(|| there.and_then(|there| speaking(there, &model.uid))),
        has_gpu: status.is_some_and(|status| Pools::of(status).accelerator > 0),
    }
}

/// Nodes that hold the model or are about to let it go, by name.
fn sites<'a>(fleet: &'a Fleet, model: &'a Model, plan: &'a ModelPlan) -> Vec<Site<'a>> {
    let holders = plan.holders.iter().map(|holder| site(fleet, model, &holder.node, Some(holder)));
    let draining = plan.draining.iter().map(|node| site(fleet, model, node, None));
    let mut sites: Vec<Site<'a>> = holders.chain(draining).collect();
    sites.sort_by_key(|site| site.node);
    sites
}

fn memory(state: &ModelState) -> Option<i64> {
    let sum = |bytes: &mut dyn Iterator<Item = i64>| bytes.fold(0_i64, |sum, next| sum.saturating_add(next.max(0)));
    let used = sum(&mut state.memory.iter().map(|memory| memory.measured_bytes.unwrap_or(memory.predicted_bytes)));
    let needed = sum(&mut state.required_bytes.iter().map(|required| required.bytes));
    [used, needed].into_iter().find(|bytes| *bytes > 0)
}

fn worst(held: &[Site<'_>], asked: &[Site<'_>], plan: &ModelPlan) -> Option<String> {
    let rank = |state: &&str| match *state {
        states::FAILED => 0,
        states::PENDING => 1,
        states::FETCHING => 2,
        states::LOADING => 3,
        states::DRAINING => 4,
        states::UNLOADED => 6,
        states::READY => 7,
        _ => 5,
    };
    let asked = asked.iter().map(Site::shown);
    let shown =
        held.iter().map(|site| if site.holder.is_none() { states::DRAINING } else { site.shown() }).chain(asked);
    let worst = shown.min_by_key(rank).map(str::to_owned);
    worst.or_else(|| (plan.wanted > 0).then(|| states::PENDING.to_owned()))
}

fn placement(site: &Site<'_>) -> Placement {
    let empty = ModelState::default();
    let state = site.state.unwrap_or(&empty);
    let total = |bytes: Vec<i64>| (!bytes.is_empty()).then(|| bytes.into_iter().fold(0_i64, i64::saturating_add));
    let message = match site.holder {
        Some(Holder { upgrading: true, accepts: false, .. }) => Some(Why::Upgrade.to_string()),
        Some(Holder { stale: true, .. }) => Some(Why::Stale.to_string()),
        Some(Holder { leaving: Some(why), .. }) => Some(format!("is to leave: the node {why}")),
        _ => state.message.clone().or_else(|| state.reason.clone()),
    };
    Placement {
        node: site.node.to_owned(),
        devices: state.devices.clone(),
        state: if site.holder.is_none() { states::DRAINING } else { site.shown() }.to_owned(),
        context_tokens: state.context_tokens,
        layers_offloaded: state.layers_offloaded,
        layers_total: state.layers_total,
        memory_predicted_bytes: total(state.memory.iter().map(|memory| memory.predicted_bytes).collect()),
        memory_measured_bytes: total(state.memory.iter().filter_map(|memory| memory.measured_bytes).collect()),
        progress_percent: state.progress_percent,
        message: message.map(|message| names::clip(&message, names::MAX_MESSAGE_CHARS)),
        restarts: state.restarts,
        last_termination: state.last_termination.clone(),
    }
}

fn condition(model: &Model, type_: &str, verdict: Verdict, now: Now) -> Condition {
    let Verdict { status, reason, message } = verdict;
    let before = model.status.conditions.iter().find(|before| before.type_ == type_ && before.status == status);
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: names::clip(&reason, 64),
        message: names::clip(&message, names::MAX_MESSAGE_CHARS),
        last_transition_time: before.map_or(Time(now.wall), |before| before.last_transition_time.clone()),
        observed_generation: Some(model.generation),
    }
}

fn ready_verdict(
    model: &Model,
    plan: &ModelPlan,
    held: &[Site<'_>],
    asked: &[Site<'_>],
    service: &ServiceStep,
) -> Verdict {
    if let ServiceStep::Taken { by } = service {
        let text = format!(
            "a Service called {} is there already and is not ours (controlled by {by}); it is left alone, and the model \
             gets its own as soon as the name is free",
            model.name
        );
        return Verdict::no(reasons::SERVICE_NAME_TAKEN, text);
    }
    let ready: Vec<&Site<'_>> = held.iter().filter(|site| site.is_ready()).collect();
    if !ready.is_empty() {
        let text = format!("{} of {} replicas accept requests", ready.len(), plan.wanted);
        let loaded = ready.iter().any(|site| site.state.is_none_or(|state| state.state != states::UNLOADED));
        return if loaded {
            Verdict::yes(reasons::SERVING, text)
        } else {
            Verdict::yes(reasons::IDLE, format!("{text}; the model is unloaded and the next request loads it"))
        };
    }
    if model.deleting {
        return Verdict::no(reasons::DRAINING, draining_text(plan));
    }
    if plan.wanted == 0 {
        return Verdict::no(reasons::SCALED_TO_ZERO, "replicas is 0");
    }
    if let Some((site, state)) = first_trouble(held, asked) {
        return Verdict::told(state, site.node);
    }
    if let Some((reason, text)) = in_flight(held, asked) {
        return Verdict::no(reason, text);
    }
    if let Some(stale) = stale_verdict(held) {
        return stale;
    }
    let placed = placed_verdict(plan, asked);
    Verdict::no(&placed.reason, placed.message)
}

/// What went wrong where the model should be; a node that it has been taken off does not matter.
fn first_trouble<'a>(held: &'a [Site<'_>], asked: &'a [Site<'_>]) -> Option<(&'a Site<'a>, &'a ModelState)> {
    let holding = held.iter().filter(|site| site.holder.is_some());
    holding.chain(asked).find_map(|site| site.trouble().map(|state| (site, state)))
}

fn stale_verdict(held: &[Site<'_>]) -> Option<Verdict> {
    let stale = held.iter().find(|site| site.is_stale())?;
    Some(Verdict::no(reasons::NODE_STALE, format!("{}: {}", stale.node, Why::Stale)))
}

/// What is going on, if anything.
fn in_flight(held: &[Site<'_>], asked: &[Site<'_>]) -> Option<(&'static str, String)> {
    if let Some(site) = held.iter().find(|site| site.is_upgrading()) {
        return Some((reasons::AGENT_UPGRADE, format!("the agent on {} is being replaced", site.node)));
    }
    let at = |wanted: &[&str]| {
        let there = held.iter().filter(|site| site.holder.is_some() && !site.is_stale()).chain(asked);
        let nodes: Vec<&str> = there.filter(|site| wanted.contains(&site.shown())).map(|site| site.node).collect();
        (!nodes.is_empty()).then(|| nodes.join(", "))
    };
    if let Some(nodes) = at(&[states::FETCHING]) {
        return Some((reasons::FETCHING, format!("the file is being fetched on {nodes}")));
    }
    if !asked.is_empty() {
        let nodes: Vec<&str> = asked.iter().map(|site| site.node).collect();
        let text = format!("{} is asked how much memory the model needs", nodes.join(", "));
        return Some((reasons::ESTIMATING, text));
    }
    at(&[states::LOADING, states::PENDING])
        .map(|nodes| (reasons::LOADING, format!("the model is being loaded on {nodes}")))
}

fn draining_text(plan: &ModelPlan) -> String {
    if plan.draining.is_empty() {
        "the model is being deleted".to_owned()
    } else {
        format!("the model is being taken off {}", plan.draining.join(", "))
    }
}

fn placed_verdict(plan: &ModelPlan, asked: &[Site<'_>]) -> Verdict {
    if plan.wanted == 0 {
        return Verdict::yes(reasons::SCALED_TO_ZERO, "no replicas are wanted");
    }
    let mut text = format!("{} of {} replicas have a node", plan.placed, plan.wanted);
    if plan.placed >= plan.wanted {
        return Verdict::yes(reasons::ALL_PLACED, text);
    }
    if plan.braked {
        text.push_str("; more than half of all agents are stale, so nothing moves");
    }
    let failed = asked.iter().find_map(|site| site.failed().map(|state| (site, state)));
    if !plan.rejections.is_empty() {
        text = format!("{text}; {}", explain(&plan.rejections));
    }
    if let Some((site, state)) = failed {
        let told = Verdict::told(state, site.node);
        return Verdict::no(&told.reason, text);
    }
    if !asked.is_empty() {
        let nodes: Vec<&str> = asked.iter().map(|site| site.node).collect();
        return Verdict::no(
            reasons::ESTIMATING,
            format!("{text}; asking {} how much memory it needs", nodes.join(", ")),
        );
    }
    if plan.held_back {
        return Verdict::no(reasons::ESTIMATING, format!("{text}; a node is found and about to be taken"));
    }
    // The most telling one comes first in the order of `Why`.
    let reason = plan.rejections.values().min().map_or(reasons::NO_NODE_MATCHES, Why::reason);
    if plan.rejections.is_empty() && plan.placed == 0 && plan.holders.is_empty() {
        text.push_str("; no node with a living agent matches");
    }
    Verdict::no(reason, text)
}

fn file_verdict(plan: &ModelPlan, held: &[Site<'_>], asked: &[Site<'_>]) -> Verdict {
    let all = || held.iter().filter(|site| site.holder.is_some()).chain(asked);
    if let Some((site, state)) = all().find_map(|site| site.failed().map(|state| (site, state)))
        && is_about_the_file(state)
    {
        return Verdict::told(state, site.node);
    }
    let holding: Vec<&Site<'_>> = held.iter().filter(|site| site.holder.is_some()).collect();
    let present = |site: &Site<'_>| site.state.is_some_and(|state| state.file_present);
    let at = |sites: &mut dyn Iterator<Item = &Site<'_>>| sites.map(|site| site.node).collect::<Vec<_>>().join(", ");
    let missing = at(&mut holding.iter().copied().filter(|site| !present(site)));
    if !holding.is_empty() && missing.is_empty() {
        return Verdict::yes(reasons::FILE_READY, "the file is on every node that holds the model");
    }
    let fetching = at(&mut all().filter(|site| site.shown() == states::FETCHING));
    if !fetching.is_empty() {
        return Verdict::no(reasons::FETCHING, format!("the file is being fetched on {fetching}"));
    }
    if plan.asked.is_empty() && holding.is_empty() {
        return Verdict::new("Unknown", reasons::NOT_FETCHED, "no node has looked at the file");
    }
    Verdict::new(
        "Unknown",
        reasons::NOT_FETCHED,
        format!("not known yet on {}", if missing.is_empty() { plan.asked.join(", ") } else { missing }),
    )
}

fn progress_verdict(plan: &ModelPlan, held: &[Site<'_>], asked: &[Site<'_>]) -> Verdict {
    if !plan.draining.is_empty() {
        return Verdict::yes(reasons::DRAINING, format!("the model is being taken off {}", plan.draining.join(", ")));
    }
    if let Some((site, state)) = first_trouble(held, asked) {
        return Verdict::told(state, site.node);
    }
    if plan.holders.iter().any(|holder| !holder.updated) {
        let old: Vec<&str> = plan.holders.iter().filter(|holder| !holder.updated).map(|h| h.node.as_str()).collect();
        return Verdict::yes(reasons::ROLLING_OUT, format!("still of an older revision: {}", old.join(", ")));
    }
    if let Some(leaving) = plan.holders.iter().find(|holder| holder.leaving.is_some()) {
        return Verdict::yes(reasons::ROLLING_OUT, format!("moving off {}", leaving.node));
    }
    let unready =
        held.iter().any(|site| site.holder.is_some() && !site.is_ready() && (!site.is_stale() || site.is_upgrading()));
    if (unready || !asked.is_empty())
        && let Some((reason, text)) = in_flight(held, asked)
    {
        return Verdict::yes(reason, text);
    }
    if plan.placed < plan.wanted {
        let placed = placed_verdict(plan, asked);
        return Verdict::no(&placed.reason, placed.message);
    }
    if let Some(stale) = stale_verdict(held) {
        return stale;
    }
    Verdict::no(reasons::SETTLED, "everything is as wanted")
}

/// Whether fewer layers are on a GPU than the spec asks for, which is all unless it names a number.
fn lacks_layers(engine: &EngineSpec, state: &ModelState) -> bool {
    let Some(offloaded) = state.layers_offloaded else { return false };
    // An agent that does not say how many there are: any will do.
    let total = state.layers_total.unwrap_or(1);
    offloaded < engine.gpu_layers.unwrap_or(total).min(total)
}

fn degraded_verdict(model: &Model, plan: &ModelPlan, held: &[Site<'_>], ready: usize) -> Verdict {
    if ready > 0 && ready < plan.wanted {
        return Verdict::yes(reasons::REPLICAS_MISSING, format!("{ready} of {} replicas accept requests", plan.wanted));
    }
    let engine = &model.spec.engine;
    let lacks = |site: &&Site<'_>| {
        site.is_ready() && site.has_gpu && site.state.is_some_and(|state| lacks_layers(engine, state))
    };
    if let Some(site) = held.iter().find(lacks).filter(|_| engine.gpu == GpuPolicy::Preferred) {
        let told = site.state.and_then(|state| state.message.as_deref());
        let told = told.unwrap_or("runs on the CPU: no GPU had room for it");
        return Verdict::yes(reasons::ON_CPU, format!("{}: {told}", site.node));
    }
    Verdict::no(reasons::AS_WANTED, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_on_the_cpu_is_said_unless_the_spec_asks_for_it() {
        for (asked, offloaded, total, expected) in [
            (None, Some(0), Some(33), true),
            (None, Some(17), Some(33), true),
            (None, Some(33), Some(33), false),
            (Some(17), Some(17), Some(33), false),
            (Some(17), Some(0), Some(33), true),
            (Some(99), Some(33), Some(33), false),
            (Some(0), Some(0), Some(33), false),
            (None, Some(0), None, true),
            (None, Some(5), None, false),
            (None, None, None, false),
        ] {
            let engine = EngineSpec { gpu_layers: asked, ..EngineSpec::default() };
            let state = ModelState { layers_offloaded: offloaded, layers_total: total, ..ModelState::default() };
            assert_eq!(lacks_layers(&engine, &state), expected, "{asked:?} {offloaded:?} of {total:?}");
        }
    }
}
