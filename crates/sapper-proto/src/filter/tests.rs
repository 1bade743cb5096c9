use proptest::prelude::*;

use super::*;
use crate::packet::testing::{Build, hex};

fn ping6() -> Vec<u8> {
    let mut packet = Build::udp6().packet(&[0; 8]);
    packet[6] = 58;
    packet
}

fn matches(filter: &str, packet: &[u8]) -> bool {
    let filter = Filter::parse(filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
    let plain = filter.matches(LinkType::Raw, packet);
    // The same packet in a frame; lengths are those of the frame then.
    if !filter.as_str().contains("greater") && !filter.as_str().contains("less") {
        let kind = if packet[0] >> 4 == 4 { "0800" } else { "86dd" };
        for header in [kind.to_owned(), format!("8100 0005 {kind}"), format!("88a8 0001 8100 0005 {kind}")] {
            let frame = [hex("010203040506 0a0b0c0d0e0f"), hex(&header), packet.to_vec()].concat();
            assert_eq!(filter.matches(LinkType::Ethernet, &frame), plain);
        }
    }
    plain
}

#[test]
fn primitives() {
    let [tcp4, tcp6, udp4, udp6] = Build::all().map(|build| build.packet(b"data"));
    let packets = [&tcp4, &tcp6, &udp4, &udp6, &ping6()];
    let expect = |filter: &str, wanted: [bool; 5]| {
        assert_eq!(packets.map(|packet| matches(filter, packet)), wanted, "{filter}");
    };
    const Y: bool = true;
    const N: bool = false;
    expect("", [Y, Y, Y, Y, Y]);
    expect("ip", [Y, N, Y, N, N]);
    expect("ip6", [N, Y, N, Y, Y]);
    expect("tcp", [Y, Y, N, N, N]);
    expect("udp", [N, N, Y, Y, N]);
    expect("icmp", [N, N, N, N, N]);
    expect("icmp6", [N, N, N, N, Y]);
    expect("host 192.0.2.1", [Y, N, Y, N, N]);
    expect("src host 192.0.2.1", [Y, N, Y, N, N]);
    expect("dst 192.0.2.1", [N, N, N, N, N]);
    expect("ip6 dst host 2001:db8:1::2", [N, Y, N, Y, Y]);
    expect("net 192.0.0.0/16", [Y, N, Y, N, N]);
    expect("dst net 192.0.0.0/16", [N, N, N, N, N]);
    expect("net 0.0.0.0/0", [Y, N, Y, N, N]);
    expect("net ::/0", [N, Y, N, Y, Y]);
    expect("src net 2001:db8::/48", [N, Y, N, Y, Y]);
    expect("dst net 2001:db8::/48", [N, N, N, N, N]);
    expect("port 443", [Y, Y, Y, Y, N]);
    expect("tcp src port 443", [Y, Y, N, N, N]);
    expect("udp dst port 443", [N, N, N, N, N]);
}

#[test]
fn lengths_include_the_number() {
    let packet = Build::udp4().packet(b"four");
    assert_eq!(packet.len(), 32);
    assert!(matches("greater 32", &packet) && !matches("greater 33", &packet));
    assert!(matches("less 32", &packet) && !matches("less 31", &packet));
    assert!(matches("less 18446744073709551615", &packet));
    assert!(Filter::parse("less 18446744073709551616").is_err());
}

#[test]
fn operators_bind_alike_from_the_left() {
    let packet = Build::tcp4().packet(b"data");
    assert!(matches("tcp or udp and ip", &packet));
    assert!(!matches("tcp or udp and ip6", &packet), "not tcp or (udp and ip6)");
    assert!(matches("tcp or (udp and ip6)", &packet));
    assert!(matches("!udp&&!(ip6||icmp)", &packet));
    assert!(matches("not not tcp and not udp", &packet));
    assert!(!matches("not (tcp and ip)", &packet));
    assert!(matches("  (  ( tcp )  )  ", &packet));
}

#[test]
fn later_fragments_have_no_ports_but_addresses() {
    let mut packet = Build::udp4().packet(b"data");
    packet[7] = 9;
    assert!(matches("udp and host 192.0.2.1", &packet));
    assert!(!matches("port 443", &packet));
    let frame = hex("ffffffffffff 010203040506 0806 0001");
    assert!(!Filter::parse("ip or ip6").unwrap().matches(LinkType::Ethernet, &frame));
}

#[test]
fn errors_say_where_and_what() {
    let error = |text: &str| Filter::parse(text).unwrap_err().to_string();
    assert_eq!(error("tpc"), "at byte 0: \"tpc\" where a primitive is expected");
    assert_eq!(error("tcp and"), "at byte 7: end where a primitive is expected");
    assert_eq!(error("tcp udp"), "at byte 4: \"udp\" where \"and\", \"or\" or the end is expected");
    assert_eq!(error("(tcp"), "at byte 4: end where \"and\", \"or\" or \")\" is expected");
    assert_eq!(error("tcp)"), "at byte 3: \")\" where \"and\", \"or\" or the end is expected");
    assert_eq!(error("tcp & udp"), "at byte 4: \"&\" where \"and\", \"or\" or the end is expected");
    assert_eq!(error("host example.org"), "at byte 5: \"example.org\" where an address is expected");
    assert_eq!(error("net 10.0.0.0/33"), "at byte 4: \"10.0.0.0/33\" where ADDRESS/BITS is expected");
    assert_eq!(error("net 10.0.0.0"), "at byte 4: \"10.0.0.0\" where ADDRESS/BITS is expected");
    assert_eq!(error("net 10.0.0.1/8"), "at byte 4: network has bits behind its prefix");
    assert_eq!(error("net 2001:db8::1/127"), "at byte 4: network has bits behind its prefix");
    assert_eq!(error("udp or ip port 5"), "at byte 7: only tcp and udp have ports");
    assert_eq!(error("port 65536"), "at byte 0: ports end at 65535");
    assert_eq!(error("port +5"), "at byte 5: \"+5\" where a port is expected");
    assert_eq!(error("tcp host 10.0.0.1"), "at byte 0: only ip and ip6 have addresses");
    assert_eq!(error("ip6 host 10.0.0.1"), "at byte 0: the address is of the other IP version");
    assert_eq!(error("src"), "at byte 3: end where an address is expected");
    assert_eq!(error("greater x"), "at byte 8: \"x\" where a length is expected");
    assert_eq!(error(&"(".repeat(100)), "at byte 65: nested deeper than 64");
    assert_eq!(error(&"x".repeat(5000)), "at byte 4096: longer than 4096 bytes");
    assert!(error(&"x".repeat(4000)).len() < 120);
    assert_eq!(error("tcp and ü"), "at byte 8: \"ü\" where a primitive is expected");
}

/// An expression as a tree, its text and what it means without any program.
#[derive(Clone, Debug)]
enum Tree {
    Leaf(&'static str),
    Not(Box<Tree>),
    And(Box<Tree>, Box<Tree>),
    Or(Box<Tree>, Box<Tree>),
}

impl Tree {
    fn text(&self) -> String {
        match self {
            Self::Leaf(text) => (*text).to_owned(),
            Self::Not(inner) => format!("not ({})", inner.text()),
            Self::And(left, right) => format!("({}) and ({})", left.text(), right.text()),
            Self::Or(left, right) => format!("({})||({})", left.text(), right.text()),
        }
    }

    fn is_true(&self, packet: &[u8]) -> bool {
        match self {
            Self::Leaf(text) => Filter::parse(text).unwrap().matches(LinkType::Raw, packet),
            Self::Not(inner) => !inner.is_true(packet),
            Self::And(left, right) => left.is_true(packet) & right.is_true(packet),
            Self::Or(left, right) => left.is_true(packet) | right.is_true(packet),
        }
    }
}

fn trees() -> impl Strategy<Value = Tree> {
    let leaf = prop::sample::select(vec!["ip", "tcp", "src host 192.0.2.1", "udp port 443", "greater 60"]);
    leaf.prop_map(Tree::Leaf).prop_recursive(5, 40, 2, |inner| {
        prop_oneof![
            inner.clone().prop_map(|tree| Tree::Not(Box::new(tree))),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| Tree::And(Box::new(a), Box::new(b))),
            (inner.clone(), inner).prop_map(|(a, b)| Tree::Or(Box::new(a), Box::new(b))),
        ]
    })
}

proptest! {
    #[test]
    fn programs_mean_what_their_trees_mean(tree in trees()) {
        let filter = Filter::parse(&tree.text()).unwrap();
        for build in Build::all() {
            let packet = build.packet(b"data");
            prop_assert_eq!(filter.matches(LinkType::Raw, &packet), tree.is_true(&packet));
        }
    }

    #[test]
    fn any_text_and_any_bytes_are_answered(
        words in prop::collection::vec(prop::sample::select(vec![
            "ip", "ip6", "tcp", "udp", "icmp", "host", "net", "port", "src", "dst", "10.0.0.0/8", "::1", "53",
            "and", "or", "not", "(", ")", "!", "&&", "||", "&", "greater", "less", "\u{fc}", "::/0",
        ]), 0..12),
        blank in prop::sample::select(vec!["", " ", "\u{a0}"]),
        bytes in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        if let Ok(filter) = Filter::parse(&words.join(blank)) {
            filter.matches(LinkType::Raw, &bytes);
            filter.matches(LinkType::Ethernet, &bytes);
        }
    }

    #[test]
    fn any_text_is_answered(text: String) {
        let _ = Filter::parse(&text);
    }
}
