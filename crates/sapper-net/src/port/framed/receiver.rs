//! The way in of a framed port: reads into a batch, cuts packets there, finds the next record after
//! a bad header where that was asked for.

use std::task::{Context, Poll, ready};

use sapper_proto::framing::{Deframer, FramingError, Step};
use sapper_proto::packet::PacketBatch;

use super::super::wire_packets;
use crate::buffer::Buffer;
use crate::error::{Direction, Error, ErrorKind, Phase, Result};
use crate::stats::{DropReason, EndpointStats};
use crate::stream::{BoxStream, RecordMarks};

/// From stream bytes to packets.
pub(super) struct Receiver {
    deframer: Deframer,
    /// Bytes that were read and lie in no batch: the beginning of a packet, or what did not fit.
    pub(super) rest: Buffer,
    /// `rest` may hold a whole packet.
    rest_is_whole: bool,
    /// Where in the stream the next packet begins; where the bytes that were read end.
    pub(super) position: u64,
    end: u64,
    marks: RecordMarks,
    /// Where records begin, from `position` on. Empty unless resynchronising was asked for.
    pub(super) records: Vec<u64>,
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
    pub(super) fn new(deframer: Deframer) -> Self {
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

    pub(super) fn begin_with(&mut self, received: &[u8]) {
        if !received.is_empty() {
            self.rest.extend(received);
            self.rest_is_whole = true;
            self.end = received.len() as u64;
        }
    }

    pub(super) fn has_something(&self) -> bool {
        self.rest_is_whole || self.failure.is_some() || self.ended
    }

    pub(super) fn poll_receive(
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
        stats.receive_drops.add(DropReason::Resync, 1);
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
