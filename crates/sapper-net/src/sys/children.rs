//! Descriptors that a forked child does not keep: its copies are closed before it does anything.
//!
//! A child has no I/O threads, so it could not use them, and a port would be taken for as long as the child lives.
//! That the copies are closed changes nothing in the parent: event loops watch the socket, which is still open there.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::forks;

/// As many as a process may have where nobody raised `fs.nr_open`; a child keeps those beyond.
const MOST: usize = 1 << 20;

/// One bit each: what a fork's child does may neither allocate nor lock.
static OURS: [AtomicU64; MOST / 64] = [const { AtomicU64::new(0) }; MOST / 64];
/// Behind the last word of these that ever had a bit.
static WORDS: AtomicUsize = AtomicUsize::new(0);

/// Says that a descriptor is not for children, as long as this lives: it has to go before the descriptor does.
#[derive(Debug)]
pub struct NotForChildren {
    descriptor: usize,
}

impl NotForChildren {
    /// From here on.
    pub fn new(descriptor: BorrowedFd<'_>) -> Self {
        // Watches for forks.
        let _ = forks();
        let descriptor = descriptor.as_raw_fd().unsigned_abs() as usize;
        if let Some(word) = OURS.get(descriptor / 64) {
            word.fetch_or(1 << (descriptor % 64), Ordering::SeqCst);
            WORDS.fetch_max(descriptor / 64 + 1, Ordering::SeqCst);
        }
        Self { descriptor }
    }
}

impl Drop for NotForChildren {
    fn drop(&mut self) {
        if let Some(word) = OURS.get(self.descriptor / 64) {
            word.fetch_and(!(1 << (self.descriptor % 64)), Ordering::SeqCst);
        }
    }
}

/// In a child, right behind the fork: only what a handler of signals may do as well.
pub(super) fn close_in_child() {
    for (at, word) in OURS.iter().enumerate().take(WORDS.load(Ordering::SeqCst)) {
        let mut bits = word.swap(0, Ordering::SeqCst);
        while bits != 0 {
            let descriptor = at * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            // SAFETY: a bit says that it is open, and nothing in a child uses or closes it: whoever would is a thread
            // that does not exist here, or knows that it is in a child.
            unsafe { libc::close(descriptor as libc::c_int) };
        }
    }
}
