//! Superframes: a TUN's large packets travel whole, with their virtio-net header, between our ends.
//!
//! Wire, all integers big-endian except inside the virtio-net header, which is little-endian:
//!
//! ```text
//! once per direction, before anything else (both ends send at once, neither waits):
//!   hello    53 41 50 50 45 52 53 46 "SAPPERSF"   u8 newest version   u8 oldest version
//!            u16 flags: 1 checksum, 2 TSO4, 4 TSO6, 8 USO    u32 longest packet that this end takes
//! then, any number of times:
//!   u32 length of what follows   virtio-net header (10 bytes)   IP packet (at most 65,535 bytes)
//! ```
//!
//! The version in use is the newest that both ends speak. Unknown flags are ignored. An end sends
//! only what the other's hello says it takes, and checks what it receives against its own hello and
//! against the packet itself ([`virtio`](crate::packet::virtio)): a superframe is hostile input.

use crate::packet::{Offloads, virtio};

/// Bytes of a hello.
pub const HELLO_LEN: usize = 16;
/// What a hello begins with.
pub const MAGIC: [u8; 8] = *b"SAPPERSF";
/// The newest version that this code speaks.
pub const NEWEST_VERSION: u8 = 1;
/// The oldest version that this code speaks.
pub const OLDEST_VERSION: u8 = 1;
/// Bytes in front of a packet: length and virtio-net header.
pub const PREFIX_LEN: usize = 4 + virtio::HEADER_LEN;
/// The longest packet of a superframe.
pub const LONGEST_PACKET: usize = 65_535;
/// The least that an end must take (the least MTU of IPv6).
pub const LEAST_MAX_PACKET: usize = 1_280;

/// The flags of a hello.
fn to_flags(offloads: Offloads) -> u16 {
    u16::from(offloads.checksum)
        | u16::from(offloads.tso4) << 1
        | u16::from(offloads.tso6) << 2
        | u16::from(offloads.uso) << 3
}

fn from_flags(flags: u16) -> Offloads {
    let bit = |n: u16| flags >> n & 1 == 1;
    Offloads { checksum: bit(0), tso4: bit(1), tso6: bit(2), uso: bit(3) }
}

/// What one end says before its first superframe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The newest version it speaks.
    pub newest: u8,
    /// The oldest version it speaks.
    pub oldest: u8,
    /// What it takes.
    pub accepts: Offloads,
    /// The longest packet it takes.
    pub max_packet: usize,
}

/// What two hellos came to, seen from one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The version in use.
    pub version: u8,
    /// What may be sent (the other end's hello).
    pub send: Offloads,
    /// The longest packet that may be sent.
    pub send_max: usize,
    /// What may be received (the own hello).
    pub receive: Offloads,
    /// The longest packet that may be received.
    pub receive_max: usize,
}

/// Why there is no agreement. Each names the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// The other end does not speak superframes.
    #[error("magic: the peer does not speak superframes")]
    Magic,
    /// The versions of the two ends do not overlap, or the peer's are reversed.
    #[error("version: the peer speaks {oldest} to {newest}, this end {OLDEST_VERSION} to {NEWEST_VERSION}")]
    Version {
        /// The peer's oldest.
        oldest: u8,
        /// The peer's newest.
        newest: u8,
    },
    /// Large packets are taken, but no partial checksums, which each of them has.
    #[error("flags: {0:#06x} takes large packets without partial checksums")]
    Flags(u16),
    /// The longest packet is out of range.
    #[error("maximum packet: {0} is not within {LEAST_MAX_PACKET} to {LONGEST_PACKET}")]
    MaxPacket(u32),
}

impl Hello {
    /// The hello of an end that takes these. `max_packet` is brought into its range, and large
    /// packets are left out where partial checksums are.
    pub fn new(accepts: Offloads, max_packet: usize) -> Self {
        Self {
            newest: NEWEST_VERSION,
            oldest: OLDEST_VERSION,
            accepts: if accepts.is_consistent() { accepts } else { Offloads::NONE },
            max_packet: max_packet.clamp(LEAST_MAX_PACKET, LONGEST_PACKET),
        }
    }

    /// The hello as it is sent.
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut wire = [0; HELLO_LEN];
        wire[..8].copy_from_slice(&MAGIC);
        wire[8] = self.newest;
        wire[9] = self.oldest;
        wire[10..12].copy_from_slice(&to_flags(self.accepts).to_be_bytes());
        wire[12..].copy_from_slice(&(self.max_packet as u32).to_be_bytes());
        wire
    }

    /// Reads the other end's hello from the first bytes of its stream; `None` while there are fewer
    /// than [`HELLO_LEN`]. A peer that speaks something else is told apart at its first byte.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, HelloError> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(HelloError::Magic);
        }
        let Some(&wire) = bytes.first_chunk::<HELLO_LEN>() else { return Ok(None) };
        let [.., newest, oldest, f0, f1, m0, m1, m2, m3] = wire;
        if oldest > newest {
            return Err(HelloError::Version { oldest, newest });
        }
        let flags = u16::from_be_bytes([f0, f1]);
        let accepts = from_flags(flags);
        if !accepts.is_consistent() {
            return Err(HelloError::Flags(flags));
        }
        let max = u32::from_be_bytes([m0, m1, m2, m3]);
        if !(LEAST_MAX_PACKET as u32..=LONGEST_PACKET as u32).contains(&max) {
            return Err(HelloError::MaxPacket(max));
        }
        Ok(Some(Self { newest, oldest, accepts, max_packet: max as usize }))
    }

    /// What this end's hello and the peer's come to.
    pub fn agree(&self, peer: &Self) -> Result<Agreement, HelloError> {
        let version = self.newest.min(peer.newest);
        if version < self.oldest.max(peer.oldest) {
            return Err(HelloError::Version { oldest: peer.oldest, newest: peer.newest });
        }
        Ok(Agreement {
            version,
            send: peer.accepts,
            send_max: peer.max_packet,
            receive: self.accepts,
            receive_max: self.max_packet,
        })
    }
}
