//! One direction: a bounded ring of bytes with a reader and a writer, which may be on two threads.

use std::io::IoSlice;
use std::sync::{Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use crate::buffer::{BLOCK, give_block, take_block};
use crate::error::{Error, Result};

pub(super) struct Channel {
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// `capacity` bytes, or none while nothing waits.
    ring: Vec<u8>,
    start: usize,
    len: usize,
    /// How the writer ended it, if it did.
    end: Option<End>,
    /// Why the reader takes no more.
    stopped: Option<Error>,
    /// The reader takes no more and says nothing of it: what still comes is thrown away.
    abandoned: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

enum End {
    Orderly,
    /// What waits is still read; then comes the error.
    Failed(Error),
    /// What waits is lost.
    Broken(Error),
}

impl Channel {
    pub(super) fn new(capacity: usize) -> Self {
        assert!(capacity > 0);
        Self { capacity, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Copies what waits, at most `buf.len()` bytes; 0 is the end. With an empty `buf`: ready when a
    /// read would be.
    pub(super) fn poll_peek(&self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<usize>> {
        let mut state = self.lock();
        // What was queued before a reset is lost.
        if let Some(End::Broken(why)) = &state.end {
            return Poll::Ready(Err(why.clone()));
        }
        if state.len == 0 {
            match &state.end {
                Some(End::Failed(why)) => return Poll::Ready(Err(why.clone())),
                Some(_) => return Poll::Ready(Ok(0)),
                None => {}
            }
            remember(&mut state.reader, cx);
            return Poll::Pending;
        }
        let n = buf.len().min(state.len);
        let first = n.min(self.capacity - state.start);
        buf[..first].copy_from_slice(&state.ring[state.start..][..first]);
        buf[first..n].copy_from_slice(&state.ring[..n - first]);
        Poll::Ready(Ok(n))
    }

    pub(super) fn consume(&self, n: usize) {
        let mut state = self.lock();
        // A stop or a reset in between has emptied it.
        let n = n.min(state.len);
        state.start = (state.start + n) % self.capacity;
        state.len -= n;
        // A writer that found no room comes back for half of it: a reader that takes a few bytes at a time
        // would otherwise wake it each time.
        if n > 0 && state.len <= self.capacity / 2 {
            wake(state, |state| &mut state.writer);
        }
    }

    pub(super) fn poll_push(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        let mut state = self.lock();
        if let Some(why) = &state.stopped {
            return Poll::Ready(Err(why.clone()));
        }
        if state.abandoned {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        if slices.iter().all(|slice| slice.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        if state.len == self.capacity {
            remember(&mut state.writer, cx);
            return Poll::Pending;
        }
        if state.ring.is_empty() {
            state.ring = if self.capacity == BLOCK { take_block() } else { vec![0; self.capacity] };
            state.start = 0;
        }
        let mut pushed = 0;
        for slice in slices {
            pushed += state.push(slice);
        }
        wake(state, |state| &mut state.reader);
        Poll::Ready(Ok(pushed))
    }

    /// Ready when nothing waits.
    pub(super) fn poll_taken(&self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut state = self.lock();
        if let Some(why) = &state.stopped {
            return Poll::Ready(Err(why.clone()));
        }
        if state.len == 0 {
            return Poll::Ready(Ok(()));
        }
        remember(&mut state.writer, cx);
        Poll::Pending
    }

    /// Ready when the reader takes no more.
    pub(super) fn poll_unwanted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.stopped.is_some() {
            return Poll::Ready(());
        }
        remember(&mut state.writer, cx);
        Poll::Pending
    }

    /// No more bytes follow; those that wait are still read.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.end.get_or_insert(End::Orderly);
        wake(state, |state| &mut state.reader);
    }

    /// As [`end`](Self::end), but what follows the bytes that wait is an error.
    pub(super) fn fail(&self, why: Error) {
        let mut state = self.lock();
        state.end.get_or_insert(End::Failed(why));
        wake(state, |state| &mut state.reader);
    }

    /// The reader takes no more, which is no error for the writer: what it writes is thrown away.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        state.abandoned = true;
        state.clear();
        wake(state, |state| &mut state.writer);
    }

    /// Whether the reader still wants what is written.
    pub(super) fn is_wanted(&self) -> bool {
        !self.lock().abandoned
    }

    /// Bytes that a read would give now.
    pub(super) fn available(&self) -> usize {
        self.lock().len
    }

    pub(super) fn break_off(&self, why: Error) {
        let mut state = self.lock();
        if !matches!(state.end, Some(End::Broken(_))) {
            state.end = Some(End::Broken(why));
        }
        state.clear();
        wake(state, |state| &mut state.reader);
    }

    pub(super) fn stop(&self, why: Error) {
        let mut state = self.lock();
        state.stopped.get_or_insert(why);
        state.clear();
        wake(state, |state| &mut state.writer);
    }

    pub(super) fn release_idle(&self) {
        let mut state = self.lock();
        if state.len == 0 {
            state.clear();
        }
    }
}

impl State {
    fn push(&mut self, bytes: &[u8]) -> usize {
        let capacity = self.ring.len();
        let n = bytes.len().min(capacity - self.len);
        let from = (self.start + self.len) % capacity;
        let first = n.min(capacity - from);
        self.ring[from..][..first].copy_from_slice(&bytes[..first]);
        self.ring[..n - first].copy_from_slice(&bytes[first..n]);
        self.len += n;
        n
    }

    fn clear(&mut self) {
        self.start = 0;
        self.len = 0;
        give_block(std::mem::take(&mut self.ring));
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.lock().clear();
    }
}

fn remember(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

/// Wakes after the lock is gone: a waker may be a call-back that calls in again.
fn wake(mut state: MutexGuard<'_, State>, who: impl FnOnce(&mut State) -> &mut Option<Waker>) {
    let waker = who(&mut state).take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}
