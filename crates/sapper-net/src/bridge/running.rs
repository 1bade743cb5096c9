//! What belongs to a bridge's running state only: its clocks, an orderly stop, a sink that is being
//! opened.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::control::{Reply, Value};
use super::state::{Shared, StopRequest};
use super::task::End;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::pump::{IdleClock, Pump, PumpMode, Sink};

/// A drain has heard of all that waits when nothing came for this long.
const SETTLE: Duration = Duration::from_millis(2);
/// A bridge that ends of itself waits so long for its last bytes to be confirmed.
const CONFIRMED: Duration = Duration::from_secs(2);

/// A sink that is being opened, and who waits for it: one that is dropped before answers too.
pub(super) struct Swap {
    opening: Pin<Box<dyn Future<Output = Result<Sink>> + Send>>,
    reply: Option<Reply>,
}

impl Swap {
    pub(super) fn new(opening: impl Future<Output = Result<Sink>> + Send + 'static, reply: Reply) -> Self {
        Self { opening: Box::pin(opening), reply: Some(reply) }
    }

    fn answer(mut self, outcome: Result<()>) {
        if let Some(reply) = self.reply.take() {
            reply.send(outcome.map(|()| Value::Unit));
        }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            let text = "the bridge ended before another sink was open";
            reply.send(Err(Error::new(ErrorKind::Closed, text)));
        }
    }
}

/// What belongs to the running state only: clocks, and a sink that is being opened.
pub(super) struct Running {
    pub(super) clock: IdleClock,
    drain: Option<Drain>,
    pub(super) swap: Option<Swap>,
}

/// An orderly stop under way.
struct Drain {
    deadline: Pin<Box<Sleep>>,
    /// Runs until nothing came for [`SETTLE`]; `None` from then on.
    settling: Option<Pin<Box<Sleep>>>,
}

impl Running {
    pub(super) fn new(idle: Option<Duration>) -> Self {
        Self { clock: IdleClock::new(idle), drain: None, swap: None }
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

    /// Gives buffers back after a silence and ends a bridge that was silent for too long.
    pub(super) fn poll_clock(&mut self, cx: &mut Context<'_>, pump: &mut Pump) -> Poll<Result<()>> {
        let stays = self.drain.is_some() || self.swap.is_some();
        self.clock.poll(cx, pump, stays)
    }

    pub(super) fn poll_swap(&mut self, cx: &mut Context<'_>, pump: &mut Pump) {
        let Some(swap) = &mut self.swap else { return };
        if let Poll::Ready(sink) = swap.opening.as_mut().poll(cx)
            && let Some(swap) = self.swap.take()
        {
            swap.answer(sink.and_then(|sink| pump.swap_sink(sink)));
        }
    }
}

/// The time of a drain is over: nothing is told where nothing waits.
pub(super) fn end_of_drain(cx: &mut Context<'_>, pump: &mut Pump) -> std::result::Result<(), End> {
    if let Poll::Ready(outcome) = pump.poll(cx, PumpMode::Drain) {
        return outcome.map_err(End::Failed);
    }
    let lost = match pump.waiting() {
        (0, _) => String::new(),
        (count, what) => format!(": at least {count} {what} are lost"),
    };
    let text = format!("the time of the drain was too short for what waited{lost}");
    Err(End::Late(Error::new(ErrorKind::CloseDeadline, text).with_phase(Phase::Close)))
}

/// Waits until the peer's system has what was sent, at most until the stop's deadline, or for [`CONFIRMED`]: a TCP
/// connection that is closed with bytes to read throws away what it has still to send.
pub(super) async fn linger(pump: &mut Pump, shared: &Shared) {
    let of_itself = std::time::Instant::now() + CONFIRMED;
    while pump.unconfirmed() > 0 {
        let until = match shared.stop_request() {
            Some(request) if request.drain => request.at,
            Some(_) => return,
            None => of_itself,
        };
        if std::time::Instant::now() >= until {
            return;
        }
        sleep(SETTLE).await;
    }
}
