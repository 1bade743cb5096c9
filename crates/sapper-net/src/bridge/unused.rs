//! Options that nothing has a use for between two given ends: whoever said one would believe that it holds.
//!
//! A default that is written down counts as left out. Not here: options that are wrong whatever the ends are
//! ([`check`](super::check)).

use std::time::Duration;

use sapper_proto::framing::Framing;

use super::open::Form;
use super::{BridgeDirection, Deadlines, PacketOptions, SideOptions, SwapOptions};
use crate::endpoint::EndpointSpec;
use crate::error::{Error, Result};

/// What has no use is refused with this word.
pub(super) fn unused(field: &'static str, text: &'static str) -> Error {
    Error::config(field, text).with_reason("unused")
}

impl Form {
    /// Refuses what is said and has no use between these two.
    pub(super) fn check_use(
        &self,
        transport: &SideOptions,
        sink: &SideOptions,
        deadlines: &Deadlines,
    ) -> Result<()> {
        self.check_packets(transport, sink)?;
        let (is_tls, usual) = (transport.tls.is_some() || sink.tls.is_some(), Deadlines::default());
        if deadlines.handshake != usual.handshake && !is_tls && self.framing != Some(Framing::Superframe) {
            let text = "there is no handshake: neither TLS nor the hello of superframes";
            return Err(unused("handshake_timeout", text));
        }
        Ok(())
    }

    fn check_packets(&self, transport: &SideOptions, sink: &SideOptions) -> Result<()> {
        let (said, usual) = (self.packets, PacketOptions::default());
        let packets = [
            ("max_packet", said.max_packet != usual.max_packet),
            ("records_per_write", said.records_per_write != usual.records_per_write),
            ("resync", said.resync),
        ];
        if !self.carries_packets(&transport.endpoint) {
            return match packets.into_iter().find(|(_, is_said)| *is_said) {
                Some((field, _)) => {
                    Err(unused(field, "is about packets, and these are bytes: set a `framing`"))
                }
                None => Ok(()),
            };
        }
        let least = |framing: &Framing| framing.shortest_packet() > said.max_packet;
        // Zero has its own words, the same as where there is no framing.
        if let Some(framing) = self.framing.filter(least)
            && said.max_packet > 0
        {
            let (name, shortest) = (framing.name(), framing.shortest_packet());
            let text = format!("packets in the framing {name:?} have {shortest} bytes at least");
            return Err(Error::config("max_packet", text).with_reason("out_of_range"));
        }
        let (network_is_stream, sink_is_stream) = (!transport.endpoint.is_port(), !sink.endpoint.is_port());
        let other_framing = self.sink_framing.is_some() && self.sink_framing != self.framing;
        if network_is_stream && !sink_is_stream && other_framing {
            let text = "is for a sink that is a stream: this one carries packets";
            return Err(unused("sink_framing", text));
        }
        // A sink that is swapped in later may be a stream.
        let written = network_is_stream || self.direction != BridgeDirection::EncryptOnly;
        if said.records_per_write != usual.records_per_write && !written {
            let text = "no packets are written into a stream";
            return Err(unused("records_per_write", text));
        }
        if said.resync {
            let missing = if !network_is_stream || transport.tls.is_none() {
                "goes by the records of TLS, and packets come in none"
            } else if self.direction == BridgeDirection::EncryptOnly {
                "is about packets from the network, and none come"
            } else {
                return Ok(());
            };
            return Err(unused("resync", missing));
        }
        Ok(())
    }
}

impl SwapOptions {
    /// Refuses what has no use with this sink.
    pub(super) fn check_use(&self, sink: &EndpointSpec, carries_packets: bool) -> Result<()> {
        if self.sink_framing.is_some() && (sink.is_port() || !carries_packets) {
            let text = match sink.is_port() {
                true => "is for a sink that is a stream: this one carries packets",
                false => "has no meaning without `framing`",
            };
            return Err(unused("sink_framing", text));
        }
        if self.accept.is_some() && !sink.is_listener() {
            return Err(unused("accept_timeout", "is for a sink that listens"));
        }
        if self.accept.is_some_and(|time: Duration| time.is_zero()) {
            return Err(Error::config("accept_timeout", "must be above zero").with_reason("out_of_range"));
        }
        Ok(())
    }
}
