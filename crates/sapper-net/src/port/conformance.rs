//! What every packet port keeps to, as one suite. A new port is done when it passes.
//!
//! [`check`] makes a fresh [`Subject`] for each rule and panics with the rule that was broken.

use std::future::{Future, poll_fn};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::task::Poll;
use std::time::Duration;

use sapper_proto::packet::{Checksum, Gso, Packet, PacketMeta, checksum};

use super::{BoxPort, PacketBatch, PacketPort, give_batch, take_batch};
use crate::error::Result;
use crate::fd;
use crate::stats::DropReason;

/// Nothing here takes this long: whoever waits longer hangs.
const DEADLINE: Duration = Duration::from_secs(20);

/// More than any port may queue before it makes its sender wait.
const ABSURD_QUEUE: u64 = 1 << 28;

/// A port and its far side.
pub struct Subject {
    /// The port under test.
    pub port: BoxPort,
    /// What the port sends comes out here, and the other way round.
    pub far: BoxPort,
    /// Full queues make the sender wait. A port that loses packets instead is sent little at once.
    pub lossless: bool,
    /// The port's end reaches the far side and the far side's end the port.
    pub ends: bool,
}

/// Runs the whole suite.
pub async fn check(make: impl AsyncFn() -> Subject) {
    within("whole and in order", whole_and_in_order(make().await)).await;
    within("both directions at once", both_at_once(make().await)).await;
    within("a sender waits", a_sender_waits(make().await)).await;
    within("too large", too_large(make().await)).await;
    within("offloads", offloads(make().await)).await;
    within("idle", idle(make().await)).await;
    within("the end", the_end(make().await)).await;
    within("a far side that vanishes", far_side_vanishes(make().await)).await;
    within("no descriptor stays", no_descriptor_stays(make().await)).await;
}

async fn within(rule: &str, check: impl Future<Output = ()>) {
    assert!(tokio::time::timeout(DEADLINE, check).await.is_ok(), "{rule}: still waiting after {DEADLINE:?}");
}

/// Headers of the packets made here: IPv6 and UDP.
const HEADERS: usize = 48;

/// An IPv6 UDP packet of `len` bytes whose content follows from its number.
pub fn packet(number: u64, len: usize) -> Vec<u8> {
    assert!(len >= HEADERS + 8);
    let mut packet = vec![0; len];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    packet[6] = 17;
    packet[7] = 64;
    packet[8..24].copy_from_slice(&SOURCE.octets());
    packet[24..40].copy_from_slice(&DESTINATION.octets());
    packet[40..48].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0]);
    packet[44..46].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    packet[48..56].copy_from_slice(&number.to_be_bytes());
    for (index, byte) in packet[56..].iter_mut().enumerate() {
        *byte = (number as usize).wrapping_mul(31).wrapping_add(index * 7) as u8;
    }
    let pseudo = checksum::pseudo_header(&packet, 17, len - 40).expect("it is an IPv6 packet");
    packet[46..48].copy_from_slice(&pseudo.to_be_bytes());
    checksum::complete(&mut packet, 40, 6);
    packet
}

const SOURCE: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x5a, 0, 0, 0, 0, 0, 1);
const DESTINATION: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x5a, 0, 0, 0, 0, 0, 2);

/// The addresses of the packets made here, for far sides that have to know them.
pub const ADDRESSES: (IpAddr, IpAddr) = (IpAddr::V6(SOURCE), IpAddr::V6(DESTINATION));

/// An IPv6 TCP super-packet with `payload` bytes, to be cut into segments of `size`.
pub fn super_packet(payload: usize, size: u16) -> (Vec<u8>, PacketMeta) {
    let mut packet = packet(7, 60 + payload);
    packet[6] = 6;
    packet[40..60].fill(0);
    packet[40..44].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    packet[52] = 5 << 4;
    packet[53] = 0x10;
    let pseudo = checksum::pseudo_header(&packet, 6, 20 + payload).expect("it is an IPv6 packet");
    packet[56..58].copy_from_slice(&pseudo.to_be_bytes());
    let meta = PacketMeta {
        gso: Gso::TcpV6,
        gso_size: size,
        header_len: 60,
        checksum: Checksum::Partial { start: 40, offset: 16 },
        ..PacketMeta::default()
    };
    (packet, meta)
}

impl Subject {
    /// Largest packet that both sides take.
    fn largest(&self) -> usize {
        self.port.abilities().max_packet.min(self.far.abilities().max_packet)
    }

    /// Lengths of a test's packets. A port that loses packets is not sent more than its queue holds.
    fn lengths(&self, count: usize) -> Vec<usize> {
        let (least, largest) = (HEADERS + 8, self.largest());
        let count = if self.lossless { count } else { count.min(16) };
        (0..count)
            .map(|index| match index % 4 {
                0 => least,
                1 => largest,
                _ => least + (index * 7919) % (largest - least),
            })
            .collect()
    }
}

/// Sends packets of these lengths, numbered from `first`, until the port has passed them on.
async fn send(port: &mut dyn PacketPort, first: u64, lengths: &[usize]) -> Result<()> {
    let mut batch = take_batch();
    let mut number = first;
    let mut lengths = lengths.iter().peekable();
    while lengths.peek().is_some() {
        while let Some(len) = lengths.next_if(|&&len| batch.has_room(len)) {
            assert!(batch.push(&packet(number, *len), PacketMeta::default()));
            number += 1;
        }
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await?;
        assert!(batch.is_empty(), "ready, but packets are left");
    }
    poll_fn(|cx| port.poll_flush(cx)).await?;
    give_batch(batch);
    Ok(())
}

/// Receives as many packets and compares them.
async fn expect(port: &mut dyn PacketPort, first: u64, lengths: &[usize]) {
    let mut batch = take_batch();
    let (mut number, mut lengths) = (first, lengths.iter());
    while lengths.len() > 0 {
        let more = poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.expect("receiving works");
        assert!(more, "the end came after {} packets", number - first);
        assert!(!batch.is_empty(), "ready without a packet");
        for data in batch.iter().flat_map(datagrams) {
            let len = *lengths.next().expect("not more packets than were sent");
            assert_eq!(data.len(), len, "packet {number} has its length");
            assert_eq!(data, packet(number, len), "packet {number} is not corrupted");
            number += 1;
        }
        batch.clear();
    }
    give_batch(batch);
}

/// Datagrams that came back to back are packets of their own; nothing else comes joined here.
fn datagrams<'a>(packet: Packet<'a>) -> impl Iterator<Item = &'a [u8]> {
    let size = match packet.meta.gso {
        Gso::None => usize::MAX,
        Gso::Datagrams => usize::from(packet.meta.gso_size),
        gso => panic!("nobody sent {gso:?}"),
    };
    packet.data.chunks(size)
}

async fn nothing_waits(port: &mut dyn PacketPort) {
    let mut batch = PacketBatch::new(1 << 18, 4);
    let pending = poll_fn(|cx| Poll::Ready(port.poll_receive(cx, &mut batch).is_pending())).await;
    assert!(pending && batch.is_empty(), "a packet that nobody sent: {:?}", batch.get(0));
}

async fn whole_and_in_order(mut subject: Subject) {
    nothing_waits(&mut *subject.port).await;
    let lengths = subject.lengths(1000);
    let (sent, ()) =
        tokio::join!(send(&mut *subject.port, 0, &lengths), expect(&mut *subject.far, 0, &lengths));
    sent.expect("sending works");
    let (sent, ()) =
        tokio::join!(send(&mut *subject.far, 5, &lengths), expect(&mut *subject.port, 5, &lengths));
    sent.expect("sending works");
    nothing_waits(&mut *subject.port).await;
    let stats = subject.port.stats();
    let bytes: usize = lengths.iter().sum();
    assert_eq!(stats.packets_sent.get(), lengths.len() as u64, "packets sent are counted");
    assert_eq!(stats.packets_received.get(), lengths.len() as u64, "packets received are counted");
    assert_eq!((stats.bytes_sent.get(), stats.bytes_received.get()), (bytes as u64, bytes as u64));
    assert_eq!(stats.drops.total(), 0, "nothing was dropped");
}

/// One task owns the port, so the directions take turns; neither may stop the other.
async fn both_at_once(mut subject: Subject) {
    let lengths = subject.lengths(500);
    let (port, far) = (&mut subject.port, &mut subject.far);
    let near_side = exchange(&mut **port, 0, 10_000, &lengths);
    let far_side = exchange(&mut **far, 10_000, 0, &lengths);
    tokio::join!(near_side, far_side);
}

async fn exchange(port: &mut dyn PacketPort, ours: u64, theirs: u64, lengths: &[usize]) {
    let (mut outgoing, mut incoming) = (take_batch(), take_batch());
    let (mut sent, mut received) = (0, 0);
    poll_fn(|cx| {
        loop {
            while sent < lengths.len() && outgoing.has_room(lengths[sent]) {
                outgoing.push(&packet(ours + sent as u64, lengths[sent]), PacketMeta::default());
                sent += 1;
            }
            let sending = port.poll_send(cx, &mut outgoing).map(|done| done.expect("sending works"));
            let receiving = if received < lengths.len() {
                port.poll_receive(cx, &mut incoming).map(|more| assert!(more.expect("receiving works")))
            } else {
                Poll::Pending
            };
            for got in incoming.iter().flat_map(datagrams) {
                assert_eq!(got, packet(theirs + received as u64, lengths[received]));
                received += 1;
            }
            incoming.clear();
            let all_sent = sent == lengths.len() && outgoing.is_empty();
            if all_sent && received == lengths.len() {
                return port.poll_flush(cx).map(|done| done.expect("flushing works"));
            }
            if (all_sent || sending.is_pending()) && receiving.is_pending() {
                // What was taken must not wait for a flush that nobody asks for.
                let _ = port.poll_flush(cx);
                return Poll::Pending;
            }
        }
    })
    .await;
}

async fn a_sender_waits(mut subject: Subject) {
    if !subject.lossless {
        return;
    }
    let len = subject.largest().min(1280);
    let mut batch = take_batch();
    let mut pushed = 0;
    loop {
        while batch.has_room(len) && batch.push(&packet(pushed, len), PacketMeta::default()) {
            pushed += 1;
        }
        let before = batch.len();
        let sending = poll_fn(|cx| Poll::Ready(subject.port.poll_send(cx, &mut batch))).await;
        if let Poll::Ready(done) = sending {
            done.expect("sending works");
        } else if batch.len() == before {
            break;
        }
        assert!(pushed * (len as u64) < ABSURD_QUEUE, "the port's queue has no bound");
    }
    let lengths = vec![len; pushed as usize];
    let port = &mut subject.port;
    let rest = async {
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.expect("the sender is woken and goes on");
        poll_fn(|cx| port.poll_flush(cx)).await.expect("flushing works");
    };
    tokio::join!(rest, expect(&mut *subject.far, 0, &lengths));
    assert_eq!(subject.port.stats().drops.total(), 0, "a port that waits drops nothing");
}

async fn too_large(mut subject: Subject) {
    let largest = subject.port.abilities().max_packet;
    let mut batch = take_batch();
    batch.push(&packet(0, 100), PacketMeta::default());
    assert!(batch.push(&packet(1, largest + 1), PacketMeta::default()));
    batch.push(&[], PacketMeta::default());
    batch.push(&packet(1, 101), PacketMeta::default());
    let port = &mut subject.port;
    let sending = async {
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.expect("a large packet is no error");
        poll_fn(|cx| port.poll_flush(cx)).await.expect("flushing works");
    };
    tokio::join!(sending, expect(&mut *subject.far, 0, &[100, 101]));
    let dropped = |reason| subject.port.stats().drops.iter().find(|drop| drop.0 == reason).map(|drop| drop.1);
    assert_eq!(dropped(DropReason::TooLarge), Some(1), "a packet above the maximum is counted");
    assert_eq!(dropped(DropReason::Malformed), Some(1), "a packet without bytes is counted");
}

async fn offloads(mut subject: Subject) {
    let abilities = subject.port.abilities();
    let (data, meta) = super_packet(5000, 1000);
    let mut batch = take_batch();
    batch.push(&data, meta);
    batch.push(&packet(0, 100), PacketMeta::default());
    let port = &mut subject.port;
    let sending = async {
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.expect("a large packet is no error");
        poll_fn(|cx| port.poll_flush(cx)).await.expect("flushing works");
    };
    if !abilities.tso6 {
        tokio::join!(sending, expect(&mut *subject.far, 0, &[100]));
        let drops = subject.port.stats().drops.iter().find(|drop| drop.0 == DropReason::BadOffload);
        assert_eq!(drops.map(|drop| drop.1), Some(1), "a large packet must not leave as an ordinary one");
        return;
    }
    // Whole or in segments, but nothing else.
    let far = &mut subject.far;
    let receiving = async {
        let mut received = take_batch();
        let mut payload = Vec::new();
        loop {
            poll_fn(|cx| far.poll_receive(cx, &mut received)).await.expect("receiving works");
            for got in received.iter() {
                if got.data[6] == 17 {
                    assert_eq!(got.data, packet(0, 100));
                    return payload;
                }
                assert!(got.meta.gso == Gso::TcpV6 || got.data.len() <= 1060, "a segment has its size");
                payload.extend_from_slice(&got.data[60..]);
            }
            received.clear();
        }
    };
    let ((), payload) = tokio::join!(sending, receiving);
    assert!(payload == data[60..], "the payload is whole");
    assert_eq!(subject.port.stats().packets_sent.get(), 6, "a large packet counts as its segments");
}

async fn idle(mut subject: Subject) {
    for round in 0..3 {
        let port = &mut subject.port;
        let waiting = poll_fn(|cx| Poll::Ready(port.poll_receivable(cx).is_pending())).await;
        // Ready without a packet is allowed (an event may be late), as long as nothing is received.
        if !waiting {
            nothing_waits(&mut **port).await;
        }
        let receiving = async {
            poll_fn(|cx| port.poll_receivable(cx)).await.expect("waiting works");
            expect(&mut **port, round, &[200]).await;
        };
        let (sent, ()) = tokio::join!(send(&mut *subject.far, round, &[200]), receiving);
        sent.expect("sending works");
        let (sent, ()) =
            tokio::join!(send(&mut *subject.port, round, &[200]), expect(&mut *subject.far, round, &[200]));
        sent.expect("sending works");
        subject.port.release_idle();
        subject.far.release_idle();
    }
}

async fn the_end(mut subject: Subject) {
    if !subject.ends {
        return;
    }
    let lengths = subject.lengths(20);
    let port = &mut subject.port;
    let sending = async {
        send(&mut **port, 0, &lengths).await.expect("sending works");
        for _ in 0..2 {
            poll_fn(|cx| port.poll_send_eof(cx)).await.expect("the end can be said, and again");
        }
    };
    tokio::join!(sending, expect(&mut *subject.far, 0, &lengths));
    let mut batch = take_batch();
    let more = poll_fn(|cx| subject.far.poll_receive(cx, &mut batch)).await.expect("the end is no error");
    assert!(!more && batch.is_empty(), "the far side sees the end");
    let more = poll_fn(|cx| subject.far.poll_receive(cx, &mut batch)).await.expect("the end is no error");
    assert!(!more, "the end lasts");
    // The other direction goes on.
    let (sent, ()) =
        tokio::join!(send(&mut *subject.far, 0, &lengths), expect(&mut *subject.port, 0, &lengths));
    sent.expect("the other direction goes on");
}

async fn far_side_vanishes(subject: Subject) {
    let Subject { mut port, far, ends, .. } = subject;
    drop(far);
    let mut batch = take_batch();
    if ends {
        let received = poll_fn(|cx| port.poll_receive(cx, &mut batch)).await;
        assert!(!received.unwrap_or(false), "nothing comes any more");
    }
    // An error, or drops: but no waiting for somebody who is gone.
    for number in 0..2000 {
        batch.push(&packet(number, 200), PacketMeta::default());
        let sending = poll_fn(|cx| Poll::Ready(port.poll_send(cx, &mut batch))).await;
        match sending {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => return,
            Poll::Pending => {
                // A full queue below may wait for the news to arrive, not longer.
                let _ = poll_fn(|cx| port.poll_send(cx, &mut batch)).await;
                return;
            }
        }
    }
}

async fn no_descriptor_stays(subject: Subject) {
    let Some(fd) = subject.port.as_fd() else { return };
    let (number, before) = (fd.as_raw_fd(), fd::identity(fd).expect("an open descriptor"));
    drop(subject);
    // A task that had it ends at its next turn; until then nothing is wrong.
    while is_open(number, before) {
        tokio::task::yield_now().await;
    }
}

/// Whether the number is still the same socket. By now it may be another thread's; all TUNs are one
/// device, so of them this cannot be said.
fn is_open(number: i32, before: (u64, u64)) -> bool {
    let Ok(copy) = fd::duplicate(number, "fd") else { return false };
    let tun = fd::classify(copy.as_fd(), "fd").is_ok_and(|kind| matches!(kind, fd::FdKind::Tun(_)));
    !tun && fd::identity(copy.as_fd()).expect("an open descriptor") == before
}
