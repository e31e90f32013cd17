//! Which port a model gets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use tokio::net::TcpListener;

/// Ports to try, in order: the one that the model had, then all of the range from a place that depends on the model
/// alone, so that a model finds its port again after the agent was replaced. Without a range any free one.
pub(super) fn candidates(uid: &str, had: Option<u16>, range: Option<&RangeInclusive<u16>>) -> Vec<u16> {
    let mut ports: Vec<u16> = had.into_iter().collect();
    match range {
        None => ports.push(0),
        Some(range) => {
            let all: Vec<u16> = range.clone().collect();
            if !all.is_empty() {
                let start = usize::try_from(fnv1a(uid) % all.len() as u64).unwrap_or(0);
                ports.extend(all[start..].iter().chain(&all[..start]));
            }
        }
    }
    ports
}

/// A hash that stays the same over builds and machines.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Listens on the first of `ports` that can be had.
pub(super) async fn listen(ip: IpAddr, ports: &[u16]) -> io::Result<TcpListener> {
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "the range of ports is empty");
    for port in ports {
        match TcpListener::bind(SocketAddr::new(ip, *port)).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_model_tries_its_own_port_first_and_every_port_once() {
        let range = 100..=109;
        let ports = candidates("uid-1", None, Some(&range));
        let mut sorted = ports.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, range.clone().collect::<Vec<_>>());
        assert_eq!(candidates("uid-1", None, Some(&range)), ports, "the same after a restart");
        assert!(
            (0..50).any(|uid| candidates(&uid.to_string(), None, Some(&range))[0] != ports[0]),
            "models are spread"
        );
        assert_eq!(candidates("uid-1", Some(107), Some(&range))[0], 107);
        assert_eq!(candidates("uid-1", Some(31000), None), [31000, 0]);
        assert_eq!(candidates("uid-1", None, None), [0]);
    }

    #[tokio::test]
    async fn a_taken_port_is_passed_over() {
        let loopback = Ipv4Addr::LOCALHOST.into();
        let first = listen(loopback, &[0]).await.unwrap();
        let taken = first.local_addr().unwrap().port();
        let second = listen(loopback, &[taken, 0]).await.unwrap();
        assert_ne!(second.local_addr().unwrap().port(), taken);
        assert_eq!(listen(loopback, &[taken]).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(listen(loopback, &[]).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
