//! When to try again: longer pauses after each failure, spread by chance, short again after success.
//!
//! Chance is an argument. Half of each pause is fixed and half is drawn, so that a thousand clients whose
//! server was restarted do not come back in the same moment.

use std::time::Duration;

/// The pauses of one client.
///
/// Order of calls: [`next`](Self::next) after each failure; [`reset`](Self::reset) when a connection has
/// done its work.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Pauses that begin with `first`, double, and end with `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest: longest.max(first), failures: 0 }
    }

    /// How long to wait after one more failure. `entropy` is any number, drawn by the caller.
    pub fn next(&mut self, entropy: u64) -> Duration {
        let doubled = 1u32.checked_shl(self.failures).and_then(|factor| self.first.checked_mul(factor));
        let pause = doubled.map_or(self.longest, |pause| pause.min(self.longest));
        self.failures = self.failures.saturating_add(1);
        let share = (entropy >> 11) as f64 / (1u64 << 53) as f64;
        pause.mul_f64(0.5 + share / 2.0)
    }

    /// The same, but not before what a server asked for.
    pub fn next_after(&mut self, least: Duration, entropy: u64) -> Duration {
        self.next(entropy).max(least)
    }

    /// It worked: the next failure is the first again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since it worked.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew() {
        let mut backoff = Backoff::new(SECOND, 10 * SECOND);
        let pauses: Vec<u64> = (0..6).map(|_| backoff.next(u64::MAX).as_secs_f64().round() as u64).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 10, 10]);
        backoff.reset();
        assert_eq!(backoff.next(0), SECOND / 2);
        assert_eq!(backoff.failures(), 1);
        assert_eq!(backoff.next_after(60 * SECOND, 0), 60 * SECOND);
    }

    #[test]
    fn chance_spreads_the_second_half() {
        for entropy in [0, 1 << 40, u64::MAX / 2, u64::MAX] {
            for failures in [0, 3, 31, 32, 40, u32::MAX] {
                let mut backoff = Backoff { failures, ..Backoff::new(SECOND, 60 * SECOND) };
                let whole = SECOND.saturating_mul(1u32.checked_shl(failures).unwrap_or(u32::MAX));
                let whole = whole.min(60 * SECOND);
                let pause = backoff.next(entropy);
                assert!(pause >= whole / 2 && pause <= whole, "{failures} {entropy}: {pause:?}");
            }
        }
    }
}
