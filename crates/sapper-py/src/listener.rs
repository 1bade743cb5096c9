//! The listener's handle, and what arrives at it. Accepting is native; who comes in is told through a
//! mailbox, one message each.

use std::ffi::OsString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sapper_net::bridge::{ControlMailbox, Event, Value};
use sapper_net::endpoint::EndpointSpec;
use sapper_net::stream::address::Address;
use sapper_net::stream::fd::SocketOptions;
use sapper_net::stream::listen::service::{self, Pending, Service, ServiceAddress, ServiceEvents};
use sapper_net::stream::listen::{AcceptedSocket, ListenAddress, ListenOptions};
use sapper_net::{Error, ErrorKind, Result};

use crate::endpoint::{Endpoint, duplicate, unix_address};
use crate::errors::OrRaise;
use crate::mailbox::Mailbox;
use crate::process::Local;
use sapper_seam::values::seconds;

/// Accepts connections until it is closed or dropped. Posts under its key: its addresses as an answer,
/// or `"closed"` with the reason; then an [`Arrival`] for each connection; `"closed"` last.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Listener {
    service: Local<Service>,
}

/// Options as `sapper.tls.listen` gives them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ListenerValues {
    backlog: u16,
    max_connections: u32,
    max_handshakes: u32,
    reuse_port: bool,
    unix_mode: Option<u32>,
    replace_stale: bool,
    keepalive: Option<f64>,
}

#[pymethods]
impl Listener {
    /// At a host (`None`: every address) and a port.
    #[staticmethod]
    fn tcp(
        py: Python<'_>,
        host: Option<String>,
        port: u16,
        options: ListenerValues,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let address = ServiceAddress::Bind(ListenAddress::Tcp { host, port });
        Self::start(py, address, options, mailbox, key)
    }

    /// At a path, or with `@` in front an abstract name.
    #[staticmethod]
    fn unix(
        py: Python<'_>,
        path: OsString,
        options: ListenerValues,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let address = ServiceAddress::Bind(ListenAddress::Unix(unix_address(path)));
        Self::start(py, address, options, mailbox, key)
    }

    /// At sockets that listen already; each is duplicated.
    #[staticmethod]
    fn adopt(
        py: Python<'_>,
        fds: Vec<i64>,
        options: ListenerValues,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let fds = fds.into_iter().map(|fd| duplicate(fd, "address")).collect::<Result<_>>().or_raise(py)?;
        Self::start(py, ServiceAddress::Adopt(fds, "address"), options, mailbox, key)
    }

    /// Accepts no more; what was accepted goes on.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.service.get(py)?.close();
        Ok(())
    }

    /// Counters of one moment.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.service.get(py)?.stats();
        let values = PyDict::new(py);
        values.set_item("accepted", stats.accepted)?;
        values.set_item("aborted", stats.aborted)?;
        values.set_item("limit_pauses", stats.limit_pauses)?;
        values.set_item("exhausted_pauses", stats.exhausted_pauses)?;
        values.set_item("pending", stats.pending)?;
        Ok(values)
    }
}

impl Listener {
    fn start(
        py: Python<'_>,
        address: ServiceAddress,
        values: ListenerValues,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let mailbox = mailbox.shared(py)?;
        let max_pending = values.max_handshakes;
        let options = values.read().or_raise(py)?;
        let service = Service::start(address, options, max_pending, Heard { mailbox, key });
        Ok(Self { service: Local::new(service.or_raise(py)?) })
    }
}

impl ListenerValues {
    fn read(self) -> Result<ListenOptions> {
        let keepalive = self.keepalive.map(seconds("keepalive")).transpose()?;
        if keepalive.is_some_and(|idle| idle < Duration::from_secs(1)) {
            return Err(Error::config("keepalive", "must be at least one second"));
        }
        Ok(ListenOptions {
            backlog: self.backlog,
            max_connections: self.max_connections,
            dual_stack: false,
            reuse_port: self.reuse_port,
            unix_mode: self.unix_mode,
            replace_stale: self.replace_stale,
            transparent: false,
            socket: SocketOptions { keepalive, ..SocketOptions::default() },
        })
    }
}

/// Posts what a service says.
struct Heard {
    mailbox: Arc<ControlMailbox>,
    key: u64,
}

impl ServiceEvents for Heard {
    fn listening(&mut self, addresses: Vec<Address>) {
        self.mailbox.done(self.key, Ok(Value::Addresses(addresses)));
    }

    fn arrived(&mut self, arrival: service::Arrival) {
        self.mailbox.done(self.key, Ok(Value::Arrival(Box::new(arrival))));
    }

    fn full(&mut self) {
        self.mailbox.done(self.key, Ok(Value::Unit));
    }

    fn closed(&mut self, error: Option<Error>) {
        self.mailbox.last(self.key, Event::Closed(error), []);
    }
}

/// A connection that was accepted. Dropped, it is closed.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Arrival {
    peer: String,
    network: u64,
    local: String,
    socket: Local<Mutex<Option<AcceptedSocket>>>,
    pending: Mutex<Option<Pending>>,
}

impl Arrival {
    pub(crate) fn new(arrival: service::Arrival) -> Self {
        let (socket, pending) = arrival.into_parts();
        Self {
            peer: socket.peer.to_string(),
            network: socket.peer.network(),
            local: socket.local.to_string(),
            socket: Local::new(Mutex::new(Some(socket))),
            pending: Mutex::new(Some(pending)),
        }
    }
}

#[pymethods]
impl Arrival {
    /// Who connected.
    #[getter]
    fn peer(&self) -> &str {
        &self.peer
    }

    /// Who that is for limits: its address, of IPv6 the /64 that one sender has; all on this machine are one.
    #[getter]
    fn network(&self) -> u64 {
        self.network
    }

    /// To which of our addresses.
    #[getter]
    fn local(&self) -> &str {
        &self.local
    }

    /// The connection, for a bridge; once.
    fn endpoint(&self, py: Python<'_>) -> PyResult<Endpoint> {
        let socket = self.socket.get(py)?.lock().unwrap_or_else(PoisonError::into_inner).take();
        let socket =
            socket.ok_or_else(|| Error::new(ErrorKind::ApiMisuse, "the connection was taken already"));
        Ok(Endpoint::new(EndpointSpec::Accepted(socket.or_raise(py)?), "socket"))
    }

    /// It got on, or failed: it is no longer among those whose number is bounded.
    fn done(&self) {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
