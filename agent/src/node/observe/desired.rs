//! What should be on this node, as its ModelNode says.

use std::collections::BTreeSet;
use std::sync::Arc;

use altiplano_crds::model_node::{AgentUpgrade, ModelAssignment, ModelNodeSpec, RawAssignment, UnsupportedAssignment};

/// What should be on this node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// metadata.generation of the ModelNode that says so.
    pub generation: Option<i64>,
    /// The models, in its order.
    pub entries: Vec<Entry>,
    /// The Pod whose agent is to be replaced.
    pub upgrade: Option<AgentUpgrade>,
}

/// One model that should be on this node.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// As this build understands it.
    Model(Arc<ModelAssignment>),
    /// One that this build cannot read. What it named goes on as it was.
    Unsupported(UnsupportedAssignment),
}

impl Desired {
    /// What a ModelNode says.
    #[must_use]
    pub fn of(generation: Option<i64>, spec: &ModelNodeSpec) -> Self {
        Self { upgrade: spec.upgrade.clone(), ..Self::new(generation, &spec.models) }
    }

    /// Whether the agent in that Pod is to serve nothing any more, until this is taken back.
    #[must_use]
    pub fn drains(&self, pod_uid: &str) -> bool {
        self.upgrade.as_ref().is_some_and(|upgrade| upgrade.drain && upgrade.pod_uid == pod_uid)
    }

    /// Reads the entries one by one. Of two with the same uid the first counts.
    #[must_use]
    pub fn new(generation: Option<i64>, raw: &[RawAssignment]) -> Self {
        let mut seen = BTreeSet::new();
        let parse = |entry: &RawAssignment| match entry.parse() {
            Ok(assignment) => Entry::Model(Arc::new(assignment)),
            Err(unsupported) => Entry::Unsupported(unsupported),
        };
        let entries = raw.iter().map(parse).filter(|entry| seen.insert(entry.uid().to_owned())).collect();
        Self { generation, entries, upgrade: None }
    }
}

impl Entry {
    /// Uid of the ModelDeployment.
    #[must_use]
    pub fn uid(&self) -> &str {
        match self {
            Self::Model(assignment) => &assignment.uid,
            Self::Unsupported(unsupported) => &unsupported.uid,
        }
    }
}
