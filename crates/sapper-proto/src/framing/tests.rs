use proptest::prelude::*;

use super::superframe::{HELLO_LEN, Hello, HelloError};
use super::*;
use crate::packet::Offloads;
use crate::packet::testing::{Build, hex, payload};
use crate::packet::virtio::VirtioError;

const FRAMINGS: [Framing; 4] =
    [Framing::Ip { v4: true, v6: true }, Framing::U16, Framing::U32, Framing::Superframe];

fn wire(framing: Framing, packet: &[u8], meta: &PacketMeta) -> Result<Vec<u8>, EncodeError> {
    let mut bytes = vec![0; framing.prefix_len()];
    framing.write_prefix(&mut bytes, packet, meta)?;
    bytes.extend(packet);
    Ok(bytes)
}

#[test]
fn the_wire_forms() {
    let packet = Build::udp4().packet(b"hello");
    let plain = PacketMeta::default();
    assert_eq!(wire(FRAMINGS[0], &packet, &plain).unwrap(), packet);
    assert_eq!(wire(Framing::U16, &packet, &plain).unwrap()[..3], hex("0021 45"));
    assert_eq!(wire(Framing::U32, &packet, &plain).unwrap()[..5], hex("00000021 45"));
    assert_eq!(
        wire(Framing::Superframe, &packet, &plain).unwrap()[..15],
        hex("0000002b 00000000000000000000 45")
    );
    let large = Build::tcp4().partial(&payload(4000, 1));
    let meta = PacketMeta {
        gso: Gso::TcpV4,
        gso_size: 1000,
        header_len: 52,
        checksum: Checksum::Partial { start: 20, offset: 16 },
        ..plain
    };
    assert_eq!(
        wire(Framing::Superframe, &large, &meta).unwrap()[..15],
        hex("00000fde 01 01 3400 e803 1400 1000 45")
    );
}

#[test]
fn names_are_found_both_ways() {
    for (name, framing) in Framing::NAMES {
        assert_eq!(Framing::from_name(name), Some(framing));
        assert_eq!(framing.name(), name);
    }
    assert_eq!(Framing::from_name("raw"), None, "a raw stream has no framing");
}

#[test]
fn packets_that_the_far_end_could_not_read_do_not_go_out() {
    let ipv6_only = Framing::Ip { v4: false, v6: true };
    let plain = PacketMeta::default();
    let packet = Build::udp4().packet(b"hello");
    assert_eq!(wire(ipv6_only, &packet, &plain), Err(EncodeError::WrongVersion));
    assert!(wire(ipv6_only, &Build::udp6().packet(b"hello"), &plain).is_ok());
    let mut longer = packet.clone();
    longer.push(0);
    let length = EncodeError::Header(IpError::Length { stated: 33, actual: 34 });
    assert_eq!(wire(FRAMINGS[0], &longer, &plain), Err(length));
    assert_eq!(wire(Framing::Superframe, &longer, &plain), Err(length));
    assert!(wire(Framing::U16, &longer, &plain).is_ok(), "not looked into");
    assert_eq!(wire(Framing::U16, &[0; 65_536], &plain), Err(EncodeError::Length(65_536)));
    assert_eq!(wire(Framing::U32, &[], &plain), Err(EncodeError::Length(0)));
    let partial = PacketMeta { checksum: Checksum::Partial { start: 20, offset: 6 }, ..plain };
    for framing in [FRAMINGS[0], Framing::U16, Framing::U32] {
        assert_eq!(wire(framing, &packet, &partial), Err(EncodeError::Unfinished));
    }
    assert!(wire(Framing::Superframe, &packet, &partial).is_ok());
    let datagrams = PacketMeta { gso: Gso::Datagrams, gso_size: 9, ..plain };
    assert_eq!(wire(Framing::Superframe, &packet, &datagrams), Err(EncodeError::Unfinished));
}

#[test]
fn lengths_out_of_range_and_wrong_headers_are_errors() {
    let next = |framing, bytes: &[u8]| Deframer::new(framing, 1500, false).next(bytes);
    let length = |length| Err(FramingError::Length { length, max: 1500 });
    assert_eq!(next(Framing::U16, &hex("0000")), length(0));
    assert_eq!(next(Framing::U16, &hex("05dd")), length(1501));
    assert_eq!(next(Framing::U16, &hex("05dc")), Ok(Step::NeedMore { at_least: 1502 }));
    assert_eq!(next(Framing::U32, &hex("ffffffff")), length(0xffff_ffff));
    assert_eq!(next(Framing::Superframe, &hex("0000000a")), length(0));
    assert_eq!(next(Framing::Superframe, &hex("00000003")), length(0));
    assert_eq!(next(Framing::Superframe, &hex("000005e7")), length(1501));
    assert_eq!(next(FRAMINGS[0], &hex("45 00 05 dd")), length(1501));
    assert_eq!(next(FRAMINGS[0], b"HTTP/1.1"), length(0x5450));
    assert_eq!(next(FRAMINGS[0], &[0x44]), Err(FramingError::Header(IpError::HeaderLength(16))));
    assert_eq!(next(FRAMINGS[0], &[0]), Err(FramingError::Header(IpError::Version(0))));
    assert_eq!(next(Framing::Ip { v4: false, v6: true }, &[0x45]), Err(FramingError::WrongVersion));
    assert_eq!(next(Framing::Ip { v4: true, v6: false }, &[0x60]), Err(FramingError::WrongVersion));
}

#[test]
fn a_superframe_is_hostile_input() {
    let packet = Build::tcp4().packet(b"x");
    let mut bytes = wire(Framing::Superframe, &packet, &PacketMeta::default()).unwrap();
    let deframer = Deframer::new(Framing::Superframe, 65_535, false);
    assert!(matches!(deframer.next(&bytes), Ok(Step::Packet { .. })));
    bytes[5] = 1;
    assert_eq!(deframer.next(&bytes), Err(FramingError::Virtio(VirtioError::Flags(0))));
    bytes[5] = 0;
    bytes[14 + 3] += 1;
    let length = IpError::Length { stated: packet.len() + 1, actual: packet.len() };
    assert_eq!(deframer.next(&bytes), Err(FramingError::Virtio(VirtioError::Packet(length))));
    let partial =
        PacketMeta { checksum: Checksum::Partial { start: 20, offset: 16 }, ..PacketMeta::default() };
    let bytes = wire(Framing::Superframe, &packet, &partial).unwrap();
    assert!(deframer.next(&bytes).is_ok());
    let refusing = deframer.with_offloads(Offloads::NONE);
    assert_eq!(refusing.next(&bytes), Err(FramingError::Offload));
}

#[test]
fn resynchronising_goes_to_a_record_that_begins_with_a_packet() {
    let packet = Build::udp6().packet(&payload(40, 3));
    let mut bytes = vec![0xff; 30];
    bytes.extend(&packet);
    let marks = [0, 10, 30, bytes.len()];
    let deframer = Deframer::new(Framing::Ip { v4: true, v6: true }, 1500, true);
    assert!(deframer.next(&bytes).is_err());
    assert_eq!(deframer.resynchronise(&marks, &bytes), Some(30));
    assert_eq!(deframer.resynchronise(&marks, &bytes[..31]), Some(30), "one byte looks right so far");
    assert_eq!(deframer.resynchronise(&marks, &bytes[..30]), None, "nothing there yet");
    assert_eq!(deframer.resynchronise(&[500], &bytes), None);
    let strict = Deframer::new(Framing::Ip { v4: true, v6: true }, 1500, false);
    assert_eq!(strict.resynchronise(&marks, &bytes), None, "it was not asked for");
}

#[test]
fn the_hello() {
    let hello = Hello::new(Offloads { uso: false, ..Offloads::ALL }, 65_535);
    let wire = hello.encode();
    assert_eq!(wire.to_vec(), hex("5341505045525346 01 01 0007 0000ffff"));
    assert_eq!(Hello::parse(&wire), Ok(Some(hello)));
    for len in 0..HELLO_LEN {
        assert_eq!(Hello::parse(&wire[..len]), Ok(None));
    }
    let changed = |at: usize, byte: u8| {
        let mut wire = wire;
        wire[at] = byte;
        Hello::parse(&wire)
    };
    assert_eq!(changed(7, b'f'), Err(HelloError::Magic));
    assert_eq!(Hello::parse(b"G"), Err(HelloError::Magic), "told at the first byte");
    assert_eq!(changed(9, 2), Err(HelloError::Version { oldest: 2, newest: 1 }));
    assert_eq!(changed(11, 6), Err(HelloError::Flags(6)));
    assert_eq!(changed(10, 0x80), Ok(Some(hello)), "unknown flags are for later versions");
    assert_eq!(changed(12, 1), Err(HelloError::MaxPacket(0x0100_ffff)));
    assert_eq!(changed(14, 4), Err(HelloError::MaxPacket(0x04ff)), "below the least");
    assert_eq!(Hello::new(Offloads { checksum: false, ..Offloads::ALL }, 0).accepts, Offloads::NONE);
}

#[test]
fn versions_are_agreed_on() {
    let ours = Hello { newest: 3, oldest: 2, ..Hello::new(Offloads::ALL, 65_535) };
    let peer = |oldest, newest| Hello { newest, oldest, ..Hello::new(Offloads::NONE, 2_000) };
    let agreement = ours.agree(&peer(1, 9)).unwrap();
    assert_eq!(agreement.version, 3);
    assert_eq!((agreement.send, agreement.send_max), (Offloads::NONE, 2_000));
    assert_eq!((agreement.receive, agreement.receive_max), (Offloads::ALL, 65_535));
    assert_eq!(ours.agree(&peer(1, 2)).unwrap().version, 2);
    assert_eq!(ours.agree(&peer(1, 1)), Err(HelloError::Version { oldest: 1, newest: 1 }));
    assert_eq!(ours.agree(&peer(4, 5)), Err(HelloError::Version { oldest: 4, newest: 5 }));
}

/// Packets of any framing, with what they look like in the stream.
fn packets() -> impl Strategy<Value = Vec<(Vec<u8>, PacketMeta)>> {
    let packet =
        (0usize..4, 1usize..3000, any::<u32>(), any::<bool>()).prop_map(|(which, len, seed, large)| {
            let build = &Build::all()[which];
            if !large {
                return (build.packet(&payload(len, seed)), PacketMeta::default());
            }
            let meta = PacketMeta {
                gso: match which {
                    0 => Gso::TcpV4,
                    1 => Gso::TcpV6,
                    _ => Gso::Udp,
                },
                gso_size: 700,
                header_len: build.header_len() as u16,
                checksum: Checksum::Partial {
                    start: build.ip_header_len() as u16,
                    offset: if build.tcp { 16 } else { 6 },
                },
                ..PacketMeta::default()
            };
            (build.partial(&payload(len, seed)), meta)
        });
    prop::collection::vec(packet, 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_split_of_a_stream_gives_the_same_packets(
        packets in packets(),
        which in 0usize..4,
        pieces in prop::collection::vec(1usize..1500, 1..20),
    ) {
        let framing = FRAMINGS[which];
        let expected: Vec<_> = packets
            .into_iter()
            .filter(|(_, meta)| framing.carries_gso() || meta.gso == Gso::None)
            .collect();
        let stream: Vec<u8> = expected
            .iter()
            .flat_map(|(packet, meta)| wire(framing, packet, meta).unwrap())
            .collect();
        let deframer = Deframer::new(framing, 65_535, false);
        let (mut held, mut got, mut given, mut wanted) = (Vec::new(), Vec::new(), 0, 0);
        for piece in pieces.iter().cycle() {
            if given == stream.len() {
                break;
            }
            let end = stream.len().min(given + piece);
            held.extend_from_slice(&stream[given..end]);
            given = end;
            loop {
                match deframer.next(&held).unwrap() {
                    Step::Packet { consumed, data, meta } => {
                        prop_assert!(held.len() >= wanted);
                        got.push((held[data].to_vec(), meta));
                        held.drain(..consumed);
                        wanted = 0;
                    }
                    Step::NeedMore { at_least } => {
                        prop_assert!(at_least > held.len() && at_least <= deframer.longest_unit());
                        wanted = at_least;
                        break;
                    }
                }
            }
        }
        prop_assert!(held.is_empty());
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn perturbed_streams_are_answered(
        packets in packets(),
        which in 0usize..4,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let framing = FRAMINGS[which];
        let mut stream: Vec<u8> =
            packets.iter().filter_map(|(packet, meta)| wire(framing, packet, meta).ok()).flatten().collect();
        for (at, byte) in changes {
            if !stream.is_empty() {
                let at = at.index(stream.len());
                stream[at] = byte;
            }
        }
        let deframer = Deframer::new(framing, 2000, true);
        let mut rest = &stream[..];
        while let Ok(Step::Packet { consumed, data, .. }) = deframer.next(rest) {
            prop_assert!(consumed > 0 && data.end == consumed && data.len() <= 2000);
            rest = &rest[consumed..];
        }
        let marks: Vec<usize> = (0..rest.len()).step_by(100).collect();
        if let Some(at) = deframer.resynchronise(&marks, rest) {
            prop_assert!(at > 0 && deframer.next(&rest[at..]).is_ok());
        }
    }

    #[test]
    fn any_hello_is_answered(bytes in prop::collection::vec(any::<u8>(), 0..20), magic in any::<bool>()) {
        let mut bytes = bytes;
        if magic && bytes.len() >= 8 {
            bytes[..8].copy_from_slice(&superframe::MAGIC);
        }
        if let Ok(Some(hello)) = Hello::parse(&bytes) {
            prop_assert_eq!(Hello::parse(&hello.encode()), Ok(Some(hello)));
        }
    }
}
