//! What the engine's thread lets others see.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::EngineStats;

/// Counters and the heartbeat.
#[derive(Default)]
pub(super) struct Shared {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    stats: EngineStats,
    step_began: Option<Instant>,
}

impl Shared {
    // Plain numbers: a panic elsewhere leaves none of them half-written.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut EngineStats)) {
        change(&mut self.lock().stats);
    }

    pub(super) fn step_begins(&self) {
        self.lock().step_began = Some(Instant::now());
    }

    pub(super) fn step_ends(&self) {
        let mut inner = self.lock();
        inner.step_began = None;
        inner.stats.steps += 1;
    }

    pub(super) fn stats(&self) -> EngineStats {
        let inner = self.lock();
        EngineStats {
            step_age: inner.step_began.map(|began| began.elapsed()).unwrap_or_default(),
            ..inner.stats.clone()
        }
    }
}
