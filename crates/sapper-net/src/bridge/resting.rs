//! What ends a bridge that rests between its handshake and its start: silence for too long, and a
//! peer that goes.
//!
//! An alert or a broken connection ends it at once, as it would while payload flows. A peer that only
//! ended its direction may still want to read, so the start has a while to come. What the peer sends
//! before the start waits in the TLS stream, a record of it at most; what lies behind that is seen
//! when it is read.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::open::OpenEnds;
use super::{Deadlines, task};
use crate::error::{Error, ErrorKind, Phase, Result, seconds};

/// Clocks of a rest, and what was noticed in it.
pub(super) struct Resting {
    idle: Option<Duration>,
    /// When nothing moved for too long.
    silent_at: Option<Instant>,
    /// What is left to start payload once a peer has ended.
    patience: Duration,
    /// When a start comes too late for a peer that has ended.
    too_late_at: Option<Instant>,
}

impl Resting {
    /// Begins now.
    pub(super) fn new(deadlines: &Deadlines) -> Self {
        let mut resting =
            Self { idle: deadlines.idle, silent_at: None, patience: deadlines.handshake, too_late_at: None };
        resting.interrupted();
        resting
    }

    /// Bytes have just moved.
    pub(super) fn interrupted(&mut self) {
        self.silent_at = self.idle.map(|idle| Instant::now() + idle);
    }

    /// Waits for what ends it: an error, or `Ok` where a peer has ended orderly and nobody went on. It
    /// may be dropped and called again.
    pub(super) async fn over(&mut self, ends: &mut OpenEnds) -> Result<()> {
        let clock = |at: Option<Instant>| async move {
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        loop {
            tokio::select! {
                biased;
                ended = poll_fn(|cx| poll_peers(cx, ends)), if self.too_late_at.is_none() => {
                    ended?;
                    self.too_late_at = Some(Instant::now() + self.patience);
                }
                () = clock(self.too_late_at) => return Ok(()),
                () = clock(self.silent_at) => {
                    let idle = seconds(self.idle.unwrap_or_default());
                    let text = format!("nothing moved for {idle}, and payload was not started");
                    return Err(Error::new(ErrorKind::IdleDeadline, text).with_phase(Phase::Transfer));
                }
            }
        }
    }
}

/// Ready when the peer of either end is done.
fn poll_peers(cx: &mut Context<'_>, ends: &mut OpenEnds) -> Poll<Result<()>> {
    for side in std::iter::once(&mut ends.transport).chain(&mut ends.sink) {
        // Bytes without TLS are left where they are: until the start they may still be somebody else's.
        if let Some(tls) = task::tls_of(side)
            && let Poll::Ready(ended) = tls.poll_ended(cx)
        {
            return Poll::Ready(ended);
        }
    }
    Poll::Pending
}
