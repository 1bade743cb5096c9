//! What one packet costs in this crate, in nanoseconds: printed, never judged.
//!
//! `cargo test --release -p sapper-proto --test bench -- --ignored --nocapture --test-threads 1`

#![expect(clippy::disallowed_types, clippy::print_stdout, reason = "a bench measures and prints")]

use std::hint::black_box;
use std::time::Instant;

use sapper_proto::framing::{Deframer, Framing, Step};
use sapper_proto::packet::gro::Coalescer;
use sapper_proto::packet::gso::Segmenter;
use sapper_proto::packet::{Checksum, Gso, Offloads, PacketBatch, PacketMeta, checksum, virtio};

const SEGMENT: usize = 1_240;
const SEGMENTS: usize = 50;

/// The best of several rounds: what the work costs when nobody disturbs it.
fn measure(what: &str, packets: usize, bytes: usize, mut work: impl FnMut()) {
    let mut best = f64::MAX;
    for _ in 0..20 {
        let begun = Instant::now();
        for _ in 0..50 {
            work();
        }
        best = best.min(begun.elapsed().as_secs_f64() / 50.0);
    }
    let nanoseconds = best * 1e9 / packets as f64;
    println!("{what:<44} {nanoseconds:9.1} ns/packet {:7.2} GB/s", bytes as f64 / best / 1e9);
}

/// A TCPv6 super-packet of `SEGMENTS` segments, whose checksum field has the pseudo-header's sum.
fn large() -> (Vec<u8>, PacketMeta) {
    let len = 40 + 20 + SEGMENT * SEGMENTS;
    let mut packet = vec![0x5a; len];
    packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 6, 64]);
    packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    packet[52] = 0x50;
    packet[53] = 0x10;
    let pseudo = checksum::pseudo_header(&packet, 6, len - 40).unwrap();
    packet[56..58].copy_from_slice(&pseudo.to_be_bytes());
    let meta = PacketMeta {
        gso: Gso::TcpV6,
        gso_size: SEGMENT as u16,
        header_len: 60,
        checksum: Checksum::Partial { start: 40, offset: 16 },
        ..PacketMeta::default()
    };
    (packet, meta)
}

/// The same as ordinary packets.
fn ordinary() -> PacketBatch {
    let (packet, meta) = large();
    let mut source = PacketBatch::new(70_000, 1);
    source.push(&packet, meta);
    let mut batch = PacketBatch::new(100_000, 64);
    Segmenter::new().segment(&mut source, &mut batch, 1_300);
    assert_eq!(batch.len(), SEGMENTS);
    batch
}

#[test]
#[ignore = "a bench"]
fn bench_checksum() {
    for len in [40, 1_280, 65_000] {
        let bytes = vec![0xa5; len];
        measure(&format!("checksum {len} B"), 100, len * 100, || {
            for _ in 0..100 {
                black_box(checksum::sum(black_box(&bytes)));
            }
        });
    }
}

#[test]
#[ignore = "a bench"]
fn bench_gso() {
    let (packet, meta) = large();
    let mut source = PacketBatch::new(70_000, 1);
    let mut destination = PacketBatch::new(100_000, 64);
    let copy = "copy of a 62 KB packet, per segment of it";
    measure(copy, SEGMENTS, packet.len(), || {
        source.clear();
        assert!(source.push(black_box(&packet), meta));
    });
    measure("gso: the same copy, then 50 segments", SEGMENTS, packet.len(), || {
        source.clear();
        source.push(&packet, meta);
        destination.clear();
        Segmenter::new().segment(&mut source, &mut destination, 1_300);
        assert_eq!(black_box(&destination).len(), SEGMENTS);
    });
}

#[test]
#[ignore = "a bench"]
fn bench_gro() {
    let vouched = ordinary();
    let bytes = vouched.byte_len();
    let mut unverified = PacketBatch::new(100_000, 64);
    let mut flows = PacketBatch::new(100_000, 64);
    for (index, packet) in vouched.iter().enumerate() {
        unverified.push(packet.data, PacketMeta { checksum: Checksum::Unverified, ..*packet.meta });
        // Eight flows in turn. Their checksums are vouched for: they are wrong now.
        let mut data = packet.data.to_vec();
        data[43] = (index % 8) as u8;
        flows.push(&data, *packet.meta);
    }
    let mut coalescer = Coalescer::new(Offloads::ALL);
    measure("gro: verify and join 50 of one flow", SEGMENTS, bytes, || {
        assert_eq!(coalescer.coalesce(black_box(&unverified)), 1);
    });
    measure("gro: join 50 that somebody vouches for", SEGMENTS, bytes, || {
        assert_eq!(coalescer.coalesce(black_box(&vouched)), 1);
    });
    measure("gro: 50 of eight flows, each with gaps", SEGMENTS, bytes, || {
        assert_eq!(coalescer.coalesce(black_box(&flows)), SEGMENTS);
    });
}

#[test]
#[ignore = "a bench"]
fn bench_deframe() {
    let batch = ordinary();
    for framing in [Framing::Ip { v4: true, v6: true }, Framing::U16, Framing::Superframe] {
        let mut stream = Vec::new();
        for packet in batch.iter() {
            let mut prefix = vec![0; framing.prefix_len()];
            framing.write_prefix(&mut prefix, packet.data, packet.meta).unwrap();
            stream.extend(prefix);
            stream.extend(packet.data);
        }
        let deframer = Deframer::new(framing, 65_535, false);
        measure(&format!("deframe {}", framing.name()), SEGMENTS, stream.len(), || {
            let (mut rest, mut packets) = (black_box(&stream[..]), 0);
            while let Ok(Step::Packet { consumed, .. }) = deframer.next(rest) {
                rest = &rest[consumed..];
                packets += 1;
            }
            assert_eq!(packets, SEGMENTS);
        });
    }
    let (packet, meta) = large();
    let header = virtio::encode(&meta, &packet);
    measure("virtio: validate a large packet's header", 100, 0, || {
        for _ in 0..100 {
            black_box(virtio::decode(black_box(&header), black_box(&packet)).unwrap());
        }
    });
}
