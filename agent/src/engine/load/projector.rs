//! The projector: what reads images and sound, loaded beside the model.

use std::hash::{BuildHasher, Hasher, RandomState};

use super::{EngineError, classify};
use crate::engine::ffi::{Encoder, Model, Projector, ProjectorNeeds, ProjectorParams};
use crate::runner::protocol::RunnerConfig;

/// How the projector is loaded: on the first of the devices that the model is on.
fn projector_params(config: &RunnerConfig, gpu: bool) -> Option<ProjectorParams<'_>> {
    let device = config.devices.iter().find(|name| *name != "CPU").filter(|_| gpu);
    Some(ProjectorParams {
        path: config.projector.as_deref()?,
        device: device.map(String::as_str),
        // As many as the model's context has: OpenMP makes its helpers anew whenever their number changes.
        threads: config.threads,
        flash_attention: config.engine.flash_attention,
    })
}

pub(super) fn projector_needs(config: &RunnerConfig, gpu: bool) -> Result<ProjectorNeeds, EngineError> {
    let Some(params) = projector_params(config, gpu) else { return Ok(ProjectorNeeds::default()) };
    params.needs().map_err(|message| projector_failed(&params, &message))
}

pub(super) fn load_projector(
    config: &RunnerConfig,
    model: &Model,
    gpu: bool,
    together: u32,
) -> Result<Option<(Projector, Encoder)>, EngineError> {
    let Some(params) = projector_params(config, gpu) else { return Ok(None) };
    // Clients see it in rendered prompts, but it is another one each time.
    let marker = format!("<__media_{:016x}__>", RandomState::new().build_hasher().finish());
    let loaded = Projector::load(model, &params, marker, together);
    loaded.map(Some).map_err(|message| projector_failed(&params, &message))
}

fn projector_failed(params: &ProjectorParams<'_>, message: &str) -> EngineError {
    classify(&params.path.display().to_string(), format!("the projector: {message}"))
}
