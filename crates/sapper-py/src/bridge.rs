//! The bridge's handle. Every method returns at once; what takes time answers into a mailbox.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyDict;
use sapper_net::bridge::{
    self, BridgeDirection, BridgeOptions, CdTunnelRole, Deadlines, PacketOptions, PolicyOptions, SideOptions,
    SideTls, SwapOptions,
};
use sapper_net::error::Direction;
use sapper_net::port::tap::TapOptions;
use sapper_net::tls::early_data::EarlyData;
use sapper_net::{Error, Result};
use sapper_proto::framing::Framing;
use sapper_proto::upgrade::Upgrade;
use sapper_seam::values::seconds;

use crate::endpoint::Endpoint;
use crate::errors::OrRaise;
use crate::mailbox::Mailbox;
use crate::process::Local;
use crate::tls::{self, TlsSide, word};
use crate::values::{self, CdTunnelValues};

/// One pump between two endpoints.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Bridge {
    inner: Local<bridge::Bridge>,
}

/// Options as `sapper.pump` gives them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct OptionValues {
    direction: String,
    framing: String,
    sink_framing: Option<String>,
    max_packet: usize,
    records_per_write: usize,
    resync: bool,
    connect_timeout: f64,
    accept_timeout: Option<f64>,
    handshake_timeout: f64,
    idle_timeout: Option<f64>,
    policy_timeout: f64,
    upgrade: Option<String>,
    tap: Option<TapValues>,
}

/// What is said of a sink that is swapped in.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct SwapValues {
    sink_framing: Option<String>,
    accept_timeout: Option<f64>,
}

/// A tap as `sapper.pump` gives it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct TapValues {
    path: PathBuf,
    filter: Option<String>,
    max_bytes: Option<u64>,
    snap_len: u32,
}

#[pymethods]
impl Bridge {
    #[new]
    #[pyo3(signature = (transport, transport_tls, transport_data, sink, sink_tls, sink_data, options, asks, early, mailbox, key))]
    #[allow(clippy::too_many_arguments)] // one call, from one place
    fn new(
        py: Python<'_>,
        transport: &Endpoint,
        transport_tls: Option<TlsSide>,
        transport_data: PyBackedBytes,
        sink: &Endpoint,
        sink_tls: Option<TlsSide>,
        sink_data: PyBackedBytes,
        options: OptionValues,
        asks: bool,
        early: Option<(PyBackedBytes, bool)>,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<Self> {
        let early = early.map(|(bytes, resend)| EarlyData { bytes: bytes.to_vec(), resend });
        let options = options.read(
            side(py, transport, transport_tls, &transport_data, early)?,
            side(py, sink, sink_tls, &sink_data, None)?,
            asks,
        );
        let options = options.or_raise(py)?;
        let inner = bridge::Bridge::new(options, mailbox.reply(py, key)?).or_raise(py)?;
        Ok(Self { inner: Local::new(inner) })
    }

    fn handshake(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.handshake(mailbox.reply(py, key)?);
        Ok(())
    }

    fn handshake_began(&self, py: Python<'_>, ago: f64) -> PyResult<()> {
        self.inner.get(py)?.handshake_began(seconds("ago")(ago).or_raise(py)?);
        Ok(())
    }

    fn cdtunnel_handshake(&self, py: Python<'_>, mtu: u16, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        let role = CdTunnelRole::Client { mtu };
        self.inner.get(py)?.cdtunnel_handshake(role, mailbox.reply(py, key)?);
        Ok(())
    }

    fn cdtunnel_accept(
        &self,
        py: Python<'_>,
        granted: CdTunnelValues,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<()> {
        let role = CdTunnelRole::Server(granted.response().or_raise(py)?);
        self.inner.get(py)?.cdtunnel_handshake(role, mailbox.reply(py, key)?);
        Ok(())
    }

    fn watch(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.get(py)?.watch();
        Ok(())
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.get(py)?.start().or_raise(py)
    }

    fn pause(&self, py: Python<'_>, direction: &str) -> PyResult<()> {
        self.inner.get(py)?.pause(read_direction(direction).or_raise(py)?).or_raise(py)
    }

    fn resume(&self, py: Python<'_>, direction: &str) -> PyResult<()> {
        self.inner.get(py)?.resume(read_direction(direction).or_raise(py)?).or_raise(py)
    }

    fn check_sink(&self, py: Python<'_>, sink: &Endpoint, swap: SwapValues) -> PyResult<()> {
        let (bridge, swap) = (self.inner.get(py)?, swap.read().or_raise(py)?);
        sink.look(py, |spec| bridge.check_sink(spec, &swap))
    }

    fn swap_sink(
        &self,
        py: Python<'_>,
        sink: &Endpoint,
        swap: SwapValues,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<()> {
        let (sink, swap) = (sink.take(py)?, swap.read().or_raise(py)?);
        self.inner.get(py)?.swap_sink(sink, swap, mailbox.reply(py, key)?);
        Ok(())
    }

    fn set_tap(&self, py: Python<'_>, tap: Option<TapValues>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.set_tap(tap.map(TapValues::read), mailbox.reply(py, key)?);
        Ok(())
    }

    fn update_keys(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.update_keys(mailbox.reply(py, key)?);
        Ok(())
    }

    fn confirmed(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.confirmed(mailbox.reply(py, key)?);
        Ok(())
    }

    fn export_keying_material(
        &self,
        py: Python<'_>,
        label: String,
        context: Option<PyBackedBytes>,
        length: usize,
        mailbox: &Mailbox,
        key: u64,
    ) -> PyResult<()> {
        // TLS 1.3 writes the label into 255 bytes, behind "tls13 " (RFC 8446, section 7.1).
        if !(1..=249).contains(&label.len()) {
            let message = format!("1 to 249 bytes, not {}", label.len());
            return Err(Error::config("label", message)).or_raise(py);
        }
        if !(1..=65_535).contains(&length) {
            return Err(Error::config("length", format!("1 to 65535 bytes, not {length}"))).or_raise(py);
        }
        let context = context.map(|context| context.to_vec());
        self.inner.get(py)?.export_keying_material(label, context, length, mailbox.reply(py, key)?);
        Ok(())
    }

    fn unused_data(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.unused_data(mailbox.reply(py, key)?);
        Ok(())
    }

    fn stop(&self, py: Python<'_>, drain: f64) -> PyResult<()> {
        self.inner.get(py)?.stop(seconds("drain")(drain).or_raise(py)?);
        Ok(())
    }

    /// Ends at once, without a goodbye.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.get(py)?.abort();
        Ok(())
    }

    /// Our and the peer's network address on the transport, as text.
    fn addresses(&self, py: Python<'_>) -> PyResult<(Option<String>, Option<String>)> {
        let (local, peer) = self.inner.get(py)?.addresses();
        Ok((local.map(|address| address.to_string()), peer.map(|address| address.to_string())))
    }

    fn wait_closed(&self, py: Python<'_>, mailbox: &Mailbox, key: u64) -> PyResult<()> {
        self.inner.get(py)?.wait_closed(mailbox.reply(py, key)?);
        Ok(())
    }

    fn state(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(self.inner.get(py)?.state().as_str())
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        values::stats(py, self.inner.get(py)?.stats())
    }
}

fn side(
    py: Python<'_>,
    endpoint: &Endpoint,
    tls: Option<TlsSide>,
    initial_data: &[u8],
    early: Option<EarlyData>,
) -> PyResult<SideOptions> {
    Ok(SideOptions {
        endpoint: endpoint.take(py)?,
        tls: tls.map(|(config, server_side, server_name)| SideTls {
            config: Arc::clone(&config.get().inner),
            role: tls::role(server_side, server_name),
            early,
        }),
        initial_data: initial_data.to_vec(),
        field: endpoint.field(),
    })
}

impl OptionValues {
    fn read(self, transport: SideOptions, sink: SideOptions, asks: bool) -> Result<BridgeOptions> {
        let framing = read_framing("framing", &self.framing)?;
        let sink_framing = self.sink_framing.as_deref().map(|name| read_framing("sink_framing", name));
        let optional = |field, time: Option<f64>| time.map(seconds(field)).transpose();
        Ok(BridgeOptions {
            transport,
            sink,
            direction: word(
                "direction",
                &self.direction,
                &[
                    ("duplex", BridgeDirection::Duplex),
                    ("encrypt-only", BridgeDirection::EncryptOnly),
                    ("decrypt-only", BridgeDirection::DecryptOnly),
                ],
            )?,
            framing,
            sink_framing: sink_framing.transpose()?.flatten(),
            packets: PacketOptions {
                max_packet: self.max_packet,
                records_per_write: self.records_per_write,
                resync: self.resync,
            },
            deadlines: Deadlines {
                connect: seconds("connect_timeout")(self.connect_timeout)?,
                accept: optional("accept_timeout", self.accept_timeout)?,
                handshake: seconds("handshake_timeout")(self.handshake_timeout)?,
                spent: Duration::ZERO,
                idle: optional("idle_timeout", self.idle_timeout)?,
            },
            peer_policy: if asks {
                Some(PolicyOptions { deadline: seconds("policy_timeout")(self.policy_timeout)? })
            } else {
                None
            },
            upgrade: self.upgrade.as_deref().map(read_upgrade).transpose()?,
            tap: self.tap.map(TapValues::read),
        })
    }
}

impl SwapValues {
    fn read(self) -> Result<SwapOptions> {
        let framing = self.sink_framing.as_deref().map(|name| read_framing("sink_framing", name));
        Ok(SwapOptions {
            sink_framing: framing.transpose()?.flatten(),
            accept: self.accept_timeout.map(seconds("accept_timeout")).transpose()?,
        })
    }
}

impl TapValues {
    fn read(self) -> TapOptions {
        TapOptions {
            path: self.path,
            filter: self.filter,
            max_bytes: self.max_bytes,
            snap_len: self.snap_len,
        }
    }
}

/// `"raw"` is none.
fn read_framing(field: &'static str, name: &str) -> Result<Option<Framing>> {
    if name == "raw" {
        return Ok(None);
    }
    Framing::from_name(name).map(Some).ok_or_else(|| Error::config(field, format!("{name:?} is no framing")))
}

pub(crate) fn read_upgrade(name: &str) -> Result<Upgrade> {
    Upgrade::from_name(name).ok_or_else(|| Error::config("upgrade", format!("{name:?} is no upgrade")))
}

fn read_direction(text: &str) -> Result<Direction> {
    word(
        "direction",
        text,
        &[("encapsulate", Direction::Encapsulate), ("decapsulate", Direction::Decapsulate)],
    )
}
