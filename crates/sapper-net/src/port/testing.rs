//! What the tests of several ports share: streams in memory, a small pump, network namespaces.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker, ready};

use sapper_proto::packet::Gso;

use super::adapt::Adapter;
use super::{PacketBatch, PacketPort, take_batch};
use crate::error::{Error, ErrorKind, Result};
use crate::stats::{Drops, EndpointStats};
use crate::stream::{RecordMarks, Stream};

/// How a pair behaves.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// Bytes that one direction holds.
    pub(super) capacity: usize,
    /// Most bytes that one read gives and one write takes.
    pub(super) step: usize,
    /// Each slice of a write is a record, which is read whole or not at all.
    pub(super) records: bool,
}

/// One end of a stream in memory.
pub(super) struct MemoryStream {
    incoming: Arc<Mutex<Pipe>>,
    outgoing: Arc<Mutex<Pipe>>,
    manner: Manner,
    stats: Arc<EndpointStats>,
}

#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    /// Lengths of the slices written, in order.
    slices: VecDeque<usize>,
    ended: bool,
    wakers: Vec<Waker>,
    /// How many slices each write had.
    writes: Vec<usize>,
}

impl Pipe {
    fn wake(&mut self) {
        self.wakers.drain(..).for_each(Waker::wake);
    }
}

impl MemoryStream {
    pub(super) fn pair(manner: Manner) -> (Self, Self) {
        let (there, back) = (Arc::default(), Arc::default());
        let end = |incoming: &Arc<_>, outgoing: &Arc<_>| Self {
            incoming: Arc::clone(incoming),
            outgoing: Arc::clone(outgoing),
            manner,
            stats: Arc::default(),
        };
        (end(&back, &there), end(&there, &back))
    }

    /// How many slices each write of the other end had.
    pub(super) fn writes_seen(&self) -> Vec<usize> {
        self.incoming.lock().unwrap().writes.clone()
    }

    /// Lengths of the slices that wait to be read.
    pub(super) fn slices_waiting(&self) -> Vec<usize> {
        self.incoming.lock().unwrap().slices.iter().copied().collect()
    }

    /// Writes slices of its own making, past any framing.
    pub(super) fn inject(&self, slices: &[&[u8]]) {
        let mut pipe = self.outgoing.lock().unwrap();
        for slice in slices {
            pipe.bytes.extend(*slice);
            pipe.slices.push_back(slice.len());
        }
        pipe.wake();
    }
}

impl Stream for MemoryStream {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        marks: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        assert!(!buf.is_empty());
        let mut pipe = self.incoming.lock().unwrap();
        if pipe.bytes.is_empty() {
            if pipe.ended {
                return Poll::Ready(Ok(0));
            }
            pipe.wakers.push(cx.waker().clone());
            return Poll::Pending;
        }
        let mut n = 0;
        if self.manner.records {
            while let Some(&len) = pipe.slices.front() {
                if n + len > buf.len().min(self.manner.step.max(len)) {
                    break;
                }
                pipe.slices.pop_front();
                n += len;
                marks.push(n);
            }
            assert!(n > 0, "a record larger than the room for it");
        } else {
            n = pipe.bytes.len().min(buf.len()).min(self.manner.step);
        }
        for (to, from) in buf.iter_mut().zip(pipe.bytes.drain(..n)) {
            *to = from;
        }
        pipe.wake();
        Poll::Ready(Ok(n))
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut pipe = self.incoming.lock().unwrap();
        if pipe.bytes.is_empty() && !pipe.ended {
            pipe.wakers.push(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        let mut pipe = self.outgoing.lock().unwrap();
        if pipe.ended {
            return Poll::Ready(Err(Error::new(ErrorKind::ConnectionLost, "the other end is gone")));
        }
        let room = self.manner.capacity.saturating_sub(pipe.bytes.len());
        if room == 0 {
            pipe.wakers.push(cx.waker().clone());
            return Poll::Pending;
        }
        let mut n = 0;
        let mut whole = 0;
        for slice in slices {
            let len = if self.manner.records {
                slice.len()
            } else {
                slice.len().min(room.min(self.manner.step) - n)
            };
            pipe.bytes.extend(&slice[..len]);
            pipe.slices.push_back(len);
            n += len;
            whole += 1;
            if n >= room.min(self.manner.step) {
                break;
            }
        }
        pipe.writes.push(whole);
        pipe.wake();
        Poll::Ready(Ok(n))
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut pipe = self.outgoing.lock().unwrap();
        pipe.ended = true;
        pipe.wake();
        Poll::Ready(Ok(()))
    }

    fn reset(&mut self, _code: u64) {
        let mut pipe = self.outgoing.lock().unwrap();
        pipe.ended = true;
        pipe.wake();
    }

    fn stop(&mut self, _code: u64) {}

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

impl Drop for MemoryStream {
    fn drop(&mut self) {
        for pipe in [&self.incoming, &self.outgoing] {
            let mut pipe = pipe.lock().unwrap();
            pipe.ended = true;
            pipe.wake();
        }
    }
}

/// Joins two ports for as long as it is polled: what the pump does, without its counters.
pub(super) struct Join<A, B> {
    pub(super) a: A,
    pub(super) b: B,
    there: Half,
    back: Half,
}

#[derive(Default)]
struct Half {
    received: Option<PacketBatch>,
    adapted: Option<PacketBatch>,
    adapter: Adapter,
    drops: Drops,
    super_packets: usize,
}

impl<A: PacketPort, B: PacketPort> Join<A, B> {
    pub(super) fn new(a: A, b: B) -> Self {
        Self { a, b, there: Half::default(), back: Half::default() }
    }

    /// How many packets of several in one each port gave.
    pub(super) fn super_packets(&self) -> [usize; 2] {
        [self.there.super_packets, self.back.super_packets]
    }

    /// Moves packets both ways until a port ends or fails.
    pub(super) async fn run(&mut self) -> Result<()> {
        poll_fn(|cx| {
            let there = self.there.poll(cx, &mut self.a, &mut self.b);
            let back = self.back.poll(cx, &mut self.b, &mut self.a);
            if there.is_ready() { there } else { back }
        })
        .await
    }
}

impl Half {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut dyn PacketPort,
        to: &mut dyn PacketPort,
    ) -> Poll<Result<()>> {
        let received = self.received.get_or_insert_with(take_batch);
        let adapted = self.adapted.get_or_insert_with(take_batch);
        loop {
            while !received.is_empty() || !adapted.is_empty() {
                if adapted.is_empty() {
                    self.adapter.adapt(received, adapted, &to.abilities(), &self.drops);
                }
                ready!(to.poll_send(cx, adapted))?;
            }
            ready!(to.poll_flush(cx))?;
            if !ready!(from.poll_receive(cx, received))? {
                return Poll::Ready(Ok(()));
            }
            self.super_packets += received.iter().filter(|packet| packet.meta.gso != Gso::None).count();
        }
    }
}

/// Runs a test on a thread whose network namespace is its own; it may make more of them. Says why
/// where that cannot be.
#[allow(clippy::print_stderr, reason = "a test that is skipped says why")]
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let name = std::thread::current().name().unwrap_or("test").to_owned();
    let done = std::thread::spawn(move || {
        let reason = if !std::path::Path::new("/dev/net/tun").exists() {
            "there is no /dev/net/tun".to_owned()
        } else if let Err(error) = new_namespace() {
            format!("no network namespace can be made: {error}")
        } else if let Err(error) = ip("link show lo") {
            error
        } else {
            return test();
        };
        // Where CI runs, it must run.
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{name} cannot run: {reason}");
        eprintln!("{name}: skipped: {reason}");
    });
    if let Err(panic) = done.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Moves this thread into a network namespace of its own, with `lo` up.
pub(super) fn new_namespace() -> Result<(), String> {
    // SAFETY: it touches no memory; only this thread changes its namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    ip("link set lo up")
}

/// Runs `ip` in this thread's namespace.
pub(super) fn ip(arguments: &str) -> Result<(), String> {
    match std::process::Command::new("ip").args(arguments.split(' ')).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr))),
        Err(error) => Err(format!("ip cannot be run: {error}")),
    }
}
