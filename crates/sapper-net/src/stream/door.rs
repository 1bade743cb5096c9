//! One half of a memory pair in the hands of a caller that never waits: the door through which a
//! program reads and writes the bytes of a stream.
//!
//! The other half is an endpoint of a bridge, or another door. A call that finds nothing to read, or no
//! room to write, says so, and `notify` comes when another call may do better: bytes that are in memory
//! cost no wake-up and no other thread. Both directions are bounded.
//!
//! What is not here: a transport whose own event loop feeds and fetches the bytes ([`super::foreign`]).

#[cfg(test)]
mod tests;

use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};

use super::memory::{self, MemoryStream};
use super::{BoxStream, RecordMarks, Stream};
use crate::error::{Error, ErrorKind, Result};

/// A caller's half. When the last handle is dropped the other half reads its end.
pub struct Door {
    half: Mutex<Option<MemoryStream>>,
    waker: Waker,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now; `notify` comes when there is.
    Nothing,
    /// The orderly end. It stays so.
    End,
}

impl Door {
    /// A door and the other half of it, with room for `capacity` bytes each way. `notify` is called on
    /// whatever thread made the news, without a lock held, once for each call that found nothing or no
    /// room.
    pub fn new(capacity: usize, notify: impl Fn() + Send + Sync + 'static) -> (Arc<Self>, MemoryStream) {
        let (near, far) = memory::pair(capacity);
        (Self::of(near, notify), far)
    }

    /// Two doors that are each other's peer.
    pub fn pair(
        capacity: usize,
        notify_one: impl Fn() + Send + Sync + 'static,
        notify_other: impl Fn() + Send + Sync + 'static,
    ) -> (Arc<Self>, Arc<Self>) {
        let (one, other) = memory::pair(capacity);
        (Self::of(one, notify_one), Self::of(other, notify_other))
    }

    fn of(half: MemoryStream, notify: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { half: Mutex::new(Some(half)), waker: waker(notify) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<MemoryStream>> {
        self.half.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn with<T>(&self, call: impl FnOnce(&mut MemoryStream, &mut Context<'_>) -> Result<T>) -> Result<T> {
        let mut half = self.lock();
        let half = half.as_mut().ok_or_else(taken)?;
        call(half, &mut Context::from_waker(&self.waker))
    }

    /// Bytes that [`read`](Self::read) would give now.
    pub fn available(&self) -> usize {
        self.lock().as_ref().map_or(0, MemoryStream::available)
    }

    /// Reads what is there, at most `buf.len()` bytes; `buf` is not empty.
    pub fn read(&self, buf: &mut [u8]) -> Result<Read> {
        self.with(|half, cx| {
            Ok(match half.poll_read(cx, buf, &mut RecordMarks::ignored())? {
                Poll::Ready(0) => Read::End,
                Poll::Ready(n) => Read::Bytes(n),
                Poll::Pending => Read::Nothing,
            })
        })
    }

    /// Writes as much of the front of `bytes` as there is room for. Fewer than given: `notify` comes.
    pub fn write(&self, bytes: &[u8]) -> Result<usize> {
        self.with(|half, cx| {
            let mut written = 0;
            // The call that finds no room is the one that asks for the notice.
            while written < bytes.len() {
                match half.poll_write(cx, &[IoSlice::new(&bytes[written..])])? {
                    Poll::Ready(n) => written += n,
                    Poll::Pending => break,
                }
            }
            Ok(written)
        })
    }

    /// No more bytes follow. Repeated calls are allowed.
    pub fn write_eof(&self) -> Result<()> {
        self.with(|half, cx| {
            let _sent_at_once = half.poll_send_eof(cx)?;
            Ok(())
        })
    }

    /// Nothing more will be read: what still comes is thrown away, which the other half may know of and
    /// need not mind.
    pub fn abandon_reading(&self) {
        if let Some(half) = self.lock().as_mut() {
            half.abandon();
        }
    }

    /// Nothing more will be read, and whoever writes to us fails with that.
    pub fn stop_reading(&self) {
        if let Some(half) = self.lock().as_mut() {
            half.stop(0);
        }
    }

    /// Breaks both directions off: the other half reads an error, and what it writes is thrown away.
    pub fn reset(&self) {
        if let Some(half) = self.lock().as_mut() {
            half.reset(0);
            half.abandon();
        }
    }

    /// Gives pooled memory back.
    pub fn release_idle(&self) {
        if let Some(half) = self.lock().as_mut() {
            half.release_idle();
        }
    }

    /// The half itself, for a pump to move its bytes; once. The door is of no more use then.
    pub fn take(&self) -> Result<BoxStream> {
        self.lock().take().map(|half| Box::new(half) as BoxStream).ok_or_else(taken)
    }
}

fn taken() -> Error {
    Error::new(ErrorKind::Closed, "the stream was handed over and is not ours any more").with_reason("taken")
}

struct Notify<F>(F);

impl<F: Fn() + Send + Sync + 'static> Wake for Notify<F> {
    fn wake(self: Arc<Self>) {
        (self.0)();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        (self.0)();
    }
}

/// A waker that calls `notify`.
pub(super) fn waker(notify: impl Fn() + Send + Sync + 'static) -> Waker {
    Waker::from(Arc::new(Notify(notify)))
}
