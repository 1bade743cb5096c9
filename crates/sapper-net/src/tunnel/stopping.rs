//! The end of a server or a client: that it was told to end, and when the drain of its streams is over.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// In place of a drain whose end no clock can say.
const FOR_EVER: Duration = Duration::from_secs(30 * 365 * 86_400);

/// When the drain is over; nothing until somebody asks for the end.
pub(super) struct Stopping(watch::Sender<Option<Instant>>);

impl Default for Stopping {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Stopping {
    /// Open streams have `drain` to end. Asked for again, the end can only be sooner: also for those that drain already.
    pub(super) fn ask(&self, drain: Duration) {
        let now = Instant::now();
        let over = now.checked_add(drain).unwrap_or(now + FOR_EVER);
        self.0.send_modify(|until| *until = Some(until.map_or(over, |before| before.min(over))));
    }

    pub(super) fn is_asked(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// What is left of the drain.
    pub(super) fn left(&self) -> Duration {
        self.0.borrow().map_or(Duration::ZERO, |over| over.saturating_duration_since(Instant::now()))
    }

    /// Until somebody asks for the end.
    pub(super) async fn asked(&self) {
        // Its sender is in here.
        let _ = self.0.subscribe().wait_for(Option::is_some).await;
    }

    /// Does what there is to do in the drain, until that is over.
    pub(super) async fn drain(&self, work: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = work => {}
            () = self.over() => {}
        }
    }

    async fn over(&self) {
        let mut heard = self.0.subscribe();
        loop {
            let Some(over) = *heard.borrow_and_update() else { return };
            tokio::select! {
                biased;
                () = sleep_until(over) => return,
                // A shorter time was asked for perhaps.
                _ = heard.changed() => {}
            }
        }
    }
}
