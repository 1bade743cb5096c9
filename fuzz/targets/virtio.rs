//! A virtio-net header and the packet behind it: what is believed can be cut, and within bounds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::packet::gso::Segmenter;
use sapper_proto::packet::{Gso, HEADROOM, PacketBatch, virtio};

/// What a destination takes.
const MAX: usize = 1_280;

fuzz_target!(|bytes: &[u8]| {
    let Some((header, packet)) = bytes.split_first_chunk() else { return };
    let _ = virtio::decode_frame(header, packet);
    let Ok(meta) = virtio::decode(header, packet) else { return };
    assert_eq!(virtio::decode(&virtio::encode(&meta, packet), packet), Ok(meta));

    let mut source = PacketBatch::new(packet.len() + HEADROOM, 1);
    assert!(source.push(packet, meta));
    let mut destination = PacketBatch::new(4 * (MAX + HEADROOM), 8);
    let mut segmenter = Segmenter::new();
    let (mut packets, mut payload) = (0, 0);
    while !source.is_empty() {
        let done = segmenter.segment(&mut source, &mut destination, MAX);
        assert_eq!(done.malformed, 0, "what was believed was not true");
        for segment in destination.iter() {
            assert!(segment.data.len() <= MAX && segment.meta.gso == Gso::None);
            payload += segment.data.len() - usize::from(meta.header_len);
        }
        packets += done.written;
        destination.clear();
        if done.too_long > 0 {
            return;
        }
    }
    assert!(packets <= 8_192);
    assert_eq!(payload, packet.len() - usize::from(meta.header_len));
});
