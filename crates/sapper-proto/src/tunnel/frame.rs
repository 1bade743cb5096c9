//! Frames: what a tunnel's carrier carries after the handshake.
//!
//! u32 length of what follows, u32 stream id, u8 kind, payload; all numbers big-endian. Kinds 1 to 3
//! are W3PTUNL's. The others are ours, and are sent only to a peer that named their capability. Two
//! sorts of ours: link frames belong to one carrier (stream 0, never replayed); all others are counted
//! and reach the peer once, over however many carriers.
//!
//! Nothing here assembles: a header and the range of what follows is all.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::shown;

pub use crate::parsed::Parsed;

/// Bytes in front of the payload: length, stream id, kind.
pub const HEADER: usize = 9;
/// What the length counts besides the payload.
pub const LEAST_BODY: u32 = 5;
/// The longest body: 64 MiB exactly is allowed.
pub const LONGEST_BODY: u32 = 67_108_864;
/// The longest payload of a frame of ours that is read as a whole.
pub const LONGEST_CONTROL: usize = 1_024;
/// The longest hello.
pub const LONGEST_HELLO: usize = 65_536;
/// The longest reason of a reset or a go-away; what is longer is cut.
pub const LONGEST_REASON: usize = 256;

/// What a frame is. The numbers are the wire's, and are never used for anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Payload of a stream.
    Data = 1,
    /// The sender closed the stream, both directions.
    Close = 2,
    /// The sender's end of the stream broke.
    Error = 3,
    /// Link: who the sender is and what it can.
    Hello = 0x10,
    /// Link: answer this.
    Ping = 0x11,
    /// Link: the answer.
    Pong = 0x12,
    /// Link: how many counted bytes have arrived.
    Ack = 0x13,
    /// A new stream, and where it comes from.
    Open = 0x20,
    /// More credit for a stream.
    Window = 0x21,
    /// The sender sends no more on the stream; the other direction goes on.
    Fin = 0x22,
    /// The stream ends at once, both directions, for a reason.
    Reset = 0x23,
    /// No new streams, please.
    GoAway = 0x24,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::Data,
        Self::Close,
        Self::Error,
        Self::Hello,
        Self::Ping,
        Self::Pong,
        Self::Ack,
        Self::Open,
        Self::Window,
        Self::Fin,
        Self::Reset,
        Self::GoAway,
    ];

    /// The kind of that number.
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Whether an original peer knows it.
    pub fn is_original(self) -> bool {
        (self as u8) <= 3
    }

    /// Whether it belongs to one carrier: not counted, not replayed.
    pub fn is_link(self) -> bool {
        matches!(self, Self::Hello | Self::Ping | Self::Pong | Self::Ack)
    }
}

/// What stands in front of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The stream; 0 is the connection itself.
    pub stream: u32,
    /// What follows.
    pub kind: Kind,
    /// How much of it.
    pub payload: u32,
}

/// Why a frame is refused. The texts of the first three are the original's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is out of range.
    #[error("Declared message length {length} is too long, maximum is {maximum}")]
    TooLong {
        /// What was declared.
        length: u32,
        /// What is allowed.
        maximum: u32,
    },
    /// The length has no room for a header.
    #[error("Declared message length {0} is too short for even just the header")]
    TooShort(u32),
    /// There is no such kind of frame, or not between these two.
    #[error("Message is not valid")]
    Kind(u8),
    /// The stream id is none.
    #[error("stream {0}: no id for a {1:?} frame")]
    Stream(u32, Kind),
    /// A payload of ours does not have its form.
    #[error("{kind:?}: {what}")]
    Payload {
        /// Of which frame.
        kind: Kind,
        /// What is wrong.
        what: &'static str,
    },
}

impl Header {
    /// As it is sent.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&(self.payload + LEAST_BODY).to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8] = self.kind as u8;
        bytes
    }

    /// Reads a header; `consumed` is its own length, the payload follows. A length that lies is refused
    /// as soon as its four bytes are there.
    pub fn parse(bytes: &[u8]) -> Result<Parsed<Self>, FrameError> {
        let Some(&[a, b, c, d]) = bytes.first_chunk() else {
            return Ok(Parsed::NeedMore { at_least: HEADER });
        };
        let length = u32::from_be_bytes([a, b, c, d]);
        if length > LONGEST_BODY {
            return Err(FrameError::TooLong { length, maximum: LONGEST_BODY });
        }
        if length < LEAST_BODY {
            return Err(FrameError::TooShort(length));
        }
        let Some(&[_, _, _, _, a, b, c, d, kind]) = bytes.first_chunk() else {
            return Ok(Parsed::NeedMore { at_least: HEADER });
        };
        let (stream, payload) = (u32::from_be_bytes([a, b, c, d]), length - LEAST_BODY);
        let kind = Kind::from_wire(kind).ok_or(FrameError::Kind(kind))?;
        let on_connection = kind.is_link() || kind == Kind::GoAway;
        if (stream == 0) != on_connection || stream == u32::MAX {
            return Err(FrameError::Stream(stream, kind));
        }
        let fits = match kind {
            Kind::Data | Kind::Close | Kind::Error => true,
            Kind::Hello => (Hello::FIXED..=LONGEST_HELLO).contains(&(payload as usize)),
            Kind::Ping | Kind::Pong | Kind::Ack => payload == 8,
            Kind::Window => payload == 4,
            Kind::Fin => payload == 0,
            Kind::Open | Kind::Reset | Kind::GoAway => payload as usize <= LONGEST_CONTROL,
        };
        if !fits {
            return Err(FrameError::Payload { kind, what: "the length is out of range" });
        }
        Ok(Parsed::Done { consumed: HEADER, value: Self { stream, kind, payload } })
    }
}

/// A set of extensions: what a peer names here it takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(pub u32);

impl Capabilities {
    /// Open, window, FIN and reset: streams with credit. The others need it.
    pub const STREAMS: Self = Self(1);
    /// Ping and pong.
    pub const PING: Self = Self(2);
    /// Go-away.
    pub const GO_AWAY: Self = Self(4);
    /// Counting, acknowledging, and going on over another carrier.
    pub const RESUME: Self = Self(8);
    /// More than one service, and asking for public ports, in what the layer above says.
    pub const SERVICES: Self = Self(16);
    /// What this crate speaks.
    pub const ALL: Self = Self(31);

    /// Whether all of `other` is in it.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What both have; nothing where streams are missing.
    pub fn common(self, other: Self) -> Self {
        let common = Self(self.0 & other.0);
        if common.has(Self::STREAMS) { common } else { Self(0) }
    }
}

/// The version of our extension.
pub const VERSION: u8 = 1;

/// What both ends of our own kind say first. docs/tunnel-wire.md has its layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The client asks to go on with a session; the server says that it does.
    pub resume: bool,
    /// What the sender takes.
    pub capabilities: Capabilities,
    /// Credit that each stream has at its beginning, towards the sender.
    pub window: u32,
    /// Streams that the other end may have open.
    pub max_streams: u32,
    /// Bytes that the sender holds for replay: it wants to hear of each quarter of them.
    pub replay: u32,
    /// The session; zeros where the client asks for a new one.
    pub session: [u8; 16],
    /// Its secret.
    pub token: Token,
    /// Counted bytes of the session that have arrived at the sender.
    pub received: u64,
    /// What the layer above says; this one does not look into it.
    pub application: Vec<u8>,
}

/// A session's secret: it does not print, and comparing tells nothing by its time.
#[derive(Clone, Copy, Default, Eq)]
pub struct Token(pub [u8; 32]);

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        let differing = self.0.iter().zip(&other.0).fold(0, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(differing) == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Hello {
    /// Bytes before the application's.
    pub const FIXED: usize = 76;
    /// The longest that the layer above may say.
    pub const LONGEST_APPLICATION: usize = LONGEST_HELLO - Self::FIXED;

    /// The frame as it is sent. What the layer above says is cut where it is too long.
    pub fn encode(&self) -> Vec<u8> {
        let application = &self.application[..self.application.len().min(Self::LONGEST_APPLICATION)];
        let payload = (Self::FIXED + application.len()) as u32;
        let mut out = Vec::with_capacity(HEADER + payload as usize);
        out.extend(Header { stream: 0, kind: Kind::Hello, payload }.encode());
        out.extend([VERSION, VERSION, 0, u8::from(self.resume)]);
        out.extend(self.capabilities.0.to_be_bytes());
        out.extend(self.window.to_be_bytes());
        out.extend(self.max_streams.to_be_bytes());
        out.extend(self.replay.to_be_bytes());
        out.extend(self.session);
        out.extend(self.token.0);
        out.extend(self.received.to_be_bytes());
        out.extend(application);
        out
    }

    /// Reads a payload; flags and capabilities that are not known are dropped.
    pub fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let wrong = |what| FrameError::Payload { kind: Kind::Hello, what };
        let (fixed, application) =
            payload.split_at_checked(Self::FIXED).ok_or(wrong("the length is out of range"))?;
        let mut at = 0;
        let mut take = |len: usize| {
            at += len;
            &fixed[at - len..at]
        };
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        let (newest, oldest) = (number(take(1)), number(take(1)));
        if oldest > u64::from(VERSION) || newest < u64::from(VERSION) {
            return Err(wrong("no version in common"));
        }
        let flags = number(take(2));
        let capabilities = Capabilities(number(take(4)) as u32 & Capabilities::ALL.0);
        let (window, max_streams, replay) = (number(take(4)), number(take(4)), number(take(4)));
        let mut hello = Self {
            resume: flags & 1 != 0,
            capabilities,
            window: window as u32,
            max_streams: max_streams as u32,
            replay: replay as u32,
            session: [0; 16],
            token: Token([0; 32]),
            received: 0,
            application: application.to_vec(),
        };
        hello.session.copy_from_slice(take(16));
        hello.token.0.copy_from_slice(take(32));
        hello.received = number(take(8));
        Ok(hello)
    }
}

/// Where a new stream comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenInfo {
    /// Which of the services that the peer named in its hello.
    pub service: u16,
    /// The visitor's address, and the address that it connected to.
    pub visitor: Option<(SocketAddr, SocketAddr)>,
    /// The host that the visitor asked for (SNI), at most 255 bytes.
    pub server_name: Option<String>,
    /// The application protocol that was agreed with the visitor, at most 255 bytes.
    pub alpn: Option<Vec<u8>>,
}

const OPEN_SERVER_NAME: u8 = 1;
const OPEN_ALPN: u8 = 2;

impl OpenInfo {
    /// The payload as it is sent. Names that are too long for the wire are left out.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.service.to_be_bytes().to_vec();
        match self.visitor {
            None => out.push(0),
            Some((from, to)) => match (from.ip(), to.ip()) {
                (IpAddr::V4(a), IpAddr::V4(b)) => {
                    out.push(4);
                    out.extend(a.octets());
                    out.extend(b.octets());
                }
                (a, b) => {
                    let v6 = |ip: IpAddr| match ip {
                        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                        IpAddr::V6(ip) => ip,
                    };
                    out.push(6);
                    out.extend(v6(a).octets());
                    out.extend(v6(b).octets());
                }
            },
        }
        if let Some((from, to)) = self.visitor {
            out.extend(from.port().to_be_bytes());
            out.extend(to.port().to_be_bytes());
        }
        let names = [
            (OPEN_SERVER_NAME, self.server_name.as_deref().map(str::as_bytes)),
            (OPEN_ALPN, self.alpn.as_deref()),
        ];
        for (kind, value) in names {
            if let Some(value) = value
                && let Ok(len) = u8::try_from(value.len())
            {
                out.extend([kind, len]);
                out.extend(value);
            }
        }
        out
    }

    /// Reads a payload; what is not known in it is skipped.
    pub fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let wrong = |what| FrameError::Payload { kind: Kind::Open, what };
        let short = wrong("is cut short");
        let (&[high, low, family], mut rest) = payload.split_first_chunk().ok_or(short)?;
        let mut take = |len: usize| -> Result<&[u8], FrameError> {
            let (front, behind) = rest.split_at_checked(len).ok_or(short)?;
            rest = behind;
            Ok(front)
        };
        let port = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes[1]]);
        let visitor = match family {
            0 => None,
            4 => {
                let ip = |bytes: &[u8]| Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into();
                let (from, to): (IpAddr, IpAddr) = (ip(take(4)?), ip(take(4)?));
                let (from_port, to_port) = (port(take(2)?), port(take(2)?));
                Some((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port)))
            }
            6 => {
                let ip = |bytes: &[u8]| {
                    let mut octets = [0; 16];
                    octets.copy_from_slice(bytes);
                    Ipv6Addr::from(octets).into()
                };
                let (from, to): (IpAddr, IpAddr) = (ip(take(16)?), ip(take(16)?));
                let (from_port, to_port) = (port(take(2)?), port(take(2)?));
                Some((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port)))
            }
            _ => return Err(wrong("the address family does not exist")),
        };
        let mut info =
            Self { service: u16::from_be_bytes([high, low]), visitor, server_name: None, alpn: None };
        while !rest.is_empty() {
            let (&[kind, len], behind) = rest.split_first_chunk().ok_or(short)?;
            let (value, behind) = behind.split_at_checked(usize::from(len)).ok_or(short)?;
            rest = behind;
            match kind {
                OPEN_SERVER_NAME => {
                    let name = std::str::from_utf8(value).ok();
                    let name = name.filter(|name| !name.chars().any(shown::misleads));
                    info.server_name = Some(name.ok_or(wrong("the server name is no text"))?.to_owned());
                }
                OPEN_ALPN => info.alpn = Some(value.to_vec()),
                _ => {}
            }
        }
        Ok(info)
    }
}

/// Why a stream or a connection ends early. The numbers are the wire's; those of others are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u32);

impl Code {
    /// Nothing is said.
    pub const NONE: Self = Self(0);
    /// The far end of the stream broke off.
    pub const CONNECTION_RESET: Self = Self(1);
    /// The service refused the connection.
    pub const REFUSED: Self = Self(2);
    /// There is no way to the service.
    pub const UNREACHABLE: Self = Self(3);
    /// Something took too long.
    pub const DEADLINE: Self = Self(4);
    /// Policy says no.
    pub const DENIED: Self = Self(5);
    /// A limit is reached.
    pub const LIMIT: Self = Self(6);
    /// Too much waited for an end that does not read.
    pub const OVERFLOW: Self = Self(7);
    /// The sender is going.
    pub const SHUTDOWN: Self = Self(8);
    /// The session is gone.
    pub const SESSION_LOST: Self = Self(9);
    /// Another client has what the receiver had.
    pub const REPLACED: Self = Self(10);
}

/// A reset's or go-away's payload: what it needs, a code, a reason for people.
pub(super) fn encode_reason(front: &[u8], code: Code, reason: &str) -> Vec<u8> {
    let mut end = reason.len().min(LONGEST_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    [front, &code.0.to_be_bytes(), &reason.as_bytes()[..end]].concat()
}

/// A code and a reason. The reason is a stranger's: cut, and without characters that mislead.
pub(super) fn parse_reason(kind: Kind, payload: &[u8]) -> Result<(Code, String), FrameError> {
    let Some((code, reason)) = payload.split_first_chunk() else {
        return Err(FrameError::Payload { kind, what: "is cut short" });
    };
    let reason = &reason[..reason.len().min(LONGEST_REASON)];
    Ok((Code(u32::from_be_bytes(*code)), String::from_utf8_lossy(reason).chars().map(shown::clean).collect()))
}

#[cfg(test)]
mod tests;
