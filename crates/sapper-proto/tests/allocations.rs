//! Cutting, joining and deframing allocate nothing once their vectors have their size.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use sapper_proto::framing::{Deframer, Framing, Step};
use sapper_proto::packet::gro::Coalescer;
use sapper_proto::packet::gso::Segmenter;
use sapper_proto::packet::{Checksum, Gso, Offloads, PacketBatch, PacketMeta, checksum};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed to the system's allocator as it came; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends has no counter any more, and none is needed.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`; the block is the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_packet_path_allocates_nothing() {
    let mut packet = vec![0; 60 + 30_000];
    packet[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 6, 64]);
    let len = (packet.len() - 40) as u16;
    packet[4..6].copy_from_slice(&len.to_be_bytes());
    packet[52..54].copy_from_slice(&[0x50, 0x10]);
    let pseudo = checksum::pseudo_header(&packet, 6, packet.len() - 40).unwrap();
    packet[56..58].copy_from_slice(&pseudo.to_be_bytes());
    let meta = PacketMeta {
        gso: Gso::TcpV6,
        gso_size: 1_000,
        header_len: 60,
        checksum: Checksum::Partial { start: 40, offset: 16 },
        ..PacketMeta::default()
    };

    let mut source = PacketBatch::new(40_000, 4);
    let mut cut = PacketBatch::new(60_000, 64);
    let mut segmenter = Segmenter::new();
    let mut coalescer = Coalescer::new(Offloads::ALL);
    let deframer = Deframer::new(Framing::U16, 65_535, false);
    let mut stream = Vec::with_capacity(60_000);
    let mut round = || {
        source.clear();
        assert!(source.push(&packet, meta));
        cut.clear();
        assert_eq!(segmenter.segment(&mut source, &mut cut, 1_100).written, 30);

        stream.clear();
        for index in 0..cut.len() {
            let unit = cut.with_prefix(index, 2).unwrap();
            let (prefix, packet) = unit.split_at_mut(2);
            Framing::U16.write_prefix(prefix, packet, &PacketMeta::default()).unwrap();
            stream.extend_from_slice(unit);
        }
        cut.clear();
        let mut rest = &stream[..];
        while let Ok(Step::Packet { consumed, data, meta }) = deframer.next(rest) {
            assert!(cut.push(&rest[data], meta));
            rest = &rest[consumed..];
        }

        assert_eq!(coalescer.coalesce(&cut), 1);
        let bytes: usize = coalescer.output(&cut, 0).unwrap().payloads().map(<[u8]>::len).sum();
        assert_eq!(bytes, 30_000);
        coalescer.take(&mut cut, 1);
    };
    round();
    let before = ALLOCATIONS.with(Cell::get);
    assert!(before > 0, "the counter counts");
    round();
    assert_eq!(ALLOCATIONS.with(Cell::get), before);
}
