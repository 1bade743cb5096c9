//! The tunnel: a server with public ports, a client with a local service, one carrier between them.
//!
//! - [`server`]: takes clients, gives each a public port, keeps their sessions and leases.
//! - [`client`]: connects, shakes hands, connects again.
//! - `link`: one tunnel at work, the same at both ends; `rest`: what is left of it at its end, `stopping`: when that is.
//! - [`limit`]: how much may pass, how often; [`served`]: what a service did.
//! - [`notice`]: what is told; `live`: what can be asked for; [`service`]: what a client exposes.
//!
//! The wire and every state machine are `sapper_proto::tunnel`'s; docs/tunnel.md has the behaviour.

pub mod client;
mod greeting;
pub mod limit;
mod link;
mod live;
pub mod notice;
mod payload;
mod public;
mod rest;
pub mod served;
pub mod server;
pub mod service;
mod stopping;
mod wake;

use std::sync::Arc;
use std::time::Duration;

use sapper_proto::tunnel::mux::{Config, Overflow};

pub use live::{TunnelStats, VisitorStats};

use crate::error::{Error, ErrorKind, Result};
use crate::stream::fd::{self, SocketOptions};

/// Bytes of a carrier that wait in the system until TCP can send them. The state machine decides whose turn it is;
/// what it has given away waits in order, and megabytes of it would hold up whoever has one byte to say.
const MOST_UNSENT: u32 = 64 * 1024;

/// Sockets of streams, towards visitors and services. Nobody at such a socket takes a part for the whole, whatever
/// ends the stream: a peer's reset, a session that is replaced, the death of either process.
const STREAM: SocketOptions = SocketOptions {
    keepalive: None,
    most_unsent: fd::MOST_UNSENT,
    reset_unless_ended: true,
    short_near: false,
};

/// What the two ends have in common.
#[derive(Clone, Debug)]
pub struct Common {
    /// How long connecting, a TLS handshake and W3PTUNL's handshake may take, each.
    pub handshake_timeout: Duration,
    /// How long streams outlive their carrier.
    pub grace: Duration,
    /// What happens where a stream's end does not take what it is sent: the tunnel waits, or it is reset.
    pub overflow: Overflow,
    /// How long the close of a visitor who ended is held back with an original peer, while nothing comes back.
    pub linger: Duration,
}

impl Common {
    fn mux(&self) -> Config {
        Config { overflow: self.overflow, linger: Some(self.linger), grace: self.grace, ..Config::default() }
    }
}

/// Chance.
fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::new(ErrorKind::ResourceLimit, "the system gives no random numbers"))?;
    Ok(bytes)
}

fn entropy() -> u64 {
    // Where there is no chance, there is no spreading: nothing depends on its quality.
    random().map_or(0, u64::from_ne_bytes)
}

/// Bytes that all tunnels of this process together may hold: beyond, those that hold much wait.
const MEMORY: usize = 512 * 1024 * 1024;

/// The account that all tunnels share.
fn budget() -> &'static Arc<sapper_proto::tunnel::mux::Budget> {
    static BUDGET: std::sync::OnceLock<Arc<sapper_proto::tunnel::mux::Budget>> = std::sync::OnceLock::new();
    BUDGET.get_or_init(|| Arc::new(sapper_proto::tunnel::mux::Budget::new(MEMORY)))
}
