use proptest::prelude::*;

use super::*;
use crate::packet::testing::hex;

fn header(stream: u32, kind: Kind, payload: u32) -> Header {
    Header { stream, kind, payload }
}

fn hello() -> Hello {
    Hello {
        resume: true,
        capabilities: Capabilities::ALL,
        window: 0x40000,
        max_streams: 10_000,
        replay: 0x40_0000,
        session: [0xab; 16],
        token: Token([0xcd; 32]),
        received: 0x0102_0304_0506,
        application: b"{}".to_vec(),
    }
}

#[test]
fn the_wire_forms() {
    assert_eq!(header(7, Kind::Data, 5).encode()[..], hex("0000000a 00000007 01"));
    assert_eq!(header(u32::MAX - 1, Kind::Close, 0).encode()[..], hex("00000005 fffffffe 02"));
    assert_eq!(header(1, Kind::Error, 0).encode()[..], hex("00000005 00000001 03"));
    assert_eq!(header(1, Kind::Data, LONGEST_BODY - 5).encode()[..], hex("04000000 00000001 01"));
    assert_eq!(
        hello().encode(),
        hex(&format!(
            "00000053 00000000 10 01 01 0001 0000001f 00040000 00002710 00400000 {} {} 0000010203040506 7b7d",
            "ab".repeat(16),
            "cd".repeat(32)
        ))
    );
    let info = OpenInfo {
        service: 2,
        visitor: Some(("192.0.2.7:50000".parse().unwrap(), "198.51.100.9:443".parse().unwrap())),
        server_name: Some("a.b".into()),
        alpn: Some(b"h2".to_vec()),
    };
    assert_eq!(info.encode(), hex("0002 04 c0000207 c6336409 c350 01bb 01 03 612e62 02 02 6832"));
    assert_eq!(OpenInfo::default().encode(), hex("0000 00"));
    assert_eq!(encode_reason(&[], Code::REFUSED, "no"), hex("00000002 6e6f"));
}

#[test]
fn lengths_that_lie_are_refused_at_their_fourth_byte() {
    let parse = |text: &str| Header::parse(&hex(text));
    let long = FrameError::TooLong { length: 0x0400_0001, maximum: LONGEST_BODY };
    assert_eq!(parse("04000001"), Err(long));
    assert_eq!(long.to_string(), "Declared message length 67108865 is too long, maximum is 67108864");
    assert_eq!(parse("00000004"), Err(FrameError::TooShort(4)));
    let short = FrameError::TooShort(4).to_string();
    assert_eq!(short, "Declared message length 4 is too short for even just the header");
    assert_eq!(parse("04000000"), Ok(Parsed::NeedMore { at_least: HEADER }));
    assert_eq!(parse(""), Ok(Parsed::NeedMore { at_least: HEADER }));
    for kind in ["00", "04", "0f", "14", "25", "ff"] {
        let error = parse(&format!("00000005 00000001 {kind}")).unwrap_err();
        assert_eq!(error.to_string(), "Message is not valid");
    }
}

#[test]
fn each_kind_has_its_streams_and_its_length() {
    for kind in Kind::ALL {
        assert_eq!(Kind::from_wire(kind as u8), Some(kind));
        let connection = matches!(kind, Kind::Hello | Kind::Ping | Kind::Pong | Kind::Ack | Kind::GoAway);
        for stream in [0, 1, u32::MAX - 1, u32::MAX] {
            let right = stream != u32::MAX && (stream == 0) == connection;
            let parsed = Header::parse(&header(stream, kind, 8).encode());
            assert_eq!(!matches!(parsed, Err(FrameError::Stream(..))), right, "{kind:?} {stream}");
        }
    }
    let refused = |kind, payload| {
        let stream = u32::from(!kind_on_connection(kind));
        Header::parse(&header(stream, kind, payload).encode()).is_err()
    };
    for kind in [Kind::Ping, Kind::Pong, Kind::Ack] {
        assert!(refused(kind, 7) && !refused(kind, 8) && refused(kind, 9));
    }
    assert!(refused(Kind::Window, 3) && !refused(Kind::Window, 4) && refused(Kind::Fin, 1));
    assert!(refused(Kind::Open, 1025) && !refused(Kind::Open, 1024) && !refused(Kind::Close, 9_999));
    assert!(refused(Kind::Hello, 75) && !refused(Kind::Hello, 76) && refused(Kind::Hello, 65_537));
}

fn kind_on_connection(kind: Kind) -> bool {
    kind.is_link() || kind == Kind::GoAway
}

#[test]
fn hellos_of_other_versions_and_unknown_bits() {
    let mut bytes = hello().encode().split_off(HEADER);
    assert_eq!(Hello::parse(&bytes), Ok(hello()));
    bytes[0] = 9;
    bytes[2] = 0xff;
    bytes[4] = 0xff;
    assert_eq!(Hello::parse(&bytes), Ok(hello()), "a newer one that speaks ours too");
    bytes[1] = 2;
    assert!(Hello::parse(&bytes).is_err());
    bytes[..2].copy_from_slice(&[0, 0]);
    assert!(Hello::parse(&bytes).is_err());
    assert!(Hello::parse(&bytes[..75]).is_err());
    assert_eq!(format!("{:?}", Token([1; 32])), "Token(…)");
    let long = Hello { application: vec![b'x'; 70_000], ..hello() }.encode();
    assert_eq!(long.len(), HEADER + LONGEST_HELLO);
}

#[test]
fn capabilities_need_streams() {
    let ping_only = Capabilities(Capabilities::PING.0);
    assert_eq!(Capabilities::ALL.common(ping_only), Capabilities(0));
    assert_eq!(Capabilities::ALL.common(Capabilities(3)), Capabilities(3));
}

#[test]
fn reasons_are_cut_and_cleaned() {
    let long = "ä".repeat(200);
    let bytes = encode_reason(&[], Code(77), &long);
    assert_eq!(bytes.len(), 4 + 256);
    let (code, text) = parse_reason(Kind::Reset, &bytes).unwrap();
    assert_eq!((code, text.as_str()), (Code(77), "ä".repeat(128).as_str()));
    let (_, text) = parse_reason(Kind::Reset, b"\0\0\0\0a\x1b[2J\xff\n").unwrap();
    assert_eq!(text, "a\u{fffd}[2J\u{fffd}\u{fffd}");
    assert!(parse_reason(Kind::Reset, &[0, 0, 0]).is_err());
}

proptest! {
    #[test]
    fn open_comes_back(
        service: u16, v6: bool, from: u128, to: u128, ports: (u16, u16), known: bool,
        server_name in proptest::option::of("[a-z.]{0,99}"),
        alpn in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..99)),
    ) {
        let ip = |bits: u128| if v6 { IpAddr::from(bits.to_be_bytes()) } else { Ipv4Addr::from_bits(bits as u32).into() };
        let visitor = known.then(|| (SocketAddr::new(ip(from), ports.0), SocketAddr::new(ip(to), ports.1)));
        let info = OpenInfo { service, visitor, server_name, alpn };
        let bytes = info.encode();
        prop_assert!(bytes.len() <= LONGEST_CONTROL);
        prop_assert_eq!(OpenInfo::parse(&bytes), Ok(info));
    }

    #[test]
    fn any_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Header::parse(&bytes);
        let _ = Hello::parse(&bytes);
        let _ = OpenInfo::parse(&bytes);
        let _ = parse_reason(Kind::Reset, &bytes);
    }
}
