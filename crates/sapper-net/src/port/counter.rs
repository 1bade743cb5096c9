//! The counting sink: takes every packet, counts it, and gives none.
//!
//! It has no far side, so the conformance suite of two sides does not fit; its few rules are tested here.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll};

use sapper_proto::packet::PacketBatch;

use super::{PacketKind, PacketPort, PortAbilities, wire_packets};
use crate::error::Result;
use crate::stats::EndpointStats;

/// Counts what it is sent.
pub struct CounterPort {
    abilities: PortAbilities,
    stats: Arc<EndpointStats>,
}

impl CounterPort {
    /// Takes packets up to `max_packet` bytes, super-packets too: to count them needs no segmenting.
    pub fn new(max_packet: usize) -> Self {
        let abilities = PortAbilities {
            tso4: true,
            tso6: true,
            uso: true,
            partial_checksum: true,
            datagrams: true,
            ..PortAbilities::plain(max_packet, PacketKind::Ip)
        };
        Self { abilities, stats: Arc::default() }
    }
}

impl PacketPort for CounterPort {
    fn abilities(&self) -> PortAbilities {
        self.abilities
    }

    fn poll_receive(&mut self, _cx: &mut Context<'_>, _batch: &mut PacketBatch) -> Poll<Result<bool>> {
        Poll::Pending // nothing will ever come, so nobody is woken
    }

    fn poll_receivable(&mut self, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Pending
    }

    fn poll_send(&mut self, _cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        let mut packets = 0;
        for packet in batch.iter() {
            match self.abilities.refuses(packet) {
                Some(reason) => self.stats.drops.add(reason, 1),
                None => packets += wire_packets(packet),
            }
        }
        self.stats.packets_sent.add(packets);
        self.stats.bytes_sent.add(batch.byte_len() as u64);
        batch.clear();
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
    use std::task::Waker;

    use sapper_proto::packet::PacketMeta;

    use super::super::take_batch;
    use super::*;

    #[test]
    fn it_takes_and_counts_and_gives_nothing() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut port = CounterPort::new(1500);
        let mut batch = take_batch();
        assert!(batch.push(&[0x60; 100], PacketMeta::default()));
        assert!(batch.push(&[0x60; 1501], PacketMeta::default()));
        assert!(port.poll_send(&mut cx, &mut batch).is_ready());
        assert!(batch.is_empty());
        assert_eq!((port.stats().packets_sent.get(), port.stats().drops.total()), (1, 1));
        assert!(port.poll_receive(&mut cx, &mut batch).is_pending());
    }
}
