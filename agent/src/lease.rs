//! The agent's sign of life: its Lease, renewed every third of its duration.
//!
//! The Lease also fences: of two agents for one node only the holder writes the node's status. Whether another holder
//! still lives is told by this process's own clock since it last saw the Lease change, never by comparing clocks.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use altiplano_crds::names;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The longest a call to the API server may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Whose Lease, and how long it is good for.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// The node.
    pub node: String,
    /// Uid of the agent's Pod: the holder.
    pub pod_uid: String,
    /// Time without renewal after which another may take it.
    pub duration: Duration,
}

/// Why the Lease could not be renewed.
#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error("cannot read or write the agent's Lease")]
    Api(#[from] kube::Error),
    #[error("the API server did not answer within {} s", CALL_TIMEOUT.as_secs())]
    TimedOut(#[from] tokio::time::error::Elapsed),
}

/// What to do with the Lease as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    Create,
    Renew,
    Take,
    Wait,
}

/// The last sight of a Lease that another holds.
#[derive(Clone, Debug, PartialEq)]
struct Sight {
    version: Option<String>,
    at: Instant,
}

/// Renews the Lease until `shutdown`, then gives it up. `held` is the time of the last renewal while this agent is the
/// holder; an outage of the API server leaves it as it is.
pub async fn hold(
    api: Api<Lease>,
    config: LeaseConfig,
    held: watch::Sender<Option<Instant>>,
    shutdown: CancellationToken,
) {
    let interval = config.duration / 3;
    let mut sight = None;
    let mut known: Option<Lease> = None;
    let mut failures = 0_u32;
    loop {
        let wait = match once(&api, &config, &mut known, &mut sight).await {
            Ok(is_holder) => {
                if failures > 0 {
                    tracing::info!(failures, "the API server answers again");
                }
                failures = 0;
                let holds = is_holder.then(Instant::now);
                if holds.is_some() != held.borrow().is_some() {
                    tracing::info!(holds = holds.is_some(), node = config.node, "the agent's Lease has changed hands");
                }
                held.send_replace(holds);
                interval
            }
            Err(error) => {
                known = None;
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                // Once, then seldom: an outage of hours must not fill a disk.
                if failures.is_power_of_two() || failures == 0 {
                    tracing::warn!(%error, cause, failures, "the Lease is not renewed; what is served goes on");
                }
                failures = failures.saturating_add(1);
                // A conflict or a first failure is tried again at once, an outage with longer and longer waits.
                Duration::from_millis(100).saturating_mul(1 << failures.min(10)).min(interval)
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => break,
            () = tokio::time::sleep(wait) => {}
        }
    }
    if held.send_replace(None).is_some() {
        give_up(&api, &config).await;
    }
}

/// Renews or takes the Lease where that is right; whether this agent holds it.
async fn once(
    api: &Api<Lease>,
    config: &LeaseConfig,
    known: &mut Option<Lease>,
    sight: &mut Option<Sight>,
) -> Result<bool, LeaseError> {
    let name = names::agent_lease(&config.node);
    if known.is_none() {
        *known = tokio::time::timeout(CALL_TIMEOUT, api.get_opt(&name)).await??;
    }
    let now = Instant::now();
    let action = decide(known.as_ref(), config, sight, now);
    let parameters = PostParams { field_manager: Some(names::AGENT_FIELD_MANAGER.to_owned()), ..PostParams::default() };
    let written = match action {
        Move::Wait => {
            *known = None;
            return Ok(false);
        }
        Move::Create => {
            let lease = wanted(None, config);
            tokio::time::timeout(CALL_TIMEOUT, api.create(&parameters, &lease)).await??
        }
        Move::Renew | Move::Take => {
            let lease = wanted(known.as_ref(), config);
            tokio::time::timeout(CALL_TIMEOUT, api.replace(&name, &parameters, &lease)).await??
        }
    };
    *known = Some(written);
    Ok(true)
}

fn decide(lease: Option<&Lease>, config: &LeaseConfig, sight: &mut Option<Sight>, now: Instant) -> Move {
    let Some(lease) = lease else { return Move::Create };
    let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    if holder == config.pod_uid {
        *sight = None;
        return Move::Renew;
    }
    if holder.is_empty() {
        return Move::Take;
    }
    let version = lease.metadata.resource_version.clone();
    match sight {
        Some(seen) if seen.version == version => {
            if now.duration_since(seen.at) > config.duration {
                Move::Take
            } else {
                Move::Wait
            }
        }
        _ => {
            *sight = Some(Sight { version, at: now });
            Move::Wait
        }
    }
}

/// The Lease as the holder writes it. Its resourceVersion, where there is one, refuses a write over somebody else's.
fn wanted(existing: Option<&Lease>, config: &LeaseConfig) -> Lease {
    let now = MicroTime(jiff::Timestamp::now());
    let old = existing.and_then(|lease| lease.spec.clone()).unwrap_or_default();
    let is_same = old.holder_identity.as_deref() == Some(config.pod_uid.as_str());
    let mut metadata = existing.map_or_else(ObjectMeta::default, |lease| lease.metadata.clone());
    metadata.name = Some(names::agent_lease(&config.node));
    metadata.managed_fields = None;
    let (component, agent) = names::AGENT_LEASE_LABEL;
    let labels = metadata.labels.get_or_insert_with(BTreeMap::new);
    labels.extend([
        (component.to_owned(), agent.to_owned()),
        (names::AGENT_VERSION_LABEL.to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        (names::AGENT_CONTRACT_LABEL.to_owned(), names::CONTRACT_VERSION.to_string()),
        (names::AGENT_POD_UID_LABEL.to_owned(), config.pod_uid.clone()),
    ]);
    let spec = LeaseSpec {
        holder_identity: Some(config.pod_uid.clone()),
        lease_duration_seconds: Some(i32::try_from(config.duration.as_secs()).unwrap_or(i32::MAX)),
        acquire_time: if is_same { old.acquire_time } else { Some(now.clone()) },
        lease_transitions: if is_same { old.lease_transitions } else { Some(old.lease_transitions.unwrap_or(0) + 1) },
        renew_time: Some(now),
        ..old
    };
    Lease { metadata, spec: Some(spec) }
}

/// So that a successor need not wait. Failing is no harm: it waits then.
async fn give_up(api: &Api<Lease>, config: &LeaseConfig) {
    let name = names::agent_lease(&config.node);
    let give = async {
        let Some(mut lease) = api.get_opt(&name).await? else { return Ok(()) };
        let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
        if spec.holder_identity.as_deref() == Some(config.pod_uid.as_str()) {
            spec.holder_identity = Some(String::new());
            lease.metadata.managed_fields = None;
            api.replace(&name, &PostParams::default(), &lease).await?;
        }
        Ok::<(), kube::Error>(())
    };
    match tokio::time::timeout(Duration::from_secs(2), give).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "cannot give up the Lease"),
        Err(_) => tracing::warn!("cannot give up the Lease in time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> LeaseConfig {
        LeaseConfig { node: "n1".to_owned(), pod_uid: "me".to_owned(), duration: Duration::from_secs(10) }
    }

    fn lease(holder: &str, version: &str) -> Lease {
        let mut lease = wanted(None, &LeaseConfig { pod_uid: holder.to_owned(), ..config() });
        lease.metadata.resource_version = Some(version.to_owned());
        lease
    }

    #[test]
    fn only_a_dead_holders_lease_is_taken() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut sight = None;
        assert_eq!(decide(None, &config(), &mut sight, at(0)), Move::Create);
        assert_eq!(decide(Some(&lease("me", "1")), &config(), &mut sight, at(0)), Move::Renew);
        assert_eq!(decide(Some(&lease("", "1")), &config(), &mut sight, at(0)), Move::Take);
        // Another one lives as long as its Lease changes, whatever times stand in it.
        assert_eq!(decide(Some(&lease("other", "1")), &config(), &mut sight, at(0)), Move::Wait);
        assert_eq!(decide(Some(&lease("other", "2")), &config(), &mut sight, at(9)), Move::Wait);
        assert_eq!(decide(Some(&lease("other", "2")), &config(), &mut sight, at(18)), Move::Wait);
        assert_eq!(decide(Some(&lease("other", "2")), &config(), &mut sight, at(20)), Move::Take);
    }

    #[test]
    fn the_lease_says_who_and_which_version() {
        let first = wanted(None, &config());
        let labels = first.metadata.labels.clone().unwrap();
        assert_eq!(labels["altiplano.dev/pod-uid"], "me");
        assert_eq!(labels["altiplano.dev/contract"], names::CONTRACT_VERSION.to_string());
        assert_eq!(labels["app.kubernetes.io/component"], "agent");
        let again = wanted(Some(&first), &config()).spec.unwrap();
        let first = first.spec.unwrap();
        assert_eq!((again.acquire_time, again.lease_transitions), (first.acquire_time.clone(), Some(1)));
        assert_eq!(first.lease_duration_seconds, Some(10));
        let taken = wanted(Some(&lease("other", "1")), &config()).spec.unwrap();
        assert_eq!(taken.lease_transitions, Some(2), "a new holder is a transition");
    }
}
