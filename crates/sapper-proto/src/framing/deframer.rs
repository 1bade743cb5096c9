//! Packets out of stream bytes, as ranges: nothing is copied, nothing is kept.
//!
//! It does not hold the bytes: the caller gives what it has, beginning at a packet's first byte, and
//! comes again with more when told so.

use std::ops::Range;

use super::Framing;
use super::superframe;
use crate::packet::ip::{self, IpError, Version};
use crate::packet::virtio::{self, VirtioError};
use crate::packet::{Offloads, PacketMeta};

/// What the next bytes of a stream are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A whole packet.
    Packet {
        /// Bytes of the stream that it took, prefix included: the next packet begins behind them.
        consumed: usize,
        /// Where the packet lies in the bytes given.
        data: Range<usize>,
        /// What travels with it.
        meta: PacketMeta,
    },
    /// The packet is not there whole.
    NeedMore {
        /// Bytes from the packet's first one that are needed to get further; more than were given,
        /// and never above prefix and `max_packet`.
        at_least: usize,
    },
}

/// Why a stream cannot be cut into packets any more. It ends the bridge, or is followed by
/// [`Deframer::resynchronise`] where that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// The IP header is wrong.
    #[error(transparent)]
    Header(#[from] IpError),
    /// IPv4 where only IPv6 is carried, or the other way round.
    #[error("packet's IP version is not carried by this framing")]
    WrongVersion,
    /// A length of zero, or above the maximum.
    #[error("packet length {length} is not within 1 to {max}")]
    Length {
        /// As stated.
        length: usize,
        /// What is taken.
        max: usize,
    },
    /// A superframe's virtio-net header lies about its packet.
    #[error("superframe: {0}")]
    Virtio(#[from] VirtioError),
    /// A superframe needs an offload that this end did not say it takes.
    #[error("superframe: offload was not offered")]
    Offload,
}

/// Cuts a stream into packets.
///
/// Order of calls: [`next`](Self::next) with all bytes from the packet's first one; on
/// [`Step::Packet`] again with what lies behind `consumed`; on [`Step::NeedMore`] again with more.
/// On an error [`resynchronise`](Self::resynchronise), or the end.
#[derive(Clone, Debug)]
pub struct Deframer {
    framing: Framing,
    max_packet: usize,
    resync: bool,
    accepts: Offloads,
}

impl Deframer {
    /// For packets of at most `max_packet` bytes (prefix not counted). With `resync`, and only then,
    /// [`resynchronise`](Self::resynchronise) looks for the next packet after an error.
    pub fn new(framing: Framing, max_packet: usize, resync: bool) -> Self {
        let max_packet = max_packet.min(framing.longest_packet());
        Self { framing, max_packet, resync, accepts: Offloads::ALL }
    }

    /// For superframes: refuses what this end did not offer in its hello.
    pub fn with_offloads(mut self, accepts: Offloads) -> Self {
        self.accepts = accepts;
        self
    }

    /// How packets lie in the stream.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Longest packet that is taken.
    pub fn max_packet(&self) -> usize {
        self.max_packet
    }

    /// The longest that one packet can be in the stream, prefix included: a buffer of this size
    /// always gets further.
    pub fn longest_unit(&self) -> usize {
        self.framing.prefix_len() + self.max_packet
    }

    /// Looks at the packet that begins with `bytes`.
    #[inline]
    pub fn next(&self, bytes: &[u8]) -> Result<Step, FramingError> {
        let prefix = self.framing.prefix_len();
        let unit = match self.framing {
            Framing::Ip { v4, v6 } => {
                match ip::version(bytes) {
                    Some(Version::V4) if !v4 => return Err(FramingError::WrongVersion),
                    Some(Version::V6) if !v6 => return Err(FramingError::WrongVersion),
                    _ => {}
                }
                match ip::stated_len(bytes)? {
                    Some(length) => self.checked(length)?,
                    None => return Ok(Step::NeedMore { at_least: lookahead(bytes) }),
                }
            }
            Framing::U16 => match bytes.first_chunk::<2>() {
                Some(length) => prefix + self.checked(usize::from(u16::from_be_bytes(*length)))?,
                None => return Ok(Step::NeedMore { at_least: prefix }),
            },
            Framing::U32 => match bytes.first_chunk::<4>() {
                Some(length) => prefix + self.checked(u32::from_be_bytes(*length) as usize)?,
                None => return Ok(Step::NeedMore { at_least: prefix }),
            },
            Framing::Superframe => match bytes.first_chunk::<4>() {
                Some(length) => {
                    let length = u32::from_be_bytes(*length) as usize;
                    let packet = self.checked(length.saturating_sub(virtio::HEADER_LEN))?;
                    prefix + packet
                }
                None => return Ok(Step::NeedMore { at_least: 4 }),
            },
        };
        let Some(packet) = bytes.get(prefix..unit) else {
            return Ok(Step::NeedMore { at_least: unit });
        };
        let meta = match self.framing {
            Framing::Superframe => self.superframe(bytes, packet)?,
            _ => PacketMeta::default(),
        };
        Ok(Step::Packet { consumed: unit, data: prefix..unit, meta })
    }

    /// After an error: where to go on. `marks` are the offsets in `bytes` where records of the
    /// carrier begin, rising; `bytes` begin where [`next`](Self::next) failed.
    ///
    /// `Some(offset)`: a packet may begin there (offset 0 is not looked at again); go on with
    /// `bytes[offset..]`. `None`: drop all of `bytes` and come again with the next record. Without
    /// `resync` it is always `None`, and the error was final.
    pub fn resynchronise(&self, marks: &[usize], bytes: &[u8]) -> Option<usize> {
        if !self.resync {
            return None;
        }
        let at = |mark: usize| bytes.get(mark..).filter(|rest| !rest.is_empty());
        marks.iter().copied().find(|&mark| mark > 0 && at(mark).is_some_and(|rest| self.next(rest).is_ok()))
    }

    /// Whether resynchronising was asked for.
    pub fn resynchronises(&self) -> bool {
        self.resync
    }

    fn checked(&self, length: usize) -> Result<usize, FramingError> {
        if length == 0 || length > self.max_packet {
            return Err(FramingError::Length { length, max: self.max_packet });
        }
        Ok(length)
    }

    /// What a superframe says about its packet, if it is true and was offered.
    fn superframe(&self, bytes: &[u8], packet: &[u8]) -> Result<PacketMeta, FramingError> {
        let header = bytes[4..].first_chunk().expect("the prefix is there: the packet lies behind it");
        let meta = virtio::decode(header, packet)?;
        if !self.accepts.allow(&meta) {
            return Err(FramingError::Offload);
        }
        Ok(meta)
    }
}

/// Bytes that an IP header needs to tell its length.
fn lookahead(bytes: &[u8]) -> usize {
    match ip::version(bytes) {
        Some(Version::V4) => 4,
        Some(Version::V6) => 6,
        None => 1,
    }
}

const _: () = assert!(superframe::PREFIX_LEN <= crate::packet::HEADROOM);
