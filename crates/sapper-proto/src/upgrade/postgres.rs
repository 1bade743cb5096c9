//! PostgreSQL: the request for TLS (SSLRequest), and TLS at once with an application protocol (version 17).
//!
//! The protocol's SSLRequest: length 8, code 80877103; the answer is one byte, `S` or `N`.

use super::{Machine, UpgradeError, Wants, Wires};

/// The application protocol of TLS at once.
pub const ALPN: &str = "postgresql";
/// What a TLS handshake's first record begins with.
pub(super) const TLS_HANDSHAKE: u8 = 22;

const NAME: &str = "PostgreSQL";
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const SSL_CODE: u32 = 80_877_103;
const GSS_CODE: u32 = 80_877_104;
const CANCEL_CODE: u32 = 80_877_102;
/// An ErrorResponse: severity, SQLSTATE 28000 (invalid authorization), message.
const NEEDS_TLS: &[u8] = b"SFATAL\0VFATAL\0C28000\0Mconnections are under TLS only: use sslmode=require\0\0";

pub(super) struct Client {
    direct: bool,
    asked: bool,
    answered: bool,
}

impl Client {
    pub(super) fn new(direct: bool) -> Self {
        Self { direct, asked: direct, answered: false }
    }
}

impl Machine for Client {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        if self.answered {
            return Ok(Wants::Done);
        }
        if !self.asked {
            self.asked = true;
            wires.to_network.extend_from_slice(&SSL_REQUEST);
        }
        if !self.direct {
            match wires.from_network.first() {
                None => return Ok(Wants::Network),
                Some(b'S') => drop(wires.from_network.drain(..1)),
                Some(b'N') => return Err(refused("the server has no TLS")),
                // What it says is nobody's word: an error in clear may come from anybody (CVE-2024-10977).
                Some(b'E') => return Err(refused("the server answered the request for TLS with an error")),
                Some(_) => return Err(UpgradeError::Malformed(NAME)),
            }
        }
        self.answered = true;
        Ok(Wants::Tls)
    }
}

pub(super) struct Server {
    only_direct: bool,
    refused_gss: bool,
    answered: bool,
}

impl Server {
    pub(super) fn new(only_direct: bool) -> Self {
        Self { only_direct, refused_gss: false, answered: false }
    }
}

impl Machine for Server {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        if self.answered {
            return Ok(Wants::Done);
        }
        loop {
            match wires.from_network.first() {
                None => return Ok(Wants::Network),
                Some(&TLS_HANDSHAKE) if !self.refused_gss => {
                    self.answered = true;
                    return Ok(Wants::Tls);
                }
                Some(_) if self.only_direct => return Err(refused("the client does not begin with TLS")),
                // A start-up packet is shorter than 10,000 bytes.
                Some(0) => {}
                Some(_) => return Err(UpgradeError::Malformed(NAME)),
            }
            let Some((head, _)) = wires.from_network.split_first_chunk::<8>() else {
                return Ok(Wants::Network);
            };
            let [a, b, c, d, e, f, g, h] = *head;
            match (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])) {
                (8, SSL_CODE) => {
                    wires.from_network.drain(..8);
                    wires.to_network.push(b'S');
                    self.answered = true;
                    return Ok(Wants::Tls);
                }
                (8, GSS_CODE) if !self.refused_gss => {
                    wires.from_network.drain(..8);
                    wires.to_network.push(b'N');
                    self.refused_gss = true;
                }
                // Nobody waits for an answer to it.
                (16, CANCEL_CODE) => return Err(refused("the client wants to cancel a query without TLS")),
                (length, version) if (9..10_000).contains(&length) && version >> 16 == 3 => {
                    let length = 4 + NEEDS_TLS.len() as u32;
                    wires.to_network.push(b'E');
                    wires.to_network.extend_from_slice(&length.to_be_bytes());
                    wires.to_network.extend_from_slice(NEEDS_TLS);
                    return Err(refused("the client did not ask for TLS"));
                }
                _ => return Err(UpgradeError::Malformed(NAME)),
            }
        }
    }
}

fn refused(why: &str) -> UpgradeError {
    UpgradeError::Refused(why.to_owned())
}
