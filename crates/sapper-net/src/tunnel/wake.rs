//! Who of many became ready: one task owns thousands of streams and looks only at those that woke it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

/// What a waker stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A stream can be read.
    Read(u32),
    /// A stream can be written.
    Write(u32),
    /// A dial, a handshake or a goodbye can go on.
    Job(u32),
    /// A visitor waits at one of the public ports.
    Accept(u16),
}

/// Tokens that woke. At most one of each waker: its size is bounded by the number of wakers.
#[derive(Default)]
pub(super) struct Awake {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tokens: Vec<Arc<One>>,
    task: Option<Waker>,
    closed: bool,
}

struct One {
    awake: Arc<Awake>,
    token: Token,
    queued: AtomicBool,
}

impl Awake {
    /// A waker that adds `token`.
    pub(super) fn waker(self: &Arc<Self>, token: Token) -> Waker {
        Waker::from(Arc::new(One { awake: Arc::clone(self), token, queued: false.into() }))
    }

    /// The task that is to be woken.
    pub(super) fn register(&self, task: &Waker) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.task.as_ref().is_some_and(|known| known.will_wake(task)) {
            state.task = Some(task.clone());
        }
    }

    /// Nobody listens any more: tokens would only keep each other alive.
    pub(super) fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = State { closed: true, ..State::default() };
    }

    /// Moves the tokens to `out`.
    pub(super) fn take(&self, out: &mut Vec<Token>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for one in state.tokens.drain(..) {
            // First: who wakes from here on is told again.
            one.queued.store(false, Ordering::Release);
            out.push(one.token);
        }
    }
}

impl Wake for One {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut state = self.awake.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return;
        }
        state.tokens.push(Arc::clone(self));
        let task = state.task.clone();
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_waker_is_told_once_until_it_is_taken() {
        let awake = Arc::new(Awake::default());
        let (one, two) = (awake.waker(Token::Read(1)), awake.waker(Token::Write(1)));
        for _ in 0..3 {
            one.wake_by_ref();
        }
        two.wake();
        let mut tokens = Vec::new();
        awake.take(&mut tokens);
        assert_eq!(tokens, [Token::Read(1), Token::Write(1)]);
        one.wake_by_ref();
        awake.take(&mut tokens);
        assert_eq!(tokens.len(), 3);
    }
}
