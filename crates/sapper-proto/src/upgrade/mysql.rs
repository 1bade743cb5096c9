//! MySQL and MariaDB: the server greets, the client asks for TLS in the middle of the log-in.
//!
//! Packets: length (3 bytes, little-endian), sequence number, payload. The request for TLS is the first 32
//! bytes of the client's log-in, one packet more than without TLS: until the log-in is over, the numbers
//! on the wire under TLS are one ahead of those inside. The greeting holds what passwords are hashed with,
//! so here a server's own words in clear reach the program, as in every client of MySQL.
//!
//! Each end knows only of its own wire: one that is not under TLS may refuse to be told a password in clear,
//! or to tell it. `caching_sha2_password` does, unless it runs over a Unix socket.

use super::{LONGEST, Machine, UpgradeError, Wants, Wires};

const NAME: &str = "MySQL";
const HEADER: usize = 4;
const PROTOCOL: u8 = 10;
const OK: u8 = 0x00;
const ERROR: u8 = 0xff;
/// Capabilities, in the lower two bytes.
const PROTOCOL_41: u16 = 0x0200;
const SSL: u16 = 0x0800;
/// Capabilities, largest packet, character set, filler.
const SSL_REQUEST: usize = 32;
/// Code 3159 (insecure transport is prohibited), SQLSTATE 08004.
const NEEDS_TLS: &[u8] = b"\xff\x57\x0c#08004connections are under TLS only";
/// Packets of one log-in, both ways: what a loop without end would exceed.
const MOST_PACKETS: usize = 64;

/// The first packet that is there whole: sequence number and payload. `error` is what a malformed one is.
fn take_packet(bytes: &mut Vec<u8>, error: &UpgradeError) -> Result<Option<(u8, Vec<u8>)>, UpgradeError> {
    let Some((&[a, b, c, sequence], rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes([a, b, c, 0]) as usize;
    if length == 0 || HEADER + length > LONGEST {
        return Err(error.clone());
    }
    let Some(payload) = rest.get(..length) else { return Ok(None) };
    let payload = payload.to_vec();
    bytes.drain(..HEADER + length);
    Ok(Some((sequence, payload)))
}

fn put_packet(to: &mut Vec<u8>, sequence: u8, payload: &[u8]) {
    let [a, b, c, _] = (payload.len() as u32).to_le_bytes();
    to.extend_from_slice(&[a, b, c, sequence]);
    to.extend_from_slice(payload);
}

/// Where the lower capabilities lie in a greeting: behind version, thread, eight bytes of salt, filler.
fn greeting_capabilities(payload: &[u8]) -> Option<usize> {
    if payload.first() != Some(&PROTOCOL) {
        return None;
    }
    let version_end = payload.iter().skip(1).take(256).position(|byte| *byte == 0)? + 1;
    let at = version_end + 1 + 4 + 8 + 1;
    (payload.len() >= at + 2).then_some(at)
}

fn capabilities(payload: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([payload[at], payload[at + 1]])
}

fn set_capabilities(payload: &mut [u8], at: usize, value: u16) {
    payload[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn malformed() -> UpgradeError {
    UpgradeError::Malformed(NAME)
}

fn inside() -> UpgradeError {
    UpgradeError::Inside("what is inside does not speak MySQL".to_owned())
}

/// The log-in behind the TLS handshake: packets both ways, each with its number moved by one.
#[derive(Default)]
struct LogIn {
    packets: usize,
    done: bool,
}

impl LogIn {
    fn step(&mut self, wires: &mut Wires, role: super::Role) -> Result<Wants, UpgradeError> {
        let server_is_outside = role == super::Role::Client;
        while !self.done {
            // Whichever has a packet: they take turns.
            let outside = take_packet(&mut wires.from_network, &malformed())?;
            let (is_server, sequence, payload) = if let Some((sequence, payload)) = outside {
                let moved = sequence.wrapping_sub(1);
                put_packet(&mut wires.to_inner, moved, &payload);
                (server_is_outside, sequence, payload)
            } else if let Some((sequence, payload)) = take_packet(&mut wires.from_inner, &inside())? {
                let moved = sequence.wrapping_add(1);
                put_packet(&mut wires.to_network, moved, &payload);
                (!server_is_outside, moved, payload)
            } else {
                return Ok(Wants::Either);
            };
            self.packets += 1;
            if self.packets > MOST_PACKETS || sequence < 2 {
                return Err(malformed());
            }
            self.done = is_server && matches!(payload.first(), Some(&(OK | ERROR)));
        }
        Ok(Wants::Done)
    }
}

#[derive(Default)]
pub(super) struct Client {
    stage: Stage,
    /// The program's log-in, sent again under TLS.
    held: Vec<u8>,
    login: LogIn,
}

#[derive(Clone, Copy, Default)]
enum Stage {
    #[default]
    Greeting,
    Request,
    Encrypted,
    LogIn,
}

impl Machine for Client {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        loop {
            match self.stage {
                Stage::Greeting => {
                    let Some((sequence, mut payload)) = take_packet(&mut wires.from_network, &malformed())?
                    else {
                        return Ok(Wants::Network);
                    };
                    if payload[0] == ERROR {
                        return Err(UpgradeError::Refused("the server refuses the connection".to_owned()));
                    }
                    let at =
                        greeting_capabilities(&payload).filter(|_| sequence == 0).ok_or_else(malformed)?;
                    let offered = capabilities(&payload, at);
                    if offered & SSL == 0 {
                        return Err(UpgradeError::Refused("the server has no TLS".to_owned()));
                    }
                    // The program shall not ask for it too.
                    set_capabilities(&mut payload, at, offered & !SSL);
                    put_packet(&mut wires.to_inner, 0, &payload);
                    self.stage = Stage::Request;
                }
                Stage::Request => {
                    if !wires.from_network.is_empty() {
                        return Err(UpgradeError::Early(wires.from_network.len()));
                    }
                    let Some((sequence, mut payload)) = take_packet(&mut wires.from_inner, &inside())? else {
                        return Ok(Wants::Inner);
                    };
                    let is_log_in =
                        payload.len() > SSL_REQUEST && capabilities(&payload, 0) & PROTOCOL_41 != 0;
                    if sequence != 1 || !is_log_in {
                        return Err(inside());
                    }
                    let wanted = capabilities(&payload, 0) | SSL;
                    set_capabilities(&mut payload, 0, wanted);
                    put_packet(&mut wires.to_network, 1, &payload[..SSL_REQUEST]);
                    put_packet(&mut self.held, 2, &payload);
                    self.stage = Stage::Encrypted;
                    return Ok(Wants::Tls);
                }
                Stage::Encrypted => {
                    wires.to_network.append(&mut self.held);
                    self.stage = Stage::LogIn;
                }
                Stage::LogIn => return self.login.step(wires, super::Role::Client),
            }
        }
    }
}

#[derive(Default)]
pub(super) struct Server {
    stage: Stage,
    login: LogIn,
}

impl Machine for Server {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        loop {
            match self.stage {
                Stage::Greeting => {
                    // Before the greeting a client has nothing to say.
                    if !wires.from_network.is_empty() {
                        return Err(malformed());
                    }
                    let Some((sequence, mut payload)) = take_packet(&mut wires.from_inner, &inside())? else {
                        return Ok(Wants::Inner);
                    };
                    if payload[0] == ERROR {
                        put_packet(&mut wires.to_network, sequence, &payload);
                        return Err(UpgradeError::Inside("the service refuses the connection".to_owned()));
                    }
                    let at = greeting_capabilities(&payload).filter(|_| sequence == 0).ok_or_else(inside)?;
                    let offered = capabilities(&payload, at) | SSL;
                    set_capabilities(&mut payload, at, offered);
                    put_packet(&mut wires.to_network, 0, &payload);
                    self.stage = Stage::Request;
                }
                Stage::Request => {
                    let Some((sequence, payload)) = take_packet(&mut wires.from_network, &malformed())?
                    else {
                        return Ok(Wants::Network);
                    };
                    if sequence != 1 || payload.len() < SSL_REQUEST {
                        return Err(malformed());
                    }
                    if capabilities(&payload, 0) & SSL == 0 || payload.len() != SSL_REQUEST {
                        put_packet(&mut wires.to_network, 2, NEEDS_TLS);
                        return Err(UpgradeError::Refused("the client did not ask for TLS".to_owned()));
                    }
                    self.stage = Stage::Encrypted;
                    return Ok(Wants::Tls);
                }
                Stage::Encrypted => {
                    let Some((sequence, mut payload)) = take_packet(&mut wires.from_network, &malformed())?
                    else {
                        return Ok(Wants::Network);
                    };
                    if sequence != 2 || payload.len() <= SSL_REQUEST {
                        return Err(malformed());
                    }
                    let wanted = capabilities(&payload, 0) & !SSL;
                    set_capabilities(&mut payload, 0, wanted);
                    put_packet(&mut wires.to_inner, 1, &payload);
                    self.stage = Stage::LogIn;
                }
                Stage::LogIn => return self.login.step(wires, super::Role::Server),
            }
        }
    }
}
