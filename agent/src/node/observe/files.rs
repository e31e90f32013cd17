//! A model's files: where they come from and how far they are.

use std::path::PathBuf;
use std::sync::Arc;

use altiplano_crds::model_deployment::{AdapterSpec, ModelSource, ModelSpec};

use crate::runner::protocol::AdapterFile;
use crate::store::StoredModel;

/// Where a model's files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The model's own file.
    pub model: ModelSource,
    /// Its projector.
    pub projector: Option<ModelSource>,
    /// The smaller model that guesses for it.
    pub draft: Option<ModelSource>,
    /// Its LoRA adapters.
    pub adapters: Vec<AdapterSpec>,
}

impl Sources {
    pub(super) fn of(model: &ModelSpec) -> Self {
        let ModelSpec { source, projector, draft, adapters, .. } = model;
        let (projector, draft, adapters) = (projector.clone(), draft.clone(), adapters.clone());
        Self { model: source.clone(), projector, draft, adapters }
    }
}

/// A model's files, each of them there and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredFiles {
    /// Its own.
    pub model: StoredModel,
    /// Its projector.
    pub projector: Option<PathBuf>,
    /// Of the smaller model that guesses for it.
    pub draft: Option<StoredModel>,
    /// Its adapters, in the order of the spec.
    pub adapters: Vec<AdapterFile>,
}

impl std::ops::Deref for StoredFiles {
    type Target = StoredModel;

    /// What is asked of the files is nearly always asked of the model's own.
    fn deref(&self) -> &StoredModel {
        &self.model
    }
}

/// A model's files.
#[derive(Clone, Debug, PartialEq)]
pub enum FileState {
    /// Nobody has looked.
    Unknown,
    /// On its way.
    Fetching {
        /// As far as is known.
        percent: Option<u8>,
    },
    /// Its header is there, of the rest nothing need be: enough for dry runs.
    Peeked(Arc<StoredFiles>),
    /// There and checked.
    Present(Arc<StoredFiles>),
}

impl FileState {
    /// The files, where at least their headers are there.
    #[must_use]
    pub fn known(&self) -> Option<&Arc<StoredFiles>> {
        match self {
            Self::Present(stored) | Self::Peeked(stored) => Some(stored),
            Self::Unknown | Self::Fetching { .. } => None,
        }
    }
}
