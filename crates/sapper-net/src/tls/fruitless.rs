//! Records without application data: how many a peer may send.
//!
//! Empty ones, tickets, key updates and warnings cost us work and bring nothing, so as many as a peer likes are an
//! attack. Now and then they are the peer's good right, also where it sends nothing else for days: a client that only
//! receives, and changes its keys each hour.

use std::time::{Duration, Instant};

/// So many within [`WINDOW`], without a byte of data between them.
const MOST: u8 = 32;
const WINDOW: Duration = Duration::from_secs(1);

/// Counts them.
#[derive(Default)]
pub(crate) struct Fruitless {
    count: u8,
    since: Option<Instant>,
}

impl Fruitless {
    /// Data came.
    pub(crate) fn data(&mut self) {
        self.count = 0;
    }

    /// One more came; whether that is within bounds.
    pub(crate) fn one_more(&mut self, now: Instant) -> bool {
        let fresh = self.count == 0 || self.since.is_none_or(|since| now.duration_since(since) > WINDOW);
        if fresh {
            (self.count, self.since) = (0, Some(now));
        }
        self.count += 1;
        self.count <= MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_has_a_bound() {
        let (mut fruitless, now) = (Fruitless::default(), Instant::now());
        assert!((0..MOST).all(|_| fruitless.one_more(now)));
        assert!(!fruitless.one_more(now + WINDOW));
    }

    #[test]
    fn data_and_time_begin_anew() {
        let (mut fruitless, now) = (Fruitless::default(), Instant::now());
        for second in 0..1_000 {
            assert!(fruitless.one_more(now + Duration::from_millis(100 * second)));
        }
        let mut fruitless = Fruitless::default();
        for _ in 0..1_000 {
            assert!(fruitless.one_more(now));
            fruitless.data();
        }
    }
}
