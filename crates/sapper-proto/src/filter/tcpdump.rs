//! The filter language beside tcpdump's own: the same packets are chosen.

use std::io::Write;
use std::process::{Command, Stdio};

use super::*;
use crate::packet::testing::{Build, PSH, SYN, hex, payload};
use crate::pcapng::{self, Direction, Record};

const FILTERS: [&str; 34] = [
    "",
    "ip",
    "ip6",
    "tcp",
    "udp",
    "icmp",
    "icmp6",
    "host 192.0.2.1",
    "src host 192.0.2.1",
    "dst 192.0.2.1",
    "host 2001:db8::1",
    "ip6 dst host 2001:db8:1::2",
    "ip src host 192.0.2.9",
    "net 192.0.2.8/29",
    "src net 192.0.0.0/16 and dst net 198.51.100.0/24",
    "net 2001:db8::/48",
    "dst net ::/1",
    "net 0.0.0.0/0",
    "port 443",
    "port 53",
    "tcp port 443",
    "udp src port 53",
    "tcp dst port 50000",
    "greater 100",
    "less 100",
    "greater 61 and less 200",
    "not ip6",
    "! tcp and ! udp",
    "tcp or udp and ip6",
    "ip6 and tcp or udp",
    "not tcp or ip6 and not port 53",
    "not (tcp or ip6) and not port 53",
    "(udp && (port 53 || greater 500))",
    "not not (ip and not not tcp port 443)",
];

fn packets() -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for build in Build::all() {
        packets.push(build.packet(b""));
        packets.push(Build { flags: SYN, ports: (50_000, 443), ..build.clone() }.packet(&payload(20, 1)));
        packets.push(Build { flags: PSH, ports: (53, 40_000), ..build.clone() }.packet(&payload(900, 1)));
        let source = if build.source.is_ipv4() { "192.0.2.9" } else { "2001:db8::9" };
        let mut other = Build { source: source.parse().unwrap(), ports: (5, 53), ..build.clone() };
        packets.push(other.packet(&payload(60, 3)));
        std::mem::swap(&mut other.source, &mut other.destination);
        let mut ping = other.packet(&payload(60, 3));
        ping[if build.source.is_ipv4() { 9 } else { 6 }] = if build.source.is_ipv4() { 1 } else { 58 };
        packets.push(ping);
        if build.source.is_ipv4() {
            let mut fragment = other.packet(&payload(60, 3));
            fragment[6..8].copy_from_slice(&[0x20, 9]);
            packets.push(fragment);
        }
    }
    packets
}

/// Indices of the packets that tcpdump chooses: their timestamps are their indices.
fn chosen(capture: &[u8], filter: &str) -> Vec<usize> {
    let mut child = Command::new("tcpdump")
        .args(["-nn", "-tt", "-r", "-", filter])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("tcpdump was found before");
    // The capture is smaller than a pipe.
    child.stdin.take().unwrap().write_all(capture).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{filter}: {}", String::from_utf8_lossy(&output.stderr));
    // A packet's further lines are indented.
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once('.')?.0.parse().ok())
        .collect()
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn the_same_packets_are_chosen_as_by_tcpdump() {
    if Command::new("tcpdump").arg("--version").output().is_err() {
        eprintln!("skipped: tcpdump is not installed");
        return;
    }
    for link in [LinkType::Raw, LinkType::Ethernet] {
        let frames: Vec<Vec<u8>> = packets()
            .into_iter()
            .map(|packet| match (link, packet[0] >> 4) {
                (LinkType::Raw, _) => packet,
                (_, 4) => [hex("0a0000000001 0a0000000002 0800"), packet].concat(),
                _ => [hex("0a0000000001 0a0000000002 86dd"), packet].concat(),
            })
            .collect();
        let mut capture = Vec::new();
        pcapng::section_header(&mut capture, "sapper");
        pcapng::interface(&mut capture, link, 0, "tun0");
        for (index, frame) in frames.iter().enumerate() {
            let record = Record {
                interface: 0,
                timestamp: index as u64 * 1_000_000_000,
                direction: Direction::Inbound,
                data: frame,
                original_len: frame.len(),
                comment: Some("a comment"),
            };
            pcapng::packet(&mut capture, &record);
        }
        assert!(capture.len() < 65_536);
        for text in FILTERS {
            let filter = Filter::parse(text).unwrap();
            let ours: Vec<usize> =
                (0..frames.len()).filter(|index| filter.matches(link, &frames[*index])).collect();
            assert_eq!(ours, chosen(&capture, text), "{text:?} on {link:?}");
        }
    }
}
