//! The mailbox and what comes out of it: answers, events, policy questions.
//!
//! An event loop watches [`Mailbox::fileno`] and takes everything with [`Mailbox::drain`]; a thread
//! without a loop blocks in [`Mailbox::wait`] with the interpreter's lock released.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict};
use sapper_net::bridge::{ControlMailbox, Event, Reply, Value};
use sapper_net::log;
use sapper_net::mailbox::{self, Body, Subject};
use sapper_net::tls::options::Secret;
use sapper_net::{Error, ErrorKind};
use sapper_seam::values::seconds;

use crate::errors::{self, OrRaise};
use crate::listener::Arrival;
use crate::payload;
use crate::process::Local;
use crate::proxy;
use crate::tunnel;
use crate::values;

/// One listener's queue of messages.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Mailbox {
    /// `None` once it is closed: an exception's traceback may keep the object, and must not keep the
    /// descriptor.
    inner: Local<Mutex<Option<Arc<ControlMailbox>>>>,
}

#[pymethods]
impl Mailbox {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let inner = ControlMailbox::new().or_raise(py)?;
        Ok(Self { inner: Local::new(Mutex::new(Some(inner))) })
    }

    /// The descriptor that is readable while messages wait.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        Ok(self.shared(py)?.as_fd().as_raw_fd())
    }

    /// Takes all messages: key, tag and value of each.
    fn drain(&self, py: Python<'_>) -> PyResult<Vec<(u64, &'static str, Py<PyAny>)>> {
        let Some(inner) = self.open(py)? else { return Ok(Vec::new()) };
        inner
            .drain()
            .into_iter()
            .map(|message| {
                let (tag, value) = body_to_py(py, message.body)?;
                Ok((message.key, tag, value))
            })
            .collect()
    }

    /// Blocks until a message waits, the mailbox is closed, the time is over or a signal came (whose
    /// handler then runs here). Whether there is something to drain.
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let timeout = timeout.map(seconds("timeout")).transpose().or_raise(py)?;
        let Some(inner) = self.open(py)? else { return Ok(false) };
        let ready = py.detach(|| inner.wait(timeout));
        py.check_signals()?;
        Ok(ready)
    }

    /// Has this told under `key` whenever lines for the program's log wait.
    fn hear_log(&self, py: Python<'_>, key: u64) -> PyResult<()> {
        log::hear(&self.shared(py)?, key);
        Ok(())
    }

    /// Takes no more messages and ends every wait; questions that were not answered mean no.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.lock(py)?.take();
        if let Some(inner) = inner {
            inner.close();
        }
        Ok(())
    }

    /// Whether it was closed.
    #[getter]
    fn closed(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.lock(py)?.is_none())
    }
}

impl Mailbox {
    fn lock(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, Option<Arc<ControlMailbox>>>> {
        Ok(self.inner.get(py)?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open(&self, py: Python<'_>) -> PyResult<Option<Arc<ControlMailbox>>> {
        Ok(self.lock(py)?.clone())
    }

    /// The mailbox itself, for what posts more than one message.
    pub(crate) fn shared(&self, py: Python<'_>) -> PyResult<Arc<ControlMailbox>> {
        let closed = || Error::new(ErrorKind::Closed, "the mailbox is closed");
        self.open(py)?.ok_or_else(closed).or_raise(py)
    }

    /// Where an operation's answer, or a subscription's messages, go.
    pub(crate) fn reply(&self, py: Python<'_>, key: u64) -> PyResult<Reply> {
        Ok(Reply::new(self.shared(py)?, key))
    }
}

fn body_to_py(py: Python<'_>, body: Body<Value, Event>) -> PyResult<(&'static str, Py<PyAny>)> {
    Ok(match body {
        Body::Done(Ok(value)) => ("done", value_to_py(py, value)?),
        Body::Done(Err(error)) => ("error", errors::to_object(py, &error)?.unbind()),
        Body::Event(Event::Started) => ("started", py.None()),
        Body::Event(Event::Closed(None)) => ("closed", py.None()),
        Body::Event(Event::Closed(Some(error))) => ("closed", errors::to_object(py, &error)?.unbind()),
        Body::Event(Event::Released) => ("released", py.None()),
        Body::Event(Event::Reloaded(None)) => ("reloaded", py.None()),
        Body::Event(Event::Reloaded(Some(error))) => ("reloaded", errors::to_object(py, &error)?.unbind()),
        Body::Event(Event::Log) => ("log", py.None()),
        Body::Event(Event::Proxy(event)) => ("proxy", proxy::event(py, *event)?.into_any().unbind()),
        Body::Event(Event::Tunnel(notice)) => ("tunnel", tunnel::notice(py, *notice)?.into_any().unbind()),
        Body::EventsLost(n) => ("lost", n.into_pyobject(py)?.into_any().unbind()),
        Body::Question(question) => {
            ("question", Question::new(question).into_pyobject(py)?.into_any().unbind())
        }
    })
}

fn value_to_py(py: Python<'_>, value: Value) -> PyResult<Py<PyAny>> {
    Ok(match value {
        Value::Unit => py.None(),
        Value::Handshakes(both) => values::handshakes(py, &both)?.into_py_any(py)?,
        Value::CdTunnel(parameters) => values::cdtunnel(py, &parameters)?.into_any().unbind(),
        Value::Bytes(bytes) => payload::to_python(py, &bytes).into_any().unbind(),
        Value::Addresses(addresses) => {
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().into_py_any(py)?
        }
        Value::Arrival(arrival) => Arrival::new(*arrival).into_pyobject(py)?.into_any().unbind(),
    })
}

/// A question. Dropped without an answer it means no.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Question {
    subject: Subject,
    inner: Mutex<Option<mailbox::Question>>,
}

impl Question {
    fn take(&self) -> Option<mailbox::Question> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn new(question: mailbox::Question) -> Self {
        Self { subject: question.subject.clone(), inner: Mutex::new(Some(question)) }
    }
}

#[pymethods]
impl Question {
    /// What it is about, as plain values.
    #[getter]
    fn subject<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let subject = PyDict::new(py);
        match &self.subject {
            Subject::Peer { certificates, psk_identity, address } => {
                let certificates: Vec<_> = certificates.iter().map(|der| PyBytes::new(py, der)).collect();
                subject.set_item("certificates", certificates)?;
                subject.set_item("psk_identity", psk_identity)?;
                subject.set_item("address", address)?;
            }
            Subject::Psk { identity } => subject.set_item("identity", PyBytes::new(py, identity))?,
            Subject::TunnelClient { id, credentials, address } => {
                subject.set_item("id", id)?;
                subject.set_item("credentials", credentials)?;
                subject.set_item("address", address)?;
            }
            Subject::TunnelServices { id, credentials, client, lease, services } => {
                subject.set_item("id", id)?;
                subject.set_item("credentials", credentials)?;
                subject.set_item("client", client)?;
                subject.set_item("lease", lease)?;
                subject.set_item("tunnel_port", 0)?;
                subject.set_item("negotiated", true)?;
                subject.set_item("asked", services.clone())?;
            }
            Subject::TunnelVisitor {
                id,
                credentials,
                client,
                lease,
                port,
                negotiated,
                services,
                visitor,
            } => {
                subject.set_item("id", id)?;
                subject.set_item("credentials", credentials)?;
                subject.set_item("client", client)?;
                subject.set_item("lease", lease)?;
                subject.set_item("tunnel_port", port)?;
                subject.set_item("negotiated", negotiated)?;
                subject.set_item("tunnel_services", services.clone())?;
                subject.set_item("visitor", visitor)?;
            }
        }
        Ok(subject)
    }

    /// Answers a question for a key once; `False` comes back where nobody waits any more.
    fn answer_key(&self, key: Option<PyBackedBytes>) -> bool {
        self.take().is_some_and(|question| question.answer_key(key.map(|key| Secret::new(&*key))))
    }

    /// Gives no answer: who asked knows at once that there will be none.
    fn give_up(&self) {
        drop(self.take());
    }

    /// Answers once; `False` comes back where nobody waits any more.
    fn answer(&self, yes: bool) -> bool {
        self.take().is_some_and(|question| question.answer(yes))
    }
}
