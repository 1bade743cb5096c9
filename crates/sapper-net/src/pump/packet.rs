//! One direction between two packet ports.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::{FlowOptions, FlowState, FlowStats, PumpMode, ROUNDS, ended_by_stop, says_goodbye_to_nobody};
use crate::error::{Direction, Phase, Result};
use crate::port::adapt::Adapter;
use crate::port::tap::Tap;
use crate::port::{PacketBatch, PacketPort, give_batch, take_batch};

pub(super) struct PacketFlow {
    direction: Direction,
    stats: Arc<FlowStats>,
    /// Received packets. `None` while the source is silent.
    received: Option<PacketBatch>,
    /// The same in a form that the destination takes, where that is another one.
    adapted: Option<PacketBatch>,
    adapter: Adapter,
    received_at: Option<Instant>,
    phase: FlowPhase,
    enabled: bool,
    forward_eof: bool,
    paused: bool,
    tap: Option<Tap>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FlowPhase {
    Receiving,
    SourceEnded,
    Ended,
}

impl PacketFlow {
    pub(super) fn new(direction: Direction, options: FlowOptions) -> Self {
        debug_assert!(options.initial.is_empty(), "a framed port takes its initial bytes itself");
        Self {
            direction,
            stats: options.stats,
            received: None,
            adapted: None,
            adapter: Adapter::new(),
            received_at: None,
            phase: FlowPhase::Receiving,
            enabled: options.enabled,
            forward_eof: options.forward_eof,
            paused: false,
            tap: None,
        }
    }

    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut dyn PacketPort,
        destination: &mut dyn PacketPort,
        mode: PumpMode,
        peer_ended: bool,
        active: &mut bool,
    ) -> Result<FlowState> {
        if self.phase == FlowPhase::Ended {
            return Ok(FlowState::Ended);
        }
        for _ in 0..ROUNDS {
            if self.has_packets() {
                if !self.send(cx, destination, active)? {
                    return Ok(FlowState::Open);
                }
                continue;
            }
            let flushed = match destination.poll_flush(cx) {
                Poll::Ready(Err(error)) if says_goodbye_to_nobody(peer_ended, mode, &error) => {
                    return Ok(self.end());
                }
                flushed => flushed.map_err(|e| e.with_phase(Phase::Transfer))?.is_ready(),
            };
            if self.phase == FlowPhase::SourceEnded {
                if self.forward_eof {
                    match destination.poll_send_eof(cx) {
                        Poll::Pending => return Ok(FlowState::Open),
                        Poll::Ready(Err(error)) if !says_goodbye_to_nobody(peer_ended, mode, &error) => {
                            return Err(error.with_phase(Phase::Close));
                        }
                        Poll::Ready(_) => {}
                    }
                }
                return Ok(self.end());
            }
            if !self.enabled {
                return Ok(if flushed { FlowState::Ended } else { FlowState::Open });
            }
            if self.paused && mode == PumpMode::Run {
                self.release();
                return Ok(FlowState::Open);
            }
            match ended_by_stop(mode, self.receive(cx, source), false)? {
                Poll::Ready(true) => *active = true,
                Poll::Ready(false) => self.phase = FlowPhase::SourceEnded,
                Poll::Pending => {
                    self.release();
                    if mode != PumpMode::Drain {
                        return Ok(FlowState::Open);
                    }
                    // What waited was received: a drain receives no further.
                    self.phase = FlowPhase::SourceEnded;
                }
            }
        }
        cx.waker().wake_by_ref();
        Ok(FlowState::Open)
    }

    fn has_packets(&self) -> bool {
        [&self.received, &self.adapted].into_iter().flatten().any(|batch| !batch.is_empty())
    }

    /// Receives a batch; takes an arena only when something is there.
    fn receive(&mut self, cx: &mut Context<'_>, source: &mut dyn PacketPort) -> Result<Poll<bool>> {
        if source.poll_receivable(cx).map_err(|e| e.with_phase(Phase::Transfer))?.is_pending() {
            return Ok(Poll::Pending);
        }
        let batch = self.received.get_or_insert_with(take_batch);
        batch.clear();
        let received = source.poll_receive(cx, batch).map_err(|e| e.with_phase(Phase::Transfer))?;
        if let Poll::Ready(true) = received {
            self.received_at = Some(Instant::now());
            if let Some(tap) = &self.tap {
                tap.record(self.direction, batch);
            }
        }
        Ok(received)
    }

    /// Sends what waits; `false` when the destination takes no more now.
    fn send(
        &mut self,
        cx: &mut Context<'_>,
        destination: &mut dyn PacketPort,
        active: &mut bool,
    ) -> Result<bool> {
        let abilities = destination.abilities();
        let ready = self.adapted.get_or_insert_with(take_batch);
        loop {
            if ready.is_empty() {
                let Some(received) = self.received.as_mut().filter(|batch| !batch.is_empty()) else {
                    return Ok(true);
                };
                ready.clear();
                self.adapter.adapt(received, ready, &abilities, &self.stats.drops);
                continue;
            }
            let (bytes, packets) = (ready.byte_len(), ready.len());
            let sent = destination.poll_send(cx, ready).map_err(|e| e.with_phase(Phase::Transfer))?;
            let (bytes, packets) = (bytes - ready.byte_len(), packets - ready.len());
            if packets > 0 {
                self.stats.flowing();
                self.stats.bytes.add(bytes as u64);
                self.stats.packets.add(packets as u64);
                *active = true;
                if let Some(received) = self.received_at {
                    self.stats.latency.record_many(received.elapsed(), packets as u64);
                }
            }
            if sent.is_pending() {
                self.stats.blocked();
                return Ok(false);
            }
        }
    }

    /// Gives the batches back.
    fn release(&mut self) {
        for batch in [self.received.take(), self.adapted.take()].into_iter().flatten() {
            give_batch(batch);
        }
        if let Some(tap) = &self.tap {
            tap.flush();
        }
    }

    pub(super) fn ended(&self) -> bool {
        self.phase == FlowPhase::Ended
    }

    fn end(&mut self) -> FlowState {
        self.phase = FlowPhase::Ended;
        self.release();
        FlowState::Ended
    }

    /// Whether the source has ended; what it sent may still be on its way.
    pub(super) fn source_ended(&self) -> bool {
        self.phase != FlowPhase::Receiving
    }

    pub(super) fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    pub(super) fn set_tap(&mut self, tap: Option<Tap>) {
        self.tap = tap;
    }

    pub(super) fn source_replaced(&mut self) {
        if self.phase == FlowPhase::SourceEnded {
            self.phase = FlowPhase::Receiving;
        }
    }

    pub(super) fn destination_replaced(&mut self) {
        // A packet that went out in part to the old one is lost with it.
        if self.adapter.is_midway()
            && let Some(received) = &mut self.received
        {
            received.advance(1);
        }
        self.adapter.reset();
        if self.phase == FlowPhase::Ended && self.forward_eof {
            self.phase = FlowPhase::SourceEnded;
        }
        self.stats.flowing();
    }
}
