//! Opens the two ends of a bridge: connect, TLS, the policy's answer, framing.

use std::sync::Arc;

use sapper_proto::framing::Framing;
use sapper_proto::framing::superframe::Hello;
use sapper_proto::packet::Offloads;
use tokio::time::{Instant, timeout_at};

use super::control::Reply;
use super::{BridgeDirection, BridgeOptions, Deadlines, FramingOptions, PolicyOptions, SideTls};
use crate::endpoint::{EndpointSpec, OpenOptions, Opened};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::mailbox::Subject;
use crate::port::framed::{FramedOptions, FramedPort, superframe_hello};
use crate::port::{BoxPort, PacketKind, PortAbilities};
use crate::pump::{Ends, Sink};
use crate::stream::Stream;
use crate::tls::stream::TlsStream;
use crate::tls::{HandshakeInfo, MAX_RECORD};

/// Alert of a peer that was verified and is not wanted (RFC 8446, section 6.2).
const ACCESS_DENIED: u8 = 49;

/// The largest packet of a superframe: what an IPv4 or IPv6 length can say.
const LARGEST_SUPERFRAME: usize = 65_535;

/// Checked options, before anything was opened.
pub(super) struct Prepared {
    pub(super) transport: Side,
    pub(super) sink: Side,
    pub(super) direction: BridgeDirection,
    pub(super) framing: Option<FramingOptions>,
    pub(super) sink_framing: Option<Framing>,
    pub(super) deadlines: Deadlines,
    pub(super) policy: Option<PolicyOptions>,
    pub(super) tap: Option<crate::port::tap::TapOptions>,
}

/// One end and what was already read from it.
pub(super) struct Side {
    /// `None` once it is open.
    endpoint: Option<EndpointSpec>,
    tls: Option<SideTls>,
    initial_data: Vec<u8>,
    field: &'static str,
}

/// Both ends, open and shaken hands with; what is not TLS payload yet travels in `initial`.
pub(super) struct OpenEnds {
    pub(super) transport: OpenSide,
    /// `None` for a listener, whose one connection is waited for at the start.
    pub(super) sink: Option<OpenSide>,
}

/// One open end.
pub(super) struct OpenSide {
    pub(super) opened: Opened,
    pub(super) info: Option<Arc<HandshakeInfo>>,
    /// Payload that was received already.
    pub(super) initial: Vec<u8>,
}

impl Prepared {
    /// Stands in while the real one is at work in a future.
    pub(super) fn empty() -> Self {
        let side = |field| Side { endpoint: None, tls: None, initial_data: Vec::new(), field };
        Self {
            transport: side("socket"),
            sink: side("sink"),
            direction: BridgeDirection::Duplex,
            framing: None,
            sink_framing: None,
            deadlines: Deadlines::default(),
            policy: None,
            tap: None,
        }
    }

    /// Finds what is wrong without waiting for anybody.
    pub(super) fn check(options: BridgeOptions) -> Result<Self> {
        let BridgeOptions { transport, sink, direction, framing, sink_framing, deadlines, peer_policy, tap } =
            options;
        if transport.endpoint.is_port() {
            return Err(Error::config(
                "socket",
                "a bridge's transport carries bytes: a packet endpoint belongs in `sink`",
            ));
        }
        if framing.is_none() {
            if sink.endpoint.is_port() {
                return Err(Error::config(
                    "framing",
                    "a packet endpoint needs a framing: \"ip\", \"ipv4\", \"ipv6\", \"u16\", \"u32\" or \"superframe\"",
                ));
            }
            if sink_framing.is_some() {
                return Err(Error::config("sink_framing", "has no meaning without `framing`"));
            }
            if tap.is_some() {
                return Err(Error::config("tap", "a tap writes packets: set a `framing`"));
            }
        }
        if let Some(tap) = &tap {
            tap.check()?;
        }
        if let Some(framing) = &framing {
            if !(1..=65_535).contains(&framing.max_packet) {
                return Err(Error::config("max_packet", format!("1 to 65535, not {}", framing.max_packet)));
            }
            if framing.records_per_write == 0 {
                return Err(Error::config("records_per_write", "at least 1"));
            }
        }
        if peer_policy.is_some() && transport.tls.is_none() {
            return Err(Error::config("peer_policy", "needs TLS: without it no peer is known"));
        }
        for (field, duration) in [
            ("connect_timeout", Some(deadlines.connect)),
            ("accept_timeout", deadlines.accept),
            ("handshake_timeout", Some(deadlines.handshake)),
            ("idle_timeout", deadlines.idle),
        ] {
            if duration.is_some_and(|d| d.is_zero()) {
                return Err(Error::config(field, "must be above zero"));
            }
        }
        let side = |side: super::SideOptions, field| Side {
            endpoint: Some(side.endpoint),
            tls: side.tls,
            initial_data: side.initial_data,
            field,
        };
        Ok(Self {
            transport: side(transport, "socket"),
            sink: side(sink, "sink"),
            direction,
            framing,
            sink_framing,
            deadlines,
            policy: peer_policy,
            tap,
        })
    }

    /// Opens both ends, the sink first: a mistake there is found before a peer is bothered.
    pub(super) async fn open(&mut self, events: &Reply) -> Result<OpenEnds> {
        let sink_listens = self.sink.endpoint.as_ref().is_some_and(EndpointSpec::is_listener);
        let max_packet = self.max_packet();
        let sink = if sink_listens { None } else { Some(self.open_sink().await?) };
        let transport =
            open_side(&mut self.transport, max_packet, &self.deadlines, self.policy.map(|p| (p, events)))
                .await?;
        Ok(OpenEnds { transport, sink })
    }

    /// Opens the sink; a listener's one connection is waited for here.
    pub(super) async fn open_sink(&mut self) -> Result<OpenSide> {
        let max_packet = self.max_packet();
        open_side(&mut self.sink, max_packet, &self.deadlines, None).await
    }

    fn max_packet(&self) -> usize {
        self.framing.as_ref().map_or(MAX_RECORD, |framing| framing.max_packet)
    }
}

async fn open_side(
    side: &mut Side,
    max_packet: usize,
    deadlines: &Deadlines,
    policy: Option<(PolicyOptions, &Reply)>,
) -> Result<OpenSide> {
    let spec = side.endpoint.take().ok_or_else(|| Error::new(ErrorKind::ApiMisuse, "opened twice"))?;
    let options = OpenOptions { connect: deadlines.connect, accept: deadlines.accept, max_packet };
    let opened =
        spec.open(&options).await.map_err(|error| error.with_field(side.field).with_phase(Phase::Connect))?;
    let initial = std::mem::take(&mut side.initial_data);
    let Some(tls) = &side.tls else {
        return Ok(OpenSide { opened, info: None, initial });
    };
    let stream = match opened {
        Opened::Stream(stream) => stream,
        Opened::Port(_) => return Err(Error::config(side.field, "TLS runs over a stream, not over packets")),
    };
    let until = Instant::now() + deadlines.handshake;
    let shake = TlsStream::handshake(stream, &tls.config, &tls.role, &initial);
    let (mut stream, info) = timeout_at(until, shake).await.unwrap_or_else(|_| {
        let text =
            format!("the TLS handshake was not done within {:.1} s", deadlines.handshake.as_secs_f64());
        Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake))
    })?;
    if let Some((policy, events)) = policy {
        let subject = Subject::Peer {
            certificates: info.peer_certificates.clone(),
            psk_identity: info.psk_identity.clone(),
            address: stream.peer_address().map(|address| address.to_string()),
        };
        let left = until.saturating_duration_since(Instant::now()).min(policy.deadline);
        if !events.mailbox.ask(events.key, subject, left).await {
            stream.abort(ACCESS_DENIED).await;
            return Err(Error::new(ErrorKind::PolicyDenied, "the peer policy did not allow this peer")
                .with_alert(ACCESS_DENIED)
                .with_phase(Phase::Handshake));
        }
    }
    Ok(OpenSide { opened: Opened::Stream(Box::new(stream)), info: Some(Arc::new(info)), initial: Vec::new() })
}

/// Framing over both ends: the ends of a pump, and what each flow begins with.
pub(super) async fn join(
    transport: OpenSide,
    sink: OpenSide,
    framing: Option<&FramingOptions>,
    sink_framing: Option<Framing>,
    deadlines: &Deadlines,
) -> Result<(Ends, Vec<u8>, Vec<u8>)> {
    let Opened::Stream(network) = transport.opened else {
        return Err(Error::config("socket", "a bridge's transport carries bytes"));
    };
    let Some(framing) = framing else {
        let Opened::Stream(cleartext) = sink.opened else {
            return Err(Error::config("framing", "a packet endpoint needs a framing"));
        };
        return Ok((Ends::Streams(network, cleartext), sink.initial, transport.initial));
    };
    let sink = sink_port(sink, framing, sink_framing)?;
    let options = FramedOptions {
        framing: framing.framing,
        max_packet: framing.max_packet,
        records_per_write: framing.records_per_write,
        resync: framing.resync,
        kind: sink.abilities().kind,
        agreement: None,
    };
    let (mut network, mut received) = (network, transport.initial);
    let options = match framing.framing {
        Framing::Superframe => {
            let ours = hello_for(&sink.abilities(), framing.max_packet);
            let agreement = superframe_hello(&mut network, ours, &mut received, deadlines.handshake).await?;
            FramedOptions { agreement: Some(agreement), ..options }
        }
        _ => options,
    };
    let network = FramedPort::new(network, options, &received)?;
    Ok((Ends::Ports(Box::new(network), sink), Vec::new(), Vec::new()))
}

/// What we tell the peer in a superframe hello: what our sink takes.
fn hello_for(sink: &PortAbilities, max_packet: usize) -> Hello {
    let accepts =
        Offloads { tso4: sink.tso4, tso6: sink.tso6, uso: sink.uso, checksum: sink.partial_checksum };
    let large = sink.tso4 || sink.tso6 || sink.uso;
    Hello::new(accepts, if large { LARGEST_SUPERFRAME } else { max_packet })
}

/// The sink as a packet port: as it is, or a stream with packets in it.
fn sink_port(sink: OpenSide, framing: &FramingOptions, sink_framing: Option<Framing>) -> Result<BoxPort> {
    match sink.opened {
        Opened::Port(port) => {
            let with_length = matches!(framing.framing, Framing::U16 | Framing::U32);
            if port.abilities().kind == PacketKind::Ethernet && !with_length {
                return Err(Error::config(
                    "framing",
                    "a TAP carries Ethernet frames, which have no length of their own: use \"u16\" or \"u32\"",
                ));
            }
            Ok(port)
        }
        Opened::Stream(stream) => {
            let inner = sink_framing.unwrap_or(framing.framing);
            if inner == Framing::Superframe {
                return Err(Error::config(
                    "sink_framing",
                    "superframes join two of our own ends: name another framing for the sink's stream",
                ));
            }
            let options = FramedOptions {
                framing: inner,
                max_packet: framing.max_packet,
                records_per_write: framing.records_per_write,
                resync: false,
                kind: PacketKind::Ip,
                agreement: None,
            };
            Ok(Box::new(FramedPort::new(stream, options, &sink.initial)?))
        }
    }
}

/// A new sink for a running bridge.
pub(super) async fn open_replacement(
    spec: EndpointSpec,
    framing: Option<FramingOptions>,
    sink_framing: Option<Framing>,
    deadlines: Deadlines,
) -> Result<Sink> {
    let mut side = Side { endpoint: Some(spec), tls: None, initial_data: Vec::new(), field: "sink" };
    let max_packet = framing.as_ref().map_or(MAX_RECORD, |framing| framing.max_packet);
    let opened = open_side(&mut side, max_packet, &deadlines, None).await?;
    match &framing {
        Some(framing) => Ok(Sink::Port(sink_port(opened, framing, sink_framing)?)),
        None => match opened.opened {
            Opened::Stream(stream) => Ok(Sink::Stream(stream)),
            Opened::Port(_) => {
                Err(Error::config("sink", "this bridge carries bytes: a packet endpoint needs a framing"))
            }
        },
    }
}
