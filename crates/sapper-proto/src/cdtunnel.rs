//! The CDTunnel handshake: what the two ends of a device tunnel say before the first packet.
//!
//! `43 44 54 75 6e 6e 65 6c` ("CDTunnel"), u16 big-endian length, UTF-8 JSON; a request from the
//! client, a response from the server. Then bare IP packets, which are
//! [`framing`](crate::framing)'s. JSON is parsed as JSON: unknown keys and any order are fine, and
//! what is used is checked, field by field: it will configure an interface of this machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;

pub use crate::parsed::Parsed;

/// What a message begins with.
pub const MAGIC: [u8; 8] = *b"CDTunnel";
/// Bytes in front of the JSON.
pub const PREFIX_LEN: usize = MAGIC.len() + 2;
/// The longest message: the length field bounds it.
pub const LONGEST: usize = PREFIX_LEN + 0xffff;

const REQUEST: &str = "clientHandshakeRequest";
const RESPONSE: &str = "serverHandshakeResponse";
/// The least MTU of IPv4 (RFC 791) and of IPv6 (RFC 8200).
const LEAST_MTU_V4: u16 = 68;
const LEAST_MTU_V6: u16 = 1_280;

/// What the client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The MTU that it would like.
    pub mtu: u16,
}

/// What the server grants. Both addresses are of one IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The client's address inside the tunnel.
    pub client_address: IpAddr,
    /// Length of the network prefix (on the wire a netmask).
    pub prefix_len: u8,
    /// The MTU inside the tunnel: this one counts, not the requested one.
    pub mtu: u16,
    /// The server's address inside the tunnel.
    pub server_address: IpAddr,
    /// Port of the server's service directory.
    pub rsd_port: u16,
}

/// Why a peer's message is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CdTunnelError {
    /// The peer does not speak CDTunnel.
    #[error("magic: the peer does not speak CDTunnel")]
    Magic,
    /// The body is no JSON.
    #[error("body: {0}")]
    Json(String),
    /// A key is missing.
    #[error("{0}: missing")]
    Missing(&'static str),
    /// A key's value is of the wrong kind or out of range.
    #[error("{field}: {value} {expected}")]
    Field {
        /// Its path in the message.
        field: &'static str,
        /// What the peer said, shortened.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl Request {
    /// The message as it is sent.
    pub fn encode(&self) -> Vec<u8> {
        message(&format!(r#"{{"type":"{REQUEST}","mtu":{}}}"#, self.mtu))
    }

    /// Reads a request from the first bytes of a stream.
    pub fn parse(bytes: &[u8]) -> Result<Parsed<Self>, CdTunnelError> {
        parse(bytes, REQUEST, |json| Ok(Self { mtu: integer(json, "mtu", LEAST_MTU_V4)? }))
    }
}

impl Response {
    /// What a client that asks for `request` gets of this: the smaller MTU. One that is too small for the
    /// tunnel's IP version is refused as the request's fault.
    pub fn granted_to(mut self, request: &Request) -> Result<Self, CdTunnelError> {
        if request.mtu < least_mtu(self.client_address) {
            return Err(wrong("mtu", &request.mtu.into(), "is not a number in range"));
        }
        self.mtu = self.mtu.min(request.mtu);
        Ok(self)
    }

    /// The message as it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mask = match self.client_address {
            IpAddr::V4(_) => {
                let bits = u32::MAX.checked_shl(32 - u32::from(self.prefix_len.min(32)));
                IpAddr::V4(Ipv4Addr::from_bits(bits.unwrap_or(0)))
            }
            IpAddr::V6(_) => {
                let bits = u128::MAX.checked_shl(128 - u32::from(self.prefix_len.min(128)));
                IpAddr::V6(Ipv6Addr::from_bits(bits.unwrap_or(0)))
            }
        };
        // Nothing in here needs escaping: numbers and addresses.
        message(&format!(
            r#"{{"clientParameters":{{"address":"{}","mtu":{},"netmask":"{mask}"}},"serverAddress":"{}","serverRSDPort":{},"type":"{RESPONSE}"}}"#,
            self.client_address, self.mtu, self.server_address, self.rsd_port
        ))
    }

    /// Reads a response from the first bytes of a stream.
    pub fn parse(bytes: &[u8]) -> Result<Parsed<Self>, CdTunnelError> {
        parse(bytes, RESPONSE, |json| {
            let client = get(json, "clientParameters", "clientParameters")?;
            let client_address = address(client, "address", "clientParameters.address")?;
            let server_address = address(json, "serverAddress", "serverAddress")?;
            if server_address.is_ipv4() != client_address.is_ipv4() {
                return Err(wrong("serverAddress", &json["serverAddress"], "is of another IP version"));
            }
            if server_address == client_address {
                return Err(wrong("serverAddress", &json["serverAddress"], "is the client's address"));
            }
            Ok(Self {
                client_address,
                prefix_len: prefix_len(client, client_address)?,
                mtu: integer(client, "clientParameters.mtu", least_mtu(client_address))?,
                server_address,
                rsd_port: integer(json, "serverRSDPort", 1)?,
            })
        })
    }
}

fn least_mtu(address: IpAddr) -> u16 {
    if address.is_ipv4() { LEAST_MTU_V4 } else { LEAST_MTU_V6 }
}

fn message(json: &str) -> Vec<u8> {
    let mut message = Vec::with_capacity(PREFIX_LEN + json.len());
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&(json.len() as u16).to_be_bytes());
    message.extend_from_slice(json.as_bytes());
    message
}

fn parse<T>(
    bytes: &[u8],
    kind: &'static str,
    read: impl FnOnce(&Value) -> Result<T, CdTunnelError>,
) -> Result<Parsed<T>, CdTunnelError> {
    // A peer that speaks something else is told apart at its first wrong byte.
    let known = bytes.len().min(MAGIC.len());
    if bytes[..known] != MAGIC[..known] {
        return Err(CdTunnelError::Magic);
    }
    let Some(&[high, low]) = bytes.get(MAGIC.len()..PREFIX_LEN) else {
        return Ok(Parsed::NeedMore { at_least: PREFIX_LEN });
    };
    let consumed = PREFIX_LEN + usize::from(u16::from_be_bytes([high, low]));
    let Some(body) = bytes.get(PREFIX_LEN..consumed) else {
        return Ok(Parsed::NeedMore { at_least: consumed });
    };
    let json: Value = serde_json::from_slice(body).map_err(|error| CdTunnelError::Json(error.to_string()))?;
    let said = get(&json, "type", "type")?;
    if said != kind {
        return Err(wrong("type", said, "is not the message expected"));
    }
    Ok(Parsed::Done { consumed, value: read(&json)? })
}

fn get<'a>(json: &'a Value, key: &str, path: &'static str) -> Result<&'a Value, CdTunnelError> {
    json.get(key).ok_or(CdTunnelError::Missing(path))
}

/// A 16-bit number of at least `least`; its key is the last part of the path.
fn integer(json: &Value, path: &'static str, least: u16) -> Result<u16, CdTunnelError> {
    let key = path.rsplit('.').next().unwrap_or(path);
    let value = get(json, key, path)?;
    value
        .as_u64()
        .and_then(|number| u16::try_from(number).ok())
        .filter(|number| *number >= least)
        .ok_or_else(|| wrong(path, value, "is not a number in range"))
}

fn address(json: &Value, key: &str, path: &'static str) -> Result<IpAddr, CdTunnelError> {
    let value = get(json, key, path)?;
    let address: Option<IpAddr> = value.as_str().and_then(|text| text.parse().ok());
    // A hostile peer's address goes onto an interface or into a connect.
    address
        .filter(|address| !(address.is_unspecified() || address.is_loopback() || address.is_multicast()))
        .ok_or_else(|| wrong(path, value, "is not the address of a host"))
}

fn prefix_len(client: &Value, address: IpAddr) -> Result<u8, CdTunnelError> {
    const PATH: &str = "clientParameters.netmask";
    let value = get(client, "netmask", PATH)?;
    let mask: Option<IpAddr> = value.as_str().and_then(|text| text.parse().ok());
    let prefix = match (mask, address) {
        (Some(IpAddr::V4(mask)), IpAddr::V4(_)) => {
            let ones = mask.to_bits().leading_ones();
            (ones == mask.to_bits().count_ones()).then_some(ones as u8)
        }
        (Some(IpAddr::V6(mask)), IpAddr::V6(_)) => {
            let ones = mask.to_bits().leading_ones();
            (ones == mask.to_bits().count_ones()).then_some(ones as u8)
        }
        _ => None,
    };
    // An empty prefix would send all of this machine's traffic into the tunnel.
    prefix
        .filter(|prefix| *prefix > 0)
        .ok_or_else(|| wrong(PATH, value, "is not a netmask of the address's version"))
}

/// The value is the peer's: it is quoted as JSON, and shortened.
fn wrong(field: &'static str, value: &Value, expected: &'static str) -> CdTunnelError {
    const SHOWN: usize = 64;
    let mut value = value.to_string();
    if let Some((end, _)) = value.char_indices().nth(SHOWN) {
        value.truncate(end);
        value.push('…');
    }
    CdTunnelError::Field { field, value, expected }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::testing::hex;

    fn response() -> Response {
        Response {
            client_address: "fd58:8c92:8961::2".parse().unwrap(),
            prefix_len: 64,
            mtu: 1280,
            server_address: "fd58:8c92:8961::1".parse().unwrap(),
            rsd_port: 56_307,
        }
    }

    const REPLY: &str = concat!(
        r#"{"clientParameters":{"address":"fd58:8c92:8961::2","mtu":1280,"#,
        r#""netmask":"ffff:ffff:ffff:ffff::"},"serverAddress":"fd58:8c92:8961::1","#,
        r#""serverRSDPort":56307,"type":"serverHandshakeResponse"}"#
    );

    #[test]
    fn the_wire_forms() {
        let request = Request { mtu: 16_000 }.encode();
        assert_eq!(request[..12], hex("43 44 54 75 6e 6e 65 6c 002d 7b22"));
        assert_eq!(&request[10..], br#"{"type":"clientHandshakeRequest","mtu":16000}"#);
        let reply = response().encode();
        assert_eq!(reply[..11], hex("43 44 54 75 6e 6e 65 6c 00bc 7b"));
        assert_eq!(std::str::from_utf8(&reply[10..]), Ok(REPLY));
        let value = response();
        assert_eq!(Response::parse(&reply), Ok(Parsed::Done { consumed: reply.len(), value }));
    }

    #[test]
    fn packets_behind_a_message_are_not_touched_and_a_part_is_not_enough() {
        let message = response().encode();
        let mut bytes = message.clone();
        bytes.extend([0x60, 0, 0]);
        let done = Parsed::Done { consumed: message.len(), value: response() };
        assert_eq!(Response::parse(&bytes), Ok(done));
        for len in 0..message.len() {
            let at_least = if len < PREFIX_LEN { PREFIX_LEN } else { message.len() };
            assert_eq!(Response::parse(&message[..len]), Ok(Parsed::NeedMore { at_least }));
        }
    }

    #[test]
    fn json_is_parsed_as_json() {
        let text =
            " {\n\"new\\u0041\": [1, {}], \"mtu\" : 1420 , \"type\":\"client\\u0048andshakeRequest\"} ";
        let parsed = Request::parse(&message(text));
        assert!(matches!(parsed, Ok(Parsed::Done { value: Request { mtu: 1420 }, .. })));
    }

    #[test]
    fn the_smaller_mtu_is_granted_unless_no_tunnel_of_this_version_has_it() {
        let v6 = Response { mtu: 4000, ..response() };
        let addresses = ("10.0.0.2".parse().unwrap(), "10.0.0.1".parse().unwrap());
        let v4 = Response { client_address: addresses.0, server_address: addresses.1, prefix_len: 24, ..v6 };
        let granted = |ours: Response, mtu| ours.granted_to(&Request { mtu }).map(|granted| granted.mtu);
        for (ours, least) in [(v6, 1280), (v4, 68)] {
            assert_eq!(granted(ours, 65_535), Ok(4000));
            assert_eq!(granted(ours, 1500), Ok(1500));
            assert_eq!(granted(ours, least), Ok(least));
            let refused = granted(ours, least - 1).unwrap_err().to_string();
            assert_eq!(refused, format!("mtu: {} is not a number in range", least - 1));
        }
    }

    #[test]
    fn errors_name_the_field() {
        let error = |from: &str, to: &str| {
            assert!(REPLY.contains(from));
            Response::parse(&message(&REPLY.replace(from, to))).unwrap_err().to_string()
        };
        assert_eq!(error(r#""mtu":1280,"#, ""), "clientParameters.mtu: missing");
        assert_eq!(error("1280", "1279"), "clientParameters.mtu: 1279 is not a number in range");
        assert_eq!(error("1280", "65536"), "clientParameters.mtu: 65536 is not a number in range");
        assert_eq!(error("1280", "\"1280\""), "clientParameters.mtu: \"1280\" is not a number in range");
        assert_eq!(error("56307", "0"), "serverRSDPort: 0 is not a number in range");
        assert_eq!(error("56307", "-1"), "serverRSDPort: -1 is not a number in range");
        assert_eq!(error("56307", "1.5"), "serverRSDPort: 1.5 is not a number in range");
        assert_eq!(
            error("8961::2", "8961::2/64"),
            "clientParameters.address: \"fd58:8c92:8961::2/64\" is not the address of a host"
        );
        assert_eq!(
            error("8961::1", "8961::2"),
            "serverAddress: \"fd58:8c92:8961::2\" is the client's address"
        );
        assert_eq!(error("fd58:8c92:8961::1", "::1"), "serverAddress: \"::1\" is not the address of a host");
        assert_eq!(
            error("fd58:8c92:8961::1", "10.0.0.1"),
            "serverAddress: \"10.0.0.1\" is of another IP version"
        );
        for mask in ["ffff::ffff", "::", "255.255.255.0", "64", ""] {
            let expected =
                format!("clientParameters.netmask: \"{mask}\" is not a netmask of the address's version");
            assert_eq!(error("ffff:ffff:ffff:ffff::", mask), expected);
        }
        assert_eq!(
            error("serverHandshake", "clientHandshake"),
            "type: \"clientHandshakeResponse\" is not the message expected"
        );
        assert!(error("{\"client", "\"client").starts_with("body: "));
        assert_eq!(Response::parse(&message("[]")), Err(CdTunnelError::Missing("type")));
        assert_eq!(Request::parse(b"HTTP"), Err(CdTunnelError::Magic));
        assert_eq!(Request::parse(b"CDT\0"), Err(CdTunnelError::Magic));
        let long = "x".repeat(60_000);
        let shown = error("fd58:8c92:8961::1", &long);
        assert!(shown.len() < 200, "a peer does not fill our logs: {}", shown.len());
        let deep = Request::parse(&message(&"[".repeat(60_000)));
        assert!(matches!(deep, Err(CdTunnelError::Json(_))), "nor our stack");
    }

    proptest! {
        #[test]
        fn responses_come_back(
            v6: bool, client: u128, server: u128, prefix in 1u8..=128, mtu in 1280u16.., rsd_port in 1u16..,
        ) {
            let value = if v6 {
                // Any address of fd00::/8 is a host's.
                let host = |bits: u128| IpAddr::V6(Ipv6Addr::from_bits(0xfd << 120 | bits >> 8));
                Response { client_address: host(client), server_address: host(server),
                    prefix_len: prefix, mtu, rsd_port }
            } else {
                let host = |bits: u128| IpAddr::V4(Ipv4Addr::from_bits(10 << 24 | bits as u32 >> 8));
                Response { client_address: host(client), server_address: host(server),
                    prefix_len: (prefix - 1) % 32 + 1, mtu, rsd_port }
            };
            let wire = value.encode();
            prop_assert_eq!(Response::parse(&wire), Ok(Parsed::Done { consumed: wire.len(), value }));
            let request = Request { mtu };
            let wire = request.encode();
            prop_assert_eq!(Request::parse(&wire), Ok(Parsed::Done { consumed: wire.len(), value: request }));
        }

        #[test]
        fn perturbed_bytes_are_answered(changes in prop::collection::vec((0usize..198, any::<u8>()), 0..5)) {
            let mut bytes = response().encode();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            if let Ok(Parsed::Done { value, .. }) = Response::parse(&bytes) {
                prop_assert!(value.prefix_len > 0 && value.mtu >= 68 && value.rsd_port > 0);
            }
            let _ = Request::parse(&bytes);
        }
    }
}
