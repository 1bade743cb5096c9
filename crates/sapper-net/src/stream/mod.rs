//! Streams: ordered bytes, half-closable. One of the two kinds of endpoint.
//!
//! Every stream passes the conformance suite in [`conformance`]. What is not here: TLS, which is a
//! stream over a stream and lives in [`crate::tls`].
//!
//! - Over descriptors: [`fd`] (sockets, pipes, terminals), [`blocking`] (what epoll refuses),
//!   [`joined`] (a descriptor a direction).
//! - Without one: [`memory`] (two halves), [`foreign`] (bytes from and to another event loop), [`door`]
//!   (bytes for a caller that never waits).
//! - Where they come from: [`connect`], [`listen`], [`inherited`] (sockets of a service manager).
//! - [`ops`]: reading and writing in `async` code.

pub mod address;
pub mod blocking;
pub mod conformance;
pub mod connect;
pub mod door;
pub mod eyeballs;
pub mod fd;
pub mod foreign;
pub mod inherited;
pub mod joined;
pub mod listen;
pub mod memory;
pub mod ops;
pub mod resolve;

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::error::{Error, Result};
use crate::stats::EndpointStats;
use crate::tls::stream::TlsStream;

/// Ordered bytes in both directions. All `poll_*` follow the rules of [`std::future::Future`]: on
/// `Pending` the task of `cx` is woken when a new call may do better. One task owns a stream.
///
/// A peer that breaks off is an error of kind `ConnectionLost`; a peer's orderly end is `Ok(0)` from
/// [`poll_read`](Self::poll_read), and only that.
pub trait Stream: Send {
    /// Reads what is there, at most `buf.len()` bytes (`buf` is not empty). 0 is the end.
    ///
    /// A stream that has records (TLS) reports where they end in `marks`, when asked to.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        marks: &mut RecordMarks,
    ) -> Poll<Result<usize>>;

    /// Becomes ready when [`poll_read`](Self::poll_read) is worth a buffer. An idle pump waits here
    /// without holding one.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Writes the front of `slices`, at least one byte of them; returns how many bytes were taken.
    ///
    /// On a stream that has records each slice is a record of its own (cut where it is larger than a
    /// record), and one call is one write to the carrier.
    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>>;

    /// Ready when all that was taken is handed to the system.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Flushes, then says that no more bytes come; the other direction goes on. Repeated calls are
    /// allowed.
    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Breaks off our sending direction (what is queued may be lost). `code` reaches the peer where
    /// the transport carries one; on TCP it is an RST and ends both directions.
    fn reset(&mut self, code: u64);

    /// Says that we read no more: the peer should stop sending. `code` as in [`reset`](Self::reset).
    /// Reads end after it.
    fn stop(&mut self, code: u64);

    /// Says why this end goes, where the other half is in this process: after the bytes that wait it
    /// reads this error, and its writes fail with it. Elsewhere the peer sees an ordinary end.
    fn fail(&mut self, _why: &Error) {}

    /// Whether anybody still wants what is written to it. Where nobody does, writing succeeds into the
    /// void; a pump need not even read for it.
    fn is_wanted(&self) -> bool {
        true
    }

    /// The descriptor behind it, where there is one.
    fn as_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Gives pooled memory back; called when nothing moved for a moment.
    fn release_idle(&mut self) {}

    /// What comes is bulk beside which nobody waits: more of it may lie in the system, where we keep that short.
    fn widen(&mut self) {}

    /// Whether it can go on in the event loop of another thread ([`moved`](Self::moved)).
    fn is_movable(&self) -> bool {
        false
    }

    /// It is on another thread now: registers its descriptor with the event loop there.
    fn moved(&mut self) -> Result<()> {
        Ok(())
    }

    /// Its counters.
    fn stats(&self) -> &Arc<EndpointStats>;

    /// For people: `tcp 127.0.0.1:5000 -> 127.0.0.1:443`.
    fn describe(&self) -> String;

    /// The TLS session, where this stream is one: keys, exporter, bytes behind the end.
    fn tls_mut(&mut self) -> Option<&mut TlsStream> {
        None
    }

    /// Bytes handed to the system that the peer's system has not confirmed yet, where that is known.
    /// Closing a TCP connection that still has bytes to read throws these away.
    fn unconfirmed(&self) -> usize {
        0
    }

    /// Whether payload that it took never left, because the connection broke.
    fn has_lost(&self) -> bool {
        false
    }

    /// The other end's network address, where it has one.
    fn peer_address(&self) -> Option<SocketAddr> {
        None
    }

    /// Our end's network address, where it has one.
    fn local_address(&self) -> Option<SocketAddr> {
        None
    }
}

/// A stream of any kind.
pub type BoxStream = Box<dyn Stream>;

/// Where records ended within what one read returned.
#[derive(Debug, Default)]
pub struct RecordMarks {
    wanted: bool,
    ends: Vec<u32>,
}

impl RecordMarks {
    /// Marks that collect.
    pub fn wanted() -> Self {
        Self { wanted: true, ends: Vec::with_capacity(64) }
    }

    /// Marks that nobody looks at.
    pub const fn ignored() -> Self {
        Self { wanted: false, ends: Vec::new() }
    }

    /// Notes that a record ends at `offset` of the buffer that is being read into.
    #[inline]
    pub fn push(&mut self, offset: usize) {
        if self.wanted {
            self.ends.push(offset as u32);
        }
    }

    /// The offsets, rising.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Forgets them (before the next read).
    pub fn clear(&mut self) {
        self.ends.clear();
    }
}
