//! What an I/O thread does before it sleeps: where it was needed again at once several times, it stays up for a while
//! and looks for more.
//!
//! Being woken costs the system, and in a virtual machine the host as well, far more than one byte's work here: 20 to
//! 170 microseconds where both have gone to sleep. So what is halted for less than that is better not halted at all;
//! hypervisors poll before they halt a processor for the same reason (KVM's `halt_poll_ns`). Between two looks the core
//! is offered to whoever wants it, and the thread sleeps where somebody does, where nothing comes in time, where
//! what came so far came at longer intervals, and where there was much to do each time: no wake-up holds that up, and
//! its source or reader needs the core.

use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::task::yield_now;

use crate::sys;

/// How long it looks, at most, where `SAPPER_IO_LINGER_US` does not say otherwise.
pub(super) const WINDOW: Duration = Duration::from_micros(WINDOW_US);
const WINDOW_US: u64 = 200;
/// What a wait that was shorter counts, one that was not, much work at a time, and bulk; from how much of it a thread
/// lingers, and the most that is counted. One wait that was not worth it, among many that were, changes nothing.
const SHORT: i32 = 1;
const LONG: i32 = -3;
const MUCH: i32 = -1;
const BULK: i32 = -3;
const ENOUGH: i32 = 4;
const MOST: i32 = 8;
/// Where another program took the core: who sleeps has it back at once when he is woken, who offered it has not.
const CROWDED: i32 = -1000;
/// An answer, or a command, takes less than this.
const LITTLE: Duration = Duration::from_micros(100);
/// A read of so many bytes is bulk, however quickly it is passed on.
const BULK_READ: usize = 16 * 1024;
/// The core was taken where the offer of it took so long: a whole turn of another program, not an answer's.
const TAKEN: Duration = Duration::from_micros(500);

/// How long this thread waited lately, and worked.
struct Habit {
    window: Duration,
    /// How much speaks for lingering.
    worth: i32,
}

impl Habit {
    fn waited(&mut self, time: Duration) {
        self.count(if time < self.window { SHORT } else { LONG });
    }

    fn worked(&mut self, time: Duration, bulk: bool) {
        if bulk {
            self.count(BULK);
        } else if time >= LITTLE {
            self.count(MUCH);
        }
    }

    fn crowded(&mut self) {
        self.worth = CROWDED;
    }

    fn count(&mut self, change: i32) {
        // What a crowd cost is paid in short waits only.
        let least = self.worth.min(0);
        self.worth = (self.worth + change).clamp(least, MOST);
    }

    fn lingers(&self) -> bool {
        self.worth >= ENOUGH
    }
}

struct State {
    habit: Habit,
    /// Since when it works.
    awake: Option<Instant>,
    /// Bulk was pumped since then.
    bulk: bool,
    /// Since when it sleeps.
    asleep: Option<Instant>,
    /// It looks for more rather than to sleep, or is to.
    looks: bool,
    /// When it found some.
    found: Option<Instant>,
    /// Of the task that looks; `None` on every other thread.
    waker: Option<Waker>,
}

thread_local! {
    static STATE: RefCell<State> = const {
        RefCell::new(State {
            habit: Habit { window: Duration::ZERO, worth: 0 },
            awake: None,
            bulk: false,
            asleep: None,
            looks: false,
            found: None,
            waker: None,
        })
    };
}

/// A task is polled.
pub(super) fn polls(now: Instant) {
    STATE.with_borrow_mut(|state| {
        if state.looks && state.found.is_none() {
            state.found = Some(now);
        }
    });
}

/// A pump read so many bytes at once. A tunnel's link does not say so: each of its ends waits a moment for the other,
/// and one stream carries a quarter less where both sleep meanwhile.
pub(crate) fn pumped(bytes: usize) {
    if bytes >= BULK_READ {
        STATE.with_borrow_mut(|state| state.bulk = true);
    }
}

/// Whether bulk was pumped on this thread since this was asked last.
#[cfg(test)]
pub(crate) fn pumped_bulk() -> bool {
    STATE.with_borrow_mut(|state| std::mem::take(&mut state.bulk))
}

/// This thread has nothing to do: it sleeps, unless the task that looks has become ready.
pub(super) fn before_sleep() {
    let waker = STATE.with_borrow_mut(|state| {
        let now = Instant::now();
        let bulk = std::mem::take(&mut state.bulk);
        if let Some(since) = state.awake.take() {
            state.habit.worked(now - since, bulk);
        }
        if state.habit.lingers() {
            state.looks = true;
            return state.waker.clone();
        }
        state.asleep = Some(now);
        None
    });
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// It was woken.
pub(super) fn after_sleep() {
    STATE.with_borrow_mut(|state| {
        if let Some(since) = state.asleep.take() {
            let now = Instant::now();
            state.habit.waited(now - since);
            state.awake = Some(now);
        }
    });
}

/// The task of each I/O thread that looks for more; `lingered` is the time that it took, in nanoseconds.
pub(super) async fn run(window: Duration, lingered: Arc<AtomicU64>) {
    STATE.with_borrow_mut(|state| state.habit.window = window);
    loop {
        needed().await;
        let began = Instant::now();
        let mut now = began;
        let crowded = loop {
            sys::offer_core();
            let offered = now.elapsed();
            // Asks the sockets who is ready, and those have their turn first.
            yield_now().await;
            now = Instant::now();
            if offered >= TAKEN {
                break true;
            }
            if STATE.with_borrow(|state| state.found.is_some()) || now - began >= window {
                break false;
            }
        };
        STATE.with_borrow_mut(|state| {
            state.looks = false;
            let end = state.found.take().unwrap_or(now);
            state.awake = Some(end);
            if crowded {
                state.habit.crowded()
            } else {
                state.habit.waited(end - began)
            }
            lingered.fetch_add((end - began).as_nanos() as u64, Ordering::Relaxed);
        });
    }
}

/// Waits until the thread has nothing to do and is to look for more.
async fn needed() {
    poll_fn(|cx| {
        STATE.with_borrow_mut(|state| {
            if state.looks {
                return Poll::Ready(());
            }
            state.waker = Some(cx.waker().clone());
            Poll::Pending
        })
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(30);
    const LATE: Duration = Duration::from_millis(1);

    fn habit(waits: &[Duration]) -> Habit {
        let mut habit = Habit { window: WINDOW, worth: 0 };
        waits.iter().for_each(|time| habit.waited(*time));
        habit
    }

    #[test]
    fn a_thread_that_was_needed_again_at_once_several_times_lingers() {
        assert!(!habit(&[]).lingers());
        assert!(!habit(&[SOON; 3]).lingers());
        assert!(habit(&[SOON; 4]).lingers());
        assert!(habit(&[SOON; 100]).lingers());
    }

    #[test]
    fn waits_that_were_not_worth_it_end_the_habit() {
        assert!(!habit(&[SOON, SOON, SOON, SOON, LATE]).lingers());
        assert!(!habit(&[SOON, LATE, SOON, SOON, SOON]).lingers());
        assert!(habit(&[LATE, LATE, SOON, SOON, SOON, SOON]).lingers());
        // One of many is nothing, two are.
        let mut long = habit(&[SOON; 100]);
        long.waited(LATE);
        assert!(long.lingers());
        long.waited(LATE);
        assert!(!long.lingers());
    }

    #[test]
    fn a_thread_with_much_to_do_each_time_does_not_linger() {
        let mut habit = habit(&[]);
        for _ in 0..100 {
            habit.waited(SOON);
            habit.worked(LATE, false);
            assert!(!habit.lingers());
        }
        // Some work now and then, as a handshake's, is no bulk.
        for _ in 0..MOST {
            [SOON; 2].into_iter().for_each(|time| habit.waited(time));
            habit.worked(SOON, false);
            habit.worked(LATE, false);
        }
        assert!(habit.lingers());
    }

    #[test]
    fn bulk_is_not_waited_for_however_quickly_it_goes_on() {
        let mut habit = habit(&[]);
        for round in 0..100 {
            habit.waited(SOON);
            // What goes back between two reads is short.
            habit.worked(SOON, round % 2 == 0);
            assert!(!habit.lingers());
        }
    }

    #[test]
    fn who_lost_the_core_to_another_program_sleeps_for_long() {
        let mut habit = habit(&[SOON; 8]);
        habit.crowded();
        for _ in 0..ENOUGH - CROWDED - 1 {
            habit.waited(SOON);
            assert!(!habit.lingers());
        }
        habit.waited(SOON);
        assert!(habit.lingers());
    }

    #[test]
    fn a_crowd_is_not_forgotten_over_a_long_wait() {
        let mut habit = habit(&[]);
        habit.crowded();
        (0..10).for_each(|_| habit.waited(LATE));
        (0..10).for_each(|_| habit.waited(SOON));
        assert_eq!(habit.worth, CROWDED + 10);
    }

    #[test]
    fn without_a_window_it_never_does() {
        let mut habit = Habit { window: Duration::ZERO, worth: 0 };
        (0..100).for_each(|_| habit.waited(Duration::ZERO));
        assert!(!habit.lingers());
    }
}
