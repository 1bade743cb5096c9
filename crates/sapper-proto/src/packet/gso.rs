//! Segmentation: large packets become ordinary ones, and partial checksums complete ones.
//!
//! For destinations that take no large packets. [`Segmenter`] goes from batch to batch and can stop
//! anywhere; [`Cutter`] cuts one packet into buffers of the caller. Each payload byte is copied once
//! and summed once, while it is in the nearest cache. The other direction is [`gro`](super::gro).

use super::checksum::{self, TCP_OFFSET, UDP_OFFSET};
use super::ip::{Fragment, IpError, IpHeader, Version, protocol};
use super::virtio::{LEAST_TCP_SEGMENT, VirtioError, transport_header_len};
use super::{Checksum, Gso, PacketBatch, PacketMeta};

/// TCP flag: congestion window reduced.
const CWR: u8 = 0x80;
/// TCP flags FIN and PSH, which belong to the last segment.
const FIN_PSH: u8 = 0x09;

/// Why a packet cannot be cut. It is dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GsoError {
    /// It is longer than the destination takes, and must not be cut any smaller.
    #[error("packet of {len} bytes is longer than {max}")]
    TooLong {
        /// Of the packet, or of its shortest possible segment.
        len: usize,
        /// What the destination takes.
        max: usize,
    },
    /// It has no IP header.
    #[error(transparent)]
    Packet(#[from] IpError),
    /// What is said about it does not fit its bytes.
    #[error("packet does not fit its GSO state")]
    Meta,
}

impl From<VirtioError> for GsoError {
    fn from(_: VirtioError) -> Self {
        Self::Meta
    }
}

/// How far a packet was cut.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// Payload bytes that went out.
    payload: usize,
    /// Packets that went out.
    packets: usize,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// One packet as it is; its checksum, if partial, is completed.
    Whole,
    /// Headers in front of each payload.
    Segments { version: Version, ip_header: usize, tcp: bool, pseudo: u16 },
    /// Datagrams without headers.
    Datagrams,
}

/// Cuts one packet. Order of calls: [`next_len`](Self::next_len), then
/// [`write_next`](Self::write_next) into a buffer of that length, until it is `None`.
#[derive(Debug)]
pub struct Cutter<'a> {
    packet: &'a [u8],
    meta: &'a PacketMeta,
    kind: Kind,
    header_len: usize,
    /// Payload bytes of each segment.
    size: usize,
    cursor: Cursor,
}

impl<'a> Cutter<'a> {
    /// For a destination that takes packets of at most `max_packet` bytes. TCP is cut smaller than
    /// its own size where the destination asks for that; a datagram never is.
    pub fn new(packet: &'a [u8], meta: &'a PacketMeta, max_packet: usize) -> Result<Self, GsoError> {
        let too_long = |len| GsoError::TooLong { len, max: max_packet };
        let size = usize::from(meta.gso_size);
        let mut cutter =
            Self { packet, meta, kind: Kind::Whole, header_len: 0, size, cursor: Cursor::default() };
        match meta.gso {
            Gso::None => {
                if packet.len() > max_packet {
                    return Err(too_long(packet.len()));
                }
                if let Checksum::Partial { start, offset } = meta.checksum
                    && usize::from(start) + usize::from(offset) + 2 > packet.len()
                {
                    return Err(GsoError::Meta);
                }
                cutter.size = packet.len();
            }
            Gso::Datagrams => {
                if size == 0 {
                    return Err(GsoError::Meta);
                }
                if size.min(packet.len()) > max_packet {
                    return Err(too_long(size));
                }
                cutter.kind = Kind::Datagrams;
            }
            Gso::TcpV4 | Gso::TcpV6 | Gso::Udp => cutter.plan_segments(max_packet)?,
        }
        Ok(cutter)
    }

    fn plan_segments(&mut self, max_packet: usize) -> Result<(), GsoError> {
        let ip = IpHeader::parse_exact(self.packet)?;
        let (fits, offset) = match (self.meta.gso, ip.version) {
            (Gso::TcpV4, Version::V4) | (Gso::TcpV6, Version::V6) => {
                (ip.protocol == protocol::TCP, TCP_OFFSET)
            }
            (Gso::Udp, _) => (ip.protocol == protocol::UDP, UDP_OFFSET),
            _ => (false, 0),
        };
        let partial = match self.meta.checksum {
            Checksum::Partial { start, offset: at } => {
                usize::from(start) == ip.header_len && usize::from(at) == offset
            }
            _ => false,
        };
        if !fits || !partial || self.size == 0 || ip.fragment != Fragment::Whole {
            return Err(GsoError::Meta);
        }
        let tcp = offset == TCP_OFFSET;
        self.header_len = ip.header_len + transport_header_len(self.packet, &ip)?;
        let room = max_packet.saturating_sub(self.header_len);
        let least = self.size.min(if tcp { usize::from(LEAST_TCP_SEGMENT) } else { usize::MAX });
        if room < least && room < self.packet.len() - self.header_len {
            return Err(GsoError::TooLong { len: self.header_len + least, max: max_packet });
        }
        self.size = self.size.min(room);
        // The field has the pseudo-header's sum with the length of the whole: without that length it
        // is good for every segment, whatever the addresses' headers are.
        let field = ip.header_len + offset;
        let field = u16::from_be_bytes([self.packet[field], self.packet[field + 1]]);
        let pseudo = checksum::subtract(field, (self.packet.len() - ip.header_len) as u16);
        self.kind = Kind::Segments { version: ip.version, ip_header: ip.header_len, tcp, pseudo };
        Ok(())
    }

    /// Bytes of the next packet, or `None` after the last.
    pub fn next_len(&self) -> Option<usize> {
        let left = self.packet.len() - self.header_len - self.cursor.payload;
        (left > 0 || self.cursor.packets == 0).then(|| self.header_len + left.min(self.size))
    }

    /// What travels with each of the packets.
    pub fn meta(&self) -> PacketMeta {
        let checksum = match self.meta.checksum {
            Checksum::Partial { .. } => Checksum::Valid,
            other => other,
        };
        PacketMeta { checksum, ecn: self.meta.ecn, peer: self.meta.peer, ..PacketMeta::default() }
    }

    /// Writes the next packet.
    ///
    /// # Panics
    /// When `out` is not as long as [`next_len`](Self::next_len) said.
    pub fn write_next(&mut self, out: &mut [u8]) {
        assert_eq!(self.next_len(), Some(out.len()), "a buffer of another length than the next packet");
        let from = self.header_len + self.cursor.payload;
        let payload = &self.packet[from..from + out.len() - self.header_len];
        match self.kind {
            Kind::Whole => {
                out.copy_from_slice(payload);
                if let Checksum::Partial { start, offset } = self.meta.checksum {
                    checksum::complete(out, usize::from(start), usize::from(offset));
                }
            }
            Kind::Datagrams => out.copy_from_slice(payload),
            Kind::Segments { version, ip_header, tcp, pseudo } => {
                let (headers, to) = out.split_at_mut(self.header_len);
                headers.copy_from_slice(&self.packet[..self.header_len]);
                let sum = checksum::copy_and_sum(to, payload);
                let (ip, transport) = headers.split_at_mut(ip_header);
                let transport_len = (transport.len() + payload.len()) as u16;
                match version {
                    Version::V4 => self.write_ipv4(ip, transport_len),
                    Version::V6 => {
                        let len = (ip_header - super::ip::IPV6_HEADER) as u16 + transport_len;
                        ip[4..6].copy_from_slice(&len.to_be_bytes());
                    }
                }
                let field = if tcp {
                    self.write_tcp(transport, from + payload.len() == self.packet.len());
                    TCP_OFFSET
                } else {
                    transport[4..6].copy_from_slice(&transport_len.to_be_bytes());
                    UDP_OFFSET
                };
                transport[field..field + 2].fill(0);
                let sum = checksum::add(sum, checksum::sum(transport));
                let sum = checksum::add(sum, checksum::add(pseudo, transport_len));
                transport[field..field + 2].copy_from_slice(&checksum::stored(sum));
            }
        }
        self.cursor.payload += payload.len();
        self.cursor.packets += 1;
    }

    fn write_ipv4(&self, ip: &mut [u8], transport_len: u16) {
        let total = ip.len() as u16 + transport_len;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(self.cursor.packets as u16);
        ip[4..6].copy_from_slice(&id.to_be_bytes());
        let checksum = checksum::ipv4_header(ip);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    }

    fn write_tcp(&self, tcp: &mut [u8], last: bool) {
        let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let seq = seq.wrapping_add(self.cursor.payload as u32);
        tcp[4..8].copy_from_slice(&seq.to_be_bytes());
        if !last {
            tcp[13] &= !FIN_PSH;
        }
        if self.cursor.packets > 0 {
            tcp[13] &= !CWR;
        }
    }
}

/// What a call to [`Segmenter::segment`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segmented {
    /// Packets written to the destination.
    pub written: usize,
    /// Packets dropped for being longer than the destination takes.
    pub too_long: usize,
    /// Packets dropped for not fitting what is said about them.
    pub malformed: usize,
}

/// Takes packets from the front of one batch and appends them, cut, to another.
///
/// It stops when the source is empty or the destination full, in the middle of a packet if need be,
/// and goes on there in the next call: until then the packet stays at the front of its source. One
/// segmenter belongs to one source.
#[derive(Debug, Default)]
pub struct Segmenter {
    cursor: Cursor,
}

impl Segmenter {
    /// A segmenter at the beginning of a packet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the source's front packet was cut only in part.
    pub fn is_midway(&self) -> bool {
        self.cursor.packets > 0
    }

    /// Forgets a packet that was cut in part (its source was cleared).
    pub fn reset(&mut self) {
        self.cursor = Cursor::default();
    }

    /// Cuts what fits. Packets that the destination cannot take at all are dropped and counted.
    /// `max_packet` may change from call to call.
    pub fn segment(
        &mut self,
        source: &mut PacketBatch,
        destination: &mut PacketBatch,
        max_packet: usize,
    ) -> Segmented {
        let mut done = Segmented::default();
        while !source.is_empty() && self.segment_front(source, destination, max_packet, &mut done) {}
        done
    }

    /// The same for the source's front packet only: `true` when it was taken, `false` when the
    /// destination is full. Adds to `done`.
    pub fn segment_front(
        &mut self,
        source: &mut PacketBatch,
        destination: &mut PacketBatch,
        max_packet: usize,
        done: &mut Segmented,
    ) -> bool {
        let Some(packet) = source.get(0) else { return true };
        match Cutter::new(packet.data, packet.meta, max_packet) {
            Ok(mut cutter) => {
                // A source that was changed meanwhile has no such place: it begins anew.
                if self.cursor.payload <= packet.data.len() - cutter.header_len {
                    cutter.cursor = self.cursor;
                }
                while let Some(len) = cutter.next_len() {
                    if let Some(room) = destination.reserve(len) {
                        cutter.write_next(room);
                        destination.commit(len, cutter.meta());
                        done.written += 1;
                    } else if destination.is_empty() {
                        done.too_long += 1;
                        break;
                    } else {
                        self.cursor = cutter.cursor;
                        return false;
                    }
                }
            }
            Err(GsoError::TooLong { .. }) => done.too_long += 1,
            Err(GsoError::Packet(_) | GsoError::Meta) => done.malformed += 1,
        }
        self.reset();
        source.advance(1);
        true
    }
}

/// Whether some packet of a batch has to be cut, completed or dropped for a destination that takes
/// ordinary packets of at most `max_packet` bytes. Where none has, the batch can go there as it is.
pub fn needs_segmenting(batch: &PacketBatch, max_packet: usize) -> bool {
    batch.iter().any(|packet| {
        packet.meta.gso != Gso::None
            || packet.data.len() > max_packet
            || matches!(packet.meta.checksum, Checksum::Partial { .. })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{ACK, Build, CWR, FIN, PSH, naive_verify, payload};
    use super::super::{Ecn, HEADROOM};
    use super::*;

    /// What is said about a large packet.
    fn meta(build: &Build, size: u16) -> PacketMeta {
        PacketMeta {
            gso: match (build.tcp, build.source.is_ipv4()) {
                (true, true) => Gso::TcpV4,
                (true, false) => Gso::TcpV6,
                (false, _) => Gso::Udp,
            },
            gso_size: size,
            header_len: build.header_len() as u16,
            checksum: Checksum::Partial {
                start: build.ip_header_len() as u16,
                offset: if build.tcp { 16 } else { 6 },
            },
            ..PacketMeta::default()
        }
    }

    /// The same segments, each built from nothing.
    fn naive(build: &Build, data: &[u8], size: usize) -> Vec<Vec<u8>> {
        let last = data.len().div_ceil(size) - 1;
        data.chunks(size)
            .enumerate()
            .map(|(index, chunk)| {
                let mut flags = build.flags;
                if index > 0 {
                    flags &= !CWR;
                }
                if index < last {
                    flags &= !(PSH | FIN);
                }
                let segment = Build {
                    seq: build.seq.wrapping_add((index * size) as u32),
                    id: build.id.wrapping_add(index as u16),
                    flags,
                    ..build.clone()
                };
                segment.packet(chunk)
            })
            .collect()
    }

    fn cut(packet: &[u8], meta: PacketMeta, max: usize, room: usize) -> (Vec<Vec<u8>>, Segmented) {
        let mut source = PacketBatch::new(packet.len() + HEADROOM, 1);
        source.push(packet, meta);
        let mut destination = PacketBatch::new(room, 4);
        let (mut segmenter, mut all, mut out) = (Segmenter::new(), Segmented::default(), Vec::new());
        while !source.is_empty() {
            let done = segmenter.segment(&mut source, &mut destination, max);
            all.written += done.written;
            all.too_long += done.too_long;
            all.malformed += done.malformed;
            assert_eq!(segmenter.is_midway(), !source.is_empty());
            for packet in destination.iter() {
                assert_eq!(packet.meta.gso, Gso::None);
                out.push(packet.data.to_vec());
            }
            destination.clear();
        }
        (out, all)
    }

    #[test]
    fn partial_checksums_of_ordinary_packets_are_completed() {
        for build in Build::all() {
            let data = payload(77, 5);
            let meta = PacketMeta { gso: Gso::None, gso_size: 0, header_len: 0, ..meta(&build, 0) };
            assert_eq!(cut(&build.partial(&data), meta, 1500, 2000).0, [build.packet(&data)]);
            let plain = PacketMeta::default();
            assert_eq!(cut(&build.packet(&data), plain, 1500, 2000).0, [build.packet(&data)]);
        }
    }

    #[test]
    fn datagrams_are_cut_at_their_size_and_keep_their_peer() {
        let peer = Some("192.0.2.7:9".parse().unwrap());
        let meta =
            PacketMeta { gso: Gso::Datagrams, gso_size: 400, peer, ecn: Ecn::Ce, ..PacketMeta::default() };
        let data = payload(1000, 5);
        let mut source = PacketBatch::new(2000, 2);
        let mut destination = PacketBatch::new(2000, 4);
        source.push(&data, meta);
        source.push(&[], PacketMeta::default());
        Segmenter::new().segment(&mut source, &mut destination, 400);
        let got: Vec<_> = destination.iter().map(|p| (p.data, p.meta.peer, p.meta.ecn)).collect();
        assert_eq!(got[0], (&data[..400], peer, Ecn::Ce));
        assert_eq!(got[2], (&data[800..], peer, Ecn::Ce));
        assert!(got[3].0.is_empty(), "an empty datagram is a packet too");
        assert_eq!(cut(&data, meta, 399, 2000).1.too_long, 1);
    }

    #[test]
    fn tcp_is_cut_smaller_for_a_smaller_maximum_and_datagrams_are_dropped() {
        for build in Build::all() {
            let data = payload(5000, 5);
            let (packets, done) = cut(&build.partial(&data), meta(&build, 1400), 1280, 10_000);
            if build.tcp {
                assert_eq!(packets, naive(&build, &data, 1280 - build.header_len()));
            } else {
                assert_eq!(done, Segmented { too_long: 1, ..Segmented::default() });
            }
            let (_, done) = cut(&build.partial(&data), meta(&build, 1400), build.header_len() + 7, 10_000);
            assert_eq!(done.too_long, 1, "no packets of almost nothing but headers");
        }
    }

    #[test]
    fn a_maximum_that_changes_midway_loses_nothing() {
        let build = Build::tcp4();
        let data = payload(4000, 2);
        let mut source = PacketBatch::new(5000, 1);
        source.push(&build.partial(&data), meta(&build, 1400));
        let mut destination = PacketBatch::new(1500, 8);
        let mut segmenter = Segmenter::new();
        let (mut got, mut seq) = (Vec::new(), build.seq);
        for max in [1452, 700, 1280, 600, 600, 600] {
            segmenter.segment(&mut source, &mut destination, max);
            for packet in destination.iter() {
                assert!(packet.data.len() <= max && naive_verify(packet.data));
                assert_eq!(packet.data[24..28], seq.to_be_bytes());
                got.extend_from_slice(&packet.data[52..]);
                seq = seq.wrapping_add(packet.data.len() as u32 - 52);
            }
            destination.clear();
        }
        assert!(source.is_empty() && got == data);
    }

    #[test]
    fn packets_that_do_not_fit_are_dropped_and_counted() {
        let build = Build::tcp4();
        let packet = build.partial(&payload(3000, 1));
        let right = meta(&build, 1000);
        let malformed = |meta: PacketMeta, packet: &[u8]| cut(packet, meta, 1500, 9000).1.malformed;
        assert_eq!(malformed(right, &packet), 0);
        assert_eq!(malformed(PacketMeta { gso: Gso::TcpV6, ..right }, &packet), 1);
        assert_eq!(malformed(PacketMeta { gso: Gso::Udp, ..right }, &packet), 1);
        assert_eq!(malformed(PacketMeta { gso_size: 0, ..right }, &packet), 1);
        assert_eq!(malformed(PacketMeta { checksum: Checksum::Valid, ..right }, &packet), 1);
        assert_eq!(malformed(right, &packet[..2000]), 1);
        assert_eq!(malformed(right, &[]), 1);
        assert_eq!(malformed(PacketMeta { gso: Gso::None, ..right }, &[0; 37]), 1, "no room for the sum");
        assert_eq!(cut(&[0; 1501], PacketMeta::default(), 1500, 9000).1.too_long, 1);
        assert_eq!(cut(&[0; 1500], PacketMeta::default(), 1500, 1400).1.too_long, 1, "no arena is so large");
    }

    #[test]
    fn a_batch_of_ordinary_packets_needs_nothing() {
        let mut batch = PacketBatch::new(9000, 4);
        batch.push(&[0; 100], PacketMeta::default());
        assert!(!needs_segmenting(&batch, 100) && needs_segmenting(&batch, 99));
        batch.push(&[0; 100], meta(&Build::udp4(), 9));
        assert!(needs_segmenting(&batch, 100));
    }

    proptest! {
        #[test]
        fn segments_are_those_built_one_by_one(
            which in 0usize..4, size in 8usize..3000, len in 1usize..20_000, seed: u32, id: u16, seq: u32,
            flags in prop::sample::select(vec![ACK, ACK | PSH, ACK | CWR, ACK | PSH | FIN | CWR]),
            options in 0usize..=10, room in 3100usize..20_000,
        ) {
            let mut build = Build { id, seq, flags, ..Build::all()[which].clone() };
            build.options = payload(options * 4, 3);
            let data = payload(len, seed);
            let (packets, done) = cut(&build.partial(&data), meta(&build, size as u16), 9000, room);
            prop_assert_eq!(&packets, &naive(&build, &data, size));
            prop_assert_eq!(done.written, packets.len());
            for packet in &packets {
                prop_assert!(naive_verify(packet));
            }
        }

        #[test]
        fn any_packet_and_any_meta_are_answered(
            which in 0usize..5, size: u16, start in 0u16..80, offset in 0u16..20, max in 0usize..2000,
            bytes in prop::collection::vec(any::<u8>(), 0..200), first in prop::sample::select(vec![0x45u8, 0x60]),
            proto in prop::sample::select(vec![6u8, 17]), exact: bool,
        ) {
            let mut bytes = bytes;
            let len = bytes.len() as u16;
            if exact && len > 80 {
                bytes[0] = first;
                let at = if first == 0x45 { bytes[9] = proto; bytes[6] = 0; bytes[7] = 0; 2 } else { bytes[6] = proto; 4 };
                let stated = if first == 0x45 { len } else { len - 40 };
                bytes[at..at + 2].copy_from_slice(&stated.to_be_bytes());
            }
            let gso = [Gso::None, Gso::TcpV4, Gso::TcpV6, Gso::Udp, Gso::Datagrams][which];
            let meta = PacketMeta {
                gso, gso_size: size, checksum: Checksum::Partial { start, offset }, ..PacketMeta::default()
            };
            let (packets, done) = cut(&bytes, meta, max, 4000);
            prop_assert!(packets.iter().all(|packet| packet.len() <= max));
            prop_assert_eq!(packets.is_empty(), done.too_long + done.malformed > 0);
        }
    }
}
