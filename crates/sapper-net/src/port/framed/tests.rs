use std::future::poll_fn;
use std::time::Duration;

use sapper_proto::framing::superframe::{HELLO_LEN, Hello};
use sapper_proto::packet::{Checksum, Gso, Offloads, PacketMeta};

use super::super::conformance::{self, Subject, packet};
use super::super::testing::{Manner, MemoryStream};
use super::super::{give_batch, take_batch};
use super::*;
use crate::error::{Direction, Phase};
use crate::stats::DropReason;
use crate::stream::RecordMarks;

const WHOLE: Manner = Manner { capacity: 1 << 18, step: usize::MAX, records: false };
const RECORDS: Manner = Manner { capacity: 1 << 18, step: usize::MAX, records: true };

fn port(stream: MemoryStream, framing: &str) -> FramedPort {
    FramedPort::new(Box::new(stream), options(framing), &[]).unwrap()
}

fn options(framing: &str) -> FramedOptions {
    let framing = Framing::from_name(framing).unwrap();
    let mut options = FramedOptions::new(framing);
    if framing == Framing::Superframe {
        let hello = Hello::new(Offloads::ALL, 65_535);
        options.agreement = Some(hello.agree(&hello).unwrap());
    }
    options
}

async fn receive(port: &mut FramedPort) -> Result<Vec<Vec<u8>>> {
    let mut batch = take_batch();
    let more = poll_fn(|cx| port.poll_receive(cx, &mut batch)).await;
    let packets = batch.iter().map(|packet| packet.data.to_vec()).collect();
    give_batch(batch);
    more.map(|more| if more { packets } else { Vec::new() })
}

async fn send(port: &mut FramedPort, packets: &[Vec<u8>]) {
    let mut batch = take_batch();
    for packet in packets {
        assert!(batch.push(packet, PacketMeta::default()));
    }
    poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
    give_batch(batch);
}

#[tokio::test]
async fn every_framing_conforms_over_streams_of_every_manner() {
    let manners = [
        WHOLE,
        RECORDS,
        Manner { capacity: 5000, step: 1777, records: false },
        Manner { capacity: 1000, step: 97, records: false },
        Manner { capacity: 5000, step: 3000, records: true },
    ];
    for (name, _) in Framing::NAMES {
        if name == "ipv4" {
            continue; // The suite's packets are IPv6.
        }
        for manner in manners {
            for records_per_write in [1, 256] {
                conformance::check(async || {
                    let (a, b) = MemoryStream::pair(manner);
                    let mut options = options(name);
                    options.records_per_write = records_per_write;
                    options.max_packet = options.max_packet.min(4_096);
                    let port = FramedPort::new(Box::new(a), options, &[]).unwrap();
                    let far = FramedPort::new(Box::new(b), options, &[]).unwrap();
                    Subject { port: Box::new(port), far: Box::new(far), lossless: true, ends: true }
                })
                .await;
            }
        }
    }
}

#[tokio::test]
async fn each_packet_is_one_slice_and_a_write_has_as_many_as_asked_for() {
    for (framing, prefix) in [("ipv6", 0), ("u16", 2), ("u32", 4)] {
        for (per_write, writes) in [(1, vec![1; 10]), (4, vec![4, 4, 2]), (64, vec![10])] {
            let (a, b) = MemoryStream::pair(RECORDS);
            let mut options = options(framing);
            options.records_per_write = per_write;
            let mut port = FramedPort::new(Box::new(a), options, &[]).unwrap();
            let packets: Vec<_> = (0..10).map(|number| packet(number, 100 + number as usize)).collect();
            send(&mut port, &packets).await;
            assert_eq!(b.writes_seen(), writes);
            let lengths: Vec<_> = packets.iter().map(|packet| packet.len() + prefix).collect();
            assert_eq!(b.slices_waiting(), lengths, "{framing}: the prefix is inside the packet's record");
        }
    }
}

#[tokio::test]
async fn packets_without_headroom_go_from_one_framing_to_another() {
    let (a, b) = MemoryStream::pair(RECORDS);
    let (c, d) = MemoryStream::pair(RECORDS);
    let (mut from, mut to) = (port(b, "ipv6"), port(c, "u32"));
    let packets: Vec<_> = (0..300).map(|number| packet(number, 60 + number as usize)).collect();
    a.inject(&packets.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let mut far = port(d, "u32");
    let mut arrived = Vec::new();
    while arrived.len() < packets.len() {
        let mut batch = take_batch();
        poll_fn(|cx| from.poll_receive(cx, &mut batch)).await.unwrap();
        poll_fn(|cx| to.poll_send(cx, &mut batch)).await.unwrap();
        give_batch(batch);
        arrived.extend(receive(&mut far).await.unwrap());
    }
    assert!(arrived == packets);
}

#[tokio::test]
async fn more_small_packets_than_a_batch_holds_wait_beside_it() {
    let (a, b) = MemoryStream::pair(WHOLE);
    let mut port = port(b, "ipv6");
    let packets: Vec<_> = (0..3000).map(|number| packet(number, 56)).collect();
    let last = packet(3000, 1000);
    a.inject(&[&packets.concat(), &last[..999]]);
    let mut arrived = Vec::new();
    while arrived.len() < packets.len() {
        // What waits must be announced: no further byte will come.
        poll_fn(|cx| port.poll_receivable(cx)).await.unwrap();
        arrived.extend(receive(&mut port).await.unwrap());
    }
    assert!(arrived == packets);
    let pending = poll_fn(|cx| Poll::Ready(port.poll_receivable(cx).is_pending())).await;
    assert!(pending);
    a.inject(&[&last[999..]]);
    assert_eq!(receive(&mut port).await.unwrap(), [last]);
    assert_eq!(port.receiver.rest.len(), 0);
}

#[tokio::test]
async fn bytes_that_were_read_before_come_first() {
    let (a, b) = MemoryStream::pair(WHOLE);
    let (first, second) = (packet(1, 100), packet(2, 200));
    let early = [&first[..], &second[..50]].concat();
    let mut port = FramedPort::new(Box::new(b), options("ipv6"), &early).unwrap();
    poll_fn(|cx| port.poll_receivable(cx)).await.unwrap();
    assert_eq!(receive(&mut port).await.unwrap(), [first]);
    a.inject(&[&second[50..]]);
    assert_eq!(receive(&mut port).await.unwrap(), [second]);
}

#[tokio::test]
async fn a_stream_that_ends_within_a_packet_is_an_error() {
    let (a, b) = MemoryStream::pair(WHOLE);
    let mut port = port(b, "u16");
    a.inject(&[&[0, 3, 1, 2, 3, 0]]);
    drop(a);
    assert_eq!(receive(&mut port).await.unwrap(), [[1, 2, 3]]);
    let error = receive(&mut port).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::RemoteProtocol, Some("truncated")));
    assert_eq!(error.direction(), Some(Direction::Decapsulate));
}

#[tokio::test]
async fn a_bad_header_ends_the_stream_after_the_packets_before_it() {
    for (framing, good, bad, reason) in [
        ("ipv6", packet(1, 100), vec![0x45; 60], "wrong_version"),
        ("ip", packet(1, 100), vec![0x95; 60], "bad_header"),
        ("u32", vec![0, 0, 0, 1, 9], vec![0x7f, 0xff, 0xff, 0xff], "bad_length"),
        ("u16", vec![0, 1, 9], vec![0, 0], "bad_length"),
        (
            "superframe",
            vec![],
            [vec![0, 0, 0, 58, 1, 77, 0, 0, 0, 0, 0, 0, 0, 0], vec![0x60; 48]].concat(),
            "bad_offload",
        ),
    ] {
        let (a, b) = MemoryStream::pair(WHOLE);
        let mut port = port(b, framing);
        a.inject(&[&good, &bad]);
        if !good.is_empty() {
            assert_eq!(receive(&mut port).await.unwrap().len(), 1, "{framing}");
        }
        for _ in 0..2 {
            let error = receive(&mut port).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::RemoteProtocol, "{framing}: {error}");
            assert_eq!(error.reason(), Some(reason), "{error}");
            assert_eq!(error.phase(), Some(Phase::Transfer));
            assert!(error.message().contains(&format!("{:02x}", bad[0])), "{error}: names the bytes");
        }
    }
}

#[tokio::test]
async fn resynchronising_goes_on_at_a_record_and_nowhere_else() {
    let (a, b) = MemoryStream::pair(RECORDS);
    let mut options = options("ipv6");
    options.resync = true;
    let mut port = FramedPort::new(Box::new(b), options, &[]).unwrap();
    let good: Vec<_> = (0..6).map(|number| packet(number, 100 + number as usize)).collect();
    // The second record's packet would be found in the middle of a record as well.
    let bad = [&[0xee; 33][..], &good[0]].concat();
    a.inject(&[&good[0], &bad, &good[1], &[0xff; 8], &[0xff; 9], &good[2]]);
    assert_eq!(receive(&mut port).await.unwrap(), good[..3]);
    assert_eq!(port.stats.receive_drops.iter().find(|drop| drop.0 == DropReason::Resync).unwrap().1, 3);
    // Records to skip that are not there yet.
    a.inject(&[&[0xee; 40]]);
    let waiting = tokio::spawn(async move { (receive(&mut port).await, port) });
    tokio::task::yield_now().await;
    a.inject(&[&good[3], &good[4]]);
    let (received, mut port) = waiting.await.unwrap();
    assert_eq!(received.unwrap(), good[3..5]);
    a.inject(&[&good[5]]);
    assert_eq!(receive(&mut port).await.unwrap(), good[5..]);
    assert!(port.receiver.records.len() <= 1, "records behind us are forgotten");
}

#[tokio::test]
async fn resynchronising_survives_a_batch_that_is_full() {
    let (a, b) = MemoryStream::pair(RECORDS);
    let mut options = options("u16");
    options.resync = true;
    let mut port = FramedPort::new(Box::new(b), options, &[]).unwrap();
    let record = |n: usize| if n % 100 == 99 { vec![0, 0, 1] } else { vec![0, 2, n as u8, (n >> 8) as u8] };
    let records: Vec<_> = (0..1000).map(record).collect();
    a.inject(&records.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let mut arrived = Vec::new();
    while arrived.len() < 990 {
        arrived.extend(receive(&mut port).await.unwrap());
    }
    let expected: Vec<_> =
        records.iter().filter(|record| record.len() == 4).map(|r| r[2..].to_vec()).collect();
    assert!(arrived == expected);
    assert_eq!(port.stats.receive_drops.total(), 10);
}

#[tokio::test]
async fn a_stream_without_records_cannot_be_resynchronised() {
    let (a, b) = MemoryStream::pair(WHOLE);
    let mut options = options("ipv6");
    options.resync = true;
    let mut port = FramedPort::new(Box::new(b), options, &[]).unwrap();
    a.inject(&[&[0xee; 40]]);
    assert_eq!(receive(&mut port).await.unwrap_err().reason(), Some("bad_header"));
}

#[tokio::test]
async fn packets_that_the_framing_does_not_carry_are_dropped_and_counted() {
    let (a, b) = MemoryStream::pair(WHOLE);
    let mut port = port(a, "ipv4");
    send(&mut port, &[packet(1, 100), b"no packet".to_vec()]).await;
    assert_eq!(port.stats.drops.iter().find(|drop| drop.0 == DropReason::Malformed).unwrap().1, 2);
    assert_eq!(b.slices_waiting(), [0; 0]);
}

#[tokio::test]
async fn a_super_packet_travels_whole_in_a_superframe() {
    let (a, b) = MemoryStream::pair(Manner { capacity: 70_000, step: 20_000, records: false });
    let (mut port, mut far) = (port(a, "superframe"), port(b, "superframe"));
    let mut data = packet(1, 65_535);
    data[44..46].copy_from_slice(&(65_495u16).to_be_bytes());
    let meta = PacketMeta {
        gso: Gso::Udp,
        gso_size: 1200,
        header_len: 48,
        checksum: Checksum::Partial { start: 40, offset: 6 },
        ..PacketMeta::default()
    };
    let mut batch = take_batch();
    batch.push(&data, meta);
    let sending = async {
        poll_fn(|cx| port.poll_send(cx, &mut batch)).await.unwrap();
        poll_fn(|cx| port.poll_flush(cx)).await.unwrap();
    };
    let receiving = async {
        let mut received = take_batch();
        poll_fn(|cx| far.poll_receive(cx, &mut received)).await.unwrap();
        assert_eq!(*received.get(0).unwrap().meta, meta);
        assert!(received.get(0).unwrap().data == data);
    };
    tokio::join!(sending, receiving);
    assert_eq!(port.stats.packets_sent.get(), far.stats.packets_received.get());
    assert_eq!(port.stats.packets_sent.get(), 55);
}

#[tokio::test]
async fn hellos_agree_or_say_why_not() {
    let deadline = Duration::from_secs(5);
    let (a, b) = MemoryStream::pair(Manner { capacity: 5, step: 3, records: false });
    let (mut a, mut b): (BoxStream, BoxStream) = (Box::new(a), Box::new(b));
    let few = Offloads { uso: false, ..Offloads::ALL };
    let [mut none, mut nothing] = [Vec::new(), Vec::new()];
    let (ours, theirs) = tokio::join!(
        superframe_hello(&mut a, Hello::new(Offloads::ALL, 65_535), &mut none, deadline),
        superframe_hello(&mut b, Hello::new(few, 9_000), &mut nothing, deadline),
    );
    let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
    assert_eq!((ours.send, ours.send_max, ours.receive_max), (few, 9_000, 65_535));
    assert_eq!((theirs.send, theirs.send_max), (Offloads::ALL, 65_535));

    let (a, b) = MemoryStream::pair(WHOLE);
    b.inject(&[b"HTTP/1.1 400 Bad"]);
    let mut a: BoxStream = Box::new(a);
    let error =
        superframe_hello(&mut a, Hello::new(few, 9_000), &mut Vec::new(), deadline).await.unwrap_err();
    assert_eq!((error.kind(), error.phase()), (ErrorKind::IncompatiblePeer, Some(Phase::Handshake)));

    let (a, b) = MemoryStream::pair(WHOLE);
    b.inject(&[b"SAPP"]);
    drop(b);
    let mut a: BoxStream = Box::new(a);
    let error =
        superframe_hello(&mut a, Hello::new(few, 9_000), &mut Vec::new(), deadline).await.unwrap_err();
    assert_ne!(error.kind(), ErrorKind::HandshakeDeadline);
}

#[tokio::test]
async fn a_hello_that_was_read_before_counts_and_what_follows_is_the_ports() {
    let hello = Hello::new(Offloads::ALL, 65_535);
    for early in [3, HELLO_LEN, HELLO_LEN + 5] {
        let (a, b) = MemoryStream::pair(WHOLE);
        let wire = [&hello.encode()[..], b"after"].concat();
        b.inject(&[&wire[early..]]);
        let mut received = wire[..early].to_vec();
        let mut a: BoxStream = Box::new(a);
        let agreed = superframe_hello(&mut a, hello, &mut received, Duration::from_secs(5)).await;
        assert_eq!(agreed.unwrap(), hello.agree(&hello).unwrap());
        let mut rest = [0; 5];
        let n = if early > HELLO_LEN {
            0
        } else {
            poll_fn(|cx| a.poll_read(cx, &mut rest, &mut RecordMarks::ignored())).await.unwrap()
        };
        assert_eq!([&received[..], &rest[..n]].concat(), b"after");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_no_hello_meets_the_deadline() {
    let (a, _b) = MemoryStream::pair(WHOLE);
    let mut a: BoxStream = Box::new(a);
    let hello = Hello::new(Offloads::NONE, 1_500);
    let error = superframe_hello(&mut a, hello, &mut Vec::new(), Duration::from_secs(7)).await.unwrap_err();
    assert_eq!((error.kind(), error.phase()), (ErrorKind::HandshakeDeadline, Some(Phase::Handshake)));
}

#[tokio::test]
async fn options_that_cannot_be_are_refused_by_name() {
    let make = |change: &dyn Fn(&mut FramedOptions)| {
        let mut options = options("u32");
        change(&mut options);
        FramedPort::new(Box::new(MemoryStream::pair(WHOLE).0), options, &[]).err().unwrap()
    };
    assert_eq!(make(&|options| options.max_packet = 0).field(), Some("max_packet"));
    assert_eq!(make(&|options| options.max_packet = 1 << 20).field(), Some("max_packet"));
    assert_eq!(make(&|options| options.records_per_write = 0).field(), Some("records_per_write"));
    assert_eq!(make(&|options| options.framing = Framing::Superframe).kind(), ErrorKind::NotStarted);
    for framing in ["ip", "superframe"] {
        let error = make(&|options| {
            options.framing = Framing::from_name(framing).unwrap();
            options.kind = PacketKind::Ethernet;
        });
        assert_eq!((error.kind(), error.field()), (ErrorKind::Config, Some("framing")));
    }
}

#[tokio::test]
async fn an_idle_port_holds_no_memory() {
    let (a, b) = MemoryStream::pair(WHOLE);
    let (mut port, mut far) = (port(a, "u32"), port(b, "u32"));
    let packets: Vec<_> = (0..300).map(|number| packet(number, 60)).collect();
    for half in packets.chunks(200) {
        send(&mut port, half).await;
    }
    while far.receiver.position < 300 * 64 {
        receive(&mut far).await.unwrap();
    }
    assert!(
        port.sender.copies.holds_memory()
            || port.sender.tail.holds_memory()
            || far.receiver.rest.holds_memory()
    );
    port.release_idle();
    far.release_idle();
    for buffer in [&far.receiver.rest, &port.sender.tail, &port.sender.copies] {
        assert!(!buffer.holds_memory());
    }
}
