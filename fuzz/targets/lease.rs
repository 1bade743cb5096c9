//! The file of leases: what was read is written as something that says the same, what is wrong changes nothing,
//! and whatever the file says, no port has two owners, none comes from outside of the range, and a client that has said
//! which it is finds the place that it has.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sapper_proto::tunnel::lease::{Holder, Leases, Lessee, Wanted};

const FIRST: u16 = 40_000;
const LAST: u16 = 40_003;
const NOW: u64 = 1_000_000;

fn table() -> Leases {
    Leases::new(FIRST, LAST, 2, Duration::from_secs(100))
}

fuzz_target!(|text: &str| {
    let mut leases = table();
    if let Err(error) = leases.from_json(text) {
        assert!(error.len() < 1_000 && leases.is_empty());
        return;
    }
    let written = leases.to_json();
    let mut again = table();
    again.from_json(&written).expect("what was written can be read");
    assert_eq!((again.len(), again.to_json()), (leases.len(), written));
    leases.expect(NOW + 1);
    let entropy = text.len() as u64;
    let mut given = Vec::new();
    for who in 0..6 {
        let all = [
            Wanted::Any,
            Wanted::Exactly(FIRST + 1),
            Wanted::Rather(LAST),
            Wanted::Within(FIRST + 1, LAST),
        ];
        let wanted = all[usize::from(who) % 4];
        let kept = leases.kept([who; 32], NOW);
        assert!(kept.iter().all(|service| leases.port([who; 32], *service).is_some()));
        let lessee = Lessee { token: [who; 32], client: [who; 32], credentials: [who; 32] };
        if let Ok(port) = leases.take(lessee, 0, wanted, NOW, entropy) {
            assert_eq!(leases.owner(port), Some([who; 32]));
            assert!((FIRST..=LAST).contains(&port) && !given.contains(&port));
            given.push(port);
            let holder = Holder { instance: Some([who; 32]), origin: Some([who / 2; 32]) };
            leases.held(port, holder);
            assert!(leases.own([who; 32], holder).contains(&0));
        }
    }
});
