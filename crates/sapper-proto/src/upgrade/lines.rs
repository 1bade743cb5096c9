//! Lines of text protocols, as they come before TLS.

use super::UpgradeError;
use crate::shown;

/// Longer than what SMTP (RFC 5321: 512, with extensions 1,000) and IMAP say before TLS.
const LONGEST_LINE: usize = 2_000;
/// Lines of one answer, commands of one peer: what a loop without end would exceed.
pub(super) const MOST_LINES: usize = 64;

/// Takes the first line, without its end. Only CR LF ends one: who counts otherwise sees other commands.
pub(super) fn take_line(bytes: &mut Vec<u8>, protocol: &'static str) -> Result<Option<String>, UpgradeError> {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return if bytes.len() > LONGEST_LINE { Err(UpgradeError::TooMuch) } else { Ok(None) };
    };
    if end > LONGEST_LINE {
        return Err(UpgradeError::TooMuch);
    }
    let Some(text) = bytes[..end].strip_suffix(b"\r") else {
        return Err(UpgradeError::Malformed(protocol));
    };
    if text.iter().any(|byte| matches!(byte, b'\r' | 0)) {
        return Err(UpgradeError::Malformed(protocol));
    }
    let text = String::from_utf8_lossy(text).into_owned();
    bytes.drain(..=end);
    Ok(Some(text))
}

/// The beginning of what somebody said, for an error's text.
pub(super) fn shown(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text.chars().filter(|c| !shown::misleads(*c)).take(SHOWN).collect();
    if text.chars().count() > SHOWN {
        shown.push('…');
    }
    shown
}

/// Says a command. What had arrived before it cannot be its answer.
pub(super) fn say(to: &mut Vec<u8>, received: &[u8], command: &str) -> Result<(), UpgradeError> {
    if !received.is_empty() {
        return Err(UpgradeError::Early(received.len()));
    }
    to.extend_from_slice(command.as_bytes());
    Ok(())
}
