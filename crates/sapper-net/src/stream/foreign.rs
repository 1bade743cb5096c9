//! A stream whose bytes are fed and fetched from outside: the door for transports that have no
//! descriptor (an asyncio transport of another library, a Python object).
//!
//! The pump's side is an ordinary [`MemoryStream`]. The outer side is a [`ForeignHandle`], usable from
//! any thread and never waiting: when it has to wait it says so, and the `notify` call-back comes when
//! another call may do better. Both queues are bounded, so a slow side slows the other down.

use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};

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

struct Notify<F>(F);

impl<F: Fn() + Send + Sync + 'static> Wake for Notify<F> {
    fn wake(self: Arc<Self>) {
        (self.0)();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        (self.0)();
    }
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
    let waker = Waker::from(Arc::new(Notify(notify)));
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    fn counted(capacity: usize) -> (MemoryStream, ForeignHandle, Arc<AtomicUsize>) {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let (stream, handle) = foreign(capacity, "test".into(), move || {
            counter.fetch_add(1, SeqCst);
        });
        (stream, handle, calls)
    }

    fn write(stream: &mut MemoryStream, bytes: &[u8]) -> Poll<Result<usize>> {
        stream.poll_write(&mut Context::from_waker(Waker::noop()), &[IoSlice::new(bytes)])
    }

    fn read(stream: &mut MemoryStream, buf: &mut [u8]) -> Poll<Result<usize>> {
        stream.poll_read(&mut Context::from_waker(Waker::noop()), buf, &mut RecordMarks::ignored())
    }

    #[test]
    fn one_notice_for_each_time_that_nothing_was_found() {
        let (mut stream, handle, calls) = counted(16);
        let mut buf = [0; 16];
        assert!(matches!(write(&mut stream, b"one"), Poll::Ready(Ok(3))));
        assert!(matches!(write(&mut stream, b"two"), Poll::Ready(Ok(3))));
        assert_eq!(calls.load(SeqCst), 1);
        assert!(matches!(handle.take_to_send(&mut buf), ToSend::Bytes(6)));
        assert!(matches!(write(&mut stream, b"x"), Poll::Ready(Ok(1))));
        assert_eq!(calls.load(SeqCst), 1, "it was not asked for again");
        assert!(matches!(handle.take_to_send(&mut buf), ToSend::Bytes(1)));
        assert!(matches!(handle.take_to_send(&mut buf), ToSend::Nothing));
        assert!(matches!(write(&mut stream, b"x"), Poll::Ready(Ok(1))));
        assert_eq!(calls.load(SeqCst), 2);
    }

    #[test]
    fn a_full_queue_says_so_and_notifies_of_room() {
        let (mut stream, handle, calls) = counted(4);
        assert_eq!(handle.push_received(b"abcdef").unwrap(), 4);
        assert_eq!(handle.push_received(b"ef").unwrap(), 0);
        assert_eq!(calls.load(SeqCst), 0);
        assert!(matches!(read(&mut stream, &mut [0; 2]), Poll::Ready(Ok(2))));
        assert_eq!(calls.load(SeqCst), 1);
        assert_eq!(handle.push_received(b"ef").unwrap(), 2);
    }

    #[test]
    fn flush_waits_until_all_is_fetched() {
        let (mut stream, handle, _) = counted(16);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(write(&mut stream, b"abc").is_ready());
        assert!(stream.poll_flush(&mut cx).is_pending());
        assert!(stream.poll_send_eof(&mut cx).is_pending());
        assert!(matches!(handle.take_to_send(&mut [0; 2]), ToSend::Bytes(2)));
        assert!(stream.poll_flush(&mut cx).is_pending());
        assert!(matches!(handle.take_to_send(&mut [0; 2]), ToSend::Bytes(1)));
        assert!(stream.poll_send_eof(&mut cx).is_ready());
        assert!(matches!(handle.take_to_send(&mut [0; 2]), ToSend::Eof));
        assert!(matches!(handle.take_to_send(&mut [0; 2]), ToSend::Eof));
    }

    #[test]
    fn a_lost_transport_ends_both_directions_with_its_errno() {
        let (mut stream, handle, _) = counted(16);
        handle.push_lost("connection lost", Some(libc::ECONNRESET));
        let Poll::Ready(Err(error)) = read(&mut stream, &mut [0; 4]) else { panic!("no error") };
        assert_eq!((error.kind(), error.errno()), (ErrorKind::ConnectionLost, Some(libc::ECONNRESET)));
        let Poll::Ready(Err(error)) = write(&mut stream, b"x") else { panic!("no error") };
        assert_eq!(error.errno(), Some(libc::ECONNRESET));
    }

    #[test]
    fn a_dropped_stream_is_seen_from_outside() {
        let (mut stream, handle, calls) = counted(16);
        assert!(write(&mut stream, b"last").is_ready());
        drop(stream);
        assert_eq!(calls.load(SeqCst), 1);
        assert!(handle.push_received(b"x").is_err());
        assert!(matches!(handle.take_to_send(&mut [0; 8]), ToSend::Bytes(4)));
        assert!(matches!(handle.take_to_send(&mut [0; 8]), ToSend::Eof));
    }
}
