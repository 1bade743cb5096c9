//! The bridge: a pump between two endpoints, each of them under TLS where asked, with a life of its
//! own (connect, handshake, transfer, close) and a handle that any thread may hold.
//!
//! [`Bridge::new`] checks everything that can be checked without waiting. The work is done by one
//! task on one I/O thread ([`task`]); the handle sends it commands and hears of it through a
//! [`Mailbox`](crate::mailbox::Mailbox). Dropping the last handle stops the bridge at once.

mod check;
mod control;
mod facts;
mod goodbye;
mod hello;
mod open;
mod resting;
mod running;
mod state;
mod task;
mod unused;

use std::sync::Arc;
use std::time::Duration;

use sapper_proto::cdtunnel;
use sapper_proto::framing::Framing;
use sapper_proto::upgrade::Upgrade;

pub use control::{Bridge, ControlMailbox, Event, Reply, Value};
pub use state::{BridgeState, BridgeStats, FlowSnapshot, SideSnapshot, StatsSnapshot};

use crate::endpoint::EndpointSpec;
use crate::port::tap::TapOptions;
use crate::tls::config::TlsConfig;
use crate::tls::early_data::EarlyData;
use crate::tls::{HandshakeInfo, MAX_RECORD, Role};

/// Everything that a bridge is made from.
pub struct BridgeOptions {
    /// The network's end: where ciphertext flows when TLS is on.
    pub transport: SideOptions,
    /// The other end: where cleartext comes out.
    pub sink: SideOptions,
    /// Which way application data may flow.
    pub direction: BridgeDirection,
    /// How packets lie in the transport's stream; `None` is raw bytes and needs a stream as sink. Where
    /// the transport carries packets already, how they lie in the sink's stream.
    pub framing: Option<Framing>,
    /// How packets lie in the sink, where it is a stream; as in `framing` where this is `None`.
    pub sink_framing: Option<Framing>,
    /// Limits of packets.
    pub packets: PacketOptions,
    /// Limits of waiting.
    pub deadlines: Deadlines,
    /// Whether somebody is asked about the peer before any application data flows.
    pub peer_policy: Option<PolicyOptions>,
    /// What the transport's protocol says in clear before its TLS.
    pub upgrade: Option<Upgrade>,
    /// Where inner packets are copied to from the start.
    pub tap: Option<TapOptions>,
}

/// One end of a bridge.
pub struct SideOptions {
    /// What is opened, or already open.
    pub endpoint: EndpointSpec,
    /// TLS over it.
    pub tls: Option<SideTls>,
    /// Bytes that the caller had already read from it: ciphertext when TLS is on.
    pub initial_data: Vec<u8>,
    /// The option that it came in, which an error blames.
    pub field: &'static str,
}

/// TLS on one end.
pub struct SideTls {
    /// Shared configuration.
    pub config: Arc<TlsConfig>,
    /// Which end of the handshake we are.
    pub role: Role,
    /// What a client has to say before the handshake.
    pub early: Option<EarlyData>,
}

/// Which way application data may flow, seen from the transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BridgeDirection {
    /// Both ways.
    #[default]
    Duplex,
    /// Sink to transport. Data from the peer is an error; alerts, tickets and key updates are not.
    EncryptOnly,
    /// Transport to sink. Nothing is read from the sink.
    DecryptOnly,
}

/// Limits of packets, where a bridge carries them.
#[derive(Clone, Copy, Debug)]
pub struct PacketOptions {
    /// Largest packet in bytes, either way. Apart from any MTU: some peers drop more than this.
    pub max_packet: usize,
    /// How many records share one write to the carrier.
    pub records_per_write: usize,
    /// Look for the next packet at a record boundary after a bad header, rather than end.
    pub resync: bool,
}

impl Default for PacketOptions {
    fn default() -> Self {
        Self { max_packet: MAX_RECORD, records_per_write: 64, resync: false }
    }
}

/// What is said of one sink that takes the place of another; what is not is as the bridge was made with.
#[derive(Clone, Copy, Debug, Default)]
pub struct SwapOptions {
    /// How packets lie in it, where it is a stream.
    pub sink_framing: Option<Framing>,
    /// Waiting for the one connection of a listener.
    pub accept: Option<Duration>,
}

/// Limits of waiting. None of them is a promise to be fast: a peer that answers is never cut off.
#[derive(Clone, Debug)]
pub struct Deadlines {
    /// Making a connection, all attempts together.
    pub connect: Duration,
    /// Waiting for the one connection of a listener; `None` waits for as long as the bridge lives.
    pub accept: Option<Duration>,
    /// TLS handshake, policy answer and framing hello together.
    pub handshake: Duration,
    /// How much of `handshake` had gone by when the bridge was asked for it: something else came first.
    pub spent: Duration,
    /// No byte in either direction.
    pub idle: Option<Duration>,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            accept: None,
            handshake: Duration::from_secs(30),
            spent: Duration::ZERO,
            idle: None,
        }
    }
}

/// A question before data flows.
#[derive(Clone, Copy, Debug)]
pub struct PolicyOptions {
    /// No answer within this is a no.
    pub deadline: Duration,
}

/// What [`Bridge::handshake`] gives for each end that speaks TLS.
#[derive(Clone, Debug, Default)]
pub struct Handshakes {
    /// The transport's.
    pub transport: Option<Arc<HandshakeInfo>>,
    /// The sink's.
    pub sink: Option<Arc<HandshakeInfo>>,
}

/// Which side of the CDTunnel hello we are.
pub enum CdTunnelRole {
    /// We ask for an MTU.
    Client {
        /// The MTU we ask for.
        mtu: u16,
    },
    /// We grant these.
    Server(cdtunnel::Response),
}
