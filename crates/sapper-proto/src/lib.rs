//! Wire formats and protocol state machines of Sapper.
//!
//! Pure: no sockets, no async, no clock, no randomness of its own. Whatever comes from a peer is
//! hostile here; every parser of this crate has a fuzz target.
//!
//! - [`packet`]: batches of packets and what travels with each (GSO state, checksum offsets, ECN,
//!   peer); IP headers, checksums, segmentation (GSO) and coalescing (GRO), the virtio-net header.
//! - [`framing`]: how packets lie in a byte stream.
//! - [`cdtunnel`]: the hello of device tunnels.
//! - [`proxy_protocol`]: who is behind a connection, said in front of it.
//! - [`client_hello`]: what a TLS client asks for, read without touching it.
//! - [`tunnel`]: W3PTUNL, streams over one carrier, and the policy of a tunnel.
//! - [`parsed`]: what parsers of first bytes answer. [`shown`]: which of a stranger's characters are shown.
//! - [`upgrade`]: what protocols say in clear before their TLS begins.
//! - [`pcapng`], [`filter`]: what a tap writes, and which packets it wants.

#![forbid(unsafe_code)]

pub mod cdtunnel;
pub mod client_hello;
pub mod filter;
pub mod framing;
pub mod packet;
pub mod parsed;
pub mod pcapng;
pub mod proxy_protocol;
pub mod shown;
pub mod tunnel;
pub mod upgrade;
