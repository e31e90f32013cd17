//! The pure decisions together, over random loads: nobody waits for ever, and the context does not grow without bound.
//!
//! The decisions are the engine's own; what does them, a context and a clock, are numbers here.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::pool::{Pool, SeqId};
use super::request::CacheKey;
use super::schedule::{self, Lane};
use super::sizing::{self, Admission, CELLS_STEP, Demand, Limits, Pressure, Relief};

/// As the worker's.
const RESIZE_PAUSE: Duration = Duration::from_secs(5);

const STEP: Duration = Duration::from_millis(20);

/// How long others keep what they hold of the device, at least as long as the pause after a refusal.
const TIDE: Duration = Duration::from_secs(6);

/// How long a context beside the running one takes.
const MAKING: Duration = Duration::from_millis(300);

#[derive(Clone, Debug)]
struct Job {
    number: usize,
    arrives: Duration,
    /// Tokens there are: the prompt, and what was generated.
    tokens: u32,
    /// Tokens at its end.
    limit: u32,
    need: u32,
    resident: u32,
    cells: Option<SeqId>,
}

impl Job {
    fn next_cells(&self) -> u32 {
        self.tokens - self.resident + (self.limit - self.tokens).min(CELLS_STEP)
    }

    fn aimed_cells(&self) -> u32 {
        self.need.saturating_sub(self.resident).max(self.next_cells())
    }
}

struct Simulation {
    limits: Limits,
    parallel: usize,
    /// Cells that the device has memory for.
    device: u32,
    /// Others hold all but the initial size, or nothing, in turn.
    tides: Vec<bool>,
    /// Whether contexts beside the running one can be made after they were granted, in turn.
    luck: Vec<bool>,
    made: usize,
    cells: u32,
    /// When a context of so many cells will be ready beside the running one.
    making: Option<(Duration, u32)>,
    beside_refused: Option<Duration>,
    pool: Pool,
    now: Duration,
    queue: VecDeque<Job>,
    preempted: Vec<Job>,
    running: Vec<Job>,
    last_resize: Option<Duration>,
    /// When what size was refused, and whether others may leave the memory.
    refused: Option<(Duration, u32, bool)>,
    growths: u32,
    shrinks: u32,
    /// Steps in which nobody moved because others held the memory.
    waited: u32,
    refusals: u32,
    ended: Vec<usize>,
    preemptions: usize,
}

impl Simulation {
    fn demand(&self, more: Option<&Job>) -> Demand {
        let used = self.pool.used_by_running();
        let all = || self.running.iter().chain(more);
        Demand {
            hard: all().fold(used, |sum, job| sum + job.next_cells()),
            aim: all().fold(used, |sum, job| sum + job.aimed_cells()),
        }
    }

    fn ceiling(&self, hard: u32) -> u32 {
        let lately = self.refused.filter(|_| self.was_refused());
        sizing::ceiling(self.limits.cap, lately.map(|(_, cells, _)| cells), hard)
    }

    fn is_recent(&self, last: Duration) -> bool {
        self.now.saturating_sub(last) < RESIZE_PAUSE
    }

    fn was_refused(&self) -> bool {
        self.refused.is_some_and(|(last, ..)| self.is_recent(last))
    }

    fn may_get_memory(&self) -> bool {
        self.was_refused() && self.refused.is_some_and(|(.., passing)| passing)
    }

    fn calm(&self) -> bool {
        let last = self.last_resize.max(self.refused.map(|(last, ..)| last)).max(self.beside_refused);
        self.making.is_none() && last.is_none_or(|last| !self.is_recent(last))
    }

    /// Cells that the ledger grants now; what is there stays.
    fn room(&self) -> u32 {
        let tide = self.now.as_secs() / TIDE.as_secs();
        let is_full = self.tides[usize::try_from(tide).expect("few") % self.tides.len()];
        if is_full { self.cells } else { self.device }
    }

    /// A context beside the running one, where there is room for both and it is granted.
    fn prepare(&mut self, to: u32) -> bool {
        if self.making.is_some() || self.beside_refused.is_some_and(|last| self.is_recent(last)) {
            return false;
        }
        if self.cells + to > self.device {
            return false;
        }
        self.making = Some((self.now + MAKING, to));
        true
    }

    fn take_prepared(&mut self, wait: bool) {
        let Some((ready, to)) = self.making else { return };
        if wait {
            self.now = self.now.max(ready);
        }
        if self.now < ready {
            return;
        }
        self.making = None;
        self.made += 1;
        if to > self.room() || !self.luck[self.made % self.luck.len()] {
            self.beside_refused = Some(self.now);
        } else {
            self.has_grown(to);
        }
    }

    fn has_grown(&mut self, to: u32) {
        self.cells = to;
        self.last_resize = Some(self.now);
        self.growths += 1;
    }

    fn resize(&mut self, to: u32) {
        assert!(to > self.cells && to <= self.limits.cap, "{to} after {}", self.cells);
        if !self.running.is_empty() && self.prepare(to) {
            return;
        }
        if to > self.room() {
            self.refused = Some((self.now, to, to <= self.device));
            self.refusals += 1;
        } else {
            self.has_grown(to);
        }
    }

    fn look_after_size(&mut self) {
        self.take_prepared(false);
        if self.making.is_some() {
            return;
        }
        let demand = self.demand(None);
        let wishes = self.calm() && self.running.iter().all(|job| job.tokens - job.resident < 2);
        if let Some(to) = sizing::anticipate(self.cells, self.ceiling(demand.hard), demand, wishes) {
            self.prepare(to);
        } else if self.running.is_empty()
            && !self.preempted.is_empty()
            && self.may_get_memory()
            && self.cells > self.limits.initial
        {
            while self.pool.oldest_kept(None).is_some() {
                self.drop_kept();
            }
            assert_eq!(self.pool.used(), 0, "who waits holds nothing");
            self.cells = self.limits.initial;
            self.last_resize = Some(self.now);
            self.shrinks += 1;
        }
    }

    fn admit(&mut self) {
        while self.running.len() < self.parallel {
            let arrived = self.queue.front().is_some_and(|job| job.arrives <= self.now);
            let mut job = match self.preempted.first() {
                Some(_) => self.preempted.remove(0),
                None if arrived => self.queue.pop_front().expect("the front is there"),
                None => return,
            };
            loop {
                let demand = self.demand(Some(&job));
                let alone = self.running.is_empty() && !self.may_get_memory();
                let (ceiling, may_resize) = (self.ceiling(demand.hard), self.making.is_none());
                match sizing::admit(self.cells, ceiling, demand, self.calm(), may_resize, alone) {
                    Admission::Wish { to } if self.running.is_empty() && self.cells + to > self.device => {
                        self.resize(to);
                    }
                    Admission::Begin | Admission::Wish { .. } => break,
                    Admission::Grow { to } => self.resize(to),
                    Admission::Wait => return self.preempted.insert(0, job),
                    Admission::Fail => panic!("{job:?} fits alone into {} cells: {demand:?}", self.device),
                }
            }
            while job.cells.is_none() {
                job.cells = self.pool.take();
                if job.cells.is_none() {
                    self.drop_kept();
                }
            }
            let place = self.running.partition_point(|other| other.number < job.number);
            self.running.insert(place, job);
        }
    }

    fn drop_kept(&mut self) {
        let oldest = self.pool.oldest_kept(None).expect("somebody has ended");
        self.pool.release(oldest);
    }

    fn make_room(&mut self) {
        let demand = self.demand(None);
        let pressure = Pressure {
            cells: self.cells,
            cap: self.ceiling(demand.hard),
            aim: demand.aim,
            kept: self.pool.oldest_kept(None).is_some(),
            preparing: self.making.is_some(),
            passing: self.may_get_memory(),
            holders: self.running.len(),
        };
        match sizing::relieve(pressure) {
            Relief::DropKept => self.drop_kept(),
            Relief::AwaitContext => self.take_prepared(true),
            Relief::Grow { to } => {
                self.resize(to);
                self.take_prepared(true);
            }
            Relief::Preempt => {
                assert!(
                    self.running.len() > 1 || self.may_get_memory(),
                    "the oldest gives way only to wait for memory"
                );
                let mut youngest = self.running.pop().expect("somebody runs");
                self.pool.release(youngest.cells.take().expect("it runs"));
                youngest.resident = 0;
                self.preemptions += 1;
                let place = self.preempted.partition_point(|other| other.number < youngest.number);
                self.preempted.insert(place, youngest);
            }
            Relief::Fail => panic!("{pressure:?} {:?}", self.running),
        }
    }

    /// True while there is something to do.
    fn step(&mut self) -> bool {
        self.now += STEP;
        self.look_after_size();
        self.admit();
        let mut step = Vec::new();
        loop {
            let lane = |job: &Job| {
                let todo = job.tokens - job.resident;
                Lane { todo, piece: todo, parked: false, draft: 0 }
            };
            let lanes: Vec<_> = self.running.iter().map(lane).collect();
            let limits =
                schedule::Limits { batch: 512, outputs: 64, mixed: 128, early: 192, turn: schedule::Turn::All };
            schedule::plan(&lanes, limits, &mut step);
            let tokens: u32 = step.iter().map(|chunk| chunk.count).sum();
            if self.pool.used() + tokens <= self.cells {
                break;
            }
            self.make_room();
        }
        assert!(self.running.is_empty() || !step.is_empty(), "somebody moves while anybody runs");
        self.waited += u32::from(self.running.is_empty() && !self.preempted.is_empty());
        for chunk in &step {
            let job = &mut self.running[chunk.lane];
            self.pool.append(job.cells.expect("it runs"), chunk.count);
            job.resident += chunk.count;
            job.tokens += u32::from(chunk.output);
        }
        for index in (0..self.running.len()).rev() {
            if self.running[index].tokens == self.running[index].limit {
                let job = self.running.remove(index);
                let id = job.cells.expect("it runs");
                if job.number.is_multiple_of(2) {
                    self.pool.keep(id, CacheKey::default(), vec![0; 4]);
                } else {
                    self.pool.release(id);
                }
                self.ended.push(job.number);
            }
        }
        assert!(self.pool.used() <= self.cells, "{} of {}", self.pool.used(), self.cells);
        !(self.running.is_empty() && self.preempted.is_empty() && self.queue.is_empty())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn all_come_to_their_end(
        jobs in proptest::collection::vec((1u32..3000, 1u32..1500, 0u64..20_000), 1..24),
        parallel in 1usize..8, min_tokens in 256u32..4096, room in 0u32..16,
        tides in proptest::collection::vec(any::<bool>(), 0..6), luck in proptest::collection::vec(any::<bool>(), 1..6),
    ) {
        let longest = jobs.iter().map(|(prompt, generate, _)| prompt + generate).max().unwrap_or(1);
        let cap = sizing::pad(longest) * u32::try_from(parallel).expect("few");
        // The device holds the longest one at least, on the ladder.
        let device = (sizing::rung(longest) + room * 1024).max(sizing::rung(min_tokens)).min(cap);
        let device = if device < cap { sizing::rung(device + 1) } else { cap };
        let limits = Limits { initial: sizing::rung(min_tokens).min(cap), cap, min_tokens, max_tokens: longest };
        let total: u32 = jobs.iter().map(|(prompt, generate, _)| prompt + generate).sum();
        let mut queue: Vec<_> = jobs.iter().map(|&(prompt, generate, arrives)| Job {
            number: 0,
            arrives: Duration::from_millis(arrives),
            tokens: prompt,
            limit: prompt + generate,
            need: limits.need(prompt, Some(generate), None),
            resident: 0,
            cells: None,
        }).collect();
        queue.sort_by_key(|job| job.arrives);
        for (number, job) in queue.iter_mut().enumerate() {
            job.number = number;
        }
        let mut simulation = Simulation {
            limits,
            parallel,
            device,
            // In the end others leave.
            tides: [tides.as_slice(), &[false]].concat(),
            luck,
            made: 0,
            cells: limits.initial,
            making: None,
            beside_refused: None,
            pool: Pool::new(u32::try_from(parallel).expect("few") + 4, true),
            now: Duration::ZERO,
            queue: queue.into(),
            preempted: Vec::new(),
            running: Vec::new(),
            last_resize: None,
            refused: None,
            growths: 0,
            shrinks: 0,
            waited: 0,
            refusals: 0,
            ended: Vec::new(),
            preemptions: 0,
        };
        // Each step computes a token at least; what is read again is bounded by those who gave way.
        let mut steps = 0u32;
        while simulation.step() {
            steps += 1;
            let (moved, preemptions) = (steps - simulation.waited, simulation.preemptions);
            prop_assert!(moved < 1000 + total * 4, "{} have ended, {preemptions} preemptions", simulation.ended.len());
            // Who waits for memory waits for a tide or two each time.
            let tides = u32::try_from(simulation.tides.len()).unwrap_or(1) + 2;
            let patience = tides * u32::try_from(TIDE.as_millis() / STEP.as_millis()).unwrap_or(1);
            prop_assert!(simulation.waited <= patience * (simulation.shrinks + 1 + u32::try_from(jobs.len()).unwrap_or(1)), "{}", simulation.waited);
        }
        prop_assert_eq!(simulation.ended.len(), jobs.len());
        // Each growth is larger than the one before, but after it became smaller to wait; what was refused is not asked for
        // again until the pause is over.
        prop_assert!(simulation.growths <= 40 * (1 + simulation.shrinks), "{}", simulation.growths);
        let pauses = u32::try_from(simulation.now.as_secs() / RESIZE_PAUSE.as_secs()).unwrap_or(u32::MAX) + 1;
        prop_assert!(simulation.refusals <= pauses * 24, "{} in {pauses}", simulation.refusals);
    }
}
