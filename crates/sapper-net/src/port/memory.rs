//! Two packet ports joined in memory, for tests: what one sends the other receives.
//!
//! Bounded like a real one, with abilities of choice: an offload-capable pair shows what a pump does
//! with super-packets on a machine without TUN. Ends may live on different threads.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use sapper_proto::packet::{Packet, PacketBatch, PacketMeta};

use super::{PacketPort, PortAbilities, wire_packets};
use crate::error::Result;
use crate::stats::{DropReason, EndpointStats};

/// One end of a pair.
pub struct MemoryPort {
    incoming: Arc<Mutex<Queue>>,
    outgoing: Arc<Mutex<Queue>>,
    abilities: PortAbilities,
    stats: Arc<EndpointStats>,
}

/// One direction. Packets that were taken leave their memory in `spare`, so that a running pair
/// allocates nothing.
struct Queue {
    packets: VecDeque<(Vec<u8>, PacketMeta)>,
    spare: Vec<Vec<u8>>,
    capacity: usize,
    ended: bool,
    receiver: Option<Waker>,
    sender: Option<Waker>,
}

impl MemoryPort {
    /// Two ends with the same abilities; each direction holds `capacity` packets at most.
    pub fn pair(capacity: usize, abilities: PortAbilities) -> (Self, Self) {
        assert!(capacity > 0);
        let queue = || {
            Arc::new(Mutex::new(Queue {
                packets: VecDeque::with_capacity(capacity),
                spare: Vec::with_capacity(capacity),
                capacity,
                ended: false,
                receiver: None,
                sender: None,
            }))
        };
        let (there, back) = (queue(), queue());
        let one = Self {
            incoming: Arc::clone(&back),
            outgoing: Arc::clone(&there),
            abilities,
            stats: Arc::default(),
        };
        let other = Self { incoming: there, outgoing: back, abilities, stats: Arc::default() };
        (one, other)
    }

    /// Changes what this end takes from now on (a path MTU that shrinks).
    pub fn set_abilities(&mut self, abilities: PortAbilities) {
        self.abilities = abilities;
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    // A queue is whole after each statement: a panic elsewhere leaves nothing half done.
    queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Queue {
    fn end(&mut self) {
        self.ended = true;
        for waker in [self.receiver.take(), self.sender.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl Drop for MemoryPort {
    fn drop(&mut self) {
        lock(&self.outgoing).end();
        lock(&self.incoming).end();
    }
}

impl PacketPort for MemoryPort {
    fn abilities(&self) -> PortAbilities {
        self.abilities
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        let mut queue = lock(&self.incoming);
        let mut received = false;
        while let Some((data, meta)) = queue.packets.front() {
            if !batch.push(data, *meta) {
                assert!(received, "a batch has room for one packet of the largest size");
                break;
            }
            let packet = Packet { data, meta };
            self.stats.packets_received.add(wire_packets(packet));
            self.stats.bytes_received.add(data.len() as u64);
            received = true;
            if let Some((data, _)) = queue.packets.pop_front() {
                queue.spare.push(data);
            }
        }
        if received {
            self.stats.receive_calls.add(1);
            if let Some(waker) = queue.sender.take() {
                waker.wake();
            }
            return Poll::Ready(Ok(true));
        }
        if queue.ended {
            return Poll::Ready(Ok(false));
        }
        queue.receiver = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut queue = lock(&self.incoming);
        if queue.packets.is_empty() && !queue.ended {
            queue.receiver = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        let mut queue = lock(&self.outgoing);
        let mut sent = false;
        while let Some(packet) = batch.get(0) {
            if let Some(reason) = self.abilities.refuses(packet) {
                self.stats.drops.add(reason, 1);
            } else if queue.ended {
                self.stats.drops.add(DropReason::Refused, 1);
            } else if queue.packets.len() == queue.capacity {
                queue.sender = Some(cx.waker().clone());
                return Poll::Pending;
            } else {
                let mut data = queue.spare.pop().unwrap_or_default();
                data.clear();
                data.extend_from_slice(packet.data);
                self.stats.packets_sent.add(wire_packets(packet));
                self.stats.bytes_sent.add(packet.data.len() as u64);
                queue.packets.push_back((data, *packet.meta));
                sent = true;
                if let Some(waker) = queue.receiver.take() {
                    waker.wake();
                }
            }
            batch.advance(1);
        }
        if sent {
            self.stats.send_calls.add(1);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        lock(&self.outgoing).end();
        Poll::Ready(Ok(()))
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn release_idle(&mut self) {
        let mut queue = lock(&self.incoming);
        if queue.packets.is_empty() {
            queue.spare = Vec::with_capacity(queue.capacity);
        }
    }

    fn is_movable(&self) -> bool {
        true
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::super::PacketKind;
    use super::super::conformance::{self, Subject};
    use super::*;

    #[tokio::test]
    async fn memory_ports_conform_plain_and_offloaded() {
        let plain = PortAbilities::plain(1500, PacketKind::Ip);
        let able = PortAbilities { tso4: true, tso6: true, uso: true, partial_checksum: true, ..plain };
        for abilities in [plain, able] {
            for capacity in [1, 64] {
                conformance::check(async || {
                    let (port, far) = MemoryPort::pair(capacity, abilities);
                    Subject { port: Box::new(port), far: Box::new(far), lossless: true, ends: true }
                })
                .await;
            }
        }
    }
}
