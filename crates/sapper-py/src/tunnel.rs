//! The tunnel's handles. Every method returns at once; what takes time answers into a mailbox, and what
//! happens is told there as `"tunnel"`.

use std::borrow::Cow;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sapper_net::proxy::Rate;
use sapper_net::tunnel::client::{Client, ClientOptions};
use sapper_net::tunnel::limit::Limits;
use sapper_net::tunnel::notice::{Notice, ServiceInfo};
use sapper_net::tunnel::served::ServiceStats;
use sapper_net::tunnel::server::{Server, ServerOptions, TunnelSnapshot};
use sapper_net::tunnel::service::{Exposed, Service};
use sapper_net::tunnel::{Common, TunnelStats, VisitorStats};
use sapper_net::{Error, Result};
use sapper_proto::proxy_protocol::Version;
use sapper_proto::tunnel::ip_list::{IpList, VisitorRule};
use sapper_proto::tunnel::mux::Overflow;
use sapper_proto::tunnel::words::Asked;

use crate::errors::{self, OrRaise};
use crate::mailbox::Mailbox;
use crate::payload;
use crate::process::Local;
use crate::tls::{TlsConfig, word};
use sapper_seam::values::seconds;

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct LimitValues {
    bytes_per_second: Option<u64>,
    total_bytes: Option<u64>,
    visitors: Option<u32>,
    visits: Option<(f64, u32)>,
    total_visits: Option<u64>,
}

impl From<LimitValues> for Limits {
    fn from(values: LimitValues) -> Self {
        Self {
            bytes_per_second: values.bytes_per_second,
            total_bytes: values.total_bytes,
            visitors: values.visitors,
            visits: values.visits.map(|(per_second, burst)| Rate { per_second, burst }),
            total_visits: values.total_visits,
        }
    }
}

/// What both ends have.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct CommonValues {
    handshake_timeout: f64,
    grace: f64,
    overflow: String,
    linger: f64,
}

impl CommonValues {
    fn read(&self) -> Result<Common> {
        Ok(Common {
            handshake_timeout: seconds("handshake_timeout")(self.handshake_timeout)?,
            grace: seconds("grace")(self.grace)?,
            overflow: word(
                "overflow",
                &self.overflow,
                &[("pause", Overflow::Pause), ("reset", Overflow::Reset)],
            )?,
            linger: seconds("linger")(self.linger)?,
        })
    }
}

fn addresses(field: &'static str, entries: &[String]) -> Result<IpList> {
    IpList::parse(entries.iter().map(String::as_str))
        .map_err(|error| Error::config(format!("{field}.{}", error.index), error.to_string()))
}

fn address(field: impl Into<Cow<'static, str>>, text: &str) -> Result<IpAddr> {
    text.parse::<IpAddr>()
        .map(|address| address.to_canonical())
        .map_err(|_| Error::config(field, format!("{text} is no IP address")))
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ServerValues {
    host: Option<String>,
    port: u16,
    visitor_host: Option<String>,
    public_ports: (u16, u16),
    asked_ports: Option<Vec<(u16, u16)>>,
    asked_hosts: Vec<String>,
    max_services: u32,
    tls: Option<Py<TlsConfig>>,
    visitor_tls: Option<Py<TlsConfig>>,
    filter: Option<f64>,
    visitor_filter: Option<f64>,
    service_filter: Option<f64>,
    allow_visitors: Option<Vec<String>>,
    deny_visitors: Vec<String>,
    visitor_rate: Option<(f64, u32)>,
    max_clients: u32,
    max_handshakes: u32,
    max_visitors: u32,
    max_streams: u32,
    visitor_limits: LimitValues,
    client_limits: LimitValues,
    service_limits: LimitValues,
    lease_file: Option<PathBuf>,
    lease_time: f64,
    danger_shared_leases: bool,
    common: CommonValues,
}

impl ServerValues {
    fn read(self) -> Result<ServerOptions> {
        Ok(ServerOptions {
            host: self.host,
            port: self.port,
            visitor_host: self.visitor_host,
            public_ports: self.public_ports,
            asked_ports: self.asked_ports,
            asked_hosts: self
                .asked_hosts
                .iter()
                .enumerate()
                .map(|(index, host)| address(format!("asked_hosts.{index}"), host))
                .collect::<Result<_>>()?,
            max_services: self.max_services,
            tls: self.tls.map(|config| Arc::clone(&config.get().inner)),
            visitor_tls: self.visitor_tls.map(|config| Arc::clone(&config.get().inner)),
            filter: self.filter.map(seconds("filter_timeout")).transpose()?,
            visitor_filter: self.visitor_filter.map(seconds("filter_timeout")).transpose()?,
            service_filter: self.service_filter.map(seconds("filter_timeout")).transpose()?,
            visitor_rate: self.visitor_rate.map(|(per_second, burst)| Rate { per_second, burst }),
            visitors: VisitorRule {
                allow: self
                    .allow_visitors
                    .map(|entries| addresses("allow_visitors", &entries))
                    .transpose()?,
                deny: addresses("deny_visitors", &self.deny_visitors)?,
            },
            max_clients: self.max_clients,
            max_handshakes: self.max_handshakes,
            max_visitors: self.max_visitors,
            max_streams: self.max_streams,
            visitor_limits: self.visitor_limits.into(),
            client_limits: self.client_limits.into(),
            service_limits: self.service_limits.into(),
            lease_file: self.lease_file,
            shared_leases: self.danger_shared_leases,
            lease_time: seconds("lease_time")(self.lease_time)?,
            common: self.common.read()?,
        })
    }
}

/// A tunnel server. Posts its addresses as an answer under its key, or `"closed"` with the reason; then
/// `"tunnel"` for each event and `"question"` for each client; `"closed"` last.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct TunnelServer {
    inner: Local<Server>,
}

#[pymethods]
impl TunnelServer {
    #[new]
    fn new(
        py: Python<'_>,
        options: ServerValues,
        watched: u8,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let options = options.read().or_raise(py)?;
        let server = Server::start(options, mailbox.shared(py)?, key, watched).or_raise(py)?;
        Ok(Self { inner: Local::new(server) })
    }

    /// Which of the frequent events are wanted: 1 of visitors, 2 of payload, 4 with the bytes.
    fn watch(&self, py: Python<'_>, watched: u8) -> PyResult<()> {
        self.inner.get(py)?.watch(watched);
        Ok(())
    }

    fn stop(&self, py: Python<'_>, drain: f64) -> PyResult<()> {
        self.inner.get(py)?.stop(seconds("drain")(drain).or_raise(py)?);
        Ok(())
    }

    fn wait_closed(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.wait_closed(mailbox.reply(py, key)?);
        Ok(())
    }

    /// Other options for clients and visitors that come; whoever is there keeps what it began with.
    fn reload(&self, py: Python<'_>, options: ServerValues) -> PyResult<()> {
        let options = options.read().or_raise(py)?;
        self.inner.get(py)?.reload(options).or_raise(py)
    }

    /// Every tunnel with what it does now.
    fn tunnels<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let tunnels = self.inner.get(py)?.tunnels();
        tunnels
            .into_iter()
            .map(|TunnelSnapshot { info, connected, stats, services }| {
                let values = stats_values(py, &stats)?;
                values.set_item("services", service_values(py, &services)?)?;
                values.set_item("id", info.id)?;
                values.set_item("client", &info.client)?;
                values.set_item("port", info.port)?;
                values.set_item("negotiated", info.negotiated)?;
                values.set_item("connected", connected)?;
                Ok(values)
            })
            .collect()
    }

    /// Visitors of one tunnel, or of all, at most so many.
    fn visitors<'py>(
        &self,
        py: Python<'py>,
        tunnel: Option<u64>,
        most: usize,
    ) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let visitors = self.inner.get(py)?.visitors(tunnel, most);
        visitors.into_iter().map(|(id, one)| visitor_values(py, id, &one)).collect()
    }

    /// Connections whose client is not let in yet: how many there are, and how many gave way.
    fn handshakes(&self, py: Python<'_>) -> PyResult<(usize, u64)> {
        Ok(self.inner.get(py)?.handshakes())
    }
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ServiceValues {
    name: String,
    host: Option<String>,
    port: u16,
    path: Option<PathBuf>,
    public_ports: Option<(u16, u16)>,
    public_host: Option<String>,
    limits: LimitValues,
}

impl ServiceValues {
    fn read(self) -> Result<Exposed> {
        let service = match (self.path, self.host) {
            (Some(path), _) => Service::Unix(path),
            (None, Some(host)) => Service::Tcp(host, self.port),
            (None, None) => Service::Local(self.port),
        };
        let host = self.public_host.as_deref().map(|host| address("public_host", host)).transpose()?;
        let asked = Asked { name: self.name, ports: self.public_ports, host };
        Ok(Exposed { service, asked, limits: self.limits.into() })
    }
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ClientValues {
    host: String,
    port: u16,
    services: Vec<ServiceValues>,
    credentials: String,
    tls: Option<(Py<TlsConfig>, Option<String>)>,
    lease: Option<String>,
    reconnect: Option<(f64, f64)>,
    dial_timeout: f64,
    send_proxy: Option<String>,
    max_streams: u32,
    limits: LimitValues,
    common: CommonValues,
}

impl ClientValues {
    fn read(self) -> Result<ClientOptions> {
        let pauses = |(first, longest)| -> Result<_> {
            let first = seconds("reconnect_delay")(first)?;
            let longest = seconds("reconnect_delay")(longest)?;
            if first.is_zero() {
                return Err(Error::config("reconnect_delay", "must be above 0"));
            }
            if first > longest {
                return Err(Error::config("reconnect_delay", "the first pause is above the longest"));
            }
            Ok((first, longest))
        };
        let versions = [("v1", Version::V1), ("v2", Version::V2)];
        Ok(ClientOptions {
            host: self.host,
            port: self.port,
            services: self.services.into_iter().map(ServiceValues::read).collect::<Result<_>>()?,
            credentials: self.credentials,
            tls: self.tls.map(|(config, name)| (Arc::clone(&config.get().inner), name)),
            lease: self.lease,
            reconnect: self.reconnect.map(pauses).transpose()?,
            dial_timeout: seconds("dial_timeout")(self.dial_timeout)?,
            send_proxy: self.send_proxy.map(|text| word("send_proxy", &text, &versions)).transpose()?,
            max_streams: self.max_streams,
            limits: self.limits.into(),
            common: self.common.read()?,
        })
    }
}

/// A tunnel client. Posts `"tunnel"` for each event under its key, `"closed"` last.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct TunnelClient {
    inner: Local<Client>,
}

#[pymethods]
impl TunnelClient {
    #[new]
    fn new(
        py: Python<'_>,
        options: ClientValues,
        watched: u8,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let options = options.read().or_raise(py)?;
        let client = Client::start(options, mailbox.shared(py)?, key, watched).or_raise(py)?;
        Ok(Self { inner: Local::new(client) })
    }

    /// Which of the frequent events are wanted: 1 of services, 2 of payload, 4 with the bytes.
    fn watch(&self, py: Python<'_>, watched: u8) -> PyResult<()> {
        self.inner.get(py)?.watch(watched);
        Ok(())
    }

    fn stop(&self, py: Python<'_>, drain: f64) -> PyResult<()> {
        self.inner.get(py)?.stop(seconds("drain")(drain).or_raise(py)?);
        Ok(())
    }

    fn wait_closed(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.wait_closed(mailbox.reply(py, key)?);
        Ok(())
    }

    /// Another service from the next visitor on, all else from the next connection to the server on.
    fn reload(&self, py: Python<'_>, options: ClientValues) -> PyResult<()> {
        let options = options.read().or_raise(py)?;
        self.inner.get(py)?.reload(options).or_raise(py)
    }

    /// The public port and the services while there are some, and what the tunnel does now.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (services, stats) = self.inner.get(py)?.stats();
        let values = stats_values(py, &stats)?;
        values.set_item("port", services.first().map(|service| service.info.port))?;
        values.set_item("services", service_values(py, &services)?)?;
        Ok(values)
    }

    /// Its visitors, at most so many.
    fn visitors<'py>(&self, py: Python<'py>, most: usize) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.inner.get(py)?.visitors(most).iter().map(|one| visitor_values(py, 0, one)).collect()
    }
}

fn visitor_values<'py>(py: Python<'py>, tunnel: u64, one: &VisitorStats) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("tunnel", tunnel)?;
    values.set_item("number", one.number)?;
    values.set_item("address", one.address.map(|address| address.to_string()))?;
    values.set_item("service", &one.service.name)?;
    values.set_item("age", one.age.as_secs_f64())?;
    values.set_item("from_socket", one.from_socket)?;
    values.set_item("to_socket", one.to_socket)?;
    Ok(values)
}

fn stats_values<'py>(py: Python<'py>, stats: &TunnelStats) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("streams", stats.streams)?;
    values.set_item("opened", stats.opened)?;
    values.set_item("sent", stats.sent)?;
    values.set_item("received", stats.received)?;
    values.set_item("sent_rate", stats.sent_rate)?;
    values.set_item("received_rate", stats.received_rate)?;
    values.set_item("held", stats.held)?;
    values.set_item("rtt", stats.rtt.map(|rtt| rtt.as_secs_f64()))?;
    values.set_item("resumes", stats.resumes)?;
    values.set_item("age", stats.age.as_secs_f64())?;
    Ok(values)
}

fn service_values<'py>(py: Python<'py>, services: &[ServiceStats]) -> PyResult<Vec<Bound<'py, PyDict>>> {
    let one = |service: &ServiceStats| {
        let values = PyDict::new(py);
        values.set_item("name", &service.info.name)?;
        values.set_item("port", service.info.port)?;
        values.set_item("visitors", service.visitors)?;
        values.set_item("visits", service.visits)?;
        values.set_item("sent", service.sent)?;
        values.set_item("received", service.received)?;
        values.set_item("refused", service.refused)?;
        values.set_item("paused", service.paused)?;
        values.set_item("cut", service.cut)?;
        Ok(values)
    };
    services.iter().map(one).collect()
}

/// Names, public ports and their hosts.
fn ports(services: &[ServiceInfo]) -> Vec<(&str, u16, Option<&str>)> {
    services.iter().map(|service| (&*service.name, service.port, service.host.as_deref())).collect()
}

/// An event as plain values.
pub(crate) fn notice(py: Python<'_>, notice: Notice) -> PyResult<Bound<'_, PyDict>> {
    let values = PyDict::new(py);
    values.set_item("name", notice.name)?;
    if let Some(info) = &notice.tunnel {
        values.set_item("id", info.id)?;
        values.set_item("client", &info.client)?;
        values.set_item("credentials", &info.credentials)?;
        values.set_item("lease", &info.lease)?;
        values.set_item("tunnel_port", info.port)?;
        values.set_item("negotiated", info.negotiated)?;
        values.set_item("tunnel_services", ports(&info.services))?;
    }
    values.set_item("connection", notice.connection)?;
    values.set_item("session", notice.session)?;
    let stream = notice.stream.map(|stream| (stream.number, stream.visitor, stream.service));
    values.set_item("stream", stream)?;
    values.set_item("services", ports(&notice.services))?;
    values.set_item("bytes", notice.bytes)?;
    values.set_item("payload", notice.payload.map(|copied| payload::to_python(py, &copied)))?;
    values.set_item("port", notice.port)?;
    values.set_item("secure", notice.secure)?;
    values.set_item("seconds", notice.seconds)?;
    values.set_item("error", notice.error.as_ref().map(|error| errors::to_object(py, error)).transpose()?)?;
    Ok(values)
}
