//! Packet port over a stream and a framing: what turns TLS into a tunnel for packets.
//!
//! Stream bytes are read straight into a batch's arena and cut there; only what a batch cannot hold
//! (the beginning of a packet, or more packets than it takes) is kept beside it. Each packet leaves as
//! one slice, which is one record on a stream that has records.

#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use sapper_proto::framing::superframe::{Agreement, HELLO_LEN, Hello};
use sapper_proto::framing::{Deframer, EncodeError, Framing, FramingError, Step};
use sapper_proto::packet::PacketBatch;

use super::datagram::LARGEST_PACKET;
use super::{PacketKind, PacketPort, PortAbilities, wire_packets};
use crate::buffer::Buffer;
use crate::error::{Direction, Error, ErrorKind, Phase, Result};
use crate::stats::{DropReason, EndpointStats};
use crate::stream::{BoxStream, RecordMarks, Stream};

/// Records that one write holds when nobody says otherwise.
pub const DEFAULT_RECORDS_PER_WRITE: usize = 64;

/// Most that may be asked for: a write's slices lie on the stack.
pub const MOST_RECORDS_PER_WRITE: usize = 256;

/// How packets lie in the stream, and how they are written.
#[derive(Clone, Copy, Debug)]
pub struct FramedOptions {
    /// The framing.
    pub framing: Framing,
    /// Larger packets end the stream when they are received, and are dropped when they are to be sent.
    pub max_packet: usize,
    /// What lies at a packet's first byte (u16 and u32 framings carry Ethernet frames as well).
    pub kind: PacketKind,
    /// Packets that share one write; 1 for devices that want each record by itself.
    pub records_per_write: usize,
    /// After a bad header, go on at the next record that begins with a good one.
    pub resync: bool,
    /// What the two ends agreed on ([`superframe_hello`]); superframes need it, nothing else has it.
    pub agreement: Option<Agreement>,
}

impl FramedOptions {
    /// The usual ones for a framing.
    pub fn new(framing: Framing) -> Self {
        Self {
            framing,
            max_packet: framing.longest_packet().min(LARGEST_PACKET),
            kind: PacketKind::Ip,
            records_per_write: DEFAULT_RECORDS_PER_WRITE,
            resync: false,
            agreement: None,
        }
    }
}

/// A stream and a framing.
pub struct FramedPort {
    stream: BoxStream,
    options: FramedOptions,
    abilities: PortAbilities,
    receiver: Receiver,
    sender: Sender,
    stats: Arc<EndpointStats>,
}

impl FramedPort {
    /// Packets over `stream`. `received` are bytes that were already read from it.
    pub fn new(stream: BoxStream, options: FramedOptions, received: &[u8]) -> Result<Self> {
        if !(1..=LARGEST_PACKET).contains(&options.max_packet) {
            return Err(Error::config(
                "max_packet",
                format!("must be from 1 to {LARGEST_PACKET}, not {}", options.max_packet),
            ));
        }
        if !(1..=MOST_RECORDS_PER_WRITE).contains(&options.records_per_write) {
            return Err(Error::config(
                "records_per_write",
                format!("must be from 1 to {MOST_RECORDS_PER_WRITE}, not {}", options.records_per_write),
            ));
        }
        let framing = options.framing;
        if options.kind == PacketKind::Ethernet && !matches!(framing, Framing::U16 | Framing::U32) {
            return Err(Error::config(
                "framing",
                format!("{:?} carries IP packets; Ethernet frames need \"u16\" or \"u32\"", framing.name()),
            ));
        }
        let plain = PortAbilities::plain(options.max_packet.min(framing.longest_packet()), options.kind);
        let (deframer, abilities) = match (framing, options.agreement) {
            (Framing::Superframe, Some(agreement)) => (
                Deframer::new(framing, agreement.receive_max, options.resync)
                    .with_offloads(agreement.receive),
                PortAbilities {
                    max_packet: agreement.send_max,
                    tso4: agreement.send.tso4,
                    tso6: agreement.send.tso6,
                    uso: agreement.send.uso,
                    partial_checksum: agreement.send.checksum,
                    ..plain
                },
            ),
            (Framing::Superframe, None) => {
                return Err(Error::new(ErrorKind::NotStarted, "superframes begin with a hello"));
            }
            _ => (Deframer::new(framing, options.max_packet, options.resync), plain),
        };
        let mut receiver = Receiver::new(deframer);
        receiver.begin_with(received);
        Ok(Self { stream, options, abilities, receiver, sender: Sender::default(), stats: Arc::default() })
    }
}

/// Exchanges the superframe hello: both ends send at once, neither waits for the other to begin.
///
/// `received` are bytes that were already read from the stream; what is left of them afterwards is the
/// port's.
pub async fn superframe_hello(
    stream: &mut BoxStream,
    ours: Hello,
    received: &mut Vec<u8>,
    deadline: Duration,
) -> Result<Agreement> {
    let late = |_| {
        Error::new(
            ErrorKind::HandshakeDeadline,
            format!("the peer sent no superframe hello within {deadline:?}"),
        )
        .with_phase(Phase::Handshake)
    };
    let foreign = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::IncompatiblePeer, format!("superframe hello: {error}"))
            .with_phase(Phase::Handshake)
            .with_direction(Direction::Decapsulate)
    };
    let wire = ours.encode();
    let (mut sent, mut flushed) = (0, false);
    // Not a byte beyond the hello is read: what follows belongs to the port.
    let mut answer = [0; HELLO_LEN];
    let mut got = received.len().min(HELLO_LEN);
    answer[..got].copy_from_slice(&received[..got]);
    received.drain(..got);
    let mut theirs = Hello::parse(&answer[..got]).map_err(|error| foreign(&error))?;
    let exchange = poll_fn(|cx| {
        while !flushed {
            let step = if sent < wire.len() {
                stream.poll_write(cx, &[IoSlice::new(&wire[sent..])])?.map(|n| sent += n)
            } else {
                stream.poll_flush(cx)?.map(|()| flushed = true)
            };
            if step.is_pending() {
                break;
            }
        }
        while theirs.is_none() {
            let n = ready!(stream.poll_read(cx, &mut answer[got..], &mut RecordMarks::ignored()))?;
            if n == 0 {
                return Poll::Ready(Err(foreign(&"the stream ended before it").with_reason("truncated")));
            }
            got += n;
            theirs = Hello::parse(&answer[..got]).map_err(|error| foreign(&error))?;
        }
        match &theirs {
            Some(theirs) if flushed => Poll::Ready(ours.agree(theirs).map_err(|error| foreign(&error))),
            _ => Poll::Pending,
        }
    });
    match tokio::time::timeout(deadline, exchange).await.map_err(late)? {
        Ok(agreement) => Ok(agreement),
        Err(error) => Err(error.in_handshake()),
    }
}

impl PacketPort for FramedPort {
    fn abilities(&self) -> PortAbilities {
        self.abilities
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<bool>> {
        self.receiver.poll_receive(cx, &mut self.stream, batch, &self.stats)
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.receiver.has_something() {
            return Poll::Ready(Ok(()));
        }
        self.stream.poll_readable(cx)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, batch: &mut PacketBatch) -> Poll<Result<()>> {
        loop {
            ready!(self.sender.poll_tail(cx, &mut self.stream))?;
            if batch.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let sender = &mut self.sender;
            ready!(sender.poll_run(
                cx,
                &mut self.stream,
                batch,
                &self.options,
                &self.abilities,
                &self.stats
            ))?;
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(self.sender.poll_tail(cx, &mut self.stream))?;
        self.stream.poll_flush(cx)
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(self.sender.poll_tail(cx, &mut self.stream))?;
        self.stream.poll_send_eof(cx)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_fd()
    }

    fn release_idle(&mut self) {
        self.receiver.rest.release();
        self.sender.release();
        self.stream.release_idle();
    }

    fn is_movable(&self) -> bool {
        self.stream.is_movable()
    }

    fn moved(&mut self) -> Result<()> {
        self.stream.moved()
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn stream_mut(&mut self) -> Option<&mut dyn Stream> {
        Some(&mut *self.stream)
    }

    fn describe(&self) -> String {
        format!("{} packets over {}", self.options.framing.name(), self.stream.describe())
    }

    fn offloads(&self) -> Vec<(&'static str, String)> {
        let Some(agreement) = self.options.agreement else {
            return vec![("gso", "off: the framing carries ordinary packets".to_owned())];
        };
        let say = |on: bool| if on { "on" } else { "off: not agreed on" }.to_owned();
        vec![
            ("checksum", say(agreement.send.checksum)),
            ("tso4", say(agreement.send.tso4)),
            ("tso6", say(agreement.send.tso6)),
            ("uso", say(agreement.send.uso)),
        ]
    }
}

/// From stream bytes to packets.
struct Receiver {
    deframer: Deframer,
    /// Bytes that were read and lie in no batch: the beginning of a packet, or what did not fit.
    rest: Buffer,
    /// `rest` may hold a whole packet.
    rest_is_whole: bool,
    /// Where in the stream the next packet begins; where the bytes that were read end.
    position: u64,
    end: u64,
    marks: RecordMarks,
    /// Where records begin, from `position` on. Empty unless resynchronising was asked for.
    records: Vec<u64>,
    /// The stream has records: without them there is nothing to go on at.
    has_records: bool,
    /// Looking for the next record: bytes before it are dropped.
    skipping: bool,
    /// What is to be said after the packets that came before it.
    failure: Option<Error>,
    ended: bool,
}

/// How far one run of bytes was cut.
enum Cut {
    /// Up to the beginning of a packet that is not there whole.
    Partial,
    /// As far as the batch took it.
    BatchFull,
    /// Up to a bad header.
    Failed(Error),
}

impl Receiver {
    fn new(deframer: Deframer) -> Self {
        let resync = deframer.resynchronises();
        Self {
            deframer,
            rest: Buffer::new(),
            rest_is_whole: false,
            position: 0,
            end: 0,
            marks: if resync { RecordMarks::wanted() } else { RecordMarks::ignored() },
            records: Vec::new(),
            has_records: false,
            skipping: false,
            failure: None,
            ended: false,
        }
    }

    fn begin_with(&mut self, received: &[u8]) {
        if !received.is_empty() {
            self.rest.extend(received);
            self.rest_is_whole = true;
            self.end = received.len() as u64;
        }
    }

    fn has_something(&self) -> bool {
        self.rest_is_whole || self.failure.is_some() || self.ended
    }

    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut BoxStream,
        batch: &mut PacketBatch,
        stats: &EndpointStats,
    ) -> Poll<Result<bool>> {
        assert!(batch.has_room(self.deframer.max_packet()), "a batch has room for one packet");
        let before = batch.len();
        loop {
            if let Some(failure) = &self.failure {
                return Poll::Ready(Err(failure.clone()));
            }
            if self.ended {
                return Poll::Ready(Ok(false));
            }
            if self.rest_is_whole {
                self.cut_rest(batch, stats);
            } else {
                match ready!(self.poll_fill(cx, stream, batch, stats)) {
                    Ok(()) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            let received = batch.len() - before;
            if received > 0 {
                let (packets, bytes) = (before..batch.len()).filter_map(|index| batch.get(index)).fold(
                    (0, 0),
                    |(packets, bytes), packet| {
                        (packets + wire_packets(packet), bytes + packet.data.len() as u64)
                    },
                );
                stats.packets_received.add(packets);
                stats.bytes_received.add(bytes);
                return Poll::Ready(Ok(true));
            }
        }
    }

    /// Cuts what was kept. Its packets are copied: a batch that was full left them behind.
    fn cut_rest(&mut self, batch: &mut PacketBatch, stats: &EndpointStats) {
        loop {
            let cut = loop {
                match self.deframer.next(self.rest.data()) {
                    Ok(Step::Packet { consumed, data, meta }) => {
                        if !batch.push(&self.rest.data()[data], meta) {
                            break Cut::BatchFull;
                        }
                        self.rest.consume(consumed);
                        self.position += consumed as u64;
                    }
                    Ok(Step::NeedMore { .. }) => break Cut::Partial,
                    Err(error) => break Cut::Failed(describe(&error, self.rest.data())),
                }
            };
            match cut {
                Cut::BatchFull => return,
                Cut::Partial => {
                    self.rest_is_whole = false;
                    return;
                }
                Cut::Failed(error) => {
                    let skip = self.recover(error, stats);
                    self.rest.consume((skip - self.position) as usize);
                    self.position = skip;
                    if self.failure.is_some() || self.skipping {
                        self.rest_is_whole = false;
                        return;
                    }
                }
            }
        }
    }

    /// Reads once, behind the beginning of a packet that was kept, and cuts in place.
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut BoxStream,
        batch: &mut PacketBatch,
        stats: &EndpointStats,
    ) -> Poll<Result<()>> {
        let kept = self.rest.len();
        let mut spare = batch.spare();
        self.marks.clear();
        let n = ready!(stream.poll_read(cx, &mut spare.bytes()[kept..], &mut self.marks))?;
        stats.receive_calls.add(1);
        if n == 0 {
            self.ended = true;
            if kept > 0 {
                self.failure = Some(
                    Error::new(
                        ErrorKind::RemoteProtocol,
                        format!("the stream ended after {kept} bytes of a packet"),
                    )
                    .with_phase(Phase::Transfer)
                    .with_direction(Direction::Decapsulate)
                    .with_reason("truncated"),
                );
            }
            return Poll::Ready(Ok(()));
        }
        spare.bytes()[..kept].copy_from_slice(self.rest.data());
        self.rest.consume(kept);
        if self.deframer.resynchronises() {
            if self.end == 0 {
                self.records.push(0);
            }
            self.has_records |= !self.marks.ends().is_empty();
            self.records.extend(self.marks.ends().iter().map(|&at| self.end + u64::from(at)));
        }
        self.end += n as u64;
        let filled = kept + n;
        let mut at = 0;
        if self.skipping {
            at = self.next_record() as usize - self.position as usize;
            self.position += at as u64;
        }
        while at < filled && !self.skipping {
            let cut = loop {
                match self.deframer.next(&spare.bytes()[at..filled]) {
                    Ok(Step::Packet { consumed, data, meta }) => {
                        if spare.packets_left() == 0 {
                            break Cut::BatchFull;
                        }
                        // The prefix was ours to read and is ours to write.
                        spare.commit(at + data.start, data.len(), data.start, meta);
                        at += consumed;
                        self.position += consumed as u64;
                    }
                    Ok(Step::NeedMore { .. }) => break Cut::Partial,
                    Err(error) => break Cut::Failed(describe(&error, &spare.bytes()[at..filled])),
                }
            };
            match cut {
                Cut::Partial | Cut::BatchFull => {
                    self.rest.extend(&spare.bytes()[at..filled]);
                    self.rest_is_whole = matches!(cut, Cut::BatchFull);
                    break;
                }
                Cut::Failed(error) => {
                    let next = self.recover(error, stats);
                    at += (next - self.position) as usize;
                    self.position = next;
                    if self.failure.is_some() {
                        break;
                    }
                }
            }
        }
        let position = self.position;
        self.records.retain(|&record| record >= position);
        Poll::Ready(Ok(()))
    }

    /// After a bad header at `position`: where to go on. Without a record to go on at, the failure
    /// is final.
    fn recover(&mut self, error: Error, stats: &EndpointStats) -> u64 {
        if !self.deframer.resynchronises() || !self.has_records {
            self.failure = Some(error);
            return self.position;
        }
        stats.drops.add(DropReason::Resync, 1);
        let position = self.position;
        self.records.retain(|&record| record > position);
        self.next_record()
    }

    /// The first record that begins at or behind `position`, or the end of what was read.
    fn next_record(&mut self) -> u64 {
        let next = self.records.iter().copied().find(|&record| record >= self.position && record < self.end);
        self.skipping = next.is_none();
        next.unwrap_or(self.end)
    }
}

/// The error of a header that cannot be, with the bytes that a person needs to see what came.
fn describe(error: &FramingError, bytes: &[u8]) -> Error {
    const SHOWN: usize = 20;
    let mut dump = String::with_capacity(3 * SHOWN);
    for byte in &bytes[..bytes.len().min(SHOWN)] {
        dump.push_str(&format!(" {byte:02x}"));
    }
    let reason = match error {
        FramingError::Header(_) => "bad_header",
        FramingError::WrongVersion => "wrong_version",
        FramingError::Length { .. } => "bad_length",
        FramingError::Virtio(_) => "bad_offload",
        FramingError::Offload => "offload_not_offered",
    };
    Error::new(ErrorKind::RemoteProtocol, format!("no packet begins with{dump}: {error}"))
        .with_phase(Phase::Transfer)
        .with_direction(Direction::Decapsulate)
        .with_reason(reason)
}

/// From packets to stream bytes.
#[derive(Default)]
struct Sender {
    /// The rest of a packet that the stream took in part: the batch holds whole packets only.
    tail: Buffer,
    /// Packets without headroom for their prefix, copied together with it.
    copies: Buffer,
}

impl Sender {
    fn poll_tail(&mut self, cx: &mut Context<'_>, stream: &mut BoxStream) -> Poll<Result<()>> {
        while !self.tail.is_empty() {
            let n = ready!(stream.poll_write(cx, &[IoSlice::new(self.tail.data())]))?;
            self.tail.consume(n);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes one run of packets from the front of the batch, or drops one that does not go.
    fn poll_run(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut BoxStream,
        batch: &mut PacketBatch,
        options: &FramedOptions,
        abilities: &PortAbilities,
        stats: &EndpointStats,
    ) -> Poll<Result<()>> {
        let prefix = options.framing.prefix_len();
        let wanted = batch.len().min(options.records_per_write);
        self.copies.consume(self.copies.len());
        let mut run = 0;
        while run < wanted {
            match self.write_prefix(batch, run, prefix, options.framing, abilities) {
                Ok(()) => run += 1,
                Err(reason) if run == 0 => {
                    stats.drops.add(reason, 1);
                    batch.advance(1);
                    return Poll::Ready(Ok(()));
                }
                Err(_) => break,
            }
        }
        let mut slices = [IoSlice::new(&[]); MOST_RECORDS_PER_WRITE];
        let mut copied = 0;
        for (index, slice) in slices[..run].iter_mut().enumerate() {
            *slice = IoSlice::new(match batch.prefixed(index, prefix) {
                Some(bytes) => bytes,
                None => {
                    let len = prefix + batch.get(index).map_or(0, |packet| packet.data.len());
                    copied += len;
                    &self.copies.data()[copied - len..copied]
                }
            });
        }
        let mut left = ready!(stream.poll_write(cx, &slices[..run]))?;
        stats.send_calls.add(1);
        let (mut taken, mut packets, mut bytes) = (0, 0, 0);
        for slice in &slices[..run] {
            if left == 0 {
                break;
            }
            if let Some(packet) = batch.get(taken) {
                packets += wire_packets(packet);
                bytes += packet.data.len() as u64;
            }
            taken += 1;
            if left < slice.len() {
                self.tail.extend(&slice[left..]);
                break;
            }
            left -= slice.len();
        }
        stats.packets_sent.add(packets);
        stats.bytes_sent.add(bytes);
        batch.advance(taken);
        Poll::Ready(Ok(()))
    }

    /// Puts the prefix in front of a packet, in place where there is room for it.
    fn write_prefix(
        &mut self,
        batch: &mut PacketBatch,
        index: usize,
        prefix: usize,
        framing: Framing,
        abilities: &PortAbilities,
    ) -> Result<(), DropReason> {
        let Some(packet) = batch.get(index) else { return Ok(()) };
        if let Some(reason) = abilities.refuses(packet) {
            return Err(reason);
        }
        let meta = *packet.meta;
        let written = if let Some(bytes) = batch.with_prefix(index, prefix) {
            let (head, data) = bytes.split_at_mut(prefix);
            framing.write_prefix(head, data, &meta)
        } else {
            let mut head = [0; sapper_proto::packet::HEADROOM];
            let Some(packet) = batch.get(index) else { return Ok(()) };
            let written = framing.write_prefix(&mut head[..prefix], packet.data, &meta);
            if written.is_ok() {
                self.copies.extend(&head[..prefix]);
                self.copies.extend(packet.data);
            }
            written
        };
        written.map_err(|error| match error {
            EncodeError::Length(_) => DropReason::TooLarge,
            EncodeError::Header(_) | EncodeError::WrongVersion => DropReason::Malformed,
            EncodeError::Unfinished => DropReason::BadOffload,
        })
    }

    fn release(&mut self) {
        self.tail.release();
        self.copies.consume(self.copies.len());
        self.copies.release();
    }
}
