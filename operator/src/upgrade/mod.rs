//! The upgrade of the agents: when their DaemonSet's template has changed (`updateStrategy: OnDelete`), one node at a time
//! its models move where there is room, running requests end, the Pod goes, and the next node waits until the new agent
//! serves.
//!
//! What has been decided stands in `ModelNode.spec.upgrade`, so that another leader goes on where this one was. Nothing
//! here places models: the fleet's planner moves them off a node that is marked, as it does from others that are to be
//! left.

pub mod observe;
pub mod plan;
pub mod status;
