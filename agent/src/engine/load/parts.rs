//! Parts of a model, for devices that have no room for all of it.
//!
//! llama.cpp's own fit (`common_fit_params`) counts what the driver calls free, which is not what the agent's ledger has to
//! give, and leaves out what a projector, a draft model and repacked weights take. So the agent is told what a few parts would
//! take by the same dry run as the whole, and chooses.

use super::super::error::EngineError;
use super::super::ffi::Model;
use super::dry_run;
use crate::runner::protocol::{Part, PartEstimate, RunnerConfig};

/// Sizes of each kind that are tried.
const STEPS: u32 = 8;

/// Largest part first. Of a mixture of experts first the experts of more and more layers stay in host memory, which are most
/// of its bytes and of which a token needs few; then, as of any other model, whole layers. `total` counts the output layer.
pub(super) fn ladder(total: u32, has_experts: bool) -> Vec<Part> {
    let blocks = total.saturating_sub(1);
    // From one of them to all of them.
    let steps = |of: u32| (1..=STEPS.min(of)).map(move |step| (of * step).div_ceil(STEPS.min(of)));
    let experts = steps(blocks).filter(|_| has_experts);
    let expert_layers_on_cpu = if has_experts { blocks } else { 0 };
    let whole = steps(blocks).map(|gone| total - gone);
    let layers = whole.map(|gpu_layers| Part { gpu_layers, expert_layers_on_cpu, layers_total: total });
    experts
        .map(|layers| Part { gpu_layers: total, expert_layers_on_cpu: layers, layers_total: total })
        .chain(layers)
        .collect()
}

/// What the parts of the model would take.
pub(super) fn estimates(config: &RunnerConfig, model: &Model) -> Result<Vec<PartEstimate>, EngineError> {
    let mut parts = Vec::new();
    for part in ladder(model.n_layer() + 1, model.has_experts()) {
        let config = RunnerConfig { parts: false, ..config.clone() }.with_part(part);
        let memory = dry_run(&config)?.0.memory;
        parts.push(PartEstimate { part, memory });
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(total: u32, has_experts: bool) -> String {
        let all = ladder(total, has_experts);
        let one = |part: &Part| format!("{}/{}", part.gpu_layers, part.expert_layers_on_cpu);
        all.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn experts_go_first_then_layers() {
        assert_eq!(shown(33, false), "29/0 25/0 21/0 17/0 13/0 9/0 5/0 1/0");
        assert_eq!(shown(5, false), "4/0 3/0 2/0 1/0");
        assert_eq!(shown(4, true), "4/1 4/2 4/3 3/3 2/3 1/3");
        assert_eq!(shown(2, false), "1/0");
        assert_eq!(shown(1, true), "", "nothing to leave out");
        for total in 1..200 {
            let all = ladder(total, true);
            let key = |part: &Part| (std::cmp::Reverse(part.gpu_layers), part.expert_layers_on_cpu);
            assert!(all.is_sorted_by_key(key), "{all:?}");
            assert!(all.len() <= 16 && all.iter().all(|part| part.gpu_layers > 0), "{all:?}");
        }
    }
}
