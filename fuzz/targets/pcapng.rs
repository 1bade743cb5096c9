//! Captures: whatever is written, a reader that knows only the format finds it again.
//!
//! Input: steps of a kind, two bytes for sizes and one for the content.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::pcapng::{self, Direction, LinkType, Record};

/// A packet as it was given.
struct Given {
    interface: u32,
    timestamp: u64,
    direction: u32,
    data: Vec<u8>,
    original_len: usize,
    comment: Option<String>,
}

fuzz_target!(|bytes: &[u8]| {
    let mut file = Vec::new();
    let (mut interfaces, mut packets, mut logs) = (Vec::new(), Vec::new(), Vec::new());
    pcapng::section_header(&mut file, &text(bytes.len(), 7));
    for &[kind, high, low, content] in bytes.as_chunks::<4>().0.iter().take(64) {
        let size = usize::from(high) << 8 | usize::from(low);
        match kind % 8 {
            0 => {
                let link = if content & 1 == 0 { LinkType::Raw } else { LinkType::Ethernet };
                let name = text(size, content);
                pcapng::interface(&mut file, link, size as u32, &name);
                interfaces.push((link as u16, size as u32, name));
            }
            1 => {
                let lines = text(size, content);
                pcapng::tls_key_log(&mut file, &lines);
                logs.push(lines);
            }
            _ => {
                let given = Given {
                    interface: u32::from(kind >> 3),
                    timestamp: (size as u64) << 40 | u64::from(content),
                    direction: 1 + u32::from(kind & 1),
                    data: vec![content; size],
                    original_len: usize::from(content) * 300,
                    comment: (kind & 4 != 0).then(|| text(size / 2, content)),
                };
                let record = Record {
                    interface: given.interface,
                    timestamp: given.timestamp,
                    direction: if given.direction == 1 { Direction::Inbound } else { Direction::Outbound },
                    data: &given.data,
                    original_len: given.original_len,
                    comment: given.comment.as_deref(),
                };
                let before = file.len();
                pcapng::packet(&mut file, &record);
                assert_eq!(file.len() - before, record.block_len());
                packets.push(given);
            }
        }
    }
    let (mut interfaces, mut packets, mut logs) = (interfaces.iter(), packets.iter(), logs.iter());
    let mut first = true;
    for (kind, body) in blocks(&file) {
        assert_eq!(first, kind == 0x0a0d_0d0a, "a section's header stands in front, and once");
        match kind {
            0x0a0d_0d0a => {
                assert_eq!(body[..8], [0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0]);
                assert_eq!(options(&body[16..])[0].0, 4);
            }
            1 => {
                let (link, snap_len, name) = interfaces.next().expect("no interface was described");
                assert_eq!((&body[..2], word(body, 4)), (&link.to_le_bytes()[..], *snap_len));
                let options = options(&body[8..]);
                assert_eq!(options, [(2, name.as_bytes()), (9, &[9][..])]);
            }
            6 => {
                let given = packets.next().expect("no packet was written");
                let timestamp = u64::from(word(body, 4)) << 32 | u64::from(word(body, 8));
                assert_eq!((word(body, 0), timestamp), (given.interface, given.timestamp));
                let (captured, original) = (word(body, 12) as usize, word(body, 16) as usize);
                assert_eq!(original, given.original_len.max(captured));
                assert_eq!(body[20..20 + captured], given.data);
                let mut expected = vec![(2, given.direction.to_le_bytes().to_vec())];
                expected.extend(given.comment.iter().map(|text| (1, text.as_bytes().to_vec())));
                let options = options(&body[20 + captured.next_multiple_of(4)..]);
                assert!(options.into_iter().map(|(code, value)| (code, value.to_vec())).eq(expected));
            }
            10 => {
                let lines = logs.next().expect("no key log was written").as_bytes();
                assert_eq!((word(body, 0), word(body, 4) as usize), (0x544c_534b, lines.len()));
                assert_eq!(&body[8..8 + lines.len()], lines);
            }
            other => panic!("a block of type {other}"),
        }
        first = false;
    }
    assert!(interfaces.next().is_none() && packets.next().is_none() && logs.next().is_none());
});

/// Text of so many bytes at most, with characters of more than one.
fn text(len: usize, seed: u8) -> String {
    let unit = ["a", "ü", "€", "\u{1f600}"][usize::from(seed) % 4];
    unit.repeat(len / unit.len())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Types and bodies; each block says its length twice.
fn blocks(mut file: &[u8]) -> Vec<(u32, &[u8])> {
    let mut found = Vec::new();
    while !file.is_empty() {
        let len = word(file, 4) as usize;
        assert!(len % 4 == 0 && (12..=file.len()).contains(&len));
        assert_eq!(word(file, len - 4) as usize, len);
        found.push((word(file, 0), &file[8..len - 4]));
        file = &file[len..];
    }
    found
}

/// Codes and values up to the end of options, which must be the end.
fn options(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    loop {
        let head = word(bytes, 0);
        let (code, len) = (head as u16, (head >> 16) as usize);
        if code == 0 {
            assert!(len == 0 && bytes.len() == 4, "the end of options is the end");
            return found;
        }
        found.push((code, &bytes[4..4 + len]));
        let (value, padding) = bytes[4..4 + len.next_multiple_of(4)].split_at(len);
        assert!(std::str::from_utf8(value).is_ok() || code == 2 || code == 9);
        assert!(padding.iter().all(|&byte| byte == 0));
        bytes = &bytes[4 + len.next_multiple_of(4)..];
    }
}
