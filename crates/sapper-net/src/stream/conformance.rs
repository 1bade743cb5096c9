//! What every stream must do, as a suite that each kind of stream is put through.
//!
//! [`check`] takes a maker of connected pairs and panics with the name of the case that failed. It is
//! public: whoever writes a stream tests it with this. What differs between transports by nature is
//! said in [`Abilities`]; everything else is the same for all.
//!
//! [`leaves_nothing`] counts the process's descriptors: run it where nothing else runs.

use std::future::{Future, poll_fn};
use std::io::IoSlice;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::timeout;

use super::ops::{flush, read, read_full, readable, send_eof, write_all};
use super::{BoxStream, RecordMarks, Stream};
use crate::error::{Error, ErrorKind, Result};

/// A case that takes longer hangs. Generous: the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(60);

/// Bytes that a writer may get rid of before a peer that does not read holds it back. Far above any
/// socket's buffers.
const MOST_QUEUED: usize = 256 << 20;

/// What the transport under a stream can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// A reset is an error at the peer (otherwise an end).
    pub reset_seen: bool,
    /// A stop makes the peer's writes fail (otherwise they wait).
    pub stop_seen: bool,
    /// The codes of both arrive.
    pub codes: bool,
}

/// Puts pairs of `make` through every case.
pub async fn check<F: Future<Output = (BoxStream, BoxStream)>>(
    abilities: Abilities,
    mut make: impl FnMut() -> F,
) {
    macro_rules! cases {
        ($($case:ident($($argument:expr),*);)*) => {$(
            let (one, other) = make().await;
            within(concat!(stringify!($case), ", first half"), $case(one, other, $($argument),*)).await;
            let (one, other) = make().await;
            within(concat!(stringify!($case), ", second half"), $case(other, one, $($argument),*)).await;
        )*};
    }
    cases! {
        bytes_go_both_ways_in_order();
        a_peer_that_does_not_read_holds_the_writer_back();
        each_direction_ends_by_itself();
        the_end_stays_the_end();
        a_reset_breaks_the_direction_off(abilities);
        a_stop_ends_reading(abilities);
        readable_needs_no_buffer_and_wakes();
        what_was_flushed_needs_no_more_help();
        a_dropped_stream_is_closed();
        writing_nothing_is_nothing();
        idle_memory_comes_back_when_needed();
    }
}

/// Opens and closes many pairs and looks for descriptors that stayed. The process must do nothing
/// else meanwhile.
pub async fn leaves_nothing<F: Future<Output = (BoxStream, BoxStream)>>(mut make: impl FnMut() -> F) {
    // What is made once (a pool, an event loop's own descriptors) is made now.
    drop(make().await);
    settle().await;
    let before = open_descriptors();
    for round in 0..30 {
        let (mut one, mut other) = make().await;
        write_all(one.as_mut(), b"x").await.expect("the pair is connected");
        flush(one.as_mut()).await.expect("the pair is connected");
        match round % 3 {
            0 => drop((one, other)),
            1 => {
                one.reset(1);
                other.stop(2);
            }
            _ => {
                send_eof(one.as_mut()).await.expect("the pair is connected");
                assert_eq!(read_full(other.as_mut(), &mut [0; 8]).await.expect("the pair is connected"), 1);
            }
        }
    }
    let left = async {
        while open_descriptors() != before {
            settle().await;
        }
    };
    assert!(
        timeout(DEADLINE, left).await.is_ok(),
        "{before} descriptors before, {} after",
        open_descriptors()
    );
}

/// Lets threads and tasks that end by themselves do so.
async fn settle() {
    super::blocking::live_threads().wait_for(|&live| live == 0).await.expect("the count is never closed");
    for _ in 0..16 {
        tokio::task::yield_now().await;
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

async fn within(case: &str, work: impl Future<Output = ()>) {
    // Without tokio's budget, which makes a ready stream look as if it were not.
    let work = tokio::task::unconstrained(work);
    assert!(timeout(DEADLINE, work).await.is_ok(), "{case}: hangs");
}

async fn bytes_go_both_ways_in_order(one: BoxStream, other: BoxStream) {
    const LEN: usize = 3 << 20;
    let mut one = Party::new(one, 1, LEN);
    let mut other = Party::new(other, 2, LEN / 3);
    (one.expect, other.expect) = ((2, LEN / 3), (1, LEN));
    poll_fn(|cx| {
        let (first, second) = (one.poll(cx), other.poll(cx));
        ready!(first);
        second
    })
    .await;
    for (party, sent, received) in [(&one, LEN, LEN / 3), (&other, LEN / 3, LEN)] {
        let stats = party.stream.stats();
        assert_eq!((stats.bytes_sent.get(), stats.bytes_received.get()), (sent as u64, received as u64));
        assert!(!party.stream.describe().is_empty());
    }
}

async fn a_peer_that_does_not_read_holds_the_writer_back(mut one: BoxStream, mut other: BoxStream) {
    let chunk = vec![7; 64 * 1024];
    let mut written = 0;
    // Until it says "not now" and nothing changes that for a while of other work.
    let mut refused = 0;
    while refused < 32 {
        match poll_once(|cx| one.poll_write(cx, &[IoSlice::new(&chunk)])).await {
            Poll::Ready(result) => {
                written += result.expect("a peer that does not read is there");
                refused = 0;
            }
            Poll::Pending => {
                // A stream over a stream moves its own queue on.
                let _ = poll_once(|cx| one.poll_flush(cx)).await;
                refused += 1;
                tokio::task::yield_now().await;
            }
        }
        assert!(written < MOST_QUEUED, "nothing holds the writer back");
    }
    let mut received = 0;
    let mut room = vec![0; 100_000];
    let mut finished = false;
    // The writer wakes when there is room again, and all of it arrives.
    poll_fn(|cx| {
        while !finished {
            match one.poll_write(cx, &[IoSlice::new(b"tail")]) {
                Poll::Ready(n) => {
                    written += n.expect("the peer reads");
                    finished = true;
                }
                Poll::Pending => break,
            }
        }
        if finished && let Poll::Ready(ended) = one.poll_send_eof(cx) {
            ended.expect("the peer reads");
        }
        while let Poll::Ready(n) = other.poll_read(cx, &mut room, &mut RecordMarks::ignored()) {
            match n.expect("the peer sends") {
                0 => return Poll::Ready(()),
                n => received += n,
            }
        }
        Poll::Pending
    })
    .await;
    assert!(finished);
    assert_eq!(received, written);
}

async fn each_direction_ends_by_itself(mut one: BoxStream, mut other: BoxStream) {
    write_all(one.as_mut(), b"question").await.unwrap();
    send_eof(one.as_mut()).await.unwrap();
    let mut buf = [0; 16];
    assert_eq!(read_full(other.as_mut(), &mut buf).await.unwrap(), 8);
    assert_eq!(&buf[..8], b"question");
    // The other direction does not know of it.
    write_all(other.as_mut(), b"answer").await.unwrap();
    flush(other.as_mut()).await.unwrap();
    assert_eq!(read_full(one.as_mut(), &mut buf[..6]).await.unwrap(), 6);
    assert_eq!(&buf[..6], b"answer");
    send_eof(other.as_mut()).await.unwrap();
    assert_eq!(read(one.as_mut(), &mut buf).await.unwrap(), 0);
}

async fn the_end_stays_the_end(mut one: BoxStream, mut other: BoxStream) {
    send_eof(one.as_mut()).await.unwrap();
    send_eof(one.as_mut()).await.unwrap();
    flush(one.as_mut()).await.unwrap();
    let error = write_all(one.as_mut(), b"late").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    for _ in 0..3 {
        readable(other.as_mut()).await.unwrap();
        assert_eq!(read(other.as_mut(), &mut [0; 4]).await.unwrap(), 0);
    }
}

async fn a_reset_breaks_the_direction_off(mut one: BoxStream, mut other: BoxStream, abilities: Abilities) {
    write_all(one.as_mut(), b"half a mess").await.unwrap();
    one.reset(7);
    let error = write_all(one.as_mut(), b"age").await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Closed | ErrorKind::ConnectionLost), "{error}");
    let end = read_to_end(other.as_mut()).await;
    if !abilities.reset_seen {
        return assert!(end.is_ok() || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionLost));
    }
    let error = end.expect_err("a reset is no orderly end");
    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{error}");
    if abilities.codes {
        assert_eq!(error.stream_code(), Some(7));
    }
    // It does not turn into an end later.
    assert!(read(other.as_mut(), &mut [0; 4]).await.is_err());
}

async fn a_stop_ends_reading(mut one: BoxStream, mut other: BoxStream, abilities: Abilities) {
    write_all(one.as_mut(), b"unread").await.unwrap();
    flush(one.as_mut()).await.unwrap();
    other.stop(9);
    assert_eq!(read(other.as_mut(), &mut [0; 4]).await.unwrap(), 0);
    // The other direction goes on.
    write_all(other.as_mut(), b"enough").await.unwrap();
    flush(other.as_mut()).await.unwrap();
    let mut buf = [0; 6];
    assert_eq!(read_full(one.as_mut(), &mut buf).await.unwrap(), 6);
    assert_eq!(&buf, b"enough");
    if abilities.stop_seen {
        let error = write_until_it_fails(one.as_mut()).await;
        assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{error}");
        if abilities.codes {
            assert_eq!(error.stream_code(), Some(9));
        }
        send_eof(other.as_mut()).await.unwrap();
        assert_eq!(
            read(one.as_mut(), &mut buf).await.unwrap(),
            0,
            "an unwanted direction does not break the other"
        );
    }
}

async fn readable_needs_no_buffer_and_wakes(mut one: BoxStream, mut other: BoxStream) {
    let mut buf = [0; 64];
    // Drained: a stream may think that something is there until a read tells it otherwise.
    assert!(poll_once(|cx| one.poll_read(cx, &mut buf, &mut RecordMarks::ignored())).await.is_pending());
    assert!(poll_once(|cx| one.poll_readable(cx)).await.is_pending());
    for round in 1..=3 {
        let mut written = false;
        // The first poll finds nothing; the write is what wakes it.
        poll_fn(|cx| {
            let readable = one.poll_readable(cx);
            if !written {
                assert!(readable.is_pending(), "round {round}: nothing was sent yet");
                let n =
                    ready!(other.poll_write(cx, &[IoSlice::new(b"news")])).expect("the pair is connected");
                assert_eq!(n, 4);
                written = true;
            }
            let _ = other.poll_flush(cx);
            readable
        })
        .await
        .unwrap();
        // Nothing was taken by asking.
        readable(one.as_mut()).await.unwrap();
        assert_eq!(read_full(one.as_mut(), &mut buf[..4]).await.unwrap(), 4);
        assert_eq!(&buf[..4], b"news");
        assert!(poll_once(|cx| one.poll_read(cx, &mut buf, &mut RecordMarks::ignored())).await.is_pending());
    }
    let mut ended = false;
    poll_fn(|cx| {
        let readable = one.poll_readable(cx);
        if !ended && let Poll::Ready(result) = other.poll_send_eof(cx) {
            result.expect("the pair is connected");
            ended = true;
        }
        readable
    })
    .await
    .unwrap();
    assert_eq!(read(one.as_mut(), &mut buf).await.unwrap(), 0, "the end is worth a read too");
}

async fn what_was_flushed_needs_no_more_help(mut one: BoxStream, mut other: BoxStream) {
    write_all(one.as_mut(), b"on its way").await.unwrap();
    flush(one.as_mut()).await.unwrap();
    // Nobody touches `one` any more.
    let mut buf = [0; 10];
    assert_eq!(read_full(other.as_mut(), &mut buf).await.unwrap(), 10);
    assert_eq!(&buf, b"on its way");
    flush(one.as_mut()).await.unwrap();
}

async fn a_dropped_stream_is_closed(mut one: BoxStream, mut other: BoxStream) {
    write_all(one.as_mut(), b"last words").await.unwrap();
    flush(one.as_mut()).await.unwrap();
    drop(one);
    let mut buf = [0; 10];
    assert_eq!(read_full(other.as_mut(), &mut buf).await.unwrap(), 10);
    assert_eq!(&buf, b"last words");
    if let Err(error) = read_to_end(other.as_mut()).await {
        // A transport that tells a drop from an end.
        assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{error}");
    }
    let error = write_until_it_fails(other.as_mut()).await;
    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{error}");
}

async fn writing_nothing_is_nothing(mut one: BoxStream, mut other: BoxStream) {
    assert_eq!(poll_fn(|cx| one.poll_write(cx, &[])).await.unwrap(), 0);
    let empty = [IoSlice::new(b""), IoSlice::new(b"")];
    assert_eq!(poll_fn(|cx| one.poll_write(cx, &empty)).await.unwrap(), 0);
    let mixed = [IoSlice::new(b""), IoSlice::new(b"x"), IoSlice::new(b"")];
    assert_eq!(poll_fn(|cx| one.poll_write(cx, &mixed)).await.unwrap(), 1);
    send_eof(one.as_mut()).await.unwrap();
    let mut buf = [0; 4];
    assert_eq!(read_full(other.as_mut(), &mut buf).await.unwrap(), 1);
    assert_eq!(buf[0], b'x');
}

async fn idle_memory_comes_back_when_needed(mut one: BoxStream, mut other: BoxStream) {
    let mut buf = [0; 5];
    for _ in 0..3 {
        for stream in [&mut one, &mut other] {
            stream.release_idle();
        }
        write_all(one.as_mut(), b"after").await.unwrap();
        flush(one.as_mut()).await.unwrap();
        // Bytes wait: they are not idle.
        other.release_idle();
        one.release_idle();
        assert_eq!(read_full(other.as_mut(), &mut buf).await.unwrap(), 5);
        assert_eq!(&buf, b"after");
    }
}

/// One poll, in the context of this task.
async fn poll_once<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    poll_fn(|cx| Poll::Ready(poll(cx))).await
}

/// Reads on until the end or an error.
async fn read_to_end(stream: &mut dyn Stream) -> Result<()> {
    let mut buf = [0; 4096];
    while read(stream, &mut buf).await? > 0 {}
    Ok(())
}

/// Writes until the peer's closing has come round.
async fn write_until_it_fails(stream: &mut dyn Stream) -> Error {
    loop {
        if let Err(error) = write_all(stream, b"anybody there?").await {
            return error;
        }
        if let Err(error) = flush(stream).await {
            return error;
        }
        tokio::task::yield_now().await;
    }
}

/// One end of a transfer: sends a pattern in random pieces and checks the peer's.
struct Party {
    stream: BoxStream,
    random: u64,
    /// Seed of the pattern and how much of it is to go, and how much has gone.
    send: (u8, usize),
    sent: usize,
    expect: (u8, usize),
    received: usize,
    eof_sent: bool,
    eof_read: bool,
    buf: Vec<u8>,
}

impl Party {
    fn new(stream: BoxStream, seed: u8, len: usize) -> Self {
        Self {
            stream,
            random: 0x9e37_79b9_7f4a_7c15 ^ u64::from(seed),
            send: (seed, len),
            sent: 0,
            expect: (0, 0),
            received: 0,
            eof_sent: false,
            eof_read: false,
            buf: vec![0; 128 * 1024],
        }
    }

    /// Xorshift: the same pieces in every run.
    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % limit as u64) as usize
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.eof_sent {
            if self.sent == self.send.1 {
                let Poll::Ready(ended) = self.stream.poll_send_eof(cx) else { break };
                ended.expect("the peer reads");
                self.eof_sent = true;
                break;
            }
            let len = (1 + self.below(40_000)).min(self.send.1 - self.sent);
            let piece = pattern(self.send.0, self.sent, len);
            let slices: Vec<IoSlice<'_>> = self.cut(&piece).into_iter().map(IoSlice::new).collect();
            let Poll::Ready(n) = self.stream.poll_write(cx, &slices) else {
                // A stream over a stream moves its own queue on.
                let _ = self.stream.poll_flush(cx);
                break;
            };
            let n = n.expect("the peer reads");
            assert!((1..=len).contains(&n));
            self.sent += n;
        }
        while !self.eof_read {
            let len = 1 + self.below(self.buf.len());
            let read = self.stream.poll_read(cx, &mut self.buf[..len], &mut RecordMarks::ignored());
            let Poll::Ready(n) = read else { break };
            let n = n.expect("the peer sends");
            assert!(n <= len);
            assert!(
                self.buf[..n] == pattern(self.expect.0, self.received, n),
                "wrong bytes at {}",
                self.received
            );
            self.received += n;
            self.eof_read = n == 0;
        }
        if self.eof_sent && self.eof_read {
            assert_eq!(self.received, self.expect.1);
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// Up to 64 slices, some of them empty.
    fn cut<'a>(&mut self, mut piece: &'a [u8]) -> Vec<&'a [u8]> {
        let mut slices = Vec::new();
        while !piece.is_empty() && slices.len() < 63 {
            let (slice, rest) = piece.split_at(self.below(1500).min(piece.len()));
            slices.push(slice);
            piece = rest;
        }
        slices.push(piece);
        slices
    }
}

/// Bytes that differ at each place and by direction.
fn pattern(seed: u8, from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8 ^ seed).collect()
}
