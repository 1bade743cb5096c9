//! The handshake of W3PTUNL: who is there, may it, and which port it got.
//!
//! Both directions begin with seven bytes, u32 length and a JSON object; frames follow
//! ([`frame`](super::frame)). The client's object is its credentials as they are: an original server
//! hands the whole object to a filter that may compare strictly, so nothing is ever added to it. The
//! server's is `{"port": N}`, and an original client ignores every other key: our offer travels there.
//! An object with `error` instead of `port` refuses; an original client takes it as an error.
//!
//! What is not here: whether credentials are good, and the hello that follows an offer
//! ([`mux`](super::mux)).

use std::time::Duration;

use serde_core::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::frame::{Capabilities, FrameError, VERSION};
pub use crate::parsed::Parsed;
use crate::shown;

/// What each direction begins with.
pub const MAGIC: [u8; 7] = *b"W3PTUNL";
/// The longest handshake body. The framing would allow 64 MiB; a stranger is not given that.
pub const LONGEST_HANDSHAKE: usize = 65_536;
/// Bytes in front of a handshake's body.
pub const PREFIX: usize = MAGIC.len() + 4;
/// How deep credentials are nested at most: who looks at them may do so by recursion.
const DEEPEST: usize = 127;
/// The key of our offer in a server's acknowledgement.
const OFFER: &str = "sapper";
/// The longest pause that a refusal can ask for.
const LONGEST_RETRY: u64 = 86_400;

/// Sent to a TLS client that came to a plain port, so that it knows at once: a fatal alert,
/// unexpected_message. No TLS server says that to a first hello, so a client of ours takes it for certain.
pub const TLS_ALERT: [u8; 7] = [21, 3, 1, 0, 2, 2, 10];

/// What somebody who connected speaks, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speech {
    /// W3PTUNL, as far as it is there.
    W3p,
    /// TLS: a handshake from a client, or an alert from a server.
    Tls,
    /// A request of HTTP/1.
    Http,
    /// Something else.
    Other,
}

/// Tells what `bytes` begin. `None` while there are none.
pub fn recognise(bytes: &[u8]) -> Option<Speech> {
    let first = *bytes.first()?;
    let known = bytes.len().min(MAGIC.len());
    let http = [&b"GET "[..], b"POST ", b"HEAD ", b"PUT ", b"OPTIONS ", b"CONNECT ", b"DELETE ", b"PATCH "];
    let begins = |word: &[u8]| {
        let known = bytes.len().min(word.len());
        bytes[..known] == word[..known]
    };
    Some(if bytes[..known] == MAGIC[..known] {
        Speech::W3p
    } else if matches!(first, 21 | 22) && bytes.get(1).is_none_or(|major| *major == 3) {
        Speech::Tls
    } else if http.into_iter().any(begins) {
        Speech::Http
    } else {
        Speech::Other
    })
}

/// Why a handshake is refused. Texts of the original where it has one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum W3pError {
    /// The peer does not begin with the seven bytes; what it seems to speak.
    #[error("Invalid magic bytes")]
    Magic(Speech),
    /// The length of the body is out of range.
    #[error(transparent)]
    Length(#[from] FrameError),
    /// The body is no JSON.
    #[error("Handshake message is not valid JSON: {0}")]
    Json(String),
    /// The body is JSON, but not what belongs there.
    #[error("Message is not valid")]
    Message,
    /// A client sent something before it had its acknowledgement.
    #[error("the client sent more before its handshake was answered")]
    Early,
    /// What we were to send is too long.
    #[error("the handshake has {0} bytes, maximum is {LONGEST_HANDSHAKE}")]
    TooLong(usize),
    /// The peer took too long.
    #[error("the handshake took too long")]
    Deadline,
}

/// What a server says to a client that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The newest version of our extension that it speaks.
    pub newest: u8,
    /// The oldest.
    pub oldest: u8,
    /// What it can.
    pub capabilities: Capabilities,
}

impl Offer {
    /// What this crate offers.
    pub const OURS: Self = Self { newest: VERSION, oldest: VERSION, capabilities: Capabilities::ALL };

    /// What both can, where our version is in range.
    pub fn common(self, ours: Capabilities) -> Option<Capabilities> {
        let common = self.capabilities.common(ours);
        ((self.oldest..=self.newest).contains(&VERSION) && common != Capabilities(0)).then_some(common)
    }
}

/// When a refused client may come again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retry {
    /// Its own back-off decides.
    #[default]
    Usual,
    /// Never: trying again with the same configuration is of no use.
    Never,
    /// Not before this has passed.
    After(Duration),
}

/// What a server says to a client that it does not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// A word for programs.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// When to come again.
    pub retry: Retry,
}

/// The server's half of the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acknowledgement {
    /// The client has a tunnel.
    Accepted {
        /// Its public port.
        port: u16,
        /// The server's offer; an original server makes none.
        offer: Option<Offer>,
    },
    /// The client has none.
    Refused(Refusal),
}

impl Acknowledgement {
    /// The message as it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let body = match self {
            Self::Accepted { port, offer: None } => format!(r#"{{"port":{port}}}"#),
            Self::Accepted { port, offer: Some(offer) } => format!(
                r#"{{"port":{port},"{OFFER}":{{"versions":[{},{}],"capabilities":{}}}}}"#,
                offer.oldest, offer.newest, offer.capabilities.0
            ),
            Self::Refused(refusal) => json!({"error": refusal_value(refusal)}).to_string(),
        };
        message(&body)
    }

    /// Reads the first bytes of a server's direction.
    pub fn parse(bytes: &[u8]) -> Result<Parsed<Self>, W3pError> {
        let (consumed, object) = match parse_body(bytes)? {
            Parsed::NeedMore { at_least } => return Ok(Parsed::NeedMore { at_least }),
            Parsed::Done { consumed, value } => (consumed, object(value)?),
        };
        let value = match object.get("port") {
            Some(port) => {
                // JavaScript knows one kind of number: 8080.0 is a port there.
                let number = port.as_f64().filter(|number| number.fract() == 0.0);
                let port = number.filter(|number| (1.0..=65_535.0).contains(number));
                let port = port.ok_or(W3pError::Message)? as u16;
                Self::Accepted { port, offer: object.get(OFFER).and_then(read_offer) }
            }
            None => Self::Refused(object.get("error").and_then(read_refusal).ok_or(W3pError::Message)?),
        };
        Ok(Parsed::Done { consumed, value })
    }
}

/// An offer that cannot be understood is none.
fn read_offer(value: &Value) -> Option<Offer> {
    let small = |value: &Value| value.as_u64().and_then(|number| u8::try_from(number).ok());
    let versions = value.get("versions")?;
    Some(Offer {
        oldest: small(versions.get(0)?)?,
        newest: small(versions.get(1)?)?,
        capabilities: Capabilities(value.get("capabilities")?.as_u64()? as u32 & Capabilities::ALL.0),
    })
}

/// A refusal as both answers of a server carry it.
pub(super) fn refusal_value(refusal: &Refusal) -> Value {
    let retry = match refusal.retry {
        Retry::Usual => json!(true),
        Retry::Never => json!(false),
        Retry::After(pause) => json!(pause.as_secs_f64()),
    };
    json!({"code": refusal.code, "message": refusal.message, "retry": retry})
}

pub(super) fn read_refusal(value: &Value) -> Option<Refusal> {
    /// What a stranger says goes into our logs.
    const SHOWN: usize = 256;
    let text = |key: &str| Some(value.get(key)?.as_str()?.chars().take(SHOWN).map(shown::clean).collect());
    let retry = match value.get("retry") {
        Some(Value::Bool(false)) => Retry::Never,
        Some(Value::Number(seconds)) => {
            let seconds = seconds.as_f64().unwrap_or(0.0).clamp(0.0, LONGEST_RETRY as f64);
            Retry::After(Duration::from_millis((seconds * 1000.0).ceil() as u64))
        }
        _ => Retry::Usual,
    };
    Some(Refusal { code: text("code")?, message: text("message").unwrap_or_default(), retry })
}

/// What a client says of itself, as it said it. It does not print.
#[derive(Clone, PartialEq)]
pub struct Credentials {
    /// The JSON text, byte by byte: an object.
    pub text: String,
}

impl Credentials {
    /// What JavaScript's `JSON.parse` reads, as an original server does: numbers beyond a double and escapes that are
    /// half a character too. But for what is nested deeper than [`DEEPEST`].
    fn read(body: &[u8]) -> Result<Self, W3pError> {
        let wrong = |error: &dyn std::fmt::Display| W3pError::Json(error.to_string());
        let text = std::str::from_utf8(body).map_err(|error| wrong(&error))?;
        // It looks at the form alone, without recursion.
        serde_json::from_str::<IgnoredAny>(text).map_err(|error| wrong(&error))?;
        if !text.trim_start().starts_with('{') {
            return Err(W3pError::Message);
        }
        if depth(text) > DEEPEST {
            return Err(wrong(&"nested too deep"));
        }
        Ok(Self { text: text.to_owned() })
    }
}

/// How deep a JSON text is nested.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest, mut in_text, mut escaped) = (0_usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b'{' | b'[' if !in_text => depth += 1,
            b'}' | b']' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({} bytes)", self.text.len())
    }
}

/// The client's half: its credentials, then the server's answer.
///
/// Order of calls: [`new`](Self::new); send what [`message`](Self::message) gives; then
/// [`handle_bytes`](Self::handle_bytes) with all bytes that the server has sent so far until it is done.
/// [`handle_timeout`](Self::handle_timeout) at [`poll_timeout`](Self::poll_timeout).
#[derive(Debug)]
pub struct ClientHandshake {
    message: Vec<u8>,
    deadline: Duration,
}

impl ClientHandshake {
    /// Of a client with these credentials, a JSON object. The text goes out as it is.
    pub fn new(credentials: &str, deadline: Duration) -> Result<Self, W3pError> {
        if credentials.len() > LONGEST_HANDSHAKE {
            return Err(W3pError::TooLong(credentials.len()));
        }
        object(credentials.as_bytes())?;
        Ok(Self { message: message(credentials), deadline })
    }

    /// What the client sends, at once and first.
    pub fn message(&self) -> &[u8] {
        &self.message
    }

    /// Looks at the server's first bytes. What lies behind the message are frames.
    pub fn handle_bytes(&self, bytes: &[u8]) -> Result<Parsed<Acknowledgement>, W3pError> {
        Acknowledgement::parse(bytes)
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    pub fn poll_timeout(&self) -> Duration {
        self.deadline
    }

    /// An error when it is too late.
    pub fn handle_timeout(&self, now: Duration) -> Result<(), W3pError> {
        if now < self.deadline { Ok(()) } else { Err(W3pError::Deadline) }
    }
}

/// The server's half: a client's credentials, a decision, the answer.
///
/// Order of calls: [`new`](Self::new); [`handle_bytes`](Self::handle_bytes) with all bytes so far until
/// it gives the credentials. While somebody decides about them, `handle_bytes` with what came behind
/// them refuses a client that does not wait (a second handshake would be a second tunnel). Then
/// [`answer`](Self::answer), once, and send that. The deadline holds until the credentials are there:
/// the decision has its own.
#[derive(Debug)]
pub struct ServerHandshake {
    deadline: Option<Duration>,
    consumed: usize,
}

impl ServerHandshake {
    /// Of a client that just connected.
    pub fn new(deadline: Duration) -> Self {
        Self { deadline: Some(deadline), consumed: 0 }
    }

    /// Looks at the client's first bytes, all of them each time.
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<Parsed<Credentials>, W3pError> {
        if self.deadline.is_none() {
            // It has nothing to say before it knows that it is in.
            return if bytes.len() > self.consumed {
                Err(W3pError::Early)
            } else {
                Ok(Parsed::NeedMore { at_least: self.consumed + 1 })
            };
        }
        match parse_body(bytes)? {
            Parsed::NeedMore { at_least } => Ok(Parsed::NeedMore { at_least }),
            Parsed::Done { consumed, value } => {
                let value = Credentials::read(value)?;
                if bytes.len() > consumed {
                    return Err(W3pError::Early);
                }
                self.deadline = None;
                self.consumed = consumed;
                Ok(Parsed::Done { consumed, value })
            }
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout); `None` once the credentials are there.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.deadline
    }

    /// An error when the client took too long.
    pub fn handle_timeout(&self, now: Duration) -> Result<(), W3pError> {
        if self.deadline.is_some_and(|deadline| now >= deadline) { Err(W3pError::Deadline) } else { Ok(()) }
    }

    /// The message that ends the handshake. What follows is frames.
    pub fn answer(self, answer: &Acknowledgement) -> Vec<u8> {
        answer.encode()
    }
}

fn message(body: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(PREFIX + body.len());
    out.extend(MAGIC);
    out.extend((body.len() as u32).to_be_bytes());
    out.extend(body.as_bytes());
    out
}

fn object(body: &[u8]) -> Result<Map<String, Value>, W3pError> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(W3pError::Message),
        Err(error) => Err(W3pError::Json(error.to_string())),
    }
}

/// The body of a handshake message.
fn parse_body(bytes: &[u8]) -> Result<Parsed<&[u8]>, W3pError> {
    match recognise(bytes) {
        None => return Ok(Parsed::NeedMore { at_least: PREFIX }),
        Some(Speech::W3p) => {}
        Some(other) => return Err(W3pError::Magic(other)),
    }
    let Some(&[a, b, c, d]) = bytes.get(MAGIC.len()..PREFIX) else {
        return Ok(Parsed::NeedMore { at_least: PREFIX });
    };
    let length = u32::from_be_bytes([a, b, c, d]);
    if length as usize > LONGEST_HANDSHAKE {
        return Err(FrameError::TooLong { length, maximum: LONGEST_HANDSHAKE as u32 }.into());
    }
    let consumed = PREFIX + length as usize;
    let Some(body) = bytes.get(PREFIX..consumed) else {
        return Ok(Parsed::NeedMore { at_least: consumed });
    };
    Ok(Parsed::Done { consumed, value: body })
}

#[cfg(test)]
mod tests;
