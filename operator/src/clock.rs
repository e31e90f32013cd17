//! The operator's two clocks, read in one place and passed in everywhere else.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// A moment, as the planner sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Time since this process started. All waiting is measured with it: no other machine's clock takes part.
    pub mono: Duration,
    /// Wall clock, in whole seconds as the API stores them. For timestamps in status only.
    pub wall: Timestamp,
}

/// Reads the clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Instant,
}

impl Clock {
    /// A clock whose monotonic time starts now.
    #[must_use]
    pub fn start() -> Self {
        Self { started: Instant::now() }
    }

    /// Time since the start.
    #[must_use]
    pub fn mono(&self) -> Duration {
        self.started.elapsed()
    }

    /// Both clocks.
    #[must_use]
    pub fn now(&self) -> Now {
        let wall = Timestamp::now();
        Now { mono: self.mono(), wall: Timestamp::from_second(wall.as_second()).unwrap_or(wall) }
    }
}
