//! Which ports are worth a look: a bit for each, set by the port's own waker.
//!
//! Without it every wake-up would poll every port, and a hub has thousands.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

use super::MOST_PORTS;

const WORDS: usize = MOST_PORTS / 64;

/// The bits, and whom to wake for the first one.
pub(super) struct ReadySet {
    words: [AtomicU64; WORDS],
    task: Mutex<Option<Waker>>,
}

impl ReadySet {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { words: [const { AtomicU64::new(0) }; WORDS], task: Mutex::new(None) })
    }

    /// Who is woken from now on.
    pub(super) fn set_task(&self, waker: &Waker) {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if !task.as_ref().is_some_and(|old| old.will_wake(waker)) {
            *task = Some(waker.clone());
        }
    }

    /// Notes that a port is worth a look.
    pub(super) fn set(&self, index: usize) {
        self.words[index / 64].fetch_or(1 << (index % 64), Ordering::AcqRel);
    }

    /// The next port from `from` on and below `to` that has its bit set, which is cleared.
    pub(super) fn take_within(&self, from: usize, to: usize) -> Option<usize> {
        let mut at = from;
        while at < to {
            let word = &self.words[at / 64];
            let waiting = word.load(Ordering::Acquire) >> (at % 64);
            if waiting != 0 {
                let found = at + waiting.trailing_zeros() as usize;
                if found >= to {
                    return None;
                }
                word.fetch_and(!(1 << (found % 64)), Ordering::AcqRel);
                return Some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Whether any bit is set.
    pub(super) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| word.load(Ordering::Acquire) == 0)
    }
}

/// A port's waker.
pub(super) struct PortWaker {
    pub(super) set: Arc<ReadySet>,
    pub(super) index: usize,
}

impl Wake for PortWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.set.set(self.index);
        let task = self.set.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_found_in_order_and_once() {
        let set = ReadySet::new();
        for index in [0, 5, 63, 64, 700, MOST_PORTS - 1] {
            set.set(index);
        }
        let mut found = Vec::new();
        let mut at = 5;
        while let Some(index) = set.take_within(at, MOST_PORTS) {
            found.push(index);
            at = index + 1;
        }
        assert_eq!(found, [5, 63, 64, 700, MOST_PORTS - 1]);
        assert!(!set.is_empty());
        assert_eq!((set.take_within(0, 1), set.take_within(0, 1)), (Some(0), None));
        set.set(70);
        assert_eq!((set.take_within(0, 70), set.take_within(0, 71)), (None, Some(70)));
        assert!(set.is_empty());
    }
}
