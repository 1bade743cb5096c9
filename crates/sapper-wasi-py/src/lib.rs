//! The binding of the host for wasm guests, module `sapper_wasi._native`: it converts, and does nothing
//! else. Its types are declared in `wasi/python/sapper_wasi/_native.pyi`.
//!
//! Options come as plain values (TLS configurations too: handles do not cross two native modules), and a
//! run is a handle that says when it is over. The guest's payload passes no line of this.

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use sapper_net::bridge::ControlMailbox;
use sapper_net::tls::config;
use sapper_seam::errors::{OrRaise, to_object};
use sapper_seam::log;
use sapper_seam::process::Local;
use sapper_seam::tls::TlsValues;
use sapper_seam::values::{seconds, word};
use sapper_wasi::tls::Configurations;
use sapper_wasi::{Captured, Folder, Options, Outcome, Output};

/// How long one wait holds without looking for signals.
const LOOK_FOR_SIGNALS: Duration = Duration::from_millis(50);

#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::log::take_log;
    #[pymodule_export]
    use super::{Guest, LogWaits, Run, TlsConfig};

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // the name that Python gives it
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        // The other module's copy of who warns is another one.
        sapper_net::log::install();
        Ok(())
    }
}

/// Says when warnings wait to be taken by `take_log`.
#[pyclass(frozen, module = "sapper_wasi._native")]
struct LogWaits {
    inner: Local<Arc<ControlMailbox>>,
}

#[pymethods]
impl LogWaits {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let mailbox = ControlMailbox::new().or_raise(py)?;
        sapper_net::log::hear(&mailbox, 0);
        Ok(Self { inner: Local::new(mailbox) })
    }

    /// A descriptor that is readable while some wait; it stays ours.
    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        Ok(self.inner.get(py)?.as_fd().as_raw_fd())
    }

    /// Is not readable any more, until others wait.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.get(py)?.drain();
        Ok(())
    }
}

/// A TLS configuration, parsed.
#[pyclass(frozen, module = "sapper_wasi._native")]
struct TlsConfig {
    inner: Arc<config::TlsConfig>,
}

#[pymethods]
impl TlsConfig {
    #[new]
    fn new(py: Python<'_>, options: TlsValues) -> PyResult<Self> {
        let options = options.read(None).or_raise(py)?;
        let config = py.detach(|| config::TlsConfig::new(&options)).or_raise(py)?;
        Ok(Self { inner: Arc::new(config) })
    }

    /// Reads the files again; whether anything has changed.
    fn reload(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.inner.reload()).or_raise(py)
    }
}

/// A compiled component.
#[pyclass(frozen, module = "sapper_wasi._native")]
struct Guest {
    inner: Arc<sapper_wasi::Guest>,
}

#[pymethods]
impl Guest {
    #[new]
    fn new(py: Python<'_>, bytes: PyBackedBytes) -> PyResult<Self> {
        let inner = py.detach(|| sapper_wasi::Guest::new(bytes.to_vec())).or_raise(py)?;
        Ok(Self { inner })
    }

    /// Which WASI its `run` is of: `"0.2"` or `"0.3"`.
    #[getter]
    fn wasi(&self) -> &'static str {
        self.inner.wasi()
    }
}

/// Options as `sapper_wasi` gives them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct RunValues {
    args: Vec<String>,
    env: Vec<(String, String)>,
    stdin: Option<PyBackedBytes>,
    stdout: String,
    stderr: String,
    capture: usize,
    dirs: Vec<(PathBuf, String, bool)>,
    allow_net: Vec<String>,
    tls: Vec<(String, Py<TlsConfig>)>,
    handshake_timeout: f64,
    timeout: Option<f64>,
    fuel: Option<u64>,
    memory: usize,
}

impl RunValues {
    fn read(self) -> sapper_net::Result<Options> {
        let output = |field, text: &str| {
            let words = [
                ("inherit", Output::Inherit),
                ("discard", Output::Discard),
                ("capture", Output::Capture(self.capture)),
            ];
            word(field, text, &words)
        };
        let configurations = self.tls.iter().map(|(name, one)| (name.clone(), Arc::clone(&one.get().inner)));
        Ok(Options {
            stdout: output("stdout", &self.stdout)?,
            stderr: output("stderr", &self.stderr)?,
            tls: Configurations::new(configurations.collect())?,
            args: self.args,
            env: self.env,
            stdin: self.stdin.map(|bytes| bytes.to_vec()),
            folders: self
                .dirs
                .into_iter()
                .map(|(host, guest, writable)| Folder { host, guest, writable })
                .collect(),
            allow_net: self.allow_net.iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?,
            handshake_timeout: seconds("handshake_timeout")(self.handshake_timeout)?,
            timeout: self.timeout.map(seconds("timeout")).transpose()?,
            fuel: self.fuel,
            memory: self.memory,
        })
    }
}

/// What a run's end is told with: a word, a code or a text or an error, both outputs, the fuel.
type Report<'py> = (
    &'static str,
    Option<i32>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyBytes>>,
    Option<Bound<'py, PyBytes>>,
    Option<u64>,
);

/// A guest that runs, or has run.
#[pyclass(frozen, module = "sapper_wasi._native")]
struct Run {
    inner: Local<sapper_wasi::Run>,
}

#[pymethods]
impl Run {
    /// Starts it.
    #[new]
    fn new(py: Python<'_>, guest: &Guest, options: RunValues) -> PyResult<Self> {
        let options = options.read().or_raise(py)?;
        let run = py.detach(|| sapper_wasi::start(&guest.inner, options)).or_raise(py)?;
        Ok(Self { inner: Local::new(run) })
    }

    /// A descriptor that is readable when it is over; it stays ours.
    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        Ok(self.inner.get(py)?.ended().as_raw_fd())
    }

    /// Ends the guest at its next tick or wait.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.get(py)?.cancel();
        Ok(())
    }

    /// Waits until it is over, or warnings wait; signals are served meanwhile. Whether it is over.
    fn wait(&self, py: Python<'_>, log: &LogWaits) -> PyResult<bool> {
        let (run, log) = (self.inner.get(py)?, log.inner.get(py)?);
        while !py.detach(|| run.wait(LOOK_FOR_SIGNALS)) {
            py.check_signals()?;
            if log.wait(Some(Duration::ZERO)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How it ended; once, and `None` before that.
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Option<Report<'py>>> {
        let Some(report) = self.inner.get(py)?.report() else { return Ok(None) };
        let (word, code, detail) = match report.outcome {
            Outcome::Exited(code) => ("exited", Some(code), None),
            Outcome::Trapped(text) => ("trapped", None, Some(text.into_pyobject(py)?.into_any())),
            Outcome::Cancelled => ("cancelled", None, None),
            Outcome::Stopped(error) => ("stopped", None, Some(to_object(py, &error)?)),
        };
        let bytes = |kept: Captured| kept.map(|kept| PyBytes::new(py, &kept));
        Ok(Some((word, code, detail, bytes(report.stdout), bytes(report.stderr), report.fuel)))
    }
}
