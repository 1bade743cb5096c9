//! Recognises a peer that does not speak TLS by what it says first. A library would report a bad
//! record; a person wants to hear "this is HTTP".

use std::fmt::Write as _;

use crate::error::{Direction, Error, ErrorKind, Phase};
use crate::tls::failure::alert;

/// Bytes of the peer's first words that an error shows.
const SHOWN: usize = 24;

/// What other protocols begin with, and what they are called.
const KNOWN: &[(&[u8], &str)] = &[
    (b"HTTP/", "HTTP"),
    (b"GET ", "HTTP"),
    (b"POST ", "HTTP"),
    (b"HEAD ", "HTTP"),
    (b"PUT ", "HTTP"),
    (b"CONNECT ", "HTTP"),
    (b"OPTIONS ", "HTTP"),
    (b"PRI * HTTP/2", "HTTP/2 without TLS"),
    (b"SSH-", "SSH"),
    (b"220 ", "a mail or FTP greeting"),
    (b"220-", "a mail or FTP greeting"),
    (b"* OK", "IMAP"),
    (b"+OK", "POP3"),
    (b"PROXY ", "the PROXY protocol"),
    (b"\r\n\r\n\0\r\nQUIT\n", "the PROXY protocol"),
    (b"CDTunnel", "CDTunnel without TLS"),
];

/// Looks at the first bytes that a peer sent. `Ok(true)` says that enough was seen and it is TLS,
/// `Ok(false)` that more bytes are needed.
pub(crate) fn check(first: &[u8], we_are_client: bool) -> Result<bool, Error> {
    let looks_like_tls = match first {
        [] => return Ok(false),
        // A handshake record; to a client also an alert, to a server nothing else.
        [22, rest @ ..] => version_fits(rest),
        [21, rest @ ..] => we_are_client && version_fits(rest),
        // An SSL 2 hello, which announced newer versions long ago, is refused like any stranger.
        _ => false,
    };
    if !looks_like_tls {
        return Err(stranger(first));
    }
    match first {
        [22, _, _, _, _, kind, ..] => {
            let expected = if we_are_client { 2 } else { 1 };
            // HelloRequest (0) may come before the server's hello in TLS 1.2.
            match *kind {
                kind if kind == expected || (we_are_client && kind == 0) => Ok(true),
                1 => Err(refused(
                    "the peer begins a TLS handshake as we do: both ends are clients, and one has to be the server",
                )
                .with_reason("both_clients")),
                _ => Err(stranger(first)),
            }
        }
        [21, _, _, _, _, ..] => Ok(true),
        _ => Ok(false),
    }
}

fn version_fits(rest: &[u8]) -> bool {
    match rest {
        [] => true,
        [3] => true,
        [3, minor, ..] => *minor <= 4,
        _ => false,
    }
}

fn stranger(first: &[u8]) -> Error {
    if let [21, 3, minor, 0, 2, _, description, ..] = *first
        && minor <= 4
    {
        let name = alert::name(description);
        let text =
            format!("the peer began with the TLS alert {name} ({description}) where its handshake is due");
        return refused(text).with_reason("not_tls");
    }
    let known = KNOWN.iter().find(|(prefix, _)| first.starts_with(prefix));
    let guess = known.map_or(String::new(), |(_, name)| format!(" ({name})"));
    refused(format!("the peer does not speak TLS: it began with {}{guess}", shown(first)))
        .with_reason("not_tls")
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::IncompatiblePeer, message.into())
        .with_phase(Phase::Handshake)
        .with_direction(Direction::Decapsulate)
}

/// Text in quotes where it is text, hexadecimal otherwise. Never more than a few bytes.
fn shown(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(SHOWN)];
    let line = cut.split(|&b| b == b'\r' || b == b'\n').next().unwrap_or(cut);
    if line.len() >= 2 && line.iter().all(|b| (0x20..0x7f).contains(b)) {
        return format!("{:?}", String::from_utf8_lossy(line));
    }
    let mut text = String::new();
    for (index, byte) in cut.iter().take(12).enumerate() {
        let gap = if index == 0 { "" } else { " " };
        let _ = write!(text, "{gap}{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_is_recognised_at_every_length() {
        let hello = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
        for n in 0..=hello.len() {
            assert_eq!(check(&hello[..n], false).unwrap(), n >= 6, "{n} bytes");
        }
        assert!(check(&[22, 3, 3, 0, 80, 2], true).unwrap());
        assert!(check(&[21, 3, 3, 0, 2, 2, 40], true).unwrap());
    }

    #[test]
    fn strangers_are_named() {
        for (bytes, words) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], "\"HTTP/1.1 400 Bad Request\" (HTTP)"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
            (b"220 mail ready\r\n", "greeting"),
            (b"\x00\x0e\x08\x00\x00", "00 0e 08 00 00"),
            (b"hello", "\"hello\""),
            (b"\x16\x02\x00", "16 02 00"),
        ] {
            let error = check(bytes, true).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::IncompatiblePeer);
            assert!(error.message().contains(words), "{}", error.message());
        }
        assert!(check(b"GET / HTTP/1.1\r\n", false).unwrap_err().message().contains("HTTP"));
        // A server's hello where a client's is due: two servers, or two clients, face each other.
        assert!(check(&[22, 3, 3, 0, 80, 2], false).is_err());
        assert!(check(&[21, 3, 3, 0, 2], false).is_err());
        let error = check(&[22, 3, 1, 2, 0, 1, 0, 1], true).unwrap_err();
        assert!(error.message().contains("both ends are clients"), "{error}");
        // Whoever gives up before it began says why.
        let error = check(&[21, 3, 3, 0, 2, 2, 40], false).unwrap_err();
        assert!(error.message().contains("alert handshake_failure (40)"), "{error}");
    }

    #[test]
    fn one_strange_byte_is_enough() {
        assert!(check(b"H", true).is_err());
        assert!(check(b"\x16H", true).is_err());
    }
}
