//! The clock of a pump: a busy one asks for another thread now and then; of one that nobody feeds the
//! buffers go back after a moment, and it ends after a while.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::Pump;
use crate::error::{Error, ErrorKind, Phase, Result, seconds};
use crate::runtime::Share;

/// A connection that was silent this long gives its buffers back.
const IDLE_SWEEP: Duration = Duration::from_millis(100);

/// Looks at a pump's activity. Polled by the pump's owner, after the pump.
pub struct IdleClock {
    clock: Pin<Box<Sleep>>,
    /// Whether the clock runs: it rests while a pump without an idle deadline is silent.
    armed: bool,
    released: bool,
    last_activity: Instant,
    idle: Option<Duration>,
    share: Share,
    /// The thread that the pump should go on on.
    move_to: Option<usize>,
}

impl IdleClock {
    /// Begins now. After `idle` without a byte the pump is over.
    pub fn new(idle: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            clock: Box::pin(sleep_until(now + IDLE_SWEEP)),
            armed: true,
            released: false,
            last_activity: now,
            idle,
            share: Share::new(),
            move_to: None,
        }
    }

    /// The thread that the pump would do better on; told once.
    pub fn take_move(&mut self) -> Option<usize> {
        self.move_to.take()
    }

    /// It is there: the clock is that thread's.
    pub fn moved(&mut self) {
        self.clock = Box::pin(sleep_until(Instant::now() + IDLE_SWEEP));
        self.armed = true;
        self.share = Share::new();
    }

    /// Gives buffers back after a silence; ready, with an error, when the silence was too long. A pump
    /// that `stays` is not asked to move.
    pub fn poll(&mut self, cx: &mut Context<'_>, pump: &mut Pump, stays: bool) -> Poll<Result<()>> {
        if !self.armed {
            if !pump.is_active() {
                return Poll::Pending;
            }
            self.armed = true;
            self.clock.as_mut().reset(Instant::now() + IDLE_SWEEP);
        }
        while self.clock.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if pump.take_activity() {
                self.last_activity = now;
                self.released = false;
                if !stays && pump.is_movable() {
                    self.move_to = self.share.better_thread();
                }
                self.clock.as_mut().reset(now + IDLE_SWEEP);
                continue;
            }
            if !self.released {
                pump.release_idle();
                self.released = true;
            }
            let Some(idle) = self.idle else {
                self.armed = false;
                return Poll::Pending;
            };
            let end = self.last_activity + idle;
            if now >= end {
                let text = format!("nothing moved for {}", seconds(idle));
                return Poll::Ready(Err(
                    Error::new(ErrorKind::IdleDeadline, text).with_phase(Phase::Transfer)
                ));
            }
            // Looks in between: activity is noted by a flag, not by its time.
            self.clock.as_mut().reset(end.min(now + idle / 4 + IDLE_SWEEP));
        }
        Poll::Pending
    }
}
