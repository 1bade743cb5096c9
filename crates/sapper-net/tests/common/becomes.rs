//! How a test waits for something to become true: never by a sleep, never without an end.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Longer than anything takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Fails unless what is looked at becomes `expected` in time. For whatever an I/O thread does after the
/// system call that a test has seen the effect of: it counts a packet when the call has returned, and by
/// then the packet may have been read.
#[track_caller]
pub(crate) fn assert_becomes<T: PartialEq + Debug>(expected: T, look: impl Fn() -> T) {
    let until = Instant::now() + DEADLINE;
    loop {
        let seen = look();
        if seen == expected {
            return;
        }
        assert!(Instant::now() < until, "it should become {expected:?}, and is {seen:?}");
        std::thread::yield_now();
    }
}
