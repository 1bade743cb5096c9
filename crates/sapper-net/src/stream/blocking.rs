//! Streams over descriptors that epoll refuses: plain files, `/dev/null`, block devices.
//!
//! A named thread a direction makes the system calls and hands blocks over through one half of a
//! memory pair, whose bound keeps a fast reader back. The threads always wait in poll(2), on the
//! descriptor and on a signal of the stream, so they end with it.

#[cfg(test)]
mod tests;

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Wake, Waker};

use tokio::sync::watch;

use super::joined::JoinedStream;
use super::memory::{self, Flush, MemoryStream};
use super::{BoxStream, Stream};
use crate::buffer::BLOCK;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::fd::Access;
use crate::runtime;
use crate::stats::EndpointStats;
use crate::sys::Signal;

/// Bytes of one system call. Four of them fill the queue to the event loop.
const CHUNK: usize = BLOCK / 4;

/// Milliseconds for poll(2).
const FOREVER: libc::c_int = -1;

static LIVE: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// How many of these threads are alive; for leak tests, which wait for a number.
pub fn live_threads() -> watch::Receiver<usize> {
    LIVE.subscribe()
}

/// A stream over `fd`, in the directions of `access`.
pub(super) fn open(
    fd: OwnedFd,
    description: &str,
    access: Access,
    stats: Arc<EndpointStats>,
) -> Result<BoxStream> {
    let fd = Arc::new(fd);
    Ok(match (access.read, access.write) {
        (true, true) => {
            let read = open_reader(Arc::clone(&fd), description, Arc::clone(&stats))?;
            let write = open_writer(fd, description, Arc::clone(&stats))?;
            Box::new(JoinedStream::new(read, write, stats))
        }
        (true, false) => open_reader(fd, description, stats)?,
        (false, _) => open_writer(fd, description, stats)?,
    })
}

fn open_reader(fd: Arc<OwnedFd>, description: &str, stats: Arc<EndpointStats>) -> Result<BoxStream> {
    // Nothing is ever written, so there is nothing to flush.
    let (inner, mut outer) =
        memory::endpoint(BLOCK, description.to_owned(), Flush::Queued, Arc::clone(&stats));
    let not_open = format!("{description} is not open for writing");
    outer.stop_with(Error::new(ErrorKind::Device, not_open).with_reason("read_only"));
    let thread = Worker::new(fd, outer, stats)?;
    thread.start("sapper-read", Worker::read)?;
    Ok(Box::new(inner))
}

fn open_writer(fd: Arc<OwnedFd>, description: &str, stats: Arc<EndpointStats>) -> Result<BoxStream> {
    let (inner, mut outer) =
        memory::endpoint(BLOCK, description.to_owned(), Flush::Taken, Arc::clone(&stats));
    let ended = outer.poll_send_eof(&mut Context::from_waker(Waker::noop()));
    debug_assert!(ended.is_ready(), "the outer half's flush never waits");
    let thread = Worker::new(fd, outer, stats)?;
    thread.start("sapper-write", Worker::write)?;
    Ok(Box::new(inner))
}

/// What a thread works with.
struct Worker {
    fd: Arc<OwnedFd>,
    outer: MemoryStream,
    signal: Arc<Signal>,
    waker: Waker,
    stats: Arc<EndpointStats>,
}

/// The thread's end of the wake-ups.
struct SetSignal(Arc<Signal>);

impl Wake for SetSignal {
    fn wake(self: Arc<Self>) {
        self.0.set();
    }
}

/// One thread, as long as it lives.
struct Counted;

impl Counted {
    fn new() -> Self {
        LIVE.send_modify(|live| *live += 1);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        LIVE.send_modify(|live| *live -= 1);
    }
}

impl Worker {
    fn new(fd: Arc<OwnedFd>, outer: MemoryStream, stats: Arc<EndpointStats>) -> Result<Self> {
        let signal = Signal::new()
            .map_err(|source| Error::io(ErrorKind::ResourceLimit, "make a wake-up descriptor", &source))?;
        let signal = Arc::new(signal);
        let waker = Waker::from(Arc::new(SetSignal(Arc::clone(&signal))));
        Ok(Self { fd, outer, signal, waker, stats })
    }

    fn start(mut self, name: &str, work: fn(&mut Self)) -> Result<()> {
        let counted = Counted::new();
        // It ends with the stream, whose half wakes it: nobody has to join it.
        runtime::spawn_thread(name, move || {
            work(&mut self);
            // The descriptor is closed and the stream told before the thread counts as gone.
            drop(self);
            drop(counted);
        })
        .map_err(|source| Error::io(ErrorKind::ResourceLimit, "start a thread", &source))?;
        Ok(())
    }

    fn read(&mut self) {
        let mut chunk = vec![0; CHUNK];
        loop {
            self.signal.clear();
            if self.outer.poll_unwanted(&mut Context::from_waker(&self.waker)).is_ready() {
                return;
            }
            if !wait(self.fd.as_fd(), libc::POLLIN, &self.signal, FOREVER) {
                continue;
            }
            self.stats.receive_calls.add(1);
            // SAFETY: the kernel writes at most `chunk.len()` bytes, all of them in `chunk`.
            let n = unsafe { libc::read(self.fd.as_raw_fd(), chunk.as_mut_ptr().cast(), chunk.len()) };
            match usize::try_from(n).map_err(|_| io::Error::last_os_error()) {
                // The half that goes away says the end.
                Ok(0) => return,
                Ok(n) if self.push(&chunk[..n]) => {}
                Ok(_) => return,
                Err(source) if is_passing(&source) => {}
                Err(source) => return self.outer.reset_with(self.failed("read from", &source)),
            }
        }
    }

    /// Hands all of `bytes` over; `false` when nobody wants them any more.
    fn push(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            self.signal.clear();
            match self.outer.poll_write(&mut Context::from_waker(&self.waker), &[IoSlice::new(bytes)]) {
                Poll::Ready(Ok(n)) => bytes = &bytes[n..],
                Poll::Ready(Err(_)) => return false,
                Poll::Pending => {
                    self.signal.wait(None);
                }
            }
        }
        true
    }

    fn write(&mut self) {
        let mut chunk = vec![0; CHUNK];
        loop {
            self.signal.clear();
            let mut cx = Context::from_waker(&self.waker);
            let n = match self.outer.poll_peek(&mut cx, &mut chunk) {
                Poll::Pending => {
                    self.signal.wait(None);
                    continue;
                }
                Poll::Ready(Ok(n @ 1..)) => n,
                // The end, or a reset.
                Poll::Ready(_) => return,
            };
            // A device that takes nothing does not hold the thread once the stream is gone.
            let unwanted = self.outer.poll_unwanted(&mut cx).is_ready();
            let patience = if unwanted { 0 } else { FOREVER };
            if !wait(self.fd.as_fd(), libc::POLLOUT, &self.signal, patience) {
                if unwanted {
                    return;
                }
                continue;
            }
            self.stats.send_calls.add(1);
            // SAFETY: the kernel reads `n` bytes of `chunk`.
            let written = unsafe { libc::write(self.fd.as_raw_fd(), chunk.as_ptr().cast(), n) };
            match usize::try_from(written).map_err(|_| io::Error::last_os_error()) {
                // Taken only now: until the system has them, a flush waits.
                Ok(written @ 1..) => self.outer.consume(written),
                Ok(_) => {
                    let source = io::Error::from(io::ErrorKind::WriteZero);
                    return self.outer.stop_with(self.failed("write to", &source));
                }
                Err(source) if is_passing(&source) => {}
                Err(source) => return self.outer.stop_with(self.failed("write to", &source)),
            }
        }
    }

    fn failed(&self, what: &str, source: &io::Error) -> Error {
        Error::io(ErrorKind::Device, format_args!("{what} {}", self.outer.describe()), source)
            .with_phase(Phase::Transfer)
    }
}

/// Waits until `fd` or the signal is ready, so many milliseconds; `true` when `fd` is.
fn wait(fd: BorrowedFd<'_>, events: libc::c_short, signal: &Signal, patience: libc::c_int) -> bool {
    let mut polled = [
        libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 },
        libc::pollfd { fd: signal.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 },
    ];
    // SAFETY: two pollfds that outlive the call.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), 2, patience) };
    ready > 0 && polled[0].revents != 0
}

fn is_passing(source: &io::Error) -> bool {
    matches!(source.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
