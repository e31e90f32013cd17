//! What the agent measures: models, devices, workers, and its own listeners.

use std::time::Duration;

use http::StatusCode;
use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use super::{LOAD_SECONDS_BUCKETS, code_class};
use crate::cgroup::GroupMemory;

/// State of a model, as `altiplano_model_state{state}` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "ModelNode's states, documented there")]
pub enum ModelState {
    Pending,
    Fetching,
    Loading,
    Ready,
    Unloaded,
    Draining,
    Failed,
}

impl ModelState {
    /// Every state.
    pub const ALL: [Self; 7] =
        [Self::Pending, Self::Fetching, Self::Loading, Self::Ready, Self::Unloaded, Self::Draining, Self::Failed];

    fn label(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Fetching => "Fetching",
            Self::Loading => "Loading",
            Self::Ready => "Ready",
            Self::Unloaded => "Unloaded",
            Self::Draining => "Draining",
            Self::Failed => "Failed",
        }
    }
}

/// The metrics of one agent. Every setter is cheap and may be called from anywhere.
pub struct AgentMetrics {
    registry: Registry,
    state: IntGaugeVec,
    predicted: GaugeVec,
    measured: GaugeVec,
    memory_error: GaugeVec,
    restarts: IntCounterVec,
    load: HistogramVec,
    wakes: IntCounterVec,
    evictions: IntCounterVec,
    room_wait: HistogramVec,
    answers: IntCounterVec,
    retries: IntCounterVec,
    device_total: GaugeVec,
    device_reserved: GaugeVec,
    device_foreign: GaugeVec,
    host_limit: Gauge,
    host_used: Gauge,
    host_stalled: Gauge,
    connections: IntGauge,
    buffered: Gauge,
    scrape_failures: IntCounter,
}

const MODEL: [&str; 2] = ["namespace", "model_name"];

impl AgentMetrics {
    /// Makes the registry. `version` is the agent's.
    pub fn new(version: &str) -> Result<Self, prometheus::Error> {
        let registry = Registry::new_custom(Some("altiplano".to_owned()), None)?;
        let opts = |name: &str, help: &str| Opts::new(name, help);
        let with = |more: &[&'static str]| -> Vec<&str> { MODEL.iter().chain(more).copied().collect() };
        let info = IntGaugeVec::new(opts("agent_info", "The agent; always 1."), &["version"])?;
        info.with_label_values(&[version]).set(1);
        registry.register(Box::new(info))?;
        let metrics = Self {
            state: IntGaugeVec::new(opts("model_state", "1 for the state that the model is in."), &with(&["state"]))?,
            predicted: GaugeVec::new(
                opts("model_memory_predicted_bytes", "Bytes that the model was expected to take on a device."),
                &with(&["device"]),
            )?,
            measured: GaugeVec::new(
                opts("model_memory_measured_bytes", "Bytes that the model takes on a device, measured after warm-up."),
                &with(&["device"]),
            )?,
            memory_error: GaugeVec::new(
                opts(
                    "model_memory_error_bytes",
                    "Bytes measured on a device less those predicted, as they were when the model had been loaded.",
                ),
                &with(&["device"]),
            )?,
            restarts: IntCounterVec::new(opts("worker_restarts_total", "Workers that ended by themselves."), &MODEL)?,
            load: HistogramVec::new(
                HistogramOpts::new("model_load_seconds", "Seconds from a worker's start to Ready.")
                    .buckets(LOAD_SECONDS_BUCKETS.to_vec()),
                &MODEL,
            )?,
            wakes: IntCounterVec::new(opts("model_wakes_total", "Loads that a waiting request asked for."), &MODEL)?,
            evictions: IntCounterVec::new(
                opts("model_evictions_total", "Times the model was unloaded because another needed the memory."),
                &MODEL,
            )?,
            room_wait: HistogramVec::new(
                HistogramOpts::new(
                    "model_room_wait_seconds",
                    "Seconds from the first request that waits for an unloaded model to the start of its load.",
                )
                .buckets(LOAD_SECONDS_BUCKETS.to_vec()),
                &MODEL,
            )?,
            answers: IntCounterVec::new(
                opts("agent_http_requests_total", "Requests that the agent answered or passed on, by class of code."),
                &with(&["code"]),
            )?,
            retries: IntCounterVec::new(
                opts("agent_http_retries_total", "Requests sent again because the worker ended before it answered."),
                &MODEL,
            )?,
            device_total: GaugeVec::new(opts("device_memory_bytes", "Bytes that a device has."), &["device"])?,
            device_reserved: GaugeVec::new(
                opts("device_memory_reserved_bytes", "Bytes that the ledger has given away on a device."),
                &["device"],
            )?,
            device_foreign: GaugeVec::new(
                opts(
                    "device_memory_foreign_bytes",
                    "Bytes of a device that are in use, by its driver's last word, and that no worker of this agent holds.",
                ),
                &["device"],
            )?,
            host_limit: Gauge::new(
                "host_memory_limit_bytes",
                "Bytes that the tightest of the agent's control groups may take; 0 without a limit.",
            )?,
            host_used: Gauge::new(
                "host_memory_used_bytes",
                "Bytes that this group takes and the kernel cannot take back by itself.",
            )?,
            host_stalled: Gauge::new(
                "host_memory_stalled_ratio",
                "Share of the last ten seconds in which none of the group's processes got on for want of memory.",
            )?,
            connections: IntGauge::new("agent_connections", "Connections that clients hold open to the agent.")?,
            buffered: Gauge::new("agent_buffered_bytes", "Bytes of request bodies that the agent holds.")?,
            scrape_failures: IntCounter::new(
                "worker_scrape_failures_total",
                "Workers that did not answer /metrics in time and are missing from one exposition.",
            )?,
            registry,
        };
        metrics.register()?;
        Ok(metrics)
    }

    fn register(&self) -> Result<(), prometheus::Error> {
        let all: [Box<dyn Collector>; 20] = [
            Box::new(self.state.clone()),
            Box::new(self.predicted.clone()),
            Box::new(self.measured.clone()),
            Box::new(self.restarts.clone()),
            Box::new(self.load.clone()),
            Box::new(self.wakes.clone()),
            Box::new(self.evictions.clone()),
            Box::new(self.room_wait.clone()),
            Box::new(self.answers.clone()),
            Box::new(self.retries.clone()),
            Box::new(self.device_total.clone()),
            Box::new(self.device_reserved.clone()),
            Box::new(self.device_foreign.clone()),
            Box::new(self.host_limit.clone()),
            Box::new(self.host_used.clone()),
            Box::new(self.host_stalled.clone()),
            Box::new(self.memory_error.clone()),
            Box::new(self.connections.clone()),
            Box::new(self.buffered.clone()),
            Box::new(self.scrape_failures.clone()),
        ];
        all.into_iter().try_for_each(|collector| self.registry.register(collector))
    }

    /// Registry, for metrics of other rooms (the node's store, the Kubernetes client).
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The model is in `state` now, and in no other.
    pub fn model_state(&self, namespace: &str, name: &str, state: ModelState) {
        for each in ModelState::ALL {
            self.state.with_label_values(&[namespace, name, each.label()]).set(i64::from(each == state));
        }
    }

    /// Bytes that the model was expected to take on `device`, and takes as measured; `None`: not known.
    pub fn model_memory(
        &self,
        namespace: &str,
        name: &str,
        device: &str,
        predicted: Option<u64>,
        measured: Option<u64>,
    ) {
        let labels = [namespace, name, device];
        for (gauge, value) in [(&self.predicted, predicted), (&self.measured, measured)] {
            match value {
                Some(bytes) => gauge.with_label_values(&labels).set(float(bytes)),
                // An absent series is the normal case here.
                None => drop(gauge.remove_label_values(&labels)),
            }
        }
    }

    /// A device as the ledger sees it.
    pub fn device_memory(&self, device: &str, total: u64, reserved: u64, foreign: u64) {
        self.device_total.with_label_values(&[device]).set(float(total));
        self.device_reserved.with_label_values(&[device]).set(float(reserved));
        self.device_foreign.with_label_values(&[device]).set(float(foreign));
    }

    /// The tightest of the agent's control groups.
    pub fn host_memory(&self, group: GroupMemory) {
        self.host_limit.set(float(group.limit));
        self.host_used.set(float(group.used));
        self.host_stalled.set(f64::from(group.stalled_percent) / 100.0);
    }

    /// How far the prediction of a model's memory was off on `device`, in bytes; `None`: not known.
    #[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only; bytes are exact up to 8 PiB")]
    pub fn model_memory_error(&self, namespace: &str, name: &str, device: &str, error: Option<i64>) {
        let labels = [namespace, name, device];
        match error {
            Some(bytes) => self.memory_error.with_label_values(&labels).set(bytes as f64),
            // An absent series is the normal case here.
            None => drop(self.memory_error.remove_label_values(&labels)),
        }
    }

    /// A worker ended by itself.
    pub fn worker_restarted(&self, namespace: &str, name: &str) {
        self.restarts.with_label_values(&[namespace, name]).inc();
    }

    /// A worker became Ready after `took`.
    pub fn model_loaded(&self, namespace: &str, name: &str, took: Duration) {
        self.load.with_label_values(&[namespace, name]).observe(took.as_secs_f64());
    }

    /// A request asked for an unloaded model.
    pub fn model_woken(&self, namespace: &str, name: &str) {
        self.wakes.with_label_values(&[namespace, name]).inc();
    }

    /// The model was unloaded because another needed the memory.
    pub fn model_evicted(&self, namespace: &str, name: &str) {
        self.evictions.with_label_values(&[namespace, name]).inc();
    }

    /// A request waited so long until the load of its model began.
    pub fn waited_for_room(&self, namespace: &str, name: &str, waited: Duration) {
        self.room_wait.with_label_values(&[namespace, name]).observe(waited.as_secs_f64());
    }

    /// Removes the series of a model that left this node.
    pub fn forget_model(&self, namespace: &str, name: &str, devices: &[&str]) {
        let model = [namespace, name];
        for state in ModelState::ALL {
            drop(self.state.remove_label_values(&[namespace, name, state.label()]));
        }
        for device in devices {
            self.model_memory(namespace, name, device, None, None);
            self.model_memory_error(namespace, name, device, None);
        }
        for class in ["1xx", "2xx", "3xx", "4xx", "5xx"] {
            drop(self.answers.remove_label_values(&[namespace, name, class]));
        }
        drop(self.restarts.remove_label_values(&model));
        drop(self.load.remove_label_values(&model));
        drop(self.wakes.remove_label_values(&model));
        drop(self.evictions.remove_label_values(&model));
        drop(self.room_wait.remove_label_values(&model));
        drop(self.retries.remove_label_values(&model));
    }

    /// The agent answered a request for the model (both empty: for none in particular).
    pub(crate) fn answered(&self, namespace: &str, name: &str, status: StatusCode) {
        self.answers.with_label_values(&[namespace, name, code_class(status)]).inc();
    }

    pub(crate) fn retried(&self, namespace: &str, name: &str) {
        self.retries.with_label_values(&[namespace, name]).inc();
    }

    pub(crate) fn connections(&self) -> &IntGauge {
        &self.connections
    }

    pub(crate) fn buffered(&self) -> &Gauge {
        &self.buffered
    }

    pub(crate) fn worker_scrape_failed(&self) {
        self.scrape_failures.inc();
    }

    /// The text exposition of the agent's own metrics.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        super::render(&self.registry)
    }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only; bytes are exact up to 8 PiB")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_in_one_state_and_leaves_nothing_behind() {
        let metrics = AgentMetrics::new("1.2.3").unwrap();
        let empty = metrics.render().unwrap();
        metrics.model_state("ml", "toy", ModelState::Loading);
        metrics.model_state("ml", "toy", ModelState::Ready);
        metrics.model_memory("ml", "toy", "Vulkan0", Some(100), Some(90));
        metrics.model_memory_error("ml", "toy", "Vulkan0", Some(-10));
        metrics.model_loaded("ml", "toy", Duration::from_millis(700));
        metrics.worker_restarted("ml", "toy");
        metrics.model_woken("ml", "toy");
        metrics.model_evicted("ml", "toy");
        metrics.waited_for_room("ml", "toy", Duration::from_secs(3));
        metrics.answered("ml", "toy", StatusCode::NOT_FOUND);
        metrics.retried("ml", "toy");
        let text = metrics.render().unwrap();
        let states: Vec<_> =
            text.lines().filter(|line| line.starts_with("altiplano_model_state") && line.ends_with(" 1")).collect();
        assert_eq!(states, [r#"altiplano_model_state{model_name="toy",namespace="ml",state="Ready"} 1"#]);
        assert!(
            text.contains(
                r#"altiplano_model_memory_measured_bytes{device="Vulkan0",model_name="toy",namespace="ml"} 90"#
            ),
            "{text}"
        );
        metrics.forget_model("ml", "toy", &["Vulkan0"]);
        assert_eq!(metrics.render().unwrap(), empty);
    }
}
