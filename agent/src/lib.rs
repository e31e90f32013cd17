//! The agent: one binary, its roles by subcommand. This library holds its rooms, so that tests can use them.

pub mod api;
pub mod cgroup;
pub mod client;
pub mod devices;
pub mod engine;
pub mod front;
pub mod lease;
pub mod ledger;
pub mod metrics;
pub mod node;
mod nvml;
pub mod runner;
pub mod serve;
pub mod setup;
pub mod store;
