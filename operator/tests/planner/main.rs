//! The planner in worlds made of YAML (`scenarios`) and of chance (`properties`).

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod properties;
mod scenarios;
mod world;
