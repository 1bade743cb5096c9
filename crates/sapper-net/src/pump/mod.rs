//! The pump: moves what one endpoint receives into the other, both ways, in one task.
//!
//! There is no second pump. Two [`Stream`]s are joined by [`stream::StreamFlow`]s, two
//! [`PacketPort`]s by [`packet::PacketFlow`]s; a flow is one direction and owns nothing but its
//! buffer, so the directions share no lock. A pump is polled, it has no task of its own: its owner
//! (a bridge, a proxy connection, a tunnel stream) decides about deadlines and ends.

mod flow;
mod idle;
mod packet;
mod stream;
#[cfg(test)]
mod tests;
mod turns;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use flow::{Flow, FlowState};
pub use idle::IdleClock;
use packet::PacketFlow;
use stream::StreamFlow;
use tokio::time::{Sleep, sleep};
pub use turns::Turns;

use crate::bridge::FlowSnapshot;
use crate::error::{Direction, Error, ErrorKind, Result};
use crate::port::BoxPort;
use crate::port::tap::Tap;
use crate::stats::{Counter, Drops, LatencyHistogram};
use crate::stream::BoxStream;

/// How long a peer that is gone may still be heard: what it said before is in the system already.
const LAST_WORDS: Duration = Duration::from_millis(50);
/// The same where the sink has to take some of it before the rest can be read. No longer: whoever only writes hears
/// that the connection is gone when this is over.
const LAST_WORDS_OF_SLOW_SINKS: Duration = Duration::from_secs(2);

/// Live counters of one direction.
#[derive(Debug, Default)]
pub struct FlowStats {
    /// Payload bytes delivered.
    pub bytes: Counter,
    /// Packets delivered.
    pub packets: Counter,
    /// Nanoseconds in which the destination took nothing while something waited.
    pub backpressure: Counter,
    /// Time from receive to send.
    pub latency: LatencyHistogram,
    /// Packets that never reached the destination.
    pub drops: Drops,
    /// When the destination began to refuse, in nanoseconds of the pump's clock; 0 when it takes.
    blocked_since: AtomicU64,
}

impl FlowStats {
    /// Counters without latencies, which take 2 KB of each connection that moved anything.
    pub fn without_latency() -> Self {
        Self { latency: LatencyHistogram::off(), ..Self::default() }
    }

    /// Plain numbers.
    pub fn snapshot(&self) -> FlowSnapshot {
        let blocked = match self.blocked_since.load(Relaxed) {
            0 => 0,
            since => now_nanos().saturating_sub(since),
        };
        FlowSnapshot {
            bytes: self.bytes.get(),
            packets: self.packets.get(),
            backpressure: Duration::from_nanos(self.backpressure.get() + blocked),
            latency_p50: self.latency.quantile(0.5).unwrap_or_default(),
            latency_p99: self.latency.quantile(0.99).unwrap_or_default(),
            latency_max: self.latency.largest(),
            latency_counts: self.latency.coarse_counts(),
            latency_sum: self.latency.sum(),
            drops: self
                .drops
                .iter()
                .filter(|(_, n)| *n > 0)
                .map(|(reason, n)| (reason.as_str(), n))
                .collect(),
        }
    }

    fn blocked(&self) {
        if self.blocked_since.load(Relaxed) == 0 {
            self.blocked_since.store(now_nanos().max(1), Relaxed);
        }
    }

    fn flowing(&self) {
        let since = self.blocked_since.load(Relaxed);
        if since != 0 {
            self.backpressure.add(now_nanos().saturating_sub(since));
            self.blocked_since.store(0, Relaxed);
        }
    }
}

/// Nanoseconds since the first call in this process.
fn now_nanos() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// The two ends of a pump, of one kind. The first is the network's, the second the sink's.
pub enum Ends {
    /// Ordered bytes.
    Streams(BoxStream, BoxStream),
    /// Whole packets.
    Ports(BoxPort, BoxPort),
}

/// Where a pump is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PumpMode {
    /// As long as there is something to move.
    Run,
    /// As [`Run`](Self::Run), without regard to pauses: an event loop tells a moment later what waits
    /// in the system, so a drain settles before it ends.
    Settle,
    /// As [`Settle`](Self::Settle), of a network that is broken: only an end that the peer has said is one.
    LastWords,
    /// A direction whose source has nothing now ends when all of it is delivered.
    Drain,
}

/// Two ends and the two flows between them.
pub struct Pump {
    ends: Ends,
    flows: Flows,
    /// Which of encapsulating and decapsulating the pump goes on for.
    keeps_alive: (bool, bool),
    /// Whether anything moved since [`take_activity`](Self::take_activity).
    active: bool,
    /// Why a write to the network failed, while the peer may still say more of it.
    lost: Option<Box<Lost>>,
}

/// A network that is broken, and still heard.
struct Lost {
    error: Error,
    since: tokio::time::Instant,
    until: Pin<Box<Sleep>>,
}

enum Flows {
    Streams { encapsulate: StreamFlow, decapsulate: StreamFlow },
    Ports { encapsulate: PacketFlow, decapsulate: PacketFlow },
}

/// How one direction of a pump begins.
pub struct FlowOptions {
    /// Its counters.
    pub stats: Arc<FlowStats>,
    /// Payload that was received already.
    pub initial: Vec<u8>,
    /// Whether it runs at all (a one-way bridge leaves one out).
    pub enabled: bool,
    /// Whether it is watched for its end only: payload that comes is an error.
    pub refuses: bool,
    /// Whether its end is passed on to the destination.
    pub forward_eof: bool,
    /// Whether the pump goes on for it alone: not so where it only watches for alerts.
    pub keeps_alive: bool,
    /// How much it moves before others have their turn: short turns are for streams.
    pub turns: Turns,
}

impl FlowOptions {
    /// A direction that runs and begins with nothing.
    pub fn new(stats: Arc<FlowStats>) -> Self {
        Self {
            stats,
            initial: Vec::new(),
            enabled: true,
            refuses: false,
            forward_eof: true,
            keeps_alive: true,
            turns: Turns::Long,
        }
    }
}

impl Pump {
    /// A pump that moves nothing yet. Initial payload is for streams: a framed port takes its own.
    pub fn new(ends: Ends, encapsulate: FlowOptions, decapsulate: FlowOptions) -> Self {
        let keeps_alive = (encapsulate.keeps_alive, decapsulate.keeps_alive);
        let flows = match ends {
            Ends::Streams(..) => Flows::Streams {
                encapsulate: StreamFlow::new(encapsulate),
                decapsulate: StreamFlow::new(decapsulate),
            },
            Ends::Ports(..) => Flows::Ports {
                encapsulate: PacketFlow::new(Direction::Encapsulate, encapsulate),
                decapsulate: PacketFlow::new(Direction::Decapsulate, decapsulate),
            },
        };
        Self { ends, flows, keeps_alive, active: false, lost: None }
    }

    /// Moves what can be moved. Ready when both directions have ended, or with the error that ended
    /// one. Errors say their direction and whose end broke.
    pub fn poll(&mut self, cx: &mut Context<'_>, mode: PumpMode) -> Poll<Result<()>> {
        if self.lost.is_some() {
            return self.poll_last_words(cx);
        }
        // Reading comes first: a peer that said goodbye and left is no lost connection for a write that
        // comes too late.
        let (back, peer_ended) = self.decapsulate(cx, mode);
        let out = self.encapsulate(cx, mode, peer_ended);
        // A packet port cannot be half-closed in a way that its peer could use: when one direction ends,
        // what waits in the other is delivered and the pump ends.
        if let Flows::Ports { encapsulate, decapsulate } = &mut self.flows
            && mode != PumpMode::Drain
            && (encapsulate.ended() || decapsulate.ended())
        {
            return self.poll(cx, PumpMode::Drain);
        }
        // The decapsulating side knows why a peer went away; its word comes first.
        let back = back.map_err(|error| error.with_direction(Direction::Decapsulate))?;
        let out = match out.map_err(|error| error.with_direction(Direction::Encapsulate)) {
            Err(error) if error.kind() == ErrorKind::ConnectionLost && back == FlowState::Open => {
                self.lost = Some(Box::new(Lost {
                    error,
                    since: tokio::time::Instant::now(),
                    until: Box::pin(sleep(LAST_WORDS)),
                }));
                return self.poll_last_words(cx);
            }
            out => out?,
        };
        let over = |state, keeps_alive: bool| state == FlowState::Ended || !keeps_alive;
        if over(out, self.keeps_alive.0) && over(back, self.keeps_alive.1) {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    /// A write met a connection that is gone, and the event loop may not have told yet that the peer's
    /// reason (an alert) has come: it gets a moment, also where nobody wants to read now. That the connection is
    /// gone is no news; and no end, which what it was cut off from would be for the sink. A sink that takes its time
    /// gets what has come, an orderly end behind it too.
    fn poll_last_words(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let was_active = std::mem::take(&mut self.active);
        let (back, _) = self.decapsulate(cx, PumpMode::LastWords);
        let moved = self.active;
        self.active |= was_active;
        let over = match back {
            Err(error) if error.kind() == ErrorKind::ConnectionLost => true,
            Err(error) => return Poll::Ready(Err(error.with_direction(Direction::Decapsulate))),
            Ok(state) => state == FlowState::Ended,
        };
        let waits = match &self.flows {
            Flows::Streams { decapsulate, .. } => decapsulate.has_waiting(),
            Flows::Ports { decapsulate, .. } => decapsulate.has_waiting(),
        };
        let Some(lost) = &mut self.lost else { return Poll::Pending };
        let patience = if waits || moved { LAST_WORDS_OF_SLOW_SINKS } else { LAST_WORDS };
        let until = lost.since + patience;
        if lost.until.deadline() != until {
            lost.until.as_mut().reset(until);
        }
        if over || lost.until.as_mut().poll(cx).is_ready() {
            Poll::Ready(Err(lost.error.clone()))
        } else {
            if moved {
                cx.waker().wake_by_ref(); // whether there is more the next look says
            }
            Poll::Pending
        }
    }

    /// From the network to the sink; also whether the network has ended.
    fn decapsulate(&mut self, cx: &mut Context<'_>, mode: PumpMode) -> (Result<FlowState>, bool) {
        match (&mut self.ends, &mut self.flows) {
            (Ends::Streams(network, sink), Flows::Streams { decapsulate, .. }) => {
                let (network, sink) = (network.as_mut(), sink.as_mut());
                (
                    decapsulate.poll(cx, network, sink, mode, false, &mut self.active),
                    decapsulate.source_ended(),
                )
            }
            (Ends::Ports(network, sink), Flows::Ports { decapsulate, .. }) => {
                let (network, sink) = (network.as_mut(), sink.as_mut());
                (
                    decapsulate.poll(cx, network, sink, mode, false, &mut self.active),
                    decapsulate.source_ended(),
                )
            }
            _ => unreachable!("flows are made for their ends"),
        }
    }

    /// From the sink to the network.
    fn encapsulate(&mut self, cx: &mut Context<'_>, mode: PumpMode, peer_ended: bool) -> Result<FlowState> {
        match (&mut self.ends, &mut self.flows) {
            (Ends::Streams(network, sink), Flows::Streams { encapsulate, .. }) => {
                encapsulate.poll(cx, sink.as_mut(), network.as_mut(), mode, peer_ended, &mut self.active)
            }
            (Ends::Ports(network, sink), Flows::Ports { encapsulate, .. }) => {
                encapsulate.poll(cx, sink.as_mut(), network.as_mut(), mode, peer_ended, &mut self.active)
            }
            _ => unreachable!("flows are made for their ends"),
        }
    }

    /// Whether anything moved since the last call.
    pub fn take_activity(&mut self) -> bool {
        std::mem::take(&mut self.active)
    }

    /// Whether anything moved since [`take_activity`](Self::take_activity); the note stays.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Gives pooled memory back; called when nothing moved for a moment.
    pub fn release_idle(&mut self) {
        match &mut self.ends {
            Ends::Streams(network, sink) => {
                network.release_idle();
                sink.release_idle();
            }
            Ends::Ports(network, sink) => {
                network.release_idle();
                sink.release_idle();
            }
        }
    }

    /// Stops or goes on reading for one direction. What was read is delivered.
    pub fn set_paused(&mut self, direction: Direction, paused: bool) {
        match (&mut self.flows, direction) {
            (Flows::Streams { encapsulate: flow, .. }, Direction::Encapsulate)
            | (Flows::Streams { decapsulate: flow, .. }, Direction::Decapsulate) => flow.set_paused(paused),
            (Flows::Ports { encapsulate: flow, .. }, Direction::Encapsulate)
            | (Flows::Ports { decapsulate: flow, .. }, Direction::Decapsulate) => flow.set_paused(paused),
        }
    }

    /// Puts another sink in place; what the flows hold goes to it, and what the old one did not want any more. An end of
    /// the old one that the network has heard of stays: the new one is not read then. The kinds must agree.
    pub fn swap_sink(&mut self, sink: Sink) -> Result<()> {
        match (&mut self.ends, &mut self.flows, sink) {
            (Ends::Streams(_, old), Flows::Streams { encapsulate, decapsulate }, Sink::Stream(new)) => {
                *old = new;
                encapsulate.source_replaced();
                decapsulate.destination_replaced();
                Ok(())
            }
            (Ends::Ports(_, old), Flows::Ports { encapsulate, decapsulate }, Sink::Port(new)) => {
                *old = new;
                encapsulate.source_replaced();
                decapsulate.destination_replaced();
                Ok(())
            }
            _ => Err(Error::new(
                ErrorKind::Config,
                "a stream takes the place of a stream, a packet port that of a packet port",
            )
            .with_field("sink")),
        }
    }

    /// Copies packets to a tap from now on, or no more. Only packet ports have packets.
    pub fn set_tap(&mut self, tap: Option<Tap>) -> Result<()> {
        match &mut self.flows {
            Flows::Ports { encapsulate, decapsulate } => {
                encapsulate.set_tap(tap.clone());
                decapsulate.set_tap(tap);
                Ok(())
            }
            Flows::Streams { .. } if tap.is_none() => Ok(()),
            Flows::Streams { .. } => Err(Error::config(
                "tap",
                "a tap writes packets: this bridge has no framing and carries bytes",
            )),
        }
    }

    /// Bytes on their way out of either end that the system of whoever is there has not confirmed.
    pub fn unconfirmed(&mut self) -> usize {
        match &mut self.ends {
            Ends::Streams(network, sink) => network.unconfirmed() + sink.unconfirmed(),
            Ends::Ports(network, sink) => [network, sink]
                .into_iter()
                .filter_map(|end| end.stream_mut())
                .map(|stream| stream.unconfirmed())
                .sum(),
        }
    }

    /// What was read and not handed over: bytes, or packets.
    pub fn waiting(&self) -> (usize, &'static str) {
        match &self.flows {
            Flows::Streams { encapsulate, decapsulate } => {
                (encapsulate.waiting() + decapsulate.waiting(), "bytes")
            }
            Flows::Ports { encapsulate, decapsulate } => {
                (encapsulate.waiting() + decapsulate.waiting(), "packets")
            }
        }
    }

    /// Whether both ends can go on in the event loop of another thread.
    pub fn is_movable(&self) -> bool {
        if self.lost.is_some() {
            return false; // its timer is this thread's
        }
        match &self.ends {
            Ends::Streams(network, sink) => network.is_movable() && sink.is_movable(),
            Ends::Ports(network, sink) => network.is_movable() && sink.is_movable(),
        }
    }

    /// The pump is polled on another thread from now on.
    pub fn moved(&mut self) -> Result<()> {
        match &mut self.ends {
            Ends::Streams(network, sink) => network.moved().and_then(|()| sink.moved()),
            Ends::Ports(network, sink) => network.moved().and_then(|()| sink.moved()),
        }
    }

    /// The two ends, for what only their owner knows how to do (keys, unread bytes).
    pub fn ends(&mut self) -> &mut Ends {
        &mut self.ends
    }
}

/// A new sink for a running pump.
pub enum Sink {
    /// Ordered bytes.
    Stream(BoxStream),
    /// Whole packets.
    Port(BoxPort),
}
