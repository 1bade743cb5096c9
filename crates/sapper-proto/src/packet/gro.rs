//! Coalescing: runs of ordinary TCP and UDP packets become large ones, without copying them.
//!
//! For a destination that takes large packets at a price per call (a TUN with offload). What comes
//! out is a list of slices for one `writev`: rewritten headers, then the payload of each packet where
//! it lies in its batch.
//!
//! The rules are those of the Linux kernel's GRO. Packets are joined when they follow each other in
//! their flow without a gap, when every header field that segmentation would repeat is the same
//! (TTL, TOS, options, window, acknowledgement …), when all have the same payload length (only the
//! last may be shorter), and when their checksums were found right. Only flags ACK, ECE and PSH are
//! joined; PSH ends a run. Packets of one flow never overtake each other; flows may.
//! What is cut again by [`gso`](super::gso) is what was joined.

use super::checksum::{self, TCP_OFFSET, UDP_OFFSET};
use super::ip::{IPV4_HEADER, IPV6_HEADER, Version, check_len, is_extension, protocol};
use super::virtio::MOST_SMALL_SEGMENTS;
use super::{Checksum, Gso, Offloads, Packet, PacketBatch, PacketMeta};

/// Most packets that become one: bounds the slices of a `writev` (with two for the headers), and is
/// more than 64 KB of TCP at any usual MTU.
pub const MOST_TCP_PACKETS: usize = 128;
/// Most datagrams that become one: what every kernel with UDP segmentation takes.
pub const MOST_UDP_PACKETS: usize = 64;
/// The longest packet that is made.
const LONGEST: usize = 65_535;

/// TCP flags PSH, ACK and ECE.
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const ECE: u8 = 0x40;

/// Places for flows. More flows than that in one batch are passed as they are.
const TABLE: usize = 128;
/// Places that one flow may lie in, from the one that its hash names.
const PROBES: usize = 4;
/// No packet, or no run.
const NONE: u32 = u32::MAX;

// What is made here is taken there, of whatever size its segments are.
const _: () = assert!(MOST_TCP_PACKETS <= MOST_SMALL_SEGMENTS && MOST_UDP_PACKETS <= MOST_SMALL_SEGMENTS);

/// Joins the packets of a batch.
///
/// Order of calls: [`coalesce`](Self::coalesce) a batch; [`output`](Self::output) for each index
/// below its result, with the same unchanged batch; [`take`](Self::take) what was written. All
/// vectors are kept: after some batches nothing allocates.
#[derive(Debug)]
pub struct Coalescer {
    offloads: Offloads,
    max_packet: usize,
    runs: Vec<Run>,
    /// For each packet of the batch, the next one of its run.
    next: Vec<u32>,
    /// For each packet of the batch, its run.
    owner: Vec<u32>,
    /// Rewritten headers of the runs of several packets.
    headers: Vec<u8>,
    table: Vec<Place>,
    /// Entries of the table with another generation are empty.
    generation: u32,
    /// The run that the last packet joined or began: most likely the next one's.
    recent: u32,
}

/// A place of the flow table.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    generation: u32,
    run: u32,
}

/// Packets that become one.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u32,
    last: u32,
    packets: u16,
    /// Payload bytes of every packet but the last.
    size: u16,
    payload: u32,
    /// Headers of the first packet; where the rewritten ones begin.
    header_len: u16,
    headers: u32,
    tcp: bool,
    /// More packets may join.
    open: bool,
    /// The checksums of its packets were found right.
    verified: bool,
    push: bool,
}

/// One packet to write: headers and payloads, in this order.
#[derive(Clone, Copy, Debug)]
pub struct Coalesced<'a> {
    /// The whole packet where nothing was joined, otherwise the rewritten headers.
    pub headers: &'a [u8],
    /// What travels with it.
    pub meta: PacketMeta,
    /// Packets that it was made of.
    pub packets: usize,
    /// Bytes in all.
    pub len: usize,
    payloads: Payloads<'a>,
}

/// The payload slices of a coalesced packet.
#[derive(Clone, Copy, Debug)]
pub struct Payloads<'a> {
    batch: &'a PacketBatch,
    next: &'a [u32],
    at: u32,
    header_len: usize,
}

impl<'a> Coalesced<'a> {
    /// The payloads behind the headers; none where nothing was joined.
    pub fn payloads(&self) -> Payloads<'a> {
        self.payloads
    }

    /// Copies the packet into a batch; `false` when that is full.
    pub fn copy_to(&self, batch: &mut PacketBatch) -> bool {
        let Some(mut room) = batch.reserve(self.len) else { return false };
        for slice in std::iter::once(self.headers).chain(self.payloads) {
            let (to, rest) = room.split_at_mut(slice.len());
            to.copy_from_slice(slice);
            room = rest;
        }
        batch.commit(self.len, self.meta);
        true
    }
}

impl<'a> Iterator for Payloads<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let packet = self.batch.get(self.at as usize)?;
        self.at = self.next.get(self.at as usize).copied().unwrap_or(NONE);
        packet.data.get(self.header_len..)
    }
}

/// What one packet is to coalescing.
enum Class {
    /// Nothing that is joined or has to keep its place in a flow.
    Other,
    /// TCP or UDP of a flow that cannot be told (a fragment, options): no flow may overtake it.
    Barrier,
    /// A packet of a flow.
    Flow(Segment),
}

/// A packet of a flow, without options or extension headers.
#[derive(Clone, Copy)]
struct Segment {
    version: Version,
    tcp: bool,
    ip_header: usize,
    header_len: usize,
    payload: usize,
    /// It may begin a run or join one; otherwise it only ends its flow's run.
    joins: bool,
    push: bool,
}

impl Coalescer {
    /// For a destination that takes these. Without checksums nothing is joined.
    pub fn new(offloads: Offloads) -> Self {
        Self {
            offloads: if offloads.checksum { offloads } else { Offloads::NONE },
            max_packet: LONGEST,
            runs: Vec::new(),
            next: Vec::new(),
            owner: Vec::new(),
            headers: Vec::new(),
            table: Vec::new(),
            generation: 0,
            recent: NONE,
        }
    }

    /// Makes no packet longer than this.
    pub fn with_max_packet(mut self, max_packet: usize) -> Self {
        self.max_packet = max_packet.min(LONGEST);
        self
    }

    /// Looks at all packets of a batch and returns how many are left to write.
    pub fn coalesce(&mut self, batch: &PacketBatch) -> usize {
        self.begin(batch.len());
        for (index, packet) in batch.iter().enumerate() {
            match classify(packet, self.offloads) {
                Class::Other => self.single(index, false),
                Class::Barrier => {
                    self.close_all();
                    self.single(index, false);
                }
                Class::Flow(segment) => self.place(batch, index, packet, segment),
            }
        }
        self.rewrite(batch);
        self.runs.len()
    }

    /// The packet to write at `index`, out of the batch that was coalesced last.
    pub fn output<'a>(&'a self, batch: &'a PacketBatch, index: usize) -> Option<Coalesced<'a>> {
        let run = self.runs.get(index)?;
        let first = batch.get(run.first as usize)?;
        let header_len = usize::from(run.header_len);
        let mut payloads = Payloads { batch, next: &self.next, at: NONE, header_len };
        if run.packets == 1 {
            let mut meta = *first.meta;
            if run.verified && meta.checksum == Checksum::Unverified {
                meta.checksum = Checksum::Valid;
            }
            let headers = first.data;
            return Some(Coalesced { headers, meta, packets: 1, len: headers.len(), payloads });
        }
        payloads.at = run.first;
        let headers = self.headers.get(run.headers as usize..)?.get(..header_len)?;
        let v4 = headers[0] >> 4 == 4;
        let start = if v4 { IPV4_HEADER } else { IPV6_HEADER };
        let (gso, offset) = match (run.tcp, v4) {
            (true, true) => (Gso::TcpV4, TCP_OFFSET),
            (true, false) => (Gso::TcpV6, TCP_OFFSET),
            (false, _) => (Gso::Udp, UDP_OFFSET),
        };
        let meta = PacketMeta {
            gso,
            gso_size: run.size,
            header_len: run.header_len,
            checksum: Checksum::Partial { start: start as u16, offset: offset as u16 },
            ecn: first.meta.ecn,
            peer: first.meta.peer,
        };
        let len = header_len + run.payload as usize;
        Some(Coalesced { headers, meta, packets: usize::from(run.packets), len, payloads })
    }

    /// Takes the packets of the first `outputs` outputs out of the batch. What is left of it, in its
    /// order, can be coalesced again.
    pub fn take(&mut self, batch: &mut PacketBatch, outputs: usize) {
        if outputs >= self.runs.len() && batch.len() == self.owner.len() {
            batch.advance(batch.len());
        } else {
            let mut owners = self.owner.iter();
            batch.retain(|_| owners.next().is_none_or(|owner| *owner as usize >= outputs));
        }
        self.begin(0);
    }

    fn begin(&mut self, packets: usize) {
        self.runs.clear();
        self.headers.clear();
        self.next.clear();
        self.owner.clear();
        self.next.resize(packets, NONE);
        self.owner.resize(packets, NONE);
        self.close_all();
    }

    /// Forgets all flows: no open run is found any more.
    fn close_all(&mut self) {
        self.recent = NONE;
        self.generation = self.generation.wrapping_add(1);
        if self.generation == 0 {
            self.table.fill(Place::default());
            self.generation = 1;
        }
    }

    /// A packet that is written as it is.
    fn single(&mut self, index: usize, verified: bool) {
        self.owner[index] = self.runs.len() as u32;
        self.runs.push(Run {
            first: index as u32,
            last: index as u32,
            packets: 1,
            size: 0,
            payload: 0,
            header_len: 0,
            headers: 0,
            tcp: false,
            open: false,
            verified,
            push: false,
        });
    }

    /// A packet of a flow: joins its run, or ends it and perhaps begins another.
    fn place(&mut self, batch: &PacketBatch, index: usize, packet: Packet<'_>, segment: Segment) {
        let mut place = None;
        let mut found = self.recent;
        if !self.is_flow(found, batch, packet, segment) {
            (found, place) = self.find(batch, packet, segment);
        }
        let mut verified = false;
        if let Some(run) = self.runs.get(found as usize).copied()
            && run.open
        {
            match self.try_join(batch, run, packet, segment) {
                Ok(()) => {
                    self.join(found, index, segment);
                    return;
                }
                Err(right) => verified = right,
            }
            self.runs[found as usize].open = false;
        }
        let new = self.runs.len() as u32;
        self.single(index, verified);
        if !segment.joins || segment.push {
            return;
        }
        if place.is_none() && found != NONE {
            // The recent run was at hand, its place in the table was not looked up.
            place = self.find(batch, packet, segment).1;
        }
        let Some(place) = place else { return };
        let run = &mut self.runs[new as usize];
        run.open = true;
        run.tcp = segment.tcp;
        run.size = segment.payload as u16;
        run.payload = segment.payload as u32;
        run.header_len = segment.header_len as u16;
        self.table[place] = Place { generation: self.generation, run: new };
        self.recent = new;
    }

    /// Whether a packet may join its flow's open run. `Err(true)`: it may not, but its checksum was
    /// found right.
    fn try_join(
        &mut self,
        batch: &PacketBatch,
        run: Run,
        packet: Packet<'_>,
        segment: Segment,
    ) -> Result<(), bool> {
        let most = if segment.tcp { MOST_TCP_PACKETS } else { MOST_UDP_PACKETS };
        let first = batch.get(run.first as usize).ok_or(false)?;
        let last = batch.get(run.last as usize).ok_or(false)?;
        let fits = segment.joins
            && segment.header_len == usize::from(run.header_len)
            && segment.payload <= usize::from(run.size)
            && usize::from(run.packets) < most
            && segment.header_len + run.payload as usize + segment.payload <= self.max_packet
            && first.meta.ecn == packet.meta.ecn
            && same_headers(first.data, last.data, packet.data, segment)
            && (!segment.tcp || follows(first.data, run.payload, packet.data, segment.ip_header));
        if !fits {
            return Err(false);
        }
        // The first packet is verified when somebody wants to join it: a lone packet costs nothing.
        let right = is_right(packet, segment);
        if !run.verified {
            let first_right = is_right(first, segment);
            self.runs[self.owner[run.first as usize] as usize].verified = first_right;
            if !first_right {
                return Err(right);
            }
        }
        if right { Ok(()) } else { Err(false) }
    }

    fn join(&mut self, found: u32, index: usize, segment: Segment) {
        let run = &mut self.runs[found as usize];
        self.next[run.last as usize] = index as u32;
        self.owner[index] = found;
        run.last = index as u32;
        run.packets += 1;
        run.payload += segment.payload as u32;
        run.push = segment.push;
        run.open = !segment.push && segment.payload == usize::from(run.size);
        self.recent = found;
    }

    /// The flow's run in the table and the place for its next one; a place but no run for a new flow,
    /// and neither where the table is full around it.
    fn find(&mut self, batch: &PacketBatch, packet: Packet<'_>, segment: Segment) -> (u32, Option<usize>) {
        self.table.resize(TABLE, Place::default());
        let from = hash(key(packet.data, segment.version));
        for probe in 0..PROBES {
            let at = (from + probe) % TABLE;
            let place = self.table[at];
            if place.generation != self.generation {
                return (NONE, Some(at));
            }
            if self.is_flow(place.run, batch, packet, segment) {
                return (place.run, Some(at));
            }
        }
        (NONE, None)
    }

    /// Whether a run is of the packet's flow.
    fn is_flow(&self, run: u32, batch: &PacketBatch, packet: Packet<'_>, segment: Segment) -> bool {
        let Some(run) = self.runs.get(run as usize) else { return false };
        batch.get(run.first as usize).is_some_and(|first| {
            run.tcp == segment.tcp
                && first.data[0] >> 4 == packet.data[0] >> 4
                && key(first.data, segment.version) == key(packet.data, segment.version)
                && first.meta.peer == packet.meta.peer
        })
    }

    /// Writes the headers of the runs that have several packets.
    fn rewrite(&mut self, batch: &PacketBatch) {
        for run in self.runs.iter_mut().filter(|run| run.packets > 1) {
            let Some(first) = batch.get(run.first as usize) else { continue };
            let at = self.headers.len();
            run.headers = at as u32;
            self.headers.extend_from_slice(&first.data[..usize::from(run.header_len)]);
            rewrite_headers(&mut self.headers[at..], run);
        }
    }
}

/// What `packet` is to a destination with these offloads.
fn classify(packet: Packet<'_>, offloads: Offloads) -> Class {
    let data = packet.data;
    if packet.meta.gso == Gso::Datagrams {
        return Class::Other;
    }
    let Ok(version) = check_len(data) else { return Class::Other };
    let (ip_header, protocol) = match version {
        Version::V4 if data.len() < IPV4_HEADER => return Class::Other,
        Version::V6 if data.len() < IPV6_HEADER => return Class::Other,
        Version::V4 => (IPV4_HEADER, data[9]),
        Version::V6 => (IPV6_HEADER, data[6]),
    };
    let tcp = match protocol {
        protocol::TCP => true,
        protocol::UDP => false,
        // Behind an extension header there may be any flow.
        other if version == Version::V6 && is_extension(other) => return Class::Barrier,
        _ => return Class::Other,
    };
    // IPv4 options, or a fragment (more to come, or an offset).
    if version == Version::V4 && (data[0] != 0x45 || data[6] & 0x3f != 0 || data[7] != 0) {
        return Class::Barrier;
    }
    let transport = &data[ip_header..];
    let (header, flags) = match (tcp, transport.len()) {
        (true, 20..) => (usize::from(transport[12] >> 4) * 4, transport[13]),
        (false, 8..) => (8, 0),
        _ => return Class::Other,
    };
    if header > transport.len() || tcp && header < 20 {
        return Class::Other;
    }
    let payload = transport.len() - header;
    let wanted = match (tcp, version) {
        (true, Version::V4) => offloads.tso4,
        (true, Version::V6) => offloads.tso6,
        (false, _) => offloads.uso,
    };
    let plain = if tcp {
        flags & !(PSH | ECE) == ACK
    } else {
        let stated = usize::from(u16::from_be_bytes([transport[4], transport[5]]));
        stated == transport.len() && transport[6..8] != [0, 0]
    };
    let offset = if tcp { TCP_OFFSET } else { UDP_OFFSET };
    let checksum = match packet.meta.checksum {
        Checksum::Partial { start, offset: at } => {
            usize::from(start) == ip_header && usize::from(at) == offset
        }
        _ => true,
    };
    Class::Flow(Segment {
        version,
        tcp,
        ip_header,
        header_len: ip_header + header,
        payload,
        joins: wanted && plain && checksum && payload > 0 && packet.meta.gso == Gso::None,
        push: flags & PSH != 0,
    })
}

/// Addresses and ports, which lie side by side where there are no options.
fn key(data: &[u8], version: Version) -> &[u8] {
    match version {
        Version::V4 => &data[12..IPV4_HEADER + 4],
        Version::V6 => &data[8..IPV6_HEADER + 4],
    }
}

/// Where a flow lies in the table. Somebody who makes flows collide only keeps the own packets from
/// being joined, so it needs no secret.
fn hash(key: &[u8]) -> usize {
    let mut hash = 0u64;
    for word in key.as_chunks::<4>().0 {
        hash = (hash ^ u64::from(u32::from_ne_bytes(*word))).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    (hash >> 32) as usize
}

/// Whether all header fields are the same that segmentation would repeat. `last` is the packet
/// before, for the IPv4 identification.
fn same_headers(first: &[u8], last: &[u8], packet: &[u8], segment: Segment) -> bool {
    let same = |range: std::ops::Range<usize>| first[range.clone()] == packet[range];
    let ip = match segment.version {
        Version::V4 => {
            // With "don't fragment" the identification means nothing (RFC 6864).
            let id = |data: &[u8]| u16::from_be_bytes([data[4], data[5]]);
            same(0..2) && same(6..10) && (packet[6] & 0x40 != 0 || id(packet) == id(last).wrapping_add(1))
        }
        Version::V6 => same(0..4) && same(6..8),
    };
    let at = segment.ip_header;
    // Acknowledgement, header length and reserved bits; flags but PSH; window; urgent pointer, options.
    let tcp = || {
        same(at + 8..at + 13)
            && first[at + 13] & !PSH == packet[at + 13] & !PSH
            && same(at + 14..at + 16)
            && same(at + 18..segment.header_len)
    };
    ip && (!segment.tcp || tcp())
}

/// Whether a TCP packet continues a run of `payload` bytes.
fn follows(first: &[u8], payload: u32, packet: &[u8], at: usize) -> bool {
    let seq = |data: &[u8]| u32::from_be_bytes([data[at + 4], data[at + 5], data[at + 6], data[at + 7]]);
    seq(first).wrapping_add(payload) == seq(packet)
}

/// Whether the packet's checksum can be vouched for.
fn is_right(packet: Packet<'_>, segment: Segment) -> bool {
    let protocol = if segment.tcp { protocol::TCP } else { protocol::UDP };
    packet.meta.checksum != Checksum::Unverified
        || checksum::is_right(packet.data, segment.ip_header, protocol)
}

/// Makes the first packet's headers those of the whole run.
fn rewrite_headers(headers: &mut [u8], run: &Run) {
    let len = headers.len() + run.payload as usize;
    let ip_header = if headers[0] >> 4 == 4 {
        headers[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        let checksum = checksum::ipv4_header(&headers[..IPV4_HEADER]);
        headers[10..12].copy_from_slice(&checksum.to_be_bytes());
        IPV4_HEADER
    } else {
        headers[4..6].copy_from_slice(&((len - IPV6_HEADER) as u16).to_be_bytes());
        IPV6_HEADER
    };
    let transport_len = len - ip_header;
    let (protocol, field) = if run.tcp {
        if run.push {
            headers[ip_header + 13] |= PSH;
        }
        (protocol::TCP, ip_header + TCP_OFFSET)
    } else {
        headers[ip_header + 4..ip_header + 6].copy_from_slice(&(transport_len as u16).to_be_bytes());
        (protocol::UDP, ip_header + UDP_OFFSET)
    };
    let pseudo = checksum::pseudo_header(headers, protocol, transport_len).unwrap_or_default();
    headers[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
}

#[cfg(test)]
mod tests;
