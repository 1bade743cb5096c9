//! Bounds and times of a connection, with the reason for each.

use std::time::Duration;

use super::LONGEST_TURN;
use crate::tunnel::frame::Capabilities;

/// What happens to what a stream, a connection or all of them hold too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// The carrier is read no further until there is room: nothing is lost, everybody waits.
    Pause,
    /// The stream that holds most is reset: the others go on.
    Reset,
}

/// Bounds and times. The defaults suit a tunnel; each is documented with its reason.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is offered to the peer.
    pub capabilities: Capabilities,
    /// Whether the peer may be an original one, which knows neither hello nor credit.
    pub plain: bool,
    /// Credit of a new stream, about what TCP sends at once on a new connection. Nobody can take it back: all
    /// streams together may hold it, and nothing of it is ever taken.
    pub window: u32,
    /// What the window of a stream that takes what it gets doubles to whatever its path is. 256 KB fill one of
    /// 20 Mbit/s and 100 ms.
    pub usual_window: u32,
    /// The most that a window grows to: 16 MB fill 1 Gbit/s and 120 ms.
    pub max_window: u32,
    /// By how much all windows together may have grown. When three quarters of it are used, windows stop at, and
    /// go back to, a quarter of the usual one.
    pub window_budget: usize,
    /// Streams that the peer may have open at a time.
    pub max_streams: u32,
    /// Bytes that one stream sends before it is the next one's turn: 16 to 64 KB.
    pub quantum: u32,
    /// Bytes that wait for the carrier, least and most: four milliseconds of its rate lie in between.
    pub backlog: (usize, usize),
    /// Bytes kept for replay, with 128 for each frame. It bounds what is on its way.
    pub replay: usize,
    /// Bytes that the caller holds for all streams together. Where it is no less than `window_budget` and `window`
    /// for each stream, credit alone keeps to it, and streams whose ends take nothing stop nobody else.
    pub max_unread: usize,
    /// Bytes that the caller holds for one stream of an original peer.
    pub max_unread_plain: usize,
    /// What happens beyond.
    pub overflow: Overflow,
    /// How long the close of a plain stream is held back after our end sent its last, while the peer is
    /// silent: original peers know no half-close, and close throws away what was still to come.
    pub linger: Option<Duration>,
    /// A ping after each such time.
    pub ping_every: Duration,
    /// A peer that says nothing for so long is gone.
    pub dead_after: Duration,
    /// How long streams outlive their carrier.
    pub grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            capabilities: Capabilities::ALL,
            plain: true,
            window: 16 * 1024,
            usual_window: 256 * 1024,
            max_window: 16 * 1024 * 1024,
            window_budget: 64 * 1024 * 1024,
            max_streams: 16_384,
            quantum: LONGEST_TURN,
            backlog: (32 * 1024, 256 * 1024),
            replay: 4 * 1024 * 1024,
            max_unread: 128 * 1024 * 1024,
            max_unread_plain: 1024 * 1024,
            overflow: Overflow::Pause,
            linger: Some(Duration::from_secs(5)),
            ping_every: Duration::from_secs(5),
            dead_after: Duration::from_secs(15),
            grace: Duration::from_secs(60),
        }
    }
}
