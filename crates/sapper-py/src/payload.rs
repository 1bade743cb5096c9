//! The one door for bytes. Payload passes Python here and nowhere else, where a user opened it:
//!
//! - a transport that has no descriptor ([`ForeignTransport`]);
//! - bytes that were read too far, before the start (`initial_data`) or after the end (`unused_data`),
//!   and keying material.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use sapper_net::bridge::Value;
use sapper_net::endpoint::EndpointSpec;
use sapper_net::stream::foreign::{ForeignHandle, ToSend, foreign};
use sapper_net::{Error, ErrorKind};

use crate::endpoint::Endpoint;
use crate::errors::{self, OrRaise};
use crate::mailbox::Mailbox;
use crate::process::Local;

/// Bytes that wait between Python and the pump, each way: what a socket's buffer would hold.
const CAPACITY: usize = 256 * 1024;

/// Bytes for Python.
pub(crate) fn to_python<'py>(py: Python<'py>, bytes: &[u8]) -> Bound<'py, PyBytes> {
    PyBytes::new(py, bytes)
}

/// The outer side of a stream whose bytes an event loop feeds and fetches.
///
/// It never waits. Each time that it had no room or no bytes, the mailbox gets one message when
/// another call may do better; so at most two wait at a time.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct ForeignTransport {
    handle: Local<ForeignHandle>,
    stream: Mutex<Option<EndpointSpec>>,
}

#[pymethods]
impl ForeignTransport {
    #[new]
    fn new(py: Python<'_>, mailbox: &Mailbox, key: u64, description: String) -> PyResult<Self> {
        let listener = mailbox.shared(py)?;
        let notify = move || listener.done(key, Ok(Value::Unit));
        let (stream, handle) = foreign(CAPACITY, description, notify);
        let spec = EndpointSpec::Stream(Box::new(stream));
        Ok(Self { handle: Local::new(handle), stream: Mutex::new(Some(spec)) })
    }

    /// The pump's end of it; once.
    fn endpoint(&self, py: Python<'_>) -> PyResult<Endpoint> {
        let spec = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        let spec = spec.ok_or_else(|| Error::new(ErrorKind::ApiMisuse, "the endpoint was taken already"));
        Ok(Endpoint::new(spec.or_raise(py)?))
    }

    /// Hands over received bytes; how many fitted.
    fn push_received(&self, py: Python<'_>, data: PyBackedBytes) -> PyResult<usize> {
        self.handle.get(py)?.push_received(&data).or_raise(py)
    }

    /// The transport received its end.
    fn push_eof(&self, py: Python<'_>) -> PyResult<()> {
        self.handle.get(py)?.push_eof();
        Ok(())
    }

    /// The transport was lost.
    fn push_lost(&self, py: Python<'_>, message: String, errno: Option<i32>) -> PyResult<()> {
        self.handle.get(py)?.push_lost(message, errno);
        Ok(())
    }

    /// Bytes to send: none (`None`), some, or the end (`b""`). An error breaks the transport off.
    fn take_to_send<'py>(&self, py: Python<'py>, max_bytes: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut buffer = vec![0; max_bytes.clamp(1, CAPACITY)];
        match self.handle.get(py)?.take_to_send(&mut buffer) {
            ToSend::Bytes(n) => Ok(Some(to_python(py, &buffer[..n]))),
            ToSend::Eof => Ok(Some(to_python(py, b""))),
            ToSend::Nothing => Ok(None),
            ToSend::Broken(error) => Err(errors::to_py(py, &error)),
        }
    }
}
