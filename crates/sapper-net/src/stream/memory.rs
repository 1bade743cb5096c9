//! Two streams that are each other's peer, without a descriptor.
//!
//! The reference of the conformance suite, and what lies under every stream whose bytes come from
//! somewhere else: a foreign event loop ([`super::foreign`]), a thread ([`super::blocking`]). Both
//! directions are bounded, half-closable, and carry `reset(code)` and `stop(code)` to the peer.

mod channel;
#[cfg(test)]
mod tests;

use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use self::channel::Channel;
use super::fd::written_after_end;
use super::{RecordMarks, Stream};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stats::EndpointStats;

/// When a [`MemoryStream`]'s flush is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// At once: the queue is the system.
    Queued,
    /// When the other half has taken everything.
    Taken,
}

/// One of two halves; see [`pair`].
pub struct MemoryStream {
    incoming: Arc<Channel>,
    outgoing: Arc<Channel>,
    flush: Flush,
    /// The end was read, or we read no more.
    read_ended: bool,
    write_ended: bool,
    /// We broke our own sending direction off.
    reset_here: bool,
    stats: Arc<EndpointStats>,
    description: String,
}

/// Two connected halves with room for `capacity` bytes in each direction. An idle one holds none.
pub fn pair(capacity: usize) -> (MemoryStream, MemoryStream) {
    let (one, other) = (Arc::new(Channel::new(capacity)), Arc::new(Channel::new(capacity)));
    (
        MemoryStream::new(Arc::clone(&one), Arc::clone(&other), Flush::Queued, "memory".into()),
        MemoryStream::new(other, one, Flush::Queued, "memory".into()),
    )
}

/// A pair whose first half is an endpoint and whose second half is moved by other means.
pub(super) fn endpoint(
    capacity: usize,
    description: String,
    flush: Flush,
    stats: Arc<EndpointStats>,
) -> (MemoryStream, MemoryStream) {
    let (one, other) = (Arc::new(Channel::new(capacity)), Arc::new(Channel::new(capacity)));
    let outer = MemoryStream::new(Arc::clone(&other), Arc::clone(&one), Flush::Queued, description.clone());
    let mut inner = MemoryStream::new(one, other, flush, description);
    inner.stats = stats;
    (inner, outer)
}

impl MemoryStream {
    fn new(incoming: Arc<Channel>, outgoing: Arc<Channel>, flush: Flush, description: String) -> Self {
        Self {
            incoming,
            outgoing,
            flush,
            read_ended: false,
            write_ended: false,
            reset_here: false,
            stats: Arc::default(),
            description,
        }
    }

    /// Breaks our sending direction off; the peer reads `why`.
    pub(super) fn reset_with(&mut self, why: Error) {
        self.write_ended = true;
        self.reset_here = true;
        self.outgoing.break_off(why);
    }

    /// Reads no more; the peer's writes fail with `why`.
    pub(super) fn stop_with(&mut self, why: Error) {
        self.read_ended = true;
        self.incoming.stop(why);
    }

    /// Bytes that a read would give now without waiting.
    pub(super) fn available(&self) -> usize {
        self.incoming.available()
    }

    /// Reads no more, without a word to the peer: what it still writes is thrown away, and a pump that
    /// asks ([`Stream::is_wanted`]) brings nothing more.
    pub(crate) fn abandon(&mut self) {
        self.read_ended = true;
        self.incoming.abandon();
    }

    /// Copies what is there without taking it; 0 is the end. [`consume`](Self::consume) takes it.
    pub(super) fn poll_peek(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<usize>> {
        if self.read_ended {
            return Poll::Ready(Ok(0));
        }
        let n = ready!(self.incoming.poll_peek(cx, buf))?;
        self.read_ended = n == 0;
        Poll::Ready(Ok(n))
    }

    /// Takes `n` bytes that were peeked at.
    pub(super) fn consume(&mut self, n: usize) {
        self.incoming.consume(n);
        self.stats.bytes_received.add(n as u64);
    }

    /// Ready when the peer takes no more bytes from us.
    pub(super) fn poll_unwanted(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.outgoing.poll_unwanted(cx)
    }
}

fn broken_by_peer(what: &str, code: u64) -> Error {
    Error::new(ErrorKind::ConnectionLost, format!("the peer {what} the stream (code {code})"))
        .with_phase(Phase::Transfer)
        .with_stream_code(code)
}

impl Stream for MemoryStream {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        _marks: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        let n = ready!(self.poll_peek(cx, buf))?;
        self.consume(n);
        Poll::Ready(Ok(n))
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.read_ended {
            // An error is worth a read too, which returns it.
            let _ = ready!(self.incoming.poll_peek(cx, &mut []));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        if self.reset_here {
            let message = format!("{} was reset by this side", self.description);
            return Poll::Ready(
                Err(Error::new(ErrorKind::ConnectionLost, message).with_reason("reset_here")),
            );
        }
        if self.write_ended {
            return Poll::Ready(Err(written_after_end(&self.description)));
        }
        let n = ready!(self.outgoing.poll_push(cx, slices))?;
        self.stats.bytes_sent.add(n as u64);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        match self.flush {
            Flush::Queued => Poll::Ready(Ok(())),
            Flush::Taken => self.outgoing.poll_taken(cx),
        }
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.write_ended {
            ready!(self.poll_flush(cx))?;
            self.write_ended = true;
            self.outgoing.end();
        }
        Poll::Ready(Ok(()))
    }

    fn reset(&mut self, code: u64) {
        self.reset_with(broken_by_peer("reset", code));
    }

    fn stop(&mut self, code: u64) {
        self.stop_with(broken_by_peer("stopped reading", code));
    }

    fn fail(&mut self, why: &Error) {
        self.write_ended = true;
        self.outgoing.fail(why.clone());
        self.incoming.stop(why.clone());
    }

    fn is_wanted(&self) -> bool {
        self.outgoing.is_wanted()
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn release_idle(&mut self) {
        self.incoming.release_idle();
        self.outgoing.release_idle();
    }

    fn is_movable(&self) -> bool {
        true
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl Drop for MemoryStream {
    fn drop(&mut self) {
        self.outgoing.end();
        self.incoming.stop(
            Error::new(ErrorKind::ConnectionLost, "the peer closed the stream").with_phase(Phase::Transfer),
        );
    }
}
