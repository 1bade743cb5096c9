//! The handshake of W3PTUNL over a stream, in both roles.

use std::time::Duration;

use sapper_proto::tunnel::frame::LONGEST_HELLO;
use sapper_proto::tunnel::w3p::{
    Acknowledgement, ClientHandshake, Credentials, LONGEST_HANDSHAKE, PREFIX, Parsed, ServerHandshake,
    Speech, W3pError, recognise,
};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::{BoxStream, ops};
use crate::tls::failure::alert;

/// What a client hears that speaks plainly where it should not.
pub(super) const SPEAKS_TLS: &str = "the port speaks TLS: connect with TLS, or turn TLS off at the server";
/// The same in the words of a visitor that speaks HTTP.
pub(super) const HTTP_WORD: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\
\r\nThis port speaks TLS: the address begins with https.\r\n";
/// What TLS says of a peer that speaks none.
const NOT_TLS: &str = "not_tls";
/// How long a last word may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// An error of the handshake, with whose it is.
pub(super) fn failed(error: &W3pError) -> Error {
    let kind = match error {
        W3pError::Magic(_) => ErrorKind::IncompatiblePeer,
        W3pError::Deadline => ErrorKind::HandshakeDeadline,
        W3pError::TooLong(_) => ErrorKind::Config,
        _ => ErrorKind::RemoteProtocol,
    };
    let reason = match error {
        W3pError::Magic(Speech::Tls) => "tls_at_plain_port",
        W3pError::Magic(_) => "not_w3ptunl",
        _ => "greeting",
    };
    let text = match error {
        W3pError::Magic(Speech::Tls) => format!("{error}: the peer speaks TLS, this end does not"),
        W3pError::Magic(Speech::Http) => format!("{error}: the peer speaks HTTP"),
        _ => error.to_string(),
    };
    Error::new(kind, text).with_phase(Phase::Handshake).with_reason(reason)
}

/// A TLS handshake that failed as it does at a plain port: a server of ours answers with `TLS_ALERT`, which
/// no TLS server does; an original one closes, which others do too, and one that is `known` to speak TLS.
pub(super) fn perhaps_plain(error: Error, known: bool) -> Error {
    const REMEDY: &str = "connect without TLS, or turn TLS on at the server";
    if error.alert_received() && error.alert() == Some(alert::UNEXPECTED_MESSAGE) {
        return Error::new(ErrorKind::IncompatiblePeer, format!("the port is plain: {REMEDY}"))
            .with_phase(Phase::Handshake)
            .with_reason("tls_at_plain_port")
            .with_alert_received(alert::UNEXPECTED_MESSAGE);
    }
    let (text, reason) = match error.kind() {
        ErrorKind::ConnectionLost if !known => {
            (format!("{}; perhaps the port is plain: {REMEDY}", error.message()), "truncated")
        }
        // It said something, at least.
        _ if error.reason() == Some(NOT_TLS) => (format!("{}; {REMEDY}", error.message()), NOT_TLS),
        _ => return error,
    };
    Error::new(error.kind(), text).with_phase(Phase::Handshake).with_reason(error.reason().unwrap_or(reason))
}

/// A server that closes without a word: what it may have meant, `secure` where both ends speak TLS, or neither does.
fn perhaps_refused(error: Error, secure: bool) -> Error {
    if error.kind() != ErrorKind::ConnectionLost {
        return error;
    }
    let refused = "does not let this client in, which a server of the original does not say";
    let text = match secure {
        true => format!("{}; perhaps it {refused}", error.message()),
        false => format!("{}; perhaps {SPEAKS_TLS}; or it {refused}", error.message()),
    };
    Error::new(ErrorKind::ConnectionLost, text)
        .with_phase(Phase::Handshake)
        .with_reason(error.reason().unwrap_or("truncated"))
}

/// A visitor speaks no TLS where public ports do.
pub(super) fn plain_visitor(error: &Error) -> Error {
    let text = format!("{}; visit the port with TLS, or turn TLS off at public ports", error.message());
    Error::new(ErrorKind::IncompatiblePeer, text).with_phase(Phase::Handshake).with_reason("not_tls")
}

pub(super) fn ended(what: &str) -> Error {
    Error::new(ErrorKind::ConnectionLost, format!("the peer closed the connection {what}"))
        .with_phase(Phase::Handshake)
        .with_reason("truncated")
}

/// Sends a last word; who does not take it in time does not get it.
pub(super) async fn last_word(stream: &mut BoxStream, bytes: &[u8]) {
    let word = async {
        ops::write_all(stream.as_mut(), bytes).await?;
        ops::send_eof(stream.as_mut()).await?;
        // Its own words that are still to come would make the system throw ours away.
        let mut scrap = [0; 1024];
        while ops::read(stream.as_mut(), &mut scrap).await? > 0 {}
        Ok::<_, Error>(())
    };
    let _ = tokio::time::timeout(LAST_WORDS, word).await;
}

/// Reads once behind `bytes`; 0 is the end.
pub(super) async fn more(stream: &mut BoxStream, bytes: &mut Vec<u8>) -> Result<usize> {
    let mut some = [0; 4096];
    let n = ops::read(stream.as_mut(), &mut some).await?;
    bytes.extend_from_slice(&some[..n]);
    Ok(n)
}

/// A client's credentials. `bytes` is what was read already; `confirmed` is called once the magic is there.
pub(super) async fn credentials(
    stream: &mut BoxStream,
    bytes: &mut Vec<u8>,
    handshake: &mut ServerHandshake,
    mut confirmed: impl FnMut(),
) -> Result<Credentials> {
    let mut told = false;
    loop {
        if !told && bytes.len() >= 7 && recognise(bytes) == Some(Speech::W3p) {
            told = true;
            confirmed();
        }
        match handshake.handle_bytes(bytes) {
            Ok(Parsed::Done { value, .. }) => return Ok(value),
            Ok(Parsed::NeedMore { .. }) => {}
            Err(error) => return Err(failed(&error)),
        }
        if more(stream, bytes).await? == 0 {
            return Err(ended("before its handshake was complete"));
        }
    }
}

/// The handshake is said: a server's answer, and what came behind it. One that is `known` to speak
/// what we do has another reason for its silence.
pub(super) async fn acknowledgement(
    stream: &mut BoxStream,
    handshake: &ClientHandshake,
    (said, mut confirmed): (impl FnOnce(), impl FnMut()),
    known: bool,
) -> Result<(Acknowledgement, Vec<u8>)> {
    const { assert!(LONGEST_HANDSHAKE + PREFIX < 2 * LONGEST_HELLO) };
    let secure = stream.tls_mut().is_some();
    let talk = async {
        ops::write_all(stream.as_mut(), handshake.message()).await?;
        ops::flush(stream.as_mut()).await
    };
    let silence = |error| perhaps_refused(error, secure || known);
    talk.await.map_err(silence)?;
    said();
    let (mut bytes, mut told) = (Vec::new(), false);
    loop {
        if !told && bytes.len() >= 7 && recognise(&bytes) == Some(Speech::W3p) {
            told = true;
            confirmed();
        }
        match handshake.handle_bytes(&bytes) {
            Ok(Parsed::Done { consumed, value }) => {
                bytes.drain(..consumed);
                return Ok((value, bytes));
            }
            Ok(Parsed::NeedMore { .. }) => {}
            Err(W3pError::Magic(Speech::Tls)) => {
                return Err(Error::new(
                    ErrorKind::IncompatiblePeer,
                    format!("Invalid magic bytes: {SPEAKS_TLS}"),
                )
                .with_phase(Phase::Handshake)
                .with_reason("plain_at_tls_port"));
            }
            Err(error) => return Err(failed(&error)),
        }
        let silent = bytes.is_empty();
        let end = match more(stream, &mut bytes).await {
            Ok(1..) => continue,
            Ok(0) => ended("before it answered"),
            Err(error) => error,
        };
        return Err(if silent { silence(end) } else { end });
    }
}
