//! Packet port over a stream and a framing: what turns TLS into a tunnel for packets.
//!
//! Stream bytes are read straight into a batch's arena and cut there; only what a batch cannot hold
//! (the beginning of a packet, or more packets than it takes) is kept beside it: [`receiver`]. Each
//! packet leaves as one slice, which is one record on a stream that has records: [`sender`].

mod hello;
mod receiver;
mod sender;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use sapper_proto::framing::superframe::Agreement;
use sapper_proto::framing::{Deframer, Framing};
use sapper_proto::packet::PacketBatch;

pub use hello::superframe_hello;
use receiver::Receiver;
use sender::Sender;

use super::datagram::LARGEST_PACKET;
use super::{PacketKind, PacketPort, PortAbilities};
use crate::error::{Error, ErrorKind, Result};
use crate::stats::EndpointStats;
use crate::stream::{BoxStream, Stream};

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
