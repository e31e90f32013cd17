//! ModelDeployment: one model to be served, on as many nodes as `replicas` says.

mod spec;
mod status;

pub use spec::*;
pub use status::*;
