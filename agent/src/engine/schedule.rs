//! Pure: which tokens the next step computes.
//!
//! First one token of every sequence that generates, then pieces of prompts, so that both together are the step's size:
//! a long prompt must not hold up those who read along, and steps of one size let llama.cpp use its graph again. On a CPU
//! they take turns instead, step by step: attention there computes 64 rows at once over the cells of all of them, so one
//! who generates would make 63 rows of prompts read its cells too; streams get a twentieth of the time at least. When
//! nobody generates a step is the whole batch. Of several prompts the oldest gets half of what is left and the one with
//! the least to read the other half: none waits for ever, and a short one does not wait for a long one. A step in which
//! a short prompt ends is a short one, so that the others do not hold up its first token.

use std::time::Duration;

/// A sequence, the oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    /// Tokens that are not in the KV cache yet: 1 generates, more is a prompt.
    pub(super) todo: u32,
    /// Of these, how many may be computed before the state has to be looked at; 1 to `todo`.
    pub(super) piece: u32,
    /// It takes no part: its reader is behind, or it waits for the cells of another.
    pub(super) parked: bool,
    /// Tokens guessed to follow the one that it generates from; 0 where it reads a prompt.
    pub(super) draft: u32,
}

/// Who takes part in a step, where both sorts are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Everybody.
    All,
    /// Those that generate.
    Generate,
    /// Those that read prompts.
    Read,
}

/// What a step may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Tokens at most.
    pub(super) batch: u32,
    /// Rows with logits at most.
    pub(super) outputs: u32,
    /// Tokens in a step in which some generate and others read prompts.
    pub(super) mixed: u32,
    /// Tokens of prompts in a step where one can be read to its end: those behind it need not hold up its first token.
    pub(super) early: u32,
    /// Who takes part.
    pub(super) turn: Turn,
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
    /// Guessed tokens behind those; the logits of each are needed.
    pub(super) draft: u32,
}

/// The size of a step in which some generate and others read is a multiple of this.
const GRAIN: u32 = 64;

/// Has those that generate try the tokens that are guessed to follow, as far as there is room: the end of every prompt
/// keeps its output, and reading them half of the batch. Returns how many are tried.
fn guess(lanes: &[Lane], step: &mut [Chunk], batch: u32, outputs: u32, prompts: usize) -> u32 {
    let generating = u32::try_from(step.len()).unwrap_or(u32::MAX);
    let ends = u32::try_from(prompts).unwrap_or(u32::MAX);
    let room = outputs.saturating_sub(ends).min(batch.saturating_sub(generating) / 2);
    let mut guesses = 0;
    for chunk in step {
        chunk.draft = lanes[chunk.lane].draft.min(room - guesses);
        guesses += chunk.draft;
    }
    guesses
}

/// Fills `step` with the next step's chunks, by ascending lanes; empty when there is nothing to do.
pub(super) fn plan(lanes: &[Lane], limits: Limits, step: &mut Vec<Chunk>) {
    step.clear();
    let Limits { batch, outputs, mixed, early, turn } = limits;
    let mut outputs = outputs.min(batch);
    let ready = |todo: fn(u32) -> bool| {
        move |lane: &usize| lanes.get(*lane).is_some_and(|lane| todo(lane.todo) && !lane.parked)
    };
    let mut streams = (0..lanes.len()).filter(ready(|todo| todo == 1)).peekable();
    // The oldest, then by what is left to read; equal ones by age.
    let mut prompts: Vec<usize> = (0..lanes.len()).filter(ready(|todo| todo > 1)).collect();
    prompts.get_mut(1..).unwrap_or_default().sort_by_key(|&lane| lanes[lane].todo);

    let beside_streams = streams.peek().is_some();
    if turn != Turn::Read || prompts.is_empty() {
        for lane in streams {
            if outputs == 0 {
                return;
            }
            outputs -= 1;
            step.push(Chunk { lane, count: 1, output: true, draft: 0 });
        }
    }
    if turn == Turn::Generate && beside_streams {
        prompts.clear();
    }
    let guesses = guess(lanes, step, batch, outputs, prompts.len());
    if prompts.is_empty() {
        return;
    }
    outputs -= guesses;
    let generating = u32::try_from(step.len()).unwrap_or(u32::MAX) + guesses;
    let mut room = if beside_streams {
        // A small batch or many streams still leave a prompt something.
        mixed.saturating_sub(generating).max(GRAIN).min(batch.saturating_sub(generating))
    } else {
        batch
    };
    let shared = prompts.len() > 1 && lanes[prompts[0]].todo > lanes[prompts[1]].todo;
    // The shortest one's share of a step that ends early.
    let reach = if shared { early / 2 } else { early };
    if prompts.len() > 1 && prompts.iter().any(|&lane| lanes[lane].todo <= reach) {
        room = room.min(early);
    }
    let mut grants: Vec<(usize, u32)> = Vec::with_capacity(prompts.len());
    for (place, &lane) in prompts.iter().enumerate() {
        let share = if place == 0 && shared { room.div_ceil(2) } else { room };
        let granted = lanes[lane].piece.min(share);
        grants.push((lane, granted));
        room -= granted;
    }
    // What the others leave goes to the first.
    if let Some((lane, granted)) = grants.first_mut() {
        *granted += (lanes[*lane].piece - *granted).min(room);
    }
    grants.retain(|&(_, granted)| granted > 0);
    for (lane, count) in grants {
        let output = count == lanes[lane].todo;
        if output && outputs == 0 {
            continue;
        }
        outputs -= u32::from(output);
        step.push(Chunk { lane, count, output, draft: 0 });
    }
    step.sort_unstable_by_key(|chunk| chunk.lane);
}

/// A step with pieces of prompts may take this many times as long as one without, or where they take turns those that
/// read as long as those that generate: prompts are then read at some 95 % of full speed.
const STRETCH: f64 = 18.0;

/// Longest step that holds others up: streams by the reading of prompts, unless a bare one takes a quarter of that already,
/// or first tokens by the reading of what is behind them. Shorter ones bring the first of many prompts earlier, and the
/// most of them later: each is followed by a step of those who have begun.
const LONGEST: Duration = Duration::from_millis(500);

/// How fast steps are here, as measured.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// Of a step in which all generate.
    bare: Option<f64>,
    /// Of a token, in steps that read prompts.
    token: Option<f64>,
    /// Seconds of the last step that read prompts.
    last_read: f64,
    /// Seconds of the steps since then, in which all generate.
    since: f64,
}

/// Who is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Crowd {
    /// Sequences that generate.
    pub(super) generating: u32,
    /// Sequences that read prompts, or wait for another's.
    pub(super) reading: u32,
    /// They take turns, because they are computed by a CPU.
    pub(super) apart: bool,
}

impl Pace {
    /// Learns from a step of `tokens` tokens of `sequences` sequences.
    pub(super) fn observe(&mut self, tokens: u32, sequences: u32, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        if tokens == sequences {
            self.since += seconds;
        } else {
            (self.last_read, self.since) = (seconds, 0.0);
        }
        let (known, measured) = if tokens == sequences {
            (&mut self.bare, seconds)
        } else if tokens >= GRAIN / 2 {
            (&mut self.token, seconds / f64::from(tokens))
        } else {
            // Few tokens say little about the cost of one.
            return;
        };
        *known = Some(known.map_or(measured, |known| known + (measured - known) * 0.25));
    }

    /// A step in which all generate and try guesses took so long. It says nothing about one without.
    pub(super) fn generated(&mut self, elapsed: Duration) {
        self.since += elapsed.as_secs_f64();
    }

    /// Whether the last step read prompts.
    pub(super) fn has_read(&self) -> bool {
        self.since == 0.0
    }

    /// Limits of the next step while those of the crowd are there. Its sizes are multiples of the grain, from one to the
    /// batch.
    pub(super) fn limits(&self, batch: u32, outputs: u32, crowd: Crowd) -> Limits {
        let Crowd { generating, reading, apart } = crowd;
        let longest = LONGEST.as_secs_f64();
        // The more wait for their first token, compared with those who read along, the longer a step may take.
        let patience = (f64::from(reading) / f64::from(generating.max(1))).max(1.0);
        let mixed = match self.bare {
            Some(bare) => (bare * STRETCH * patience).min(longest.max(bare * 4.0)),
            None => longest / 4.0,
        };
        let tokens = |seconds: f64| {
            let Some(cost) = self.token else { return (2 * GRAIN).min(batch) };
            let grains = seconds / (cost.max(1e-9) * f64::from(GRAIN));
            // Two grains are read much faster than twice one.
            let grains = if (1.5..2.0).contains(&grains) { 2.0 } else { (grains + 0.2).floor().max(1.0) };
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and batch")]
            let tokens = (grains * f64::from(GRAIN)).min(f64::from(batch)) as u32;
            tokens
        };
        let mut mixed = tokens(mixed);
        let mut turn = Turn::All;
        if apart {
            // Streams get their part of the time in several steps, so a step for prompts need not be short to be fair.
            mixed = mixed.max(2 * GRAIN).min(tokens(longest)).min(batch);
            let is_owed = self.has_read() || self.since * STRETCH * patience < self.last_read;
            turn = if is_owed { Turn::Generate } else { Turn::Read };
        }
        Limits { batch, outputs, mixed, early: tokens(longest), turn }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { batch: 512, outputs: 8, mixed: 128, early: 512, turn: Turn::All };

    /// Name, tokens to compute, and of the step's chunks the lane, the tokens and whether there is an output.
    type Case<'a> = (&'a str, &'a [i32], &'a [(usize, u32, bool)]);

    /// Name, lanes, and of the step's chunks the tokens and the guesses.
    type Guesses<'a> = (&'a str, Vec<Lane>, &'a [(u32, u32)]);

    /// Negative: parked.
    fn lanes(todos: &[i32]) -> Vec<Lane> {
        let lane =
            |&todo: &i32| Lane { todo: todo.unsigned_abs(), piece: todo.unsigned_abs(), parked: todo < 0, draft: 0 };
        todos.iter().map(lane).collect()
    }

    fn planned(lanes: &[Lane], limits: Limits) -> Vec<(usize, u32, bool)> {
        let mut step = Vec::new();
        plan(lanes, limits, &mut step);
        step.iter().map(|chunk| (chunk.lane, chunk.count, chunk.output)).collect()
    }

    #[test]
    fn decodes_first_then_prompts() {
        let cases: &[Case<'_>] = &[
            ("nothing", &[], &[]),
            ("all parked", &[-1, -100, 0], &[]),
            ("decodes", &[1, 1, -1, 1], &[(0, 1, true), (1, 1, true), (3, 1, true)]),
            ("a prompt alone takes the batch", &[2000], &[(0, 512, false)]),
            ("a short prompt is one chunk", &[100], &[(0, 100, true)]),
            ("beside decodes the step is of one size", &[1, 1000, 1], &[(0, 1, true), (1, 126, false), (2, 1, true)]),
            ("its end is shorter", &[1, 70], &[(0, 1, true), (1, 70, true)]),
            ("a short one does not wait", &[5000, 40], &[(0, 472, false), (1, 40, true)]),
            ("half for the oldest", &[5000, 900, 300], &[(0, 256, false), (2, 256, false)]),
            ("the rest for the next", &[5000, 900, 100], &[(0, 256, false), (1, 156, false), (2, 100, true)]),
            ("equal ones by age", &[900, 900, 900], &[(0, 512, false)]),
            ("one size with two prompts", &[1, 90, 300], &[(0, 1, true), (1, 90, true), (2, 37, false)]),
        ];
        for (name, todos, expected) in cases {
            assert_eq!(planned(&lanes(todos), LIMITS), *expected, "{name}");
        }
    }

    #[test]
    fn a_short_prompts_end_comes_early() {
        let limits = Limits { early: 192, ..LIMITS };
        let cases: &[Case<'_>] = &[
            ("alone it is read as ever", &[900], &[(0, 512, false)]),
            ("of equal ones the first", &[50; 8], &[(0, 50, true), (1, 50, true), (2, 50, true), (3, 42, false)]),
            ("the oldest has its half", &[5000, 60, 900], &[(0, 96, false), (1, 60, true), (2, 36, false)]),
            ("not if it takes more", &[5000, 97, 900], &[(0, 256, false), (1, 97, true), (2, 159, false)]),
            ("nor beside streams", &[1, 900, 30], &[(0, 1, true), (1, 97, false), (2, 30, true)]),
        ];
        for (name, todos, expected) in cases {
            assert_eq!(planned(&lanes(todos), limits), *expected, "{name}");
        }
    }

    #[test]
    fn streams_and_prompts_take_turns() {
        use Turn::{Generate, Read};

        let plan = |turn, todos: &[i32]| planned(&lanes(todos), Limits { turn, ..LIMITS });
        let both = [1, 900, 1];
        assert_eq!(plan(Turn::Generate, &both), [(0, 1, true), (2, 1, true)]);
        assert_eq!(plan(Turn::Read, &both), [(1, 128, false)]);
        // A turn that nobody takes is the others'.
        assert_eq!(plan(Turn::Read, &[1, 1]), [(0, 1, true), (1, 1, true)]);
        assert_eq!(plan(Turn::Generate, &[900, -1]), [(0, 512, false)]);

        let mut pace = Pace::default();
        let crowd = Crowd { generating: 2, reading: 1, apart: true };
        let mut next = |tokens, milliseconds| {
            pace.observe(tokens, if tokens == 128 { 1 } else { tokens }, Duration::from_millis(milliseconds));
            pace.limits(512, 8, crowd).turn
        };
        // 10 ms that generate for 150 ms that read, 20 ms for 350; one step at least.
        let turns = [(128, 150), (2, 10), (128, 350), (2, 10), (2, 10), (128, 5), (2, 10)];
        assert_eq!(
            turns.map(|(tokens, time)| next(tokens, time)),
            [Generate, Read, Generate, Generate, Read, Generate, Read]
        );
        let turn = |crowd| pace.limits(512, 8, crowd).turn;
        assert_eq!(turn(Crowd { apart: false, ..crowd }), Turn::All);
        pace.observe(128, 1, Duration::from_millis(700));
        pace.observe(1, 1, Duration::from_millis(10));
        let turn = |reading| pace.limits(512, 8, Crowd { generating: 1, reading, apart: true }).turn;
        assert_eq!((turn(1), turn(7)), (Generate, Read), "who waits with many others waits less");
    }

    #[test]
    fn a_small_batch_still_moves() {
        let small = Limits { batch: 32, outputs: 4, mixed: 32, early: 32, turn: Turn::All };
        assert_eq!(planned(&lanes(&[100]), small), [(0, 32, false)]);
        // Many streams leave a prompt a grain all the same.
        let many = [vec![1; 100], vec![900]].concat();
        let found = planned(&lanes(&many), Limits { outputs: 101, ..LIMITS });
        assert_eq!((found.len(), found[100]), (101, (100, 64, false)));
    }

    #[test]
    fn a_piece_ends_where_the_state_is_looked_at() {
        let border = [
            Lane { todo: 900, piece: 100, parked: false, draft: 0 },
            Lane { todo: 2, piece: 1, parked: false, draft: 0 },
        ];
        assert_eq!(planned(&border, LIMITS), [(0, 100, false), (1, 1, false)]);
    }

    #[test]
    fn guesses_take_what_is_left() {
        let decoding = |draft| Lane { todo: 1, piece: 1, parked: false, draft };
        let prompt = |todo| Lane { todo, piece: todo, parked: false, draft: 0 };
        let cases: [Guesses<'_>; 5] = [
            ("alone", vec![decoding(5)], &[(1, 5)]),
            ("no more than there are outputs", vec![decoding(20)], &[(1, 7)]),
            ("the oldest first", vec![decoding(4), decoding(4)], &[(1, 4), (1, 2)]),
            ("a prompt's end has its output", vec![decoding(9), prompt(40), prompt(90)], &[(1, 5), (40, 0), (82, 0)]),
            ("many streams", vec![decoding(1); 8], &[(1, 0); 8]),
        ];
        for (name, lanes, expected) in cases {
            let mut step = Vec::new();
            plan(&lanes, LIMITS, &mut step);
            let found: Vec<_> = step.iter().map(|chunk| (chunk.count, chunk.draft)).collect();
            assert_eq!(found, expected, "{name}");
        }
        let mut step = Vec::new();
        plan(&[decoding(40), prompt(900)], Limits { batch: 32, outputs: 64, mixed: 32, ..LIMITS }, &mut step);
        assert_eq!(step.iter().map(|chunk| chunk.count + chunk.draft).collect::<Vec<_>>(), [16, 16], "half the batch");
    }

    #[test]
    fn a_step_follows_the_pace() {
        // Sizes of steps with four streams and one prompt, or with none that generates.
        let with = |pace: &Pace, batch, generating, reading| {
            pace.limits(batch, 8, Crowd { generating, reading, apart: false })
        };
        let mixed = |pace: &Pace, batch| with(pace, batch, 4, 1).mixed;
        let early = |pace: &Pace| with(pace, 512, 0, 8).early;
        let mut pace = Pace::default();
        assert_eq!((mixed(&pace, 512), early(&pace)), (128, 128));
        pace.observe(8, 1, Duration::from_secs(1));
        assert_eq!(mixed(&pace, 512), 128, "few tokens teach nothing");
        // As measured: 16 ms bare, 287 ms with 128 tokens of a prompt.
        for _ in 0..20 {
            pace.observe(4, 4, Duration::from_millis(16));
            pace.observe(132, 5, Duration::from_millis(287));
        }
        assert_eq!((mixed(&pace, 512), early(&pace)), (128, 192));
        let crowd = |generating, reading| with(&pace, 512, generating, reading).mixed;
        assert_eq!((crowd(4, 4), crowd(4, 6), crowd(2, 4), crowd(1, 7)), (128, 192, 192, 192), "up to half a second");
        for _ in 0..50 {
            pace.observe(512, 1, Duration::from_millis(50));
        }
        assert_eq!((mixed(&pace, 2048), early(&pace)), (2048, 512), "fast: the batch");
        assert_eq!(mixed(&pace, 32), 32);
        for _ in 0..50 {
            pace.observe(4, 4, Duration::from_secs(1));
            pace.observe(512, 1, Duration::from_secs(20));
        }
        assert_eq!(mixed(&pace, 512), 128, "slow: four bare steps");
        let mut slow = Pace::default();
        slow.observe(64, 2, Duration::from_secs(10));
        assert_eq!(mixed(&slow, 512), 64, "one grain at least");
    }

    /// A lane; its piece ends at `border` if that is not beyond it.
    fn lane() -> impl Strategy<Value = Lane> {
        let todo = prop_oneof![0u32..1500, Just(1)];
        (todo, 1u32..2000, proptest::bool::weighted(0.2), 0u32..65).prop_map(|(todo, border, parked, draft)| Lane {
            todo,
            piece: border.min(todo),
            parked,
            draft: if todo == 1 { draft } else { 0 },
        })
    }

    fn turn() -> impl Strategy<Value = Turn> {
        proptest::sample::select(vec![Turn::All, Turn::Generate, Turn::Read])
    }

    proptest! {
        /// What llama.cpp would answer with an abort never comes: too large a batch, too many outputs, an output that
        /// is none, a sequence twice.
        #[test]
        fn a_step_is_always_valid(
            lanes in proptest::collection::vec(lane(), 0..40),
            batch in 40u32..600, outputs in 1u32..40, mixed in 1u32..600, early in 1u32..600, turn in turn(),
        ) {
            let limits = Limits { batch, outputs, mixed, early, turn };
            let mut step = Vec::new();
            plan(&lanes, limits, &mut step);
            prop_assert!(step.iter().map(|chunk| chunk.count + chunk.draft).sum::<u32>() <= batch);
            prop_assert!(step.iter().map(|chunk| u32::from(chunk.output) + chunk.draft).sum::<u32>() <= outputs);
            prop_assert!(step.is_sorted_by(|left, right| left.lane < right.lane), "one chunk for each lane");
            for chunk in &step {
                let lane = lanes[chunk.lane];
                prop_assert!(!lane.parked && chunk.count > 0 && chunk.count <= lane.piece);
                prop_assert_eq!(chunk.output, chunk.count == lane.todo);
                prop_assert!(chunk.draft <= lane.draft);
            }
            let runnable = lanes.iter().any(|lane| lane.todo > 0 && !lane.parked);
            prop_assert_eq!(runnable, !step.is_empty(), "somebody moves while anybody can");
        }

        /// Every prompt is read in the end, whatever else there is, and no room is wasted.
        #[test]
        fn nobody_starves(
            todos in proptest::collection::vec(2u32..3000, 1..12), streams in 0usize..6, draft in 0u32..65,
            mixed in 64u32..512, early in 64u32..512, apart in proptest::bool::ANY,
        ) {
            let mut lanes = lanes(&vec![1; streams]);
            for lane in &mut lanes {
                lane.draft = draft;
            }
            lanes.extend(todos.iter().map(|&todo| Lane { todo, piece: todo, parked: false, draft: 0 }));
            let total: u32 = todos.iter().sum();
            let mut step = Vec::new();
            let mut left = todos.len();
            for count in 0.. {
                prop_assert!(count / 2 <= total.div_ceil(GRAIN - 1) + 32, "{:?}", lanes);
                let turn = match (apart, count % 2) {
                    (false, _) => Turn::All,
                    (true, 0) => Turn::Generate,
                    (true, _) => Turn::Read,
                };
                plan(&lanes, Limits { batch: 512, outputs: 32, mixed, early, turn }, &mut step);
                for chunk in step.iter().filter(|chunk| chunk.lane >= streams) {
                    let lane = &mut lanes[chunk.lane];
                    lane.todo -= chunk.count;
                    lane.piece = lane.todo;
                    // Read to its end it is out of the way.
                    lane.parked = lane.todo <= 1;
                    left -= usize::from(lane.parked);
                }
                if left == 0 {
                    break;
                }
            }
        }
    }
}
