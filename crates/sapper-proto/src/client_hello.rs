//! What a TLS client asks for, read from its first bytes without touching them.
//!
//! A router by server name looks at the ClientHello and then passes the connection on whole, first byte
//! included: nothing is decrypted, answered or consumed. The hello may be cut into several records, and
//! the records may arrive in any pieces. What is not here: TLS itself. A hello that this parser takes
//! may still be refused by the server that it goes to.

pub use crate::parsed::Parsed;

/// Bytes of a connection that are looked at, record headers included. A hello with post-quantum key
/// shares has some 2 KB; this much is held for a stranger.
pub const LONGEST: usize = 65_536;

const RECORD_HEADER: usize = 5;
const HANDSHAKE_HEADER: usize = 4;
const CONTENT_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// The longest record of plain text (RFC 8446, section 5.1).
const LONGEST_RECORD: usize = 1 << 14;
const EXTENSION_SERVER_NAME: u16 = 0;
const EXTENSION_ALPN: u16 = 16;
const EXTENSION_PRE_SHARED_KEY: u16 = 41;
const EXTENSION_SUPPORTED_VERSIONS: u16 = 43;
const EXTENSION_ECH: u16 = 0xfe0d;
/// The longest name that DNS has.
const LONGEST_NAME: usize = 255;

/// What the client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// The host that it wants, in lower case and without a final dot.
    pub server_name: Option<String>,
    /// Application protocols, the favourite first.
    pub alpn: Vec<Vec<u8>>,
    /// Whether TLS 1.3 is among its versions.
    pub tls13: bool,
    /// The real hello is encrypted (ECH): the name above is the public one, of whoever can decrypt it.
    /// Clients also send this without meaning it.
    pub encrypted_hello: bool,
    /// Its suites, the favourite first.
    pub cipher_suites: Vec<u16>,
    /// Where it offers to resume a session: the length of its first proof that it knows the key, which is
    /// that of the session's hash.
    pub binder: Option<usize>,
}

/// Why the first bytes are no hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientHelloError {
    /// It is not TLS; its first byte.
    #[error("the connection does not begin with TLS but with {0:#04x}")]
    NotTls(u8),
    /// A record's header is out of range.
    #[error("a record of version {version:#06x} and length {length}")]
    Record {
        /// Its version field.
        version: u16,
        /// Its length field.
        length: usize,
    },
    /// The first message is of another type.
    #[error("the first message is of type {0}, not a ClientHello")]
    NotClientHello(u8),
    /// Longer than anybody waits for.
    #[error("the ClientHello is longer than {LONGEST} bytes")]
    TooLong,
    /// A length inside points beyond what it is in, or leaves something over.
    #[error("the length of {0} in the ClientHello does not fit")]
    Length(&'static str),
    /// The name is none of a host.
    #[error("the server name that the client asks for is not the name of one host")]
    ServerName,
    /// An extension occurs twice.
    #[error("the ClientHello has extension {0} twice")]
    Twice(u16),
}

/// Looks at the first bytes of one connection. It keeps its place: each call goes on where the last
/// one stopped, so that a hello in tiny pieces costs no more than a whole one.
///
/// Order of calls: [`peek`](Self::peek) with all bytes from the connection's first one on, again with
/// more of them as long as it needs more. After `Done` or an error it is of no use.
#[derive(Debug, Default)]
pub struct Peek {
    /// Where the next record's header is.
    at: usize,
    records: usize,
    /// Bytes of the handshake layer in the records before `at`.
    collected: usize,
    /// The message's length with its header, once these four bytes are there.
    wanted: Option<usize>,
}

impl Peek {
    /// At the beginning.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at `bytes`, the connection's first ones. `consumed` tells where the records of the hello
    /// end; the last one may also have what the client sent behind it.
    pub fn peek(&mut self, bytes: &[u8]) -> Result<Parsed<ClientHello>, ClientHelloError> {
        loop {
            let Some(header) = bytes.get(self.at..self.at + RECORD_HEADER) else {
                if let Some(first) = bytes.get(self.at).filter(|first| **first != CONTENT_HANDSHAKE) {
                    return Err(ClientHelloError::NotTls(*first));
                }
                return self.more(self.at + RECORD_HEADER);
            };
            if header[0] != CONTENT_HANDSHAKE {
                return Err(ClientHelloError::NotTls(header[0]));
            }
            let version = u16::from_be_bytes([header[1], header[2]]);
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            // An empty record is not allowed, and would let a stranger send for ever.
            if version >> 8 != 3 || length == 0 || length > LONGEST_RECORD {
                return Err(ClientHelloError::Record { version, length });
            }
            let end = self.at + RECORD_HEADER + length;
            if end > LONGEST {
                return Err(ClientHelloError::TooLong);
            }
            let Some(first) = bytes.get(self.at + RECORD_HEADER) else { return self.more(end) };
            if self.records == 0 && *first != CLIENT_HELLO {
                return Err(ClientHelloError::NotClientHello(*first));
            }
            if bytes.len() < end {
                return self.more(end);
            }
            self.at = end;
            self.records += 1;
            self.collected += length;
            if self.wanted.is_none() && self.collected >= HANDSHAKE_HEADER {
                let mut header = handshake_bytes(&bytes[..end]).flatten().take(HANDSHAKE_HEADER);
                let mut byte = || usize::from(*header.next().expect("there are four"));
                let (_, high, middle, low) = (byte(), byte(), byte(), byte());
                let wanted = HANDSHAKE_HEADER + (high << 16 | middle << 8 | low);
                if wanted > LONGEST {
                    return Err(ClientHelloError::TooLong);
                }
                self.wanted = Some(wanted);
            }
            let Some(wanted) = self.wanted else { continue };
            if self.collected >= wanted {
                let message = RECORD_HEADER + HANDSHAKE_HEADER..RECORD_HEADER + wanted;
                let value = if self.records == 1 {
                    parse(&bytes[message])?
                } else {
                    let joined: Vec<u8> = handshake_bytes(&bytes[..end]).flatten().copied().collect();
                    parse(&joined[HANDSHAKE_HEADER..wanted])?
                };
                return Ok(Parsed::Done { consumed: end, value });
            }
        }
    }

    fn more(&self, at_least: usize) -> Result<Parsed<ClientHello>, ClientHelloError> {
        if at_least > LONGEST { Err(ClientHelloError::TooLong) } else { Ok(Parsed::NeedMore { at_least }) }
    }
}

/// The insides of whole records.
fn handshake_bytes(mut records: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (header, rest) = records.split_first_chunk::<RECORD_HEADER>()?;
        let (inside, behind) = rest.split_at(usize::from(u16::from_be_bytes([header[3], header[4]])));
        records = behind;
        Some(inside)
    })
}

/// The message without its header.
fn parse(body: &[u8]) -> Result<ClientHello, ClientHelloError> {
    let mut reader = Reader(body);
    let version = reader.u16("client_version")?;
    reader.take(32, "random")?;
    reader.vector8("session_id")?;
    let suites = reader.vector16("cipher_suites")?;
    reader.vector8("compression_methods")?;
    let cipher_suites =
        suites.chunks_exact(2).map(|suite| u16::from_be_bytes([suite[0], suite[1]])).collect();
    let mut hello = ClientHello { tls13: false, cipher_suites, ..ClientHello::default() };
    if reader.0.is_empty() {
        // TLS 1.2 without any extension.
        return Ok(hello);
    }
    let mut extensions = Reader(reader.vector16("extensions")?);
    reader.end("ClientHello")?;
    let mut seen = [false; 5];
    while !extensions.0.is_empty() {
        let kind = extensions.u16("extension")?;
        let mut data = Reader(extensions.vector16("extension")?);
        let place = match kind {
            EXTENSION_SERVER_NAME => 0,
            EXTENSION_ALPN => 1,
            EXTENSION_SUPPORTED_VERSIONS => 2,
            EXTENSION_ECH => 3,
            EXTENSION_PRE_SHARED_KEY => 4,
            _ => continue,
        };
        // Two names would let us route by one and the server answer by the other.
        if std::mem::replace(&mut seen[place], true) {
            return Err(ClientHelloError::Twice(kind));
        }
        match kind {
            EXTENSION_SERVER_NAME => hello.server_name = Some(server_name(&mut data)?),
            EXTENSION_ALPN => {
                let mut names = Reader(data.vector16("alpn")?);
                data.end("alpn")?;
                while !names.0.is_empty() {
                    let name = names.vector8("alpn")?;
                    if name.is_empty() {
                        return Err(ClientHelloError::Length("alpn"));
                    }
                    hello.alpn.push(name.to_vec());
                }
            }
            EXTENSION_SUPPORTED_VERSIONS => {
                let versions = data.vector8("supported_versions")?;
                data.end("supported_versions")?;
                hello.tls13 = version >= 0x0303 && versions.chunks(2).any(|version| version == [3, 4]);
            }
            EXTENSION_PRE_SHARED_KEY => {
                data.vector16("pre_shared_key")?;
                let mut binders = Reader(data.vector16("pre_shared_key")?);
                data.end("pre_shared_key")?;
                hello.binder = Some(binders.vector8("pre_shared_key")?.len());
            }
            _ => hello.encrypted_hello = true,
        }
    }
    Ok(hello)
}

fn server_name(data: &mut Reader<'_>) -> Result<String, ClientHelloError> {
    let mut list = Reader(data.vector16("server_name")?);
    data.end("server_name")?;
    let kind = list.take(1, "server_name")?[0];
    let name = list.vector16("server_name")?;
    // The list may hold one name of each kind, and there is one kind.
    if kind != 0 || !list.0.is_empty() {
        return Err(ClientHelloError::ServerName);
    }
    let name = name.strip_suffix(b".").unwrap_or(name);
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let labels = name.split(|byte| *byte == b'.').all(|label| !label.is_empty() && label.len() <= 63);
    if !labels || name.len() > LONGEST_NAME || !name.iter().all(plain) {
        return Err(ClientHelloError::ServerName);
    }
    Ok(name.iter().map(|byte| char::from(byte.to_ascii_lowercase())).collect())
}

/// Bytes from the front; what is missing is an error with the field's name.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], ClientHelloError> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(ClientHelloError::Length(field))?;
        self.0 = rest;
        Ok(front)
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, ClientHelloError> {
        let bytes = self.take(2, field)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self, field: &'static str) -> Result<&'a [u8], ClientHelloError> {
        let len = self.take(1, field)?[0];
        self.take(usize::from(len), field)
    }

    fn vector16(&mut self, field: &'static str) -> Result<&'a [u8], ClientHelloError> {
        let len = self.u16(field)?;
        self.take(usize::from(len), field)
    }

    fn end(&self, field: &'static str) -> Result<(), ClientHelloError> {
        if self.0.is_empty() { Ok(()) } else { Err(ClientHelloError::Length(field)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::testing::hex;

    fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        let mut out = kind.to_be_bytes().to_vec();
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
        out
    }

    fn name(name: &[u8]) -> Vec<u8> {
        let len = name.len() as u16;
        let mut data = (len + 3).to_be_bytes().to_vec();
        data.push(0);
        data.extend(len.to_be_bytes());
        data.extend(name);
        extension(0, &data)
    }

    fn message(extensions: &[Vec<u8>]) -> Vec<u8> {
        let extensions = extensions.concat();
        let mut body = hex("0303");
        body.extend([7; 32]);
        body.extend(hex("00 0002 1301 01 00"));
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1, 0];
        message.extend((body.len() as u16).to_be_bytes());
        message.extend(body);
        message
    }

    /// In records of `size` bytes.
    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for part in message.chunks(size) {
            out.extend([22, 3, 1]);
            out.extend((part.len() as u16).to_be_bytes());
            out.extend(part);
        }
        out
    }

    fn usual() -> Vec<u8> {
        message(&[
            extension(0x0a0a, &[]),
            name(b"WWW.example.org"),
            extension(16, &hex("000c 02 6832 08 687474702f312e31")),
            extension(43, &hex("04 0304 0303")),
            extension(0xfe0d, &[1, 2, 3]),
            extension(41, &[&hex("0007 0001 aa 00000000 0021 20")[..], &[5; 32]].concat()),
        ])
    }

    fn expected() -> ClientHello {
        ClientHello {
            server_name: Some("www.example.org".into()),
            alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            tls13: true,
            encrypted_hello: true,
            cipher_suites: vec![0x1301],
            binder: Some(32),
        }
    }

    fn peek(bytes: &[u8]) -> Result<Parsed<ClientHello>, ClientHelloError> {
        Peek::new().peek(bytes)
    }

    #[test]
    fn a_hello_is_read_however_it_is_cut() {
        let message = usual();
        for size in [1, 2, 3, 5, 50, message.len()] {
            let mut bytes = records(&message, size);
            let consumed = bytes.len();
            bytes.extend([23, 3, 3, 0, 1, 0]);
            let done = Ok(Parsed::Done { consumed, value: expected() });
            assert_eq!(peek(&bytes), done);
            let mut slowly = Peek::new();
            for end in 0..consumed {
                let Ok(Parsed::NeedMore { at_least }) = slowly.peek(&bytes[..end]) else {
                    panic!("{end} of {consumed} bytes are no hello");
                };
                assert!(at_least > end && at_least <= consumed);
            }
            assert_eq!(slowly.peek(&bytes[..consumed]), done);
        }
    }

    #[test]
    fn old_hellos_have_no_extensions() {
        let mut old = message(&[]);
        old.truncate(old.len() - 2);
        old[3] -= 2;
        let bytes = records(&old, old.len());
        assert_eq!(
            peek(&bytes),
            Ok(Parsed::Done {
                consumed: bytes.len(),
                value: ClientHello { cipher_suites: vec![0x1301], ..ClientHello::default() }
            })
        );
        let none = records(&message(&[]), 99);
        assert!(matches!(peek(&none), Ok(Parsed::Done { value: ClientHello { tls13: false, .. }, .. })));
    }

    #[test]
    fn what_is_no_hello_is_told_at_once() {
        assert_eq!(peek(b"G"), Err(ClientHelloError::NotTls(b'G')));
        assert_eq!(peek(b"W3PTUNL"), Err(ClientHelloError::NotTls(b'W')));
        assert_eq!(peek(&hex("16 0301 0000")), Err(ClientHelloError::Record { version: 0x301, length: 0 }));
        assert_eq!(
            peek(&hex("16 0301 4001")),
            Err(ClientHelloError::Record { version: 0x301, length: 0x4001 })
        );
        assert_eq!(peek(&hex("16 0200 0010")), Err(ClientHelloError::Record { version: 0x200, length: 16 }));
        assert_eq!(peek(&hex("16 0301 0010 02")), Err(ClientHelloError::NotClientHello(2)));
        assert_eq!(peek(&hex("16 0301 0004 01 010000")), Err(ClientHelloError::TooLong));
        assert_eq!(peek(&hex("16 0301 0001 01 15")), Err(ClientHelloError::NotTls(0x15)));
        let long = records(&[&[1, 0, 0xff, 0xf0][..], &vec![0; 0xfff0]].concat(), 1);
        assert_eq!(peek(&long), Err(ClientHelloError::TooLong), "record headers count");
    }

    #[test]
    fn names_that_are_none_and_lengths_that_lie() {
        let refused = |extensions: &[Vec<u8>]| {
            let message = message(extensions);
            peek(&records(&message, message.len())).unwrap_err()
        };
        for wrong in [
            &b""[..],
            b".",
            b"a..b",
            b"a b",
            b"a\0.example",
            b"\xc3\xa4.example",
            &[b'x'; 64],
            &b"abc.".repeat(70),
        ] {
            assert_eq!(refused(&[name(wrong)]), ClientHelloError::ServerName, "{wrong:?}");
        }
        assert_eq!(refused(&[name(b"a"), name(b"b")]), ClientHelloError::Twice(0));
        assert_eq!(
            refused(&[extension(0, &hex("0008 00 0001 61 00 0001 62"))]),
            ClientHelloError::ServerName
        );
        assert_eq!(
            refused(&[extension(0, &hex("0004 00 0009 61"))]),
            ClientHelloError::Length("server_name")
        );
        assert_eq!(refused(&[extension(16, &hex("0001 00"))]), ClientHelloError::Length("alpn"));
        assert_eq!(refused(&[extension(16, &hex("0003 05 61 62"))]), ClientHelloError::Length("alpn"));
        assert_eq!(refused(&[vec![0, 0, 0, 9, 1]]), ClientHelloError::Length("extension"));
        let mut behind = message(&[name(b"a")]);
        behind.push(0);
        behind[3] += 1;
        assert_eq!(peek(&records(&behind, 999)), Err(ClientHelloError::Length("ClientHello")));
        let fine = message(&[name(b"a.example.")]);
        let Ok(Parsed::Done { value, .. }) = peek(&records(&fine, 999)) else { panic!("it is fine") };
        assert_eq!(value.server_name.as_deref(), Some("a.example"));
    }

    proptest! {
        #[test]
        fn perturbed_hellos_do_not_panic(
            size in 1usize..300, at: prop::sample::Index, value: u8, cut: prop::sample::Index,
        ) {
            let mut bytes = records(&usual(), size);
            let at = at.index(bytes.len());
            bytes[at] = value;
            let whole = peek(&bytes);
            let mut slowly = Peek::new();
            let part = slowly.peek(&bytes[..cut.index(bytes.len())]);
            // A changed length may end the message before the bytes do: then it is not asked again.
            let needs_more = matches!(part, Ok(Parsed::NeedMore { .. }));
            prop_assert_eq!(if needs_more { slowly.peek(&bytes) } else { part }, whole);
        }
    }
}
