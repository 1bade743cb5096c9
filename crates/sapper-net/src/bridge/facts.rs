//! What the statistics say of a bridge's ends: what they are, who counts what, what TLS agreed on.

use std::sync::Arc;

use super::open::{OpenEnds, OpenSide};
use super::state::{BridgeStats, Shared};
use crate::endpoint::Opened;
use crate::pump::Ends;
use crate::stream::Stream;
use crate::tls::HandshakeInfo;

/// What is known when both ends are open.
pub(super) fn opened(shared: &Shared, ends: &OpenEnds) {
    if let Opened::Stream(stream) = &ends.transport.opened {
        shared.set_addresses(stream.local_address(), stream.peer_address());
    }
    shared.update_stats(|stats, descriptions| {
        for (side, prefix) in [(Some(&ends.transport), "transport"), (ends.sink.as_ref(), "sink")] {
            let Some(OpenSide { info: Some(info), .. }) = side else { continue };
            stats.facts.extend(tls_facts(prefix, info));
        }
        descriptions.0 = describe(&ends.transport.opened);
        descriptions.1 = ends.sink.as_ref().map(|sink| describe(&sink.opened)).unwrap_or_default();
    });
}

/// What is known when the pump is made: who counts what, and which offloads are in use.
pub(super) fn joined(shared: &Shared, ends: &mut Ends) {
    shared.update_stats(|stats, descriptions| {
        let offloads = match ends {
            Ends::Streams(network, sink) => {
                descriptions.1 = sink.describe();
                note_layers(stats, network.as_mut());
                stats.transport = Some(Arc::clone(network.stats()));
                stats.sink = Some(Arc::clone(sink.stats()));
                Vec::new()
            }
            Ends::Ports(network, sink) => {
                descriptions.1 = sink.describe();
                if let Some(stream) = network.stream_mut() {
                    note_layers(stats, stream);
                }
                stats.transport = Some(Arc::clone(network.stats()));
                stats.sink = Some(Arc::clone(sink.stats()));
                let facts = network.offloads().into_iter();
                let facts = facts.map(|(name, state)| (format!("transport.offload.{name}"), state));
                stats.facts.extend(facts);
                sink.offloads()
            }
        };
        let offloads = offloads.into_iter().map(|(name, state)| (format!("offload.{name}"), state));
        stats.facts.extend(offloads);
    });
}

/// TLS counts records; what is below it counts bytes and system calls.
fn note_layers(stats: &mut BridgeStats, stream: &mut dyn Stream) {
    match stream.tls_mut() {
        Some(tls) => {
            stats.tls = Some(Arc::clone(tls.stats()));
            stats.carrier = Some(Arc::clone(tls.carrier().stats()));
        }
        None => stats.carrier = Some(Arc::clone(stream.stats())),
    }
}

fn describe(opened: &Opened) -> String {
    match opened {
        Opened::Stream(stream) => stream.describe(),
        Opened::Port(port) => port.describe(),
    }
}

fn tls_facts(prefix: &'static str, info: &HandshakeInfo) -> Vec<(String, String)> {
    let mut facts = vec![
        (format!("{prefix}.tls.engine"), info.engine.to_owned()),
        (format!("{prefix}.tls.version"), info.version.to_owned()),
        (format!("{prefix}.tls.cipher_suite"), info.cipher_suite.clone()),
    ];
    if let Some(group) = &info.group {
        facts.push((format!("{prefix}.tls.group"), group.clone()));
    }
    facts.push((
        "offload.ktls".to_owned(),
        "off: records are sealed and opened in this process; kernel TLS is not used".to_owned(),
    ));
    facts
}
