//! The 10-byte virtio-net header in front of a packet (little-endian), and what it may say about it.
//!
//! Read as hostile input: what [`decode`] returns was checked against the packet itself. `hdr_len`
//! is never believed (kernels put the length of whole headers or nothing useful there): it is
//! computed. The 12-byte form with `num_buffers` is not spoken.

use super::ip::{self, Fragment, IpError, IpHeader, Version, protocol};
use super::{Checksum, Gso, PacketMeta, checksum};

/// Bytes of the header.
pub const HEADER_LEN: usize = 10;

/// Most segments of one UDP super-packet (the limit of Linux, `UDP_MAX_SEGMENTS`), and of a TCP one
/// whose segments are below [`LEAST_TCP_SEGMENT`].
pub const MOST_SMALL_SEGMENTS: usize = 128;

/// Least payload of the segments of a long TCP super-packet. Linux sends none below 48 bytes with up
/// to 40 of options, but joins what it receives, whatever its size. With this a hostile header cannot
/// turn 64 KB into more than 8,192 packets.
pub const LEAST_TCP_SEGMENT: u16 = 8;

/// Most bytes of headers that each segment repeats: real ones have up to 100, or some more with
/// extension headers. Bounds what cutting a hostile packet can make of it.
pub const LONGEST_HEADERS: usize = 256;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// TCP flag: congestion window reduced.
const CWR: u8 = 0x80;

/// Why a virtio-net header is not believed. Each names the field that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtioError {
    /// The packet itself is none.
    #[error("packet: {0}")]
    Packet(#[from] IpError),
    /// A flag that was not agreed on, or a large packet without its partial checksum.
    #[error("flags: {0:#04x}")]
    Flags(u8),
    /// A GSO type that is unknown, or does not fit the packet's version or protocol.
    #[error("gso_type: {0:#04x} does not fit the packet")]
    GsoType(u8),
    /// A segment size of a packet that is not large, or one that is too small.
    #[error("gso_size: {0}")]
    GsoSize(u16),
    /// Summing begins in the IP header or behind the packet, or not at the transport header.
    #[error("csum_start: {0}")]
    ChecksumStart(u16),
    /// The checksum field lies outside the packet, or not where the protocol has it.
    #[error("csum_offset: {0}")]
    ChecksumOffset(u16),
    /// The headers of a large packet are longer than [`LONGEST_HEADERS`].
    #[error("headers: {0} bytes")]
    Headers(usize),
    /// The transport header of a large packet is cut, or states a wrong length.
    #[error("transport header: {0} bytes")]
    Transport(usize),
}

/// Reads the header of an IP packet (what a TUN gives, or a superframe).
pub fn decode(header: &[u8; HEADER_LEN], packet: &[u8]) -> Result<PacketMeta, VirtioError> {
    let raw = Raw::read(header);
    ip::check_len(packet)?;
    if raw.gso_type == GSO_NONE {
        if raw.gso_size != 0 {
            return Err(VirtioError::GsoSize(raw.gso_size));
        }
        // The headers are walked only where a checksum has to be placed behind them.
        let from = match raw.flags & NEEDS_CSUM {
            0 => 0,
            _ => IpHeader::parse(packet)?.header_len,
        };
        return Ok(PacketMeta { checksum: raw.checksum(packet, from)?, ..PacketMeta::default() });
    }
    raw.decode_large(packet)
}

/// Reads the header of an Ethernet frame (a TAP's). Large frames are not taken.
pub fn decode_frame(header: &[u8; HEADER_LEN], frame: &[u8]) -> Result<PacketMeta, VirtioError> {
    const ETHERNET_HEADER: usize = 14;
    let raw = Raw::read(header);
    match (raw.gso_type, raw.gso_size) {
        (GSO_NONE, 0) => {}
        (GSO_NONE, size) => return Err(VirtioError::GsoSize(size)),
        (other, _) => return Err(VirtioError::GsoType(other)),
    }
    Ok(PacketMeta { checksum: raw.checksum(frame, ETHERNET_HEADER)?, ..PacketMeta::default() })
}

/// Writes the header for a packet. [`Gso::Datagrams`] are no IP packets and have none: such a
/// packet's header says nothing.
pub fn encode(meta: &PacketMeta, packet: &[u8]) -> [u8; HEADER_LEN] {
    let gso_type = match meta.gso {
        Gso::None | Gso::Datagrams => GSO_NONE,
        Gso::TcpV4 => GSO_TCPV4,
        Gso::TcpV6 => GSO_TCPV6,
        Gso::Udp => GSO_UDP_L4,
    };
    let mut raw = Raw { gso_type, ..Raw::default() };
    if raw.gso_type != GSO_NONE {
        raw.gso_size = meta.gso_size;
        raw.hdr_len = meta.header_len;
    }
    match meta.checksum {
        Checksum::Partial { start, offset } => {
            raw.flags = NEEDS_CSUM;
            raw.csum_start = start;
            raw.csum_offset = offset;
            // Whoever cuts a segment train with CWR must clear it behind the first segment.
            let cwr = packet.get(usize::from(start) + 13).is_some_and(|flags| flags & CWR != 0);
            if cwr && matches!(meta.gso, Gso::TcpV4 | Gso::TcpV6) {
                raw.gso_type |= GSO_ECN;
            }
        }
        Checksum::Valid => raw.flags = DATA_VALID,
        Checksum::Unverified => {}
    }
    raw.write()
}

/// The fields as they lie in the header.
#[derive(Default)]
struct Raw {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Raw {
    fn read(header: &[u8; HEADER_LEN]) -> Self {
        let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1] = *header;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([s0, s1]),
            csum_start: u16::from_le_bytes([c0, c1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
        }
    }

    fn write(&self) -> [u8; HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [s0, s1] = self.gso_size.to_le_bytes();
        let [c0, c1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, s0, s1, c0, c1, o0, o1]
    }

    /// The checksum's state; one to be completed must lie at or behind `from`. A field inside the
    /// IP header would change the addresses after somebody has judged the packet by them.
    fn checksum(&self, packet: &[u8], from: usize) -> Result<Checksum, VirtioError> {
        match self.flags {
            0 => Ok(Checksum::Unverified),
            DATA_VALID => Ok(Checksum::Valid),
            NEEDS_CSUM => {
                let start = usize::from(self.csum_start);
                if start < from || start >= packet.len() {
                    return Err(VirtioError::ChecksumStart(self.csum_start));
                }
                if start + usize::from(self.csum_offset) + 2 > packet.len() {
                    return Err(VirtioError::ChecksumOffset(self.csum_offset));
                }
                Ok(Checksum::Partial { start: self.csum_start, offset: self.csum_offset })
            }
            other => Err(VirtioError::Flags(other)),
        }
    }

    fn decode_large(&self, packet: &[u8]) -> Result<PacketMeta, VirtioError> {
        let ip = IpHeader::parse(packet)?;
        let (gso, protocol, offset) = match (self.gso_type & !GSO_ECN, ip.version) {
            (GSO_TCPV4, Version::V4) => (Gso::TcpV4, protocol::TCP, checksum::TCP_OFFSET),
            (GSO_TCPV6, Version::V6) => (Gso::TcpV6, protocol::TCP, checksum::TCP_OFFSET),
            (GSO_UDP_L4, _) if self.gso_type & GSO_ECN == 0 => {
                (Gso::Udp, protocol::UDP, checksum::UDP_OFFSET)
            }
            _ => return Err(VirtioError::GsoType(self.gso_type)),
        };
        if ip.protocol != protocol || ip.fragment != Fragment::Whole {
            return Err(VirtioError::GsoType(self.gso_type));
        }
        if self.flags != NEEDS_CSUM {
            return Err(VirtioError::Flags(self.flags));
        }
        if usize::from(self.csum_start) != ip.header_len {
            return Err(VirtioError::ChecksumStart(self.csum_start));
        }
        if usize::from(self.csum_offset) != offset {
            return Err(VirtioError::ChecksumOffset(self.csum_offset));
        }
        let header_len = ip.header_len + transport_header_len(packet, &ip)?;
        if header_len > LONGEST_HEADERS {
            return Err(VirtioError::Headers(header_len));
        }
        let payload = packet.len() - header_len;
        let segments = payload.div_ceil(usize::from(self.gso_size).max(1));
        let long = gso != Gso::Udp && self.gso_size >= LEAST_TCP_SEGMENT;
        let fits = self.gso_size > 0 && (long || segments <= MOST_SMALL_SEGMENTS);
        if !fits {
            return Err(VirtioError::GsoSize(self.gso_size));
        }
        Ok(PacketMeta {
            gso,
            gso_size: self.gso_size,
            header_len: header_len as u16,
            checksum: Checksum::Partial { start: self.csum_start, offset: self.csum_offset },
            ..PacketMeta::default()
        })
    }
}

/// The length of a large packet's TCP or UDP header; payload must follow it.
pub(super) fn transport_header_len(packet: &[u8], ip: &IpHeader) -> Result<usize, VirtioError> {
    let transport = packet.get(ip.header_len..).unwrap_or_default();
    let len = if ip.protocol == protocol::TCP {
        let len = transport.get(12).map_or(0, |byte| usize::from(byte >> 4) * 4);
        if len < 20 {
            return Err(VirtioError::Transport(len));
        }
        len
    } else {
        let stated = match transport.get(4..6) {
            Some(field) => usize::from(u16::from_be_bytes([field[0], field[1]])),
            None => 0,
        };
        if stated != transport.len() {
            return Err(VirtioError::Transport(stated));
        }
        8
    };
    if transport.len() <= len {
        return Err(VirtioError::Transport(transport.len()));
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{ACK, Build, CWR, hex, payload};
    use super::*;

    /// A super-packet with its header, as a kernel gives it.
    fn large(build: &Build, size: u16, len: usize) -> ([u8; HEADER_LEN], Vec<u8>) {
        let packet = build.partial(&payload(len, 1));
        let (gso, offset) = match (build.tcp, build.source.is_ipv4()) {
            (true, true) => (1, 16),
            (true, false) => (4, 16),
            (false, _) => (5, 6),
        };
        let mut header = [1, gso, 0xff, 0xff, 0, 0, 0, 0, offset, 0];
        header[4..6].copy_from_slice(&size.to_le_bytes());
        header[6] = build.ip_header_len() as u8;
        (header, packet)
    }

    #[test]
    fn the_wire_form() {
        let build = Build { flags: ACK | CWR, ..Build::tcp6() };
        let packet = build.partial(&payload(3000, 1));
        let meta = PacketMeta {
            gso: Gso::TcpV6,
            gso_size: 1208,
            header_len: 72,
            checksum: Checksum::Partial { start: 40, offset: 16 },
            ..PacketMeta::default()
        };
        let header = encode(&meta, &packet);
        assert_eq!(header.to_vec(), hex("01 84 4800 b804 2800 1000"));
        assert_eq!(decode(&header, &packet), Ok(meta));
        let plain = Build::udp4().packet(b"x");
        assert_eq!(encode(&PacketMeta::default(), &plain), [0; 10]);
        assert_eq!(decode(&[0; 10], &plain), Ok(PacketMeta::default()));
        let valid = PacketMeta { checksum: Checksum::Valid, ..PacketMeta::default() };
        assert_eq!(encode(&valid, &plain).to_vec(), hex("02 00 0000 0000 0000 0000"));
        assert_eq!(decode(&encode(&valid, &plain), &plain), Ok(valid));
    }

    #[test]
    fn the_header_length_is_computed_and_not_believed() {
        for build in Build::all() {
            let (header, packet) = large(&build, 1000, 2500);
            let meta = decode(&header, &packet).unwrap();
            assert_eq!(usize::from(meta.header_len), build.header_len());
            assert_eq!(decode(&encode(&meta, &packet), &packet), Ok(meta));
        }
    }

    #[test]
    fn a_partial_checksum_lies_behind_the_ip_header_and_within_the_packet() {
        for build in Build::all() {
            let packet = build.partial(&payload(10, 1));
            let ip = build.ip_header_len() as u16;
            let decode_at = |start: u16, offset: u16| {
                let mut header = [0; HEADER_LEN];
                header[0] = 1;
                header[6..8].copy_from_slice(&start.to_le_bytes());
                header[8..].copy_from_slice(&offset.to_le_bytes());
                decode(&header, &packet).map(|meta| meta.checksum)
            };
            let len = packet.len() as u16;
            let ends = len - ip - 2;
            assert_eq!(decode_at(ip, ends), Ok(Checksum::Partial { start: ip, offset: ends }));
            assert_eq!(decode_at(ip, ends + 1), Err(VirtioError::ChecksumOffset(ends + 1)));
            assert_eq!(decode_at(ip, 0xffff), Err(VirtioError::ChecksumOffset(0xffff)));
            assert_eq!(decode_at(ip - 1, 6), Err(VirtioError::ChecksumStart(ip - 1)));
            assert_eq!(decode_at(len, 0), Err(VirtioError::ChecksumStart(len)));
        }
    }

    #[test]
    fn lies_are_told_by_field() {
        let (header, packet) = large(&Build::tcp4(), 1000, 2500);
        let lie = |change: &dyn Fn(&mut [u8; HEADER_LEN], &mut Vec<u8>)| {
            let (mut header, mut packet) = (header, packet.clone());
            change(&mut header, &mut packet);
            decode(&header, &packet).unwrap_err()
        };
        assert_eq!(lie(&|h, _| h[0] = 0), VirtioError::Flags(0), "large without a partial checksum");
        assert_eq!(lie(&|h, _| h[0] = 5), VirtioError::Flags(5));
        assert_eq!(lie(&|h, _| h[1] = 4), VirtioError::GsoType(4), "TCPv6 on IPv4");
        assert_eq!(lie(&|h, _| h[1] = 5), VirtioError::GsoType(5), "UDP on TCP");
        assert_eq!(lie(&|h, _| h[1] = 3), VirtioError::GsoType(3), "UFO is not taken");
        assert_eq!(lie(&|h, _| h[1] = 0), VirtioError::GsoSize(1000));
        assert_eq!(lie(&|h, _| h[4..6].fill(0)), VirtioError::GsoSize(0));
        assert_eq!(lie(&|h, _| h[6] = 24), VirtioError::ChecksumStart(24));
        assert_eq!(lie(&|h, _| h[8] = 6), VirtioError::ChecksumOffset(6));
        assert_eq!(lie(&|_, p| p[6] = 0x20), VirtioError::GsoType(1), "a fragment is not large");
        assert_eq!(lie(&|_, p| p[32] = 0x40), VirtioError::Transport(16));
        assert!(matches!(lie(&|_, p| p.truncate(2000)), VirtioError::Packet(IpError::Length { .. })));
        assert!(matches!(lie(&|_, p| p[0] = 0x05), VirtioError::Packet(IpError::Version(0))));
        let bare = Build::tcp4().partial(&[]);
        assert_eq!(decode(&header, &bare), Err(VirtioError::Transport(32)), "nothing to cut");

        let small = |len| {
            let (header, packet) = large(&Build::tcp6(), 3, len);
            decode(&header, &packet).map(|meta| meta.gso_size)
        };
        assert_eq!(small(3 * 128), Ok(3), "a kernel joins small packets too");
        assert_eq!(small(3 * 128 + 1), Err(VirtioError::GsoSize(3)), "but not so many");

        let (mut header, mut packet) = large(&Build::udp6(), 10, 1281);
        assert_eq!(decode(&header, &packet), Err(VirtioError::GsoSize(10)), "more than 128 segments");
        header[4] = 11;
        assert!(decode(&header, &packet).is_ok());
        packet[45] ^= 1;
        assert!(matches!(decode(&header, &packet), Err(VirtioError::Transport(_))), "UDP length");
        packet[45] ^= 1;
        header[1] |= 0x80;
        assert_eq!(decode(&header, &packet), Err(VirtioError::GsoType(0x85)), "ECN is TCP's");
    }

    #[test]
    fn headers_that_would_be_repeated_without_end_are_refused() {
        let mut packet = Build::tcp6().partial(&payload(1000, 1));
        let options = [vec![6, 24], vec![0; 198]].concat();
        packet.splice(40..40, options);
        packet[6] = 0;
        let len = packet.len() as u16 - 40;
        packet[4..6].copy_from_slice(&len.to_be_bytes());
        let header = [1, 4, 0, 0, 100, 0, 240, 0, 16, 0];
        assert_eq!(decode(&header, &packet), Err(VirtioError::Headers(272)));
    }

    #[test]
    fn frames_are_taken_with_a_checksum_but_not_large() {
        let frame = [0; 60];
        assert_eq!(
            decode_frame(&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0], &frame).unwrap().checksum,
            Checksum::Partial { start: 34, offset: 6 }
        );
        assert_eq!(
            decode_frame(&[1, 0, 0, 0, 0, 0, 13, 0, 6, 0], &frame),
            Err(VirtioError::ChecksumStart(13))
        );
        assert_eq!(decode_frame(&[1, 1, 0, 0, 9, 0, 34, 0, 16, 0], &frame), Err(VirtioError::GsoType(1)));
        assert_eq!(decode_frame(&[0, 0, 0, 0, 9, 0, 0, 0, 0, 0], &frame), Err(VirtioError::GsoSize(9)));
    }

    proptest! {
        #[test]
        fn what_is_believed_is_true(
            which in 0usize..4, size in 1u16..2000, len in 1usize..4000,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let (header, packet) = large(&Build::all()[which], size, len);
            let mut all = [&header[..], &packet].concat();
            for (at, byte) in changes {
                // The header and the packet's headers are where a change matters.
                let at = at.index(110.min(all.len()));
                all[at] = byte;
            }
            let (header, packet) = all.split_first_chunk().unwrap();
            if let Ok(meta) = decode(header, packet) {
                prop_assert!(usize::from(meta.header_len) < packet.len());
                prop_assert_eq!(decode(&encode(&meta, packet), packet), Ok(meta));
                if let Checksum::Partial { start, offset } = meta.checksum {
                    prop_assert!(usize::from(start) + usize::from(offset) + 2 <= packet.len());
                }
                prop_assert_eq!(meta.gso != Gso::None, meta.gso_size != 0);
            }
        }
    }
}
