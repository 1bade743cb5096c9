//! What is left of a tunnel at its end: streams that have a drain to end, and what came and was not taken yet.

use std::future::poll_fn;
use std::task::Poll;

use super::link::{Exit, Link};

/// Sessions of which something is still delivered, at most: a server that comes and goes would otherwise have us hold any
/// number, each for a minute. Beyond it the oldest is cut.
const MOST_RESTS: usize = 8;
/// Works until nothing is open any more. Where the carrier is gone before, until all that came is delivered.
pub(super) async fn drained(link: &mut Link) {
    loop {
        match link.run().await {
            Exit::Hello(_) | Exit::Resumed => {}
            Exit::CarrierLost(..) | Exit::Expired => link.part(),
            Exit::Broken(_) | Exit::Idle => return,
        }
    }
}

/// What is left of sessions that ended in order: what came from the server before, and its services have not taken yet.
#[derive(Default)]
pub(super) struct Rests {
    links: Vec<Link>,
}

impl Rests {
    pub(super) fn add(&mut self, link: Option<Link>) {
        let Some(mut link) = link else { return };
        link.part();
        if link.is_empty() {
            return;
        }
        if self.links.len() == MOST_RESTS {
            self.links.remove(0);
        }
        self.links.push(link);
    }

    /// Until all of it is delivered, or cannot be.
    pub(super) async fn delivered(&mut self) {
        poll_fn(|cx| {
            self.links.retain_mut(|link| link.poll(cx).is_pending());
            if self.links.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await
    }

    pub(super) async fn delivered_and_on(&mut self) {
        self.delivered().await;
        std::future::pending().await
    }
}
