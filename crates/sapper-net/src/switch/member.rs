//! One port of a switch: its way in, and the queue in front of its way out.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use sapper_proto::packet::gso::{Cutter, GsoError};
use sapper_proto::packet::{Packet, PacketBatch, checksum};

use super::{MemberStats, PortId};
use crate::error::{Error, Result};
use crate::port::{BoxPort, Fit, PortAbilities, give_batch, take_batch};
use crate::stats::DropReason;

pub(super) struct Port {
    pub(super) id: PortId,
    pub(super) port: BoxPort,
    pub(super) stats: Arc<MemberStats>,
    pub(super) waker: Waker,
    /// Packets from the port that were not looked at yet; `None` while there are none.
    pub(super) incoming: Option<PacketBatch>,
    /// Packets on their way out; `None` while there are none.
    outgoing: Option<PacketBatch>,
    /// What the port takes in this round.
    abilities: PortAbilities,
    /// Packets were put into the queue since it was last sent.
    pub(super) dirty: bool,
    /// The queue was handed over, but not flushed.
    unflushed: bool,
    /// Something moved since the last look at idle ports.
    pub(super) active: bool,
    /// Sending failed: the port has to go.
    pub(super) failed: Option<Error>,
}

impl Port {
    pub(super) fn new(id: PortId, port: BoxPort, waker: Waker) -> Self {
        let abilities = port.abilities();
        Self {
            id,
            port,
            stats: Arc::default(),
            waker,
            incoming: None,
            outgoing: None,
            abilities,
            dirty: false,
            unflushed: false,
            active: true,
            failed: None,
        }
    }

    /// Receives one batch, unless packets of the last one are left. `Ok(false)` is the port's end,
    /// `None` means that nothing is there.
    pub(super) fn receive(&mut self) -> Option<Result<bool>> {
        if self.incoming.is_some() {
            return Some(Ok(true));
        }
        let waker = self.waker.clone();
        let mut cx = Context::from_waker(&waker);
        match self.port.poll_receivable(&mut cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Some(Err(error)),
            Poll::Pending => return None,
        }
        let mut batch = take_batch();
        let received = self.port.poll_receive(&mut cx, &mut batch);
        if let Poll::Ready(Ok(true)) = received {
            self.active = true;
            self.incoming = Some(batch);
        } else {
            give_batch(batch);
        }
        match received {
            Poll::Ready(received) => Some(received),
            Poll::Pending => None,
        }
    }

    /// Puts a packet into the queue, in the form that the port takes. Returns whether it got there.
    pub(super) fn put(&mut self, packet: Packet<'_>) -> bool {
        if !self.dirty {
            self.abilities = self.port.abilities();
        }
        let put = match self.abilities.fit(packet) {
            Fit::Never(reason) => Err(reason),
            Fit::AsItIs => self.push(packet),
            Fit::Complete => self.push(packet).and_then(|()| self.complete_last()),
            Fit::Cut => self.cut(packet),
        };
        put.map_err(|reason| self.stats.drops_out.add(reason, 1)).is_ok()
    }

    /// The queue, with room for a packet of `len` bytes. A full one is sent first: the port may take
    /// by now what it refused before, or was never asked.
    fn queue(&mut self, len: usize) -> Result<&mut PacketBatch, DropReason> {
        if self.outgoing.as_ref().is_some_and(|queue| !queue.has_room(len)) {
            self.send();
        }
        self.dirty = true;
        let queue = self.outgoing.get_or_insert_with(take_batch);
        if queue.has_room(len) { Ok(queue) } else { Err(DropReason::QueueFull) }
    }

    fn push(&mut self, packet: Packet<'_>) -> Result<(), DropReason> {
        self.queue(packet.data.len())?.push(packet.data, *packet.meta);
        Ok(())
    }

    fn complete_last(&mut self) -> Result<(), DropReason> {
        let Some(queue) = &mut self.outgoing else { return Ok(()) };
        let last = queue.len() - 1;
        if queue.get_mut(last).is_some_and(|mut packet| checksum::finish(&mut packet)) {
            return Ok(());
        }
        // It must not leave like this.
        let mut index = 0;
        queue.retain(|_| {
            index += 1;
            index <= last
        });
        Err(DropReason::BadOffload)
    }

    /// Cuts a packet into the queue. Where that stays full, the segments behind are lost.
    fn cut(&mut self, packet: Packet<'_>) -> Result<(), DropReason> {
        let max_packet = self.abilities.max_packet;
        let mut cutter = Cutter::new(packet.data, packet.meta, max_packet).map_err(|error| match error {
            GsoError::TooLong { .. } => DropReason::TooLarge,
            GsoError::Packet(_) | GsoError::Meta => DropReason::BadOffload,
        })?;
        while let Some(len) = cutter.next_len() {
            let queue = self.queue(len)?;
            if let Some(room) = queue.reserve(len) {
                cutter.write_next(room);
                queue.commit(len, cutter.meta());
            }
        }
        Ok(())
    }

    /// Whether the whole of the queue can be exchanged for a batch whose packets all come here.
    pub(super) fn takes_all(&mut self, batch: &PacketBatch) -> bool {
        if self.outgoing.as_ref().is_some_and(|queue| !queue.is_empty()) {
            return false;
        }
        self.abilities = self.port.abilities();
        batch.iter().all(|packet| self.abilities.fit(packet) == Fit::AsItIs)
    }

    /// Exchanges the empty queue for a batch.
    pub(super) fn put_all(&mut self, batch: &mut PacketBatch) {
        let queue = self.outgoing.get_or_insert_with(take_batch);
        std::mem::swap(queue, batch);
        self.dirty = true;
    }

    /// Sends what waits, as far as the port takes it. An error is kept for the switch to find.
    pub(super) fn send(&mut self) {
        let waker = self.waker.clone();
        let mut cx = Context::from_waker(&waker);
        self.dirty = false;
        if self.failed.is_none()
            && let Err(error) = self.poll_send(&mut cx)
        {
            self.failed = Some(error);
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<()> {
        if let Some(queue) = &mut self.outgoing {
            if !queue.is_empty() {
                self.active = true;
                self.unflushed = true;
                if let Poll::Ready(sent) = self.port.poll_send(cx, queue) {
                    sent?;
                }
            }
            if queue.is_empty()
                && let Some(empty) = self.outgoing.take()
            {
                give_batch(empty);
            }
        }
        if self.unflushed
            && let Poll::Ready(flushed) = self.port.poll_flush(cx)
        {
            flushed?;
            self.unflushed = self.outgoing.is_some();
        }
        Ok(())
    }

    /// Gives the batches back and counts what waited in them.
    pub(super) fn into_port(mut self) -> BoxPort {
        if let Some(rest) = self.incoming.take() {
            self.stats.drops_in.add(DropReason::Refused, rest.len() as u64);
            give_batch(rest);
        }
        if let Some(queue) = self.outgoing.take() {
            self.stats.drops_out.add(DropReason::Refused, queue.len() as u64);
            give_batch(queue);
        }
        self.port
    }
}
