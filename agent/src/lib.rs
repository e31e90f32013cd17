//! The agent: one binary, its roles by subcommand. This library holds its rooms, so that tests can use them.

pub mod engine;
pub mod runner;
