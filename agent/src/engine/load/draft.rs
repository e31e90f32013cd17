//! The draft model: loaded beside the model, on the same devices, with a context of as many cells. Or the model's own head,
//! which has such a context too.

use altiplano_crds::model_deployment::CacheType;

use super::{
    Batch, Context, ContextParams, EngineError, Model, ModelParams, Part, Plan, classify, context_failed, ffi, granted,
};
use crate::engine::speculative::Kind;
use crate::runner::protocol::{MemoryUse, RunnerConfig};

/// A model that guesses for another, or its head.
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
    if draft.params.part == Part::Head {
        warm_up_head(&mut draft)?;
        return Ok(Some(draft));
    }
    if super::warm_up(&draft.model, &mut draft.context, draft.params.offload.then_some(u32::MAX))? {
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
    if plan.speculative.is_some_and(|settings| settings.kind == Kind::Mtp) {
        return open_head(target, params).map(Some);
    }
    let settings = plan.speculative.filter(|settings| settings.kind == Kind::Draft);
    let Some((path, _)) = config.draft_path.as_ref().zip(settings) else { return Ok(None) };
    let devices = granted(config, &ffi::devices().map_err(EngineError::Internal)?)?;
    let offload = !devices.is_empty();
    // All of it: it is small, and every token waits for it.
    let model = ModelParams { path, devices, gpu_layers: None, experts_on_cpu: 0, dry_run, head: false };
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
        rollback: 0,
        part: Part::Model,
        ..params.clone()
    };
    let context = Context::new(&model, &params).map_err(context_failed)?;
    Ok(Some(LoadedDraft { model, context, params }))
}

/// The model's own head: its weights are among the model's.
fn open_head(target: &Model, params: &ContextParams) -> Result<LoadedDraft, EngineError> {
    let params = ContextParams {
        unified: true,
        outputs: params.sequences,
        key_type: CacheType::F16,
        value_type: CacheType::F16,
        rollback: 0,
        part: Part::Head,
        ..params.clone()
    };
    let context = Context::new(target, &params).map_err(context_failed)?;
    Ok(LoadedDraft { model: target.clone(), context, params })
}

/// Computes once, and takes away again, as guesses are.
fn warm_up_head(head: &mut LoadedDraft) -> Result<(), EngineError> {
    let LoadedDraft { model, context, params } = head;
    let count = if params.offload { context.micro_batch().min(context.cells() / 2) } else { 2 }.max(2);
    if params.offload {
        // Behind a full pool where there can be one, as the model.
        context.fill(0, context.cells() - count);
    }
    let token = model.bos().unwrap_or(0);
    let mut batch = Batch::new(count);
    for position in 1..=count {
        batch.add(token, i32::try_from(position).unwrap_or(i32::MAX), 0, position == count);
    }
    let states = vec![0.0; count as usize * model.embedding_width() as usize];
    let computed = context.decode_head(&mut batch, &states);
    computed.map_err(|error| EngineError::DecodeFailed(format!("the model's head: {error:?}")))?;
    if !context.remove(0, 2) {
        return Err(EngineError::DraftUnfit(STATE.to_owned()));
    }
    context.clear();
    Ok(())
}
