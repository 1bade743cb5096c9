//! Writing captures as pcapng: section header, interfaces, packets, secrets.
//!
//! Blocks are appended to a buffer of the caller, little-endian; sizes are known before, so that a
//! size limit can be kept without writing. Timestamps are arguments, in nanoseconds since the epoch.
//! Captures are not read here.

/// Link types (tcpdump.org's list).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum LinkType {
    /// Ethernet frames.
    Ethernet = 1,
    /// IP packets, the version in their first nibble.
    Raw = 101,
}

/// Which way a packet went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the network: decapsulated here.
    Inbound,
    /// To the network: encapsulated here.
    Outbound,
}

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const DECRYPTION_SECRETS: u32 = 10;

const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
/// "TLSK": the secrets are a TLS key log, as NSS writes it.
const TLS_KEY_LOG: u32 = 0x544c_534b;
/// Timestamps count 10^-9 seconds.
const NANOSECONDS: u8 = 9;

const OPT_END: u16 = 0;
const OPT_COMMENT: u16 = 1;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;

/// Bytes of an enhanced packet block without packet and comment: type, length, five words, flags
/// option, end of options, length.
const PACKET_OVERHEAD: usize = 8 + 20 + 8 + 4 + 4;

/// A packet to be written.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// The interface, counted from 0 in the order that they were described in.
    pub interface: u32,
    /// Nanoseconds since the epoch.
    pub timestamp: u64,
    /// Which way it went.
    pub direction: Direction,
    /// The bytes that are captured: at most the interface's snap length.
    pub data: &'a [u8],
    /// The packet's length before it was cut to that.
    pub original_len: usize,
    /// What a reader shows beside it.
    pub comment: Option<&'a str>,
}

impl Record<'_> {
    /// Bytes that [`packet`] will append.
    pub fn block_len(&self) -> usize {
        let comment = self.comment.map_or(0, |text| 4 + padded(shortened(text).len()));
        PACKET_OVERHEAD + padded(self.data.len()) + comment
    }
}

/// Appends the section header that a file begins with.
pub fn section_header(out: &mut Vec<u8>, application: &str) {
    block(out, SECTION_HEADER, |out| {
        out.extend_from_slice(&BYTE_ORDER_MAGIC.to_le_bytes());
        out.extend_from_slice(&[1, 0, 0, 0]);
        // The section's length is not known while it is written.
        out.extend_from_slice(&u64::MAX.to_le_bytes());
        option(out, SHB_USERAPPL, shortened(application).as_bytes());
        option(out, OPT_END, &[]);
    });
}

/// Appends an interface; `snap_len` 0 means packets are not cut.
pub fn interface(out: &mut Vec<u8>, link: LinkType, snap_len: u32, name: &str) {
    block(out, INTERFACE_DESCRIPTION, |out| {
        out.extend_from_slice(&(link as u16).to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&snap_len.to_le_bytes());
        option(out, IF_NAME, shortened(name).as_bytes());
        option(out, IF_TSRESOL, &[NANOSECONDS]);
        option(out, OPT_END, &[]);
    });
}

/// Appends a packet: [`Record::block_len`] bytes.
pub fn packet(out: &mut Vec<u8>, record: &Record<'_>) {
    block(out, ENHANCED_PACKET, |out| {
        for word in [
            record.interface,
            (record.timestamp >> 32) as u32,
            record.timestamp as u32,
            record.data.len() as u32,
            record.original_len.max(record.data.len()) as u32,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(record.data);
        pad(out, record.data.len());
        let direction: u32 = match record.direction {
            Direction::Inbound => 1,
            Direction::Outbound => 2,
        };
        option(out, EPB_FLAGS, &direction.to_le_bytes());
        if let Some(comment) = record.comment {
            option(out, OPT_COMMENT, shortened(comment).as_bytes());
        }
        option(out, OPT_END, &[]);
    });
}

/// Appends lines of a TLS key log, with which a reader decrypts the packets behind it.
pub fn tls_key_log(out: &mut Vec<u8>, lines: &str) {
    block(out, DECRYPTION_SECRETS, |out| {
        out.extend_from_slice(&TLS_KEY_LOG.to_le_bytes());
        out.extend_from_slice(&(lines.len() as u32).to_le_bytes());
        out.extend_from_slice(lines.as_bytes());
        pad(out, lines.len());
    });
}

/// A block: its length stands in front of the body and behind it.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    body(out);
    let len = ((out.len() - start + 4) as u32).to_le_bytes();
    out[start + 4..start + 8].copy_from_slice(&len);
    out.extend_from_slice(&len);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend_from_slice(&code.to_le_bytes());
    out.extend_from_slice(&(value.len() as u16).to_le_bytes());
    out.extend_from_slice(value);
    pad(out, value.len());
}

/// Fills up to a multiple of four.
fn pad(out: &mut Vec<u8>, written: usize) {
    out.resize(out.len() + padded(written) - written, 0);
}

const fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// As much of a text as an option's 16-bit length can state.
fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(usize::from(u16::MAX))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::hex;

    #[test]
    fn the_blocks() {
        let mut out = Vec::new();
        section_header(&mut out, "sapper");
        assert_eq!(
            out,
            hex("0a0d0d0a 2c000000 4d3c2b1a 0100 0000 ffffffffffffffff
                 0400 0600 736170706572 0000 0000 0000 2c000000")
        );
        out.clear();
        interface(&mut out, LinkType::Raw, 65_535, "tun0");
        assert_eq!(
            out,
            hex("01000000 28000000 6500 0000 ffff0000 0200 0400 74756e30 0900 0100 09 000000
                 0000 0000 28000000")
        );
        out.clear();
        let record = Record {
            interface: 1,
            timestamp: 0x0102_0304_0506_0708,
            direction: Direction::Outbound,
            data: &[0x60, 1, 2, 3, 4],
            original_len: 1280,
            comment: Some("why"),
        };
        packet(&mut out, &record);
        assert_eq!(
            out,
            hex("06000000 3c000000 01000000 04030201 08070605 05000000 00050000
                 6001020304 000000 0200 0400 02000000 0100 0300 776879 00 0000 0000 3c000000")
        );
        assert_eq!(record.block_len(), out.len());
        out.clear();
        tls_key_log(&mut out, "CLIENT_RANDOM 0 1\n");
        assert_eq!(out[..16], hex("0a000000 28000000 4b534c54 12000000"));
        assert_eq!(out[16..34], *b"CLIENT_RANDOM 0 1\n");
        assert_eq!(out[34..], hex("0000 28000000"));
    }

    #[test]
    fn the_length_is_known_before_writing() {
        let long = "ü".repeat(40_000);
        for len in 0..9 {
            for comment in [None, Some(""), Some("four"), Some(&long[..])] {
                let data = vec![7; len];
                let direction = Direction::Inbound;
                let original_len = 0;
                let record =
                    Record { interface: 0, timestamp: 1, direction, data: &data, original_len, comment };
                let mut out = Vec::new();
                packet(&mut out, &record);
                assert_eq!(record.block_len(), out.len());
                assert_eq!(out.len() % 4, 0);
                let original = u32::from_le_bytes(out[24..28].try_into().unwrap());
                assert_eq!(original as usize, len, "never below what was captured");
            }
        }
    }
}
