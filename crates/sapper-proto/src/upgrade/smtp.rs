//! SMTP's STARTTLS (RFC 3207).

use super::lines::{MOST_LINES, say, shown, take_line};
use super::{Machine, UpgradeError, Wants, Wires};

const NAME: &str = "SMTP";
/// What a program hears first behind the upgrade. Ours: the server's own came in clear.
const GREETING: &str = "220 localhost ESMTP\r\n";

/// An answer, which may have several lines.
#[derive(Default)]
struct Answer {
    lines: Vec<String>,
}

impl Answer {
    /// Takes what is there of it; the lines once the last one came.
    fn take(&mut self, bytes: &mut Vec<u8>) -> Result<Option<(u16, Vec<String>)>, UpgradeError> {
        while let Some(line) = take_line(bytes, NAME)? {
            let code: Option<u16> = line.get(..3).and_then(|code| code.parse().ok());
            let Some(code) = code.filter(|code| (200..600).contains(code)) else {
                return Err(UpgradeError::Malformed(NAME));
            };
            let (is_last, text) = match line.as_bytes().get(3) {
                None => (true, ""),
                Some(b' ') => (true, &line[4..]),
                Some(b'-') => (false, &line[4..]),
                Some(_) => return Err(UpgradeError::Malformed(NAME)),
            };
            self.lines.push(text.to_owned());
            if is_last {
                return Ok(Some((code, std::mem::take(&mut self.lines))));
            }
            if self.lines.len() > MOST_LINES {
                return Err(UpgradeError::TooMuch);
            }
        }
        Ok(None)
    }
}

fn refused(what: &str, (code, lines): &(u16, Vec<String>)) -> UpgradeError {
    let said = lines.first().map_or("", String::as_str);
    UpgradeError::Refused(format!("{what}: {code} {}", shown(said)))
}

#[derive(Clone, Copy, Default)]
enum Stage {
    #[default]
    Greeting,
    Capabilities,
    Tls,
    Encrypted,
}

#[derive(Default)]
pub(super) struct Client {
    stage: Stage,
    answer: Answer,
}

impl Machine for Client {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        if let Stage::Encrypted = self.stage {
            wires.to_inner.extend_from_slice(GREETING.as_bytes());
            return Ok(Wants::Done);
        }
        while let Some(answer) = self.answer.take(&mut wires.from_network)? {
            match (self.stage, answer.0) {
                (Stage::Greeting, 220) => {
                    say(&mut wires.to_network, &wires.from_network, "EHLO localhost\r\n")?;
                    self.stage = Stage::Capabilities;
                }
                (Stage::Capabilities, 250) => {
                    // The first line is the server's name.
                    let offered =
                        answer.1.iter().skip(1).any(|word| word.trim().eq_ignore_ascii_case("STARTTLS"));
                    if !offered {
                        return Err(UpgradeError::Refused("the server does not offer STARTTLS".to_owned()));
                    }
                    say(&mut wires.to_network, &wires.from_network, "STARTTLS\r\n")?;
                    self.stage = Stage::Tls;
                }
                (Stage::Tls, 220) => {
                    self.stage = Stage::Encrypted;
                    return Ok(Wants::Tls);
                }
                (Stage::Greeting, _) => return Err(refused("the server is not ready", &answer)),
                (Stage::Capabilities, _) => return Err(refused("the server refuses EHLO", &answer)),
                (_, _) => return Err(refused("the server refuses STARTTLS", &answer)),
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
    answer: Answer,
}

impl Machine for Server {
    fn step(&mut self, wires: &mut Wires) -> Result<Wants, UpgradeError> {
        if self.encrypted {
            // The client had its greeting.
            return match self.answer.take(&mut wires.from_inner) {
                Ok(None) => Ok(Wants::Inner),
                Ok(Some((220, _))) => Ok(Wants::Done),
                Ok(Some((code, lines))) => {
                    let said = shown(lines.first().map_or("", String::as_str));
                    Err(UpgradeError::Inside(format!("the service is not ready: {code} {said}")))
                }
                Err(_) => Err(UpgradeError::Inside("the service does not speak SMTP".to_owned())),
            };
        }
        if !self.greeted {
            self.greeted = true;
            wires.to_network.extend_from_slice(GREETING.as_bytes());
        }
        while let Some(line) = take_line(&mut wires.from_network, NAME)? {
            self.commands += 1;
            if self.commands > MOST_LINES {
                wires.to_network.extend_from_slice(b"421 4.7.0 Too many commands\r\n");
                return Err(UpgradeError::TooMuch);
            }
            let verb = line.split(' ').next().unwrap_or_default().to_ascii_uppercase();
            let answer = match verb.as_str() {
                "STARTTLS" if line.trim_end().len() == verb.len() => {
                    wires.to_network.extend_from_slice(b"220 2.0.0 Ready to start TLS\r\n");
                    self.encrypted = true;
                    return Ok(Wants::Tls);
                }
                "STARTTLS" => "501 5.5.4 STARTTLS has no parameters\r\n",
                "EHLO" => "250-localhost\r\n250 STARTTLS\r\n",
                "HELO" => "250 localhost\r\n",
                "NOOP" | "RSET" => "250 2.0.0 Ok\r\n",
                "QUIT" => {
                    wires.to_network.extend_from_slice(b"221 2.0.0 Bye\r\n");
                    return Err(UpgradeError::Left);
                }
                "BDAT" => {
                    // Its chunk follows at once, and would be read as commands (RFC 3030, 2).
                    wires.to_network.extend_from_slice(b"530 5.7.0 Must issue a STARTTLS command first\r\n");
                    return Err(UpgradeError::Refused("the client sends data before TLS".to_owned()));
                }
                _ => "530 5.7.0 Must issue a STARTTLS command first\r\n",
            };
            wires.to_network.extend_from_slice(answer.as_bytes());
        }
        Ok(Wants::Network)
    }
}
