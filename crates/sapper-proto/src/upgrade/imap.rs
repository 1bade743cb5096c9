//! IMAP's STARTTLS (RFC 9051, section 6.2.1).

use super::lines::{MOST_LINES, say, shown, take_line};
use super::{Machine, UpgradeError, Wants, Wires};

const NAME: &str = "IMAP";
/// What a program hears first behind the upgrade. Ours, without capabilities: the server's came in clear.
const GREETING: &str = "* OK IMAP4rev1 ready\r\n";
const GREETING_IN_CLEAR: &str = "* OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED] ready\r\n";
const TAG: &str = "S1";

#[derive(Clone, Copy, Default)]
enum Stage {
    #[default]
    Greeting,
    Tls,
    Encrypted,
}

#[derive(Default)]
pub(super) struct Client {
    stage: Stage,
    lines: usize,
}

impl Machine for Client {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        if let Stage::Encrypted = self.stage {
            wires.to_inner.extend_from_slice(GREETING.as_bytes());
            return Ok(Wants::Done);
        }
        while let Some(line) = take_line(&mut wires.from_network, NAME)? {
            self.lines += 1;
            if self.lines > MOST_LINES {
                return Err(UpgradeError::TooMuch);
            }
            let (tag, rest) = line.split_once(' ').ok_or(UpgradeError::Malformed(NAME))?;
            let status = rest.split(' ').next().unwrap_or_default().to_ascii_uppercase();
            match (self.stage, tag, status.as_str()) {
                (Stage::Greeting, "*", "OK") => {
                    say(&mut wires.to_network, &wires.from_network, &format!("{TAG} STARTTLS\r\n"))?;
                    self.stage = Stage::Tls;
                }
                // Logged in already, by whoever says so in clear: no way to TLS from there.
                (Stage::Greeting, "*", "PREAUTH") => {
                    let why = "the server says that we are logged in, without TLS";
                    return Err(UpgradeError::Refused(why.to_owned()));
                }
                (_, "*", "BYE") => {
                    return Err(UpgradeError::Refused(format!("the server says goodbye: {}", shown(rest))));
                }
                (Stage::Greeting, ..) => return Err(UpgradeError::Malformed(NAME)),
                (_, "*", _) => {}
                (_, TAG, "OK") => {
                    self.stage = Stage::Encrypted;
                    return Ok(Wants::Tls);
                }
                (_, TAG, "NO" | "BAD") => {
                    return Err(UpgradeError::Refused(format!(
                        "the server refuses STARTTLS: {}",
                        shown(rest)
                    )));
                }
                _ => return Err(UpgradeError::Malformed(NAME)),
            }
        }
        Ok(Wants::Network)
    }
}

#[derive(Default)]
pub(super) struct Server {
    greeted: bool,
    encrypted: bool,
    commands: usize,
}

impl Machine for Server {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        if self.encrypted {
            return greeting_inside(wires);
        }
        if !self.greeted {
            self.greeted = true;
            wires.to_network.extend_from_slice(GREETING_IN_CLEAR.as_bytes());
        }
        while let Some(line) = take_line(&mut wires.from_network, NAME)? {
            self.commands += 1;
            if self.commands > MOST_LINES {
                wires.to_network.extend_from_slice(b"* BYE too many commands\r\n");
                return Err(UpgradeError::TooMuch);
            }
            // What follows a literal's length is no command.
            if line.ends_with('}') {
                return Err(UpgradeError::Refused("the client sends data before TLS".to_owned()));
            }
            let mut words = line.split(' ');
            let tag = words.next().unwrap_or_default();
            let is_tag =
                !tag.is_empty() && tag.bytes().all(|b| b.is_ascii_graphic() && !b"(){%*\"\\]+".contains(&b));
            if !is_tag {
                return Err(UpgradeError::Malformed(NAME));
            }
            let command = words.next().unwrap_or_default().to_ascii_uppercase();
            let is_bare = words.next().is_none();
            let answer = match command.as_str() {
                "STARTTLS" if is_bare => {
                    wires.to_network.extend_from_slice(format!("{tag} OK begin TLS\r\n").as_bytes());
                    self.encrypted = true;
                    return Ok(Wants::Tls);
                }
                "CAPABILITY" if is_bare => {
                    format!("* CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED\r\n{tag} OK done\r\n")
                }
                "NOOP" if is_bare => format!("{tag} OK done\r\n"),
                "LOGOUT" if is_bare => {
                    let goodbye = format!("* BYE\r\n{tag} OK done\r\n");
                    wires.to_network.extend_from_slice(goodbye.as_bytes());
                    return Err(UpgradeError::Left);
                }
                "LOGIN" | "AUTHENTICATE" => format!("{tag} NO [PRIVACYREQUIRED] STARTTLS first\r\n"),
                _ => format!("{tag} BAD STARTTLS first\r\n"),
            };
            wires.to_network.extend_from_slice(answer.as_bytes());
        }
        Ok(Wants::Network)
    }
}

/// The client had its greeting: the service's own is kept from it.
fn greeting_inside(wires: &mut Wires) -> Result<Wants, UpgradeError> {
    let inside = |said: String| UpgradeError::Inside(format!("the service is not ready: {}", shown(&said)));
    match take_line(&mut wires.from_inner, NAME) {
        Ok(None) => Ok(Wants::Inner),
        Ok(Some(line)) if line.to_ascii_uppercase().starts_with("* OK") => Ok(Wants::Done),
        // Also PREAUTH: a client that is not told of it would not log in as itself.
        Ok(Some(line)) => Err(inside(line)),
        Err(_) => Err(UpgradeError::Inside("the service does not speak IMAP".to_owned())),
    }
}
