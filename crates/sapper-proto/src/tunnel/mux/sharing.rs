//! Whether several streams say something at the same time.

use std::time::Duration;

use super::table::StreamKey;

/// Who said something so long ago may say more: a person at a shell, a program that asks and waits.
const MEMORY: Duration = Duration::from_millis(250);

/// Who said something last, and until when others are expected.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    last: Option<StreamKey>,
    until: Duration,
}

impl Sharing {
    /// A stream said something.
    pub(super) fn heard(&mut self, key: StreamKey, now: Duration) {
        if self.last != Some(key) {
            if self.last.is_some() {
                self.until = now + MEMORY;
            }
            self.last = Some(key);
        }
    }

    /// Whether what one stream has on its way is in front of others.
    pub(super) fn is_on(&self, now: Duration) -> bool {
        now < self.until
    }
}
