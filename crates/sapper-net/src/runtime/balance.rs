//! Which I/O thread a task runs on: where it begins, and when it is worth a move.
//!
//! What is begun together stays together: two ends that shake hands on one thread need no wake-up
//! across cores for each of their messages, which costs more than the messages. A task that turns out
//! to be busy asks for another thread later ([`Share`]), when its time has been measured.

use std::cell::Cell;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::linger;

/// How often a thread's share of time is measured anew, at most.
const INTERVAL: Duration = Duration::from_millis(50);

/// What a move must gain, in thousandths of a thread's time: it costs some system calls, and shares
/// of a short while are rough.
const GAIN: u32 = 150;

/// Thousandths of a thread's time that weigh as much as two tasks which have just begun.
const BAND: u32 = 250;

/// An I/O thread, as the tasks see it.
pub(super) struct Thread {
    pub(super) handle: Handle,
    /// Tasks that are alive.
    tasks: AtomicUsize,
    /// Tasks that have not [`settled`]: what they need is not in the measured share yet.
    young: AtomicUsize,
    /// Thousandths of the last interval that its tasks took.
    share: AtomicU32,
    measured: Mutex<Measured>,
    /// Nanoseconds that it lingered, which the runtime counts as busy.
    lingered: Arc<AtomicU64>,
}

struct Measured {
    at: Instant,
    busy: Duration,
    /// When a task left for another thread: the share says so only after the next interval.
    left: Instant,
}

impl Thread {
    pub(super) fn new(handle: Handle, lingered: Arc<AtomicU64>) -> Self {
        let now = Instant::now();
        Self {
            handle,
            tasks: AtomicUsize::new(0),
            young: AtomicUsize::new(0),
            share: AtomicU32::new(0),
            measured: Mutex::new(Measured { at: now, busy: Duration::ZERO, left: now }),
            lingered,
        }
    }

    pub(super) fn tasks(&self) -> usize {
        self.tasks.load(Ordering::Relaxed)
    }

    /// What it looked for more instead of sleeping, in all.
    #[cfg(test)]
    pub(super) fn lingered(&self) -> Duration {
        Duration::from_nanos(self.lingered.load(Ordering::Relaxed))
    }

    /// Thousandths of its time that its tasks take.
    fn share(&self) -> u32 {
        // Who finds it locked takes the last figure: somebody is measuring.
        if let Ok(mut measured) = self.measured.try_lock() {
            let passed = measured.at.elapsed();
            if passed >= INTERVAL {
                let lingered = Duration::from_nanos(self.lingered.load(Ordering::Relaxed));
                let busy = self.handle.metrics().worker_total_busy_duration(0).saturating_sub(lingered);
                let share = thousandths(busy.saturating_sub(measured.busy), passed);
                self.share.store(share, Ordering::Relaxed);
                measured.at += passed;
                measured.busy = busy;
            }
        }
        self.share.load(Ordering::Relaxed)
    }

    fn weight(&self) -> u32 {
        let pairs = u32::try_from(self.young.load(Ordering::Relaxed) / 2).unwrap_or(u32::MAX);
        pairs.saturating_add(self.share() / BAND)
    }

    /// Takes the place of the one task that may leave now.
    fn let_one_leave(&self) -> bool {
        let Ok(mut measured) = self.measured.try_lock() else { return false };
        let rested = measured.left.elapsed() >= 2 * INTERVAL;
        if rested {
            measured.left = Instant::now();
        }
        rested
    }
}

fn thousandths(part: Duration, whole: Duration) -> u32 {
    let share = part.as_micros() * 1000 / whole.as_micros().max(1);
    u32::try_from(share).map_or(1000, |share| share.min(1000))
}

/// Where a new task begins.
pub(super) fn lightest(threads: &[Thread]) -> usize {
    let lightest = threads.iter().enumerate().min_by_key(|(_, thread)| thread.weight());
    lightest.map_or(0, |(index, _)| index)
}

/// The same, but `own` where no other has less.
pub(super) fn nearest(threads: &[Thread], own: Option<usize>) -> usize {
    let lightest = lightest(threads);
    own.filter(|own| threads[*own].weight() <= threads[lightest].weight()).unwrap_or(lightest)
}

/// A task's place in the counts of its thread.
pub(super) struct Place {
    threads: &'static [Thread],
    index: usize,
    young: bool,
}

impl Place {
    pub(super) fn new(threads: &'static [Thread], index: usize) -> Self {
        threads[index].tasks.fetch_add(1, Ordering::Relaxed);
        threads[index].young.fetch_add(1, Ordering::Relaxed);
        Self { threads, index, young: true }
    }

    pub(super) fn thread(&self) -> &'static Thread {
        &self.threads[self.index]
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.young) {
            self.thread().young.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn move_to(&mut self, index: usize) {
        self.settle();
        self.thread().tasks.fetch_sub(1, Ordering::Relaxed);
        self.index = index;
        self.thread().tasks.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.settle();
        self.thread().tasks.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a task and the wrapper that polls it tell each other.
#[derive(Clone, Copy, Default)]
struct Now {
    threads: Option<&'static [Thread]>,
    index: usize,
    used: Duration,
    settled: bool,
    move_to: Option<usize>,
}

thread_local! {
    static NOW: Cell<Now> = const { Cell::new(Now { threads: None, index: 0, used: Duration::ZERO, settled: false, move_to: None }) };
}

/// Whether a task that takes `mine` of its thread's time, of which `here` are taken in all, does better
/// where `there` are taken: afterwards it must be clearly less crowded there than it is here now.
pub(super) fn gains(here: u32, mine: u32, there: u32) -> bool {
    there + mine + GAIN < here
}

/// What a poll asked for.
pub(super) struct Asked {
    pub(super) move_to: Option<usize>,
}

/// Polls a task in its place; `used` is the time that all its polls took.
pub(super) fn poll_in_place<T>(
    place: &mut Place,
    used: &mut Duration,
    poll: impl FnOnce() -> Poll<T>,
) -> (Poll<T>, Asked) {
    let before = Instant::now();
    linger::polls(before);
    NOW.set(Now { threads: Some(place.threads), index: place.index, used: *used, ..Now::default() });
    let polled = poll();
    let now = NOW.replace(Now::default());
    *used += before.elapsed();
    if now.settled {
        place.settle();
    }
    (polled, Asked { move_to: now.move_to })
}

/// The running task has done what a new one has to do: from now on its thread's measured time speaks
/// for it.
pub fn settled() {
    NOW.set(Now { settled: true, ..NOW.get() });
}

/// The running task's share of its thread, looked at now and then.
pub struct Share {
    at: Instant,
    used: Duration,
}

impl Share {
    /// From now on.
    pub fn new() -> Self {
        Self { at: Instant::now(), used: NOW.get().used }
    }

    /// Whether the task would do better on another thread, by what both have done since the last call;
    /// who is told so goes there with [`move_to`], or stays.
    pub fn better_thread(&mut self) -> Option<usize> {
        let now = NOW.get();
        let passed = self.at.elapsed();
        let mine = thousandths(now.used.saturating_sub(self.used), passed);
        self.at += passed;
        self.used = now.used;
        let threads = now.threads?;
        let here = threads[now.index].share();
        let others = threads.iter().enumerate().filter(|(index, _)| *index != now.index);
        let (index, there) =
            others.map(|(index, thread)| (index, thread.share())).min_by_key(|(_, share)| *share)?;
        (gains(here, mine, there) && threads[now.index].let_one_leave()).then_some(index)
    }
}

impl Default for Share {
    fn default() -> Self {
        Self::new()
    }
}

/// Goes on on another I/O thread. Descriptors stay with the event loop that they were registered in:
/// register them again. Nothing happens in a task that cannot move.
pub async fn move_to(index: usize) {
    let mut asked = NOW.get().threads.is_none();
    poll_fn(|_| {
        if std::mem::replace(&mut asked, true) {
            return Poll::Ready(());
        }
        NOW.set(Now { move_to: Some(index), ..NOW.get() });
        // Polled again at once, over there.
        Poll::Pending
    })
    .await;
}
