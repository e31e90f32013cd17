//! Pure: how large the context is, and when a smaller one will do.

use std::time::{Duration, Instant};

use altiplano_crds::model_deployment::{ContextSizing, ContextSpec};

use crate::engine::sizing;

/// Host bytes of the outputs of a usual call: llama.cpp keeps room for logits of every token of an encoder.
const OUTPUT_BYTES: u64 = 256 << 20;

/// A context that was larger than needed for all of this time shrinks. In the crate's own tests not for so long.
pub(super) const CALM: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 60 });

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

    /// Room for a text of `length` tokens, and for those that are a little longer.
    pub(super) fn rung(&self, length: u32) -> u32 {
        sizing::rung(length).min(self.max).max(length)
    }
}

/// The longest call of late.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lately {
    since: Instant,
    longest: u32,
}

impl Lately {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, longest: 0 }
    }

    /// A call has so many tokens.
    pub(super) fn call(&mut self, tokens: u32) {
        self.longest = self.longest.max(tokens);
    }

    /// When it is to be looked at next.
    pub(super) fn next_look(&self) -> Instant {
        self.since + CALM
    }

    /// The size to which a context of `capacity` tokens shrinks, if it does; then the time begins anew.
    pub(super) fn shrunk(&mut self, sizes: &Sizes, capacity: u32, now: Instant) -> Option<u32> {
        if now < self.next_look() {
            return None;
        }
        let needed = sizes.initial.max(sizes.rung(self.longest));
        *self = Self::new(now);
        (needed < capacity).then_some(needed)
    }
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
        assert_eq!([513, 700, 4097, 5000].map(|length| sizes.rung(length)), [768, 768, 5000, 5000]);
    }

    #[test]
    fn a_context_shrinks_when_nothing_long_came_for_a_while() {
        let sizes = Sizes { initial: 512, usual: 512, max: 8192 };
        let start = Instant::now();
        let later = |times: u32| start + CALM * times;
        let mut lately = Lately::new(start);
        lately.call(3000);
        assert_eq!(lately.shrunk(&sizes, 3072, later(0)), None, "not at once");
        assert_eq!(lately.shrunk(&sizes, 3072, later(1)), None, "it was needed in this time");
        lately.call(700);
        assert_eq!(lately.shrunk(&sizes, 3072, later(2)), Some(768), "to what is needed");
        assert_eq!(lately.shrunk(&sizes, 768, later(3)), Some(512), "not below the first size");
        assert_eq!(lately.shrunk(&sizes, 512, later(4)), None);
        lately.call(3000);
        assert_eq!(lately.shrunk(&sizes, 3072, later(5)), None);
    }
}
