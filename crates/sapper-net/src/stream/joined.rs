//! One stream of two one-way ones: a pair of pipes, standard input and output.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};

use super::fd::{SocketOptions, open_one};
use super::{BoxStream, RecordMarks, Stream};
use crate::error::{Error, Result};
use crate::fd::{self, Access};
use crate::stats::EndpointStats;

/// A stream that reads from one descriptor of ours and writes to another. What else they could do is
/// not used: of a terminal given for reading, nothing is written to.
pub fn open_pair(
    read: OwnedFd,
    write: OwnedFd,
    fields: [&'static str; 2],
    options: &SocketOptions,
) -> Result<BoxStream> {
    let stats = Arc::<EndpointStats>::default();
    let look = |fd: &OwnedFd, field, wanted: Access| {
        let kind = fd::classify(fd.as_fd(), field)?;
        let access = fd::checked_access(fd.as_fd(), &kind, field)?;
        if (wanted.read && !access.read) || (wanted.write && !access.write) {
            let direction = if wanted.read { "reading" } else { "writing" };
            let message = format!("this descriptor is not open for {direction}");
            return Err(Error::config(field, message).with_reason("wrong_direction"));
        }
        Ok(kind)
    };
    let read_kind = look(&read, fields[0], Access::READ)?;
    let write_kind = look(&write, fields[1], Access::WRITE)?;
    let read = open_one(read, read_kind, fields[0], Access::READ, options, Arc::clone(&stats))?;
    let write = open_one(write, write_kind, fields[1], Access::WRITE, options, Arc::clone(&stats))?;
    Ok(Box::new(JoinedStream::new(read, write, stats)))
}

/// Reads from one stream and writes to another; what else they could do is not used.
pub fn join(read: BoxStream, write: BoxStream) -> BoxStream {
    Box::new(JoinedStream::new(read, write, Arc::default()))
}

/// Reads from one stream and writes to another.
pub(super) struct JoinedStream {
    read: BoxStream,
    write: BoxStream,
    stats: Arc<EndpointStats>,
}

impl JoinedStream {
    /// Two that count in the same `stats`: no counter is written by both.
    pub(super) fn new(read: BoxStream, write: BoxStream, stats: Arc<EndpointStats>) -> Self {
        Self { read, write, stats }
    }
}

impl Stream for JoinedStream {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        marks: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        self.read.poll_read(cx, buf, marks)
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.read.poll_readable(cx)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        self.write.poll_write(cx, slices)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.write.poll_flush(cx)
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.write.poll_send_eof(cx)
    }

    fn reset(&mut self, code: u64) {
        self.write.reset(code);
    }

    fn stop(&mut self, code: u64) {
        self.read.stop(code);
    }

    fn fail(&mut self, why: &Error) {
        self.read.fail(why);
        self.write.fail(why);
    }

    fn is_wanted(&self) -> bool {
        self.write.is_wanted()
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn release_idle(&mut self) {
        self.read.release_idle();
        self.write.release_idle();
    }

    fn is_movable(&self) -> bool {
        self.read.is_movable() && self.write.is_movable()
    }

    fn moved(&mut self) -> Result<()> {
        self.read.moved()?;
        self.write.moved()
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn peer_address(&self) -> Option<SocketAddr> {
        self.read.peer_address()
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.read.local_address()
    }

    fn describe(&self) -> String {
        format!("{} and {}", self.read.describe(), self.write.describe())
    }
}
