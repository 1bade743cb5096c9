//! One direction, whatever it carries: when it reads, when it writes, when it ends. What is read and
//! how it is written is [`super::stream`]'s and [`super::packet`]'s.

use std::task::{Context, Poll};

use super::turns;
use super::{FlowOptions, PumpMode};
use crate::error::{Error, ErrorKind, Phase, Result};

/// Whether an error means only that a peer is gone before it heard the end of our direction, which is
/// no loss where it had ended its own, or where we end anyway, unless payload `has_lost` its way.
fn says_goodbye_to_nobody(peer_ended: bool, mode: PumpMode, error: &Error, has_lost: bool) -> bool {
    (peer_ended || mode != PumpMode::Run) && error.kind() == ErrorKind::ConnectionLost && !has_lost
}

/// While a stop is under way a peer that is gone is one that ended: both sides often stop at once.
fn ended_by_stop(mode: PumpMode, received: Result<Poll<bool>>) -> Result<Poll<bool>> {
    match received {
        Err(error)
            if matches!(mode, PumpMode::Settle | PumpMode::Drain)
                && error.kind() == ErrorKind::ConnectionLost =>
        {
            Ok(Poll::Ready(false))
        }
        received => received,
    }
}

/// Payload in a direction that carries none.
fn refused() -> Error {
    let message = "the peer sent application data over a connection that only encrypts";
    Error::new(ErrorKind::RemoteProtocol, message).with_phase(Phase::Transfer)
}

/// What both kinds of flow tell their pump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowState {
    /// It goes on.
    Open,
    /// Its source ended and all of it was delivered.
    Ended,
}

/// Where a direction is, and what its owner has said about it.
pub(super) struct FlowControl {
    phase: FlowPhase,
    enabled: bool,
    refuses: bool,
    forward_eof: bool,
    paused: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FlowPhase {
    Reading,
    /// The source ended; what waits is still to be written.
    SourceEnded,
    /// The destination was told.
    Ended,
    /// The destination went before the source ended: over, unless another one comes.
    Unwanted,
}

impl FlowControl {
    pub(super) fn new(options: &FlowOptions) -> Self {
        Self {
            phase: FlowPhase::Reading,
            enabled: options.enabled,
            refuses: options.refuses,
            forward_eof: options.forward_eof,
            paused: false,
        }
    }

    /// The destination is another one, which has not heard of an end yet, and may want what the old one did not.
    pub(super) fn destination_replaced(&mut self) {
        self.phase = match self.phase {
            FlowPhase::Ended if self.forward_eof => FlowPhase::SourceEnded,
            FlowPhase::Unwanted => FlowPhase::Reading,
            phase => phase,
        };
    }
}

/// An end of a flow, as far as ends are concerned.
pub(super) trait FlowEnd {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;
    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>>;

    /// Whether payload that it took never left.
    fn has_lost(&mut self) -> bool;

    /// Whether anybody is there for what is written.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// One direction between two ends of a kind.
pub(super) trait Flow {
    /// A stream or a packet port.
    type End: FlowEnd + ?Sized;

    fn control(&mut self) -> &mut FlowControl;

    /// Rounds of reading and writing that make a turn.
    fn rounds(&self) -> usize {
        turns::ROUNDS
    }

    /// A turn is over, and there is more to do.
    fn turn_over(&self) {}

    /// Whether something that was read waits for the destination.
    fn has_waiting(&self) -> bool;

    /// Writes what waits; `false` when the destination takes no more now.
    fn write(&mut self, cx: &mut Context<'_>, destination: &mut Self::End, active: &mut bool)
    -> Result<bool>;

    /// Reads what is there, `false` at the end; takes memory only when something is.
    fn read(&mut self, cx: &mut Context<'_>, source: &mut Self::End) -> Result<Poll<bool>>;

    /// Throws away what waits.
    fn forget(&mut self);

    /// Gives memory back: nothing waits.
    fn release(&mut self);

    /// Moves what can be moved; never waits for more than one of the two ends at a time.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Self::End,
        destination: &mut Self::End,
        mode: PumpMode,
        peer_ended: bool,
        active: &mut bool,
    ) -> Result<FlowState> {
        if self.ended() {
            return Ok(FlowState::Ended);
        }
        for _ in 0..self.rounds() {
            if !destination.is_wanted() {
                // Whoever was to have it has gone, and meant to: that is an end of this direction alone.
                self.forget();
                let source_ended = self.source_ended();
                self.end();
                if !source_ended {
                    self.control().phase = FlowPhase::Unwanted;
                }
                return Ok(FlowState::Ended);
            }
            if self.has_waiting() {
                if !self.write(cx, destination, active)? {
                    return Ok(FlowState::Open);
                }
                continue;
            }
            // Sealed records and answers to the peer may wait below even when no payload does.
            let flushed = match destination.poll_flush(cx) {
                Poll::Ready(Err(error))
                    if says_goodbye_to_nobody(peer_ended, mode, &error, destination.has_lost()) =>
                {
                    return Ok(self.end());
                }
                flushed => flushed.map_err(|e| e.with_phase(Phase::Transfer))?.is_ready(),
            };
            if self.control().phase == FlowPhase::SourceEnded {
                if self.control().forward_eof {
                    match destination.poll_send_eof(cx) {
                        Poll::Pending => return Ok(FlowState::Open),
                        Poll::Ready(Err(error))
                            if !says_goodbye_to_nobody(peer_ended, mode, &error, destination.has_lost()) =>
                        {
                            return Err(error.with_phase(Phase::Close));
                        }
                        Poll::Ready(_) => {}
                    }
                }
                return Ok(self.end());
            }
            if !self.control().enabled {
                return Ok(if flushed { FlowState::Ended } else { FlowState::Open });
            }
            if self.control().paused && mode == PumpMode::Run {
                self.release();
                return Ok(FlowState::Open);
            }
            match ended_by_stop(mode, self.read(cx, source))? {
                Poll::Ready(true) if self.control().refuses => return Err(refused()),
                Poll::Ready(true) => *active = true,
                Poll::Ready(false) => self.control().phase = FlowPhase::SourceEnded,
                Poll::Pending => {
                    self.release();
                    if mode != PumpMode::Drain {
                        return Ok(FlowState::Open);
                    }
                    // What waited was read: a drain reads no further.
                    self.control().phase = FlowPhase::SourceEnded;
                }
            }
        }
        cx.waker().wake_by_ref();
        self.turn_over();
        Ok(FlowState::Open)
    }

    fn end(&mut self) -> FlowState {
        self.control().phase = FlowPhase::Ended;
        self.release();
        FlowState::Ended
    }

    fn ended(&mut self) -> bool {
        matches!(self.control().phase, FlowPhase::Ended | FlowPhase::Unwanted)
    }

    /// Whether the source has ended, or nobody wants more of it; what it sent may still be on its way.
    fn source_ended(&mut self) -> bool {
        self.control().phase != FlowPhase::Reading
    }

    fn set_paused(&mut self, paused: bool) {
        self.control().paused = paused;
    }

    /// The sink that we read from is another one now.
    fn source_replaced(&mut self) {
        if self.control().phase == FlowPhase::SourceEnded {
            self.control().phase = FlowPhase::Reading;
        }
    }

    /// The sink that we write to is another one now: what waits goes there.
    fn destination_replaced(&mut self);
}
