//! Leader election by a Lease, and the term that fences a leader which is none any more.
//!
//! A term (`epoch`) is one higher than anything that was ever written: in the Lease, or in a ModelNode. It stands in
//! `ModelNode.spec.epoch`, where the API server refuses a lower one. Whether another leader still lives is judged by
//! this process's own clock since it last saw the Lease change, never by comparing clocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use altiplano_crds::names;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::clock::Clock;
use crate::fleet::apply::chain;

/// Annotation of the Lease with the highest term so far.
pub const EPOCH_ANNOTATION: &str = "altiplano.dev/epoch";

/// Why the election cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LeaderError {
    /// The API server refused or did not answer.
    #[error("the API server refused")]
    Api(#[from] kube::Error),
    /// The API server did not answer in time.
    #[error("the API server did not answer in time")]
    TimedOut(#[from] tokio::time::error::Elapsed),
    /// Another process leads.
    #[error("{0} leads now")]
    Replaced(String),
    /// The Lease could not be renewed for as long as it is safe to lead.
    #[error("the leader's Lease could not be renewed for {} s", .0.as_secs())]
    Expired(Duration),
}

/// The three times of an election.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How long others wait after the last sign of life.
    pub lease: Duration,
    /// How long a leader leads after its last renewal.
    pub renew_deadline: Duration,
    /// Time between two tries.
    pub retry: Duration,
}

/// The right to write. It ends by itself when it is not renewed.
#[derive(Clone, Debug)]
pub struct Leadership {
    epoch: i64,
    valid_until: Arc<AtomicU64>,
}

impl Leadership {
    fn new(epoch: i64, valid_until: Duration) -> Self {
        let leadership = Self { epoch, valid_until: Arc::default() };
        leadership.extend(valid_until);
        leadership
    }

    /// The term.
    #[must_use]
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// Whether this process may write now.
    #[must_use]
    pub fn held(&self, now: Duration) -> bool {
        u64::try_from(now.as_millis()).is_ok_and(|now| now < self.valid_until.load(Ordering::Acquire))
    }

    fn extend(&self, until: Duration) {
        self.valid_until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Ordering::Release);
    }
}

/// What another process's Lease looked like, and since when.
#[derive(Clone, Debug, PartialEq)]
struct Sight {
    resource_version: Option<String>,
    since: Duration,
}

/// What to do with the Lease as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    Create,
    Take,
    Wait,
}

/// One candidate.
pub struct Election {
    leases: Api<Lease>,
    identity: String,
    times: Times,
    clock: Clock,
    sight: Option<Sight>,
}

impl Election {
    /// A candidate for the Lease in that namespace.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: String, times: Times, clock: Clock) -> Self {
        Self { leases: Api::namespaced(client, namespace), identity, times, clock, sight: None }
    }

    /// Waits until this process leads. `highest` is the highest epoch in any ModelNode.
    pub async fn campaign(&mut self, highest: impl Fn() -> i64) -> (Leadership, Lease) {
        let mut failures = 0_u32;
        loop {
            match tokio::time::timeout(self.times.renew_deadline, self.try_once(&highest)).await {
                Ok(Ok(Some(won))) => return won,
                Ok(Ok(None)) => failures = 0,
                Ok(Err(LeaderError::Api(kube::Error::Api(status)))) if status.is_conflict() => {}
                failed => {
                    failures += 1;
                    if failures.is_power_of_two() {
                        let error = match failed {
                            Ok(Err(error)) => chain(&error),
                            _ => "the API server did not answer in time".to_owned(),
                        };
                        warn!(failures, error, "cannot stand for leader; trying again");
                    }
                }
            }
            tokio::time::sleep(self.times.retry).await;
        }
    }

    async fn try_once(&mut self, highest: &impl Fn() -> i64) -> Result<Option<(Leadership, Lease)>, LeaderError> {
        let there = self.leases.get_opt(names::LEADER_LEASE).await?;
        // From before the request: that is when this process has surely not led longer than it thinks.
        let now = self.clock.mono();
        let action = decide(there.as_ref(), &self.identity, &mut self.sight, self.times.lease, now);
        let parameters =
            PostParams { field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()), ..PostParams::default() };
        let lease = taken(there, &self.identity, self.times.lease, highest(), Timestamp::now());
        let lease = match action {
            Move::Wait => return Ok(None),
            Move::Create => self.leases.create(&parameters, &lease).await?,
            // The resourceVersion in it lets one of several candidates through.
            Move::Take => self.leases.replace(names::LEADER_LEASE, &parameters, &lease).await?,
        };
        let leadership = Leadership::new(epoch_of(&lease), now + self.times.renew_deadline);
        info!(identity = self.identity, epoch = leadership.epoch, "leading");
        Ok(Some((leadership, lease)))
    }

    /// Renews the Lease until `shutdown`, then gives it up so that a successor need not wait. `answers` is told after
    /// each try whether the API server has answered: an agent that cannot renew its Lease now is not to blame.
    ///
    /// # Errors
    /// When this process must not lead any more.
    pub async fn hold(
        &self,
        leadership: &Leadership,
        mut lease: Lease,
        answers: impl Fn(bool),
        shutdown: &CancellationToken,
    ) -> Result<(), LeaderError> {
        let mut failing = false;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = tokio::time::sleep(self.times.retry) => {}
            }
            let now = self.clock.mono();
            if !leadership.held(now) {
                return Err(LeaderError::Expired(self.times.renew_deadline));
            }
            match tokio::time::timeout(self.times.retry, self.renew(leadership, &lease))
                .await
                .map_err(LeaderError::from)
            {
                Ok(Ok(renewed)) => {
                    lease = renewed;
                    answers(true);
                    leadership.extend(now + self.times.renew_deadline);
                    failing = false;
                }
                Ok(Err(error @ LeaderError::Replaced(_))) => return Err(error),
                Ok(Err(error)) | Err(error) => {
                    answers(false);
                    if !std::mem::replace(&mut failing, true) {
                        warn!(error = %chain(&error), "cannot renew the leader's Lease; trying again");
                    }
                }
            }
        }
        self.give_up(leadership).await;
        Ok(())
    }

    async fn renew(&self, leadership: &Leadership, lease: &Lease) -> Result<Lease, LeaderError> {
        let parameters =
            PostParams { field_manager: Some(names::OPERATOR_FIELD_MANAGER.to_owned()), ..PostParams::default() };
        match self.leases.replace(names::LEADER_LEASE, &parameters, &renewed(lease)).await {
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
            result => return Ok(result?),
        }
        // Somebody has changed it; perhaps only a label.
        match self.leases.get_opt(names::LEADER_LEASE).await? {
            Some(there) if self.is_mine(leadership, &there) => {
                Ok(self.leases.replace(names::LEADER_LEASE, &parameters, &renewed(&there)).await?)
            }
            Some(there) => Err(LeaderError::Replaced(holder(&there).unwrap_or("nobody").to_owned())),
            None => {
                let mut again = renewed(lease);
                let (labels, annotations) = (again.metadata.labels.take(), again.metadata.annotations.take());
                let name = Some(names::LEADER_LEASE.to_owned());
                again.metadata = ObjectMeta { name, labels, annotations, ..ObjectMeta::default() };
                Ok(self.leases.create(&parameters, &again).await?)
            }
        }
    }

    fn is_mine(&self, leadership: &Leadership, lease: &Lease) -> bool {
        holder(lease) == Some(&self.identity) && epoch_of(lease) == leadership.epoch
    }

    async fn give_up(&self, leadership: &Leadership) {
        let give_up = async {
            let Some(mut lease) = self.leases.get_opt(names::LEADER_LEASE).await? else { return Ok(()) };
            if self.is_mine(leadership, &lease) {
                lease.spec.get_or_insert_default().holder_identity = None;
                self.leases.replace(names::LEADER_LEASE, &PostParams::default(), &lease).await?;
            }
            Ok::<(), kube::Error>(())
        };
        match tokio::time::timeout(self.times.retry, give_up).await {
            Ok(Ok(())) => info!("gave up the lead"),
            Ok(Err(error)) => warn!(error = %chain(&error), "cannot give up the lead; others will wait"),
            Err(_) => warn!("cannot give up the lead in time; others will wait"),
        }
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
}

fn epoch_of(lease: &Lease) -> i64 {
    lease.annotations().get(EPOCH_ANNOTATION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn decide(lease: Option<&Lease>, identity: &str, sight: &mut Option<Sight>, patience: Duration, now: Duration) -> Move {
    let Some(lease) = lease else { return Move::Create };
    match holder(lease) {
        // Nobody, or this very Pod before its process was started again.
        None => return Move::Take,
        Some(holder) if holder == identity => return Move::Take,
        Some(_) => {}
    }
    let resource_version = lease.metadata.resource_version.clone();
    match sight {
        Some(seen) if seen.resource_version == resource_version => {
            let theirs = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or(0);
            let theirs = Duration::from_secs(u64::try_from(theirs).unwrap_or(0));
            if now >= seen.since + patience.max(theirs) { Move::Take } else { Move::Wait }
        }
        _ => {
            *sight = Some(Sight { resource_version, since: now });
            Move::Wait
        }
    }
}

/// The Lease with a new term of this process in it.
fn taken(there: Option<Lease>, identity: &str, patience: Duration, highest: i64, now: Timestamp) -> Lease {
    let mut lease = there.unwrap_or_else(|| Lease {
        metadata: ObjectMeta { name: Some(names::LEADER_LEASE.to_owned()), ..ObjectMeta::default() },
        spec: None,
    });
    let transitions = lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or(0);
    let epoch = epoch_of(&lease).max(highest).max(i64::from(transitions)) + 1;
    lease.metadata.managed_fields = None;
    lease.annotations_mut().insert(EPOCH_ANNOTATION.to_owned(), epoch.to_string());
    let seconds = i32::try_from(patience.as_secs()).unwrap_or(i32::MAX);
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(identity.to_owned()),
        lease_duration_seconds: Some(seconds),
        acquire_time: Some(MicroTime(now)),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(transitions.saturating_add(1)),
        ..LeaseSpec::default()
    });
    lease
}

fn renewed(lease: &Lease) -> Lease {
    let mut lease = lease.clone();
    lease.metadata.managed_fields = None;
    lease.spec.get_or_insert_default().renew_time = Some(MicroTime(Timestamp::now()));
    lease
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(15);

    fn lease(holder: &str, version: &str) -> Lease {
        let mut lease = taken(None, holder, PATIENCE, 0, Timestamp::UNIX_EPOCH);
        lease.metadata.resource_version = Some(version.to_owned());
        lease
    }

    #[test]
    fn a_lease_is_taken_only_from_the_dead() {
        let at = Duration::from_secs;
        let mut sight = None;
        let mut decide = |lease: Option<&Lease>, now| decide(lease, "me", &mut sight, PATIENCE, at(now));
        assert_eq!(decide(None, 0), Move::Create);
        assert_eq!(decide(Some(&lease("", "1")), 0), Move::Take, "given up");
        assert_eq!(decide(Some(&lease("me", "1")), 0), Move::Take, "this Pod, started again");
        // Whatever times stand in it: another lives as long as its Lease changes.
        assert_eq!(decide(Some(&lease("other", "1")), 100), Move::Wait);
        assert_eq!(decide(Some(&lease("other", "2")), 114), Move::Wait);
        assert_eq!(decide(Some(&lease("other", "2")), 128), Move::Wait);
        assert_eq!(decide(Some(&lease("other", "2")), 129), Move::Take);
    }

    #[test]
    fn a_term_is_higher_than_all_before() {
        let first = taken(None, "a", PATIENCE, 0, Timestamp::UNIX_EPOCH);
        assert_eq!(epoch_of(&first), 1);
        let second = taken(Some(first.clone()), "b", PATIENCE, 0, Timestamp::UNIX_EPOCH);
        assert_eq!(epoch_of(&second), 2);
        let restored = taken(None, "c", PATIENCE, 41, Timestamp::UNIX_EPOCH);
        assert_eq!(epoch_of(&restored), 42, "the Lease was lost, the ModelNodes were not");
        let same_again = taken(Some(second), "b", PATIENCE, 0, Timestamp::UNIX_EPOCH);
        assert_eq!(epoch_of(&same_again), 3, "a process that is started again must not write under its old term");
    }

    #[test]
    fn the_right_to_write_ends_by_itself() {
        let leadership = Leadership::new(1, Duration::from_secs(10));
        assert!(leadership.held(Duration::from_millis(9999)));
        assert!(!leadership.held(Duration::from_secs(10)));
        leadership.extend(Duration::from_secs(12));
        assert!(leadership.held(Duration::from_secs(11)));
    }
}
