//! The hot path allocates nothing per packet: counted by the process's allocator while packets and
//! bytes cross two bridges. A binary of its own, with one test: the count is the process's.

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::io::{Read, Write};
use std::sync::atomic::Ordering::Relaxed;

use common::*;
use counting::ALLOCATIONS;
use sapper_proto::framing::Framing;

const PACKETS: u64 = 20_000;

/// What a sweep of an idle moment, a timer or the test's own threads may allocate in that time.
const SLACK: u64 = PACKETS / 100;

#[test]
fn moving_packets_and_bytes_allocates_nothing_per_packet() {
    for configs in all_credentials() {
        for framing in [Framing::Ip { v4: true, v6: true }, Framing::U16] {
            let (near, far) = packet_pair(&configs, framing);
            near.start_both(&far);
            let (a, b) = (near.packets(), far.packets());
            let packet = ipv6_packet(1280, 7);
            let mut buf = [0; 2000];
            let mut cross = |count: u64| {
                for _ in 0..count / 8 {
                    for _ in 0..8 {
                        a.send(&packet).unwrap();
                    }
                    for _ in 0..8 {
                        assert_eq!(b.recv(&mut buf).unwrap(), packet.len());
                    }
                }
            };
            cross(2_000);
            let before = ALLOCATIONS.load(Relaxed);
            cross(PACKETS);
            let allocated = ALLOCATIONS.load(Relaxed) - before;
            assert!(allocated < SLACK, "{framing:?}: {allocated} allocations for {PACKETS} packets");
        }
        let (near, far) = raw_pair(&configs);
        near.start_both(&far);
        let (mut a, mut b) = (near.cleartext(), far.cleartext());
        let mut buf = vec![3; 16_384];
        let mut cross = |count: u64| {
            for _ in 0..count {
                a.write_all(&buf).unwrap();
                b.read_exact(&mut buf).unwrap();
            }
        };
        cross(500);
        let before = ALLOCATIONS.load(Relaxed);
        cross(5_000);
        let allocated = ALLOCATIONS.load(Relaxed) - before;
        assert!(allocated < SLACK, "raw: {allocated} allocations for 5000 chunks");
    }
}
