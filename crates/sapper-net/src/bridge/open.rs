//! Opens the two ends of a bridge: connect, TLS, the policy's answer, framing.

use std::sync::Arc;
use std::time::Duration;

use sapper_proto::framing::Framing;
use sapper_proto::framing::superframe::{Agreement, Hello};
use sapper_proto::packet::Offloads;
use sapper_proto::upgrade::Upgrade;
use tokio::time::{Instant, timeout, timeout_at};

use super::control::Reply;
use super::{BridgeDirection, Deadlines, PacketOptions, PolicyOptions, SideOptions, SideTls, task};
use crate::endpoint::{EndpointSpec, OpenOptions, Opened};
use crate::error::{Error, ErrorKind, Phase, Result, seconds};
use crate::mailbox::Subject;
use crate::port::framed::{FramedOptions, FramedPort, superframe_hello};
use crate::port::tap::TapFile;
use crate::port::{BoxPort, PacketKind, PortAbilities};
use crate::pump::{Ends, Sink};
use crate::stream::{BoxStream, Stream};
use crate::tls::HandshakeInfo;
use crate::tls::stream::TlsStream;
use crate::upgrade::{NO_APPLICATION_PROTOCOL, Upgrading};

/// Alert of a peer that was verified and is not wanted (RFC 8446, section 6.2).
const ACCESS_DENIED: u8 = 49;

/// The largest packet of a superframe: what an IPv4 or IPv6 length can say.
const LARGEST_SUPERFRAME: usize = 65_535;

/// Checked options, before anything was opened.
pub(super) struct Prepared {
    pub(super) transport: Side,
    pub(super) sink: Side,
    pub(super) form: Form,
    pub(super) carries_packets: bool,
    pub(super) deadlines: Deadlines,
    pub(super) policy: Option<PolicyOptions>,
    pub(super) upgrade: Option<Upgrade>,
    pub(super) tap: Option<Box<TapFile>>,
}

/// In what form payload moves.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// In the transport's stream; `None` where it is raw, or no stream.
    pub(super) framing: Option<Framing>,
    /// In the sink's stream; as in `framing` where this is `None`.
    pub(super) sink_framing: Option<Framing>,
    pub(super) packets: PacketOptions,
    pub(super) direction: BridgeDirection,
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
    /// What its protocol has still to say under TLS before payload.
    pub(super) upgrading: Option<Box<Upgrading>>,
    /// What is left of the handshake's deadline for a hello behind it.
    patience: Duration,
}

/// What was said and agreed on before payload.
pub(super) struct Greeted {
    sink: Met,
    agreement: Option<Agreement>,
}

/// The sink, as a greeting leaves it.
enum Met {
    Stream(BoxStream, Vec<u8>),
    Port(BoxPort),
}

/// What happens on the way to an open end.
#[derive(Default)]
struct OnTheWay<'a> {
    /// Somebody is asked about the peer.
    policy: Option<(PolicyOptions, &'a Reply)>,
    /// TLS begins by an upgrade; one that is two-sided needs the other end.
    upgrade: Option<(Upgrade, Option<&'a mut OpenSide>)>,
}

impl Prepared {
    /// Stands in while the real one is at work in a future.
    pub(super) fn empty() -> Self {
        let side = |field| Side { endpoint: None, tls: None, initial_data: Vec::new(), field };
        Self {
            transport: side("socket"),
            sink: side("sink"),
            form: Form {
                framing: None,
                sink_framing: None,
                packets: PacketOptions::default(),
                direction: BridgeDirection::Duplex,
            },
            carries_packets: false,
            deadlines: Deadlines::default(),
            policy: None,
            upgrade: None,
            tap: None,
        }
    }

    /// Opens both ends, the sink first: a mistake there is found before a peer is bothered.
    pub(super) async fn open(&mut self, events: &Reply) -> Result<OpenEnds> {
        let sink_listens = self.sink.endpoint.as_ref().is_some_and(EndpointSpec::is_listener);
        let max_packet = self.form.packets.max_packet;
        let is_two_sided = self.upgrade.is_some_and(Upgrade::is_two_sided);
        let waits = sink_listens && !is_two_sided;
        let mut sink = if waits { None } else { Some(self.open_sink().await?) };
        let on_the_way = OnTheWay {
            policy: self.policy.map(|policy| (policy, events)),
            upgrade: self.upgrade.map(|upgrade| (upgrade, sink.as_mut().filter(|_| is_two_sided))),
        };
        match open_side(&mut self.transport, max_packet, &self.deadlines, on_the_way).await {
            Ok(transport) => Ok(OpenEnds { transport, sink }),
            Err(error) => {
                // What never began must not look like an end.
                if let Some(OpenSide { opened: Opened::Stream(sink), .. }) = &mut sink {
                    sink.fail(&error);
                }
                Err(error)
            }
        }
    }

    /// Opens the sink; a listener's one connection is waited for here.
    pub(super) async fn open_sink(&mut self) -> Result<OpenSide> {
        let max_packet = self.form.packets.max_packet;
        let opened = open_side(&mut self.sink, max_packet, &self.deadlines, OnTheWay::default()).await;
        let mut sink = opened.map_err(Error::turned)?;
        if let Some(tls) = task::tls_of(&mut sink) {
            tls.turn();
        }
        Ok(sink)
    }
}

impl Side {
    pub(super) fn new(side: SideOptions) -> Self {
        let SideOptions { endpoint, tls, initial_data, field } = side;
        Self { endpoint: Some(endpoint), tls, initial_data, field }
    }
}

async fn open_side(
    side: &mut Side,
    max_packet: usize,
    deadlines: &Deadlines,
    on_the_way: OnTheWay<'_>,
) -> Result<OpenSide> {
    let spec = side.endpoint.take().ok_or_else(|| Error::new(ErrorKind::ApiMisuse, "opened twice"))?;
    let options = OpenOptions { connect: deadlines.connect, accept: deadlines.accept, max_packet };
    let opened =
        spec.open(&options).await.map_err(|error| error.with_field(side.field).with_phase(Phase::Connect))?;
    let initial = std::mem::take(&mut side.initial_data);
    let Some(tls) = &side.tls else {
        return Ok(OpenSide { opened, info: None, initial, upgrading: None, patience: deadlines.handshake });
    };
    let mut stream = match opened {
        Opened::Stream(stream) => stream,
        Opened::Port(_) => return Err(Error::config(side.field, "TLS runs over a stream, not over packets")),
    };
    let until = Instant::now() + deadlines.handshake.saturating_sub(deadlines.spent);
    let mut upgrading = None;
    let shake = async {
        let Some((upgrade, inner)) = on_the_way.upgrade else {
            return shake(stream, tls, &initial).await;
        };
        let up = upgrading.insert(Box::new(Upgrading::new(upgrade, &tls.role, initial)));
        let inner = inner.and_then(|side| {
            up.received_inside(std::mem::take(&mut side.initial));
            match &mut side.opened {
                Opened::Stream(stream) => Some(&mut **stream as &mut dyn Stream),
                Opened::Port(_) => None,
            }
        });
        let ciphertext = up.until_tls(stream.as_mut(), inner).await?;
        let (mut stream, info) = shake(stream, tls, &ciphertext).await?;
        if let Err(error) = up.check(&info) {
            stream.abort(NO_APPLICATION_PROTOCOL).await;
            return Err(error.with_alert(NO_APPLICATION_PROTOCOL));
        }
        Ok((stream, info))
    };
    let (mut stream, info) = timeout_at(until, shake).await.unwrap_or_else(|_| {
        let text = format!("the TLS handshake was not done within {}", seconds(deadlines.handshake));
        Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake))
    })?;
    if let Some((policy, events)) = on_the_way.policy {
        let subject = Subject::Peer {
            certificates: info.peer_certificates.clone(),
            psk_identity: info.psk_identity.clone(),
            address: stream.peer_address().map(|address| address.to_string()),
        };
        let left = until.saturating_duration_since(Instant::now()).min(policy.deadline);
        if events.mailbox.ask(events.key, subject, left).await != Some(true) {
            stream.abort(ACCESS_DENIED).await;
            return Err(Error::new(ErrorKind::PolicyDenied, "the peer policy did not allow this peer")
                .with_alert(ACCESS_DENIED)
                .with_phase(Phase::Handshake));
        }
    }
    let opened = Opened::Stream(Box::new(stream));
    let patience = until.saturating_duration_since(Instant::now());
    Ok(OpenSide { opened, info: Some(Arc::new(info)), initial: Vec::new(), upgrading, patience })
}

async fn shake(stream: BoxStream, tls: &SideTls, initial: &[u8]) -> Result<(TlsStream, HandshakeInfo)> {
    let early = tls.early.as_ref();
    TlsStream::handshake_with_early_data(stream, &tls.config, &tls.role, initial, early).await
}

/// What both ends say before payload. The transport stays the caller's, who has the last word there should
/// this fail, or be given up.
pub(super) async fn greet(
    transport: &mut OpenSide,
    sink: OpenSide,
    form: Form,
    deadlines: &Deadlines,
) -> Result<Greeted> {
    let network = match &mut transport.opened {
        Opened::Stream(network) => network,
        Opened::Port(network) => {
            let sink = Met::Port(sink_port(sink, form, network.abilities().kind)?);
            return Ok(Greeted { sink, agreement: None });
        }
    };
    let Some(framing) = form.framing else {
        let Opened::Stream(mut cleartext) = sink.opened else {
            return Err(Error::config("framing", "a packet endpoint needs a framing"));
        };
        let mut inside = sink.initial;
        if let Some(mut upgrading) = transport.upgrading.take() {
            upgrading.received_inside(inside);
            let speaking = upgrading.until_payload(network.as_mut(), cleartext.as_mut());
            let spoken = timeout(deadlines.handshake, speaking).await.unwrap_or_else(|_| {
                let text = format!(
                    "the upgrade to TLS was not done within {}: what is inside said nothing",
                    seconds(deadlines.handshake)
                );
                Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake))
            });
            if let Err(error) = spoken {
                // What never began must not look like an end.
                cleartext.fail(&error);
                return Err(error);
            }
            let (from_network, from_inside) = upgrading.into_payload();
            inside = from_inside;
            transport.initial.extend(from_network);
        }
        return Ok(Greeted { sink: Met::Stream(cleartext, inside), agreement: None });
    };
    let sink = sink_port(sink, form, PacketKind::Ip)?;
    let mut agreement = None;
    if framing == Framing::Superframe {
        let ours = hello_for(&sink.abilities(), form.packets.max_packet);
        let whole = deadlines.handshake;
        let hello = superframe_hello(network, ours, &mut transport.initial, whole);
        let agreed = timeout(transport.patience, hello).await.unwrap_or_else(|_| {
            let text = format!(
                "the peer sent no superframe hello within {} of the handshake's beginning",
                seconds(whole)
            );
            Err(Error::new(ErrorKind::HandshakeDeadline, text).with_phase(Phase::Handshake))
        });
        agreement = Some(bounded(agreed?, form.packets.max_packet));
    }
    Ok(Greeted { sink: Met::Port(sink), agreement })
}

/// Framing over both ends: the ends of a pump, and what each flow begins with.
pub(super) fn join(transport: OpenSide, greeted: Greeted, form: Form) -> Result<(Ends, Vec<u8>, Vec<u8>)> {
    let (network, sink) = match (transport.opened, greeted.sink) {
        (Opened::Port(network), Met::Port(sink)) => {
            return Ok((Ends::Ports(network, sink), Vec::new(), Vec::new()));
        }
        (Opened::Stream(network), Met::Stream(cleartext, inside)) => {
            return Ok((Ends::Streams(network, cleartext), inside, transport.initial));
        }
        (Opened::Stream(network), Met::Port(sink)) => (network, sink),
        (Opened::Port(_), Met::Stream(..)) => unreachable!("greet() makes a port of it"),
    };
    let framing =
        form.framing.ok_or_else(|| Error::config("framing", "a packet endpoint needs a framing"))?;
    let mut options = form.framed(framing, sink.abilities().kind);
    options.agreement = greeted.agreement;
    let network = FramedPort::new(network, options, &transport.initial)?;
    Ok((Ends::Ports(Box::new(network), sink), Vec::new(), Vec::new()))
}

impl Form {
    fn framed(&self, framing: Framing, kind: PacketKind) -> FramedOptions {
        FramedOptions {
            framing,
            max_packet: self.packets.max_packet,
            records_per_write: self.packets.records_per_write,
            resync: self.packets.resync,
            kind,
            agreement: None,
        }
    }
}

/// What we tell the peer in a superframe hello: what our sink takes. Below its usual bound nothing large is.
fn hello_for(sink: &PortAbilities, max_packet: usize) -> Hello {
    let large = max_packet >= LARGEST_SUPERFRAME;
    let accepts = Offloads {
        tso4: sink.tso4 && large,
        tso6: sink.tso6 && large,
        uso: sink.uso && large,
        checksum: sink.partial_checksum,
    };
    Hello::new(accepts, max_packet)
}

/// The agreement as far as our own bound goes, which is one of what is sent too.
fn bounded(mut agreement: Agreement, max_packet: usize) -> Agreement {
    agreement.send_max = agreement.send_max.min(max_packet);
    if max_packet < LARGEST_SUPERFRAME {
        agreement.send = Offloads { checksum: agreement.send.checksum, ..Offloads::NONE };
    }
    agreement
}

/// The sink as a packet port: as it is, or a stream with packets of this kind in it.
fn sink_port(sink: OpenSide, form: Form, kind: PacketKind) -> Result<BoxPort> {
    let stream = match sink.opened {
        Opened::Port(port) => return Ok(port),
        Opened::Stream(stream) => stream,
    };
    let framing = form.sink_framing.or(form.framing);
    let framing = framing.ok_or_else(|| Error::config("framing", "a packet endpoint needs a framing"))?;
    // A record of the transport's is what resynchronising goes by; a sink has none.
    let options = FramedOptions { resync: false, ..form.framed(framing, kind) };
    Ok(Box::new(FramedPort::new(stream, options, &sink.initial)?))
}

/// A new sink for a running bridge, which was checked before.
pub(super) async fn open_replacement(
    spec: EndpointSpec,
    form: Form,
    carries_packets: bool,
    deadlines: Deadlines,
) -> Result<Sink> {
    let side = SideOptions { endpoint: spec, tls: None, initial_data: Vec::new(), field: "sink" };
    let way = OnTheWay::default();
    let opened = open_side(&mut Side::new(side), form.packets.max_packet, &deadlines, way).await?;
    if carries_packets {
        return Ok(Sink::Port(sink_port(opened, form, PacketKind::Ip)?));
    }
    match opened.opened {
        Opened::Stream(stream) => Ok(Sink::Stream(stream)),
        Opened::Port(_) => {
            Err(Error::config("sink", "this bridge carries bytes: a packet endpoint needs a framing"))
        }
    }
}
