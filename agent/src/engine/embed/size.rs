//! Pure: how large the context is, and what a larger one would take.

use altiplano_crds::model_deployment::{ContextSizing, ContextSpec, FlashAttention};

use crate::engine::sizing;
use crate::runner::protocol::MemoryUse;

/// Host bytes of the outputs of a usual call: llama.cpp keeps room for logits of every token of an encoder.
const OUTPUT_BYTES: u64 = 256 << 20;

/// Tokens of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// That a call has room for at first.
    pub(super) initial: u32,
    /// That texts are packed together to, at most.
    pub(super) usual: u32,
    /// Of one text, at most.
    pub(super) max: u32,
}

impl Sizes {
    /// Sizes for a model that takes texts of `max` tokens. `micro_batch` tokens are computed at once, `batch` are usual in a
    /// call, and each of them takes `output_bytes` for its output where every token has one.
    pub(super) fn new(context: &ContextSpec, max: u32, micro_batch: u32, batch: u32, output_bytes: u64) -> Self {
        let most = u32::try_from(OUTPUT_BYTES / output_bytes.max(1)).unwrap_or(u32::MAX).max(64);
        let usual = batch.min(most).min(max);
        let initial = match context.sizing {
            ContextSizing::Fixed => max,
            ContextSizing::Dynamic => usual.max(micro_batch).min(max),
        };
        Self { initial, usual, max }
    }

    /// Room for a text of `length` tokens.
    pub(super) fn grown(&self, length: u32) -> u32 {
        sizing::rung(length).min(self.max).max(length)
    }
}

/// Bytes that a context of `to` tokens takes on a device beyond one of `from` tokens, outputs left out. The mask, and
/// without flash attention the scores, grow with the square.
pub(super) fn growth(used: &MemoryUse, from: u32, to: u32, flash_attention: FlashAttention) -> u64 {
    let (from, to) = (u64::from(from.max(1)), u64::from(to));
    let scaled = |bytes: u64| bytes.div_ceil(from).saturating_mul(to);
    let compute = match flash_attention {
        FlashAttention::Off => used.compute_bytes.div_ceil(from).saturating_mul(to).div_ceil(from).saturating_mul(to),
        // A mask in single and one in half precision.
        FlashAttention::Auto | FlashAttention::On => scaled(used.compute_bytes).saturating_add(6 * to * to),
    };
    scaled(used.context_bytes).saturating_add(compute).saturating_sub(used.context_bytes + used.compute_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_spec_and_the_vocabulary() {
        let dynamic = ContextSpec::default();
        let fixed = ContextSpec { sizing: ContextSizing::Fixed, ..ContextSpec::default() };
        let cases = [
            // spec, max, micro-batch, batch, bytes of an output, initial, usual
            (&dynamic, 8192, 512, 512, 120_000, 512, 512),
            (&dynamic, 256, 512, 512, 120_000, 256, 256),
            (&dynamic, 8192, 512, 2048, 120_000, 2048, 2048),
            (&dynamic, 8192, 512, 512, 1_000_000, 512, 268),
            (&dynamic, 8192, 512, 512, u64::MAX, 512, 64),
            (&fixed, 8192, 512, 512, 120_000, 8192, 512),
        ];
        for (spec, max, micro_batch, batch, output_bytes, initial, usual) in cases {
            let sizes = Sizes::new(spec, max, micro_batch, batch, output_bytes);
            assert_eq!(sizes, Sizes { initial, usual, max }, "{max} {batch} {output_bytes}");
        }
        let sizes = Sizes::new(&dynamic, 5000, 512, 512, 120_000);
        assert_eq!([513, 700, 4097, 5000].map(|length| sizes.grown(length)), [768, 768, 5000, 5000]);
    }

    #[test]
    fn growth_is_the_difference() {
        let used = MemoryUse { context_bytes: 512_000, compute_bytes: 5_120_000, ..MemoryUse::default() };
        let more = growth(&used, 512, 1024, FlashAttention::Auto);
        assert_eq!(more, 512_000 + 5_120_000 + 6 * 1024 * 1024);
        assert_eq!(growth(&used, 512, 1024, FlashAttention::Off), 512_000 + 3 * 5_120_000);
        assert_eq!(growth(&MemoryUse::default(), 512, 512, FlashAttention::Off), 0);
    }
}
