//! TLS configuration: a dictionary of plain options becomes a parsed, shared [`config::TlsConfig`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use sapper_net::Result;
use sapper_net::bridge::{ControlMailbox, Event};
use sapper_net::tls::Role;
use sapper_net::tls::config;
use sapper_net::tls::dev_cert::DevAuthority;
use sapper_net::tls::options::{FindPsk, Secret};
use sapper_net::tls::reload;
use sapper_seam::tls::TlsValues;
use sapper_seam::values::seconds;
pub(crate) use sapper_seam::values::word;

use crate::errors::OrRaise;
use crate::mailbox::Mailbox;
use crate::process::Local;

/// Parsed once, shared by any number of connections.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct TlsConfig {
    pub(crate) inner: Arc<config::TlsConfig>,
}

/// The configuration, whether we are the server, and the name to check (clients).
pub(crate) type TlsSide = (Py<TlsConfig>, bool, Option<String>);

/// The role that a [`TlsSide`] speaks of.
pub(crate) fn role(server_side: bool, server_name: Option<String>) -> Role {
    if server_side { Role::Server } else { Role::Client { server_name } }
}

#[pymethods]
impl TlsConfig {
    #[new]
    fn new(py: Python<'_>, options: TlsValues) -> PyResult<Self> {
        let lookup = match &options.psk_lookup {
            Some(asked) => {
                let (mailbox, key, deadline): (Py<Mailbox>, u64, f64) = asked.extract(py)?;
                let deadline = seconds("timeout")(deadline).or_raise(py)?;
                let lookup = MailboxLookup { mailbox: mailbox.get().shared(py)?, key, deadline };
                Some(Arc::new(lookup) as Arc<dyn FindPsk>)
            }
            None => None,
        };
        let options = options.read(lookup).or_raise(py)?;
        // Key parsing and roots take milliseconds: nobody else has to wait for that.
        let config = py.detach(|| config::TlsConfig::new(&options)).or_raise(py)?;
        Ok(Self { inner: Arc::new(config) })
    }

    /// Which library does the handshakes: `"rustls"` or `"openssl"`.
    #[getter]
    fn engine(&self) -> &'static str {
        self.inner.engine_name()
    }

    /// Raises what is wrong with it for a server, before there is a connection.
    fn check_server(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.check(&Role::Server)).or_raise(py)
    }

    /// The same with these application protocols, reloaded with this one.
    fn with_alpn(&self, py: Python<'_>, alpn: Vec<PyBackedBytes>) -> PyResult<Self> {
        let alpn: Vec<_> = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let inner = py.detach(|| self.inner.with_alpn(&alpn)).or_raise(py)?;
        Ok(Self { inner })
    }

    /// Reads the files again; whether anything has changed.
    fn reload(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.inner.reload()).or_raise(py)
    }
}

/// Asks a listener for the keys of clients, and tells it when it is not needed any more.
struct MailboxLookup {
    mailbox: Arc<ControlMailbox>,
    key: u64,
    deadline: Duration,
}

impl FindPsk for MailboxLookup {
    fn find(&self, identity: &[u8]) -> Option<Secret> {
        self.mailbox.ask_for_key(self.key, identity, self.deadline)
    }
}

impl Drop for MailboxLookup {
    fn drop(&mut self) {
        self.mailbox.last(self.key, Event::Released, []);
    }
}

/// The channel binding `tls-server-end-point` of a server's certificate (DER).
#[pyfunction]
pub(crate) fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    sapper_net::tls::server_end_point(certificate)
}

/// Certificate and key, in PEM.
type Pair<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>);

/// Makes an authority for development that is valid for so many seconds.
#[pyfunction]
pub(crate) fn dev_authority(py: Python<'_>, valid: f64) -> PyResult<Pair<'_>> {
    let valid = seconds("valid")(valid).or_raise(py)?;
    let made = py.detach(|| DevAuthority::make(valid)).or_raise(py)?;
    Ok((PyBytes::new(py, made.certificate.as_bytes()), PyBytes::new(py, made.key.expose())))
}

/// A certificate of such an authority: chain and key, its names, and when it ends (seconds since the epoch).
#[pyfunction]
pub(crate) fn dev_issue<'py>(
    py: Python<'py>,
    authority: (PyBackedBytes, PyBackedBytes),
    names: Vec<String>,
    valid: f64,
) -> PyResult<(Pair<'py>, Vec<String>, u64)> {
    let valid = seconds("valid")(valid).or_raise(py)?;
    let work = || DevAuthority::read(&authority.0, &authority.1)?.issue(&names, valid);
    let made = py.detach(work).or_raise(py)?;
    let chain = PyBytes::new(py, made.identity.chain.as_bytes());
    Ok(((chain, PyBytes::new(py, made.identity.key.expose())), made.names, made.expires))
}

/// Reloads a configuration when its files change, and tells of it: `"reloaded"` with `None` or an error.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct TlsWatch {
    inner: Local<Mutex<Option<reload::Watch>>>,
}

#[pymethods]
impl TlsWatch {
    #[new]
    fn new(py: Python<'_>, config: &TlsConfig, mailbox: &Mailbox, key: u64) -> PyResult<Self> {
        let mailbox = mailbox.shared(py)?;
        let tell = move |result: Result<()>| mailbox.event(key, Event::Reloaded(result.err()));
        let watch = reload::Watch::start(Arc::clone(&config.inner), tell).or_raise(py)?;
        Ok(Self { inner: Local::new(Mutex::new(Some(watch))) })
    }

    /// Ends it; nothing is told afterwards.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let watch = self.inner.get(py)?.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(watch));
        Ok(())
    }
}
