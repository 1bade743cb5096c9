use proptest::prelude::*;

use super::*;
use crate::packet::testing::hex;

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn done(header: Header, consumed: usize) -> Result<Parsed<Header>, ProxyError> {
    Ok(Parsed::Done { consumed, value: header })
}

fn full() -> Header {
    let mut header = Header::tcp(Version::V2, address("192.0.2.7:50000"), address("198.51.100.9:443"));
    header.details = Details {
        alpn: Some(b"h2".to_vec()),
        authority: Some("a.example".into()),
        unique_id: Some(vec![1, 2]),
        netns: Some("blue".into()),
        tls: Some(Tls {
            certificate_now: true,
            certificate_in_session: true,
            verified: true,
            version: Some("TLSv1.3".into()),
            client_cn: Some("ann".into()),
            cipher: Some("AES".into()),
        }),
        other: vec![(0xe0, vec![9])],
    };
    header
}

#[test]
fn the_wire_forms() {
    let v4 = Header::tcp(Version::V1, address("192.0.2.7:50000"), address("198.51.100.9:443"));
    assert_eq!(v4.encode().unwrap(), b"PROXY TCP4 192.0.2.7 198.51.100.9 50000 443\r\n");
    let v6 = Header::tcp(Version::V1, address("[2001:db8::7]:50000"), address("[::1]:443"));
    assert_eq!(v6.encode().unwrap(), b"PROXY TCP6 2001:db8::7 ::1 50000 443\r\n");
    let mixed = Header::tcp(Version::V1, address("192.0.2.7:5"), address("[::1]:443"));
    assert_eq!(mixed.encode().unwrap(), b"PROXY TCP6 ::ffff:192.0.2.7 ::1 5 443\r\n");

    let local = Header { version: Version::V2, addresses: Addresses::Local, details: Details::default() };
    assert_eq!(local.encode().unwrap(), hex("0d0a0d0a000d0a515549540a 20 00 0000"));
    let plain = Header { version: Version::V2, ..v6 };
    assert_eq!(
        plain.encode().unwrap(),
        hex(concat!(
            "0d0a0d0a000d0a515549540a 21 21 0024 20010db8000000000000000000000007",
            "00000000000000000000000000000001 c350 01bb"
        ))
    );
    assert_eq!(
        full().encode().unwrap(),
        hex(concat!(
            "0d0a0d0a000d0a515549540a 21 11 004b c0000207 c6336409 c350 01bb",
            "01 0002 6832 02 0009 612e6578616d706c65 05 0002 0102",
            "20 001b 07 00000000 21 0007 544c5376312e33 22 0003 616e6e 23 0003 414553",
            "30 0004 626c7565 e0 0001 09"
        ))
    );
    assert_eq!(Header::parse(&full().encode().unwrap()), done(full(), 91));
}

#[test]
fn a_part_is_not_enough_and_what_follows_is_not_touched() {
    let lines = [Header { version: Version::V1, details: Details::default(), ..full() }, full()];
    for header in lines {
        let mut bytes = header.encode().unwrap();
        let len = bytes.len();
        for end in 0..len {
            let Ok(Parsed::NeedMore { at_least }) = Header::parse(&bytes[..end]) else {
                panic!("{end} of {len} bytes are no header");
            };
            assert!(at_least > end && at_least <= len);
        }
        bytes.extend(b"\r\nGET");
        assert_eq!(Header::parse(&bytes), done(header, len));
    }
}

#[test]
fn lines_of_version_1() {
    let line = |text: &str| Header::parse(format!("{text}\r\n").as_bytes());
    let unknown = Header { version: Version::V1, addresses: Addresses::Unknown, details: Details::default() };
    assert_eq!(line("PROXY UNKNOWN"), done(unknown.clone(), 15));
    assert_eq!(line("PROXY UNKNOWN ffff::1 any thing 1 2"), done(unknown, 37));
    let longest = format!("PROXY TCP6 {0} {0} 65535 65535", "ffff:f".repeat(7) + "ff:ffff");
    assert!(longest.len() + 2 > LONGEST_V1 || line(&longest).is_err());
    for wrong in [
        "PROXY TCP4 1.2.3.4 1.2.3.4 1",
        "PROXY TCP4 1.2.3.4 1.2.3.4 1 65536",
        "PROXY TCP4 1.2.3.4 1.2.3.4 +1 2",
        "PROXY TCP4 1.2.3.4 1.2.3.4 01 2",
        "PROXY TCP4 1.2.3.4 1.2.3.4 1 2 ",
        "PROXY TCP4 1.2.3.04 1.2.3.4 1 2",
        "PROXY TCP4 ::1 ::1 1 2",
        "PROXY TCP6 1.2.3.4 1.2.3.4 1 2",
        "PROXY TCP4  1.2.3.4 1.2.3.4 1 2",
        "PROXY UDP4 1.2.3.4 1.2.3.4 1 2",
        "PROXY ",
    ] {
        assert!(matches!(line(wrong), Err(ProxyError::Line(_))), "{wrong}");
    }
    let endless = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat();
    assert_eq!(Header::parse(&endless), Err(ProxyError::Line("has no end")));
    assert_eq!(Header::parse(b"GET / HTTP/1.1\r\n"), Err(ProxyError::Absent));
    assert_eq!(Header::parse(b"PROXYX"), Err(ProxyError::Absent));
    assert_eq!(Header::parse(b"\r\n\r\n\0\r\nQUIX"), Err(ProxyError::Absent));
}

#[test]
fn lying_binary_headers_are_refused() {
    let good = full().encode().unwrap();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Header::parse(&bytes)
    };
    assert_eq!(with(12, 0x22), Err(ProxyError::VersionCommand(0x22)));
    assert_eq!(with(12, 0x11), Err(ProxyError::VersionCommand(0x11)));
    assert_eq!(with(13, 0x13), Err(ProxyError::Family(0x13)));
    assert_eq!(with(13, 0x41), Err(ProxyError::Family(0x41)));
    assert_eq!(with(13, 0x31), Err(ProxyError::Short("the address")));
    assert_eq!(with(14, 0xff), Err(ProxyError::TooLong(16 + 0xff4b)));
    assert_eq!(with(30, 9), Err(ProxyError::Short("a TLV")));
    assert_eq!(with(36, 7), Err(ProxyError::Value("the authority")));
    let mut cut = good.clone();
    cut[15] -= 1;
    assert_eq!(Header::parse(&cut), Err(ProxyError::Short("a TLV")));
    let huge = Details { alpn: Some(vec![0; LONGEST_V2]), ..Details::default() };
    assert!(Header { details: huge, ..full() }.encode().is_err());
}

#[test]
fn a_checksum_counts_where_there_is_one() {
    let header = Header { details: Details::default(), ..full() };
    let mut bytes = header.encode().unwrap();
    bytes.extend([TLV_CRC32C, 0, 4, 0, 0, 0, 0]);
    bytes[15] += 7;
    let sum = !crc32c(!0, &bytes);
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(Header::parse(&bytes), done(header, bytes.len()));
    bytes[20] ^= 1;
    assert_eq!(Header::parse(&bytes), Err(ProxyError::Checksum));
    assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283, "the check value of CRC-32C");
}

#[test]
fn every_kind_of_address() {
    let unix = |transport| Addresses::Unix {
        transport,
        source: b"\0abstract".to_vec(),
        destination: vec![b'x'; UNIX_LEN],
    };
    let inet = |transport| Addresses::Inet {
        transport,
        source: address("[::1]:1"),
        destination: address("[::2]:2"),
    };
    let (stream, datagram) = (Transport::Stream, Transport::Datagram);
    for addresses in
        [Addresses::Local, Addresses::Unknown, unix(stream), unix(datagram), inet(stream), inet(datagram)]
    {
        let header = Header { version: Version::V2, addresses, details: Details::default() };
        let bytes = header.encode().unwrap();
        assert_eq!(Header::parse(&bytes), done(header, bytes.len()));
    }
}

#[test]
fn what_stands_in_a_local_header_is_discarded() {
    let local = Header { version: Version::V2, addresses: Addresses::Local, details: Details::default() };
    // A family that does not exist, an address cut short, a TLV cut short, a checksum that is wrong, a TLV.
    for rest in [
        "ff 0003 616263",
        "11 0000",
        "00 0003 616263",
        "00 0007 03 0004 61626364",
        "11 000f 00000000 00000000 0000 0000 010002",
        "00 0005 01 0002 6832",
    ] {
        let bytes = hex(&format!("0d0a0d0a000d0a515549540a 20 {rest}"));
        assert_eq!(Header::parse(&bytes), done(local.clone(), bytes.len()), "{rest}");
        let behind = [&bytes[..], b"payload"].concat();
        assert_eq!(Header::parse(&behind), done(local.clone(), bytes.len()), "{rest}");
        let short = Header::parse(&bytes[..bytes.len() - 1]);
        assert!(matches!(short, Ok(Parsed::NeedMore { .. })), "{rest}: {short:?}");
    }
    let too_long = hex("0d0a0d0a000d0a515549540a 20 00 ffff");
    assert!(matches!(Header::parse(&too_long), Err(ProxyError::TooLong(_))));
}

proptest! {
    #[test]
    fn headers_come_back(
        v6: bool, from: u128, to: u128, ports: (u16, u16),
        alpn: Option<Vec<u8>>, name in proptest::option::of("[a-z.]{0,40}"), cn in proptest::option::of("\\PC{0,40}"),
        other in proptest::collection::vec((0xe0u8.., proptest::collection::vec(any::<u8>(), 0..20)), 0..4),
    ) {
        let ip = |bits: u128| if v6 { IpAddr::from(bits.to_be_bytes()) } else { IpAddr::V4(Ipv4Addr::from_bits(bits as u32)) };
        let tls = cn.map(|cn| Tls { client_cn: Some(cn), ..Tls::default() });
        let header = Header {
            version: Version::V2,
            addresses: Addresses::Inet {
                transport: Transport::Stream,
                source: SocketAddr::new(ip(from), ports.0),
                destination: SocketAddr::new(ip(to), ports.1),
            },
            details: Details { alpn, authority: name, tls, other, ..Details::default() },
        };
        let bytes = header.encode().unwrap();
        prop_assert_eq!(Header::parse(&bytes), done(header, bytes.len()));
    }

    #[test]
    fn perturbed_headers_do_not_panic(at in 0usize..91, value: u8, cut in 0usize..91) {
        let mut bytes = full().encode().unwrap();
        bytes[at] = value;
        let _ = Header::parse(&bytes);
        let _ = Header::parse(&bytes[..cut]);
    }
}
