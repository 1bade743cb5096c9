//! IPv4 and IPv6 headers: lengths, the way to the transport header, addresses, ECN.
//!
//! Total functions over any bytes: what is not an IP packet is an error or `None`, never a panic.
//! Options and extension headers are walked over, not interpreted; checksums live in
//! [`checksum`](super::checksum).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Ecn;
use super::checksum;

/// Bytes of the smallest IPv4 header.
pub const IPV4_HEADER: usize = 20;
/// Bytes of the fixed IPv6 header.
pub const IPV6_HEADER: usize = 40;
/// The longest packet that a 16-bit length can state (IPv6 does not count its fixed header).
pub const LONGEST: usize = IPV6_HEADER + 0xffff;

/// Protocol numbers (IANA) that this crate looks at.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;

    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION_OPTIONS: u8 = 60;
    pub(super) const MOBILITY: u8 = 135;
    pub(super) const HIP: u8 = 139;
    pub(super) const SHIM6: u8 = 140;
}

/// Why bytes are not an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpError {
    /// The first nibble is neither 4 nor 6.
    #[error("IP version is {0}, not 4 or 6")]
    Version(u8),
    /// An IPv4 header says that it is shorter than 20 bytes.
    #[error("IPv4 header length is {0} bytes, below 20")]
    HeaderLength(u8),
    /// An IPv4 packet says that it is shorter than its header.
    #[error("IPv4 total length is {total}, below its header length {header}")]
    TotalLength {
        /// The total length in the header.
        total: u16,
        /// The header length in the header.
        header: u8,
    },
    /// The packet ends inside its headers.
    #[error("packet of {have} bytes ends inside its headers, which take {need}")]
    Truncated {
        /// Bytes that are there.
        have: usize,
        /// Bytes that the headers take, as far as they could be read.
        need: usize,
    },
    /// The length in the header is not the packet's.
    #[error("IP header states {stated} bytes, the packet has {actual}")]
    Length {
        /// From the header.
        stated: usize,
        /// Of the packet.
        actual: usize,
    },
}

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Whether a packet is a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented.
    Whole,
    /// The first fragment: the transport header is there, its payload is not complete.
    First,
    /// A later fragment: there is no transport header.
    Later,
}

/// What the IP headers of a packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpHeader {
    /// IP version.
    pub version: Version,
    /// Bytes in front of the transport header: IPv4 with its options, IPv6 with its extension headers.
    pub header_len: usize,
    /// Length of the packet as stated.
    pub total_len: usize,
    /// Protocol number of what follows the headers.
    pub protocol: u8,
    /// Whether it is a fragment.
    pub fragment: Fragment,
}

impl IpHeader {
    /// Reads the headers of `packet`. They must be there whole; that the packet is as long as it
    /// states is not asked (captured packets may be cut): that is [`parse_exact`](Self::parse_exact).
    pub fn parse(packet: &[u8]) -> Result<Self, IpError> {
        let total_len =
            stated_len(packet)?.ok_or(IpError::Truncated { have: packet.len(), need: IPV4_HEADER })?;
        match packet[0] >> 4 {
            4 => Self::parse_v4(packet, total_len),
            _ => Self::parse_v6(packet, total_len),
        }
    }

    /// Like [`parse`](Self::parse), for packets that must be exactly as long as they state.
    pub fn parse_exact(packet: &[u8]) -> Result<Self, IpError> {
        check_len(packet)?;
        Self::parse(packet)
    }

    fn parse_v4(packet: &[u8], total_len: usize) -> Result<Self, IpError> {
        let header_len = usize::from(packet[0] & 15) * 4;
        if packet.len() < header_len {
            return Err(IpError::Truncated { have: packet.len(), need: header_len });
        }
        let flags = u16::from_be_bytes([packet[6], packet[7]]);
        let fragment = fragment_of(flags & 0x1fff, flags & 0x2000 != 0);
        Ok(Self { version: Version::V4, header_len, total_len, protocol: packet[9], fragment })
    }

    fn parse_v6(packet: &[u8], total_len: usize) -> Result<Self, IpError> {
        if packet.len() < IPV6_HEADER {
            return Err(IpError::Truncated { have: packet.len(), need: IPV6_HEADER });
        }
        let mut header = Self {
            version: Version::V6,
            header_len: IPV6_HEADER,
            total_len,
            protocol: packet[6],
            fragment: Fragment::Whole,
        };
        // Each turn moves on by at least eight bytes, so the packet's length bounds the walk.
        while is_extension(header.protocol) {
            let at = header.header_len;
            let Some(&[next, len, high, low, ..]) = packet.get(at..) else {
                return Err(IpError::Truncated { have: packet.len(), need: at + 8 });
            };
            let this = std::mem::replace(&mut header.protocol, next);
            header.header_len += match this {
                protocol::FRAGMENT => 8,
                protocol::AUTHENTICATION => 8 + usize::from(len) * 4,
                _ => 8 + usize::from(len) * 8,
            };
            if header.header_len > packet.len() {
                return Err(IpError::Truncated { have: packet.len(), need: header.header_len });
            }
            if this == protocol::FRAGMENT {
                let field = u16::from_be_bytes([high, low]);
                header.fragment = fragment_of(field >> 3, field & 1 != 0);
                if header.fragment == Fragment::Later {
                    // What follows is the middle of something: no header to walk over.
                    break;
                }
            }
        }
        Ok(header)
    }
}

/// Whether an IPv6 extension header of that number lies in front of the transport header.
pub(super) fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION_OPTIONS
            | protocol::MOBILITY
            | protocol::HIP
            | protocol::SHIM6
    )
}

fn fragment_of(offset: u16, more: bool) -> Fragment {
    match (offset, more) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    }
}

/// The version in the first nibble.
pub fn version(packet: &[u8]) -> Option<Version> {
    match packet.first()? >> 4 {
        4 => Some(Version::V4),
        6 => Some(Version::V6),
        _ => None,
    }
}

/// The length that the header at the start of `bytes` states (IPv4: its total length; IPv6: 40 and
/// the payload length), or `None` while too few bytes are there to tell.
///
/// A wrong byte is an error as soon as it can be seen. A jumbogram (payload length 0 and a
/// hop-by-hop option) states 40 bytes: those are not carried.
pub fn stated_len(bytes: &[u8]) -> Result<Option<usize>, IpError> {
    let Some(&first) = bytes.first() else { return Ok(None) };
    match first >> 4 {
        4 => {
            let header = (first & 15) * 4;
            if usize::from(header) < IPV4_HEADER {
                return Err(IpError::HeaderLength(header));
            }
            let Some(&[high, low]) = bytes.get(2..4) else { return Ok(None) };
            let total = u16::from_be_bytes([high, low]);
            if total < u16::from(header) {
                return Err(IpError::TotalLength { total, header });
            }
            Ok(Some(usize::from(total)))
        }
        6 => {
            let Some(&[high, low]) = bytes.get(4..6) else { return Ok(None) };
            Ok(Some(IPV6_HEADER + usize::from(u16::from_be_bytes([high, low]))))
        }
        other => Err(IpError::Version(other)),
    }
}

/// That `packet` is exactly as long as its header states. Returns its version.
pub fn check_len(packet: &[u8]) -> Result<Version, IpError> {
    match stated_len(packet)? {
        Some(stated) if stated == packet.len() => {
            Ok(if packet[0] >> 4 == 4 { Version::V4 } else { Version::V6 })
        }
        Some(stated) => Err(IpError::Length { stated, actual: packet.len() }),
        None => Err(IpError::Truncated { have: packet.len(), need: IPV4_HEADER }),
    }
}

/// Source and destination address.
pub fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match version(packet)? {
        Version::V4 => {
            let (source, rest) = packet.get(12..)?.split_first_chunk::<4>()?;
            let destination = rest.first_chunk::<4>()?;
            Some((Ipv4Addr::from(*source).into(), Ipv4Addr::from(*destination).into()))
        }
        Version::V6 => {
            let (source, rest) = packet.get(8..)?.split_first_chunk::<16>()?;
            let destination = rest.first_chunk::<16>()?;
            Some((Ipv6Addr::from(*source).into(), Ipv6Addr::from(*destination).into()))
        }
    }
}

/// The ECN codepoint of an IP packet.
pub fn ecn(packet: &[u8]) -> Option<Ecn> {
    match version(packet)? {
        Version::V4 => Some(Ecn::from_bits(*packet.get(1)?)),
        Version::V6 => Some(Ecn::from_bits(*packet.get(1)? >> 4)),
    }
}

/// Sets the ECN codepoint, and mends the IPv4 header checksum for it (RFC 1624). Returns whether
/// `packet` had a header to set it in.
pub fn set_ecn(packet: &mut [u8], ecn: Ecn) -> bool {
    match version(packet) {
        Some(Version::V4) if packet.len() >= IPV4_HEADER => {
            let old = u16::from_be_bytes([packet[0], packet[1]]);
            packet[1] = packet[1] & !3 | ecn.bits();
            let new = u16::from_be_bytes([packet[0], packet[1]]);
            let sum = !u16::from_be_bytes([packet[10], packet[11]]);
            let sum = checksum::add(checksum::add(sum, !old), new);
            packet[10..12].copy_from_slice(&(!sum).to_be_bytes());
            true
        }
        Some(Version::V6) if packet.len() >= IPV6_HEADER => {
            packet[1] = packet[1] & !0x30 | ecn.bits() << 4;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Build, hex};
    use super::*;

    #[test]
    fn lengths_come_from_the_header_as_soon_as_it_is_there() {
        assert_eq!(stated_len(&[]), Ok(None));
        assert_eq!(stated_len(&hex("45 00 05")), Ok(None));
        assert_eq!(stated_len(&hex("45 00 05 00")), Ok(Some(1280)));
        assert_eq!(stated_len(&hex("60 00 00 00 04")), Ok(None));
        assert_eq!(stated_len(&hex("60 00 00 00 04 d8")), Ok(Some(1280)));
        assert_eq!(stated_len(&hex("60 00 00 00 ff ff")), Ok(Some(LONGEST)));
        assert_eq!(stated_len(&hex("50")), Err(IpError::Version(5)));
        assert_eq!(stated_len(&hex("44")), Err(IpError::HeaderLength(16)));
        assert_eq!(stated_len(&hex("46 00 00 17")), Err(IpError::TotalLength { total: 23, header: 24 }));
    }

    #[test]
    fn an_ipv4_header_with_options_and_a_fragment() {
        let mut packet = hex("46 03 001c 1234 2000 40 11 0000 c0000201 c6336402 01010100 0035 0035");
        let header = IpHeader::parse_exact(&packet).unwrap();
        assert_eq!((header.header_len, header.total_len, header.protocol), (24, 28, protocol::UDP));
        assert_eq!(header.fragment, Fragment::First);
        packet[7] = 1;
        assert_eq!(IpHeader::parse(&packet).unwrap().fragment, Fragment::Later);
        packet.pop();
        assert_eq!(IpHeader::parse_exact(&packet), Err(IpError::Length { stated: 28, actual: 27 }));
        assert!(matches!(IpHeader::parse(&packet[..23]), Err(IpError::Truncated { have: 23, need: 24 })));
    }

    #[test]
    fn extension_headers_are_walked_over() {
        // Hop-by-hop of 16 bytes, authentication of 12, fragment (first), then UDP.
        let mut packet = hex("60000000 002e 00 40 20010db8000000000000000000000001");
        packet.extend(hex("20010db8000000000000000000000002"));
        packet.extend(hex("33 01 000000000000 0000000000000000"));
        packet.extend(hex("2c 01 0000 00000001 00000002"));
        packet.extend(hex("11 00 0001 00000007"));
        packet.extend([0; 10]);
        let header = IpHeader::parse_exact(&packet).unwrap();
        assert_eq!((header.header_len, header.protocol), (40 + 16 + 12 + 8, protocol::UDP));
        assert_eq!(header.fragment, Fragment::First);
        packet[40 + 16 + 12 + 2] = 1;
        assert_eq!(IpHeader::parse(&packet).unwrap().fragment, Fragment::Later);
        for cut in 0..76 {
            assert!(matches!(IpHeader::parse(&packet[..cut]), Err(IpError::Truncated { .. })), "{cut}");
        }
    }

    #[test]
    fn addresses_and_ecn() {
        for build in Build::all() {
            let mut packet = build.packet(b"payload");
            assert_eq!(addresses(&packet), Some((build.source, build.destination)));
            assert_eq!(ecn(&packet), Some(Ecn::NotEct));
            for codepoint in [Ecn::Ect0, Ecn::Ce, Ecn::Ect1, Ecn::NotEct] {
                assert!(set_ecn(&mut packet, codepoint));
                assert_eq!(ecn(&packet), Some(codepoint));
                if build.source.is_ipv4() {
                    let stored = u16::from_be_bytes([packet[10], packet[11]]);
                    assert_eq!(checksum::ipv4_header(&packet[..20]), stored);
                }
            }
            assert_eq!(packet, build.packet(b"payload"), "back where it began");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200), first in 0x40u8..0x70) {
            let mut bytes = bytes;
            if let Some(byte) = bytes.first_mut() { *byte = first; }
            if let Ok(header) = IpHeader::parse(&bytes) {
                prop_assert!(header.header_len <= bytes.len());
            }
            let _ = (addresses(&bytes), ecn(&bytes), check_len(&bytes));
            set_ecn(&mut bytes, Ecn::Ce);
        }
    }
}
