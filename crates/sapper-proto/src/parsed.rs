//! What the beginning of a byte stream is, as far as it is there.
//!
//! The answer of every parser of this crate whose message arrives once, at the front of a stream.

/// A message, or how much more of it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<T> {
    /// The message is not there whole.
    NeedMore {
        /// Bytes from the message's first one that are needed to get further.
        at_least: usize,
    },
    /// A message.
    Done {
        /// Bytes that it took: what lies behind them is not its.
        consumed: usize,
        /// What it says.
        value: T,
    },
}
