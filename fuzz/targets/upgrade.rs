//! What peers say before TLS: no role of any upgrade panics, grows without bound, or begins TLS with
//! bytes in clear behind it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sapper_proto::upgrade::{LONGEST, Negotiation, Role, Upgrade, Wants, Wires};

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let (_, upgrade) = Upgrade::NAMES[usize::from(choice >> 1) % Upgrade::NAMES.len()];
    let role = if choice & 1 == 0 { Role::Client } else { Role::Server };
    let mut negotiation = Negotiation::new(upgrade, role);
    let mut wires = Wires::default();
    // A piece is a length, whose highest bit says from which wire, and as many bytes.
    let mut rest = bytes;
    while let Some((&head, tail)) = rest.split_first() {
        let (piece, tail) = tail.split_at(usize::from(head & 0x7f).min(tail.len()));
        rest = tail;
        let from = if head & 0x80 == 0 { &mut wires.from_network } else { &mut wires.from_inner };
        from.extend_from_slice(piece);
        match negotiation.step(&mut wires) {
            Ok(Wants::Tls) => {
                let direct = upgrade == Upgrade::PostgresDirect;
                assert!(direct || wires.from_network.first().is_none_or(|first| *first == 22));
                wires.from_network.clear();
            }
            Ok(Wants::Done) => return,
            Ok(_) => assert!(wires.from_network.len() <= LONGEST && wires.from_inner.len() <= LONGEST),
            Err(error) => {
                assert!(error.to_string().len() < 400);
                return;
            }
        }
        wires.to_network.clear();
        wires.to_inner.clear();
    }
});
