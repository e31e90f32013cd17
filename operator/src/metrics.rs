//! Metrics of the operator. Labels are kinds, verbs and names of variants: never names of objects.

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramTimer, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};

/// All of them.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    rounds: IntCounter,
    planning: Histogram,
    writes: IntCounterVec,
    errors: IntCounterVec,
    leader: IntGauge,
    epoch: IntGauge,
    watch_age: GaugeVec,
    memory: Gauge,
    agents: IntGauge,
    agents_outdated: IntGauge,
    upgrade_blocked: IntGauge,
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// When two have the same name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new_custom(Some("altiplano_operator".to_owned()), None)?;
        let metrics = Self {
            rounds: IntCounter::new("reconciles_total", "Rounds of planning.")?,
            planning: Histogram::with_opts(
                HistogramOpts::new("planning_seconds", "Seconds from the snapshot of the fleet to the list of writes.")
                    .buckets(prometheus::exponential_buckets(0.000_1, 4.0, 9)?),
            )?,
            writes: IntCounterVec::new(
                Opts::new("api_writes_total", "Writes sent to the API server, without Leases."),
                &["kind", "verb"],
            )?,
            errors: IntCounterVec::new(Opts::new("errors_total", "Errors by what went wrong."), &["reason"])?,
            leader: IntGauge::new("leader", "1 while this process leads, 0 while it stands by.")?,
            epoch: IntGauge::new("epoch", "Term of this process as leader; 0 before the first.")?,
            watch_age: GaugeVec::new(
                Opts::new("watch_age_seconds", "Seconds since a watch has last said anything."),
                &["kind"],
            )?,
            memory: Gauge::new("resident_memory_bytes", "Resident memory of this process.")?,
            agents: IntGauge::new("agents", "Agents that there should be, as the leader sees it.")?,
            agents_outdated: IntGauge::new(
                "agents_outdated",
                "Agents that are not of their DaemonSet's newest revision.",
            )?,
            upgrade_blocked: IntGauge::new(
                "agent_upgrade_blocked",
                "1 while no agent is replaced because a new one does not serve.",
            )?,
            registry,
        };
        let Self { registry, rounds, planning, writes, errors, leader, epoch, watch_age, memory, .. } = &metrics;
        for gauge in [&metrics.agents, &metrics.agents_outdated, &metrics.upgrade_blocked] {
            registry.register(Box::new(gauge.clone()))?;
        }
        registry.register(Box::new(rounds.clone()))?;
        registry.register(Box::new(planning.clone()))?;
        registry.register(Box::new(writes.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(epoch.clone()))?;
        registry.register(Box::new(watch_age.clone()))?;
        registry.register(Box::new(memory.clone()))?;
        Ok(metrics)
    }

    /// A round begins; the timer is observed when it has decided.
    pub fn round(&self) -> HistogramTimer {
        self.rounds.inc();
        self.planning.start_timer()
    }

    /// A write is sent.
    pub fn write(&self, kind: &str, verb: &str) {
        self.writes.with_label_values(&[kind, verb]).inc();
    }

    /// Something went wrong; `reason` is the name of a variant.
    pub fn error(&self, reason: &str) {
        self.errors.with_label_values(&[reason]).inc();
    }

    /// This process leads, in that term.
    pub fn leads(&self, epoch: i64) {
        self.leader.set(1);
        self.epoch.set(epoch);
    }

    /// How far the upgrade of the agents is.
    pub fn agents(&self, updated: usize, all: usize, blocked: bool) {
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.agents.set(count(all));
        self.agents_outdated.set(count(all.saturating_sub(updated)));
        self.upgrade_blocked.set(i64::from(blocked));
    }

    /// Seconds since a watch has last said anything.
    pub fn watch_age(&self, kind: &str, seconds: f64) {
        self.watch_age.with_label_values(&[kind]).set(seconds);
    }

    /// All of them in Prometheus' text format.
    ///
    /// # Errors
    /// When they cannot be written as text.
    pub fn text(&self) -> prometheus::Result<String> {
        if let Some(bytes) = resident_memory() {
            self.memory.set(bytes);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// From the second field of statm, in pages of 4 KiB: a size that all our targets have.
fn resident_memory() -> Option<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u32 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(f64::from(pages) * 4096.0)
}
