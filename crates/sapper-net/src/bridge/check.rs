//! What is wrong with a bridge's options, found before anything is opened and without waiting.
//!
//! Not here: what only a look-up, a connection or a peer can tell.

use sapper_proto::framing::Framing;

use super::open::{Form, Prepared, Side};
use super::unused::unused;
use super::{BridgeDirection, BridgeOptions, SideOptions, SideTls, SwapOptions};
use crate::endpoint::EndpointSpec;
use crate::error::{Error, Result};
use crate::fd::Access;
use crate::port::PacketKind;

const BOTH: Access = Access { read: true, write: true };

impl Prepared {
    /// Checks everything; the tap's file is opened last, so that other mistakes leave no file behind.
    pub(super) fn check(options: BridgeOptions) -> Result<Self> {
        let BridgeOptions {
            transport,
            sink,
            direction,
            framing,
            sink_framing,
            packets,
            deadlines,
            peer_policy,
            upgrade,
            tap,
        } = options;
        // Before any framing is asked for: none would help.
        check_streams([&transport, &sink])?;
        let form = Form { framing, sink_framing, packets, direction };
        let form = form.of_both(&transport, &sink)?;
        form.check_use(&transport, &sink, &deadlines)?;
        check_tls(&transport, ["credentials", "server_hostname"])?;
        check_tls(&sink, ["sink_credentials", "sink_hostname"])?;
        check_side(&transport, form.needs_of_transport(), ["decrypt-only", "encrypt-only"])?;
        check_side(&sink, form.needs_of_sink(), ["encrypt-only", "decrypt-only"])?;
        if tap.is_some() && !form.carries_packets(&transport.endpoint) {
            return Err(unused("tap", "a tap writes packets: set a `framing`"));
        }
        if !(1..=65_535).contains(&packets.max_packet) {
            let text = format!("1 to 65535, not {}", packets.max_packet);
            return Err(Error::config("max_packet", text).with_reason("out_of_range"));
        }
        if packets.records_per_write == 0 {
            return Err(Error::config("records_per_write", "at least 1").with_reason("out_of_range"));
        }
        if upgrade.is_some() {
            if transport.tls.is_none() {
                return Err(unused("upgrade", "leads to TLS: give credentials"));
            }
            if form.framing.is_some() || sink.endpoint.is_port() {
                return Err(unused("upgrade", "is of protocols without packets: leave `framing` away"));
            }
            if direction != BridgeDirection::Duplex {
                return Err(unused("upgrade", "is spoken both ways: leave `direction` away"));
            }
        }
        if peer_policy.is_some() && transport.tls.is_none() {
            return Err(unused("peer_policy", "needs TLS: without it no peer is known"));
        }
        for (field, duration) in [
            ("connect_timeout", Some(deadlines.connect)),
            ("accept_timeout", deadlines.accept),
            ("handshake_timeout", Some(deadlines.handshake)),
            ("idle_timeout", deadlines.idle),
        ] {
            if duration.is_some_and(|d| d.is_zero()) {
                return Err(Error::config(field, "must be above zero").with_reason("out_of_range"));
            }
        }
        let tap = tap.map(|tap| tap.open().map(Box::new)).transpose()?;
        let carries_packets = form.carries_packets(&transport.endpoint);
        Ok(Self {
            transport: Side::new(transport),
            sink: Side::new(sink),
            form,
            carries_packets,
            deadlines,
            policy: peer_policy,
            upgrade,
            tap,
        })
    }
}

impl Form {
    /// The form in which these two are joined, or why they cannot be.
    fn of_both(mut self, transport: &SideOptions, sink: &SideOptions) -> Result<Self> {
        let is_port = |side: &SideOptions| side.endpoint.is_port();
        if is_port(transport) {
            if !transport.initial_data.is_empty() {
                let message = format!("{} carries packets: it has no bytes before them", transport.field);
                return Err(Error::config("initial_data", message));
            }
            match (is_port(sink), self.framing, self.sink_framing) {
                (true, None, None) => {}
                (true, framing, _) => {
                    let field = if framing.is_some() { "framing" } else { "sink_framing" };
                    return Err(unused(field, "both ends carry packets already: leave it away"));
                }
                (false, Some(framing), Some(sink_framing)) if framing != sink_framing => {
                    let text = "the network carries packets already: only `sink_framing` has a meaning";
                    return Err(unused("framing", text));
                }
                // There is one stream, whichever of the two names its framing.
                (false, framing, sink_framing) => {
                    (self.framing, self.sink_framing) = (None, framing.or(sink_framing))
                }
            }
        } else if self.framing.is_none() && self.sink_framing.is_some() {
            return Err(unused("sink_framing", "has no meaning without `framing`"));
        }
        self.check_sink(&sink.endpoint, transport.endpoint.is_port())?;
        if let (EndpointSpec::Port(one), EndpointSpec::Port(other)) = (&transport.endpoint, &sink.endpoint)
            && let (Some(one), Some(other)) = (one.interface(), other.interface())
            && one != other
        {
            return Err(Error::config(
                sink.field,
                "a TUN carries IP packets and a TAP Ethernet frames: they cannot be joined",
            ));
        }
        check_ethernet(&transport.endpoint, self.sink_framing, "sink_framing")?;
        Ok(self)
    }

    /// Whether a sink fits: the first one, or one that takes its place.
    fn check_sink(&self, sink: &EndpointSpec, transport_is_port: bool) -> Result<()> {
        const FRAMINGS: &str = "\"ip\", \"ipv4\", \"ipv6\", \"u16\", \"u32\" or \"superframe\"";
        const OWN_ENDS: &str =
            "superframes join two of our own ends: name another framing for the sink's stream";
        if sink.is_port() {
            if self.framing.is_none() && !transport_is_port {
                return Err(Error::config(
                    "framing",
                    format!("a packet endpoint needs a framing: {FRAMINGS}"),
                ));
            }
            return check_ethernet(sink, self.framing, "framing");
        }
        let inner = self.sink_framing.or(self.framing);
        if inner.is_none() && transport_is_port {
            return Err(Error::config("framing", format!("a packet endpoint needs a framing: {FRAMINGS}")));
        }
        match inner {
            Some(Framing::Superframe) => Err(Error::config("sink_framing", OWN_ENDS)),
            _ => Ok(()),
        }
    }

    /// Whether a sink can take the place of the running one.
    pub(super) fn check_replacement(
        &self,
        sink: &EndpointSpec,
        transport_is_port: bool,
        swap: &SwapOptions,
    ) -> Result<()> {
        swap.check_use(sink, self.framing.is_some() || transport_is_port)?;
        let this = self.with(swap);
        if sink.is_port() && !transport_is_port && self.framing.is_none() {
            return Err(Error::config(
                "sink",
                "this bridge carries bytes: a packet endpoint needs a framing",
            ));
        }
        if !sink.is_port() && transport_is_port && this.sink_framing.is_none() {
            return Err(Error::config("sink", "this pump carries packets: a stream needs a framing"));
        }
        this.check_sink(sink, transport_is_port).map_err(|error| match error.field() {
            // The bridge's own framing was said before; it is the sink that does not fit.
            Some("framing") => error.in_field("sink"),
            _ => error,
        })?;
        sink.check(self.needs_of_sink()).map_err(|error| error.with_field("sink"))
    }

    /// The form with a sink for which something else was said.
    pub(super) fn with(mut self, swap: &SwapOptions) -> Self {
        self.sink_framing = swap.sink_framing.or(self.sink_framing);
        self
    }

    pub(super) fn carries_packets(&self, transport: &EndpointSpec) -> bool {
        self.framing.is_some() || transport.is_port()
    }

    fn needs_of_transport(&self) -> Access {
        match self.direction {
            // Both ends of a superframe's stream say hello.
            _ if self.framing == Some(Framing::Superframe) => BOTH,
            BridgeDirection::Duplex => BOTH,
            BridgeDirection::EncryptOnly => Access::WRITE,
            BridgeDirection::DecryptOnly => Access::READ,
        }
    }

    fn needs_of_sink(&self) -> Access {
        match self.direction {
            BridgeDirection::Duplex => BOTH,
            BridgeDirection::EncryptOnly => Access::READ,
            BridgeDirection::DecryptOnly => Access::WRITE,
        }
    }
}

/// A TAP's frames need a framing that says where they end.
fn check_ethernet(endpoint: &EndpointSpec, framing: Option<Framing>, field: &'static str) -> Result<()> {
    let with_length = matches!(framing, None | Some(Framing::U16 | Framing::U32));
    match endpoint {
        EndpointSpec::Port(port) if port.interface() == Some(PacketKind::Ethernet) && !with_length => {
            Err(Error::config(
                field,
                "a TAP carries Ethernet frames, which have no length of their own: use \"u16\" or \"u32\"",
            ))
        }
        _ => Ok(()),
    }
}

fn check_streams(sides: [&SideOptions; 2]) -> Result<()> {
    match sides.into_iter().find(|side| side.tls.is_some() && side.endpoint.is_port()) {
        Some(side) => {
            let text = "TLS runs over a stream, not over packets: a packet endpoint belongs in `sink`";
            Err(Error::config(side.field, text).with_reason("packets"))
        }
        None => Ok(()),
    }
}

/// `fields` are the options in which credentials and server's name came.
fn check_tls(side: &SideOptions, fields: [&'static str; 2]) -> Result<()> {
    let Some(SideTls { config, role, early }) = &side.tls else { return Ok(()) };
    if let Some(early) = early {
        config.check_early_data(role, early.bytes.len())?;
    }
    config.check(role).map_err(|error| match error.field() {
        Some("credentials") => error.in_field(fields[0]),
        Some("server_hostname") => error.in_field(fields[1]),
        _ => error,
    })
}

/// `one_way` are the directions that only read from this side, and only write to it.
fn check_side(side: &SideOptions, needs: Access, one_way: [&str; 2]) -> Result<()> {
    // A handshake is spoken both ways, whichever way payload flows.
    let needs = if side.tls.is_some() { BOTH } else { needs };
    let hint = |error: Error| {
        if error.reason() != Some("wrong_direction") {
            return error;
        }
        if let EndpointSpec::FdPair { .. } = side.endpoint {
            return error.because("a pair is one to read and one to write, in this order");
        }
        if side.tls.is_some() {
            return error.because("TLS is spoken both ways");
        }
        let direction = one_way[usize::from(side.endpoint.check(Access::READ).is_err())];
        error.because(&format!("for the direction \"{direction}\" it need not be"))
    };
    side.endpoint.check(needs).map_err(|error| hint(error).with_field(side.field))
}
