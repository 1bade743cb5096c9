//! Packets for the tests of this crate, made the slow and obvious way, and a naive checksum.

use std::net::IpAddr;

use super::ip::protocol;

/// The checksum of RFC 1071, word by word.
pub(crate) fn naive_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether the transport checksum of a packet without extension headers is right.
pub(crate) fn naive_verify(packet: &[u8]) -> bool {
    let (header, protocol) = match packet[0] >> 4 {
        4 => (usize::from(packet[0] & 15) * 4, packet[9]),
        _ => (40, packet[6]),
    };
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    let mut all = addresses.to_vec();
    all.extend((packet.len() as u32 - header as u32).to_be_bytes());
    all.extend([0, 0, 0, protocol]);
    all.extend(&packet[header..]);
    naive_sum(&all) == 0xffff
}

/// A TCP or UDP packet to be built.
#[derive(Clone, Debug)]
pub(crate) struct Build {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) ports: (u16, u16),
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) id: u16,
    pub(crate) dont_fragment: bool,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// TCP options, a multiple of four bytes.
    pub(crate) options: Vec<u8>,
    /// TCP, or else UDP.
    pub(crate) tcp: bool,
}

pub(crate) const ACK: u8 = 0x10;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const CWR: u8 = 0x80;

impl Build {
    pub(crate) fn tcp4() -> Self {
        Self {
            source: "192.0.2.1".parse().unwrap(),
            destination: "198.51.100.2".parse().unwrap(),
            ports: (443, 50_000),
            tos: 0,
            ttl: 64,
            id: 0xfffe,
            dont_fragment: true,
            seq: 0xffff_f000,
            ack: 7,
            flags: ACK,
            window: 501,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            tcp: true,
        }
    }

    pub(crate) fn tcp6() -> Self {
        Self {
            source: "2001:db8::1".parse().unwrap(),
            destination: "2001:db8:1::2".parse().unwrap(),
            ..Self::tcp4()
        }
    }

    pub(crate) fn udp4() -> Self {
        Self { tcp: false, ..Self::tcp4() }
    }

    pub(crate) fn udp6() -> Self {
        Self { tcp: false, ..Self::tcp6() }
    }

    pub(crate) fn all() -> [Self; 4] {
        [Self::tcp4(), Self::tcp6(), Self::udp4(), Self::udp6()]
    }

    pub(crate) fn ip_header_len(&self) -> usize {
        if self.source.is_ipv4() { 20 } else { 40 }
    }

    pub(crate) fn header_len(&self) -> usize {
        self.ip_header_len() + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    /// The packet, with right checksums.
    pub(crate) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.ports.0.to_be_bytes());
        transport.extend(self.ports.1.to_be_bytes());
        let field = if self.tcp {
            transport.extend(self.seq.to_be_bytes());
            transport.extend(self.ack.to_be_bytes());
            transport.push(((20 + self.options.len()) / 4) as u8 * 16);
            transport.push(self.flags);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0, 0, 0, 0]);
            transport.extend(&self.options);
            16
        } else {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0, 0]);
            6
        };
        transport.extend(payload);
        let protocol = if self.tcp { protocol::TCP } else { protocol::UDP };

        let mut packet = Vec::new();
        let mut pseudo = Vec::new();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                packet.extend([0x45, self.tos]);
                packet.extend((20 + transport.len() as u16).to_be_bytes());
                packet.extend(self.id.to_be_bytes());
                packet.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                let checksum = !naive_sum(&packet);
                packet[10..12].copy_from_slice(&checksum.to_be_bytes());
                pseudo.extend(&packet[12..20]);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                packet.extend([0x60 | self.tos >> 4, self.tos << 4, 0x12, 0x34]);
                packet.extend((transport.len() as u16).to_be_bytes());
                packet.extend([protocol, self.ttl]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                pseudo.extend(&packet[8..40]);
            }
            _ => panic!("one version"),
        }
        pseudo.extend((transport.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        pseudo.extend(&transport);
        let checksum = match !naive_sum(&pseudo) {
            0 => 0xffff,
            other => other,
        };
        transport[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
        packet.extend(transport);
        packet
    }

    /// The packet as a kernel gives a large one: the checksum field has the pseudo-header's sum.
    pub(crate) fn partial(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.packet(payload);
        let (start, field) = (self.ip_header_len(), if self.tcp { 16 } else { 6 });
        let addresses = if start == 20 { 12..20 } else { 8..40 };
        let mut pseudo = packet[addresses].to_vec();
        pseudo.extend((packet.len() as u32 - start as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, if self.tcp { protocol::TCP } else { protocol::UDP }]);
        let sum = naive_sum(&pseudo);
        packet[start + field..start + field + 2].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}

/// Bytes that are all different enough to notice when they change places.
pub(crate) fn payload(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// Hexadecimal text to bytes; blanks do not count.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}
