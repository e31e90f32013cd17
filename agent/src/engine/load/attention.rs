//! How attention is computed, and of how many tokens at once.
//!
//! On a CPU llama.cpp's flash attention computes each row of a small step by itself, cell by cell, but passes over the
//! cells of other sequences. Products of whole matrices compute those too, and all of them faster: one stream gets 1.4
//! times as many tokens a second at 512 cells and 2.2 times as many at 8,000, and reads its prompt as fast (llama-bench
//! and bare calls of this version, 125 million weights, Zen 4, 2 threads). So who is alone in the cells gets those. Their
//! memory grows with the cells and with the tokens computed at once, of which few are read as fast as many: the scores of
//! 128 stay in the CPU's caches.

use altiplano_crds::model_deployment::{CacheType, FlashAttention};

use super::MICRO_BATCH;

/// What is known before a context is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    /// What the configuration asks for.
    pub(super) wanted: FlashAttention,
    /// Tokens computed at once, where the configuration says so.
    pub(super) micro_batch: Option<u32>,
    /// Tokens of an image that have to be computed at once.
    pub(super) together: u32,
    /// All of the model is on the CPU.
    pub(super) on_cpu: bool,
    /// Its state is one of keys and values that can be cut anywhere.
    pub(super) plain_state: bool,
    /// Sequences generated at the same time.
    pub(super) parallel: u32,
    /// Types of the keys and of the values.
    pub(super) types: [CacheType; 2],
    /// Attention heads.
    pub(super) heads: u32,
    /// Cells of the largest context.
    pub(super) cells: u32,
    /// Bytes of the weights.
    pub(super) weights: u64,
}

/// Bytes that each token of a micro-batch takes in each head for each cell: its score, and the CPU's copy of it in half
/// precision.
const SCORE_BYTES: u64 = 6;

/// Part of the weights' bytes that scores may take.
const PART: u64 = 8;

/// What they may take beside weights that are smaller than that.
const LEAST: u64 = 128 << 20;

/// Smaller models compute for less time than the further products' operations have to wait for each other: 0.1 to 0.3 ms a
/// step of the toy model.
const SMALLEST: u64 = 32 << 20;

/// Tokens computed at once where nothing else is asked for: the first of these whose scores fit.
const MICRO_BATCHES: [u32; 2] = [128, 64];

/// Flash attention or not, and the tokens computed at once.
pub(super) fn choose(case: &Case) -> (FlashAttention, u32) {
    let Case { wanted, micro_batch, together, .. } = *case;
    let usual = micro_batch.unwrap_or(MICRO_BATCH).max(together);
    let is_alone = case.on_cpu && case.plain_state && case.parallel == 1 && case.types == [CacheType::F16; 2];
    if wanted != FlashAttention::Auto || !is_alone || case.weights < SMALLEST {
        return (wanted, usual);
    }
    let each = u64::from(case.cells).saturating_mul(u64::from(case.heads)).saturating_mul(SCORE_BYTES);
    let fits = (case.weights / PART).max(LEAST) / each.max(1);
    let fitting = |tokens: u32| u64::from(tokens) <= fits;
    let tokens = match micro_batch {
        Some(_) => Some(usual).filter(|&tokens| fitting(tokens)),
        None => MICRO_BATCHES.map(|tokens| tokens.max(together)).into_iter().find(|&tokens| fitting(tokens)),
    };
    tokens.map_or((wanted, usual), |tokens| (FlashAttention::Off, tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alone_on_a_cpu_gets_products_of_matrices() {
        use FlashAttention::{Auto, Off, On};

        // Eight billion weights in four bits.
        let case = Case {
            wanted: Auto,
            micro_batch: None,
            together: 0,
            on_cpu: true,
            plain_state: true,
            parallel: 1,
            types: [CacheType::F16; 2],
            heads: 32,
            cells: 8192,
            weights: 4_700_000_000,
        };
        let cases = [
            ("alone", case, (Off, 128)),
            ("a large one", Case { cells: 32_768, ..case }, (Off, 64)),
            ("scores would take too much", Case { cells: 131_072, ..case }, (Auto, 512)),
            ("few weights", Case { heads: 12, cells: 16_384, weights: 67 << 20, ..case }, (Off, 64)),
            ("hardly any", Case { weights: 1 << 20, ..case }, (Auto, 512)),
            ("beside others", Case { parallel: 2, ..case }, (Auto, 512)),
            ("on a GPU", Case { on_cpu: false, ..case }, (Auto, 512)),
            ("a window", Case { plain_state: false, ..case }, (Auto, 512)),
            ("quantized values", Case { types: [CacheType::F16, CacheType::Q8_0], ..case }, (Auto, 512)),
            ("asked for", Case { wanted: On, ..case }, (On, 512)),
            ("asked not to", Case { wanted: Off, cells: 131_072, ..case }, (Off, 512)),
            ("so many at once as asked for", Case { micro_batch: Some(256), ..case }, (Off, 256)),
            ("if that fits", Case { micro_batch: Some(512), ..case }, (Auto, 512)),
            ("an image", Case { together: 350, ..case }, (Off, 350)),
            ("a large image", Case { together: 1024, ..case }, (Auto, 1024)),
            ("no heads", Case { heads: 0, ..case }, (Off, 128)),
        ];
        for (name, case, expected) in cases {
            assert_eq!(choose(&case), expected, "{name}");
        }
    }
}
