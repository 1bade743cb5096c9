//! Streams in memory for the tests of framed ports: small reads, small writes, records.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, ErrorKind, Result};
use crate::stats::EndpointStats;
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
