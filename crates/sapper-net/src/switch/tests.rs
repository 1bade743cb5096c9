use std::collections::HashMap;
use std::future::poll_fn;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use sapper_proto::framing::Framing;
use sapper_proto::packet::{Gso, PacketMeta};
use socket2::{Domain, Socket, Type};

use super::*;
use crate::port::conformance::{packet, super_packet};
use crate::port::datagram::{DatagramOptions, DatagramPort};
use crate::port::framed::{FramedOptions, FramedPort};
use crate::port::memory::MemoryPort;
use crate::port::{PacketKind, PacketPort, PortAbilities, give_batch, take_batch};
use crate::stats::EndpointStats;
use crate::stream::fd::{SocketOptions, open_fd};

const PLAIN: PortAbilities = PortAbilities::plain(1500, PacketKind::Ip);
const ABLE: PortAbilities =
    PortAbilities { tso4: true, tso6: true, uso: true, partial_checksum: true, ..PLAIN };

/// Routes by the last byte of the IPv6 destination.
#[derive(Clone, Default)]
struct ByAddress(Arc<Mutex<HashMap<u8, PortId>>>, Arc<Mutex<Vec<String>>>);

impl ByAddress {
    fn set(&self, address: u8, port: PortId) {
        self.0.lock().unwrap().insert(address, port);
    }

    fn notes(&self) -> Vec<String> {
        self.1.lock().unwrap().clone()
    }
}

impl Forwarder for ByAddress {
    fn route(&mut self, _from: PortId, packet: Packet<'_>) -> Verdict {
        match packet.data[39] {
            0 => Verdict::Drop(DropReason::Malformed),
            1 => Verdict::Local,
            2 => Verdict::ToOthers,
            to => self
                .0
                .lock()
                .unwrap()
                .get(&to)
                .map_or(Verdict::Drop(DropReason::NoRoute), |&to| Verdict::To(to)),
        }
    }

    fn local(&mut self, _from: PortId, packet: Packet<'_>, answer: &mut PacketBatch) {
        answer.push(packet.data, *packet.meta);
        answer.push(packet.data, *packet.meta);
    }

    fn removed(&mut self, _port: PortId, how: Result<bool>) {
        let note = match how {
            Ok(true) => "removed".to_owned(),
            Ok(false) => "ended".to_owned(),
            Err(error) => error.kind().as_str().to_owned(),
        };
        self.1.lock().unwrap().push(note);
    }
}

/// A bridge of frames that learns where senders are.
#[derive(Default)]
struct Learning(HashMap<[u8; 6], PortId>);

impl Forwarder for Learning {
    fn route(&mut self, from: PortId, packet: Packet<'_>) -> Verdict {
        let Some((to, rest)) = packet.data.split_first_chunk::<6>() else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let Some(source) = rest.first_chunk::<6>() else { return Verdict::Drop(DropReason::Malformed) };
        self.0.insert(*source, from);
        match self.0.get(to) {
            Some(&port) if port == from => Verdict::Drop(DropReason::NoRoute),
            Some(&port) => Verdict::To(port),
            None => Verdict::ToOthers,
        }
    }

    fn removed(&mut self, port: PortId, _how: Result<bool>) {
        self.0.retain(|_, known| *known != port);
    }
}

/// Runs a switch beside a test.
async fn beside<F: Forwarder, T>(forwarder: F, test: impl AsyncFnOnce(SwitchHandle) -> T) -> (F, T) {
    let (switch, handle) = Switch::new(forwarder);
    let both = async { tokio::join!(switch.run(), test(handle)) };
    tokio::time::timeout(Duration::from_secs(20), both).await.expect("nothing hangs")
}

/// A port of the switch and the far side of it.
async fn join(handle: &SwitchHandle, capacity: usize, abilities: PortAbilities) -> (Member, MemoryPort) {
    let (near, far) = MemoryPort::pair(capacity, abilities);
    (handle.add(Box::new(near)).await.unwrap(), far)
}

fn to(address: u8, number: u64, len: usize) -> Vec<u8> {
    let mut packet = packet(number, len);
    packet[39] = address;
    packet
}

async fn send(port: &mut dyn PacketPort, packets: &[Vec<u8>]) {
    let mut batch = take_batch();
    for packet in packets {
        assert!(batch.push(packet, PacketMeta::default()));
    }
    poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    poll_fn(|cx| port.poll_flush(cx)).await.unwrap();
    give_batch(batch);
}

async fn receive(port: &mut dyn PacketPort, count: usize) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let mut batch = take_batch();
    while packets.len() < count {
        assert!(poll_fn(|cx| port.poll_receive(cx, &mut batch)).await.unwrap(), "the port ended");
        packets.extend(batch.iter().map(|packet| packet.data.to_vec()));
        batch.clear();
    }
    give_batch(batch);
    packets
}

fn dropped(drops: &Drops, reason: DropReason) -> u64 {
    drops.iter().find(|drop| drop.0 == reason).unwrap().1
}

fn datagram(fd: impl Into<OwnedFd>) -> DatagramPort {
    DatagramPort::new(fd.into(), DatagramOptions { max_packet: 1500, kind: PacketKind::Ip }).unwrap()
}

fn framed(stream: UnixStream) -> FramedPort {
    let stream = open_fd(stream.into(), "sink", &SocketOptions::default()).unwrap();
    FramedPort::new(stream, FramedOptions::new(Framing::from_name("ipv6").unwrap()), &[]).unwrap()
}

#[tokio::test]
async fn three_ports_of_three_kinds_reach_each_other() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (a, mut far_a) = join(&handle, 64, PLAIN).await;
        let (near, far) = UnixDatagram::pair().unwrap();
        let (b, mut far_b) = (handle.add(Box::new(datagram(near))).await.unwrap(), datagram(far));
        let (near, far) = UnixStream::pair().unwrap();
        let (c, mut far_c) = (handle.add(Box::new(framed(near))).await.unwrap(), framed(far));
        for (address, member) in [(11, &a), (12, &b), (13, &c)] {
            table.set(address, member.id);
        }
        let all: [&mut dyn PacketPort; 3] = [&mut far_a, &mut far_b, &mut far_c];
        let [a, b, c] = all;
        let run = |address| (0..50).map(|n| to(address, n, 100 + n as usize)).collect::<Vec<_>>();
        for (from, to, address) in [(0, 1, 12), (1, 2, 13), (2, 0, 11), (0, 2, 13), (1, 0, 11), (2, 1, 12)] {
            let packets = run(address);
            let ports = [&mut *a, &mut *b, &mut *c];
            let [mut one, mut other] = [None, None];
            for (index, port) in ports.into_iter().enumerate() {
                match index {
                    _ if index == from => one = Some(port),
                    _ if index == to => other = Some(port),
                    _ => {}
                }
            }
            let (one, other) = (one.unwrap(), other.unwrap());
            let ((), got) = tokio::join!(send(one, &packets), receive(other, 50));
            assert!(got == packets, "{from} to {to}");
        }
        // Several receivers in one batch, and packets for nobody.
        let mixed: Vec<_> =
            [12, 13, 99, 0, 13, 12].iter().zip(0..).map(|(&to_, n)| to(to_, n, 200)).collect();
        send(a, &mixed).await;
        assert_eq!(receive(b, 2).await, [mixed[0].clone(), mixed[5].clone()]);
        assert_eq!(receive(c, 2).await, [mixed[1].clone(), mixed[4].clone()]);
    })
    .await;
}

#[tokio::test]
async fn drops_are_counted_where_they_belong() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (a, mut far_a) = join(&handle, 64, PLAIN).await;
        let narrow = PortAbilities { max_packet: 300, ..PLAIN };
        let (b, mut far_b) = join(&handle, 64, narrow).await;
        table.set(12, b.id);
        send(&mut far_a, &[to(99, 0, 100), to(0, 1, 100), to(12, 2, 301), to(12, 3, 300)]).await;
        assert_eq!(receive(&mut far_b, 1).await, [to(12, 3, 300)]);
        assert_eq!(dropped(&a.stats.drops_in, DropReason::NoRoute), 1);
        assert_eq!(dropped(&a.stats.drops_in, DropReason::Malformed), 1);
        assert_eq!(dropped(&b.stats.drops_out, DropReason::TooLarge), 1);
        assert_eq!(a.stats.forwarded.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn frames_are_flooded_until_their_receiver_is_known() {
    let frames = PortAbilities::plain(1514, PacketKind::Ethernet);
    beside(Learning::default(), async |handle| {
        let (_, mut a) = join(&handle, 64, frames).await;
        let (_, mut b) = join(&handle, 64, frames).await;
        let (_, mut c) = join(&handle, 64, frames).await;
        let frame = |to: u8, from: u8| [&[to; 6][..], &[from; 6], &[8, 0], &[0; 46]].concat();
        send(&mut a, &[frame(2, 1)]).await;
        assert_eq!(receive(&mut b, 1).await, [frame(2, 1)]);
        assert_eq!(receive(&mut c, 1).await, [frame(2, 1)]);
        send(&mut b, &[frame(1, 2)]).await;
        assert_eq!(receive(&mut a, 1).await, [frame(1, 2)]);
        send(&mut a, &[frame(2, 1), frame(0xff, 1)]).await;
        assert_eq!(receive(&mut b, 2).await, [frame(2, 1), frame(0xff, 1)]);
        assert_eq!(receive(&mut c, 1).await, [frame(0xff, 1)], "what b alone was sent came to b alone");
    })
    .await;
}

#[tokio::test]
async fn a_port_that_takes_nothing_holds_nobody_up() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (_, mut a) = join(&handle, 64, PLAIN).await;
        let (b, mut far_b) = join(&handle, 64, PLAIN).await;
        let (stuck, far_stuck) = join(&handle, 1, PLAIN).await;
        table.set(12, b.id);
        table.set(13, stuck.id);
        let mut sent = 0;
        for round in 0..50 {
            let packets: Vec<_> =
                (0..60).map(|n| to(if n % 2 == 0 { 12 } else { 13 }, round * 60 + n, 1000)).collect();
            let ((), got) = tokio::join!(send(&mut a, &packets), receive(&mut far_b, 30));
            assert!(got.iter().eq(packets.iter().step_by(2)));
            sent += 30;
        }
        let lost = dropped(&stuck.stats.drops_out, DropReason::QueueFull);
        assert!(lost > 0 && lost < sent, "{lost} of {sent}");
        assert_eq!(b.stats.drops_out.total(), 0);
        drop(far_stuck);
    })
    .await;
}

#[tokio::test]
async fn what_waits_for_a_slow_port_goes_on_when_it_takes_again() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (_, mut a) = join(&handle, 256, PLAIN).await;
        let (b, mut far_b) = join(&handle, 3, PLAIN).await;
        table.set(12, b.id);
        let packets: Vec<_> = (0..200).map(|n| to(12, n, 1000)).collect();
        send(&mut a, &packets).await;
        assert!(receive(&mut far_b, 200).await == packets);
        assert_eq!(b.stats.drops_out.total(), 0);
    })
    .await;
}

#[tokio::test]
async fn large_packets_are_cut_for_the_port_that_takes_none() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (_, mut a) = join(&handle, 64, ABLE).await;
        let (b, mut able) = join(&handle, 64, ABLE).await;
        let (c, mut plain) = join(&handle, 64, PLAIN).await;
        table.set(12, b.id);
        table.set(13, c.id);
        for both in [false, true] {
            let (data, meta) = super_packet(10_000, 1000);
            let mut batch = take_batch();
            for address in [12, 13] {
                let mut data = data.clone();
                data[39] = if both { 2 } else { address };
                batch.push(&data, meta);
            }
            poll_fn(|cx| a.poll_send(cx, &mut batch)).await.unwrap();
            let mut received = take_batch();
            let count = if both { 2 } else { 1 };
            while received.len() < count {
                poll_fn(|cx| able.poll_receive(cx, &mut received)).await.unwrap();
            }
            assert!(received.iter().all(|got| got.meta.gso == Gso::TcpV6 && got.data[60..] == data[60..]));
            let segments = receive(&mut plain, 10 * count).await;
            let payload: Vec<_> = segments.iter().flat_map(|segment| segment[60..].to_vec()).collect();
            assert!(payload == data[60..].repeat(count));
        }
        assert_eq!(c.stats.drops_out.total(), 0);
    })
    .await;
}

#[tokio::test]
async fn partial_checksums_are_completed_or_their_packets_dropped() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (_, mut a) = join(&handle, 64, ABLE).await;
        let (b, mut far_b) = join(&handle, 64, PLAIN).await;
        table.set(12, b.id);
        let mut batch = take_batch();
        for start in [199, 40] {
            let checksum = sapper_proto::packet::Checksum::Partial { start, offset: 6 };
            batch.push(&to(12, 1, 200), PacketMeta { checksum, ..PacketMeta::default() });
        }
        batch.push(&to(12, 2, 200), PacketMeta::default());
        poll_fn(|cx| a.poll_send(cx, &mut batch)).await.unwrap();
        let got = receive(&mut far_b, 2).await;
        assert_ne!(got[0], to(12, 1, 200), "it was summed");
        assert_eq!(got[1], to(12, 2, 200));
        assert_eq!(dropped(&b.stats.drops_out, DropReason::BadOffload), 1);
    })
    .await;
}

#[tokio::test]
async fn two_greedy_sources_share_one_way_out() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (first, mut a) = join(&handle, 256, PLAIN).await;
        let (second, mut b) = join(&handle, 256, PLAIN).await;
        let (out, mut far) = join(&handle, 16, PLAIN).await;
        table.set(13, out.id);
        let packets: Vec<_> = (0..30).map(|n| to(13, n, 1000)).collect();
        let sending = async {
            for _ in 0..500 {
                tokio::join!(send(&mut a, &packets), send(&mut b, &packets));
                tokio::task::yield_now().await;
            }
        };
        let receiving = async {
            loop {
                receive(&mut far, 1).await;
            }
        };
        tokio::select! {
            () = sending => {}
            () = receiving => {}
        }
        let (a, b) = (first.stats.forwarded.get(), second.stats.forwarded.get());
        assert!(a + b < 30_000, "there is not room for all: {a} and {b}");
        assert!(a + b > 1000 && a < 2 * b && b < 2 * a, "{a} and {b}");
    })
    .await;
}

#[tokio::test]
async fn ports_come_and_go_while_it_runs() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (_, mut a) = join(&handle, 64, PLAIN).await;
        let (b, mut far_b) = join(&handle, 64, PLAIN).await;
        table.set(12, b.id);
        send(&mut a, &[to(12, 1, 100)]).await;
        receive(&mut far_b, 1).await;
        let mut back = handle.remove(b.id).await.unwrap().expect("it was there");
        send(back.as_mut(), &[to(12, 2, 100)]).await;
        assert_eq!(receive(&mut far_b, 1).await, [to(12, 2, 100)], "it is the same port");
        assert!(handle.remove(b.id).await.unwrap().is_none());
        // Its place is used again, its name is not.
        let (c, mut far_c) = join(&handle, 64, PLAIN).await;
        assert_ne!(c.id, b.id);
        send(&mut a, &[to(12, 3, 100)]).await;
        table.set(12, c.id);
        send(&mut a, &[to(12, 4, 100)]).await;
        assert!(receive(&mut far_c, 1).await.ends_with(&[to(12, 4, 100)]));
    })
    .await;
    assert_eq!(table.notes()[0], "removed");
}

#[tokio::test]
async fn ports_that_end_or_fail_are_taken_out_with_the_reason() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (_, mut a) = join(&handle, 64, PLAIN).await;
        let (_, gone) = join(&handle, 64, PLAIN).await;
        drop(gone);
        while table.notes().is_empty() {
            tokio::task::yield_now().await;
        }
        let (near, far) = UnixDatagram::pair().unwrap();
        let b = handle.add(Box::new(datagram(near))).await.unwrap();
        table.set(12, b.id);
        drop(far);
        send(&mut a, &[to(12, 1, 100)]).await;
        while table.notes().len() < 2 {
            tokio::task::yield_now().await;
        }
        let (near, far) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        handle.add(Box::new(datagram(near))).await.unwrap();
        drop(far);
        while table.notes().len() < 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(table.notes()[..3], ["ended", "connection_lost", "ended"]);
}

#[tokio::test]
async fn the_forwarder_answers_for_itself() {
    beside(ByAddress::default(), async |handle| {
        let (_, mut a) = join(&handle, 64, PLAIN).await;
        send(&mut a, &[to(1, 7, 100)]).await;
        assert_eq!(receive(&mut a, 2).await, vec![to(1, 7, 100); 2]);
    })
    .await;
}

#[tokio::test]
async fn it_ends_with_its_last_handle() {
    let (switch, handle) = Switch::new(ByAddress::default());
    let (near, mut far) = MemoryPort::pair(4, PLAIN);
    let other = handle.clone();
    let running = tokio::spawn(switch.run());
    other.add(Box::new(near)).await.unwrap();
    drop((handle, other));
    let forwarder = running.await.unwrap();
    assert_eq!(forwarder.notes(), ["removed"]);
    let mut batch = take_batch();
    assert!(!poll_fn(|cx| far.poll_receive(cx, &mut batch)).await.unwrap(), "its ports went with it");
    let (switch, handle) = Switch::new(ByAddress::default());
    drop(switch);
    let (near, _far) = MemoryPort::pair(4, PLAIN);
    assert_eq!(handle.add(Box::new(near)).await.err().unwrap().kind(), ErrorKind::Closed);
}

/// A port that counts how often it was told to give its memory back.
struct Watched(MemoryPort, Arc<AtomicUsize>);

impl PacketPort for Watched {
    fn abilities(&self) -> PortAbilities {
        self.0.abilities()
    }
    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        self.0.poll_receive(cx, batch)
    }
    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.0.poll_receivable(cx)
    }
    fn poll_send(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        self.0.poll_send(cx, batch)
    }
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.0.poll_flush(cx)
    }
    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.0.poll_send_eof(cx)
    }
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn release_idle(&mut self) {
        self.1.fetch_add(1, Relaxed);
    }
    fn stats(&self) -> &Arc<EndpointStats> {
        self.0.stats()
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_port_gives_its_memory_back() {
    let table = ByAddress::default();
    beside(table.clone(), async |handle| {
        let (_, mut a) = join(&handle, 64, PLAIN).await;
        let (near, mut far) = MemoryPort::pair(4, PLAIN);
        let released = Arc::new(AtomicUsize::new(0));
        let watched = handle.add(Box::new(Watched(near, Arc::clone(&released)))).await.unwrap();
        table.set(12, watched.id);
        for round in 0..3 {
            let packets = [to(12, round as u64, 100)];
            let ((), got) = tokio::join!(send(&mut a, &packets), receive(&mut far, 1));
            assert_eq!(got, packets);
            assert_eq!(released.load(Relaxed), round, "not while it is at work");
            // Time goes by on its own while nobody has anything to do, and no timer runs for ever.
            tokio::time::sleep(Duration::from_secs(4)).await;
            assert_eq!(released.load(Relaxed), round + 1);
        }
    })
    .await;
}
