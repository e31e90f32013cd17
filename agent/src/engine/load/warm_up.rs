//! What is computed before a model is Ready, so that it has taken the memory that it will take.

use super::{Batch, Context, DecodeError, EngineError, Model, Plan};
#[cfg(test)]
use super::{RunnerConfig, new_context, open, plan};

/// Cells that a warm-up reads where the CPU attends to some of the layers: there attention takes as long as all else.
const DEPTH_WITH_CPU: u32 = 16_384;

/// Tokens of a warm-up that reads a full pool with flash attention: what a driver takes for that grows with the cells, no more
/// with the tokens; from 64 on Vulkan unpacks quantized keys and values.
const DEEP_TOKENS: u32 = 64;

/// Cells that a GPU's warm-up reads at most. Of a deep pool the CPU's part takes longer than all else.
pub(super) fn depth(plan: &Plan) -> u32 {
    if plan.layers_offloaded < plan.layers_total { DEPTH_WITH_CPU } else { u32::MAX }
}

/// Computes, and cuts. A GPU takes memory when it computes for the first time, and more the deeper it reads: so it computes a
/// whole micro-batch, and behind a full pool. A CPU does not, and two tokens bring the first weights into memory.
/// `gpu`: cells that are read at most, where there is one. Returns whether the sequence could be cut.
pub(super) fn warm_up(model: &Model, context: &mut Context, gpu: Option<u32>) -> Result<bool, EngineError> {
    let Some(most) = gpu else { return compute(context, micro_batch(model, 1, 2, 0)) };
    let tokens = tokens(context);
    let deep = if context.plain_attention() { tokens } else { tokens.min(DEEP_TOKENS) };
    if deep < tokens {
        compute(context, micro_batch(model, 1, tokens, 0))?;
    }
    let last = last_micro_batch(model, context, deep, most);
    compute(context, last)
}

/// Tokens that are computed at once: a micro-batch, unless the pool is hardly larger.
fn tokens(context: &Context) -> u32 {
    context.micro_batch().min(context.sequence_cells() / 2)
}

/// Returns whether the first sequence could be cut behind its first position, and clears the context.
fn compute(context: &mut Context, mut batch: Batch) -> Result<bool, EngineError> {
    context.decode(&mut batch).map_err(|error| match error {
        DecodeError::NoSlot => EngineError::DecodeFailed("no room for the warm-up".to_owned()),
        DecodeError::Invalid(message) => EngineError::DecodeFailed(message),
        DecodeError::Failed(message) => EngineError::while_computing(message),
    })?;
    let can_cut = context.remove(0, 1);
    context.clear();
    Ok(can_cut)
}

/// So many tokens for the last of all cells, or of the first `most`, when the others are taken; where no others can be, for
/// the pool's beginning.
fn last_micro_batch(model: &Model, context: &mut Context, tokens: u32, most: u32) -> Batch {
    let (lanes, cells) = (context.lanes(), context.sequence_cells().min(most));
    let each = (tokens / lanes).min(cells / 2).max(1);
    let sequences = 0..i32::try_from(lanes).unwrap_or(1);
    if sequences.clone().all(|sequence| context.fill(sequence, cells - each)) {
        return micro_batch(model, lanes, each, 1);
    }
    context.clear();
    micro_batch(model, 1, tokens, 0)
}

/// How a GPU's warm-up leaves the pool: cells up to the last one taken and cells in all, of each sequence that has its own.
#[cfg(test)]
pub(in crate::engine) fn warmed_up(config: &RunnerConfig, most: u32) -> Result<Vec<(u32, u32)>, EngineError> {
    let (model, gpu) = open(config, &|_| {})?;
    let (_, params) = plan(config, &model, gpu, 0)?;
    let mut context = new_context(&model, &params)?;
    let tokens = tokens(&context);
    let mut batch = last_micro_batch(&model, &mut context, tokens, most);
    context.decode(&mut batch).map_err(|error| EngineError::DecodeFailed(format!("{error:?}")))?;
    let sequences = 0..i32::try_from(context.lanes()).unwrap_or(1);
    let filled = sequences.map(|sequence| (context.depth(sequence), context.sequence_cells())).collect();
    context.clear();
    warm_up(&model, &mut context, Some(most))?;
    Ok(filled)
}

/// So many tokens of each of the first sequences, from a position on.
fn micro_batch(model: &Model, sequences: u32, tokens: u32, from: u32) -> Batch {
    let token = model.bos().unwrap_or(0);
    let mut batch = Batch::new(sequences * tokens);
    for sequence in 0..sequences {
        for index in 0..tokens {
            let [position, sequence] = [from + index, sequence].map(|number| i32::try_from(number).unwrap_or(i32::MAX));
            batch.add(token, position, sequence, index == 0);
        }
    }
    batch
}
