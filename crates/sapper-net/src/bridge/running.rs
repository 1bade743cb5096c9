//! What belongs to a bridge's running state only: its clocks, an orderly stop, a sink that is being
//! opened.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::control::{Reply, Value};
use super::state::StopRequest;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::pump::{Pump, PumpMode, Sink};
use crate::runtime::Share;

/// A connection that was silent this long gives its buffers back.
const IDLE_SWEEP: Duration = Duration::from_millis(100);

/// A drain has heard of all that waits when nothing came for this long.
const SETTLE: Duration = Duration::from_millis(2);

/// A sink that is being opened.
pub(super) type Opening = Pin<Box<dyn Future<Output = Result<Sink>> + Send>>;

/// What belongs to the running state only: clocks, and a sink that is being opened.
pub(super) struct Running {
    clock: Pin<Box<Sleep>>,
    /// Whether the clock runs: it rests while a bridge without an idle deadline is silent.
    armed: bool,
    released: bool,
    last_activity: Instant,
    idle: Option<Duration>,
    drain: Option<Drain>,
    share: Share,
    /// The thread that it should go on on.
    move_to: Option<usize>,
    pub(super) swap: Option<(Opening, Reply)>,
}

/// An orderly stop under way.
struct Drain {
    deadline: Pin<Box<Sleep>>,
    /// Runs until nothing came for [`SETTLE`]; `None` from then on.
    settling: Option<Pin<Box<Sleep>>>,
}

impl Running {
    pub(super) fn new(idle: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            clock: Box::pin(sleep_until(now + IDLE_SWEEP)),
            armed: true,
            released: false,
            last_activity: now,
            idle,
            drain: None,
            share: Share::new(),
            move_to: None,
            swap: None,
        }
    }

    /// How a requested stop is carried out; `None` when its time is over, which is at once where
    /// nothing is drained.
    pub(super) fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        request: StopRequest,
        pump: &mut Pump,
    ) -> Option<PumpMode> {
        if !request.drain {
            return None;
        }
        let drain = self.drain.get_or_insert_with(|| {
            pump.take_activity();
            Drain {
                deadline: Box::pin(sleep_until(request.at.into())),
                settling: Some(Box::pin(sleep_until(Instant::now() + SETTLE))),
            }
        });
        if drain.deadline.deadline() != request.at.into() {
            drain.deadline.as_mut().reset(request.at.into());
        }
        if drain.deadline.as_mut().poll(cx).is_ready() {
            return None;
        }
        while let Some(clock) = &mut drain.settling {
            if clock.as_mut().poll(cx).is_pending() {
                return Some(PumpMode::Settle);
            }
            if pump.take_activity() {
                clock.as_mut().reset(Instant::now() + SETTLE);
            } else {
                drain.settling = None;
            }
        }
        Some(PumpMode::Drain)
    }

    /// The thread that the bridge would do better on; told once.
    pub(super) fn take_move(&mut self) -> Option<usize> {
        self.move_to.take()
    }

    /// It is there: the clock is that thread's.
    pub(super) fn moved(&mut self) {
        self.clock = Box::pin(sleep_until(Instant::now() + IDLE_SWEEP));
        self.armed = true;
        self.share = Share::new();
    }

    pub(super) fn poll_swap(&mut self, cx: &mut Context<'_>, pump: &mut Pump) {
        let Some((opening, _)) = &mut self.swap else { return };
        if let Poll::Ready(sink) = opening.as_mut().poll(cx)
            && let Some((_, reply)) = self.swap.take()
        {
            reply.send(sink.and_then(|sink| pump.swap_sink(sink)).map(|()| Value::Unit));
        }
    }

    /// Gives buffers back after a silence and ends a bridge that was silent for too long.
    pub(super) fn poll_clock(&mut self, cx: &mut Context<'_>, pump: &mut Pump) -> Poll<Result<()>> {
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
                if self.drain.is_none() && self.swap.is_none() && pump.is_movable() {
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
                let text = format!("nothing moved for {:.1} s", idle.as_secs_f64());
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

/// Waits until the peer's system has what was sent, at most until the stop's deadline: a TCP connection
/// that is closed with bytes to read throws away what it has still to send.
pub(super) async fn linger(pump: &mut Pump, request: StopRequest) {
    while request.drain && pump.unconfirmed() > 0 && std::time::Instant::now() < request.at {
        sleep(SETTLE).await;
    }
}
