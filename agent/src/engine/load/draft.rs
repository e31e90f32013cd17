//! The draft model: loaded beside the model, on the same devices, with a context of as many cells.

use altiplano_crds::model_deployment::CacheType;

use super::{Context, ContextParams, EngineError, Model, ModelParams, Plan, classify, context_failed, ffi, granted};
use crate::engine::speculative::Kind;
use crate::runner::protocol::{MemoryUse, RunnerConfig};

/// A model that guesses for another.
pub(in crate::engine) struct LoadedDraft {
    pub(in crate::engine) model: Model,
    pub(in crate::engine) context: Context,
    pub(in crate::engine) params: ContextParams,
}

/// Loads the draft model, where the plan has one, and decodes once with it.
pub(super) fn load(
    config: &RunnerConfig,
    target: &Model,
    plan: &Plan,
    params: &ContextParams,
) -> Result<Option<LoadedDraft>, EngineError> {
    let Some(mut draft) = open(config, target, plan, params, false)? else { return Ok(None) };
    if super::warm_up(&draft.model, &mut draft.context, draft.params.offload)? {
        Ok(Some(draft))
    } else {
        Err(EngineError::DraftUnfit(STATE.to_owned()))
    }
}

/// What [`load`] would take, without reading weights.
pub(super) fn estimate(
    config: &RunnerConfig,
    target: &Model,
    plan: &Plan,
    params: &ContextParams,
) -> Result<Vec<MemoryUse>, EngineError> {
    let draft = open(config, target, plan, params, true)?;
    Ok(draft.map(|draft| draft.context.memory()).unwrap_or_default())
}

/// Why a recurrent model cannot guess.
const STATE: &str = "its state cannot be cut, so that wrong guesses could not be taken back";

fn open(
    config: &RunnerConfig,
    target: &Model,
    plan: &Plan,
    params: &ContextParams,
    dry_run: bool,
) -> Result<Option<LoadedDraft>, EngineError> {
    let settings = plan.speculative.filter(|settings| settings.kind == Kind::Draft);
    let Some((path, _)) = config.draft_path.as_ref().zip(settings) else { return Ok(None) };
    let devices = granted(config, &ffi::devices().map_err(EngineError::Internal)?)?;
    let offload = !devices.is_empty();
    // All of it: it is small, and every token waits for it.
    let model = ModelParams { path, devices, gpu_layers: None, experts_on_cpu: false, dry_run };
    let model = Model::load(&model, |_| {}).map_err(|message| classify(&path.display().to_string(), message))?;
    let unfit = model.unsupported().map(str::to_owned).or_else(|| target.vocabulary_differs(&model));
    if let Some(reason) = unfit.or_else(|| model.is_recurrent().then(|| STATE.to_owned())) {
        return Err(EngineError::DraftUnfit(reason));
    }
    // llama.cpp's own types for a draft's cache; it reads along in one pool, whatever the model's layout is.
    let params = ContextParams {
        unified: true,
        outputs: params.sequences,
        offload,
        key_type: CacheType::F16,
        value_type: CacheType::F16,
        ..params.clone()
    };
    let context = Context::new(&model, &params).map_err(context_failed)?;
    Ok(Some(LoadedDraft { model, context, params }))
}
