//! How often one address may connect: a token bucket for each, in a table that does not grow.
//!
//! Time is an argument.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::stream::address::network;

/// Addresses that are remembered in each of two generations: 2 MB together.
const GENERATION: usize = 16_384;

/// New connections of one address: so many a second, and so many at once after a pause.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Connections a second.
    pub per_second: f64,
    /// Connections at once.
    pub burst: u32,
}

impl Rate {
    pub(crate) fn check(&self) -> Result<()> {
        if !(self.per_second.is_finite() && self.per_second > 0.0) {
            return Err(Error::config("rate", "must be a number above zero"));
        }
        if self.burst == 0 {
            return Err(Error::config("burst", "must be at least 1"));
        }
        Ok(())
    }
}

/// The buckets. An IPv6 client has a /64 at its disposal, so that is one address here.
///
/// When the newer generation is full it becomes the older one, and what was in that is forgotten, which is a
/// full bucket: whoever has that many addresses is not held up by a limit per address.
#[derive(Default)]
pub(crate) struct Buckets {
    newer: HashMap<u64, Bucket>,
    older: HashMap<u64, Bucket>,
}

#[derive(Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Buckets {
    /// Whether one more connection of `address` may come now.
    pub(crate) fn take(&mut self, address: IpAddr, rate: &Rate, now: Instant) -> bool {
        let key = network(address);
        let burst = f64::from(rate.burst);
        let mut bucket = match self.newer.get(&key).or_else(|| self.older.get(&key)) {
            Some(bucket) => *bucket,
            None => Bucket { tokens: burst, at: now },
        };
        let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.tokens = (bucket.tokens + passed * rate.per_second).min(burst);
        bucket.at = now;
        let allowed = bucket.tokens >= 1.0;
        if allowed {
            bucket.tokens -= 1.0;
        }
        if self.newer.len() >= GENERATION && !self.newer.contains_key(&key) {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(key, bucket);
        allowed
    }

    /// Addresses that are remembered.
    pub(super) fn len(&self) -> usize {
        self.newer.len() + self.older.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const RATE: Rate = Rate { per_second: 2.0, burst: 3 };

    #[test]
    fn a_burst_passes_and_then_so_many_a_second() {
        let mut buckets = Buckets::default();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let start = Instant::now();
        for _ in 0..3 {
            assert!(buckets.take(address, &RATE, start));
        }
        assert!(!buckets.take(address, &RATE, start));
        assert!(!buckets.take(address, &RATE, start + Duration::from_millis(400)));
        assert!(buckets.take(address, &RATE, start + Duration::from_millis(500)));
        assert!(!buckets.take(address, &RATE, start + Duration::from_millis(500)));
        let much_later = start + Duration::from_secs(3600);
        assert_eq!((0..10).filter(|_| buckets.take(address, &RATE, much_later)).count(), 3);
    }

    #[test]
    fn addresses_do_not_share_and_one_ipv6_network_does() {
        let mut buckets = Buckets::default();
        let now = Instant::now();
        let mut left =
            |text: &str| (0..4).filter(|_| buckets.take(text.parse().unwrap(), &RATE, now)).count();
        assert_eq!(left("192.0.2.1"), 3);
        assert_eq!(left("192.0.2.2"), 3);
        assert_eq!(left("::ffff:192.0.2.1"), 0);
        assert_eq!(left("2001:db8::1"), 3);
        assert_eq!(left("2001:db8::ffff:1"), 0);
        assert_eq!(left("2001:db8:0:1::1"), 3);
    }

    #[test]
    fn the_table_does_not_grow() {
        let mut buckets = Buckets::default();
        let now = Instant::now();
        for n in 0..100_000_u32 {
            buckets.take(IpAddr::from(n.to_be_bytes()), &RATE, now);
        }
        assert!(buckets.len() <= 2 * GENERATION);
        // The last ones are still known.
        let last = IpAddr::from(99_999_u32.to_be_bytes());
        assert_eq!((0..4).filter(|_| buckets.take(last, &RATE, now)).count(), 2);
    }
}
