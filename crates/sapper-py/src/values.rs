//! Plain values that cross the seam: durations, what a handshake agreed on, counters.
//!
//! Structures become dictionaries, of which `sapper` makes its frozen dataclasses; their keys are in
//! `_native.pyi`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use sapper_net::bridge::{FlowSnapshot, Handshakes, SideSnapshot, StatsSnapshot};
use sapper_net::stats::latency_bounds;
use sapper_net::tls::early_data::EarlyOutcome;
use sapper_net::tls::{HandshakeInfo, certificate};
use sapper_net::{Error, Result};
use sapper_proto::cdtunnel;

use crate::errors::OrRaise;

#[derive(IntoPyObject)]
struct HandshakeValues {
    version: &'static str,
    cipher_suite: String,
    group: Option<String>,
    alpn: Option<Vec<u8>>,
    peer_certificates: Vec<Vec<u8>>,
    psk_identity: Option<String>,
    server_name: Option<String>,
    own_end_point: Option<Vec<u8>>,
    is_client: bool,
    resumed: bool,
    early_data: Option<&'static str>,
    engine: &'static str,
}

/// What each TLS end agreed on.
pub(crate) fn handshakes<'py>(
    py: Python<'py>,
    both: &Handshakes,
) -> PyResult<[Option<Bound<'py, PyDict>>; 2]> {
    let one = |info: &Option<Arc<HandshakeInfo>>| info.as_ref().map(|info| handshake(py, info)).transpose();
    Ok([one(&both.transport)?, one(&both.sink)?])
}

fn handshake<'py>(py: Python<'py>, info: &HandshakeInfo) -> PyResult<Bound<'py, PyDict>> {
    HandshakeValues {
        version: info.version,
        cipher_suite: info.cipher_suite.clone(),
        group: info.group.clone(),
        alpn: info.alpn.clone(),
        peer_certificates: info.peer_certificates.clone(),
        psk_identity: info.psk_identity.clone(),
        server_name: info.server_name.clone(),
        own_end_point: info.own_end_point.as_deref().map(<[u8]>::to_vec),
        is_client: info.is_client,
        resumed: info.resumed,
        early_data: info.early_data.map(|outcome| match outcome {
            EarlyOutcome::Accepted(_) => "accepted",
            EarlyOutcome::Rejected => "rejected",
        }),
        engine: info.engine,
    }
    .into_pyobject(py)
}

/// Parameters of a device tunnel, in both directions.
#[derive(FromPyObject, IntoPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct CdTunnelValues {
    client_address: String,
    prefix_len: u8,
    mtu: u16,
    server_address: String,
    rsd_port: u16,
}

/// What a device tunnel's hello granted.
pub(crate) fn cdtunnel<'py>(py: Python<'py>, granted: &cdtunnel::Response) -> PyResult<Bound<'py, PyDict>> {
    CdTunnelValues {
        client_address: granted.client_address.to_string(),
        prefix_len: granted.prefix_len,
        mtu: granted.mtu,
        server_address: granted.server_address.to_string(),
        rsd_port: granted.rsd_port,
    }
    .into_pyobject(py)
}

impl CdTunnelValues {
    /// What our side grants.
    pub(crate) fn response(&self) -> Result<cdtunnel::Response> {
        let address = |text: &str, field| {
            text.parse::<IpAddr>().map_err(|_| Error::config(field, format!("{text:?} is no IP address")))
        };
        let client_address = address(&self.client_address, "client_address")?;
        let server_address = address(&self.server_address, "server_address")?;
        if client_address.is_ipv4() != server_address.is_ipv4() {
            return Err(Error::config("server_address", "is of another IP version than client_address"));
        }
        let longest = if client_address.is_ipv4() { 32 } else { 128 };
        if self.prefix_len > longest {
            return Err(Error::config("prefix_len", format!("is above {longest}")));
        }
        Ok(cdtunnel::Response {
            client_address,
            prefix_len: self.prefix_len,
            mtu: self.mtu,
            server_address,
            rsd_port: self.rsd_port,
        })
    }
}

#[derive(IntoPyObject)]
struct FlowValues {
    bytes: u64,
    packets: u64,
    backpressure: f64,
    latency_p50: f64,
    latency_p99: f64,
    latency_max: f64,
    latency_counts: Vec<u64>,
    latency_sum: f64,
    drops: BTreeMap<&'static str, u64>,
}

#[derive(IntoPyObject)]
struct EndpointValues {
    description: String,
    bytes_received: u64,
    bytes_sent: u64,
    packets_received: u64,
    packets_sent: u64,
    records_received: u64,
    records_sent: u64,
    receive_calls: u64,
    send_calls: u64,
}

#[derive(IntoPyObject)]
struct StatsValues {
    running: f64,
    latency_bounds: Vec<f64>,
    encapsulate: FlowValues,
    decapsulate: FlowValues,
    transport: EndpointValues,
    sink: EndpointValues,
    facts: BTreeMap<String, String>,
}

/// Counters of one moment.
pub(crate) fn stats(py: Python<'_>, snapshot: StatsSnapshot) -> PyResult<Bound<'_, PyDict>> {
    StatsValues {
        running: snapshot.running.as_secs_f64(),
        latency_bounds: latency_bounds().map(|bound| bound.as_secs_f64()).collect(),
        encapsulate: flow(snapshot.encapsulate),
        decapsulate: flow(snapshot.decapsulate),
        transport: endpoint(snapshot.transport),
        sink: endpoint(snapshot.sink),
        facts: snapshot.facts.into_iter().collect(),
    }
    .into_pyobject(py)
}

fn flow(flow: FlowSnapshot) -> FlowValues {
    FlowValues {
        bytes: flow.bytes,
        packets: flow.packets,
        backpressure: flow.backpressure.as_secs_f64(),
        latency_p50: flow.latency_p50.as_secs_f64(),
        latency_p99: flow.latency_p99.as_secs_f64(),
        latency_max: flow.latency_max.as_secs_f64(),
        latency_counts: flow.latency_counts.into(),
        latency_sum: flow.latency_sum.as_secs_f64(),
        drops: flow.drops.into_iter().collect(),
    }
}

fn endpoint(side: SideSnapshot) -> EndpointValues {
    EndpointValues {
        description: side.description,
        bytes_received: side.bytes_received,
        bytes_sent: side.bytes_sent,
        packets_received: side.packets_received,
        packets_sent: side.packets_sent,
        records_received: side.records_received,
        records_sent: side.records_sent,
        receive_calls: side.receive_calls,
        send_calls: side.send_calls,
    }
}

/// What a certificate says of itself, in the words of Python's `ssl`; times are seconds since 1970.
#[pyfunction]
pub(crate) fn describe_certificate<'py>(py: Python<'py>, der: &[u8]) -> PyResult<Bound<'py, PyDict>> {
    let said = certificate::describe(der).or_raise(py)?;
    let name = |name: certificate::Name| -> PyResult<Bound<'py, PyTuple>> {
        let parts: Vec<_> = name.into_iter().map(|part| PyTuple::new(py, part)).collect::<PyResult<_>>()?;
        PyTuple::new(py, parts)
    };
    let values = PyDict::new(py);
    values.set_item("subject", name(said.subject)?)?;
    values.set_item("issuer", name(said.issuer)?)?;
    values.set_item("version", said.version)?;
    values.set_item("serialNumber", said.serial)?;
    values.set_item("notBefore", said.not_before)?;
    values.set_item("notAfter", said.not_after)?;
    values.set_item("subjectAltName", PyTuple::new(py, said.alternative_names)?)?;
    values.set_item("signatureAlgorithm", said.signature_algorithm)?;
    Ok(values)
}
