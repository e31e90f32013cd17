//! Command line and environment.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::leader::Times;

/// Places `ModelDeployment`s on the nodes of a cluster and keeps their Services.
#[derive(Parser, Clone, Debug)]
#[command(name = "altiplano-operator", version, about)]
pub struct Args {
    /// Namespace of the agents' Leases and of the leader's.
    #[arg(long, env = "ALTIPLANO_NAMESPACE", default_value = "altiplano-system")]
    pub namespace: String,

    /// Name under which this process stands for leader; the Pod's name in a cluster. Two live processes must not share
    /// one. Default: the host's name and a random part.
    #[arg(long, env = "ALTIPLANO_IDENTITY")]
    pub identity: Option<String>,

    /// Address of /livez, /readyz and /metrics.
    #[arg(long, env = "ALTIPLANO_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,

    /// Seconds that others wait after the leader's last sign of life before one of them leads.
    #[arg(long, env = "ALTIPLANO_LEASE_SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u16).range(3..))]
    pub lease_seconds: u16,

    /// Seconds after which a leader that could not renew ends itself; less than --lease-seconds. Default: two thirds of
    /// it, which is 10.
    #[arg(long, env = "ALTIPLANO_RENEW_DEADLINE_SECONDS", value_parser = clap::value_parser!(u16).range(1..))]
    pub renew_deadline_seconds: Option<u16>,

    /// Seconds between two tries to take or renew the leader's Lease; less than the renew deadline. Default: a fifth of
    /// it, which is 2.
    #[arg(long, env = "ALTIPLANO_RETRY_SECONDS", value_parser = clap::value_parser!(u16).range(1..))]
    pub retry_seconds: Option<u16>,

    /// Seconds without a renewal of its Lease after which an agent counts as stale and its endpoints go unready.
    #[arg(long, env = "ALTIPLANO_AGENT_LEASE_SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(2..))]
    pub agent_lease_seconds: u16,

    /// Seconds after which models move away from a stale node.
    #[arg(long, env = "ALTIPLANO_NODE_LOSS_GRACE_SECONDS", default_value_t = 60)]
    pub node_loss_grace_seconds: u16,

    /// Name of the agents' DaemonSet: where its update strategy is `OnDelete`, its Pods are replaced one by one, drained.
    #[arg(long, env = "ALTIPLANO_AGENT_DAEMON_SET", default_value = "altiplano-agent")]
    pub agent_daemon_set: String,

    /// Domain of the cluster's DNS, for URLs in status. Empty: URLs end in `.svc`.
    #[arg(long, env = "ALTIPLANO_CLUSTER_DOMAIN", default_value = "")]
    pub cluster_domain: String,

    /// How log lines are written.
    #[arg(long, env = "ALTIPLANO_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How log lines are written.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Arguments that contradict each other.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// A leader could lead on after another has taken over.
    #[error("--renew-deadline-seconds ({renew}) must be less than --lease-seconds ({lease})")]
    RenewDeadline {
        /// The renew deadline.
        renew: u16,
        /// The lease.
        lease: u16,
    },
    /// A leader would have one try only.
    #[error("--retry-seconds ({retry}) must be less than --renew-deadline-seconds ({renew})")]
    Retry {
        /// Time between tries.
        retry: u16,
        /// The renew deadline.
        renew: u16,
    },
}

impl Args {
    /// The three times of the election, which must fit together.
    ///
    /// # Errors
    /// Which two do not.
    pub fn times(&self) -> Result<Times, ArgsError> {
        let lease = self.lease_seconds;
        let renew = self.renew_deadline_seconds.unwrap_or(lease * 2 / 3);
        let retry = self.retry_seconds.unwrap_or((renew / 5).max(1));
        if renew >= lease {
            return Err(ArgsError::RenewDeadline { renew, lease });
        }
        if retry >= renew {
            return Err(ArgsError::Retry { retry, renew });
        }
        let [lease, renew_deadline, retry] = [lease, renew, retry].map(|seconds| Duration::from_secs(seconds.into()));
        Ok(Times { lease, renew_deadline, retry })
    }

    /// Time without a renewal after which an agent is stale.
    #[must_use]
    pub fn stale_after(&self) -> Duration {
        Duration::from_secs(self.agent_lease_seconds.into())
    }

    /// Time after which models leave a stale node.
    #[must_use]
    pub fn loss_grace(&self) -> Duration {
        Duration::from_secs(self.node_loss_grace_seconds.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Args {
        Args::parse_from(std::iter::once("altiplano-operator").chain(arguments.iter().copied()))
    }

    #[test]
    fn defaults_fit_together() {
        for lease in ["3", "6", "15", "60"] {
            assert!(parse(&["--lease-seconds", lease]).times().is_ok(), "{lease}");
        }
        let seconds = |times: Times| [times.lease, times.renew_deadline, times.retry].map(|time| time.as_secs());
        assert_eq!(parse(&[]).times().map(seconds), Ok([15, 10, 2]));
    }

    #[test]
    fn times_of_the_election_must_nest() {
        let error = parse(&["--lease-seconds", "10", "--renew-deadline-seconds", "10"]).times().err();
        assert_eq!(error, Some(ArgsError::RenewDeadline { renew: 10, lease: 10 }));
        let error = parse(&["--renew-deadline-seconds", "2", "--retry-seconds", "2"]).times().err();
        assert_eq!(error, Some(ArgsError::Retry { retry: 2, renew: 2 }));
    }

    #[test]
    fn a_typo_is_refused_not_taken_for_off() {
        assert!(Args::try_parse_from(["altiplano-operator", "--lease-seconds", "fifteen"]).is_err());
        assert!(Args::try_parse_from(["altiplano-operator", "--log-format", "jsn"]).is_err());
    }
}
