//! The one door for bytes. Payload passes Python here and nowhere else, where a user opened it:
//!
//! - a stream that a program reads and writes itself ([`StreamDoor`]);
//! - a transport that has no descriptor ([`ForeignTransport`]);
//! - events of a tunnel that were asked for with `payload=True`: a bounded copy;
//! - bytes that were read too far, before the start (`initial_data`) or after the end (`unused_data`),
//!   and keying material.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use sapper_net::bridge::Value;
use sapper_net::endpoint::EndpointSpec;
use sapper_net::stream::door::{Door, Read};
use sapper_net::stream::foreign::{ForeignHandle, ToSend, foreign};
use sapper_net::{Error, ErrorKind};

use crate::endpoint::{Endpoint, field_name};
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
    fn endpoint(&self, py: Python<'_>, field: &str) -> PyResult<Endpoint> {
        let field = field_name(field).or_raise(py)?;
        let spec = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        let spec = spec.ok_or_else(|| Error::new(ErrorKind::ApiMisuse, "the endpoint was taken already"));
        Ok(Endpoint::new(spec.or_raise(py)?, field))
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

    /// The transport is closed and takes no more; what it has received still counts.
    fn stop_sending(&self, py: Python<'_>) -> PyResult<()> {
        self.handle.get(py)?.stop_sending(0);
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

/// A program's half of a stream in memory. No call waits; the mailbox gets one message when a call that
/// found nothing, or no room, may do better.
///
/// A byte is copied once between here and a Python object: out of the half's memory, or into it.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct StreamDoor {
    door: Local<Arc<Door>>,
    far: Mutex<Option<EndpointSpec>>,
}

#[pymethods]
impl StreamDoor {
    #[new]
    fn new(py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<Self> {
        let (door, far) = Door::new(CAPACITY, notify(py, mailbox, key)?);
        let far = Some(EndpointSpec::Stream(Box::new(far)));
        Ok(Self { door: Local::new(door), far: Mutex::new(far) })
    }

    /// Two that are each other's peer.
    #[staticmethod]
    fn pair(py: Python<'_>, mailbox: &Mailbox, key: u64, other_key: u64) -> PyResult<(Self, Self)> {
        let (one, other) = Door::pair(CAPACITY, notify(py, mailbox, key)?, notify(py, mailbox, other_key)?);
        let door = |door| Self { door: Local::new(door), far: Mutex::new(None) };
        Ok((door(one), door(other)))
    }

    /// The other half, for a bridge; once.
    fn far_end(&self, py: Python<'_>) -> PyResult<Endpoint> {
        let spec = self.far.lock().unwrap_or_else(PoisonError::into_inner).take();
        let spec = spec.ok_or_else(|| Error::new(ErrorKind::ApiMisuse, "the other half was taken already"));
        Ok(Endpoint::new(spec.or_raise(py)?, "sink"))
    }

    /// This half, for a bridge: it is the bridge's from its opening on.
    fn near_end(&self, py: Python<'_>, field: &str) -> PyResult<Endpoint> {
        let field = field_name(field).or_raise(py)?;
        Ok(Endpoint::new(EndpointSpec::Door(Arc::clone(self.door.get(py)?)), field))
    }

    /// Bytes that a read would give now.
    fn available(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.door.get(py)?.available())
    }

    /// What is there, at most `max_bytes`: nothing (`None`), bytes, or the end (`b""`).
    fn read<'py>(&self, py: Python<'py>, max_bytes: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let door = self.door.get(py)?;
        // Only we take bytes out, so what is there now is there in the next call, unless it was reset.
        let room = door.available().min(max_bytes);
        if room == 0 {
            let mut one = [0];
            return Ok(match door.read(&mut one).or_raise(py)? {
                Read::Bytes(n) => Some(to_python(py, &one[..n])),
                Read::Nothing => None,
                Read::End => Some(to_python(py, b"")),
            });
        }
        let mut found = Read::Nothing;
        let bytes = PyBytes::new_with(py, room, |buf| {
            found = door.read(buf).or_raise(py)?;
            Ok(())
        })?;
        Ok(match found {
            Read::Bytes(n) if n == room => Some(bytes),
            Read::Bytes(n) => Some(to_python(py, &bytes.as_bytes()[..n])),
            Read::Nothing => None,
            Read::End => Some(to_python(py, b"")),
        })
    }

    /// The same into a writable buffer; how many bytes, 0 at the end, `None` for nothing.
    fn read_into(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        let buffer = contiguous(py, buffer, true)?;
        let (start, len) = (buffer.buf_ptr().cast::<u8>(), buffer.len_bytes());
        if len == 0 {
            return Err(Error::config("buffer", "has no room")).or_raise(py);
        }
        // SAFETY: the exporter keeps `len` contiguous writable bytes there until the buffer is released,
        // which is after the last use. Nothing here runs Python code meanwhile.
        let room = unsafe { std::slice::from_raw_parts_mut(start, len) };
        Ok(match self.door.get(py)?.read(room).or_raise(py)? {
            Read::Bytes(n) => Some(n),
            Read::Nothing => None,
            Read::End => Some(0),
        })
    }

    /// Writes the front of `data`; how many bytes there was room for.
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        let buffer = contiguous(py, data, false)?;
        let (start, len) = (buffer.buf_ptr().cast::<u8>(), buffer.len_bytes());
        if len == 0 {
            return Ok(0);
        }
        // SAFETY: the exporter keeps `len` contiguous bytes there until the buffer is released, which is
        // after the last use. Nothing here runs Python code meanwhile.
        let bytes = unsafe { std::slice::from_raw_parts(start, len) };
        self.door.get(py)?.write(bytes).or_raise(py)
    }

    /// No more bytes follow.
    fn write_eof(&self, py: Python<'_>) -> PyResult<()> {
        self.door.get(py)?.write_eof().or_raise(py)
    }

    /// Both directions are broken off.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        self.door.get(py)?.reset();
        Ok(())
    }

    /// Nothing more will be read, and whoever writes fails with that.
    fn stop_reading(&self, py: Python<'_>) -> PyResult<()> {
        self.door.get(py)?.stop_reading();
        Ok(())
    }

    /// Nothing more will be read.
    fn abandon_reading(&self, py: Python<'_>) -> PyResult<()> {
        self.door.get(py)?.abandon_reading();
        Ok(())
    }
}

fn notify(py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<impl Fn() + Send + Sync + 'static> {
    let listener = mailbox.shared(py)?;
    Ok(move || listener.done(key, Ok(Value::Unit)))
}

/// A view of an object's bytes, which lie in one piece.
fn contiguous(py: Python<'_>, object: &Bound<'_, PyAny>, writable: bool) -> PyResult<PyUntypedBuffer> {
    let wrong = |why: &str| Err(Error::config("data", why).with_reason("wrong_type")).or_raise(py);
    let Ok(buffer) = PyUntypedBuffer::get(object) else {
        return wrong("must be bytes, or a buffer of bytes");
    };
    if !buffer.is_c_contiguous() {
        return wrong("must lie in one piece");
    }
    if writable && buffer.readonly() {
        return wrong("must be writable");
    }
    Ok(buffer)
}
