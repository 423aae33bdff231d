//! Wrong credentials by client address: answered 429 when there are many, and not even checked when there are very many.
//!
//! Each failure raises the address's level by one; the level falls by one every `REST`. From `MANY` on, wrong credentials
//! are answered 429 and right ones still let in, so a client with a wrong password locks nobody out who shares its address.
//! From `GUESSING` on, only credentials that have been right from this address before are checked, so guessing comes down to
//! one try per `REST`. Memory is bounded by `ADDRESSES` and `KNOWN`. An IPv6 address counts by its /64 network.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Failures that are answered 401.
const MANY: f64 = 10.0;
/// Failures after which new credentials are not checked.
const GUESSING: f64 = 100.0;
/// Time that takes one failure away.
const REST: Duration = Duration::from_secs(6);
/// Addresses that are remembered.
const ADDRESSES: usize = 4096;
/// Right credentials that are remembered, as digests.
const KNOWN: usize = 4096;

/// What to do with credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Look at them, or answer 401.
    Check,
    /// Answer 429; seconds after which to come again.
    Wait(u64),
}

/// The levels of all addresses.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    levels: HashMap<IpAddr, (f64, Instant)>,
    known: HashSet<(IpAddr, [u8; 32])>,
}

impl Throttle {
    /// Whether credentials, named by their digest, are to be checked at all.
    pub fn before(&self, address: IpAddr, digest: &[u8; 32], now: Instant) -> Verdict {
        let (state, address) = (self.lock(), network(address));
        let level = state.level(address, now);
        if level < GUESSING || state.known.contains(&(address, *digest)) {
            Verdict::Check
        } else {
            Verdict::Wait(seconds_until(level, GUESSING))
        }
    }

    /// Notes credentials that were right.
    pub fn succeeded(&self, address: IpAddr, digest: &[u8; 32]) {
        let mut state = self.lock();
        if state.known.len() >= KNOWN {
            state.known.clear();
        }
        state.known.insert((network(address), *digest));
    }

    /// Notes credentials that were wrong.
    pub fn failed(&self, address: IpAddr, now: Instant) -> Verdict {
        let (mut state, address) = (self.lock(), network(address));
        let level = state.level(address, now) + 1.0;
        if state.levels.len() >= ADDRESSES && !state.levels.contains_key(&address) {
            state.make_room(now);
        }
        state.levels.insert(address, (level, now));
        if level <= MANY {
            Verdict::Check
        } else {
            Verdict::Wait(seconds_until(level, MANY))
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn level(&self, address: IpAddr, now: Instant) -> f64 {
        self.levels.get(&address).map_or(0.0, |(level, at)| {
            let rests = now.saturating_duration_since(*at).as_secs_f64() / REST.as_secs_f64();
            (level - rests).max(0.0)
        })
    }

    /// Forgets the half of the addresses with the lowest levels.
    fn make_room(&mut self, now: Instant) {
        let addresses: Vec<IpAddr> = self.levels.keys().copied().collect();
        let mut by_level: Vec<(f64, IpAddr)> = addresses
            .into_iter()
            .map(|address| (self.level(address, now), address))
            .collect();
        by_level.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (_, address) in &by_level[..by_level.len() / 2] {
            self.levels.remove(address);
        }
    }
}

fn seconds_until(level: f64, wanted: f64) -> u64 {
    ((level - wanted).max(0.0) * REST.as_secs_f64())
        .ceil()
        .max(1.0) as u64
}

fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) >> 64 << 64)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn many_failures_are_told_to_wait_and_rest_heals() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        for _ in 0..10 {
            assert_eq!(throttle.failed(HERE, now), Verdict::Check);
        }
        assert_eq!(throttle.failed(HERE, now), Verdict::Wait(6));
        assert_eq!(throttle.failed(THERE, now), Verdict::Check);
        let later = now + REST * 5;
        assert_eq!(throttle.failed(HERE, later), Verdict::Check);
    }

    #[test]
    fn guessing_is_stopped_and_known_credentials_are_not() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        let (mine, new) = ([1; 32], [2; 32]);
        throttle.succeeded(HERE, &mine);
        for _ in 0..100 {
            assert_eq!(throttle.before(HERE, &new, now), Verdict::Check);
            throttle.failed(HERE, now);
        }
        assert_eq!(throttle.before(HERE, &new, now), Verdict::Wait(1));
        assert_eq!(throttle.before(HERE, &mine, now), Verdict::Check);
        assert_eq!(throttle.before(THERE, &new, now), Verdict::Check);
        assert_eq!(throttle.before(HERE, &new, now + REST), Verdict::Check);
    }

    #[test]
    fn memory_is_bounded_and_the_worst_are_kept() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        for _ in 0..200 {
            throttle.failed(HERE, now);
        }
        for number in 0..20_000u32 {
            throttle.failed(IpAddr::V4(Ipv4Addr::from(number)), now);
            throttle.succeeded(HERE, &Sha(number).into());
        }
        let state = throttle.lock();
        assert!(state.levels.len() <= ADDRESSES && state.known.len() <= KNOWN);
        assert!(state.level(HERE, now) >= 200.0);
    }

    struct Sha(u32);

    impl From<Sha> for [u8; 32] {
        fn from(number: Sha) -> Self {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&number.0.to_le_bytes());
            bytes
        }
    }

    #[test]
    fn an_ipv6_client_is_its_network() {
        let a: IpAddr = "2001:db8:1:2::5".parse().unwrap();
        let b: IpAddr = "2001:db8:1:2:ffff::1".parse().unwrap();
        assert_eq!(network(a), network(b));
        assert_eq!(network("::ffff:10.0.0.1".parse().unwrap()), HERE);
    }
}
