//! From a worker's configuration to a loaded model and its context; the dry run is here too.

mod attention;
mod checks;
mod devices;
mod draft;
mod parts;
mod projector;
mod warm_up;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use altiplano_crds::model_deployment::{ContextSizing, ContextSpec, RopeSpec, SpeculativeType};

use super::capability::{Capability, Cut, Traits};
use super::embed;
use super::error::{EngineError, speaks_of_memory};
use super::ffi::{
    self, Adapter, Batch, Context, ContextParams, DecodeError, Encoder, Model, ModelParams, Part, Projector,
};
use super::host;
use super::sampling::SamplingParams;
use super::sizing::Limits;
use super::speculative::{Kind, Settings};
use super::worker::probe::PROBE_AFTER;
use super::{Ability, ModelFacts};
use crate::cgroup;
use crate::runner::protocol::{AdapterFile, EstimateReport, MemoryUse, RunnerConfig, RunnerReport, WARM_UP_PERCENT};

use checks::{check_any_free, check_books, check_fixed, check_positions, check_reserved};
use devices::granted;
pub(super) use devices::probe;
pub(super) use draft::LoadedDraft;
use projector::{load_projector, projector_needs};
use warm_up::warm_up;
#[cfg(test)]
pub(super) use warm_up::warmed_up;

/// Finished sequences whose cells are kept at most: idle cells slow every step, so few.
const MAX_KEPT: u32 = 4;

/// How long a larger context must have been of no use before it shrinks.
const SHRINK_AFTER: Duration = Duration::from_mins(1);

/// Tokens computed at once unless the configuration says otherwise; llama.cpp's own default.
pub(super) const MICRO_BATCH: u32 = 512;

/// Tokens in one call on a GPU, where a long prompt must not wait for the host between micro-batches.
pub(super) const GPU_BATCH: u32 = 2048;

/// A model that can generate.
pub(super) struct Loaded {
    pub(super) model: Model,
    pub(super) context: Context,
    pub(super) params: ContextParams,
    pub(super) draft: Option<LoadedDraft>,
    pub(super) adapters: Vec<(Adapter, f32)>,
    /// Reads prompts with images or sound.
    pub(super) projector: Option<Projector>,
    /// Computes them.
    pub(super) encoder: Option<Encoder>,
    pub(super) plan: Plan,
    pub(super) facts: ModelFacts,
    pub(super) report: RunnerReport,
}

/// What the configuration means for this model.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Sizes of the context.
    pub(super) limits: Limits,
    /// Sequences generated at the same time.
    pub(super) parallel: u32,
    /// Rows with logits in one step at most.
    pub(super) outputs: u32,
    /// How tokens are guessed, where the model's state can be cut.
    pub(super) speculative: Option<Settings>,
    /// Finished sequences whose cells are kept.
    pub(super) kept: u32,
    /// All sequences share the cells; else each has its own.
    pub(super) unified: bool,
    /// Bytes of states in host memory at most.
    pub(super) host_cache: u64,
    /// How long a larger context must have been of no use before it shrinks.
    pub(super) shrink_after: Duration,
    /// How long nothing was computed before a token is, to see that the GPU answers; `None` without one.
    pub(super) probe_after: Option<Duration>,
    /// What the model's state can do.
    pub(super) capability: Capability,
    /// Layers on a GPU.
    pub(super) layers_offloaded: u32,
    /// Layers in all, the output layer counted.
    pub(super) layers_total: u32,
    /// The first context beside the running one is one that llama.cpp refuses to make.
    #[cfg(test)]
    pub(super) spoils_next: bool,
}

impl Plan {
    /// Whether the CPU computes the attention of most layers.
    pub(super) fn attends_on_cpu(&self) -> bool {
        self.layers_offloaded.saturating_mul(2) < self.layers_total
    }
}

/// Loads the weights; says also whether they are on a GPU. `progress` gets 0 to 100.
pub(super) fn open(config: &RunnerConfig, progress: &dyn Fn(u8)) -> Result<(Model, bool), EngineError> {
    let devices = granted(config, &ffi::devices().map_err(EngineError::Internal)?)?;
    progress(0);
    check_reserved(config)?;
    let gpu = !devices.is_empty();
    let model = load_model(config, devices, false, progress)?;
    progress(WARM_UP_PERCENT);
    if let Some(reason) = model.unsupported() {
        return Err(EngineError::UnsupportedModel(reason.to_owned()));
    }
    Ok((model, gpu))
}

/// Makes the context of a model that generates and decodes once, so that all memory is taken.
pub(super) fn load(config: &RunnerConfig, model: Model, gpu: bool) -> Result<Loaded, EngineError> {
    check_positions(config, &model)?;
    let needs = projector_needs(config, gpu)?;
    let (mut plan, params) = plan(config, &model, gpu, needs.together)?;
    if config.context.sizing == ContextSizing::Fixed {
        check_fixed(config, &plan, &params)?;
    }
    // Before the context, which is planned with the adapters that are there.
    let adapters = load_adapters(config, &model)?;
    let model = model
        .with_adapter_bytes(adapter_bytes(config))
        .with_projector(needs.memory)
        .with_held_bytes(cgroup::held_bytes().unwrap_or(0));
    let (projector, encoder) = load_projector(config, &model, gpu, params.micro_batch)?.unzip();
    let mut context = new_context(&model, &params)?;
    let can_cut = warm_up(&model, &mut context, gpu.then(|| warm_up::depth(&plan)))?;
    if plan.capability.cut != Cut::Nowhere {
        plan.capability = plan.capability.tested(can_cut);
    }
    settle_guessing(&mut plan, context.rollback())?;
    if context.rollback() > 0 && !try_rollback(&model, &mut context)? {
        return Err(EngineError::DecodeFailed("llama.cpp does not take tokens of a state away, as it says".to_owned()));
    }
    let draft = draft::load(config, &model, &plan, &params)?;
    let mut memory = context.memory();
    add(&mut memory, draft.as_ref().map(|draft| draft.context.memory()).unwrap_or_default());
    let report = RunnerReport {
        context_tokens: context.cells(),
        max_tokens: plan.limits.max_tokens,
        parallel: plan.parallel,
        layers_offloaded: plan.layers_offloaded,
        layers_total: plan.layers_total,
        memory,
        load_milliseconds: 0,
        notes: notes(config, &model, &plan),
    };
    if plan.layers_offloaded >= plan.layers_total {
        drop_cache(config);
    }
    let facts = facts(config, &model, plan.limits.max_tokens);
    let names = config.adapters.iter().map(|adapter| adapter.name.clone());
    let sees = projector.as_ref().is_some_and(Projector::sees).then_some(Ability::Vision);
    let hears = projector.as_ref().and_then(Projector::audio_rate).map(|_| Ability::Audio);
    let abilities = [Ability::Completion].into_iter().chain(sees).chain(hears).collect();
    let facts = ModelFacts {
        abilities,
        speculative: plan.speculative.is_some(),
        copied: plan.capability.needs_snapshots(),
        adapters: names.collect(),
        ..facts
    };
    Ok(Loaded { model, context, params, draft, adapters, projector, encoder, plan, facts, report })
}

/// llama.cpp's dry run: what [`load`] would take, without reading weights.
pub(super) fn estimate(config: &RunnerConfig) -> Result<EstimateReport, EngineError> {
    let (mut report, model) = dry_run(config)?;
    if config.parts {
        report.parts = parts::estimates(config, &model)?;
    }
    Ok(report)
}

fn dry_run(config: &RunnerConfig) -> Result<(EstimateReport, Model), EngineError> {
    let devices = granted(config, &ffi::devices().map_err(EngineError::Internal)?)?;
    let gpu = !devices.is_empty();
    let model = load_model(config, devices, true, &|_| {})?;
    if let Some(reason) = model.unsupported() {
        return Err(EngineError::UnsupportedModel(reason.to_owned()));
    }
    if let Some(pooling) = embed::pooling(&model) {
        let model = model.with_held_bytes(cgroup::held_bytes().unwrap_or(0));
        return Ok((embed::estimate(config, &model, pooling, gpu)?, model));
    }
    check_positions(config, &model)?;
    let needs = projector_needs(config, gpu)?;
    let (mut plan, params) = plan(config, &model, gpu, needs.together)?;
    let model = model
        .with_adapter_bytes(adapter_bytes(config))
        .with_projector(needs.memory)
        .with_held_bytes(cgroup::held_bytes().unwrap_or(0));
    check_books(&plan, &params)?;
    let context = new_context(&model, &params)?;
    settle_guessing(&mut plan, context.rollback())?;
    let mut memory = context.memory();
    add(&mut memory, draft::estimate(config, &model, &plan, &params)?);
    let report = EstimateReport {
        memory,
        layers_offloaded: plan.layers_offloaded,
        layers_total: plan.layers_total,
        context_tokens: context.cells(),
        max_tokens: plan.limits.max_tokens,
        parts: Vec::new(),
    };
    drop(context);
    Ok((report, model))
}

/// Weights that are on a device need no copy in the kernel's cache of files, which counts as the container's memory. What
/// is still mapped stays.
fn drop_cache(config: &RunnerConfig) {
    for path in std::iter::once(&config.model_path).chain(&config.draft_path) {
        let dropped = std::fs::File::open(path)
            .and_then(|file| Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?));
        if let Err(error) = dropped {
            tracing::debug!(%error, path = %path.display(), "the kernel keeps the file in its cache");
        }
    }
}

fn load_model(
    config: &RunnerConfig,
    devices: Vec<usize>,
    dry_run: bool,
    progress: &dyn Fn(u8),
) -> Result<Model, EngineError> {
    check_any_free(&devices)?;
    let (sender, percents) = mpsc::sync_channel(128);
    let params = ModelParams {
        path: &config.model_path,
        devices,
        gpu_layers: config.gpu_layers,
        experts_on_cpu: match config.engine.experts_on_cpu {
            Some(true) => u32::MAX,
            _ => config.expert_layers_on_cpu,
        },
        dry_run,
        head: config.engine.speculative.as_ref().is_some_and(|spec| spec.kind == SpeculativeType::Mtp),
    };
    // llama.cpp's callback has to live for ever, the caller's does not: so a thread loads and this one reports.
    let loaded = thread::scope(|scope| {
        let loader = thread::Builder::new().name("load".to_owned()).spawn_scoped(scope, || {
            let mut last = 0;
            Model::load(&params, move |fraction| {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 90")]
                let percent = (fraction.clamp(0.0, 1.0) * f32::from(WARM_UP_PERCENT)) as u8;
                if percent > last {
                    last = percent;
                    // Nobody reads any more: then nobody needs it.
                    let _ = sender.try_send(percent);
                }
            })
        })?;
        // Ends when the loader drops its sender.
        percents.iter().for_each(progress);
        Ok::<_, std::io::Error>(loader.join())
    });
    match loaded {
        Ok(Ok(result)) => result.map_err(|message| classify(&config.model_path.display().to_string(), message)),
        Ok(Err(_)) => Err(EngineError::Internal("the loading thread panicked".to_owned())),
        Err(error) => Err(EngineError::Internal(format!("cannot start a thread: {error}"))),
    }
}

/// `together`: tokens of an image that have to fit into one micro-batch.
fn plan(config: &RunnerConfig, model: &Model, gpu: bool, together: u32) -> Result<(Plan, ContextParams), EngineError> {
    let architecture = model.metadata("general.architecture").unwrap_or_default();
    let key = |name: &str| model.metadata(&format!("{architecture}.{name}"));
    let capability = Capability::of(&Traits {
        recurrent: model.is_recurrent(),
        sliding_window: model.sliding_window(),
        rope_scaling: key("rope.scaling.type"),
        original_context: key("rope.scaling.original_context_length").and_then(|value| value.parse().ok()),
        trained_context: model.trained_context(),
        two_rotations: model.has_tensor("rope_factors_long.weight"),
    });
    let context = &config.context;
    let ContextSpec { parallel, key_cache_type, value_cache_type, ref rope, .. } = *context;
    let parallel = u32::try_from(parallel).unwrap_or(1).clamp(1, 128);
    // Where nobody shares, sequences with cells of their own are faster: a step reads up to the highest cell of a pool.
    // A pool of fixed size has room for that.
    let unified = context.sizing != ContextSizing::Fixed || parallel == 1 || capability.cut != Cut::Anywhere;
    let kept = if unified { parallel.min(MAX_KEPT) } else { parallel };
    let sequences = if unified { parallel + kept } else { parallel };
    let mut limits = Limits::new(&config.context, model.trained_context());
    if model.is_only_recurrent() {
        // The state has one size, so the context is a policy only: nothing is won by growing.
        limits.initial = limits.cap;
    }

    let tokens = |value: Option<i32>| value.and_then(|value| u32::try_from(value).ok());
    let asked = tokens(config.engine.micro_batch_tokens);
    let (flash_attention, micro_batch) = attention::choose(&attention::Case {
        wanted: config.engine.flash_attention,
        micro_batch: asked,
        together,
        on_cpu: !gpu,
        plain_state: capability.cut == Cut::Anywhere,
        parallel,
        types: [key_cache_type, value_cache_type],
        heads: model.n_head(),
        cells: limits.cap,
        weights: model.size_bytes(),
    });
    let batch = if gpu { GPU_BATCH } else { asked.unwrap_or(MICRO_BATCH) };
    let batch = tokens(config.engine.batch_tokens).unwrap_or(batch);
    let speculative = speculative(config, model, capability)?;
    let rollback = match (capability.cut, speculative) {
        (Cut::Nowhere, Some(settings)) => u32::try_from(settings.max).unwrap_or(0),
        _ => 0,
    };
    // Every sequence must find room for a token in a batch, and what is taken away must have come in one.
    let least = sequences.max(rollback + 2);
    let batch = batch.max(least).max(together);
    let micro_batch = micro_batch.clamp(least, batch);

    let (layers_offloaded, layers_total) = layers(config, model, gpu);
    let guesses = speculative.map_or(0, |settings| settings.rows(parallel as usize));
    let outputs = parallel.saturating_add(u32::try_from(guesses).unwrap_or(0)).max(sequences).min(batch);
    let host_cache = host::limit(ffi::available_bytes("CPU"));
    let plan = Plan {
        limits,
        parallel,
        outputs,
        speculative,
        kept,
        unified,
        host_cache,
        shrink_after: SHRINK_AFTER,
        probe_after: (layers_offloaded > 0).then_some(PROBE_AFTER),
        capability,
        layers_offloaded,
        layers_total,
        #[cfg(test)]
        spoils_next: false,
    };
    let params = ContextParams {
        cells: limits.initial,
        batch,
        micro_batch,
        sequences,
        outputs,
        unified,
        threads: config.threads.max(1),
        offload: gpu,
        flash_attention,
        key_type: key_cache_type,
        value_type: value_cache_type,
        rope: rope.clone(),
        rollback,
        part: match speculative {
            Some(Settings { kind: Kind::Mtp, .. }) => Part::ModelForHead,
            _ => Part::Model,
        },
    };
    Ok((plan, params))
}

/// Tokens of a draft where the state is one for all tokens: each takes another copy of every sequence's.
const MAX_ROLLBACK: usize = 4;

/// How tokens are to be guessed; what the context can take back is not known yet.
fn speculative(config: &RunnerConfig, model: &Model, capability: Capability) -> Result<Option<Settings>, EngineError> {
    let invalid = |reason: String| EngineError::InvalidConfig(format!("engine.speculative: {reason}"));
    let settings = Settings::new(config.engine.speculative.as_ref(), config.draft_path.is_some()).map_err(invalid)?;
    let Some(settings) = settings else { return Ok(None) };
    if let Some(reason) = (settings.kind == Kind::Mtp).then(|| model.lacks_head()).flatten() {
        return Err(invalid(format!("type MTP: {reason}")));
    }
    let most = if capability.can_speculate() { usize::MAX } else { MAX_ROLLBACK };
    Ok(Some(settings.at_most(most)))
}

/// Nothing is guessed where it could not be taken away: neither cut from the state, nor from `rollback` copies of it.
fn settle_guessing(plan: &mut Plan, rollback: u32) -> Result<(), EngineError> {
    if plan.capability.can_speculate() || rollback > 0 {
        return Ok(());
    }
    if plan.speculative.take().is_some_and(|settings| settings.kind == Kind::Mtp) {
        let reason = "type MTP: the model's state cannot be cut, so that wrong guesses could not be taken back";
        return Err(EngineError::InvalidConfig(format!("engine.speculative: {reason}")));
    }
    Ok(())
}

/// Whether the last tokens can be taken away from a state that is one for all, and others computed in their place.
fn try_rollback(model: &Model, context: &mut Context) -> Result<bool, EngineError> {
    let token = model.bos().unwrap_or(0);
    let count = context.rollback() + 1;
    let mut batch = Batch::new(count);
    let mut compute = |context: &mut Context, from: u32, to: u32| {
        batch.clear();
        for position in from..to {
            batch.add(token, i32::try_from(position).unwrap_or(i32::MAX), 0, false);
        }
        context.decode(&mut batch).map_err(|error| EngineError::DecodeFailed(format!("{error:?}")))
    };
    compute(context, 0, count)?;
    let did = context.remove(0, 1);
    if did {
        compute(context, 1, 2)?;
    }
    context.clear();
    Ok(did)
}

fn load_adapters(config: &RunnerConfig, model: &Model) -> Result<Vec<(Adapter, f32)>, EngineError> {
    let load = |file: &AdapterFile| {
        let adapter = Adapter::load(model, &file.path)
            .map_err(|message| EngineError::LoadFailed { path: file.path.display().to_string(), message })?;
        let percent = u16::try_from(file.scale_percent).unwrap_or(u16::MAX);
        Ok((adapter, f32::from(percent) / 100.0))
    };
    config.adapters.iter().map(load).collect()
}

/// A file holds little beside the weights.
fn adapter_bytes(config: &RunnerConfig) -> u64 {
    let length = |file: &AdapterFile| std::fs::metadata(&file.path).map_or(0, |metadata| metadata.len());
    config.adapters.iter().map(length).sum()
}

/// Layers on a GPU and in all, the output layer counted.
pub(super) fn layers(config: &RunnerConfig, model: &Model, gpu: bool) -> (u32, u32) {
    let total = model.n_layer() + 1;
    (if gpu { config.gpu_layers.unwrap_or(total).min(total) } else { 0 }, total)
}

fn new_context(model: &Model, params: &ContextParams) -> Result<Context, EngineError> {
    Context::new(model, params).map_err(context_failed)
}

/// Why there is no context, from llama.cpp's words.
pub(super) fn context_failed(message: String) -> EngineError {
    if speaks_of_memory(&message) {
        EngineError::InsufficientMemory(message)
    } else {
        EngineError::ContextFailed(message)
    }
}

/// What the file says. What the model can do is left to the caller.
pub(super) fn facts(config: &RunnerConfig, model: &Model, max_tokens: u32) -> ModelFacts {
    let text = |token: Option<i32>| token.and_then(|token| model.token_text(token)).unwrap_or_default();
    ModelFacts {
        name: model.metadata("general.name"),
        architecture: model.metadata("general.architecture").unwrap_or_default(),
        description: model.description(),
        n_vocab: model.n_vocab(),
        trained_context: model.trained_context(),
        max_tokens,
        embedding_width: model.embedding_width(),
        abilities: Vec::new(),
        speculative: false,
        copied: false,
        adapters: Vec::new(),
        bos: model.bos(),
        bos_text: text(model.bos()),
        eos: model.eos(),
        eos_text: text(model.eos()),
        adds_bos: model.adds_bos(),
        fim: model.fim(),
        vocab_type: model.vocab_type(),
        chat_template: config.chat_template.clone().or_else(|| model.chat_template()),
        sampling: SamplingParams::of_file(|key| model.metadata(key)),
        parameter_count: model.parameter_count(),
        size_bytes: model.size_bytes(),
    }
}

fn notes(config: &RunnerConfig, model: &Model, plan: &Plan) -> Vec<String> {
    let mut notes = Vec::new();
    let trained = model.trained_context();
    if let Some(RopeSpec { factor, original_tokens, .. }) = config.context.rope {
        let positive = |number: i32| u32::try_from(number).unwrap_or(0);
        let stretched = original_tokens.map_or(trained, positive).saturating_mul(positive(factor));
        if plan.limits.max_tokens > stretched && trained > 0 {
            notes.push(format!(
                "maxTokens is {}, but context.rope stretches what the model was trained with to {stretched} tokens; \
                 answers beyond that may be poor",
                plan.limits.max_tokens
            ));
        }
    }
    match plan.capability.cut {
        Cut::Anywhere => {}
        Cut::Window(window) => notes.push(format!(
            "the model's sliding window of {window} tokens can be cut only within it: prompts go on from copies of its \
             state"
        )),
        Cut::Nowhere => {
            notes.push("the model's state cannot be cut: prompts go on from copies of it".to_owned());
        }
    }
    if plan.speculative.is_none() && (config.engine.speculative.is_some() || config.draft_path.is_some()) {
        notes.push(
            "the model's state cannot be cut, so nothing is guessed: engine.speculative has no effect".to_owned(),
        );
    }
    if config.engine.gpu_layers.is_some_and(|layers| i64::from(layers) > i64::from(plan.layers_total)) {
        notes.push(format!("gpuLayers is more than the model's {} layers", plan.layers_total));
    }
    notes
}

/// Adds what another context takes.
pub(super) fn add(memory: &mut Vec<MemoryUse>, more: Vec<MemoryUse>) {
    for use_ in more {
        match memory.iter_mut().find(|known| known.device == use_.device) {
            Some(known) => {
                known.weights_bytes += use_.weights_bytes;
                known.context_bytes += use_.context_bytes;
                known.compute_bytes += use_.compute_bytes;
                known.other_bytes += use_.other_bytes;
                known.mapped_bytes += use_.mapped_bytes;
            }
            None => memory.push(use_),
        }
    }
}

/// Bytes on all devices together.
pub(super) fn total_context_bytes(memory: &[MemoryUse]) -> u64 {
    memory.iter().map(|device| device.context_bytes).sum()
}

/// llama.cpp gives no codes, only words.
fn classify(path: &str, message: String) -> EngineError {
    let path = path.to_owned();
    if message.contains("unknown model architecture") {
        EngineError::UnknownArchitecture { path, message }
    } else if speaks_of_memory(&message) {
        EngineError::InsufficientMemory(format!("loading {path}: {message}"))
    } else {
        EngineError::LoadFailed { path, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_reasons() {
        let cases = [
            ("error loading model architecture: unknown model architecture: 'llama9'", "UnknownArchitecture"),
            ("unable to allocate Vulkan0 buffer", "InsufficientMemory"),
            ("ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 7", "InsufficientMemory"),
            ("invalid magic characters: 'nope', expected 'GGUF'", "LoadFailed"),
        ];
        for (message, reason) in cases {
            assert_eq!(classify("x.gguf", message.to_owned()).reason(), reason, "{message}");
        }
    }
}
