//! Descriptors, threads and tasks after the bridges are gone. A binary of its own: the counts are the
//! process's.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use common::*;

#[test]
fn nothing_is_left_behind() {
    // Warm-up: threads and pools exist once.
    round_trip();
    let before = Leaks::at_rest();
    for _ in 0..20 {
        round_trip();
    }
    before.assert_no_more();
}

fn round_trip() {
    let (near, far) = raw_pair(&psk());
    near.start_both(&far);
    near.cleartext().write_all(b"x").unwrap();
    far.cleartext().read_exact(&mut [0]).unwrap();
    near.bridge().stop(Duration::from_secs(1));
    near.wait_closed();
    // The near end is gone, but its half-close leaves the far end's own direction open.
    far.cleartext().shutdown(Shutdown::Write).unwrap();
    far.wait_closed();
}
