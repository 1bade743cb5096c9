//! What tests, benches and the demo need of the native side: counts of what is alive, load and its
//! measure, throw-away certificates, handshakes without I/O.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use sapper_net::load::{self, Unit};
use sapper_net::tls::bench::bench_handshake_pair;
use sapper_net::tls::dev_cert::{DevIdentity, dev_certificates as make_certificates};
use sapper_net::{Result, fd, runtime};

use crate::errors::OrRaise;
use crate::process::Local;
use crate::tls::{TlsConfig, word};
use sapper_seam::values::seconds;

/// Native tasks that are alive: a test that leaves one behind shows here.
#[pyfunction]
pub(crate) fn live_tasks() -> usize {
    runtime::live_tasks()
}

/// Certificates that nobody believes: an authority, a server, a client, in PEM.
#[pyfunction]
pub(crate) fn dev_certificates(
    py: Python<'_>,
    names: Vec<String>,
    valid: f64,
) -> PyResult<Bound<'_, PyDict>> {
    let valid = seconds("valid")(valid).or_raise(py)?;
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let made = py.detach(|| make_certificates(&names, valid)).or_raise(py)?;
    let pair = |identity: &DevIdentity| {
        (PyBytes::new(py, identity.chain.as_bytes()), PyBytes::new(py, identity.key.expose()))
    };
    let values = PyDict::new(py);
    values.set_item("authority", PyBytes::new(py, made.authority.as_bytes()))?;
    values.set_item("server", pair(&made.server))?;
    values.set_item("client", pair(&made.client))?;
    Ok(values)
}

/// Does `rounds` handshakes between two engines in memory; seconds for one of them.
#[pyfunction]
pub(crate) fn handshake_pair_seconds(
    py: Python<'_>,
    client: &TlsConfig,
    server: &TlsConfig,
    rounds: u32,
) -> PyResult<f64> {
    let work = || -> Result<Duration> {
        let started = Instant::now();
        for _ in 0..rounds.max(1) {
            bench_handshake_pair(&client.inner, &server.inner)?;
        }
        Ok(started.elapsed() / rounds.max(1))
    };
    Ok(py.detach(work).or_raise(py)?.as_secs_f64())
}

/// A thread that sends stamped units, or receives and measures them.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Load {
    inner: Local<Mutex<load::Load>>,
}

#[pymethods]
impl Load {
    /// Sends `unit`s ("packet", "block") of `size` bytes into a duplicate of `fd`, `rate` a second, or
    /// as many as it takes (0).
    #[staticmethod]
    fn source(py: Python<'_>, fd: i32, unit: &str, size: usize, rate: u64) -> PyResult<Self> {
        let (fd, unit) = checked(fd, unit, size).or_raise(py)?;
        Self::new(py, load::Load::source(fd, unit, rate))
    }

    /// Receives them from a duplicate of `fd`.
    #[staticmethod]
    fn meter(py: Python<'_>, fd: i32, unit: &str, size: usize) -> PyResult<Self> {
        let (fd, unit) = checked(fd, unit, size).or_raise(py)?;
        Self::new(py, load::Load::meter(fd, unit))
    }

    /// Counts until now.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = self.lock(py)?.snapshot();
        let values = PyDict::new(py);
        values.set_item("units", counts.units)?;
        values.set_item("bytes", counts.bytes)?;
        values.set_item("lost", counts.lost)?;
        values.set_item("torn", counts.torn)?;
        values.set_item("latency_p50", counts.latency_p50.as_secs_f64())?;
        values.set_item("latency_p99", counts.latency_p99.as_secs_f64())?;
        values.set_item("latency_max", counts.latency_max.as_secs_f64())?;
        Ok(values)
    }

    /// Ends the thread and waits for that.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner.get(py)?;
        py.detach(|| inner.lock().unwrap_or_else(PoisonError::into_inner).stop());
        Ok(())
    }
}

impl Load {
    fn new(py: Python<'_>, load: Result<load::Load>) -> PyResult<Self> {
        Ok(Self { inner: Local::new(Mutex::new(load.or_raise(py)?)) })
    }

    fn lock(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, load::Load>> {
        Ok(self.inner.get(py)?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn checked(number: i32, unit: &str, size: usize) -> Result<(OwnedFd, Unit)> {
    let unit = word("unit", unit, &[("packet", Unit::Packet(size)), ("block", Unit::Block(size))])?;
    Ok((fd::duplicate(number, "fd")?, unit.check("size")?))
}
