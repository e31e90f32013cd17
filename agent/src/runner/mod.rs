//! Workers: one process per loaded model.
//!
//! [`spawn`] starts the agent's own binary as `runner` and asks short questions of it; [`supervise`] watches a worker
//! until it has ended. What must not happen here: a worker that outlives the agent, a line without a bound, an end that
//! nobody notices.

pub mod child;
mod lines;
mod log;
pub mod protocol;
pub mod spawn;
pub mod supervise;

pub(crate) use lines::next_line;
