//! The tunnel: a server with public ports, a client with a local service, one carrier between them.
//!
//! - [`server`]: takes clients, gives each a public port, keeps their sessions and leases.
//! - [`client`]: connects, shakes hands, connects again.
//! - `link`: one tunnel at work, the same at both ends.
//! - [`notice`]: what is told; [`service`]: what a client exposes.
//!
//! The wire and every state machine are `sapper_proto::tunnel`'s; docs/tunnel.md has the behaviour.

pub mod client;
mod greeting;
mod link;
pub mod notice;
mod payload;
mod public;
pub mod server;
pub mod service;
mod wake;

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sapper_proto::tunnel::mux::{Config, Overflow};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a carrier that wait in the system until TCP can send them. The state machine decides whose turn it is;
/// what it has given away waits in order, and megabytes of it would hold up whoever has one byte to say.
const MOST_UNSENT: u32 = 128 * 1024;

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

/// What a tunnel does, written down by its task after each of its turns. A lock rather than a number each: a
/// reader sees one moment.
#[derive(Debug, Default)]
pub struct Live(Mutex<TunnelStats>);

/// What a tunnel did and holds, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelStats {
    /// Open streams.
    pub streams: u64,
    /// Streams since the beginning.
    pub opened: u64,
    /// Payload towards the other end of the tunnel.
    pub sent: u64,
    /// Payload from it.
    pub received: u64,
    /// Bytes in memory: unread by sockets, or waiting to be sent or acknowledged.
    pub held: u64,
    /// The smoothed round trip, where it is known.
    pub rtt: Option<Duration>,
    /// Carriers after the first.
    pub resumes: u64,
}

impl Live {
    fn note(&self, mux: &sapper_proto::tunnel::mux::Mux<payload::Payload>) {
        let (gauges, stats) = (mux.gauges(), mux.stats());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = TunnelStats {
            streams: gauges.streams as u64,
            opened: stats.opened + stats.accepted,
            sent: stats.payload.0,
            received: stats.payload.1,
            held: (gauges.held + gauges.unread) as u64,
            rtt: gauges.rtt,
            resumes: stats.resumes,
        };
    }

    /// Now.
    pub fn stats(&self) -> TunnelStats {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An IPv4 address that came in at an IPv6 socket is one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
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
fn budget() -> &'static std::sync::Arc<sapper_proto::tunnel::mux::Budget> {
    static BUDGET: std::sync::OnceLock<std::sync::Arc<sapper_proto::tunnel::mux::Budget>> =
        std::sync::OnceLock::new();
    BUDGET.get_or_init(|| std::sync::Arc::new(sapper_proto::tunnel::mux::Budget::new(MEMORY)))
}
