//! The way out of a framed port: prefixes in front of the packets where they lie, runs of packets in
//! one write, the rest of a packet that the stream took in part.

use std::io::IoSlice;
use std::task::{Context, Poll, ready};

use sapper_proto::framing::{EncodeError, Framing};
use sapper_proto::packet::PacketBatch;

use super::super::{PortAbilities, wire_packets};
use super::{FramedOptions, MOST_RECORDS_PER_WRITE};
use crate::buffer::Buffer;
use crate::error::Result;
use crate::stats::{DropReason, EndpointStats};
use crate::stream::BoxStream;

/// From packets to stream bytes.
#[derive(Default)]
pub(super) struct Sender {
    /// The rest of a packet that the stream took in part: the batch holds whole packets only.
    pub(super) tail: Buffer,
    /// Packets without headroom for their prefix, copied together with it.
    pub(super) copies: Buffer,
}

impl Sender {
    pub(super) fn poll_tail(&mut self, cx: &mut Context<'_>, stream: &mut BoxStream) -> Poll<Result<()>> {
        while !self.tail.is_empty() {
            let n = ready!(stream.poll_write(cx, &[IoSlice::new(self.tail.data())]))?;
            self.tail.consume(n);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes one run of packets from the front of the batch, or drops one that does not go.
    pub(super) fn poll_run(
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

    pub(super) fn release(&mut self) {
        self.tail.release();
        self.copies.consume(self.copies.len());
        self.copies.release();
    }
}
