//! The PROXY protocol, versions 1 and 2: one header in front of a connection that says who is behind it.
//!
//! Both directions: written before the first byte to a service, and read from a proxy in front of us.
//! Whom to believe is not decided here: a header is only as good as the network that it came from.
//! The wire is that of HAProxy's `proxy-protocol.txt`; TLVs of version 2 that a TLS proxy knows (ALPN,
//! server name, TLS version, the client certificate's common name) have names here, others are kept as
//! they are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub use crate::parsed::Parsed;

/// The longest header of version 1, with its line end.
pub const LONGEST_V1: usize = 107;
/// The longest header of version 2 that is read or written here. The format allows 65,551 bytes; real
/// ones have a few hundred, and this much is held for a stranger before anything is known of it.
pub const LONGEST_V2: usize = 4_096;

/// What version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const PREFIX_V1: &[u8] = b"PROXY ";
const FIXED_V2: usize = 16;
/// Bytes of one Unix address.
const UNIX_LEN: usize = 108;

const TLV_ALPN: u8 = 0x01;
const TLV_AUTHORITY: u8 = 0x02;
const TLV_CRC32C: u8 = 0x03;
const TLV_NOOP: u8 = 0x04;
const TLV_UNIQUE_ID: u8 = 0x05;
const TLV_SSL: u8 = 0x20;
const TLV_NETNS: u8 = 0x30;
const SUB_VERSION: u8 = 0x21;
const SUB_CN: u8 = 0x22;
const SUB_CIPHER: u8 = 0x23;
/// The longest unique id that the format allows.
const LONGEST_UNIQUE_ID: usize = 128;

/// The form of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A line of text: addresses and ports of TCP, nothing else.
    V1,
    /// Binary: every kind of address, and TLVs.
    V2,
}

/// The protocol that the original connection used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP, or a Unix stream.
    Stream,
    /// UDP, or Unix datagrams.
    Datagram,
}

/// Between whom the original connection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// The proxy speaks for itself (a health check): its connection's own addresses count. What a header
    /// of version 2 says besides is not read.
    Local,
    /// There are addresses, but the header cannot say them.
    Unknown,
    /// IPv4 or IPv6.
    Inet {
        /// TCP or UDP.
        transport: Transport,
        /// Who connected.
        source: SocketAddr,
        /// What it connected to.
        destination: SocketAddr,
    },
    /// Unix sockets; at most 108 bytes each, without the zeros that fill them up.
    Unix {
        /// Stream or datagram.
        transport: Transport,
        /// Who connected.
        source: Vec<u8>,
        /// What it connected to.
        destination: Vec<u8>,
    },
}

/// What the proxy knows of the original connection's TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// The client sent a certificate on this connection.
    pub certificate_now: bool,
    /// It sent one on a connection of this TLS session.
    pub certificate_in_session: bool,
    /// Its certificate was verified.
    pub verified: bool,
    /// For people: `TLSv1.3`.
    pub version: Option<String>,
    /// The common name of the client's certificate.
    pub client_cn: Option<String>,
    /// The cipher suite's name.
    pub cipher: Option<String>,
}

/// What version 2 says besides the addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// The application protocol that was agreed.
    pub alpn: Option<Vec<u8>>,
    /// The host name that the client asked for (SNI).
    pub authority: Option<String>,
    /// An id of the connection, chosen by the first proxy.
    pub unique_id: Option<Vec<u8>>,
    /// The name of the network namespace.
    pub netns: Option<String>,
    /// TLS, where the client used it.
    pub tls: Option<Tls>,
    /// TLVs that have no name here: type and value.
    pub other: Vec<(u8, Vec<u8>)>,
}

/// One header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its form.
    pub version: Version,
    /// Between whom the connection is.
    pub addresses: Addresses,
    /// What else is known; version 1 cannot carry it and leaves it out.
    pub details: Details,
}

/// Why what a peer sent is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// The connection begins with something else.
    #[error("the connection does not begin with a PROXY header")]
    Absent,
    /// A line of version 1 that says nothing sensible.
    #[error("PROXY v1: {0}")]
    Line(&'static str),
    /// A version that does not exist, or a command.
    #[error("PROXY v2: version and command {0:#04x}")]
    VersionCommand(u8),
    /// A kind of address that does not exist.
    #[error("PROXY v2: address family {0:#04x}")]
    Family(u8),
    /// Too long to be waited for.
    #[error("PROXY v2: {0} bytes are too long")]
    TooLong(usize),
    /// The length does not hold what it must.
    #[error("PROXY v2: {0} is cut short")]
    Short(&'static str),
    /// A TLV's value is not what it must be.
    #[error("PROXY v2: {0} is not valid")]
    Value(&'static str),
    /// The checksum is wrong.
    #[error("PROXY v2: the checksum does not match")]
    Checksum,
}

impl Header {
    /// A header about a TCP connection.
    pub fn tcp(version: Version, source: SocketAddr, destination: SocketAddr) -> Self {
        let addresses = Addresses::Inet { transport: Transport::Stream, source, destination };
        Self { version, addresses, details: Details::default() }
    }

    /// The header as it is sent, at once, before anything else. `Err` has the length that would be
    /// longer than anybody reads: then details have to be left out.
    ///
    /// Addresses of two IP versions are written as IPv6 ones, the IPv4 one mapped.
    pub fn encode(&self) -> Result<Vec<u8>, usize> {
        match self.version {
            Version::V1 => Ok(self.line().into_bytes()),
            Version::V2 => self.binary(),
        }
    }

    /// Reads a header from the first bytes of a connection, of either version.
    pub fn parse(bytes: &[u8]) -> Result<Parsed<Self>, ProxyError> {
        if begins(bytes, &SIGNATURE) {
            return parse_v2(bytes);
        }
        if begins(bytes, PREFIX_V1) {
            return parse_v1(bytes);
        }
        Err(ProxyError::Absent)
    }

    fn line(&self) -> String {
        match &self.addresses {
            Addresses::Inet { transport: Transport::Stream, source, destination } => {
                let (source, destination) = same_version(*source, *destination);
                let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
                let (from, to) = (source.ip(), destination.ip());
                format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port())
            }
            _ => "PROXY UNKNOWN\r\n".to_owned(),
        }
    }

    fn binary(&self) -> Result<Vec<u8>, usize> {
        let mut out = Vec::with_capacity(128);
        out.extend(SIGNATURE);
        out.push(if self.addresses == Addresses::Local { 0x20 } else { 0x21 });
        let low = |transport: &Transport| if *transport == Transport::Stream { 1 } else { 2 };
        match &self.addresses {
            Addresses::Local | Addresses::Unknown => out.extend([0, 0, 0]),
            Addresses::Inet { transport, source, destination } => {
                let (source, destination) = same_version(*source, *destination);
                match (source.ip(), destination.ip()) {
                    (IpAddr::V4(from), IpAddr::V4(to)) => {
                        out.extend([0x10 | low(transport), 0, 0]);
                        out.extend(from.octets());
                        out.extend(to.octets());
                    }
                    (from, to) => {
                        out.extend([0x20 | low(transport), 0, 0]);
                        out.extend(v6(from).octets());
                        out.extend(v6(to).octets());
                    }
                }
                out.extend(source.port().to_be_bytes());
                out.extend(destination.port().to_be_bytes());
            }
            Addresses::Unix { transport, source, destination } => {
                out.extend([0x30 | low(transport), 0, 0]);
                for path in [source, destination] {
                    let shown = &path[..path.len().min(UNIX_LEN)];
                    out.extend(shown);
                    out.extend(std::iter::repeat_n(0, UNIX_LEN - shown.len()));
                }
            }
        }
        self.details.write(&mut out)?;
        if out.len() > LONGEST_V2 {
            return Err(out.len());
        }
        let len = (out.len() - FIXED_V2) as u16;
        out[14..FIXED_V2].copy_from_slice(&len.to_be_bytes());
        Ok(out)
    }
}

impl Details {
    fn write(&self, out: &mut Vec<u8>) -> Result<(), usize> {
        let mut tlv = |kind: u8, value: &[u8]| write_tlv(out, kind, value);
        if let Some(alpn) = &self.alpn {
            tlv(TLV_ALPN, alpn)?;
        }
        if let Some(authority) = &self.authority {
            tlv(TLV_AUTHORITY, authority.as_bytes())?;
        }
        if let Some(id) = &self.unique_id {
            tlv(TLV_UNIQUE_ID, &id[..id.len().min(LONGEST_UNIQUE_ID)])?;
        }
        if let Some(tls) = &self.tls {
            let mut body = vec![
                1 | u8::from(tls.certificate_now) << 1 | u8::from(tls.certificate_in_session) << 2,
                0,
                0,
                0,
                // The format wants zero for "verified", and anything else for the contrary.
                u8::from(!tls.verified),
            ];
            let subs = [(SUB_VERSION, &tls.version), (SUB_CN, &tls.client_cn), (SUB_CIPHER, &tls.cipher)];
            for (kind, value) in subs {
                if let Some(value) = value {
                    write_tlv(&mut body, kind, value.as_bytes())?;
                }
            }
            tlv(TLV_SSL, &body)?;
        }
        if let Some(netns) = &self.netns {
            tlv(TLV_NETNS, netns.as_bytes())?;
        }
        for (kind, value) in &self.other {
            tlv(*kind, value)?;
        }
        Ok(())
    }

    fn read(mut bytes: &[u8]) -> Result<Self, ProxyError> {
        let mut details = Self::default();
        while let Some((kind, value)) = next_tlv(&mut bytes, "a TLV")? {
            match kind {
                TLV_ALPN => details.alpn = Some(value.to_vec()),
                TLV_AUTHORITY => details.authority = Some(text(value, "the authority")?),
                TLV_UNIQUE_ID if value.len() > LONGEST_UNIQUE_ID => {
                    return Err(ProxyError::Value("the unique id"));
                }
                TLV_UNIQUE_ID => details.unique_id = Some(value.to_vec()),
                TLV_SSL => details.tls = read_tls(value)?,
                TLV_NETNS => details.netns = Some(text(value, "the namespace")?),
                TLV_NOOP | TLV_CRC32C => {}
                _ => details.other.push((kind, value.to_vec())),
            }
        }
        Ok(details)
    }
}

/// `None` where the client did not use TLS.
fn read_tls(value: &[u8]) -> Result<Option<Tls>, ProxyError> {
    let Some((&[client, verify @ ..], mut bytes)) = value.split_first_chunk::<5>() else {
        return Err(ProxyError::Short("the TLS information"));
    };
    if client & 1 == 0 {
        return Ok(None);
    }
    let mut tls = Tls {
        certificate_now: client & 2 != 0,
        certificate_in_session: client & 4 != 0,
        verified: verify == [0; 4],
        ..Tls::default()
    };
    while let Some((kind, value)) = next_tlv(&mut bytes, "the TLS information")? {
        match kind {
            SUB_VERSION => tls.version = Some(text(value, "the TLS version")?),
            SUB_CN => tls.client_cn = Some(text(value, "the common name")?),
            SUB_CIPHER => tls.cipher = Some(text(value, "the cipher")?),
            _ => {}
        }
    }
    Ok(Some(tls))
}

/// Whether `bytes`, as far as they are there, are those that `whole` begins with.
fn begins(bytes: &[u8], whole: &[u8]) -> bool {
    let known = bytes.len().min(whole.len());
    bytes[..known] == whole[..known]
}

fn write_tlv(out: &mut Vec<u8>, kind: u8, value: &[u8]) -> Result<(), usize> {
    let len = u16::try_from(value.len()).map_err(|_| FIXED_V2 + value.len())?;
    out.push(kind);
    out.extend(len.to_be_bytes());
    out.extend(value);
    Ok(())
}

fn next_tlv<'a>(bytes: &mut &'a [u8], what: &'static str) -> Result<Option<(u8, &'a [u8])>, ProxyError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let Some((&[kind, high, low], rest)) = bytes.split_first_chunk() else {
        return Err(ProxyError::Short(what));
    };
    let len = usize::from(u16::from_be_bytes([high, low]));
    let (value, rest) = rest.split_at_checked(len).ok_or(ProxyError::Short(what))?;
    *bytes = rest;
    Ok(Some((kind, value)))
}

/// What goes into logs and headers of others is text without control characters.
fn text(value: &[u8], what: &'static str) -> Result<String, ProxyError> {
    match std::str::from_utf8(value) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(ProxyError::Value(what)),
    }
}

fn same_version(source: SocketAddr, destination: SocketAddr) -> (SocketAddr, SocketAddr) {
    if source.is_ipv4() == destination.is_ipv4() {
        return (source, destination);
    }
    let map = |address: SocketAddr| SocketAddr::new(IpAddr::V6(v6(address.ip())), address.port());
    (map(source), map(destination))
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

fn parse_v1(bytes: &[u8]) -> Result<Parsed<Header>, ProxyError> {
    let window = &bytes[..bytes.len().min(LONGEST_V1)];
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        if bytes.len() >= LONGEST_V1 {
            return Err(ProxyError::Line("has no end"));
        }
        // The shortest line is "PROXY UNKNOWN" and its end.
        return Ok(Parsed::NeedMore { at_least: (bytes.len() + 1).max(15) });
    };
    let line = std::str::from_utf8(&window[..end]).map_err(|_| ProxyError::Line("is no text"))?;
    let mut words = line.split(' ').skip(1);
    let family = words.next().unwrap_or_default();
    let addresses = match family {
        // Whatever follows is to be ignored.
        "UNKNOWN" => Addresses::Unknown,
        "TCP4" | "TCP6" => {
            let mut address = || {
                let text = words.next().unwrap_or_default();
                let address: Option<IpAddr> = match family {
                    "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
                    _ => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
                };
                address.ok_or(ProxyError::Line("has an address that is none of its family"))
            };
            let (from, to) = (address()?, address()?);
            let mut port = || words.next().and_then(port).ok_or(ProxyError::Line("has a port that is none"));
            let (source, destination) = (SocketAddr::new(from, port()?), SocketAddr::new(to, port()?));
            if words.next().is_some() {
                return Err(ProxyError::Line("has too many words"));
            }
            Addresses::Inet { transport: Transport::Stream, source, destination }
        }
        _ => return Err(ProxyError::Line("names no protocol that is known")),
    };
    let value = Header { version: Version::V1, addresses, details: Details::default() };
    Ok(Parsed::Done { consumed: end + 2, value })
}

/// Digits only, and no zero in front: `str::parse` would take a sign.
fn port(word: &str) -> Option<u16> {
    let plain = word.bytes().all(|byte| byte.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
    word.parse().ok().filter(|_| plain)
}

fn parse_v2(bytes: &[u8]) -> Result<Parsed<Header>, ProxyError> {
    let Some(&[version_command, family, high, low]) = bytes.get(SIGNATURE.len()..FIXED_V2) else {
        return Ok(Parsed::NeedMore { at_least: FIXED_V2 });
    };
    let local = match version_command {
        0x20 => true,
        0x21 => false,
        other => return Err(ProxyError::VersionCommand(other)),
    };
    let consumed = FIXED_V2 + usize::from(u16::from_be_bytes([high, low]));
    if consumed > LONGEST_V2 {
        return Err(ProxyError::TooLong(consumed));
    }
    let Some(body) = bytes.get(FIXED_V2..consumed) else {
        return Ok(Parsed::NeedMore { at_least: consumed });
    };
    if local {
        // The specification (2.2): the connection is accepted as valid and the block discarded, the family
        // included. A checksum cannot be looked for: only the family says where TLVs begin.
        let value = Header { version: Version::V2, addresses: Addresses::Local, details: Details::default() };
        return Ok(Parsed::Done { consumed, value });
    }
    verify_checksum(&bytes[..consumed])?;
    let transport = match family & 15 {
        0 => None,
        1 => Some(Transport::Stream),
        2 => Some(Transport::Datagram),
        _ => return Err(ProxyError::Family(family)),
    };
    let address_len = match family >> 4 {
        0 => 0,
        1 => 12,
        2 => 36,
        3 => 2 * UNIX_LEN,
        _ => return Err(ProxyError::Family(family)),
    };
    let (addresses, rest) = body.split_at_checked(address_len).ok_or(ProxyError::Short("the address"))?;
    let addresses = match transport {
        Some(transport) if address_len > 0 => read_addresses(transport, addresses),
        _ => Addresses::Unknown,
    };
    let value = Header { version: Version::V2, addresses, details: Details::read(rest)? };
    Ok(Parsed::Done { consumed, value })
}

/// The length has told which family it is.
fn read_addresses(transport: Transport, bytes: &[u8]) -> Addresses {
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let (source, destination) = match bytes.len() {
        12 => {
            let ip =
                |at: usize| IpAddr::V4(Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]));
            (SocketAddr::new(ip(0), port(8)), SocketAddr::new(ip(4), port(10)))
        }
        36 => {
            let ip = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&bytes[at..at + 16]);
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            (SocketAddr::new(ip(0), port(32)), SocketAddr::new(ip(16), port(34)))
        }
        _ => {
            let path = |bytes: &[u8]| {
                let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                bytes[..len].to_vec()
            };
            let (source, destination) = bytes.split_at(UNIX_LEN);
            return Addresses::Unix { transport, source: path(source), destination: path(destination) };
        }
    };
    Addresses::Inet { transport, source, destination }
}

/// Where a header has a checksum TLV: the sum over it all, with zeros in that TLV's place.
fn verify_checksum(header: &[u8]) -> Result<(), ProxyError> {
    let addresses = match header[13] >> 4 {
        1 => 12,
        2 => 36,
        3 => 2 * UNIX_LEN,
        _ => 0,
    };
    let mut at = FIXED_V2 + addresses;
    while let Some(&[kind, high, low]) = header.get(at..at + 3) {
        let value = at + 3;
        at = value + usize::from(u16::from_be_bytes([high, low]));
        if kind != TLV_CRC32C {
            continue;
        }
        let Some(&[a, b, c, d]) = header.get(value..at) else {
            return Err(ProxyError::Value("the checksum"));
        };
        let (front, behind) = (&header[..value], &header[at..]);
        let sum = [front, &[0; 4], behind].iter().fold(!0, |crc, part| crc32c(crc, part));
        // One is enough: a stranger's header is summed up once.
        return if !sum == u32::from_be_bytes([a, b, c, d]) { Ok(()) } else { Err(ProxyError::Checksum) };
    }
    Ok(())
}

/// CRC-32C bit by bit: few headers carry one, and they are short.
fn crc32c(mut crc: u32, bytes: &[u8]) -> u32 {
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ 0x82f6_3b78 & (crc & 1).wrapping_neg();
        }
    }
    crc
}

#[cfg(test)]
mod tests;
