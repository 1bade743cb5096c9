//! How much in what time: a bucket that fills at a rate, for connections or for bytes.

use std::time::Duration;

/// A token bucket. What is taken beyond its content is a debt, and the caller waits until it is paid:
/// bytes that were read already cannot be refused.
///
/// Order of calls: [`try_take`](Self::try_take) before something that can be refused (a connection), or
/// [`ready_at`](Self::ready_at) before and [`take`](Self::take) after something that cannot (a read).
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Tokens a second.
    rate: f64,
    burst: f64,
    tokens: f64,
    at: Duration,
}

impl Bucket {
    /// Fills at `rate` tokens a second, up to `burst`, and is full at first. A rate of 0 lets the burst
    /// pass and nothing more.
    pub fn new(rate: u64, burst: u64, now: Duration) -> Self {
        let burst = burst.max(1) as f64;
        Self { rate: rate as f64, burst, tokens: burst, at: now }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + passed * self.rate).min(self.burst);
    }

    /// Takes `n` tokens where there are so many.
    pub fn try_take(&mut self, n: u64, now: Duration) -> bool {
        self.fill(now);
        let enough = self.tokens >= n as f64;
        if enough {
            self.tokens -= n as f64;
        }
        enough
    }

    /// Takes `n` tokens, whether there are so many or not.
    pub fn take(&mut self, n: u64, now: Duration) {
        self.fill(now);
        self.tokens -= n as f64;
    }

    /// Takes `n` tokens, whether there are so many or not, for whoever waits until they are paid for: from
    /// when that is. Those who come behind wait behind.
    pub fn reserve(&mut self, n: u64, now: Duration) -> Duration {
        self.take(n, now);
        if self.tokens >= 0.0 {
            return now;
        }
        let seconds = if self.rate == 0.0 { f64::MAX } else { -self.tokens / self.rate };
        now + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
    }

    /// Tokens that were taken and not used.
    pub fn give_back(&mut self, n: u64) {
        self.tokens = (self.tokens + n as f64).min(self.burst);
    }

    /// Whether it is as it was at first.
    pub fn is_full(&mut self, now: Duration) -> bool {
        self.fill(now);
        self.tokens >= self.burst
    }

    /// When there is at least one token: now, later, or never.
    pub fn ready_at(&mut self, now: Duration) -> Option<Duration> {
        self.fill(now);
        if self.tokens >= 1.0 {
            return Some(now);
        }
        if self.rate == 0.0 {
            return None;
        }
        let seconds = (1.0 - self.tokens) / self.rate;
        // Rounded up: at that moment the token is there.
        Some(
            now + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4) + Duration::from_nanos(1),
        )
    }

    /// How many tokens are there.
    pub fn available(&mut self, now: Duration) -> u64 {
        self.fill(now);
        self.tokens.max(0.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_and_then_the_rate() {
        let mut bucket = Bucket::new(10, 5, SECOND);
        assert_eq!((0..9).filter(|_| bucket.try_take(1, SECOND)).count(), 5);
        assert!(!bucket.try_take(1, SECOND + Duration::from_millis(99)));
        assert!(bucket.try_take(1, SECOND + Duration::from_millis(101)));
        assert_eq!(bucket.available(100 * SECOND), 5, "it does not overflow");
        assert_eq!(bucket.available(SECOND), 5, "a clock that goes back changes nothing");
    }

    #[test]
    fn debts_are_paid() {
        let mut bucket = Bucket::new(1000, 100, SECOND);
        bucket.take(1_100, SECOND);
        let at = bucket.ready_at(SECOND).unwrap();
        assert!(at > 2 * SECOND && at < 2 * SECOND + Duration::from_millis(2), "{at:?}");
        assert_eq!(bucket.clone().ready_at(at), Some(at));
        let mut closed = Bucket::new(0, 1, SECOND);
        assert!(closed.try_take(1, SECOND));
        assert_eq!(closed.ready_at(9 * SECOND), None);
    }

    proptest! {
        /// Who waits as long as it is told to passes no more than burst and rate allow, and what is given back
        /// is there again.
        #[test]
        fn reservations_are_in_time(rate in 1u64..1_000, burst in 1u64..1_000, steps in proptest::collection::vec((0u64..50, 1u64..50, 0u64..50), 0..100)) {
            let mut bucket = Bucket::new(rate, burst, SECOND);
            let (mut now, mut passed, mut before) = (SECOND, 0, SECOND);
            for (ms, n, unused) in steps {
                now += Duration::from_millis(ms);
                let at = bucket.reserve(n, now);
                prop_assert!(at >= now && at >= before.min(at));
                let unused = unused.min(n);
                bucket.give_back(unused);
                passed += n - unused;
                let most = burst as f64 + (at - SECOND).as_secs_f64() * rate as f64;
                prop_assert!(passed as f64 <= most + 1e-3, "{passed} {most}");
                before = at;
                now = at;
            }
        }

        /// In no time more passes than the burst and the rate allow.
        #[test]
        fn never_more(rate in 1u64..1_000, burst in 1u64..1_000, steps in proptest::collection::vec((0u64..500, 1u64..50), 0..100)) {
            let mut bucket = Bucket::new(rate, burst, SECOND);
            let (mut now, mut passed) = (SECOND, 0);
            for (ms, n) in steps {
                now += Duration::from_millis(ms);
                if bucket.try_take(n, now) {
                    passed += n;
                }
                let most = burst as f64 + (now - SECOND).as_secs_f64() * rate as f64;
                prop_assert!(passed as f64 <= most + 1e-3);
            }
        }
    }
}
