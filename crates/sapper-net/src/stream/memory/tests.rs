//! The memory pair through the suite.

use super::*;
use crate::buffer::BLOCK;
use crate::stream::BoxStream;
use crate::stream::conformance::{Abilities, check};

#[tokio::test]
async fn conformance() {
    let abilities = Abilities { reset_seen: true, stop_seen: true, codes: true };
    for capacity in [1000, BLOCK] {
        check(abilities, || async move {
            let (one, other) = pair(capacity);
            (Box::new(one) as BoxStream, Box::new(other) as BoxStream)
        })
        .await;
    }
}
