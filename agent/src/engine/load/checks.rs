//! What is refused before memory is taken for it.

use altiplano_crds::model_deployment::ContextSpec;

use super::devices::granted;
use super::{EngineError, Plan, add, draft, load_model, new_context};
use crate::engine::ffi::{self, ContextParams, Device, DeviceMemory, Model};
use crate::ledger;
use crate::runner::protocol::RunnerConfig;

/// Positions that a model was not trained with give poor answers, or none, unless their rotation is stretched.
pub(super) fn check_positions(config: &RunnerConfig, model: &Model) -> Result<(), EngineError> {
    let ContextSpec { max_tokens, ref rope, .. } = config.context;
    let trained = model.trained_context();
    let asked = max_tokens.and_then(|tokens| u32::try_from(tokens).ok()).unwrap_or(0);
    // A recurrent model has no positions, and some files do not say.
    if asked <= trained || trained == 0 || model.is_only_recurrent() {
        return Ok(());
    }
    let why = match rope {
        Some(_) if model.rotates() => return Ok(()),
        // llama.cpp ends the process when it looks for a position that was not learnt.
        _ if !model.rotates() => "its positions are not rotated, so context.rope cannot stretch them",
        _ => "more than these need context.rope (scaling, factor, originalTokens)",
    };
    Err(EngineError::UnsupportedContext(format!(
        "context.maxTokens is {asked}, but the model was trained with {trained} tokens: {why}"
    )))
}

/// A context of fixed size is there in full or not at all. On a CPU an allocation that is too large does not fail, the
/// kernel ends the process when the memory is touched: so a dry run says before what it takes.
pub(super) fn check_fixed(config: &RunnerConfig, plan: &Plan, params: &ContextParams) -> Result<(), EngineError> {
    check_books(plan, params)?;
    let devices = granted(config, &ffi::devices().map_err(EngineError::Internal)?)?;
    let model = load_model(config, devices, true, &|_| {})?;
    let mut memory = new_context(&model, params)?.memory();
    add(&mut memory, draft::estimate(config, &model, plan, params)?);
    for device in memory {
        check_room(plan, &device.device, device.context_bytes + device.compute_bytes + device.other_bytes)?;
    }
    Ok(())
}

/// What the agent reserved may have been taken by another process meanwhile. Running out of it while computing would end
/// this one.
pub(super) fn check_reserved(config: &RunnerConfig) -> Result<(), EngineError> {
    for (device, &needed) in &config.reserved {
        if let Some(free) = ffi::available_bytes(device).filter(|free| *free < needed) {
            return Err(EngineError::InsufficientMemory(format!(
                "the model needs {} on {device}, where {} are free",
                ledger::bytes(needed),
                ledger::bytes(free)
            )));
        }
    }
    Ok(())
}

/// llama.cpp divides a model among devices by what is free there, and fails without saying why where that is nothing.
pub(super) fn check_any_free(granted: &[usize]) -> Result<(), EngineError> {
    let mut found = ffi::devices().map_err(EngineError::Internal)?;
    found.retain(|device| granted.contains(&device.index));
    let is_full = |device: &Device| matches!(device.open(), DeviceMemory { free: 0, total: 1.., .. });
    if found.is_empty() || !found.iter().all(is_full) {
        return Ok(());
    }
    let names: Vec<String> = found.into_iter().map(|device| device.name).collect();
    Err(EngineError::InsufficientMemory(format!("nothing is free on {}", names.join(" and "))))
}

/// Even a dry run keeps books of the cells, in host memory; a draft model's context has as many.
pub(super) fn check_books(plan: &Plan, params: &ContextParams) -> Result<(), EngineError> {
    let contexts = 1 + u64::from(plan.speculative.is_some_and(|settings| settings.has_context()));
    check_room(plan, "CPU", ffi::cells_metadata(params.cells).saturating_mul(contexts))
}

fn check_room(plan: &Plan, device: &str, needed: u64) -> Result<(), EngineError> {
    match ffi::available_bytes(device) {
        Some(available) if needed > available / 10 * 9 => Err(EngineError::InsufficientMemory(format!(
            "{} tokens for each of {} requests need {needed} bytes on {device}, where {available} are free",
            plan.limits.max_tokens, plan.parallel
        ))),
        _ => Ok(()),
    }
}
