//! Any stream in any framing: the same packets however it arrives, and they can be framed again.
//!
//! Input: a byte for the framing, one for the size of the pieces, then the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::framing::{Deframer, Framing, Step};

const MAX: usize = 2_000;

fuzz_target!(|bytes: &[u8]| {
    let Some((&[which, piece], stream)) = bytes.split_first_chunk() else { return };
    let framing = Framing::NAMES[usize::from(which) % Framing::NAMES.len()].1;
    let deframer = Deframer::new(framing, MAX, true);

    // All at once.
    let (mut packets, mut at) = (Vec::new(), 0);
    let end = loop {
        match deframer.next(&stream[at..]) {
            Ok(Step::Packet { consumed, data, meta }) => {
                let packet = &stream[at..][data];
                assert!(!packet.is_empty() && packet.len() <= MAX);
                let mut prefix = vec![0; framing.prefix_len()];
                framing.write_prefix(&mut prefix, packet, &meta).expect("it was framed once");
                packets.push((at, consumed));
                at += consumed;
            }
            Ok(Step::NeedMore { at_least }) => {
                assert!(at_least > stream.len() - at && at_least <= deframer.longest_unit());
                break None;
            }
            Err(error) => break Some(error),
        }
    };
    if end.is_some() {
        let rest = &stream[at..];
        let marks: Vec<usize> = (0..rest.len() + 40).step_by(usize::from(piece).max(1)).collect();
        if let Some(mark) = deframer.resynchronise(&marks, rest) {
            assert!(mark > 0 && mark < rest.len() && deframer.next(&rest[mark..]).is_ok());
        }
    }

    // In pieces.
    let (mut given, mut at, mut seen, mut failed) = (0, 0, 0, None);
    while given < stream.len() && failed.is_none() {
        given = stream.len().min(given + usize::from(piece).max(1));
        loop {
            match deframer.next(&stream[at..given]) {
                Ok(Step::Packet { consumed, .. }) => {
                    assert_eq!(packets.get(seen), Some(&(at, consumed)));
                    seen += 1;
                    at += consumed;
                }
                Ok(Step::NeedMore { .. }) => break,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
    }
    assert_eq!(seen, packets.len());
    assert_eq!(failed, end);
});
