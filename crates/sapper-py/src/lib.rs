//! The binding, module `sapper._native`: it converts, and does nothing else.
//!
//! The map of the module is [`_native`]; its types are declared in `python/sapper/_native.pyi`. Only
//! the bindings know Python; what they convert alike is in `sapper-seam`. No I/O thread takes the
//! interpreter's lock: what they have to say goes through a [`mailbox`], and payload through [`payload`]
//! alone.

mod bridge;
mod endpoint;
mod listener;
mod mailbox;
mod payload;
mod proxy;
mod testing;
mod tls;
mod tunnel;
mod values;

use pyo3::pymodule;
use sapper_seam::{errors, log, process};

#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::bridge::Bridge;
    #[pymodule_export]
    use super::endpoint::Endpoint;
    #[pymodule_export]
    use super::errors::error_kinds;
    #[pymodule_export]
    use super::listener::{Arrival, Listener};
    #[pymodule_export]
    use super::log::take_log;
    #[pymodule_export]
    use super::mailbox::{Mailbox, Question};
    #[pymodule_export]
    use super::payload::{ForeignTransport, StreamDoor};
    #[pymodule_export]
    use super::proxy::{Proxy, inherited_sockets};
    #[pymodule_export]
    use super::testing::{Load, dev_certificates, handshake_pair_seconds, live_tasks};
    #[pymodule_export]
    use super::tls::{TlsConfig, TlsWatch, dev_authority, dev_issue, end_point_hash};
    #[pymodule_export]
    use super::tunnel::{TunnelClient, TunnelServer};
    #[pymodule_export]
    use super::values::describe_certificate;

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // the name that Python gives it
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        sapper_net::log::install();
        Ok(())
    }
}
