//! Pure: which tokens the next step computes.
//!
//! First one token of every sequence that generates, then pieces of prompts within a budget, the oldest prompt first:
//! a long prompt must not hold up those who read along. When nobody generates the budget is the whole batch.

use std::time::Duration;

/// A sequence, the oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    /// Tokens that are not in the KV cache yet: 1 generates, more is a prompt.
    pub(super) todo: u32,
    /// Its reader is behind.
    pub(super) parked: bool,
}

/// What a step may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Tokens.
    pub(super) batch: u32,
    /// Rows with logits.
    pub(super) outputs: u32,
    /// Tokens of prompts beside those who generate.
    pub(super) prefill: u32,
}

/// Tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Index of the lane.
    pub(super) lane: usize,
    /// Tokens.
    pub(super) count: u32,
    /// The last token's logits are needed.
    pub(super) output: bool,
}

/// Pieces of prompts are multiples of this, but for the last.
const GRAIN: u32 = 64;

/// Fills `step` with the next step's chunks; empty when there is nothing to do.
pub(super) fn plan(lanes: &[Lane], limits: Limits, step: &mut Vec<Chunk>) {
    step.clear();
    let mut outputs = 0;
    for (lane, _) in lanes.iter().enumerate().filter(|(_, lane)| lane.todo == 1 && !lane.parked) {
        if outputs == limits.outputs.min(limits.batch) {
            break;
        }
        outputs += 1;
        step.push(Chunk { lane, count: 1, output: true });
    }

    let left = limits.batch - outputs;
    let mut room = if step.is_empty() { left } else { left.min(limits.prefill) };
    for (lane, &Lane { todo, .. }) in lanes.iter().enumerate().filter(|(_, lane)| lane.todo > 1 && !lane.parked) {
        let last = todo <= room;
        if last && outputs == limits.outputs {
            continue;
        }
        let count = if last {
            todo
        } else if room >= GRAIN {
            room / GRAIN * GRAIN
        } else if step.is_empty() {
            room
        } else {
            0
        };
        if count == 0 {
            break;
        }
        room -= count;
        outputs += u32::from(last);
        step.push(Chunk { lane, count, output: last });
    }
}

/// How fast prompts are read here, as measured.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    seconds_per_token: Option<f64>,
}

impl Pace {
    /// Learns from a step of `tokens` tokens. Small steps say little about the cost of a token.
    pub(super) fn observe(&mut self, tokens: u32, elapsed: Duration) {
        if tokens < GRAIN / 2 {
            return;
        }
        let measured = elapsed.as_secs_f64() / f64::from(tokens);
        self.seconds_per_token = Some(match self.seconds_per_token {
            None => measured,
            Some(known) => known + (measured - known) * 0.25,
        });
    }

    /// Tokens of prompts that take about `target`: a multiple of the grain, from one grain to the batch.
    pub(super) fn budget(&self, target: Duration, batch: u32) -> u32 {
        let Some(cost) = self.seconds_per_token else { return (2 * GRAIN).min(batch) };
        let affordable = (target.as_secs_f64() / cost.max(1e-9)).min(f64::from(batch));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and batch")]
        let grains = affordable as u32 / GRAIN;
        (grains.max(1) * GRAIN).min(batch)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, lanes, the chunks that are expected.
    type Case<'a> = (&'a str, &'a [i32], &'a [(usize, u32, bool)]);

    fn lanes(todos: &[i32]) -> Vec<Lane> {
        // A negative number is a parked lane.
        todos.iter().map(|todo| Lane { todo: todo.unsigned_abs(), parked: *todo < 0 }).collect()
    }

    #[test]
    fn plans() {
        let limits = Limits { batch: 512, outputs: 8, prefill: 128 };
        let cases: [Case<'_>; 10] = [
            ("nothing", &[], &[]),
            ("all parked", &[-1, -1], &[]),
            ("all generate", &[1, 1, 1], &[(0, 1, true), (1, 1, true), (2, 1, true)]),
            ("one is parked", &[1, -1, 1], &[(0, 1, true), (2, 1, true)]),
            ("a prompt alone takes the batch", &[1000], &[(0, 512, false)]),
            ("its end", &[488], &[(0, 488, true)]),
            ("two prompts", &[300, 300], &[(0, 300, true), (1, 192, false)]),
            ("beside others a prompt takes the budget", &[1, 1000], &[(0, 1, true), (1, 128, false)]),
            ("the oldest prompt first", &[100, 1, 1000], &[(1, 1, true), (0, 100, true)]),
            ("whole grains", &[1, 70, 1000, 50], &[(0, 1, true), (1, 70, true)]),
        ];
        let mut step = Vec::new();
        for (name, todos, expected) in cases {
            plan(&lanes(todos), limits, &mut step);
            let found: Vec<_> = step.iter().map(|chunk| (chunk.lane, chunk.count, chunk.output)).collect();
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn a_small_batch_still_moves() {
        let mut step = Vec::new();
        plan(&lanes(&[100]), Limits { batch: 32, outputs: 4, prefill: 32 }, &mut step);
        assert_eq!(step, [Chunk { lane: 0, count: 32, output: false }]);
    }

    #[test]
    fn the_budget_follows_the_pace() {
        let mut pace = Pace::default();
        let target = Duration::from_millis(100);
        assert_eq!(pace.budget(target, 512), 128);
        pace.observe(1, Duration::from_secs(1));
        assert_eq!(pace.budget(target, 512), 128, "a single token teaches nothing");
        pace.observe(128, Duration::from_millis(287));
        assert_eq!(pace.budget(target, 512), 64, "slow: one grain");
        for _ in 0..50 {
            pace.observe(512, Duration::from_millis(10));
        }
        assert_eq!(pace.budget(target, 512), 512, "fast: the batch");
        assert_eq!(pace.budget(target, 32), 32);
    }

    proptest! {
        #[test]
        fn a_step_is_always_valid(
            todos in proptest::collection::vec(-3i32..1500, 0..40),
            batch in 32u32..600, outputs in 1u32..40, prefill in 1u32..600,
        ) {
            let lanes = lanes(&todos);
            let limits = Limits { batch, outputs, prefill };
            let mut step = Vec::new();
            plan(&lanes, limits, &mut step);
            prop_assert!(step.iter().map(|chunk| chunk.count).sum::<u32>() <= batch);
            prop_assert!(step.iter().filter(|chunk| chunk.output).count() <= outputs as usize);
            let mut seen = std::collections::BTreeSet::new();
            for chunk in &step {
                let lane = lanes[chunk.lane];
                prop_assert!(seen.insert(chunk.lane), "one chunk for each lane");
                prop_assert!(!lane.parked && chunk.count > 0 && chunk.count <= lane.todo);
                prop_assert_eq!(chunk.output, chunk.count == lane.todo);
            }
            let runnable = lanes.iter().any(|lane| lane.todo > 0 && !lane.parked);
            prop_assert_eq!(runnable, !step.is_empty(), "somebody moves while anybody can");
        }
    }
}
