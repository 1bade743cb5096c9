//! How many descriptors a process may have.

use std::os::fd::{AsRawFd, BorrowedFd};

/// Of the table one part in so many is kept back: for files that are read again, names that are looked up.
const KEPT_BACK: u64 = 16;

/// How many connections this process may still open behind `newest`, its newest descriptor: the system gives the
/// lowest number that is free.
pub(crate) fn descriptors_left(newest: BorrowedFd<'_>) -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit fills the structure it is given.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return usize::MAX;
    }
    let (most, taken) = (limit.rlim_cur, u64::try_from(newest.as_raw_fd()).unwrap_or(0) + 1);
    usize::try_from((most - most / KEPT_BACK).saturating_sub(taken)).unwrap_or(usize::MAX)
}
