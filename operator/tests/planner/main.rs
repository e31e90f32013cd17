//! The planner in worlds made of YAML (`scenarios`) and of chance (`properties`).

mod properties;
mod scenarios;
mod world;
