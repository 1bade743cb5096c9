//! A stream whose bytes are fed and fetched from outside: the door for transports that have no
//! descriptor (an asyncio transport of another library, a Python object).
//!
//! The pump's side is an ordinary [`MemoryStream`]. The outer side is a [`ForeignHandle`], usable from
//! any thread and never waiting: when it has to wait it says so, and the `notify` call-back comes when
//! another call may do better. Both queues are bounded, so a slow side slows the other down.

#[cfg(test)]
mod tests;

use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use super::door::waker;
use super::memory::{self, Flush, MemoryStream};
use super::{RecordMarks, Stream};
use crate::error::{Error, ErrorKind, Phase, Result};

/// The outer side of a foreign stream.
///
/// When it is dropped, the stream reads its end and its writes fail.
pub struct ForeignHandle {
    outer: Mutex<MemoryStream>,
    waker: Waker,
}

/// What [`ForeignHandle::take_to_send`] found.
#[derive(Clone, Debug)]
pub enum ToSend {
    /// So many bytes were written to the front of the buffer. More may wait.
    Bytes(usize),
    /// Nothing now; `notify` comes when there is.
    Nothing,
    /// The stream sent its end: half-close the transport. It stays so.
    Eof,
    /// The stream broke its direction off: abort the transport. It stays so.
    Broken(Error),
}

/// A stream and its outer side, with room for `capacity` bytes each way.
///
/// `notify` is called on whatever thread made the news, without a lock held, once for each time that
/// [`ForeignHandle::take_to_send`] found nothing or [`ForeignHandle::push_received`] found no room. It
/// should only pass the word on; to call the handle from it is allowed.
pub fn foreign(
    capacity: usize,
    description: String,
    notify: impl Fn() + Send + Sync + 'static,
) -> (MemoryStream, ForeignHandle) {
    let (stream, mut outer) = memory::endpoint(capacity, description, Flush::Taken, Arc::default());
    let waker = waker(notify);
    // The first byte is news too.
    let nothing_yet = outer.poll_readable(&mut Context::from_waker(&waker));
    debug_assert!(nothing_yet.is_pending());
    (stream, ForeignHandle { outer: Mutex::new(outer), waker })
}

impl ForeignHandle {
    fn lock(&self) -> MutexGuard<'_, MemoryStream> {
        self.outer.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Hands over what the transport received; returns how many bytes fitted. Fewer than given means
    /// full: pause the transport, keep the rest, and try again after `notify`.
    ///
    /// An error says that the stream takes no more: it was closed, or stopped reading.
    pub fn push_received(&self, mut bytes: &[u8]) -> Result<usize> {
        let mut outer = self.lock();
        let mut cx = Context::from_waker(&self.waker);
        let mut pushed = 0;
        // The call that finds no room is the one that asks for the notice.
        while !bytes.is_empty() {
            match outer.poll_write(&mut cx, &[IoSlice::new(bytes)])? {
                Poll::Ready(n) => {
                    pushed += n;
                    bytes = &bytes[n..];
                }
                Poll::Pending => break,
            }
        }
        Ok(pushed)
    }

    /// The transport received its end. Repeated calls are allowed.
    pub fn push_eof(&self) {
        let ended = self.lock().poll_send_eof(&mut Context::from_waker(&self.waker));
        debug_assert!(ended.is_ready(), "the outer half's flush never waits");
    }

    /// The transport was lost: the stream reads this error and its writes fail with it.
    pub fn push_lost(&self, message: impl Into<String>, errno: Option<i32>) {
        let mut why = Error::new(ErrorKind::ConnectionLost, message).with_phase(Phase::Transfer);
        if let Some(errno) = errno {
            why = why.with_errno(errno);
        }
        let mut outer = self.lock();
        outer.reset_with(why.clone());
        outer.stop_with(why);
    }

    /// The transport's peer broke its sending direction off, with a code of its own. The stream may
    /// still send.
    pub fn push_reset(&self, code: u64) {
        self.lock().reset(code);
    }

    /// The transport takes no more bytes (its peer stopped reading); what it receives still counts.
    pub fn stop_sending(&self, code: u64) {
        self.lock().stop(code);
    }

    /// Fetches what the stream wants sent.
    pub fn take_to_send(&self, buf: &mut [u8]) -> ToSend {
        assert!(!buf.is_empty());
        let mut cx = Context::from_waker(&self.waker);
        let read = self.lock().poll_read(&mut cx, buf, &mut RecordMarks::ignored());
        match read {
            Poll::Ready(Ok(0)) => ToSend::Eof,
            Poll::Ready(Ok(n)) => ToSend::Bytes(n),
            Poll::Ready(Err(why)) => ToSend::Broken(why),
            Poll::Pending => ToSend::Nothing,
        }
    }
}
