//! Connections that the server makes because a client said so: pictures by address, and webhooks.
//!
//! Invariant: unless an operator allows it, no such connection reaches a private, loopback or otherwise special address,
//! whatever name, redirect or DNS answer leads there: the check is made on the very addresses that are then connected to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ureq::Agent;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

/// Where such connections may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Only to addresses of the public internet.
    Public,
    /// Anywhere.
    Anywhere,
}

/// An HTTP client for one such connection.
#[must_use]
pub fn agent(reach: Reach, timeout: Duration, user_agent: &str) -> Agent {
    let mut config = Config::builder()
        .timeout_global(Some(timeout))
        .max_redirects(3);
    if !user_agent.is_empty() {
        config = config.user_agent(user_agent);
    }
    let resolver = Checked {
        reach,
        inner: DefaultResolver::default(),
    };
    Agent::with_parts(config.build(), DefaultConnector::default(), resolver)
}

/// Why an address is not connected to.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{host}` is the local address {address}; the option `api_forbid_local_requests` forbids it"
)]
struct Local {
    host: String,
    address: IpAddr,
}

/// Whether an error is a refusal by [`Reach::Public`].
#[must_use]
pub fn is_local_refusal(error: &ureq::Error) -> bool {
    matches!(error, ureq::Error::Other(other) if other.is::<Local>())
}

#[derive(Debug)]
struct Checked {
    reach: Reach,
    inner: DefaultResolver,
}

impl Resolver for Checked {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let addresses = self.inner.resolve(uri, config, timeout)?;
        let local = addresses.iter().find(|address| !is_global(address.ip()));
        match (self.reach, local) {
            (Reach::Public, Some(address)) => Err(ureq::Error::Other(Box::new(Local {
                host: uri.host().unwrap_or_default().to_string(),
                address: address.ip(),
            }))),
            _ => Ok(addresses),
        }
    }
}

/// Whether an address belongs to the public internet (IANA special-purpose registries, RFC 6890).
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_global_v4(v4),
        IpAddr::V6(v6) => is_global_v6(v6),
    }
}

fn is_global_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        // Carrier-grade NAT, protocol assignments, 6to4 relays, benchmarks.
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (b == 18 || b == 19));
    !special
}

fn is_global_v6(address: Ipv6Addr) -> bool {
    let words = address.segments();
    let embedded = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        is_global_v4(Ipv4Addr::new(a, b, c, d))
    };
    match words {
        // IPv4 in IPv6: mapped, compatible, translated (NAT64), 6to4.
        [0, 0, 0, 0, 0, 0xffff | 0, high, low] => high != 0 && embedded(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => embedded(high, low),
        // Unique local, link local, site local, multicast, documentation, Teredo and other assignments.
        [first, ..] if first & 0xfe00 == 0xfc00 || first & 0xff80 == 0xfe80 => false,
        [first, ..] if first & 0xff00 == 0xff00 => false,
        [0x2001, 0xdb8, ..] | [0x3fff, ..] | [0x100, 0, 0, 0, ..] => false,
        [0x2001, second, ..] if second < 0x200 => false,
        _ => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_public_internet_are_global() {
        for local in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "192.0.0.8",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "203.0.113.7",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2001:db8::1",
            "2001::1",
            "100::1",
        ] {
            assert!(!is_global(local.parse().unwrap()), "{local}");
        }
        for public in [
            "1.1.1.1",
            "8.8.8.8",
            "172.32.0.1",
            "2606:4700::1111",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
        ] {
            assert!(is_global(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn names_and_numbers_of_this_machine_are_refused_before_a_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        listener.set_nonblocking(true).unwrap();
        let agent = agent(Reach::Public, Duration::from_secs(5), "");
        for host in ["127.0.0.1", "localhost", "2130706433", "[::1]"] {
            let error = agent
                .get(format!("http://{host}:{port}/"))
                .call()
                .unwrap_err();
            let refused = is_local_refusal(&error)
                || matches!(error, ureq::Error::HostNotFound | ureq::Error::Io(_));
            assert!(refused, "{host}: {error:?}");
        }
        assert!(listener.accept().is_err(), "nobody has come");
    }
}
