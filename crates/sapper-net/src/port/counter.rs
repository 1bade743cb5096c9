//! A packet port without a wire: it counts what it is given and never gives anything.
//!
//! The sink for testing a tunnel. Not here: load with numbers and times in it ([`crate::load`], which
//! works on descriptors, from outside). It has no far side, so the conformance suite of two sides
//! does not fit; its rules are tested here.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll};

use sapper_proto::packet::PacketBatch;

use super::{PacketKind, PacketPort, PortAbilities, wire_packets};
use crate::error::Result;
use crate::stats::EndpointStats;

/// A port that counts.
pub struct CounterPort {
    max_packet: usize,
    stats: Arc<EndpointStats>,
}

impl CounterPort {
    /// Counts packets up to `max_packet` bytes, super-packets too (to count them needs no cutting).
    pub fn new(max_packet: usize) -> Self {
        Self { max_packet, stats: Arc::default() }
    }
}

impl PacketPort for CounterPort {
    fn abilities(&self) -> PortAbilities {
        PortAbilities {
            tso4: true,
            tso6: true,
            uso: true,
            partial_checksum: true,
            datagrams: true,
            ..PortAbilities::plain(self.max_packet, PacketKind::Ip)
        }
    }

    fn poll_receive(&mut self, _cx: &mut Context<'_>, _batch: &mut PacketBatch) -> Poll<Result<bool>> {
        Poll::Pending
    }

    fn poll_receivable(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Pending
    }

    fn poll_send(&mut self, _cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        if !batch.is_empty() {
            let abilities = self.abilities();
            for packet in batch.iter() {
                if let Some(reason) = abilities.refuses(packet) {
                    self.stats.drops.add(reason, 1);
                    continue;
                }
                self.stats.packets_sent.add(wire_packets(packet));
                self.stats.bytes_sent.add(packet.data.len() as u64);
            }
            batch.advance(batch.len());
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_send_eof(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        "counter".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use sapper_proto::packet::{Gso, PacketMeta};

    use super::super::take_batch;
    use super::*;

    #[tokio::test]
    async fn packets_are_counted_as_they_would_lie_on_a_wire() {
        let mut counter = CounterPort::new(1500);
        let large = PacketMeta { gso: Gso::Udp, gso_size: 100, header_len: 48, ..PacketMeta::default() };
        let mut batch = take_batch();
        batch.push(&[0x60; 100], PacketMeta::default());
        batch.push(&[0x60; 548], large);
        batch.push(&[0x60; 1501], PacketMeta::default());
        poll_fn(|cx| counter.poll_send(cx, &mut batch)).await.unwrap();
        assert!(batch.is_empty());
        let stats = counter.stats();
        assert_eq!((stats.packets_sent.get(), stats.bytes_sent.get(), stats.drops.total()), (6, 648, 1));
    }
}
