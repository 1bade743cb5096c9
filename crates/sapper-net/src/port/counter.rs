//! A packet port without a wire: it counts what it is given, and may make packets of its own.
//!
//! The sink for testing a tunnel, and both ends of a measurement: the generator numbers its packets
//! and writes the time into each, the counter at the other end finds loss, order and latency. The two
//! may be in two processes of one machine, since they read one clock. It has no far side, so the
//! conformance suite of two sides does not fit; its rules are tested here.

mod pace;

use std::net::Ipv6Addr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pace::Pace;
use sapper_proto::packet::{Gso, Packet, PacketBatch, PacketMeta, checksum, ip};

use super::datagram::LARGEST_PACKET;
use super::{PacketKind, PacketPort, PortAbilities, wire_packets};
use crate::error::{Error, Result};
use crate::stats::{Counter, EndpointStats, LatencyHistogram};

/// IPv6 and UDP headers of a generated packet.
const HEADERS: usize = 48;

/// What a generated packet carries: mark, number, time.
const MARK: [u8; 8] = *b"SAPPLOAD";
const NUMBER: usize = HEADERS + 8;
const TIME: usize = HEADERS + 16;

/// The shortest generated packet.
pub const LEAST_SIZE: usize = HEADERS + 24;

/// Packets to generate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneratorOptions {
    /// Bytes of each packet.
    pub size: usize,
    /// Packets a second; `None` makes as many as are taken.
    pub rate: Option<u32>,
    /// The port ends after so many; `None` goes on.
    pub count: Option<u64>,
    /// Addresses in the packets, for what routes them.
    pub addresses: (Ipv6Addr, Ipv6Addr),
    /// UDP ports in the packets.
    pub ports: (u16, u16),
}

impl Default for GeneratorOptions {
    fn default() -> Self {
        let host = |n| Ipv6Addr::new(0xfd00, 0x5a, 0, 0, 0, 0, 0, n);
        Self { size: 1280, rate: None, count: None, addresses: (host(1), host(2)), ports: (40_000, 40_001) }
    }
}

/// What a counter has seen. Shared with whoever shows it.
#[derive(Debug)]
pub struct CounterReport {
    /// Packets counted, as they would lie on a wire.
    pub packets: Counter,
    /// Their bytes.
    pub bytes: Counter,
    /// Those without a generator's mark.
    pub foreign: Counter,
    /// Numbers that were jumped over.
    pub skipped: Counter,
    /// Packets whose number was below one seen before.
    pub late: Counter,
    /// From the moment a packet was due to the moment it was counted.
    pub latency: LatencyHistogram,
    /// The number after the highest one seen.
    next: AtomicU64,
}

impl Default for CounterReport {
    fn default() -> Self {
        Self {
            packets: Counter::default(),
            bytes: Counter::default(),
            foreign: Counter::default(),
            skipped: Counter::default(),
            late: Counter::default(),
            latency: LatencyHistogram::fine(),
            next: AtomicU64::new(0),
        }
    }
}

impl CounterReport {
    /// Packets that were made before the last one counted and have not come.
    pub fn lost(&self) -> u64 {
        self.skipped.get().saturating_sub(self.late.get())
    }

    fn count(&self, packet: Packet<'_>, now: u64) {
        self.bytes.add(packet.data.len() as u64);
        self.packets.add(wire_packets(packet));
        let header = match packet.meta.gso {
            Gso::None => HEADERS,
            Gso::Udp => usize::from(packet.meta.header_len),
            _ => return self.foreign.add(wire_packets(packet)),
        };
        let segment = match packet.meta.gso {
            Gso::None => usize::MAX,
            _ => usize::from(packet.meta.gso_size).max(1),
        };
        for payload in packet.data.get(header..).unwrap_or_default().chunks(segment) {
            match read_mark(payload) {
                Some((number, time)) => self.note(number, now.saturating_sub(time)),
                None => self.foreign.add(1),
            }
        }
    }

    fn note(&self, number: u64, nanos: u64) {
        self.latency.record(Duration::from_nanos(nanos));
        let next = self.next.load(Relaxed);
        if number < next {
            self.late.add(1);
        } else {
            self.skipped.add(number - next);
            self.next.store(number.wrapping_add(1), Relaxed);
        }
    }
}

fn read_mark(payload: &[u8]) -> Option<(u64, u64)> {
    let rest = payload.strip_prefix(&MARK)?;
    let (number, rest) = rest.split_first_chunk()?;
    let time = rest.first_chunk()?;
    Some((u64::from_be_bytes(*number), u64::from_be_bytes(*time)))
}

/// Nanoseconds of the clock that all processes of a machine share.
fn now_nanos() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one `timespec`. This clock exists everywhere.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A port that counts, and generates where it was told to.
pub struct CounterPort {
    generator: Option<Generator>,
    max_packet: usize,
    report: Arc<CounterReport>,
    stats: Arc<EndpointStats>,
}

struct Generator {
    options: GeneratorOptions,
    pace: Option<Pace>,
    /// A packet with zeros for number and time, and its checksum's sum.
    template: Vec<u8>,
    sum: u16,
    made: u64,
}

impl CounterPort {
    /// Counts packets up to `max_packet` bytes, super-packets too (to count them needs no cutting),
    /// and never receives.
    pub fn new(max_packet: usize, report: Arc<CounterReport>) -> Self {
        Self { generator: None, max_packet, report, stats: Arc::default() }
    }

    /// Counts, and makes packets. Must be called on an I/O thread when there is a rate.
    pub fn generator(
        options: GeneratorOptions,
        max_packet: usize,
        report: Arc<CounterReport>,
    ) -> Result<Self> {
        if !(LEAST_SIZE..=LARGEST_PACKET).contains(&options.size) {
            return Err(Error::config(
                "size",
                format!("must be from {LEAST_SIZE} to {LARGEST_PACKET}, not {}", options.size),
            ));
        }
        let pace = options.rate.map(Pace::new).transpose()?;
        let generator = Some(Generator::new(options, pace));
        Ok(Self { generator, max_packet, report, stats: Arc::default() })
    }

    /// What it has counted.
    pub fn report(&self) -> &Arc<CounterReport> {
        &self.report
    }
}

impl Generator {
    fn new(options: GeneratorOptions, pace: Option<Pace>) -> Self {
        let mut template = vec![0; options.size];
        let payload = (options.size - 40) as u16;
        template[0] = 0x60;
        template[4..6].copy_from_slice(&payload.to_be_bytes());
        template[6] = ip::protocol::UDP;
        template[7] = 64;
        template[8..24].copy_from_slice(&options.addresses.0.octets());
        template[24..40].copy_from_slice(&options.addresses.1.octets());
        template[40..42].copy_from_slice(&options.ports.0.to_be_bytes());
        template[42..44].copy_from_slice(&options.ports.1.to_be_bytes());
        template[44..46].copy_from_slice(&payload.to_be_bytes());
        template[HEADERS..NUMBER].copy_from_slice(&MARK);
        for (index, byte) in template[LEAST_SIZE..].iter_mut().enumerate() {
            *byte = index as u8;
        }
        let pseudo = checksum::pseudo_header(&template, ip::protocol::UDP, options.size - 40);
        let sum = checksum::add(pseudo.unwrap_or_default(), checksum::sum(&template[40..]));
        Self { options, pace, template, sum, made: 0 }
    }

    /// Appends what is due: `Ok(false)` when all was made.
    fn poll(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        let left = self.options.count.map_or(u64::MAX, |count| count - self.made);
        if left == 0 {
            return Poll::Ready(Ok(false));
        }
        let due = match &mut self.pace {
            Some(pace) => ready!(pace.poll_due(cx, self.made))?,
            None => u64::MAX,
        };
        for _ in 0..due.min(left) {
            let Some(room) = batch.reserve(self.template.len()) else { break };
            let time = self.pace.as_ref().map_or_else(now_nanos, |pace| pace.due_at(self.made));
            room.copy_from_slice(&self.template);
            room[NUMBER..TIME].copy_from_slice(&self.made.to_be_bytes());
            room[TIME..LEAST_SIZE].copy_from_slice(&time.to_be_bytes());
            let sum = checksum::add(self.sum, checksum::sum(&room[NUMBER..LEAST_SIZE]));
            // Zero would say that there is none.
            let stored = if sum == 0xffff { 0xffff } else { !sum };
            room[46..48].copy_from_slice(&stored.to_be_bytes());
            batch.commit(self.template.len(), PacketMeta::default());
            self.made += 1;
        }
        Poll::Ready(Ok(true))
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

    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        let Some(generator) = &mut self.generator else { return Poll::Pending };
        assert!(batch.has_room(generator.options.size), "a batch has room for one packet");
        let before = (batch.len(), batch.byte_len());
        let more = ready!(generator.poll(cx, batch))?;
        self.stats.packets_received.add((batch.len() - before.0) as u64);
        self.stats.bytes_received.add((batch.byte_len() - before.1) as u64);
        Poll::Ready(Ok(more))
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(generator) = &mut self.generator else { return Poll::Pending };
        let all_made = generator.options.count == Some(generator.made);
        match &mut generator.pace {
            Some(pace) if !all_made => Poll::Ready(ready!(pace.poll_due(cx, generator.made)).map(|_| ())),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_send(&mut self, _cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        if !batch.is_empty() {
            let (now, abilities) = (now_nanos(), self.abilities());
            for packet in batch.iter() {
                if let Some(reason) = abilities.refuses(packet) {
                    self.stats.drops.add(reason, 1);
                    continue;
                }
                self.report.count(packet, now);
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
        match &self.generator {
            None => "counter".to_owned(),
            Some(generator) => match generator.options.rate {
                Some(rate) => format!("generator ({} B, {rate} packets/s)", generator.options.size),
                None => format!("generator ({} B, as fast as taken)", generator.options.size),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use sapper_proto::packet::checksum::{Verdict, verify};

    use super::super::memory::MemoryPort;
    use super::super::take_batch;
    use super::super::testing::Join;
    use super::*;

    fn report() -> Arc<CounterReport> {
        Arc::default()
    }

    #[tokio::test]
    async fn generated_packets_are_right_and_numbered() {
        let options = GeneratorOptions { size: 100, count: Some(1000), ..GeneratorOptions::default() };
        let mut port = CounterPort::generator(options, 1500, report()).unwrap();
        let mut batch = take_batch();
        let mut numbers = Vec::new();
        while poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap() {
            for packet in batch.iter() {
                assert_eq!((packet.data.len(), verify(packet.data)), (100, Verdict::Right));
                numbers.push(read_mark(&packet.data[HEADERS..]).unwrap().0);
            }
            batch.clear();
        }
        assert!(numbers.into_iter().eq(0..1000));
    }

    #[tokio::test]
    async fn what_is_made_at_one_end_is_counted_at_the_other() {
        let plain = PortAbilities::plain(1500, PacketKind::Ip);
        let (a, b) = MemoryPort::pair(100, plain);
        let count = 5000;
        let options = GeneratorOptions { count: Some(count), ..GeneratorOptions::default() };
        let seen = report();
        let mut near = Join::new(CounterPort::generator(options, 1500, report()).unwrap(), a);
        let mut far = Join::new(b, CounterPort::new(1500, Arc::clone(&seen)));
        let near = async move {
            near.run().await.unwrap();
            // The memory's end follows its packets.
            poll_fn(|cx| near.b.poll_send_eof(cx)).await.unwrap();
        };
        let (_, ended) = tokio::join!(near, far.run());
        ended.unwrap();
        assert_eq!((seen.packets.get(), seen.bytes.get()), (count, count * 1280));
        assert_eq!((seen.lost(), seen.late.get(), seen.foreign.get()), (0, 0, 0));
        assert_eq!(seen.latency.count(), count);
    }

    #[tokio::test]
    async fn loss_and_order_are_told_apart() {
        let options = GeneratorOptions { count: Some(10), ..GeneratorOptions::default() };
        let mut generator = CounterPort::generator(options, 1500, report()).unwrap();
        let mut made = take_batch();
        poll_fn(|cx| generator.poll_receive(cx, &mut made)).await.unwrap();
        let mut counter = CounterPort::new(1500, report());
        let mut batch = take_batch();
        for index in [0, 1, 4, 2, 7, 9] {
            batch.push(made.get(index).unwrap().data, PacketMeta::default());
        }
        batch.push(&[0x60; 100], PacketMeta::default());
        batch.push(&[0x60; 1501], PacketMeta::default());
        poll_fn(|cx| counter.poll_send(cx, &mut batch)).await.unwrap();
        let seen = counter.report();
        assert_eq!((seen.packets.get(), seen.late.get(), seen.foreign.get()), (7, 1, 1));
        assert_eq!(seen.lost(), 4, "3, 5, 6 and 8");
        assert_eq!((counter.stats.packets_sent.get(), counter.stats.drops.total()), (7, 1));
    }

    #[tokio::test]
    async fn a_large_packet_counts_as_its_segments() {
        let mut counter = CounterPort::new(1500, report());
        let mut data = vec![0; HEADERS];
        for number in 0..5u64 {
            data.extend_from_slice(&[&MARK[..], &number.to_be_bytes(), &now_nanos().to_be_bytes()].concat());
            data.extend_from_slice(&[7; 76]);
        }
        let meta = PacketMeta { gso: Gso::Udp, gso_size: 100, header_len: 48, ..PacketMeta::default() };
        let mut batch = take_batch();
        batch.push(&data, meta);
        poll_fn(|cx| counter.poll_send(cx, &mut batch)).await.unwrap();
        let seen = counter.report();
        assert_eq!((seen.packets.get(), seen.latency.count(), seen.foreign.get()), (5, 5, 0));
        assert_eq!(counter.stats.packets_sent.get(), 5);
    }

    #[tokio::test]
    async fn a_rate_is_kept_and_never_exceeded() {
        let rate = 20_000;
        let options = GeneratorOptions { rate: Some(rate), count: Some(2000), ..GeneratorOptions::default() };
        let begun = now_nanos();
        let mut port = CounterPort::generator(options, 1500, report()).unwrap();
        let mut batch = take_batch();
        let mut made = 0;
        loop {
            poll_fn(|cx| port.poll_receivable(cx)).await.unwrap();
            if !poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap() {
                break;
            }
            assert!(!batch.is_empty());
            let now = now_nanos();
            for packet in batch.iter() {
                let (_, due) = read_mark(&packet.data[HEADERS..]).unwrap();
                assert!(due <= now, "a packet before its time");
            }
            made += batch.len() as u64;
            batch.clear();
            assert!(made <= (now - begun) * u64::from(rate) / 1_000_000_000 + 1);
        }
        assert_eq!(made, 2000);
        // The last is due at 99.95 ms.
        assert!(now_nanos() - begun >= 99_900_000);
    }

    #[tokio::test]
    async fn sizes_that_cannot_be_are_refused() {
        for size in [LEAST_SIZE - 1, LARGEST_PACKET + 1] {
            let options = GeneratorOptions { size, ..GeneratorOptions::default() };
            assert_eq!(CounterPort::generator(options, 1500, report()).err().unwrap().field(), Some("size"));
        }
        let options = GeneratorOptions { rate: Some(0), ..GeneratorOptions::default() };
        assert_eq!(CounterPort::generator(options, 1500, report()).err().unwrap().field(), Some("rate"));
    }
}
