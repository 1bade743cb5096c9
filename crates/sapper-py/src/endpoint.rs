//! Endpoints: what `sapper.endpoint` and `sapper._takeover` say becomes an [`EndpointSpec`].
//!
//! A descriptor is duplicated here, and looked at, so that a wrong one is refused before anything
//! else happens. Each endpoint is used once.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use sapper_net::endpoint::{EndpointSpec, FdSpec};
use sapper_net::port::spec::PortSpec;
use sapper_net::port::tun::{TunHeader, TunOptions};
use sapper_net::stream::address::UnixAddress;
use sapper_net::stream::connect::ConnectOptions;
use sapper_net::stream::fd::SocketOptions;
use sapper_net::stream::listen::{ListenAddress, ListenOptions};
use sapper_net::{Error, ErrorKind, Result, fd};

use crate::errors::OrRaise;
use crate::process::Local;
use crate::tls::word;

/// One end of a bridge, described, for one use.
#[pyclass(frozen, module = "sapper._native")]
pub(crate) struct Endpoint {
    spec: Local<Mutex<Option<EndpointSpec>>>,
    field: &'static str,
}

impl Endpoint {
    pub(crate) fn new(spec: EndpointSpec, field: &'static str) -> Self {
        Self { spec: Local::new(Mutex::new(Some(spec))), field }
    }

    /// The argument that it came in.
    pub(crate) fn field(&self) -> &'static str {
        self.field
    }

    /// The specification; once.
    pub(crate) fn take(&self, py: Python<'_>) -> PyResult<EndpointSpec> {
        let spec = self.spec.get(py)?.lock().unwrap_or_else(PoisonError::into_inner).take();
        spec.ok_or_else(used).or_raise(py)
    }

    /// Looks at the specification and leaves it.
    pub(crate) fn look<T>(
        &self,
        py: Python<'_>,
        judge: impl FnOnce(&EndpointSpec) -> Result<T>,
    ) -> PyResult<T> {
        let spec = self.spec.get(py)?.lock().unwrap_or_else(PoisonError::into_inner);
        spec.as_ref().ok_or_else(used).and_then(judge).or_raise(py)
    }
}

fn used() -> Error {
    Error::new(ErrorKind::ApiMisuse, "this endpoint was used already")
}

/// The name of the argument that an endpoint came in.
pub(crate) fn field_name(field: &str) -> Result<&'static str> {
    const NAMES: [&str; 10] =
        ["socket", "sink", "network", "A", "B", "stream", "input", "output", "cleartext", "ciphertext"];
    word("field", field, &NAMES.map(|name| (name, name)))
}

#[pymethods]
impl Endpoint {
    /// Whether opening it makes a connection, or looks a name up.
    fn connects(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, |spec| Ok(spec.connects()))
    }

    #[staticmethod]
    fn tcp(py: Python<'_>, host: String, port: u16, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        Ok(Self::new(EndpointSpec::Tcp { host, port, options: ConnectOptions::default() }, field))
    }

    #[staticmethod]
    fn tcp_listen(py: Python<'_>, host: String, port: u16, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        // "::" stands for every address, IPv4's too, as the listener without a host does.
        let host = (host != "::").then_some(host);
        let address = ListenAddress::Tcp { host, port };
        Ok(Self::new(EndpointSpec::Listen { address, options: ListenOptions::default() }, field))
    }

    #[staticmethod]
    fn unix(py: Python<'_>, path: OsString, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        Ok(Self::new(EndpointSpec::Unix(unix_address(path)), field))
    }

    #[staticmethod]
    fn unix_listen(py: Python<'_>, path: OsString, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        let address = ListenAddress::Unix(unix_address(path));
        Ok(Self::new(EndpointSpec::Listen { address, options: ListenOptions::default() }, field))
    }

    /// A descriptor, or one to read and one to write; each is duplicated.
    #[staticmethod]
    fn fd(
        py: Python<'_>,
        read: i64,
        write: Option<i64>,
        header: Option<&str>,
        field: &str,
    ) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        let make = || -> Result<EndpointSpec> {
            let header = header.map(tun_header).transpose()?;
            let Some(write) = write else {
                return EndpointSpec::from_number(raw(read), field, header);
            };
            let half = |number| FdSpec::new(duplicate(number, field)?, field, SocketOptions::default());
            Ok(EndpointSpec::FdPair { read: half(read)?, write: half(write)? })
        };
        Ok(Self::new(make().or_raise(py)?, field))
    }

    #[staticmethod]
    fn stdio(py: Python<'_>, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        Ok(Self::new(EndpointSpec::stdio(field).or_raise(py)?, field))
    }

    #[staticmethod]
    fn file(py: Python<'_>, path: PathBuf, mode: &str, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        let make = || -> Result<EndpointSpec> {
            let mut options = OpenOptions::new();
            match mode {
                "r" => options.read(true),
                "w" => options.write(true).create(true).truncate(true),
                "a" => options.append(true).create(true),
                _ => options.read(true).write(true),
            };
            EndpointSpec::from_fd(fd::open_path(&path, &mut options, field)?, field)
        };
        // A slow disk: nobody else has to wait for it.
        Ok(Self::new(py.detach(make).or_raise(py)?, field))
    }

    #[staticmethod]
    fn null(py: Python<'_>, field: &str) -> PyResult<Self> {
        Self::file(py, PathBuf::from("/dev/null"), "r+", field)
    }

    /// What the first one gives to read, and the second one takes to write.
    #[staticmethod]
    fn joined(py: Python<'_>, read: &Self, write: &Self) -> PyResult<Self> {
        let halves = (read.take(py)?, write.take(py)?);
        Ok(Self::new(EndpointSpec::Joined(Box::new(halves)), read.field))
    }

    #[staticmethod]
    fn counter(py: Python<'_>, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        Ok(Self::new(EndpointSpec::Port(PortSpec::Counter), field))
    }

    #[staticmethod]
    fn tun(
        py: Python<'_>,
        name: String,
        mtu: Option<u16>,
        addresses: Vec<String>,
        offload: bool,
        field: &str,
    ) -> PyResult<Self> {
        interface(name, mtu, &addresses, offload, false, field).or_raise(py)
    }

    #[staticmethod]
    fn tap(
        py: Python<'_>,
        name: String,
        mtu: Option<u16>,
        addresses: Vec<String>,
        offload: bool,
        field: &str,
    ) -> PyResult<Self> {
        interface(name, mtu, &addresses, offload, true, field).or_raise(py)
    }

    #[staticmethod]
    fn unix_datagram(py: Python<'_>, path: OsString, bind: Option<OsString>, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        let spec = PortSpec::UnixDatagram { path: unix_address(path), bind: bind.map(unix_address), field };
        Ok(Self::new(EndpointSpec::Port(spec), field))
    }

    #[staticmethod]
    fn seqpacket(py: Python<'_>, path: OsString, field: &str) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        let spec = PortSpec::Seqpacket { path: unix_address(path), field };
        Ok(Self::new(EndpointSpec::Port(spec), field))
    }

    #[staticmethod]
    fn udp(
        py: Python<'_>,
        host: String,
        port: u16,
        bind: Option<(String, u16)>,
        field: &str,
    ) -> PyResult<Self> {
        let field = field_name(field).or_raise(py)?;
        let make = || -> Result<PortSpec> {
            let bind = bind.map(|(host, port)| local_address(&host, port, field)).transpose()?;
            Ok(PortSpec::Udp { host, port, bind, field })
        };
        Ok(Self::new(EndpointSpec::Port(make().or_raise(py)?), field))
    }
}

pub(crate) fn duplicate(number: i64, field: &'static str) -> Result<OwnedFd> {
    fd::duplicate(raw(number), field)
}

/// A number beyond i32 is no descriptor; -1 says so in the words of the one that checks.
fn raw(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(-1)
}

/// A path, or with `@` in front an abstract name.
pub(crate) fn unix_address(path: OsString) -> UnixAddress {
    match path.as_bytes().strip_prefix(b"@") {
        Some(name) => UnixAddress::Abstract(name.to_vec()),
        None => UnixAddress::Path(PathBuf::from(path)),
    }
}

fn local_address(host: &str, port: u16, field: &'static str) -> Result<SocketAddr> {
    let address: IpAddr = host
        .parse()
        .map_err(|_| Error::config(field, format!("bind: {host:?} is no address of this machine")))?;
    Ok(SocketAddr::new(address, port))
}

fn tun_header(text: &str) -> Result<TunHeader> {
    use TunHeader::{None, PacketInformation, Utun, VirtioNet};
    word("header", text, &[None, PacketInformation, Utun, VirtioNet].map(|one| (one.as_str(), one)))
}

fn interface(
    name: String,
    mtu: Option<u16>,
    addresses: &[String],
    offload: bool,
    ethernet: bool,
    field: &str,
) -> Result<Endpoint> {
    let field = field_name(field)?;
    let read = |text: &String| -> Result<(IpAddr, u8)> {
        let wrong = || Error::config(field, format!("address: {text:?} is no address with a prefix length"));
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        if prefix <= longest { Ok((address, prefix)) } else { Err(wrong()) }
    };
    let addresses = addresses.iter().map(read).collect::<Result<_>>()?;
    let options = TunOptions { ethernet, offload, addresses, mtu, ..TunOptions::default() };
    Ok(Endpoint::new(EndpointSpec::Port(PortSpec::Tun { name, options, field }), field))
}
