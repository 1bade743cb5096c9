//! Upgrades in place over streams: what a protocol says in clear, before and just behind TLS.
//!
//! The words are [`sapper_proto::upgrade`]'s; here they are read and written. Used by bridges, and by
//! whoever else shakes hands: [`Upgrading::until_tls`], the handshake, [`Upgrading::check`],
//! [`Upgrading::until_payload`]. The caller sets the deadlines.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use sapper_proto::upgrade::{self as words, Negotiation, Upgrade, UpgradeError, Wants, Wires};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::{RecordMarks, Stream, ops};
use crate::tls::{HandshakeInfo, MAX_RECORD, Role};

/// Alert of a server whose client offers no application protocol that will do (RFC 7301).
pub const NO_APPLICATION_PROTOCOL: u8 = 120;
/// How long the word that tells a peer why may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// An upgrade under way, with the bytes that are on their way in it.
#[derive(Debug)]
pub struct Upgrading {
    negotiation: Negotiation,
    wires: Wires,
}

impl Upgrading {
    /// One that has not begun; `received` was already read from the network.
    pub fn new(upgrade: Upgrade, role: &Role, received: Vec<u8>) -> Self {
        let role = match role {
            Role::Client { .. } => words::Role::Client,
            Role::Server => words::Role::Server,
        };
        let wires = Wires { from_network: received, ..Wires::default() };
        Self { negotiation: Negotiation::new(upgrade, role), wires }
    }

    /// Adds what was already read from inside.
    pub fn received_inside(&mut self, mut bytes: Vec<u8>) {
        self.wires.from_inner.append(&mut bytes);
    }

    /// Speaks in clear until TLS begins. Gives what the network has sent of TLS already. `inner` is needed
    /// by upgrades that are two-sided ([`Upgrade::is_two_sided`]).
    pub async fn until_tls(
        &mut self,
        network: &mut dyn Stream,
        inner: Option<&mut dyn Stream>,
    ) -> Result<Vec<u8>> {
        self.run(network, inner).await?;
        Ok(std::mem::take(&mut self.wires.from_network))
    }

    /// Looks at what the handshake agreed on; where this fails, the connection is to be broken off with
    /// [`NO_APPLICATION_PROTOCOL`].
    pub fn check(&self, info: &HandshakeInfo) -> Result<()> {
        self.negotiation.check_alpn(info.alpn.as_deref()).map_err(|error| failure(&error))
    }

    /// Speaks over the stream under TLS and inside until payload begins.
    pub async fn until_payload(&mut self, network: &mut dyn Stream, inner: &mut dyn Stream) -> Result<()> {
        self.run(network, Some(inner)).await
    }

    /// The payload that was received already: from the network and from inside.
    pub fn into_payload(self) -> (Vec<u8>, Vec<u8>) {
        (self.wires.from_network, self.wires.from_inner)
    }

    async fn run(&mut self, network: &mut dyn Stream, mut inner: Option<&mut dyn Stream>) -> Result<()> {
        // A whole record fits, so that a TLS stream need not open it twice.
        let mut chunk = vec![0; MAX_RECORD];
        loop {
            let stepped = self.negotiation.step(&mut self.wires);
            let wants = match stepped {
                Ok(wants) => wants,
                Err(error) => {
                    // Bounded: a peer that does not listen is not worth a longer wait.
                    let _ = timeout(LAST_WORDS, self.last_words(network)).await;
                    return Err(failure(&error));
                }
            };
            self.send(network, again(&mut inner)).await?;
            let needs_inner = || Error::new(ErrorKind::ApiMisuse, "this upgrade needs both ends");
            match wants {
                Wants::Tls | Wants::Done => return Ok(()),
                Wants::Network => {
                    let n = ops::read(network, &mut chunk).await?;
                    received(&mut self.wires.from_network, &chunk[..n], "the peer")?;
                }
                Wants::Inner => {
                    let n = ops::read(again(&mut inner).ok_or_else(needs_inner)?, &mut chunk).await?;
                    received(&mut self.wires.from_inner, &chunk[..n], "what is inside")?;
                }
                Wants::Either => {
                    let inner = again(&mut inner).ok_or_else(needs_inner)?;
                    let marks = &mut RecordMarks::ignored();
                    let (is_network, n) = poll_fn(|cx| {
                        if let Poll::Ready(n) = network.poll_read(cx, &mut chunk, marks) {
                            return Poll::Ready(n.map(|n| (true, n)));
                        }
                        inner.poll_read(cx, &mut chunk, marks).map_ok(|n| (false, n))
                    })
                    .await?;
                    if is_network {
                        received(&mut self.wires.from_network, &chunk[..n], "the peer")?;
                    } else {
                        received(&mut self.wires.from_inner, &chunk[..n], "what is inside")?;
                    }
                }
            }
        }
    }

    /// What is to be said; what is for an inside that is not open yet waits.
    async fn send(&mut self, network: &mut dyn Stream, inner: Option<&mut dyn Stream>) -> Result<()> {
        send(network, &mut self.wires.to_network).await?;
        match inner {
            Some(inner) => send(inner, &mut self.wires.to_inner).await,
            None => Ok(()),
        }
    }

    async fn last_words(&mut self, network: &mut dyn Stream) -> Result<()> {
        if self.wires.to_network.is_empty() {
            return Ok(());
        }
        send(network, &mut self.wires.to_network).await?;
        ops::send_eof(network).await
    }
}

/// The same reference once more.
fn again<'a>(inner: &'a mut Option<&mut dyn Stream>) -> Option<&'a mut dyn Stream> {
    match inner {
        Some(inner) => Some(&mut **inner),
        None => None,
    }
}

async fn send(stream: &mut dyn Stream, bytes: &mut Vec<u8>) -> Result<()> {
    if !bytes.is_empty() {
        ops::write_all(stream, bytes).await?;
        bytes.clear();
        ops::flush(stream).await?;
    }
    Ok(())
}

fn received(into: &mut Vec<u8>, bytes: &[u8], who: &str) -> Result<()> {
    if bytes.is_empty() {
        let text = format!("{who} closed the connection in the middle of the upgrade to TLS");
        return Err(Error::new(ErrorKind::ConnectionLost, text)
            .with_reason("truncated")
            .with_phase(Phase::Handshake));
    }
    into.extend_from_slice(bytes);
    Ok(())
}

fn failure(error: &UpgradeError) -> Error {
    let kind = match error {
        UpgradeError::Malformed(_) | UpgradeError::Refused(_) | UpgradeError::Alpn(_) => {
            ErrorKind::IncompatiblePeer
        }
        UpgradeError::Left => ErrorKind::ConnectionLost,
        UpgradeError::Early(_) | UpgradeError::TooMuch | UpgradeError::Inside(_) => ErrorKind::RemoteProtocol,
    };
    let reason = match error {
        UpgradeError::Early(_) => "early_data",
        UpgradeError::Malformed(_) => "other_protocol",
        UpgradeError::Refused(_) => "no_tls",
        UpgradeError::TooMuch => "too_much",
        UpgradeError::Left => "goodbye",
        UpgradeError::Alpn(_) => "no_alpn",
        UpgradeError::Inside(_) => "service",
    };
    Error::new(kind, error.to_string()).with_reason(reason).with_phase(Phase::Handshake)
}
