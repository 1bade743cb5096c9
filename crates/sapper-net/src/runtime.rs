//! The I/O threads.
//!
//! A few named threads, each with an event loop of its own. An object lives on one of them: its two
//! directions share no lock because they share a thread, and its wake-ups cross no core. Where it
//! begins, and when it moves, is [`balance`]'s.

mod after_turn;
mod balance;
mod linger;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Builder;

use crate::error::{Error, ErrorKind, Result};
use crate::sys;

pub(crate) use after_turn::{AfterTurn, after_turn};
use balance::{Place, Thread};
pub use balance::{Share, move_to, settled};
pub(crate) use linger::pumped;
#[cfg(test)]
pub(crate) use linger::pumped_bulk;

/// Threads when `SAPPER_IO_THREADS` does not say otherwise: one a core, at most this many.
const MAX_DEFAULT_THREADS: usize = 8;

/// Polls of tasks before the sockets are asked again who is ready: a busy task's turns are long, and whoever
/// became ready meanwhile waits for as many of them.
const TURNS: u32 = 4;

struct Runtime {
    threads: Vec<Thread>,
    forks: u32,
}

thread_local! {
    /// Which I/O thread this is.
    static OWN_THREAD: Cell<Option<usize>> = const { Cell::new(None) };
}

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

fn runtime() -> Result<&'static Runtime> {
    if RUNTIME.get().is_none() {
        let _one_starter = STARTING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if RUNTIME.get().is_none() {
            let started = start()?;
            // Nobody else sets it: we hold the lock.
            let _ = RUNTIME.set(started);
        }
    }
    let runtime = RUNTIME.get().expect("was set above");
    if runtime.forks != sys::forks() {
        return Err(Error::new(
            ErrorKind::ApiMisuse,
            "this process is a fork of one that already used sapper; its I/O threads do not exist here. \
             Start processes with the \"spawn\" or \"forkserver\" method, or use sapper only after the fork",
        )
        .with_reason("forked"));
    }
    Ok(runtime)
}

fn start() -> Result<Runtime> {
    let count = setting("SAPPER_IO_THREADS", 1..=256)?.map_or_else(
        || std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_DEFAULT_THREADS)),
        |count| count as usize,
    );
    let window = setting("SAPPER_IO_LINGER_US", 0..=10_000)?;
    let window = window.map_or(linger::WINDOW, |n| Duration::from_micros(n.into()));
    let mut threads = Vec::with_capacity(count);
    for index in 0..count {
        let failed = |source: io::Error| Error::io(ErrorKind::ResourceLimit, "start an I/O thread", &source);
        let mut event_loop = Builder::new_current_thread();
        event_loop.enable_all().event_interval(TURNS);
        event_loop.on_thread_park(linger::before_sleep).on_thread_unpark(linger::after_sleep);
        let event_loop = event_loop.build().map_err(failed)?;
        let handle = event_loop.handle().clone();
        let lingered = Arc::new(AtomicU64::new(0));
        // For as long as there is the thread.
        drop(handle.spawn(after_turn::run()));
        drop(handle.spawn(linger::run(window, Arc::clone(&lingered))));
        spawn_thread(&format!("sapper-io-{index}"), move || {
            OWN_THREAD.set(Some(index));
            sys::take_short_turns();
            event_loop.block_on(std::future::pending::<()>());
        })
        .map_err(failed)?;
        threads.push(Thread::new(handle, lingered));
    }
    Ok(Runtime { threads, forks: sys::forks() })
}

/// What the environment says of a setting; `None` where it says nothing.
fn setting(name: &'static str, allowed: RangeInclusive<u32>) -> Result<Option<u32>> {
    let Ok(text) = std::env::var(name) else { return Ok(None) };
    match text.parse() {
        Ok(n) if allowed.contains(&n) => Ok(Some(n)),
        _ => {
            let (least, most) = allowed.into_inner();
            Err(Error::config(name, format!("must be a whole number from {least} to {most}, not {text:?}")))
        }
    }
}

/// Starts a named thread that takes no signals: they are the program's (Python's main thread's), and a
/// write to a pipe whose reader is gone is an error here, never a SIGPIPE.
pub(crate) fn spawn_thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    // SAFETY: all-zero bytes are a valid `sigset_t`, and the calls below fill it.
    let [mut blocked, mut before]: [libc::sigset_t; 2] = unsafe { std::mem::zeroed() };
    // SAFETY: both sets live through the calls. Faults stay deliverable: blocked, they end the
    // process without a word.
    unsafe {
        libc::sigfillset(&raw mut blocked);
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT] {
            libc::sigdelset(&raw mut blocked, fault);
        }
        // A thread inherits the mask of its maker, so there is no moment without it.
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked, &raw mut before);
    }
    let started = builder.spawn(work);
    // SAFETY: `before` was filled by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    started.map(drop)
}

/// Starts the I/O threads where they do not run yet, and refuses a forked process.
pub fn ensure_running() -> Result<()> {
    runtime().map(drop)
}

/// Runs a named task on the I/O thread that has the least to do. It has to end by itself: what it
/// belongs to tells it.
pub fn spawn(name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> Result<()> {
    let threads = &runtime()?.threads;
    run(threads, balance::lightest(threads), name, task);
    Ok(())
}

/// The same, on this I/O thread unless another has less to do: what it just accepted it serves without
/// waking another, and many are spread all the same.
pub(crate) fn spawn_near(name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> Result<()> {
    let threads = &runtime()?.threads;
    run(threads, balance::nearest(threads, OWN_THREAD.get()), name, task);
    Ok(())
}

fn run(
    threads: &'static [Thread],
    index: usize,
    name: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
) {
    tracing::trace!(task = name, "starts");
    let place = Place::new(threads, index);
    Task { work: Some(Box::pin(task)), place: Some(place), used: Duration::ZERO }.run();
}

/// A task, its place and its time.
struct Task {
    /// `None` once it has moved on.
    work: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    place: Option<Place>,
    /// What all its polls took.
    used: Duration,
}

impl Task {
    fn run(self) {
        if let Some(place) = &self.place {
            // It ends by itself: nobody needs the handle.
            drop(place.thread().handle.spawn(self));
        }
    }
}

impl Future for Task {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { work: Some(work), place: Some(place), used } = &mut *self else { return Poll::Ready(()) };
        let (polled, asked) = balance::poll_in_place(place, used, || work.as_mut().poll(cx));
        let (Poll::Pending, Some(index)) = (polled, asked.move_to) else { return polled };
        place.move_to(index);
        Self { work: self.work.take(), place: self.place.take(), used: self.used }.run();
        Poll::Ready(())
    }
}

/// Tasks alive on all I/O threads (for leak tests).
pub fn live_tasks() -> usize {
    RUNTIME.get().map_or(0, |runtime| runtime.threads.iter().map(Thread::tasks).sum())
}
