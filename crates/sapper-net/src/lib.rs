//! Data plane of Sapper: endpoints, pumps, TLS engines.
//!
//! Everything is a pump between two endpoints, and there are two kinds of endpoint:
//! [`stream::Stream`] (ordered bytes) and [`port::PacketPort`] (whole packets). A framing turns a
//! stream into a packet port; TLS is a stream over a stream. tokio lives here, Python does not.

#[cfg(test)]
#[path = "../tests/common/becomes.rs"]
mod becomes;
pub mod bridge;
pub mod buffer;
pub mod endpoint;
pub mod error;
pub mod fd;
mod handshakes;
pub mod load;
pub mod log;
pub mod mailbox;
pub mod port;
pub mod proxy;
pub mod pump;
pub mod runtime;
pub mod stats;
pub mod stream;
pub mod switch;
pub mod sys;
pub mod tls;
pub mod tunnel;
pub mod upgrade;

pub use error::{Error, ErrorKind, Result};
