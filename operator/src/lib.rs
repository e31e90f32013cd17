//! The operator: places `ModelDeployment`s on nodes and keeps their Services.
//!
//! One process, one leader, one serial planner over the whole fleet:
//!
//! ```text
//! watch ──► observe ──► plan (pure) ──► children, status, events (pure) ──► apply
//! ```
//!
//! It never touches a device or a model file and never stands in a request's way: with the operator down, everything
//! that serves goes on serving.

pub mod args;
pub mod clock;
pub mod fleet;
pub mod http;
pub mod leader;
pub mod metrics;
pub mod run;
pub mod upgrade;
pub mod watch;
