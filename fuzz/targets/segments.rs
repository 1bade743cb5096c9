//! Joining any packets, and cutting what was joined, gives the packets back.
//!
//! Input: records of a kind (which of four flows, and what is done to the packet), a payload length
//! and a byte for what is done.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::packet::gro::Coalescer;
use sapper_proto::packet::gso::Segmenter;
use sapper_proto::packet::{Checksum, Offloads, PacketBatch, PacketMeta, checksum, virtio};

/// A packet of a flow with a right checksum, before something is done to it.
fn packet(flow: u8, len: usize, seq: u32, id: u16) -> Vec<u8> {
    let (v6, udp) = (flow & 1 == 1, flow & 2 == 2);
    let (start, protocol) = (if v6 { 40 } else { 20 }, if udp { 17 } else { 6 });
    let transport = if udp { 8 } else { 20 };
    let total = start + transport + len;
    let mut packet = vec![0x5a ^ seq as u8; total];
    packet[..start + transport].fill(1);
    if v6 {
        packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, protocol, 64]);
        packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
    } else {
        packet[..12].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
        packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        let sum = checksum::ipv4_header(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let offset = if udp {
        packet[start + 4..start + 6].copy_from_slice(&((8 + len) as u16).to_be_bytes());
        6
    } else {
        packet[start + 4..start + 8].copy_from_slice(&seq.to_be_bytes());
        packet[start + 12..start + 14].copy_from_slice(&[0x50, 0x10]);
        packet[start + 18..start + 20].fill(0);
        16
    };
    let pseudo = checksum::pseudo_header(&packet, protocol, total - start).unwrap();
    packet[start + offset..start + offset + 2].copy_from_slice(&pseudo.to_be_bytes());
    checksum::complete(&mut packet, start, offset);
    packet
}

fuzz_target!(|bytes: &[u8]| {
    let mut source = PacketBatch::new(200_000, 256);
    let (mut seq, mut id) = ([0u32; 4], [0u16; 4]);
    for &[kind, len, value] in bytes.as_chunks::<3>().0.iter().take(256) {
        let flow = kind & 3;
        let at = usize::from(flow);
        let mut data = packet(flow, usize::from(len), seq[at], id[at]);
        seq[at] = seq[at].wrapping_add(u32::from(len));
        id[at] = id[at].wrapping_add(1);
        let mut meta = PacketMeta::default();
        match kind >> 2 {
            0..=31 => {}
            // A changed byte, most of the time a wrong checksum.
            32..=55 => {
                let place = usize::from(kind >> 2) - 32 + usize::from(len) / 2;
                if let Some(byte) = data.get_mut(place) {
                    *byte ^= value;
                }
            }
            56 => data.truncate(usize::from(value)),
            57..=59 => meta.checksum = Checksum::Valid,
            _ => meta.checksum = Checksum::Partial { start: u16::from(value), offset: u16::from(len) % 20 },
        }
        source.push(&data, meta);
    }
    let mut coalescer = Coalescer::new(Offloads::ALL);
    let outputs = coalescer.coalesce(&source);
    let mut seen = 0;
    for index in 0..outputs {
        let output = coalescer.output(&source, index).unwrap();
        seen += output.packets;
        if output.packets == 1 {
            continue;
        }
        let mut whole = PacketBatch::new(70_000, 1);
        assert!(output.copy_to(&mut whole));
        let data = whole.get(0).unwrap().data.to_vec();
        let header = virtio::encode(&output.meta, &data);
        let meta = virtio::decode(&header, &data).expect("a kernel would take it");
        assert_eq!(
            (meta.gso, meta.gso_size, meta.checksum),
            (output.meta.gso, output.meta.gso_size, output.meta.checksum)
        );
        let mut cut = PacketBatch::new(200_000, 256);
        Segmenter::new().segment(&mut whole, &mut cut, 65_535);
        assert_eq!(cut.len(), output.packets);
        let header_len = usize::from(meta.header_len);
        for (segment, payload) in cut.iter().zip(output.payloads()) {
            assert_eq!(&segment.data[header_len..], payload);
            assert_eq!(checksum::verify(segment.data), checksum::Verdict::Right);
        }
    }
    assert_eq!(seen, source.len());
    let before = source.len();
    let taken: usize = (0..outputs / 2).map(|index| coalescer.output(&source, index).unwrap().packets).sum();
    coalescer.take(&mut source, outputs / 2);
    assert_eq!(source.len(), before - taken);
});
