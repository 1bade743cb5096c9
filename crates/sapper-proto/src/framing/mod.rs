//! How packets lie in a byte stream, both ways.
//!
//! A framing is always named, never guessed. Reading is the [`Deframer`]'s; writing is
//! [`Framing::write_prefix`], into the headroom that a packet has in its batch, so that nothing is
//! copied. A raw stream has no framing and does not come here.
//!
//! - [`Framing::Ip`]: bare IP packets back to back; their headers say how long they are.
//! - [`Framing::U16`], [`Framing::U32`]: a big-endian length that does not count itself, then an IP
//!   packet or an Ethernet frame, which is not looked into.
//! - [`Framing::Superframe`]: between our own ends, see [`superframe`].

mod deframer;
pub mod superframe;

pub use deframer::{Deframer, FramingError, Step};

use crate::packet::ip::{self, IpError, Version};
use crate::packet::{Checksum, Gso, PacketMeta, virtio};

/// How packets lie in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Framing {
    /// Bare IP packets of the versions that are `true`.
    Ip {
        /// IPv4 is carried.
        v4: bool,
        /// IPv6 is carried.
        v6: bool,
    },
    /// u16 big-endian length and packet.
    U16,
    /// u32 big-endian length and packet.
    U32,
    /// u32 big-endian length, virtio-net header and a packet that may be a large one.
    Superframe,
}

/// Why a packet does not go out in a framing. It is dropped and counted; the stream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The header is none, or states another length than the packet has.
    #[error(transparent)]
    Header(#[from] IpError),
    /// IPv4 in a framing for IPv6, or the other way round.
    #[error("IP version is not carried by this framing")]
    WrongVersion,
    /// No bytes, or more than the length field can state.
    #[error("packet of {0} bytes does not fit the framing")]
    Length(usize),
    /// A large packet or a partial checksum, in a framing that carries only complete packets.
    #[error("packet is not segmented, or its checksum not complete")]
    Unfinished,
}

impl Framing {
    /// Every framing with its name in options.
    pub const NAMES: [(&'static str, Framing); 6] = [
        ("ip", Framing::Ip { v4: true, v6: true }),
        ("ipv4", Framing::Ip { v4: true, v6: false }),
        ("ipv6", Framing::Ip { v4: false, v6: true }),
        ("u16", Framing::U16),
        ("u32", Framing::U32),
        ("superframe", Framing::Superframe),
    ];

    /// The framing of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, framing)| *framing)
    }

    /// The name in options.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, known)| *known == self).map_or("ip", |(name, _)| name)
    }

    /// Bytes in front of each packet.
    pub const fn prefix_len(self) -> usize {
        match self {
            Self::Ip { .. } => 0,
            Self::U16 => 2,
            Self::U32 => 4,
            Self::Superframe => superframe::PREFIX_LEN,
        }
    }

    /// The longest packet that the framing can express.
    pub const fn longest_packet(self) -> usize {
        match self {
            Self::Ip { .. } => ip::LONGEST,
            Self::U16 => u16::MAX as usize,
            Self::U32 => u32::MAX as usize,
            Self::Superframe => superframe::LONGEST_PACKET,
        }
    }

    /// The shortest packet that there is in the framing: what is bound to less carries none.
    pub const fn shortest_packet(self) -> usize {
        match self {
            Self::Ip { v4: true, .. } => ip::IPV4_HEADER,
            Self::Ip { .. } => ip::IPV6_HEADER,
            Self::U16 | Self::U32 => 1,
            Self::Superframe => superframe::LEAST_MAX_PACKET,
        }
    }

    /// Whether packets travel whole with their GSO state and partial checksums.
    pub const fn carries_gso(self) -> bool {
        matches!(self, Self::Superframe)
    }

    /// Writes what goes in front of `packet` into `prefix`, which has [`prefix_len`](Self::prefix_len)
    /// bytes, after looking whether the far end could read it back.
    ///
    /// # Panics
    /// When `prefix` has another length.
    pub fn write_prefix(
        self,
        prefix: &mut [u8],
        packet: &[u8],
        meta: &PacketMeta,
    ) -> Result<(), EncodeError> {
        assert_eq!(prefix.len(), self.prefix_len(), "prefix of another framing");
        if packet.is_empty() || packet.len() > self.longest_packet() {
            return Err(EncodeError::Length(packet.len()));
        }
        let partial = matches!(meta.checksum, Checksum::Partial { .. });
        if meta.gso == Gso::Datagrams || !self.carries_gso() && (meta.gso != Gso::None || partial) {
            return Err(EncodeError::Unfinished);
        }
        match self {
            Self::Ip { v4, v6 } => {
                let carried = match ip::check_len(packet)? {
                    Version::V4 => v4,
                    Version::V6 => v6,
                };
                if !carried {
                    return Err(EncodeError::WrongVersion);
                }
            }
            Self::U16 => prefix.copy_from_slice(&(packet.len() as u16).to_be_bytes()),
            Self::U32 => prefix.copy_from_slice(&(packet.len() as u32).to_be_bytes()),
            Self::Superframe => {
                ip::check_len(packet)?;
                let len = (virtio::HEADER_LEN + packet.len()) as u32;
                prefix[..4].copy_from_slice(&len.to_be_bytes());
                prefix[4..].copy_from_slice(&virtio::encode(meta, packet));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
