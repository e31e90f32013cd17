//! The harness of Altiplano's tests: a real control plane on this machine, real programs under the chart's rights, and
//! waits that say what they saw.
//!
//! * [`ControlPlane`]: etcd, kube-apiserver and kube-controller-manager on free loopback ports. One per test binary
//!   ([`ControlPlane::shared`]), or one's own where a test stops or damages it.
//! * [`Proc`]: a program with its log, its signals and its end. Whatever a test starts ends with the test, also when the
//!   test is killed: see [`sandbox`].
//! * [`Operator`], [`Agent`]: the built programs with the tokens of pods that the API server knows, never an
//!   administrator's.
//! * [`wait_for`]: the only way to wait. Its error says what was there instead.
//!
//! Nothing here is skipped when something is missing: it fails and says which command brings it.

mod audit;
mod chart;
mod chat;
mod control_plane;
mod identity;
mod kubelet;
mod pki;
mod ports;
mod process;
mod programs;
pub mod report;
pub mod sandbox;
pub mod scenario;
pub mod server_suite;
mod wait;

pub use audit::Write;
pub use chart::{CRDS, NAMESPACE, RELEASE, render_chart, run_helm};
pub use chat::{Answer, ask, chat, content, http};
pub use control_plane::ControlPlane;
pub use identity::PodIdentity;
pub use kubelet::{Kubelet, Life};
pub use ports::free_address;
pub use process::Proc;
pub use programs::{Agent, AgentOptions, Operator, is_worker, program, reachable, workers_of};
pub use wait::wait_for;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// The Python interpreter that has the official clients.
pub fn python() -> Result<PathBuf> {
    xtask::python().context("the Python clients are not installed: run `cargo xtask setup`")
}

/// The Node.js that runs the JavaScript clients.
pub fn node() -> Result<PathBuf> {
    xtask::node().map(|(node, _)| node).context("the JavaScript clients are not installed: run `cargo xtask setup`")
}

/// The folder of the JavaScript packages with the official clients.
pub fn node_modules() -> Result<PathBuf> {
    xtask::node_modules().context("the JavaScript clients are not installed: run `cargo xtask setup`")
}

/// Helm.
pub fn helm() -> Result<PathBuf> {
    xtask::helm().context("Helm is not built: run `cargo xtask setup`")
}

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    xtask::repository()
}
