//! Bytes of request bodies that the agent holds: bounded over all its listeners.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::api::ApiError;
use crate::metrics::AgentMetrics;

/// The bytes that one request holds; given back when it is dropped.
pub(super) struct Buffered {
    budget: Arc<Semaphore>,
    metrics: Arc<AgentMetrics>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Buffered {
    pub(super) fn new(budget: &Arc<Semaphore>, metrics: &Arc<AgentMetrics>) -> Self {
        Self { budget: Arc::clone(budget), metrics: Arc::clone(metrics), permit: None }
    }

    /// Takes `bytes` more, unless the others hold too much.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let full = || ApiError::unavailable("overloaded", "the bodies of other requests take all memory for bodies", 1);
        let count = u32::try_from(bytes).map_err(|_| full())?;
        let more = Arc::clone(&self.budget).try_acquire_many_owned(count).map_err(|_| full())?;
        self.metrics.buffered().add(f64::from(count));
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            none => *none = Some(more),
        }
        Ok(())
    }
}

impl Drop for Buffered {
    fn drop(&mut self) {
        if let Some(permit) = &self.permit {
            let bytes = u32::try_from(permit.num_permits()).unwrap_or(u32::MAX);
            self.metrics.buffered().sub(f64::from(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let budget = Arc::new(Semaphore::new(100));
        let metrics = Arc::new(AgentMetrics::new("test").unwrap());
        let mut first = Buffered::new(&budget, &metrics);
        first.grow(40).unwrap();
        first.grow(40).unwrap();
        let mut second = Buffered::new(&budget, &metrics);
        assert_eq!(second.grow(21).unwrap_err().status, 503);
        assert!((metrics.buffered().get() - 80.0).abs() < f64::EPSILON);
        drop(first);
        second.grow(100).unwrap();
        drop(second);
        assert!(metrics.buffered().get().abs() < f64::EPSILON);
        assert_eq!(budget.available_permits(), 100);
    }
}
