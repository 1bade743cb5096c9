use std::net::IpAddr;

use proptest::prelude::*;

use super::super::gso::Segmenter;
use super::super::testing::{ACK, Build, CWR, FIN, PSH, SYN, naive_verify, payload};
use super::super::{Ecn, virtio};
use super::*;

const ECE_ACK: u8 = ECE | ACK;

fn batch(packets: &[Vec<u8>]) -> PacketBatch {
    let mut batch = PacketBatch::new(1 << 20, 300);
    for packet in packets {
        assert!(batch.push(packet, PacketMeta::default()));
    }
    batch
}

/// The outputs as bytes, and how many packets each has.
fn outputs(coalescer: &mut Coalescer, batch: &PacketBatch) -> Vec<(Vec<u8>, PacketMeta, usize)> {
    let count = coalescer.coalesce(batch);
    (0..count)
        .map(|index| {
            let output = coalescer.output(batch, index).unwrap();
            let mut bytes = output.headers.to_vec();
            output.payloads().for_each(|slice| bytes.extend_from_slice(slice));
            assert_eq!(bytes.len(), output.len);
            (bytes, output.meta, output.packets)
        })
        .collect()
}

fn sizes(packets: &[Vec<u8>]) -> Vec<usize> {
    outputs(&mut Coalescer::new(Offloads::ALL), &batch(packets)).iter().map(|output| output.2).collect()
}

/// Packets of one flow with payloads of these lengths, in sequence.
fn train(build: &Build, lengths: &[usize]) -> Vec<Vec<u8>> {
    let mut build = build.clone();
    lengths
        .iter()
        .map(|len| {
            let packet = build.packet(&payload(*len, build.seq));
            build.seq = build.seq.wrapping_add(*len as u32);
            build.id = build.id.wrapping_add(1);
            packet
        })
        .collect()
}

#[test]
fn a_train_becomes_the_large_packet_that_a_kernel_would_give() {
    for build in Build::all() {
        let data = payload(4500, 8);
        let packets: Vec<Vec<u8>> = data
            .chunks(1200)
            .enumerate()
            .map(|(index, chunk)| {
                let seq = build.seq.wrapping_add(index as u32 * 1200);
                let flags = if index == 3 { ACK | PSH } else { ACK };
                let id = build.id.wrapping_add(index as u16);
                Build { seq, flags, id, dont_fragment: false, ..build.clone() }.packet(chunk)
            })
            .collect();
        let got = outputs(&mut Coalescer::new(Offloads::ALL), &batch(&packets));
        let whole = Build { flags: ACK | PSH, dont_fragment: false, ..build.clone() };
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].0, whole.partial(&data));
        assert_eq!(got[0].1.gso_size, 1200);
        assert_eq!(virtio::decode(&virtio::encode(&got[0].1, &got[0].0), &got[0].0), Ok(got[0].1));
    }
}

#[test]
fn what_is_made_is_taken_however_small_its_segments() {
    for build in Build::all() {
        for (size, count) in [(1, 40), (3, 64), (7, 200)] {
            let source = batch(&train(&build, &vec![size; count]));
            for (bytes, meta, packets) in outputs(&mut Coalescer::new(Offloads::ALL), &source) {
                assert!(packets > 1);
                assert_eq!(virtio::decode(&virtio::encode(&meta, &bytes), &bytes), Ok(meta));
            }
        }
    }
}

#[test]
fn what_ends_a_run() {
    for build in Build::all() {
        assert_eq!(sizes(&train(&build, &[100, 100, 100])), [3]);
        assert_eq!(sizes(&train(&build, &[100, 100, 40, 100])), [3, 1], "a shorter one is the last");
        assert_eq!(sizes(&train(&build, &[100, 101, 101])), [1, 2], "a longer one begins anew");
        assert_eq!(sizes(&train(&build, &[100, 0, 100])), [1, 1, 1], "an empty one is not joined");
        assert!(sizes(&train(&build, &[])).is_empty());
        let limit = if build.tcp { MOST_TCP_PACKETS } else { MOST_UDP_PACKETS };
        assert_eq!(sizes(&train(&build, &vec![9; limit + 2])), [limit, 2]);
        let most = (65_535 - build.header_len()) / 1300;
        assert_eq!(sizes(&train(&build, &vec![1300; most + 1])), [most, 1], "64 KB at most");
    }
}

#[test]
fn fields_that_must_be_the_same() {
    let pairs = |build: &Build, change: &dyn Fn(&mut Build)| {
        let mut packets = train(build, &[100, 100]);
        let mut second = build.clone();
        second.seq = build.seq.wrapping_add(100);
        second.id = build.id.wrapping_add(1);
        change(&mut second);
        packets[1] = second.packet(&payload(100, 1));
        sizes(&packets)
    };
    for build in Build::all() {
        assert_eq!(pairs(&build, &|_| {}), [2]);
        assert_eq!(pairs(&build, &|b| b.ttl -= 1), [1, 1]);
        assert_eq!(pairs(&build, &|b| b.tos = 3), [1, 1], "a congestion mark is not lost");
        assert_eq!(pairs(&build, &|b| b.tos = 0xb8), [1, 1]);
        assert_eq!(pairs(&build, &|b| b.ports.0 += 1), [1, 1], "another flow");
        if build.tcp {
            assert_eq!(pairs(&build, &|b| b.seq = b.seq.wrapping_add(1)), [1, 1], "a gap");
            assert_eq!(pairs(&build, &|b| b.seq = b.seq.wrapping_sub(100)), [1, 1], "again");
            assert_eq!(pairs(&build, &|b| b.ack += 1), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.window += 1), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.options[4] ^= 1), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.options.truncate(8)), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.flags = ECE_ACK), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.flags = ACK | CWR), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.flags = ACK | FIN), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.flags = ACK | 0x20), [1, 1], "urgent");
            assert_eq!(pairs(&build, &|b| b.flags = SYN), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.flags = ACK | PSH), [2]);
            let marked = Build { flags: ECE_ACK, ..build.clone() };
            assert_eq!(pairs(&marked, &|_| {}), [2]);
        }
        if build.source.is_ipv4() {
            assert_eq!(pairs(&build, &|b| b.dont_fragment = false), [1, 1]);
            assert_eq!(pairs(&build, &|b| b.id += 7), [2], "means nothing with DF");
            let fragmentable = Build { dont_fragment: false, ..build.clone() };
            assert_eq!(pairs(&fragmentable, &|_| {}), [2]);
            assert_eq!(pairs(&fragmentable, &|b| b.id = b.id.wrapping_add(1)), [1, 1]);
        }
    }
}

#[test]
fn push_ends_a_run_and_flows_keep_their_order() {
    let build = Build::tcp4();
    let other = Build { ports: (1, 2), ..build.clone() };
    let (a, b) = (train(&build, &[100; 6]), train(&other, &[70; 3]));
    let mut push = build.clone();
    push.seq = push.seq.wrapping_add(100);
    push.flags |= PSH;
    let pushed = push.packet(&payload(100, 1));
    let packets = [&a[0], &b[0], &pushed, &b[1], &a[2], &a[4], &b[2], &a[5]].map(Clone::clone).to_vec();
    // a0 with the pushed one, all of b, a2 alone (a3 is missing), a4 with a5.
    assert_eq!(sizes(&packets), [2, 3, 1, 2]);
    let ack = build.packet(&[]);
    let packets = [&a[0], &b[0], &ack, &a[1], &b[1]].map(Clone::clone).to_vec();
    assert_eq!(sizes(&packets), [1, 2, 1, 1], "nothing overtakes the acknowledgement of its flow");
}

#[test]
fn nothing_overtakes_a_fragment() {
    let train = train(&Build::udp4(), &[100; 2]);
    let mut fragment = train[0].clone();
    fragment[6] |= 0x20;
    assert_eq!(sizes(&[train[0].clone(), fragment, train[1].clone()]), [1, 1, 1]);
    let mut ping = train[0].clone();
    ping[9] = 1;
    assert_eq!(sizes(&[train[0].clone(), ping, train[1].clone()]), [2, 1]);
}

#[test]
fn wrong_checksums_are_passed_on_as_they_are() {
    for build in Build::all() {
        for bad in 0..3 {
            let mut packets = train(&build, &[100; 3]);
            let last = packets[bad].len() - 1;
            packets[bad][last] ^= 0x40;
            let got = outputs(&mut Coalescer::new(Offloads::ALL), &batch(&packets));
            let alone = got.iter().find(|output| output.0 == packets[bad]).unwrap();
            assert_eq!((alone.1.checksum, alone.2), (Checksum::Unverified, 1));
            let runs: Vec<usize> = got.iter().map(|output| output.2).collect();
            assert_eq!(runs, [vec![1, 2], vec![1, 1, 1], vec![2, 1]][bad]);
        }
    }
    let mut unsummed = train(&Build::udp4(), &[100; 2]);
    unsummed.iter_mut().for_each(|packet| packet[26..28].fill(0));
    assert_eq!(sizes(&unsummed), [1, 1], "a datagram without a checksum stays without one");
}

#[test]
fn what_travels_with_a_packet_matters() {
    let packets = train(&Build::tcp4(), &[100; 2]);
    let joined = |first: PacketMeta, second: PacketMeta| {
        let mut batch = PacketBatch::new(4096, 2);
        batch.push(&packets[0], first);
        batch.push(&packets[1], second);
        Coalescer::new(Offloads::ALL).coalesce(&batch) == 1
    };
    let plain = PacketMeta::default();
    let peer = |text: &str| PacketMeta { peer: Some(text.parse().unwrap()), ..plain };
    assert!(joined(plain, plain));
    assert!(joined(peer("192.0.2.1:1"), peer("192.0.2.1:1")));
    assert!(!joined(peer("192.0.2.1:1"), peer("192.0.2.1:2")), "same addresses inside, another peer");
    assert!(!joined(plain, PacketMeta { ecn: Ecn::Ce, ..plain }));
    let partial = PacketMeta { checksum: Checksum::Partial { start: 20, offset: 16 }, ..plain };
    assert!(joined(partial, plain), "a partial checksum needs no verifying");
    let odd = PacketMeta { checksum: Checksum::Partial { start: 20, offset: 6 }, ..plain };
    assert!(!joined(plain, odd));
    let large = PacketMeta { gso: Gso::TcpV4, gso_size: 50, header_len: 52, ..partial };
    assert!(!joined(plain, large));
}

#[test]
fn only_what_the_destination_takes_is_joined() {
    for (index, build) in Build::all().iter().enumerate() {
        let batch = batch(&train(build, &[100; 2]));
        let without = [
            Offloads { tso4: false, ..Offloads::ALL },
            Offloads { tso6: false, ..Offloads::ALL },
            Offloads { uso: false, ..Offloads::ALL },
            Offloads { uso: false, ..Offloads::ALL },
        ];
        assert_eq!(Coalescer::new(without[index]).coalesce(&batch), 2);
        assert_eq!(Coalescer::new(without[(index + 1) % 3]).coalesce(&batch), 1);
        let unsummed = Offloads { checksum: false, ..Offloads::ALL };
        assert_eq!(Coalescer::new(unsummed).coalesce(&batch), 2);
        let short = Coalescer::new(Offloads::ALL).with_max_packet(build.header_len() + 199).coalesce(&batch);
        assert_eq!(short, 2);
    }
}

#[test]
fn taking_some_leaves_the_rest_in_order() {
    let (a, b) = (train(&Build::tcp4(), &[100; 3]), train(&Build::udp6(), &[50; 3]));
    let mut batch = batch(&[&a[0], &b[0], &a[1], &b[1], &a[2], &b[2]].map(Clone::clone));
    let mut coalescer = Coalescer::new(Offloads::ALL);
    assert_eq!(coalescer.coalesce(&batch), 2);
    coalescer.take(&mut batch, 1);
    assert!(coalescer.output(&batch, 0).is_none(), "the plan is spent");
    assert_eq!(batch.iter().map(|p| p.data.to_vec()).collect::<Vec<_>>(), b);
    assert_eq!(coalescer.coalesce(&batch), 1);
    coalescer.take(&mut batch, 1);
    assert!(batch.is_empty());
}

#[test]
fn more_flows_than_the_table_has_places_are_passed_as_they_are() {
    let mut packets = Vec::new();
    for port in 0..290 {
        packets.push(train(&Build { ports: (port, 9), ..Build::tcp4() }, &[10])[0].clone());
    }
    let got = outputs(&mut Coalescer::new(Offloads::ALL), &batch(&packets));
    assert_eq!(got.into_iter().map(|output| output.0).collect::<Vec<_>>(), packets);
}

#[test]
fn outputs_can_be_copied_into_a_batch() {
    let build = Build::udp6();
    let source = batch(&train(&build, &[100; 3]));
    let mut coalescer = Coalescer::new(Offloads::ALL);
    coalescer.coalesce(&source);
    let output = coalescer.output(&source, 0).unwrap();
    let mut copy = PacketBatch::new(700, 2);
    assert!(output.copy_to(&mut copy) && !output.copy_to(&mut copy));
    let mut bytes = output.headers.to_vec();
    output.payloads().for_each(|slice| bytes.extend_from_slice(slice));
    assert_eq!((copy.get(0).unwrap().data, *copy.get(0).unwrap().meta), (&bytes[..], output.meta));
}

/// A packet of the random batches, with what the naive coalescer must know of it.
#[derive(Clone, Debug)]
struct Sent {
    build: Build,
    data: Vec<u8>,
    bad: bool,
    fragment: bool,
}

impl Sent {
    fn packet(&self) -> Vec<u8> {
        let mut packet = self.build.packet(&self.data);
        if self.bad {
            // Behind the headers where there is a payload: the packet stays well-formed.
            let at = packet.len() - 1;
            packet[at] ^= 4;
        }
        if self.fragment && self.build.source.is_ipv4() {
            packet[6] |= 0x20;
        }
        packet
    }

    fn is_barrier(&self) -> bool {
        self.fragment && self.build.source.is_ipv4()
    }

    fn flow(&self) -> (IpAddr, IpAddr, (u16, u16), bool) {
        (self.build.source, self.build.destination, self.build.ports, self.build.tcp)
    }

    fn joinable(&self) -> bool {
        let flags = !self.build.tcp || self.build.flags & !(PSH | ECE) == ACK;
        flags && !self.data.is_empty() && !self.is_barrier()
    }
}

/// The rules once more, over what the packets were built from.
fn naive(sent: &[Sent]) -> Vec<Vec<usize>> {
    let mut runs: Vec<(Vec<usize>, bool)> = Vec::new();
    for (index, this) in sent.iter().enumerate() {
        if this.is_barrier() {
            runs.iter_mut().for_each(|run| run.1 = false);
            runs.push((vec![index], false));
            continue;
        }
        let run = runs.iter_mut().rev().find(|run| sent[run.0[0]].flow() == this.flow());
        if let Some((members, open)) = run {
            let first = &sent[members[0]];
            let last = &sent[*members.last().unwrap()];
            let total: usize = members.iter().map(|member| sent[*member].data.len()).sum();
            let (a, b) = (&first.build, &this.build);
            let v4 = a.source.is_ipv4();
            let tcp = !a.tcp
                || b.seq == a.seq.wrapping_add(total as u32)
                    && (a.ack, a.window, &a.options) == (b.ack, b.window, &b.options)
                    && a.flags & !PSH == b.flags & !PSH;
            let ip = (a.tos, a.ttl) == (b.tos, b.ttl)
                && (!v4 || a.dont_fragment == b.dont_fragment)
                && (!v4 || a.dont_fragment || b.id == last.build.id.wrapping_add(1));
            let fits = *open && this.joinable() && tcp && ip && this.data.len() <= first.data.len();
            if fits && !first.bad && !this.bad {
                members.push(index);
                *open = this.data.len() == first.data.len() && !(a.tcp && b.flags & PSH != 0);
                continue;
            }
            *open = false;
        }
        let open = this.joinable() && !(this.build.tcp && this.build.flags & PSH != 0);
        runs.push((vec![index], open));
    }
    runs.into_iter().map(|run| run.0).collect()
}

/// Several flows, mostly in order, with everything that may end a run now and then.
fn traffic() -> impl Strategy<Value = Vec<Sent>> {
    let step = (0usize..6, 0usize..40, 0usize..40, any::<u32>());
    prop::collection::vec(step, 1..60).prop_map(|steps| {
        let mut flows: Vec<Build> = Build::all().to_vec();
        flows.push(Build { ports: (8, 9), dont_fragment: false, ..Build::tcp4() });
        flows.push(Build { ports: (443, 50_001), ..Build::tcp6() });
        steps
            .into_iter()
            .map(|(flow, glitch, length, seed)| {
                let state = &mut flows[flow];
                match glitch {
                    0 => state.seq = state.seq.wrapping_add(5),
                    1 => state.ack += 1,
                    2 => state.window += 1,
                    3 => state.tos ^= 1,
                    4 => state.ttl ^= 1,
                    5 => state.id = state.id.wrapping_add(3),
                    6 => state.dont_fragment ^= true,
                    7 => state.options = payload(state.options.len() ^ 4, seed),
                    8 => state.flags ^= ECE,
                    9 => state.tos ^= 0x80,
                    _ => {}
                }
                let mut build = state.clone();
                match glitch {
                    10 => build.flags |= PSH,
                    11 => build.flags |= FIN,
                    12 => build.flags = SYN,
                    13 => build.flags |= CWR,
                    _ => {}
                }
                let len = match length {
                    0 => 0,
                    1 => 33,
                    2 => 161,
                    _ => 100,
                };
                state.seq = state.seq.wrapping_add(len as u32);
                state.id = state.id.wrapping_add(1);
                let data = payload(len, seed);
                Sent { build, bad: glitch == 14 && len > 0, fragment: glitch == 15, data }
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn runs_are_those_of_the_naive_coalescer(sent in traffic()) {
        let packets: Vec<Vec<u8>> = sent.iter().map(Sent::packet).collect();
        let source = batch(&packets);
        let mut coalescer = Coalescer::new(Offloads::ALL);
        let got = outputs(&mut coalescer, &source);
        let expected = naive(&sent);
        prop_assert_eq!(
            got.iter().map(|output| output.2).collect::<Vec<_>>(),
            expected.iter().map(Vec::len).collect::<Vec<_>>()
        );
        for ((bytes, meta, _), members) in got.iter().zip(&expected) {
            prop_assert_eq!(virtio::decode(&virtio::encode(meta, bytes), bytes).unwrap(), *meta);
            // Cut again it is what it was.
            let mut whole = PacketBatch::new(100_000, 1);
            whole.push(bytes, *meta);
            let mut cut = PacketBatch::new(100_000, 200);
            Segmenter::new().segment(&mut whole, &mut cut, 65_535);
            prop_assert_eq!(cut.len(), members.len());
            for (again, member) in cut.iter().zip(members) {
                let mut was = packets[*member].clone();
                if members.len() > 1 {
                    prop_assert!(naive_verify(again.data));
                }
                if was[0] == 0x45 && was[6] & 0x40 != 0 {
                    // The identification of an unfragmentable packet is not kept.
                    was[4..6].copy_from_slice(&again.data[4..6]);
                    was[10..12].copy_from_slice(&again.data[10..12]);
                }
                prop_assert_eq!(again.data, was);
            }
        }
    }

    #[test]
    fn any_packets_are_answered(
        packets in prop::collection::vec((0usize..8, prop::collection::vec((0usize..60, any::<u8>()), 0..3)), 0..12),
        start in 0u16..60, offset in 0u16..20, partial: bool,
    ) {
        let trains: Vec<Vec<Vec<u8>>> = Build::all().iter().map(|build| train(build, &[20; 2])).collect();
        let mut source = PacketBatch::new(8192, 12);
        let mut bytes = 0;
        for (which, changes) in packets {
            let mut packet = trains[which / 2][which % 2].clone();
            for (at, byte) in changes {
                if at < packet.len() { packet[at] = byte; }
            }
            bytes += packet.len();
            let checksum = if partial { Checksum::Partial { start, offset } } else { Checksum::Valid };
            source.push(&packet, PacketMeta { checksum, ..PacketMeta::default() });
        }
        let mut coalescer = Coalescer::new(Offloads::ALL);
        let got = outputs(&mut coalescer, &source);
        prop_assert_eq!(got.iter().map(|output| output.2).sum::<usize>(), source.len());
        prop_assert!(got.iter().map(|output| output.0.len()).sum::<usize>() <= bytes);
        coalescer.take(&mut source, got.len() / 2);
        prop_assert!(source.len() < 12 || got.len() < 2);
    }
}
