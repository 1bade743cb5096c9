//! The I/O threads.
//!
//! A few named threads, each with an event loop of its own. An object lives on one of them for its
//! whole life: its two directions share no lock because they share a thread, and its wake-ups cross
//! no core. New objects go to the thread that has the fewest.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};

use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;

use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// Threads when `SAPPER_IO_THREADS` does not say otherwise: one a core, at most this many.
const MAX_DEFAULT_THREADS: usize = 8;

struct Shard {
    handle: Handle,
    tasks: Arc<AtomicUsize>,
}

struct Runtime {
    shards: Vec<Shard>,
    forks: u32,
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
    let count = match std::env::var("SAPPER_IO_THREADS") {
        Ok(text) => match text.parse::<usize>() {
            Ok(n) if (1..=256).contains(&n) => n,
            _ => {
                return Err(Error::config(
                    "SAPPER_IO_THREADS",
                    format!("must be a whole number from 1 to 256, not {text:?}"),
                ));
            }
        },
        Err(_) => std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_DEFAULT_THREADS)),
    };
    let mut shards = Vec::with_capacity(count);
    for index in 0..count {
        let failed = |source: io::Error| Error::io(ErrorKind::ResourceLimit, "start an I/O thread", &source);
        let event_loop = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = event_loop.handle().clone();
        spawn_thread(&format!("sapper-io-{index}"), move || {
            event_loop.block_on(std::future::pending::<()>());
        })
        .map_err(failed)?;
        shards.push(Shard { handle, tasks: Arc::default() });
    }
    Ok(Runtime { shards, forks: sys::forks() })
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

/// Runs a named task on the least busy I/O thread. Its owner keeps the handle and ends it.
pub fn spawn<F>(name: &'static str, task: F) -> Result<JoinHandle<F::Output>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let runtime = runtime()?;
    let shard = runtime
        .shards
        .iter()
        .min_by_key(|shard| shard.tasks.load(Ordering::Relaxed))
        .expect("there is at least one I/O thread");
    tracing::trace!(task = name, "starts");
    let guard = TaskGuard::new(Arc::clone(&shard.tasks));
    Ok(shard.handle.spawn(Counted { task, _guard: guard }))
}

/// A task and its place in the count. Not an async block: that would hold the task twice, as what it
/// captured and as what it awaits, which is kilobytes of each idle bridge.
struct Counted<F> {
    task: F,
    _guard: TaskGuard,
}

impl<F: Future> Future for Counted<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // SAFETY: `task` is pinned with the whole: it is never moved out, and nothing here is `Unpin` by
        // hand or drops it early.
        unsafe { self.map_unchecked_mut(|counted| &mut counted.task) }.poll(cx)
    }
}

/// Tasks alive on all I/O threads (for leak tests).
pub fn live_tasks() -> usize {
    RUNTIME
        .get()
        .map_or(0, |runtime| runtime.shards.iter().map(|shard| shard.tasks.load(Ordering::Relaxed)).sum())
}

struct TaskGuard(Arc<AtomicUsize>);

impl TaskGuard {
    fn new(tasks: Arc<AtomicUsize>) -> Self {
        tasks.fetch_add(1, Ordering::Relaxed);
        Self(tasks)
    }
}

impl Drop for TaskGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
