//! Pure: how large the context should be.
//!
//! The pool of cells is shared by all sequences. It starts with room for one request and grows with what runs, along
//! a ladder of sizes, so that a conversation does not resize it at every turn.

use std::time::{Duration, Instant};

use altiplano_crds::model_deployment::{ContextSizing, ContextSpec};

/// llama.cpp pads a context to a multiple of this.
pub(super) const CELLS_STEP: u32 = 256;

/// What the configuration and the model allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Cells to begin with.
    pub(super) initial: u32,
    /// Cells at most.
    pub(super) cap: u32,
    /// Tokens aimed for with each request at least.
    pub(super) min_tokens: u32,
    /// Tokens of one request at most.
    pub(super) max_tokens: u32,
}

impl Limits {
    /// Limits for a model that was trained with `trained` tokens.
    pub(super) fn new(context: &ContextSpec, trained: u32) -> Self {
        let positive = |value: Option<i32>| value.and_then(|value| u32::try_from(value).ok());
        let parallel = u32::try_from(context.parallel).unwrap_or(1).max(1);
        // A model that does not say what it was trained with gets llama.cpp's smallest common size.
        let trained = if trained == 0 { 2048 } else { trained };
        let max_tokens = positive(context.max_tokens).unwrap_or(trained).max(1);
        let min_tokens = positive(context.min_tokens).unwrap_or(4096).min(max_tokens);
        let (initial, cap) = match context.sizing {
            // Each sequence may have a part of its own.
            ContextSizing::Fixed => {
                let all = pad(max_tokens).saturating_mul(parallel);
                (all, all)
            }
            ContextSizing::Dynamic => {
                let cap = pad(max_tokens.saturating_mul(parallel));
                (rung(min_tokens).min(cap), cap)
            }
        };
        Self { initial, cap, min_tokens, max_tokens }
    }

    /// Tokens to aim for with a request of `prompt` tokens that may generate `generate` more. `aim` is the client's own
    /// wish (`num_ctx`), which stands for all but the request itself.
    pub(super) fn need(&self, prompt: u32, generate: Option<u32>, aim: Option<u32>) -> u32 {
        let asked = prompt.saturating_add(generate.unwrap_or(0).min(1024));
        let doubled = 1024 * prompt.saturating_mul(2).div_ceil(1024);
        aim.unwrap_or(self.min_tokens.max(doubled)).max(asked).min(self.max_tokens)
    }
}

/// The next multiple of [`CELLS_STEP`].
pub(super) fn pad(cells: u32) -> u32 {
    cells.div_ceil(CELLS_STEP).saturating_mul(CELLS_STEP).max(CELLS_STEP)
}

/// The smallest size of the ladder with at least `cells`: powers of two from 256 on, and the middles between them.
pub(super) fn rung(cells: u32) -> u32 {
    let power = cells.max(CELLS_STEP).checked_next_power_of_two().unwrap_or(1 << 31);
    let middle = power / 4 * 3;
    if middle >= cells && middle.is_multiple_of(CELLS_STEP) { middle } else { power }
}

/// The next smaller size of the ladder; 0 below the smallest.
fn below(cells: u32) -> u32 {
    let power = (cells / 2 + cells % 2).checked_next_power_of_two().unwrap_or(1 << 31);
    let middle = power / 2 * 3;
    match () {
        () if cells <= CELLS_STEP => 0,
        () if middle < cells && middle.is_multiple_of(CELLS_STEP) => middle,
        () => power,
    }
}

/// Cells that may be asked for: after a context of `refused` cells could not be had lately, only smaller ones, but what
/// is needed to go on (`hard`) if that is less.
pub(super) fn ceiling(cap: u32, refused: Option<u32>, hard: u32) -> u32 {
    let Some(refused) = refused else { return cap };
    let needed = Some(pad(hard)).filter(|&needed| needed < refused).unwrap_or(0);
    below(refused).max(needed).min(cap)
}

/// What the sequences take and want, the one to be admitted counted, in cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Demand {
    /// Without these somebody cannot go on.
    pub(super) hard: u32,
    /// Aimed for.
    pub(super) aim: u32,
}

/// What to do about a demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sizing {
    /// There is room (kept prefixes may have to go).
    Fits,
    /// A larger context; if that fails and `hard` fits, go on without.
    Grow {
        /// Cells of the new context.
        to: u32,
    },
    /// No room: wait for others to end.
    Wait,
}

/// Decides for a pool of `cells`. `calm` says that the last growth is long enough ago for one that is only wished for.
pub(super) fn decide(cells: u32, cap: u32, demand: Demand, calm: bool) -> Sizing {
    let Demand { hard, aim } = demand;
    if aim <= cells {
        return Sizing::Fits;
    }
    let to = rung(aim).min(cap);
    if to > cells && to >= hard && (calm || hard > cells) {
        return Sizing::Grow { to };
    }
    if hard <= cells { Sizing::Fits } else { Sizing::Wait }
}

/// What becomes of a request that wants to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// It begins.
    Begin,
    /// It begins; a larger context is made beside it when nobody waits for a first token, or at once where that cannot be
    /// and nobody runs.
    Wish {
        /// Cells of the new context.
        to: u32,
    },
    /// A larger context first, then the same question again.
    Grow {
        /// Cells of the new context.
        to: u32,
    },
    /// It waits for others to end.
    Wait,
    /// There is not enough and nobody will make room.
    Fail,
}

/// Judges a request by the demand with it. `cap`: what may be asked for now; `may_resize`: no change of size is under
/// way; `alone`: nobody else runs or could leave memory.
pub(super) fn admit(cells: u32, cap: u32, demand: Demand, calm: bool, may_resize: bool, alone: bool) -> Admission {
    match decide(cells, cap, demand, calm) {
        Sizing::Fits => Admission::Begin,
        Sizing::Grow { to } if may_resize && demand.hard <= cells => Admission::Wish { to },
        Sizing::Grow { to } if may_resize => Admission::Grow { to },
        Sizing::Grow { .. } if demand.hard <= cells => Admission::Begin,
        // What is being made may do for it.
        Sizing::Grow { .. } | Sizing::Wait if alone && may_resize => Admission::Fail,
        Sizing::Grow { .. } | Sizing::Wait => Admission::Wait,
    }
}

/// Cells of a context to make beside the running one before anybody needs it: somebody would not find the next
/// [`CELLS_STEP`] cells, or, where `wishes` count, what is aimed for.
pub(super) fn anticipate(cells: u32, cap: u32, demand: Demand, wishes: bool) -> Option<u32> {
    let Demand { hard, aim } = demand;
    let to = rung(aim.max(hard)).min(cap);
    ((hard > cells || wishes && aim > cells) && to > cells).then_some(to)
}

/// What stands against a step that finds no cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pressure {
    pub(super) cells: u32,
    /// Cells that may be asked for now.
    pub(super) cap: u32,
    /// Cells that the running sequences aim for.
    pub(super) aim: u32,
    /// Finished sequences still have cells.
    pub(super) kept: bool,
    /// A context is being made.
    pub(super) preparing: bool,
    /// What was refused lately is held by others, who may leave it.
    pub(super) passing: bool,
    /// Running sequences with cells.
    pub(super) holders: usize,
}

/// What is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relief {
    /// The kept sequence that was of no use for longest goes.
    DropKept,
    /// The context that is being made is waited for.
    AwaitContext,
    /// A larger context, now.
    Grow {
        /// Cells of the new context.
        to: u32,
    },
    /// The youngest gives its cells to the others: the oldest can always finish. The only one gives them back and waits
    /// for memory: so no two models wait for each other's.
    Preempt,
    /// The only one there is wants more than there is.
    Fail,
}

/// The cheapest measure that is left.
pub(super) fn relieve(pressure: Pressure) -> Relief {
    let Pressure { cells, cap, aim, kept, preparing, passing, holders } = pressure;
    if kept {
        Relief::DropKept
    } else if preparing {
        Relief::AwaitContext
    } else if cells < cap {
        Relief::Grow { to: rung(aim.max(cells + CELLS_STEP)).min(cap) }
    } else if holders > 1 || passing {
        Relief::Preempt
    } else {
        Relief::Fail
    }
}

/// When which size was last needed. The ladder bounds how many there are.
#[derive(Clone, Debug, Default)]
pub(super) struct Needs {
    last: Vec<(u32, Instant)>,
}

impl Needs {
    /// A context of `cells` cells is needed now.
    pub(super) fn see(&mut self, cells: u32, now: Instant) {
        match self.last.iter_mut().find(|(known, _)| *known == cells) {
            Some((_, last)) => *last = now,
            None => self.last.push((cells, now)),
        }
    }

    /// The largest size that was needed in the time before `now`.
    pub(super) fn largest(&mut self, now: Instant, time: Duration) -> Option<u32> {
        self.last.retain(|(_, last)| now.saturating_duration_since(*last) < time);
        self.last.iter().map(|(cells, _)| *cells).max()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn admits() {
        let cases = [
            // cells, cap, hard, aim, calm, may resize, alone, admission
            (4096, 8192, 300, 4096, true, true, true, Admission::Begin),
            (4096, 8192, 300, 5000, true, true, false, Admission::Wish { to: 6144 }),
            (4096, 8192, 300, 5000, true, false, false, Admission::Begin),
            (4096, 8192, 300, 5000, false, true, false, Admission::Begin),
            (4096, 8192, 5000, 5000, false, true, true, Admission::Grow { to: 6144 }),
            (4096, 8192, 5000, 5000, false, false, false, Admission::Wait),
            (4096, 8192, 5000, 5000, false, false, true, Admission::Wait),
            (8192, 8192, 9000, 9000, true, false, true, Admission::Wait),
            (8192, 8192, 9000, 9000, true, true, false, Admission::Wait),
            (8192, 8192, 9000, 9000, true, true, true, Admission::Fail),
        ];
        for (cells, cap, hard, aim, calm, may_resize, alone, expected) in cases {
            let found = admit(cells, cap, Demand { hard, aim }, calm, may_resize, alone);
            assert_eq!(found, expected, "{cells} {cap} {hard} {aim} {calm} {may_resize} {alone}");
        }
    }

    #[test]
    fn relieves_by_the_cheapest_measure() {
        let full =
            Pressure { cells: 1024, cap: 1024, aim: 3000, kept: false, preparing: false, passing: false, holders: 2 };
        let cases = [
            (Pressure { kept: true, preparing: true, cap: 4096, ..full }, Relief::DropKept),
            (Pressure { preparing: true, cap: 4096, ..full }, Relief::AwaitContext),
            (Pressure { cap: 4096, ..full }, Relief::Grow { to: 3072 }),
            (Pressure { cap: 4096, aim: 900, ..full }, Relief::Grow { to: 1536 }),
            (full, Relief::Preempt),
            (Pressure { holders: 1, ..full }, Relief::Fail),
            (Pressure { holders: 1, passing: true, ..full }, Relief::Preempt),
        ];
        for (pressure, expected) in cases {
            assert_eq!(relieve(pressure), expected, "{pressure:?}");
        }
    }

    #[test]
    fn growth_is_anticipated() {
        let cases = [
            // cells, cap, hard, aim, wishes, to
            (1024, 4096, 1024, 2000, false, None),
            (1024, 4096, 1024, 2000, true, Some(2048)),
            (1024, 4096, 1000, 1024, true, None),
            (1024, 4096, 1025, 1025, false, Some(1536)),
            (1024, 4096, 1025, 2000, false, Some(2048)),
            (1024, 1280, 1025, 2000, false, Some(1280)),
            (1024, 1024, 1100, 2000, true, None),
        ];
        for (cells, cap, hard, aim, wishes, expected) in cases {
            let found = anticipate(cells, cap, Demand { hard, aim }, wishes);
            assert_eq!(found, expected, "{cells} {cap} {hard} {aim} {wishes}");
        }
    }

    #[test]
    fn sizes_are_remembered_for_a_while() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let minute = Duration::from_mins(1);
        let mut needs = Needs::default();
        assert_eq!(needs.largest(at(0), minute), None);
        // 8k every half minute among 2k: never smaller.
        for second in 0..300 {
            needs.see(if second % 30 == 0 { 8192 } else { 2048 }, at(second));
            assert_eq!(needs.largest(at(second), minute), Some(8192), "{second}");
        }
        needs.see(4096, at(310));
        assert_eq!(needs.largest(at(329), minute), Some(8192));
        assert_eq!(needs.largest(at(330), minute), Some(4096));
        assert_eq!(needs.last.len(), 2);
        assert_eq!(needs.largest(at(400), minute), None);
    }

    fn limits(min: u32, max: u32) -> Limits {
        Limits { initial: rung(min), cap: 1 << 20, min_tokens: min, max_tokens: max }
    }

    /// need(n, m) = min(max, max(min, 1024·ceil(2n/1024), n + min(m, 1024)))
    #[test]
    fn need_follows_the_formula() {
        let cases = [
            // min, max, prompt, generate, need
            (4096, 131_072, 1, None, 4096),
            (4096, 131_072, 2000, None, 4096),
            (4096, 131_072, 2048, None, 4096),
            (4096, 131_072, 2049, None, 5120),
            (4096, 131_072, 10_000, None, 20_480),
            (4096, 131_072, 10_000, Some(4000), 20_480),
            (256, 131_072, 100, Some(1), 1024),
            (256, 131_072, 512, Some(900), 1412),
            (256, 131_072, 512, Some(90_000), 1536),
            (4096, 8192, 7000, Some(500), 8192),
            (4096, 8192, 8191, None, 8192),
        ];
        for (min, max, prompt, generate, expected) in cases {
            assert_eq!(
                limits(min, max).need(prompt, generate, None),
                expected,
                "need({prompt}, {generate:?}) in {min}..{max}"
            );
        }
    }

    #[test]
    fn a_clients_aim_stands_for_the_formula() {
        let cases = [
            // prompt, generate, aim, need
            (10, None, 512, 512),
            (10, None, 16_384, 8192),
            (700, Some(100), 512, 800),
            (700, Some(90_000), 512, 1724),
            (10, None, 0, 10),
        ];
        for (prompt, generate, aim, expected) in cases {
            let need = limits(4096, 8192).need(prompt, generate, Some(aim));
            assert_eq!(need, expected, "need({prompt}, {generate:?}, {aim})");
        }
    }

    #[test]
    fn limits_come_from_the_spec() {
        let spec = |sizing, min_tokens, max_tokens, parallel| ContextSpec {
            sizing,
            min_tokens,
            max_tokens,
            parallel,
            ..ContextSpec::default()
        };
        let cases = [
            // spec, trained, initial, cap, min, max
            (spec(ContextSizing::Dynamic, None, None, 4), 131_072, 4096, 524_288, 4096, 131_072),
            (spec(ContextSizing::Dynamic, None, None, 4), 2048, 2048, 8192, 2048, 2048),
            (spec(ContextSizing::Dynamic, Some(300), Some(1000), 2), 2048, 512, 2048, 300, 1000),
            (spec(ContextSizing::Fixed, None, Some(8192), 4), 131_072, 32_768, 32_768, 4096, 8192),
            (spec(ContextSizing::Dynamic, None, None, 1), 0, 2048, 2048, 2048, 2048),
        ];
        for (spec, trained, initial, cap, min_tokens, max_tokens) in cases {
            let expected = Limits { initial, cap, min_tokens, max_tokens };
            assert_eq!(Limits::new(&spec, trained), expected, "{spec:?} {trained}");
        }
    }

    #[test]
    fn the_ladder() {
        let rungs: Vec<u32> = [1, 256, 257, 512, 600, 768, 769, 1025, 3000, 4096, 4097, 100_000].map(rung).to_vec();
        assert_eq!(rungs, [256, 256, 512, 512, 768, 768, 1024, 1536, 3072, 4096, 6144, 131_072]);
    }

    #[test]
    fn what_was_refused_is_not_asked_for_again() {
        let belows: Vec<u32> = [256, 257, 512, 513, 768, 769, 1024, 1025, 1536, 2048, 6144, 8192].map(below).to_vec();
        assert_eq!(belows, [0, 256, 256, 512, 512, 768, 768, 1024, 1024, 1536, 4096, 6144]);
        let cases = [
            // cap, refused, hard, ceiling
            (8192, None, 300, 8192),
            (8192, Some(6144), 300, 4096),
            (8192, Some(6144), 5000, 5120),
            (8192, Some(5120), 5000, 4096),
            (3000, Some(6144), 5000, 3000),
        ];
        for (cap, refused, hard, expected) in cases {
            assert_eq!(ceiling(cap, refused, hard), expected, "{cap} {refused:?} {hard}");
        }
    }

    #[test]
    fn decides() {
        let cases = [
            // cells, cap, hard, aim, calm, decision
            (4096, 16_384, 300, 4096, true, Sizing::Fits),
            (4096, 16_384, 600, 8192, true, Sizing::Grow { to: 8192 }),
            (4096, 16_384, 600, 8192, false, Sizing::Fits),
            (4096, 16_384, 5000, 8192, false, Sizing::Grow { to: 8192 }),
            (4096, 4096, 600, 8192, true, Sizing::Fits),
            (4096, 4096, 5000, 8192, true, Sizing::Wait),
            (4096, 5120, 5000, 8192, false, Sizing::Grow { to: 5120 }),
        ];
        for (cells, cap, hard, aim, calm, expected) in cases {
            assert_eq!(decide(cells, cap, Demand { hard, aim }, calm), expected, "{cells} {cap} {hard} {aim} {calm}");
        }
    }

    proptest! {
        #[test]
        fn growth_is_enough_and_never_too_much(
            cells in 1u32..100, cap in 1u32..1000, hard in 0u32..200_000, more in 0u32..200_000, calm: bool,
        ) {
            let (cells, cap) = (cells * CELLS_STEP, cap * CELLS_STEP);
            match decide(cells, cap, Demand { hard, aim: hard + more }, calm) {
                Sizing::Fits => prop_assert!(hard <= cells),
                Sizing::Grow { to } => {
                    prop_assert!(to > cells && to <= cap && to >= hard);
                    prop_assert_eq!(to % CELLS_STEP, 0);
                }
                Sizing::Wait => prop_assert!(hard > cells.max(cap)),
            }
        }

        #[test]
        fn a_ceiling_is_below_what_was_refused(cap in 1u32..8000, refused in 1u32..8000, hard in 0u32..1_000_000) {
            let (cap, refused) = (cap * CELLS_STEP, refused * CELLS_STEP);
            let found = ceiling(cap, Some(refused), hard);
            prop_assert!(found <= cap && found < refused && found.is_multiple_of(CELLS_STEP));
            prop_assert!(found >= pad(hard).min(cap) || pad(hard) >= refused);
            prop_assert!(rung(below(refused)) == below(refused) || below(refused) == 0);
        }

        #[test]
        fn a_rung_is_enough(cells in 0u32..(1 << 31)) {
            prop_assert!(rung(cells) >= cells);
            prop_assert_eq!(rung(cells) % CELLS_STEP, 0);
            prop_assert!(cells < 512 || u64::from(rung(cells)) <= u64::from(cells) * 2);
        }
    }
}
