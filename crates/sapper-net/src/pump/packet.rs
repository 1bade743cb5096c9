//! One direction between two packet ports.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::flow::{Flow, FlowControl, FlowEnd};
use super::{FlowOptions, FlowStats, Turns};
use crate::error::{Direction, Phase, Result};
use crate::port::adapt::Adapter;
use crate::port::tap::Tap;
use crate::port::{PacketBatch, PacketPort, give_batch, take_batch};
use crate::stream::Stream;

pub(super) struct PacketFlow {
    control: FlowControl,
    direction: Direction,
    stats: Arc<FlowStats>,
    /// Received packets. `None` while the source is silent.
    received: Option<PacketBatch>,
    /// The same in a form that the destination takes, where that is another one.
    adapted: Option<PacketBatch>,
    adapter: Adapter,
    received_at: Option<Instant>,
    tap: Option<Tap>,
}

impl PacketFlow {
    pub(super) fn new(direction: Direction, options: FlowOptions) -> Self {
        debug_assert!(options.initial.is_empty(), "a framed port takes its initial bytes itself");
        debug_assert_eq!(options.turns, Turns::Long, "short turns are for streams");
        Self {
            control: FlowControl::new(&options),
            direction,
            stats: options.stats,
            received: None,
            adapted: None,
            adapter: Adapter::new(),
            received_at: None,
            tap: None,
        }
    }

    pub(super) fn set_tap(&mut self, tap: Option<Tap>) {
        self.tap = tap;
    }

    /// Packets that were received and not sent; a large one counts as one.
    pub(super) fn waiting(&self) -> usize {
        [&self.received, &self.adapted].into_iter().flatten().map(PacketBatch::len).sum()
    }
}

/// Bytes and packets that a port has sent so far.
fn sent_by(port: &dyn PacketPort) -> (u64, u64) {
    let stats = port.stats();
    (stats.bytes_sent.get(), stats.packets_sent.get())
}

impl FlowEnd for dyn PacketPort {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        PacketPort::poll_flush(self, cx)
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        PacketPort::poll_send_eof(self, cx)
    }

    fn has_lost(&mut self) -> bool {
        self.stream_mut().is_some_and(|stream| Stream::has_lost(stream))
    }
}

impl Flow for PacketFlow {
    type End = dyn PacketPort;

    fn control(&mut self) -> &mut FlowControl {
        &mut self.control
    }

    fn has_waiting(&self) -> bool {
        [&self.received, &self.adapted].into_iter().flatten().any(|batch| !batch.is_empty())
    }

    fn read(&mut self, cx: &mut Context<'_>, source: &mut Self::End) -> Result<Poll<bool>> {
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

    fn write(
        &mut self,
        cx: &mut Context<'_>,
        destination: &mut Self::End,
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
            let (packets, before) = (ready.len(), sent_by(destination));
            let sent = destination.poll_send(cx, ready).map_err(|e| e.with_phase(Phase::Transfer))?;
            let packets = packets - ready.len();
            if packets > 0 {
                self.stats.flowing();
                // The destination knows what went out: not what it dropped, a large packet as its segments.
                let after = sent_by(destination);
                self.stats.bytes.add(after.0 - before.0);
                self.stats.packets.add(after.1 - before.1);
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

    fn forget(&mut self) {
        self.release();
    }

    fn release(&mut self) {
        for batch in [self.received.take(), self.adapted.take()].into_iter().flatten() {
            give_batch(batch);
        }
        if let Some(tap) = &self.tap {
            tap.flush();
        }
    }

    fn destination_replaced(&mut self) {
        // A packet that went out in part to the old one is lost with it.
        if self.adapter.is_midway()
            && let Some(received) = &mut self.received
        {
            received.advance(1);
        }
        self.adapter.reset();
        self.control.destination_replaced();
        self.stats.flowing();
    }
}
