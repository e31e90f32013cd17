//! The Kubernetes API of Altiplano (group `altiplano.dev`): types, validation and the YAML generated from them.
//!
//! Two kinds:
//!
//! * [`ModelDeployment`]: what a user applies. The operator reads `spec` and writes `status`.
//! * [`ModelNode`]: the contract between operator and agent, one per node. The operator writes `spec`, the agent on
//!   that node writes `status`, nobody else writes either.
//!
//! No client and no I/O here: operator, agent, tests and the YAML generator share these types and nothing else.

pub mod conditions;
pub mod generate;
pub mod model_deployment;
pub mod model_node;
pub mod names;
pub mod revision;
mod schema;

pub use model_deployment::{ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus};
pub use model_node::{ModelAssignment, ModelNode, ModelNodeSpec, ModelNodeStatus};
