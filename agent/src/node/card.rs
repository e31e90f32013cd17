//! What the listeners are told of each model, so that they can answer for it without its worker. Pure.

use altiplano_crds::model_deployment::UnloadPolicy;

use super::observe::{Model, Phase};
use super::plan::policy_idle_limit;
use crate::devices::CPU;
use crate::front::{FileCard, ModelCard};

/// The card of a model.
pub(super) fn card(model: &Model) -> ModelCard {
    let file = model.file.known().map(|stored| FileCard {
        header: stored.header.clone(),
        size_bytes: stored.size_bytes,
        sha256: stored.sha256.clone(),
    });
    let is_serving = |phase: Phase| matches!(phase, Phase::Ready { .. });
    let worker = model.workers.values().rfind(|worker| worker.leaving.is_none() && is_serving(worker.phase));
    let memory = worker.map(|worker| if worker.measured.is_empty() { &worker.predicted } else { &worker.measured });
    let bytes = |of: fn(&str) -> bool| {
        memory.into_iter().flatten().filter(|(device, _)| of(device)).map(|(_, bytes)| bytes).sum()
    };
    ModelCard {
        file,
        memory_bytes: bytes(|_| true),
        device_bytes: bytes(|device| device != CPU),
        max_tokens: worker.and_then(|worker| worker.report.as_ref()).map_or(0, |report| report.max_tokens),
        idle_limit: policy_idle_limit(&model.assignment),
        is_pinned: model.assignment.unload.policy == UnloadPolicy::Never,
    }
}
