//! When a request may expect a worker, for an honest `Retry-After`.

use std::time::{Duration, Instant};

/// The longest that a client is told to wait.
const LONGEST: u64 = 300;

/// What is expected of a model that is not loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// How long a load takes: as measured, or guessed.
    pub load: Duration,
    /// When it will be ready, or is tried again; `None`: a load from now, if nothing comes in between.
    pub ready_at: Option<Instant>,
}

impl Expected {
    /// Whole seconds, at least one.
    pub(super) fn retry_after(&self, now: Instant) -> u32 {
        let left = self.ready_at.map_or(self.load, |at| at.saturating_duration_since(now));
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        u32::try_from(seconds.clamp(1, LONGEST)).unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_seconds_within_bounds() {
        let now = Instant::now();
        let at = |millis| Some(now + Duration::from_millis(millis));
        let cases = [(0, None, 1), (1200, None, 2), (9000, at(2500), 3), (9000, at(0), 1), (10_000_000, None, 300)];
        for (load, ready_at, expected) in cases {
            let given = Expected { load: Duration::from_millis(load), ready_at };
            assert_eq!(given.retry_after(now), expected, "{given:?}");
        }
        assert_eq!(
            Expected { ready_at: Some(now), ..Expected::default() }.retry_after(now + Duration::from_secs(9)),
            1
        );
    }
}
