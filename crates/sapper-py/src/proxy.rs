//! The proxy's handle. Every method returns at once; what takes time answers into a mailbox.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::IntoRawFd;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sapper_net::proxy::{
    self, ConnectionSnapshot, Deadlines, Inbound, Listen, ProxyEvent, ProxyOptions, Rate, RouteOptions,
    ServiceOptions, Upstream, UpstreamTls,
};
use sapper_net::stream::fd::SocketOptions;
use sapper_net::stream::inherited::take_inherited;
use sapper_net::stream::listen::{ListenAddress, ListenOptions};
use sapper_net::{Error, Result};
use sapper_proto::proxy_protocol::Version;

use crate::bridge::read_upgrade;
use crate::endpoint::{duplicate, unix_address};
use crate::errors::{self, OrRaise};
use crate::mailbox::Mailbox;
use crate::process::Local;
use crate::tls::{TlsConfig, word};
use sapper_seam::values::seconds;

/// Accepts connections and takes each to its service.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Proxy {
    inner: Local<proxy::Proxy>,
}

/// An address to listen at: a host (`None` is every address) and a port, a path, or a descriptor.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ListenValues {
    host: Option<String>,
    port: u16,
    path: Option<OsString>,
    fd: Option<i64>,
}

/// How to listen.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ListenerValues {
    backlog: u16,
    max_connections: u32,
    reuse_port: bool,
    unix_mode: Option<u32>,
    replace_stale: bool,
    transparent: bool,
    keepalive: Option<f64>,
}

/// What connections are served by.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ServiceValues {
    routes: Vec<RouteValues>,
    upgrade: Option<String>,
    proxy_from: Vec<String>,
    proxy_from_unix: bool,
    max_handshakes: u32,
    rate: Option<f64>,
    burst: u32,
    handshake_timeout: f64,
    connect_timeout: f64,
    idle_timeout: Option<f64>,
    tell_connections: bool,
}

/// One way through the proxy.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct RouteValues {
    names: Vec<String>,
    pass_through: bool,
    tls: Option<Py<TlsConfig>>,
    upstreams: Vec<UpstreamValues>,
    keep_source: bool,
    upstream_tls: Option<(Py<TlsConfig>, Option<String>)>,
    upstream_upgrade: Option<String>,
    send_proxy: Option<String>,
}

/// Where a service is: a host and a port, a path, or where the client wanted to go.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct UpstreamValues {
    host: Option<String>,
    port: u16,
    path: Option<OsString>,
}

#[pymethods]
impl Proxy {
    #[new]
    fn new(
        py: Python<'_>,
        listen: Vec<ListenValues>,
        listener: ListenerValues,
        service: ServiceValues,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let read = || {
            Ok(ProxyOptions {
                listen: listen.into_iter().map(ListenValues::read).collect::<Result<_>>()?,
                listen_options: listener.read()?,
                service: service.read()?,
            })
        };
        let inner = proxy::Proxy::new(read().or_raise(py)?, mailbox.reply(py, key)?).or_raise(py)?;
        Ok(Self { inner: Local::new(inner) })
    }

    fn start(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.start(mailbox.reply(py, key)?);
        Ok(())
    }

    fn reload(&self, py: Python<'_>, service: ServiceValues) -> PyResult<()> {
        let service = service.read().or_raise(py)?;
        self.inner.get(py)?.reload(service).or_raise(py)
    }

    fn stop(&self, py: Python<'_>, drain: f64) -> PyResult<()> {
        self.inner.get(py)?.stop(seconds("drain")(drain).or_raise(py)?);
        Ok(())
    }

    fn wait_closed(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.wait_closed(mailbox.reply(py, key)?);
        Ok(())
    }

    fn state(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(self.inner.get(py)?.state().as_str())
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.get(py)?.stats();
        StatsValues {
            state: stats.state.as_str(),
            accepted: stats.accepted,
            open: stats.open,
            handshaking: stats.handshaking,
            handshakes: stats.handshakes,
            resumed: stats.resumed,
            ended: stats.ended,
            errors: stats.errors,
            upstream_failures: stats.upstream_failures,
            to_upstream: stats.to_upstream,
            to_client: stats.to_client,
            handshake_p50: stats.handshake_p50.as_secs_f64(),
            handshake_p99: stats.handshake_p99.as_secs_f64(),
            connect_p50: stats.connect_p50.as_secs_f64(),
            connect_p99: stats.connect_p99.as_secs_f64(),
            limit_pauses: stats.limit_pauses,
            exhausted_pauses: stats.exhausted_pauses,
            rate_addresses: stats.rate_addresses,
        }
        .into_pyobject(py)
    }

    fn connections<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.inner.get(py)?.connections().into_iter().map(|one| connection(py, one)).collect()
    }
}

/// The listening sockets that a service manager handed over, once: descriptor (the caller's) and name.
#[pyfunction]
pub(crate) fn inherited_sockets(py: Python<'_>) -> PyResult<Vec<(i32, String)>> {
    let inherited = take_inherited().or_raise(py)?;
    Ok(inherited.into_iter().map(|one| (one.fd.into_raw_fd(), one.name)).collect())
}

#[derive(IntoPyObject)]
struct StatsValues {
    state: &'static str,
    accepted: u64,
    open: u64,
    handshaking: u64,
    handshakes: BTreeMap<&'static str, u64>,
    resumed: u64,
    ended: BTreeMap<&'static str, u64>,
    errors: BTreeMap<&'static str, u64>,
    upstream_failures: BTreeMap<String, u64>,
    to_upstream: u64,
    to_client: u64,
    handshake_p50: f64,
    handshake_p99: f64,
    connect_p50: f64,
    connect_p99: f64,
    limit_pauses: u64,
    exhausted_pauses: u64,
    rate_addresses: u64,
}

#[derive(IntoPyObject)]
struct ConnectionValues {
    id: u64,
    client: String,
    local: String,
    upstream: Option<String>,
    server_name: Option<String>,
    version: Option<&'static str>,
    cipher_suite: Option<String>,
    alpn: Option<Vec<u8>>,
    resumed: bool,
    client_cn: Option<String>,
    age: f64,
    to_upstream: u64,
    to_client: u64,
}

fn connection(py: Python<'_>, one: ConnectionSnapshot) -> PyResult<Bound<'_, PyDict>> {
    ConnectionValues {
        id: one.id,
        client: one.client,
        local: one.local,
        upstream: one.upstream,
        server_name: one.server_name,
        version: one.version,
        cipher_suite: one.cipher_suite,
        alpn: one.alpn,
        resumed: one.resumed,
        client_cn: one.client_cn,
        age: one.age.as_secs_f64(),
        to_upstream: one.to_upstream,
        to_client: one.to_client,
    }
    .into_pyobject(py)
}

/// A connection's end: what was known of it, the outcome, and the error where there is one.
pub(crate) fn event<'py>(py: Python<'py>, event: ProxyEvent) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("connection", connection(py, event.connection)?)?;
    values.set_item("outcome", event.outcome)?;
    values.set_item("error", event.error.map(|error| errors::to_object(py, &error)).transpose()?)?;
    Ok(values)
}

impl ListenValues {
    fn read(self) -> Result<Listen> {
        Ok(match self {
            Self { fd: Some(number), .. } => Listen::Socket(duplicate(number, "listen")?),
            Self { path: Some(path), .. } => Listen::Address(ListenAddress::Unix(unix_address(path))),
            Self { host, port, .. } => Listen::Address(ListenAddress::Tcp { host, port }),
        })
    }
}

impl ListenerValues {
    fn read(self) -> Result<ListenOptions> {
        Ok(ListenOptions {
            backlog: self.backlog,
            max_connections: self.max_connections,
            reuse_port: self.reuse_port,
            unix_mode: self.unix_mode,
            replace_stale: self.replace_stale,
            transparent: self.transparent,
            socket: SocketOptions {
                keepalive: time("keepalive", self.keepalive)?,
                short_near: true,
                ..SocketOptions::default()
            },
            ..ListenOptions::default()
        })
    }
}

impl ServiceValues {
    fn read(self) -> Result<ServiceOptions> {
        let network = |(index, text): (usize, &String)| {
            let wrong = |error: Error| Error::config(format!("proxy_from.{index}"), error.message());
            text.parse().map_err(wrong)
        };
        Ok(ServiceOptions {
            routes: self.routes.into_iter().map(RouteValues::read).collect::<Result<_>>()?,
            upgrade: self.upgrade.as_deref().map(read_upgrade).transpose()?,
            proxy_from: self.proxy_from.iter().enumerate().map(network).collect::<Result<_>>()?,
            proxy_from_unix: self.proxy_from_unix,
            max_handshakes: self.max_handshakes,
            rate: self.rate.map(|per_second| Rate { per_second, burst: self.burst }),
            deadlines: Deadlines {
                handshake: seconds("handshake_timeout")(self.handshake_timeout)?,
                connect: seconds("connect_timeout")(self.connect_timeout)?,
                idle: time("idle_timeout", self.idle_timeout)?,
            },
            tell_connections: self.tell_connections,
        })
    }
}

impl RouteValues {
    fn read(self) -> Result<RouteOptions> {
        let config = |config: &Py<TlsConfig>| Arc::clone(&config.get().inner);
        let inbound = match (&self.tls, self.pass_through) {
            (_, true) => Inbound::PassThrough,
            (Some(tls), false) => Inbound::Tls(config(tls)),
            (None, false) => Inbound::Plain,
        };
        let upgrade = self.upstream_upgrade.as_deref().map(read_upgrade).transpose()?;
        let versions = [("v1", Version::V1), ("v2", Version::V2)];
        Ok(RouteOptions {
            names: self.names,
            inbound,
            upstreams: self.upstreams.into_iter().map(UpstreamValues::read).collect(),
            keep_source: self.keep_source,
            upstream_tls: self.upstream_tls.map(|(tls, server_name)| UpstreamTls {
                config: config(&tls),
                server_name,
                upgrade,
            }),
            send_proxy: self.send_proxy.map(|text| word("send_proxy", &text, &versions)).transpose()?,
        })
    }
}

impl UpstreamValues {
    fn read(self) -> Upstream {
        match self {
            Self { path: Some(path), .. } => Upstream::Unix(unix_address(path)),
            Self { host: Some(host), port, .. } => Upstream::Tcp { host, port },
            Self { .. } => Upstream::Original,
        }
    }
}

fn time(field: &'static str, time: Option<f64>) -> Result<Option<Duration>> {
    time.map(seconds(field)).transpose()
}
