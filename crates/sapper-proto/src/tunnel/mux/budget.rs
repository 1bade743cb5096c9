//! Memory of several connections together: one number that all of them keep.

use std::sync::atomic::{AtomicUsize, Ordering};

/// A bound over all connections that share it.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    /// Of so many bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    /// How many bytes all connections hold.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether they hold more than they should. A connection that holds little goes on nevertheless.
    pub fn is_exhausted(&self) -> bool {
        self.used() > self.limit
    }

    /// Somebody held `before` and holds `after` now.
    pub(super) fn change(&self, before: usize, after: usize) {
        if after > before {
            self.used.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.used.fetch_sub(before - after, Ordering::Relaxed);
        }
    }
}
