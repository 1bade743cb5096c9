//! The outer side alone, and two foreign streams with a transport between them through the suite.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use tokio::sync::Notify as Wakeup;

use super::*;
use crate::stream::BoxStream;
use crate::stream::conformance::{Abilities, check};

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

/// What an event loop does with two handles: everything that one wants sent is received by the other.
struct Relay {
    handles: [ForeignHandle; 2],
    /// Fetched, but there was no room yet.
    waiting: [Vec<u8>; 2],
    over: [bool; 2],
}

impl Relay {
    fn step(&mut self) {
        for from in [0, 1] {
            let (source, target) = (&self.handles[from], &self.handles[1 - from]);
            let mut buf = [0; 700];
            while !self.over[from] {
                if !self.waiting[from].is_empty() {
                    match target.push_received(&self.waiting[from]) {
                        Ok(0) => break,
                        Ok(n) => drop(self.waiting[from].drain(..n)),
                        Err(why) => {
                            source.stop_sending(why.stream_code().unwrap_or(0));
                            self.over[from] = true;
                        }
                    }
                    continue;
                }
                match source.take_to_send(&mut buf) {
                    ToSend::Bytes(n) => self.waiting[from].extend_from_slice(&buf[..n]),
                    ToSend::Nothing => break,
                    ToSend::Eof => {
                        target.push_eof();
                        self.over[from] = true;
                    }
                    ToSend::Broken(why) => {
                        target.push_reset(why.stream_code().unwrap_or(0));
                        self.over[from] = true;
                    }
                }
            }
        }
    }
}

/// A pair whose transport runs beside the suite.
fn pair(relays: &tokio::sync::mpsc::UnboundedSender<(Relay, Arc<Wakeup>)>) -> (BoxStream, BoxStream) {
    let wakeup = Arc::new(Wakeup::new());
    let half = || {
        let wakeup = Arc::clone(&wakeup);
        foreign(1000, "foreign".into(), move || wakeup.notify_one())
    };
    let ((one, one_handle), (other, other_handle)) = (half(), half());
    let relay = Relay { handles: [one_handle, other_handle], waiting: Default::default(), over: [false; 2] };
    assert!(relays.send((relay, wakeup)).is_ok());
    (Box::new(one), Box::new(other))
}

async fn transport(mut relays: tokio::sync::mpsc::UnboundedReceiver<(Relay, Arc<Wakeup>)>) {
    // One pair at a time is in use; the one before is dropped.
    let mut current: Option<(Relay, Arc<Wakeup>)> = None;
    loop {
        let woken = async {
            match &current {
                Some((_, wakeup)) => wakeup.notified().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            next = relays.recv() => match next {
                Some(next) => current = Some(next),
                None => return,
            },
            () = woken => {}
        }
        if let Some((relay, _)) = &mut current {
            relay.step();
        }
    }
}

#[tokio::test]
async fn conformance() {
    let (relays, queue) = tokio::sync::mpsc::unbounded_channel();
    let mut transport = pin!(transport(queue));
    // A stop is heard of when the transport has something to deliver.
    let abilities = Abilities { reset_seen: true, stop_seen: true, codes: true };
    let mut suite = pin!(async move { check(abilities, || async { pair(&relays) }).await });
    std::future::poll_fn(|cx| {
        let _ = transport.as_mut().poll(cx);
        suite.as_mut().poll(cx)
    })
    .await;
}
