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
    cells: u32,
    pool: Pool,
    now: Duration,
    queue: VecDeque<Job>,
    preempted: Vec<Job>,
    running: Vec<Job>,
    last_resize: Option<Duration>,
    refused: Option<(Duration, u32)>,
    growths: u32,
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
        let lately = self.refused.filter(|(last, _)| self.now.saturating_sub(*last) < RESIZE_PAUSE);
        sizing::ceiling(self.limits.cap, lately.map(|(_, cells)| cells), hard)
    }

    fn calm(&self) -> bool {
        let last = self.last_resize.max(self.refused.map(|(last, _)| last));
        last.is_none_or(|last| self.now.saturating_sub(last) >= RESIZE_PAUSE)
    }

    fn resize(&mut self, to: u32) {
        assert!(to > self.cells && to <= self.limits.cap, "{to} after {}", self.cells);
        if to > self.device {
            self.refused = Some((self.now, to));
            self.refusals += 1;
        } else {
            self.cells = to;
            self.last_resize = Some(self.now);
            self.growths += 1;
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
                let (ceiling, alone) = (self.ceiling(demand.hard), self.running.is_empty());
                match sizing::admit(self.cells, ceiling, demand, self.calm(), true, alone) {
                    Admission::Begin => break,
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
            preparing: false,
            holders: self.running.len(),
        };
        match sizing::relieve(pressure) {
            Relief::DropKept => self.drop_kept(),
            Relief::Grow { to } => self.resize(to),
            Relief::Preempt => {
                let mut youngest = self.running.pop().expect("more than one runs");
                self.pool.release(youngest.cells.take().expect("it runs"));
                youngest.resident = 0;
                self.preemptions += 1;
                let place = self.preempted.partition_point(|other| other.number < youngest.number);
                self.preempted.insert(place, youngest);
            }
            Relief::AwaitContext | Relief::Fail => panic!("{pressure:?} {:?}", self.running),
        }
    }

    /// True while there is something to do.
    fn step(&mut self) -> bool {
        self.now += STEP;
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
            cells: limits.initial,
            pool: Pool::new(u32::try_from(parallel).expect("few") + 4, true),
            now: Duration::ZERO,
            queue: queue.into(),
            preempted: Vec::new(),
            running: Vec::new(),
            last_resize: None,
            refused: None,
            growths: 0,
            refusals: 0,
            ended: Vec::new(),
            preemptions: 0,
        };
        // Each step computes a token at least; what is read again is bounded by those who gave way.
        let mut steps = 0u32;
        while simulation.step() {
            steps += 1;
            prop_assert!(steps < 1000 + total * 4, "{} have ended, {} preemptions", simulation.ended.len(), simulation.preemptions);
        }
        prop_assert_eq!(simulation.ended.len(), jobs.len());
        // Each growth is larger than the one before; what was refused is not asked for again until the pause is over.
        prop_assert!(simulation.growths <= 40, "{}", simulation.growths);
        let pauses = u32::try_from(simulation.now.as_secs() / RESIZE_PAUSE.as_secs()).unwrap_or(u32::MAX) + 1;
        prop_assert!(simulation.refusals <= pauses * 24, "{} in {pauses}", simulation.refusals);
    }
}
