//! Requests that were in a worker when it ended by itself. One that has seen two workers end, and was never answered in
//! between, is refused: it would take a third one, and everybody else's requests in it, along.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Workers that a request may see end.
const ENDS: u32 = 2;

/// Requests that are remembered; beyond that the oldest is forgotten.
const MOST: usize = 1024;

/// How long.
const REMEMBERED: Duration = Duration::from_hours(1);

/// What a request is known by: its model, path and body. Keyed anew in each process, so nobody can make two alike.
type Fingerprint = u64;

/// The requests.
#[derive(Default)]
pub(super) struct Suspects {
    keys: RandomState,
    known: Mutex<HashMap<Fingerprint, (u32, Instant)>>,
}

impl Suspects {
    fn fingerprint(&self, model: &str, path: &str, body: &[u8]) -> Fingerprint {
        self.keys.hash_one((model, path, body))
    }

    /// Whether the request is not to be tried again.
    fn is_refused(&self, request: Fingerprint, now: Instant) -> bool {
        let known = self.lock();
        known.get(&request).is_some_and(|(ends, last)| *ends >= ENDS && is_fresh(*last, now))
    }

    /// A worker ended while it had the request.
    fn worker_ended(&self, request: Fingerprint, now: Instant) {
        let mut known = self.lock();
        known.retain(|_, (_, last)| is_fresh(*last, now));
        if known.len() >= MOST
            && !known.contains_key(&request)
            && let Some(oldest) = known.iter().min_by_key(|(_, (_, last))| *last).map(|(request, _)| *request)
        {
            known.remove(&oldest);
        }
        let (ends, last) = known.entry(request).or_insert((0, now));
        (*ends, *last) = (ends.saturating_add(1), now);
    }

    /// The request was answered.
    fn answered(&self, request: Fingerprint) {
        self.lock().remove(&request);
    }

    // Whole entries only: a panic elsewhere leaves none half-written.
    fn lock(&self) -> MutexGuard<'_, HashMap<Fingerprint, (u32, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request that a worker has.
#[derive(Clone)]
pub(super) struct Suspect {
    suspects: Arc<Suspects>,
    request: Fingerprint,
}

impl Suspect {
    pub(super) fn new(suspects: &Arc<Suspects>, model: &str, path: &str, body: &[u8]) -> Self {
        Self { suspects: Arc::clone(suspects), request: suspects.fingerprint(model, path, body) }
    }

    pub(super) fn is_refused(&self) -> bool {
        self.suspects.is_refused(self.request, Instant::now())
    }

    pub(super) fn worker_ended(&self) {
        self.suspects.worker_ended(self.request, Instant::now());
    }

    pub(super) fn answered(&self) {
        self.suspects.answered(self.request);
    }
}

fn is_fresh(last: Instant, now: Instant) -> bool {
    now.saturating_duration_since(last) < REMEMBERED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_after_two_workers_until_forgotten() {
        let (suspects, now) = (Suspects::default(), Instant::now());
        let bad = suspects.fingerprint("uid", "/v1/completions", b"bad");
        let other = suspects.fingerprint("uid", "/v1/completions", b"other");
        assert_ne!(bad, suspects.fingerprint("uid2", "/v1/completions", b"bad"));
        suspects.worker_ended(bad, now);
        suspects.worker_ended(other, now);
        assert!(!suspects.is_refused(bad, now));
        suspects.answered(other);
        suspects.worker_ended(bad, now);
        suspects.worker_ended(other, now);
        assert!(suspects.is_refused(bad, now));
        assert!(!suspects.is_refused(other, now), "it was answered in between");
        assert!(!suspects.is_refused(bad, now + REMEMBERED));
    }

    #[test]
    fn the_table_is_bounded() {
        let (suspects, now) = (Suspects::default(), Instant::now());
        for request in 0..10_000 {
            suspects.worker_ended(request, now + Duration::from_millis(request));
        }
        assert_eq!(suspects.lock().len(), MOST);
        assert!(suspects.lock().contains_key(&9999));
    }
}
