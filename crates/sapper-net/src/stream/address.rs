//! Addresses of stream sockets: what a connector dials, a listener binds and a peer has.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use socket2::SockAddr;

use crate::error::{Error, ErrorKind, Result};

/// Bytes of `sun_path` without the one that ends or begins it.
const MAX_UNIX_NAME: usize = 107;

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// IPv4 or IPv6.
    Inet(SocketAddr),
    /// A Unix socket.
    Unix(UnixAddress),
    /// Another family; its number.
    Other(i32),
}

/// Address of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnixAddress {
    /// In the file system.
    Path(PathBuf),
    /// In Linux's abstract space; the name without its leading zero.
    Abstract(Vec<u8>),
    /// A socket that was never bound: most clients, and pairs.
    Unnamed,
}

impl Address {
    /// From what a system call returned.
    pub(crate) fn from_system(address: &SockAddr) -> Self {
        if let Some(inet) = address.as_socket() {
            return Self::Inet(canonical(inet));
        }
        if !address.is_unix() {
            return Self::Other(i32::from(address.family()));
        }
        Self::Unix(match (address.as_pathname(), address.as_abstract_namespace()) {
            (Some(path), _) => UnixAddress::Path(path.to_owned()),
            (None, Some(name)) => UnixAddress::Abstract(name.to_owned()),
            (None, None) => UnixAddress::Unnamed,
        })
    }

    /// The sender that it is for limits: its IPv4 address, its IPv6 network (/64); all of this machine are one.
    pub fn network(&self) -> u64 {
        network(match self {
            Self::Inet(address) => address.ip(),
            Self::Unix(_) | Self::Other(_) => Ipv4Addr::UNSPECIFIED.into(),
        })
    }
}

/// One sender, as far as limits can tell: its IPv4 address, or the IPv6 network (/64) that one sender has. Both are
/// in one space: the former begin with a byte that no network has.
pub(crate) fn network(address: IpAddr) -> u64 {
    match address.to_canonical() {
        IpAddr::V4(address) => u64::from(address.to_bits()) | 0xff << 56 | 1 << 40,
        IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
    }
}

/// IPv4 as IPv4, also where an IPv6 socket wraps it. IPv6 stays as it is, with the scope of a link's own address.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip if ip.is_ipv4() => SocketAddr::new(ip, address.port()),
        _ => address,
    }
}

impl UnixAddress {
    /// For `bind` and `connect`. Whoever knows the option to blame for a wrong name adds it.
    pub(crate) fn to_system(&self) -> Result<SockAddr> {
        let name = match self {
            Self::Path(path) => path.as_os_str().as_bytes(),
            Self::Abstract(name) => name,
            Self::Unnamed => b"",
        };
        let wrong = |why: &str| Error::new(ErrorKind::Config, format!("the Unix socket name {self} {why}"));
        if name.is_empty() {
            return Err(wrong("is empty"));
        }
        if name.len() > MAX_UNIX_NAME {
            return Err(wrong(&format!("has {} bytes; at most {MAX_UNIX_NAME} fit", name.len())));
        }
        if matches!(self, Self::Path(_)) && name.contains(&0) {
            return Err(wrong("contains a zero byte"));
        }
        let system = match self {
            Self::Abstract(_) => {
                let zero_first = [b"\0", name].concat();
                SockAddr::unix(Path::new(std::ffi::OsStr::from_bytes(&zero_first)))
            }
            Self::Path(_) | Self::Unnamed => SockAddr::unix(Path::new(std::ffi::OsStr::from_bytes(name))),
        };
        system.map_err(|source| wrong(&source.to_string()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(address) => address.fmt(f),
            Self::Other(family) => write!(f, "(address family {family})"),
        }
    }
}

impl fmt::Display for UnixAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", name.escape_ascii()),
            Self::Unnamed => f.write_str("(unnamed)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_one_whatever_socket_it_came_from() {
        for (system, shown) in [
            ("[::ffff:192.0.2.7]:4711", "192.0.2.7:4711"),
            ("192.0.2.7:4711", "192.0.2.7:4711"),
            ("[2001:db8::7]:1", "[2001:db8::7]:1"),
            ("[fe80::1%3]:1", "[fe80::1%3]:1"),
            ("[::]:1", "[::]:1"),
        ] {
            let system: SocketAddr = system.parse().unwrap();
            assert_eq!(Address::from_system(&system.into()).to_string(), shown);
        }
    }

    #[test]
    fn names_that_fit_come_back_and_others_are_refused() {
        for address in [
            UnixAddress::Path("/tmp/x".into()),
            UnixAddress::Path("/".to_owned().repeat(MAX_UNIX_NAME).into()),
            UnixAddress::Abstract(b"name with \0 inside".to_vec()),
            UnixAddress::Abstract(vec![b'x'; MAX_UNIX_NAME]),
        ] {
            let system = address.to_system().unwrap();
            assert_eq!(Address::from_system(&system), Address::Unix(address));
        }
        for address in [
            UnixAddress::Path("".into()),
            UnixAddress::Path("x".repeat(MAX_UNIX_NAME + 1).into()),
            UnixAddress::Path("a\0b".into()),
            UnixAddress::Abstract(Vec::new()),
            UnixAddress::Abstract(vec![b'x'; MAX_UNIX_NAME + 1]),
            UnixAddress::Unnamed,
        ] {
            assert_eq!(address.to_system().unwrap_err().kind(), ErrorKind::Config, "{address}");
        }
    }
}
