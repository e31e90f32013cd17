//! The agent: one binary, its roles by subcommand. This library holds its rooms, so that tests can use them.

pub mod api;
pub mod engine;
pub mod front;
pub mod metrics;
pub mod runner;
pub mod store;
