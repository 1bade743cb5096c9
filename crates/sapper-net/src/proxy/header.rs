//! PROXY headers of connections: read from who is trusted, written to services that want one.
//!
//! The wire is [`sapper_proto::proxy_protocol`]'s; whom to believe is the connection's business.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use sapper_proto::parsed::Parsed;
use sapper_proto::proxy_protocol::{Addresses, Details, Header, Tls, Transport, Version};
use sapper_proto::shown;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::connection::read_more;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::Stream;
use crate::stream::address::{self, Address, UnixAddress};
use crate::tls::HandshakeInfo;

/// The longest name that is passed on. Certificates may have longer ones; nobody expects them.
const LONGEST_NAME: usize = 256;

/// Between whom a connection is: by its socket, or as a trusted proxy says.
pub(super) struct Parties {
    pub(super) source: Address,
    pub(super) destination: Address,
    /// What that proxy said besides.
    pub(super) details: Details,
}

impl Parties {
    /// An IPv4 client is one, also where a header wraps its address.
    pub(super) fn of(source: Address, destination: Address) -> Self {
        Self { source: canonical(source), destination: canonical(destination), details: Details::default() }
    }
}

fn canonical(address: Address) -> Address {
    match address {
        Address::Inet(inet) => Address::Inet(address::canonical(inet)),
        other => other,
    }
}

/// Reads the header that the connection must begin with; what lies behind it stays in `bytes`.
pub(super) async fn read(client: &mut dyn Stream, bytes: &mut Vec<u8>, parties: &mut Parties) -> Result<()> {
    let wrong = |text: String| Error::new(ErrorKind::RemoteProtocol, text).with_phase(Phase::Handshake);
    let header = loop {
        match Header::parse(bytes).map_err(|error| wrong(error.to_string()))? {
            Parsed::NeedMore { .. } => read_more(client, bytes).await?,
            Parsed::Done { consumed, value } => {
                bytes.drain(..consumed);
                break value;
            }
        }
    };
    match header.addresses {
        // The proxy speaks for itself, or cannot say: the socket's addresses stay.
        Addresses::Local | Addresses::Unknown => {}
        Addresses::Inet { transport: Transport::Stream, source, destination } => {
            let said = Parties::of(Address::Inet(source), Address::Inet(destination));
            (parties.source, parties.destination) = (said.source, said.destination);
        }
        Addresses::Unix { transport: Transport::Stream, source, destination } => {
            (parties.source, parties.destination) = (unix(&source), unix(&destination));
        }
        Addresses::Inet { .. } | Addresses::Unix { .. } => {
            return Err(wrong("PROXY v2: says that this stream carries datagrams".to_owned()));
        }
    }
    parties.details = header.details;
    Ok(())
}

fn unix(name: &[u8]) -> Address {
    Address::Unix(match name {
        [] => UnixAddress::Unnamed,
        [0, name @ ..] => UnixAddress::Abstract(name.to_vec()),
        path => UnixAddress::Path(PathBuf::from(std::ffi::OsStr::from_bytes(path))),
    })
}

fn unix_bytes(address: &UnixAddress) -> Vec<u8> {
    match address {
        UnixAddress::Path(path) => path.as_os_str().as_bytes().to_vec(),
        UnixAddress::Abstract(name) => [b"\0", name.as_slice()].concat(),
        UnixAddress::Unnamed => Vec::new(),
    }
}

/// The header that tells a service who connected, and what is known of the client's TLS; `verified`: a
/// certificate that was shown is good, as one that is not has ended the handshake.
pub(super) fn write(
    version: Version,
    parties: &Parties,
    info: Option<&HandshakeInfo>,
    verified: bool,
    server_name: Option<&str>,
) -> Vec<u8> {
    let transport = Transport::Stream;
    let addresses = match (&parties.source, &parties.destination) {
        (Address::Inet(source), Address::Inet(destination)) => {
            Addresses::Inet { transport, source: *source, destination: *destination }
        }
        (Address::Unix(source), Address::Unix(destination)) => {
            Addresses::Unix { transport, source: unix_bytes(source), destination: unix_bytes(destination) }
        }
        _ => Addresses::Unknown,
    };
    // What a trusted proxy in front of us said goes on; what we know ourselves replaces it.
    let mut details = parties.details.clone();
    if let Some(name) = server_name {
        details.authority = Some(name.to_owned());
    }
    if let Some(info) = info {
        details.alpn.clone_from(&info.alpn);
        let certificate = !info.peer_certificates.is_empty();
        details.tls = Some(Tls {
            certificate_now: certificate && !info.resumed,
            certificate_in_session: certificate,
            verified: certificate && verified,
            version: Some(info.version.to_owned()),
            client_cn: common_name(info),
            cipher: Some(info.cipher_suite.clone()),
        });
    }
    let header = Header { version, addresses, details };
    header.encode().unwrap_or_else(|_too_long| {
        // Only what somebody in front of us said can be that long.
        let details = Details { tls: header.details.tls, ..Details::default() };
        Header { version, addresses: header.addresses, details }.encode().unwrap_or_default()
    })
}

/// The common name of the client's certificate, where it is one that logs and headers can carry.
pub(super) fn common_name(info: &HandshakeInfo) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(info.peer_certificates.first()?).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    let plain = name.len() <= LONGEST_NAME && !name.chars().any(shown::misleads);
    plain.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inet(text: &str) -> Address {
        Address::Inet(text.parse().unwrap())
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let parties = Parties::of(inet("[::ffff:192.0.2.7]:4711"), inet("198.51.100.1:443"));
        let info = HandshakeInfo {
            version: "TLSv1.3",
            cipher_suite: "TLS_AES_256_GCM_SHA384".to_owned(),
            alpn: Some(b"h2".to_vec()),
            ..HandshakeInfo::default()
        };
        let bytes = write(Version::V2, &parties, Some(&info), true, Some("a.test"));
        let Ok(Parsed::Done { consumed, value }) = Header::parse(&bytes) else { panic!("no header") };
        assert_eq!(consumed, bytes.len());
        let source = "192.0.2.7:4711".parse().unwrap();
        let destination = "198.51.100.1:443".parse().unwrap();
        assert_eq!(value.addresses, Addresses::Inet { transport: Transport::Stream, source, destination });
        assert_eq!(value.details.alpn.as_deref(), Some(b"h2".as_slice()));
        assert_eq!(value.details.authority.as_deref(), Some("a.test"));
        let tls = value.details.tls.unwrap();
        assert_eq!(tls.version.as_deref(), Some("TLSv1.3"));
        assert!(!tls.certificate_in_session);
        assert!(!tls.verified, "there was none to verify");
        let info = HandshakeInfo { peer_certificates: vec![vec![]], ..info };
        for verified in [true, false] {
            let bytes = write(Version::V2, &parties, Some(&info), verified, None);
            let Ok(Parsed::Done { value, .. }) = Header::parse(&bytes) else { panic!("no header") };
            assert_eq!(value.details.tls.unwrap().verified, verified);
        }
        let line = write(Version::V1, &parties, Some(&info), true, None);
        assert_eq!(line, b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\n");
    }

    #[test]
    fn what_is_too_long_of_others_is_left_out() {
        let mut parties = Parties::of(inet("192.0.2.7:1"), inet("192.0.2.8:2"));
        parties.details.other.push((0xe0, vec![0; 5000]));
        let bytes = write(Version::V2, &parties, None, false, None);
        let Ok(Parsed::Done { value, .. }) = Header::parse(&bytes) else { panic!("no header") };
        assert_eq!(value.details, Details::default());
    }

    #[test]
    fn mixed_ends_have_no_addresses() {
        let parties = Parties::of(Address::Unix(UnixAddress::Unnamed), inet("192.0.2.8:2"));
        assert_eq!(write(Version::V1, &parties, None, false, None), b"PROXY UNKNOWN\r\n");
    }
}
