//! The tunnel, as far as it needs no socket: its wire, its state machines, its policy.
//!
//! - [`w3p`]: the handshake of W3PTUNL, as deployed peers speak it, in both roles.
//! - [`frame`]: the frames that follow, theirs and our own.
//! - [`words`]: what two ends of our own kind say above them: services, ports.
//! - [`mux`]: streams over one ordered carrier; a module of its own, for other carriers too.
//! - [`lease`], [`ip_list`], [`limits`], [`backoff`]: which port, who, how much, when again.
//!
//! What is not here: sockets, TLS, the credentials' meaning. docs/tunnel-wire.md has the wire, byte
//! by byte, and why it is so.
//!
//! Time is a [`Duration`](std::time::Duration) since any moment that the caller keeps to.

pub mod backoff;
pub mod frame;
pub mod ip_list;
pub mod lease;
pub mod limits;
pub mod mux;
pub mod w3p;
pub mod words;
