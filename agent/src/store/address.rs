//! Which addresses remote sources may have.
//!
//! A ModelDeployment's author chooses the URL and the node fetches it, so without this any of them could read the
//! cloud's metadata service or what listens inside the cluster. Names are checked when they are resolved, by the
//! addresses that are then connected to, so a name that changes its answer gains nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::error::AddressNotAllowed;

/// Which networks may be reached.
#[derive(Debug, Clone, Default)]
pub(super) struct AddressPolicy {
    /// Reachable although they are private.
    pub(super) allowed: Vec<IpNet>,
    /// Not reachable although they are public, such as a cluster's own ranges; stronger than `allowed`.
    pub(super) denied: Vec<IpNet>,
}

impl AddressPolicy {
    /// Whether models may be fetched from this address.
    pub(super) fn permits(&self, address: IpAddr) -> bool {
        let address = embedded(address);
        let is_in = |networks: &[IpNet]| networks.iter().any(|n| n.contains(&address));
        !is_in(&self.denied) && (is_public(address) || is_in(&self.allowed))
    }

    /// Checks a URL's host if it is an address; names are checked when they are resolved.
    pub(super) fn check_literal(&self, url: &Url) -> Result<(), AddressNotAllowed> {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        if self.permits(address) { Ok(()) } else { Err(AddressNotAllowed { host: address.to_string(), address }) }
    }
}

/// The IPv4 address that an IPv6 one stands for, so that no notation goes round the rules.
fn embedded(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    if let Some(v4) = v6.to_ipv4_mapped() {
        return v4.into();
    }
    let pair = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        Ipv4Addr::new(a, b, c, d).into()
    };
    match v6.segments() {
        // NAT64, 6to4, and the old "IPv4-compatible" form.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => pair(high, low),
        [0, 0, 0, 0, 0, 0, high, low] if v6 != Ipv6Addr::LOCALHOST && !v6.is_unspecified() => pair(high, low),
        _ => address,
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let is_special = v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_documentation()
                || a == 0
                || a >= 240
                || (a == 100 && (64..128).contains(&b)) // carrier-grade NAT, used for pods by some clouds
                || (a == 198 && (18..20).contains(&b)) // benchmarks
                || (a, b, c) == (192, 0, 0);
            !is_special
        }
        // 2000::/3 is all that is given out, less what is for documentation and tunnels.
        IpAddr::V6(v6) => match v6.segments() {
            [0x2001, 0x0db8 | 0..=0x01ff, ..] | [0x3fff, 0..=0x0fff, ..] => false,
            [first, ..] => first & 0xe000 == 0x2000,
        },
    }
}

/// Resolves names with the system's resolver and refuses those with any address that is not permitted.
pub(super) struct GuardedResolver {
    pub(super) policy: Arc<AddressPolicy>,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = Arc::clone(&self.policy);
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            if let Some(bad) = addresses.iter().find(|a| !policy.permits(a.ip())) {
                return Err(AddressNotAllowed { host, address: bad.ip() }.into());
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(policy: &AddressPolicy, address: &str) -> bool {
        policy.permits(address.parse().expect("an address"))
    }

    #[test]
    fn private_and_special_addresses_are_refused_in_every_notation() {
        let policy = AddressPolicy::default();
        for refused in [
            "127.0.0.1",
            "127.8.9.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "198.18.0.1",
            "192.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "fd00:ec2::254",
            "2001:db8::1",
            "2001::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::1",
            "64:ff9b:1::1",
        ] {
            assert!(!permits(&policy, refused), "{refused}");
        }
        for allowed in ["1.1.1.1", "93.184.216.34", "100.128.0.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"] {
            assert!(permits(&policy, allowed), "{allowed}");
        }
    }

    #[test]
    fn the_admin_opens_and_closes_networks_and_closing_wins() {
        let network = |text: &str| text.parse().expect("a network");
        let policy = AddressPolicy {
            allowed: vec![network("10.0.0.0/8"), network("fd00::/8")],
            denied: vec![network("10.96.0.0/12"), network("1.2.3.0/24")],
        };
        for (address, expected) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("fd00::1", true),
            ("10.96.0.1", false),
            ("1.2.3.4", false),
            ("1.2.4.4", true),
            ("192.168.0.1", false),
        ] {
            assert_eq!(permits(&policy, address), expected, "{address}");
        }
    }

    #[test]
    fn url_hosts_that_are_addresses_are_checked_however_they_are_written() {
        let policy = AddressPolicy::default();
        for refused in ["https://127.0.0.1/x", "https://0x7f000001/x", "https://2130706433/x", "https://[::1]/x"] {
            let url = url::Url::parse(refused).expect("a URL");
            assert!(policy.check_literal(&url).is_err(), "{refused}");
        }
        let named = url::Url::parse("https://example.com/x").expect("a URL");
        assert!(policy.check_literal(&named).is_ok());
    }
}
