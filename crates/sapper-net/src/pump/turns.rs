//! How much a direction moves before others have their turn.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use crate::sys;

/// Rounds of receive-and-send that a direction does before the other one and the thread's other
/// tasks get their turn: 2 MiB of a stream.
pub(super) const ROUNDS: usize = 8;

/// The same of a direction with short turns: a read, its write, and a look whether there is more, so that who has a
/// byte now and then is through before the core is offered.
const SHORT_ROUNDS: usize = 3;
/// What such a direction reads at a time while others move something too.
const SHORT_READ: usize = 128 * 1024;
/// And while it is alone: as many whole TLS records as are sealed and written at once.
const ALONE_READ: usize = 15 * 16 * 1024;
/// It is alone once it read so often in a row and nobody else did: about 20 ms of bulk.
const ALONE: u8 = 64;

/// How much a direction moves before others have their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turns {
    /// Eight rounds; then the other direction and the thread's other tasks have theirs.
    Long,
    /// A read or two of a stream, of 128 KiB at most where another direction with short turns read lately, and their
    /// writes; then the core is offered to other threads as well, of any process: for pumps beside which somebody waits for
    /// single bytes. Costs some bulk where cores are scarce.
    Short,
}

/// Which direction with short turns read last, in the whole process.
static LAST: AtomicU32 = AtomicU32::new(0);
/// The number of the next such direction: odd, so that none is [`LONG`].
static NEXT: AtomicU32 = AtomicU32::new(1);
/// The number of those with long turns.
const LONG: u32 = 0;

/// One direction's turns. An idle pump has two of them, so they are small.
pub(super) struct TurnTaker {
    /// Its number among those with short turns.
    own: u32,
    /// How often it read since another did.
    in_a_row: u8,
}

impl TurnTaker {
    pub(super) fn new(turns: Turns) -> Self {
        let own = match turns {
            Turns::Long => LONG,
            Turns::Short => NEXT.fetch_add(2, Relaxed),
        };
        Self { own, in_a_row: 0 }
    }

    pub(super) fn rounds(&self) -> usize {
        if self.own == LONG { ROUNDS } else { SHORT_ROUNDS }
    }

    fn is_alone(&self) -> bool {
        self.in_a_row >= ALONE
    }

    /// The most that one read may take. Who is alone keeps nobody waiting, and moves more with fewer calls.
    pub(super) fn most_read(&self) -> usize {
        if self.own == LONG {
            usize::MAX
        } else if self.is_alone() {
            ALONE_READ
        } else {
            SHORT_READ
        }
    }

    /// It read something; whether it is alone now, and was not before.
    pub(super) fn has_read(&mut self) -> bool {
        if self.own == LONG {
            return false;
        }
        if LAST.load(Relaxed) != self.own {
            LAST.store(self.own, Relaxed);
            self.in_a_row = 0;
            return false;
        }
        let was_alone = self.is_alone();
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.is_alone() && !was_alone
    }

    /// A turn is over, and there is more to do.
    pub(super) fn over(&self) {
        if self.own != LONG && !self.is_alone() {
            sys::offer_core();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(taker: &mut TurnTaker, times: u8) -> usize {
        (0..times).for_each(|_| _ = taker.has_read());
        taker.most_read()
    }

    #[test]
    fn who_is_alone_reads_more_at_a_time() {
        let mut alone = TurnTaker::new(Turns::Short);
        assert_eq!(alone.most_read(), SHORT_READ);
        // Pumps of other tests may read meanwhile.
        assert!((0..1000).any(|_| reads(&mut alone, ALONE + 1) > SHORT_READ));
    }

    #[test]
    fn who_has_company_reads_little_until_it_is_gone_for_a_while() {
        let [mut bulk, mut echo] = [TurnTaker::new(Turns::Short), TurnTaker::new(Turns::Short)];
        for _ in 0..10 {
            assert_eq!(reads(&mut bulk, ALONE), SHORT_READ);
            reads(&mut echo, 1);
        }
    }

    #[test]
    fn long_turns_are_no_company() {
        let [mut long, mut short] = [TurnTaker::new(Turns::Long), TurnTaker::new(Turns::Short)];
        assert_eq!(long.most_read(), usize::MAX);
        let alone = |short: &mut TurnTaker, long: &mut TurnTaker| {
            (0..=ALONE).for_each(|_| {
                reads(long, 1);
                reads(short, 1);
            });
            short.most_read() > SHORT_READ
        };
        assert!((0..1000).any(|_| alone(&mut short, &mut long)));
    }
}
