//! Waiting with an end that says what was seen: never for a time, which is another one on every machine.
#![allow(dead_code, reason = "each suite uses a part")]
#![allow(unreachable_pub, reason = "suites are crates that nobody uses")]
#![allow(clippy::panic, reason = "a test that cannot go on has failed")]

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Longest wait for anything; what is usual here is a hundredth of it.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// What comes of it, in time.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not happen within {PATIENCE:?}"))
}

/// Waits until what is seen is as it should be, and returns it.
pub async fn until<S: Debug>(what: &str, mut see: impl FnMut() -> S, is_so: impl Fn(&S) -> bool) -> S {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = see();
        if is_so(&seen) {
            return seen;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for: {what}; seen instead: {seen:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
