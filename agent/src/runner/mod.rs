//! Workers: one process per loaded model.
//!
//! [`spawn`] starts the agent's own binary as `runner` and asks short questions of it; [`supervise`] watches a worker
//! until it has ended. Below [`init`] workers outlive an agent whose process dies, and
//! another one takes them over ([`adopt`]). What must not happen here: an orphan that stays, a line without a bound, an end that
//! nobody notices.

pub mod adopt;
pub mod child;
pub mod grants;
pub mod init;
mod lines;
mod log;
mod process;
pub mod protocol;
mod socket;
pub mod spare;
pub mod spawn;
pub mod supervise;

pub(crate) use lines::next_line;
