//! A carrier in memory with a bounded buffer each way, so that back-pressure and half-close happen.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, ErrorKind, Result};
use crate::stats::EndpointStats;
use crate::stream::{RecordMarks, Stream};

#[derive(Default)]
struct Way {
    bytes: VecDeque<u8>,
    ended: bool,
    broken: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Way {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

/// One end of a pipe.
pub(crate) struct Pipe {
    read: Arc<Mutex<Way>>,
    write: Arc<Mutex<Way>>,
    capacity: usize,
    stats: Arc<EndpointStats>,
}

/// Two ends; each way holds `capacity` bytes.
pub(crate) fn pipe(capacity: usize) -> (Pipe, Pipe) {
    let (a, b): (Arc<Mutex<Way>>, Arc<Mutex<Way>>) = Default::default();
    let end = |read: &Arc<Mutex<Way>>, write: &Arc<Mutex<Way>>| Pipe {
        read: Arc::clone(read),
        write: Arc::clone(write),
        capacity,
        stats: Arc::default(),
    };
    (end(&a, &b), end(&b, &a))
}

impl Pipe {
    /// Writes without waiting; what a foreign peer would send.
    pub(crate) fn inject(&mut self, bytes: &[u8]) {
        let mut way = self.write.lock().unwrap();
        way.bytes.extend(bytes);
        way.wake();
    }

    /// What has come and nobody has read.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        let mut way = self.read.lock().unwrap();
        way.wake();
        way.bytes.drain(..).collect()
    }

    /// Ends our direction.
    pub(crate) fn end(&mut self) {
        let mut way = self.write.lock().unwrap();
        way.ended = true;
        way.wake();
    }

    /// Whether the other end has ended its direction.
    pub(crate) fn has_ended(&self) -> bool {
        self.read.lock().unwrap().ended
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.end();
        let mut way = self.read.lock().unwrap();
        way.broken = true;
        way.wake();
    }
}

impl Stream for Pipe {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        _: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        let mut way = self.read.lock().unwrap();
        let n = way.bytes.len().min(buf.len());
        if n == 0 && !way.ended {
            way.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        for (slot, byte) in buf.iter_mut().zip(way.bytes.drain(..n)) {
            *slot = byte;
        }
        way.wake();
        Poll::Ready(Ok(n))
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut way = self.read.lock().unwrap();
        if way.bytes.is_empty() && !way.ended {
            way.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        let mut way = self.write.lock().unwrap();
        if way.broken {
            return Poll::Ready(Err(Error::new(ErrorKind::ConnectionLost, "the other end is gone")));
        }
        let mut taken = 0;
        for slice in slices {
            let n = slice.len().min(self.capacity - way.bytes.len());
            way.bytes.extend(&slice[..n]);
            taken += n;
        }
        if taken == 0 {
            way.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        way.wake();
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        self.end();
        Poll::Ready(Ok(()))
    }

    fn reset(&mut self, _: u64) {
        self.end();
    }

    fn stop(&mut self, _: u64) {}

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        "pipe".to_owned()
    }
}
