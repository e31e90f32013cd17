//! From a loaded model to a context that makes vectors.

use altiplano_crds::model_deployment::ContextSpec;

use super::size::Sizes;
use crate::cgroup;
use crate::engine::error::EngineError;
use crate::engine::ffi::{ContextParams, DecodeError, EmbeddingContext, Model, Part, Pooling};
use crate::engine::load::{self as common, GPU_BATCH, MICRO_BATCH};
use crate::engine::sizing::Limits;
use crate::engine::{Ability, ModelFacts};
use crate::runner::protocol::{EstimateReport, RunnerConfig, RunnerReport};

/// Texts in one call at most.
const SEQUENCES: u32 = 64;

/// A model that makes vectors or scores.
pub(in crate::engine) struct Loaded {
    pub(in crate::engine) model: Model,
    pub(in crate::engine) facts: ModelFacts,
    pub(in crate::engine) report: RunnerReport,
    pub(in crate::engine) parallel: u32,
    pub(super) context: EmbeddingContext,
    pub(super) params: ContextParams,
    pub(super) pooling: Pooling,
    pub(super) sizes: Sizes,
}

/// Makes the context and computes once, so that all memory is taken.
pub(in crate::engine) fn load(
    config: &RunnerConfig,
    model: Model,
    pooling: Pooling,
    gpu: bool,
) -> Result<Loaded, EngineError> {
    if config.projector.is_some() {
        return Err(EngineError::UnsupportedModel("projectors are for models that generate text".to_owned()));
    }
    if !config.adapters.is_empty() {
        return Err(EngineError::UnsupportedModel("adapters are for models that generate text".to_owned()));
    }
    let model = model.with_held_bytes(cgroup::held_bytes().unwrap_or(0));
    let (sizes, params) = plan(config, &model, pooling, gpu);
    let parallel = u32::try_from(config.context.parallel).unwrap_or(1).clamp(1, 128);
    let mut context = new_context(&model, &params, pooling)?;
    let count = if gpu { sizes.usual } else { sizes.usual.min(2) };
    let warm = vec![model.bos().unwrap_or(0); count.max(1) as usize];
    context.embed(&[warm.as_slice()]).map_err(|error| match error {
        DecodeError::NoSlot => EngineError::DecodeFailed("no room for the warm-up".to_owned()),
        DecodeError::Invalid(message) => EngineError::DecodeFailed(message),
        DecodeError::Failed(message) => EngineError::while_computing(message),
    })?;
    let (layers_offloaded, layers_total) = common::layers(config, &model, gpu);
    let report = RunnerReport {
        context_tokens: context.capacity(),
        max_tokens: sizes.max,
        parallel,
        layers_offloaded,
        layers_total,
        memory: context.memory(),
        load_milliseconds: 0,
        notes: notes(config, sizes.max),
    };
    let ability = if pooling == Pooling::Rank { Ability::Rerank } else { Ability::Embedding };
    let facts = ModelFacts { abilities: vec![ability], ..common::facts(config, &model, sizes.max) };
    Ok(Loaded { model, facts, report, parallel, context, params, pooling, sizes })
}

/// What [`load`] would take, of a model whose weights were not read.
pub(in crate::engine) fn estimate(
    config: &RunnerConfig,
    model: &Model,
    pooling: Pooling,
    gpu: bool,
) -> Result<EstimateReport, EngineError> {
    let (sizes, params) = plan(config, model, pooling, gpu);
    let context = new_context(model, &params, pooling)?;
    let (layers_offloaded, layers_total) = common::layers(config, model, gpu);
    Ok(EstimateReport {
        memory: context.memory(),
        layers_offloaded,
        layers_total,
        context_tokens: context.capacity(),
        max_tokens: sizes.max,
        parts: Vec::new(),
    })
}

fn plan(config: &RunnerConfig, model: &Model, pooling: Pooling, gpu: bool) -> (Sizes, ContextParams) {
    let ContextSpec { key_cache_type, value_cache_type, ref rope, .. } = config.context;
    let trained = model.trained_context();
    let limits = Limits::new(&config.context, trained);
    // Learnt positions end where the training did, so only a stretched rotation goes beyond.
    let max = if rope.is_some() || trained == 0 { limits.max_tokens } else { limits.max_tokens.min(trained) };
    let tokens = |value: Option<i32>| value.and_then(|value| u32::try_from(value).ok()).filter(|&tokens| tokens > 0);
    let micro_batch = tokens(config.engine.micro_batch_tokens).unwrap_or(MICRO_BATCH);
    let batch = tokens(config.engine.batch_tokens).unwrap_or(if gpu { GPU_BATCH } else { micro_batch });
    // Of a causal model only the last tokens have outputs.
    let outputs_all = !(model.is_causal() && matches!(pooling, Pooling::Last | Pooling::Rank));
    let output_bytes =
        if outputs_all { 4 * (u64::from(model.n_vocab()) + u64::from(model.embedding_width())) } else { 1 };
    let sizes = Sizes::new(&config.context, max, micro_batch, batch, output_bytes);
    let sequences = SEQUENCES.min(sizes.initial);
    let params = ContextParams {
        cells: sizes.initial,
        batch: sizes.initial,
        micro_batch: (if outputs_all { sizes.usual } else { micro_batch }).clamp(sequences, sizes.initial),
        sequences,
        outputs: sequences,
        unified: true,
        threads: config.threads.max(1),
        offload: gpu,
        flash_attention: config.engine.flash_attention,
        key_type: key_cache_type,
        value_type: value_cache_type,
        rope: rope.clone(),
        rollback: 0,
        part: Part::Model,
    };
    (sizes, params)
}

fn new_context(model: &Model, params: &ContextParams, pooling: Pooling) -> Result<EmbeddingContext, EngineError> {
    EmbeddingContext::new(model, params, pooling).map_err(common::context_failed)
}

fn notes(config: &RunnerConfig, max_tokens: u32) -> Vec<String> {
    let asked = config.context.max_tokens.and_then(|tokens| u32::try_from(tokens).ok());
    let more = asked.filter(|&asked| asked > max_tokens);
    let note = |asked| format!("maxTokens is {asked}, but the model has positions for {max_tokens} tokens only");
    more.map(note).into_iter().collect()
}
