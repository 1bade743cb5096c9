//! The Internet checksum (RFC 1071): sums, pseudo-headers, verifying, completing a partial one.
//!
//! Sums here are folded to 16 bits, as big-endian numbers, and *not* complemented: they are added
//! with [`add`], and complemented once when stored. What lies in which header is [`ip`](super::ip)'s.

use super::ip::{self, Fragment, IPV4_HEADER, IPV6_HEADER, IpHeader, Version, protocol};
use super::{Checksum, PacketMut};

/// Where the checksum lies in a TCP header.
pub const TCP_OFFSET: usize = 16;
/// Where the checksum lies in a UDP header.
pub const UDP_OFFSET: usize = 6;

/// Ones-complement sum of `bytes` as big-endian 16-bit words; an odd last byte counts as the high one.
pub fn sum(bytes: &[u8]) -> u16 {
    let (blocks, rest) = bytes.as_chunks::<32>();
    // Four accumulators with their carries beside them: no chain of additions with carry, and the
    // compiler makes vector code of it without any feature of a newer processor.
    let mut sums = [0u64; 4];
    let mut carries = [0u64; 4];
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for lane in 0..4 {
            let (sum, carry) = sums[lane].overflowing_add(u64::from_ne_bytes(words[lane]));
            sums[lane] = sum;
            carries[lane] += u64::from(carry);
        }
    }
    let mut total = 0u128;
    for lane in 0..4 {
        total += u128::from(sums[lane]) + u128::from(carries[lane]);
    }
    let (words, rest) = rest.as_chunks::<8>();
    for word in words {
        total += u128::from(u64::from_ne_bytes(*word));
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        total += u128::from(u64::from_ne_bytes(last));
    }
    fold(total)
}

/// Folds a sum of native-endian words. Folding and swapping bytes commute (RFC 1071, section 2.B).
fn fold(total: u128) -> u16 {
    let total = (total & u128::from(u64::MAX)) + (total >> 64);
    let total = (total as u64) as u128 + (total >> 64);
    let total = total as u64;
    let total = (total & 0xffff_ffff) + (total >> 32);
    let total = (total & 0xffff) + (total >> 16 & 0xffff) + (total >> 32);
    let total = (total & 0xffff) + (total >> 16);
    let total = (total & 0xffff) + (total >> 16);
    u16::from_be(total as u16)
}

/// Copies `from` to `to` (of the same length) and sums it, while it is still in the nearest cache.
pub fn copy_and_sum(to: &mut [u8], from: &[u8]) -> u16 {
    to.copy_from_slice(from);
    sum(to)
}

/// Adds two sums.
pub fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u16::from(carry)
}

/// Takes `b` out of the sum `a`.
pub fn subtract(a: u16, b: u16) -> u16 {
    add(a, !b)
}

/// The sum of two parts that lie one behind the other: behind an odd number of bytes, the second
/// part's bytes change places.
pub fn join(first: u16, first_len: usize, second: u16) -> u16 {
    add(first, if first_len % 2 == 1 { second.swap_bytes() } else { second })
}

/// The pseudo-header's sum for a transport header and payload of `len` bytes: addresses, protocol
/// and length. `packet` begins with its fixed IP header.
///
/// `None` where that header is not there. A routing header's final address is not looked up.
pub fn pseudo_header(packet: &[u8], protocol: u8, len: usize) -> Option<u16> {
    let addresses = match ip::version(packet)? {
        Version::V4 => packet.get(12..IPV4_HEADER)?,
        Version::V6 => packet.get(8..IPV6_HEADER)?,
    };
    let length = add((len >> 16) as u16, len as u16);
    Some(add(add(sum(addresses), u16::from(protocol)), length))
}

/// The checksum of an IPv4 header as it is to be stored (the field's present content does not count).
/// `header` is the header with its options and nothing behind it.
pub fn ipv4_header(header: &[u8]) -> u16 {
    let present = header.get(10..12).map_or(0, |field| u16::from_be_bytes([field[0], field[1]]));
    !subtract(sum(header), present)
}

/// What verifying a packet's transport checksum gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is right.
    Right,
    /// It is wrong.
    Wrong,
    /// There is none to verify: not TCP or UDP, a fragment, a UDP datagram without a checksum, or a
    /// routed packet whose final address is elsewhere.
    Nothing,
}

/// Verifies the TCP or UDP checksum of a packet (not the IPv4 header's).
pub fn verify(packet: &[u8]) -> Verdict {
    let Ok(header) = IpHeader::parse_exact(packet) else { return Verdict::Nothing };
    let at = header.header_len;
    let field = match header.protocol {
        protocol::TCP => at + TCP_OFFSET,
        protocol::UDP => at + UDP_OFFSET,
        _ => return Verdict::Nothing,
    };
    // Behind an extension header the pseudo-header may be another one (routing).
    let plain = header.version == Version::V4 || at == IPV6_HEADER;
    if header.fragment != Fragment::Whole || !plain {
        return Verdict::Nothing;
    }
    match packet.get(field..field + 2) {
        None => return Verdict::Wrong,
        Some([0, 0]) if header.protocol == protocol::UDP => return Verdict::Nothing,
        Some(_) => {}
    }
    if is_right(packet, at, header.protocol) { Verdict::Right } else { Verdict::Wrong }
}

/// Whether transport header and payload from `start` to the packet's end sum up with their
/// pseudo-header. For callers that have read the headers already.
pub(super) fn is_right(packet: &[u8], start: usize, protocol: u8) -> bool {
    let transport = &packet[start..];
    pseudo_header(packet, protocol, transport.len())
        .is_some_and(|pseudo| add(pseudo, sum(transport)) == 0xffff)
}

/// Completes a partial checksum: sums from `start` and stores the result at `start + offset`.
/// Returns `false`, with nothing changed, where the field is not inside the packet.
pub fn complete(packet: &mut [u8], start: usize, offset: usize) -> bool {
    let Some(field) = start.checked_add(offset).filter(|at| at + 2 <= packet.len()) else {
        return false;
    };
    let checksum = stored(sum(&packet[start..]));
    packet[field..field + 2].copy_from_slice(&checksum);
    true
}

/// A sum as it is stored: complemented, and never 0, which means "none" to UDP and is the same
/// number to everybody else.
pub(super) fn stored(sum: u16) -> [u8; 2] {
    match !sum {
        0 => [0xff, 0xff],
        checksum => checksum.to_be_bytes(),
    }
}

/// Completes a packet's partial checksum in place, if it has one. A super-packet has none to
/// complete before it is cut: it is left alone. Returns `false` where the field lies outside.
pub fn finish(packet: &mut PacketMut<'_>) -> bool {
    let Checksum::Partial { start, offset } = packet.meta.checksum else { return true };
    if packet.meta.gso != super::Gso::None {
        return true;
    }
    let done = complete(packet.data, usize::from(start), usize::from(offset));
    if done {
        packet.meta.checksum = Checksum::Valid;
    }
    done
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Build, hex, naive_sum, naive_verify, payload};
    use super::super::{Gso, PacketBatch, PacketMeta};
    use super::*;

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(sum(&hex("0001 f203 f4f5 f6f7")), 0xddf2);
    }

    #[test]
    fn the_worst_sums_do_not_overflow() {
        for len in [0, 1, 7, 8, 31, 32, 33, 65_535, 65_536] {
            let bytes = vec![0xff; len];
            assert_eq!(sum(&bytes), naive_sum(&bytes), "{len}");
        }
    }

    #[test]
    fn packets_verify_and_a_changed_bit_does_not() {
        for build in Build::all() {
            let mut packet = build.packet(&payload(333, 9));
            assert!(naive_verify(&packet));
            assert_eq!(verify(&packet), Verdict::Right);
            let last = packet.len() - 1;
            packet[last] ^= 1;
            assert_eq!(verify(&packet), Verdict::Wrong);
            packet[last] ^= 1;
            if !build.tcp {
                let field = build.ip_header_len() + UDP_OFFSET;
                packet[field..field + 2].fill(0);
                assert_eq!(verify(&packet), Verdict::Nothing);
            }
            packet.truncate(build.ip_header_len() + 3);
            assert_eq!(verify(&packet), Verdict::Nothing, "not as long as it states");
        }
    }

    #[test]
    fn partial_checksums_are_completed() {
        for build in Build::all() {
            let data = payload(101, 4);
            let mut batch = PacketBatch::new(1024, 2);
            let (start, offset) = (build.ip_header_len() as u16, if build.tcp { 16 } else { 6 });
            let meta = PacketMeta { checksum: Checksum::Partial { start, offset }, ..PacketMeta::default() };
            assert!(batch.push(&build.partial(&data), meta));
            assert!(finish(&mut batch.get_mut(0).unwrap()));
            let done = batch.get(0).unwrap();
            assert_eq!(done.data, build.packet(&data));
            assert_eq!(done.meta.checksum, Checksum::Valid);
        }
        let mut packet = [0; 4];
        assert!(!complete(&mut packet, 3, 0));
        assert!(!complete(&mut packet, usize::MAX, 1));
        assert!(complete(&mut packet, 0, 2));
        assert_eq!(packet, [0, 0, 0xff, 0xff], "zero is stored as all ones");
    }

    #[test]
    fn a_large_packet_is_left_to_be_cut_first() {
        let mut batch = PacketBatch::new(64, 1);
        let checksum = Checksum::Partial { start: 0, offset: 0 };
        batch.push(&[1; 8], PacketMeta { gso: Gso::TcpV4, checksum, ..PacketMeta::default() });
        assert!(finish(&mut batch.get_mut(0).unwrap()));
        assert_eq!(batch.get(0).unwrap().data, [1; 8]);
        assert_eq!(batch.get(0).unwrap().meta.checksum, checksum);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_the_naive_one(
            bytes in prop::collection::vec(any::<u8>(), 0..3000),
            cut in any::<prop::sample::Index>(),
        ) {
            let whole = sum(&bytes);
            prop_assert_eq!(whole, naive_sum(&bytes));
            let cut = cut.index(bytes.len() + 1);
            let (first, second) = bytes.split_at(cut);
            prop_assert_eq!(join(sum(first), cut, sum(second)), whole);
            if cut % 2 == 0 && sum(second) != 0xffff {
                // 0 and 0xffff are the same number.
                prop_assert_eq!(subtract(whole, sum(second)) % 0xffff, sum(first) % 0xffff);
            }
            let mut copy = vec![0; bytes.len()];
            prop_assert_eq!(copy_and_sum(&mut copy, &bytes), whole);
            prop_assert_eq!(copy, bytes);
        }
    }
}
