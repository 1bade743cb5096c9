//! What can go wrong in TLS, in our words: alerts by name, reasons of a refused certificate, and the
//! error that follows from each.

use std::fmt;

use crate::error::{Direction, Error, ErrorKind};

/// Alert descriptions that this crate names (RFC 8446, section 6; RFC 5246, section 7.2).
pub mod alert {
    #![allow(missing_docs)]
    pub const CLOSE_NOTIFY: u8 = 0;
    pub const UNEXPECTED_MESSAGE: u8 = 10;
    pub const BAD_RECORD_MAC: u8 = 20;
    pub const RECORD_OVERFLOW: u8 = 22;
    pub const HANDSHAKE_FAILURE: u8 = 40;
    pub const BAD_CERTIFICATE: u8 = 42;
    pub const UNSUPPORTED_CERTIFICATE: u8 = 43;
    pub const CERTIFICATE_REVOKED: u8 = 44;
    pub const CERTIFICATE_EXPIRED: u8 = 45;
    pub const CERTIFICATE_UNKNOWN: u8 = 46;
    pub const ILLEGAL_PARAMETER: u8 = 47;
    pub const UNKNOWN_CA: u8 = 48;
    pub const ACCESS_DENIED: u8 = 49;
    pub const DECODE_ERROR: u8 = 50;
    pub const DECRYPT_ERROR: u8 = 51;
    pub const PROTOCOL_VERSION: u8 = 70;
    pub const INSUFFICIENT_SECURITY: u8 = 71;
    pub const INTERNAL_ERROR: u8 = 80;
    pub const USER_CANCELED: u8 = 90;
    pub const NO_RENEGOTIATION: u8 = 100;
    pub const BAD_CERTIFICATE_STATUS_RESPONSE: u8 = 113;
    pub const UNKNOWN_PSK_IDENTITY: u8 = 115;
    pub const CERTIFICATE_REQUIRED: u8 = 116;
    pub const NO_APPLICATION_PROTOCOL: u8 = 120;

    /// The name in the RFCs.
    pub fn name(description: u8) -> &'static str {
        match description {
            CLOSE_NOTIFY => "close_notify",
            UNEXPECTED_MESSAGE => "unexpected_message",
            BAD_RECORD_MAC => "bad_record_mac",
            RECORD_OVERFLOW => "record_overflow",
            HANDSHAKE_FAILURE => "handshake_failure",
            BAD_CERTIFICATE => "bad_certificate",
            UNSUPPORTED_CERTIFICATE => "unsupported_certificate",
            CERTIFICATE_REVOKED => "certificate_revoked",
            CERTIFICATE_EXPIRED => "certificate_expired",
            CERTIFICATE_UNKNOWN => "certificate_unknown",
            ILLEGAL_PARAMETER => "illegal_parameter",
            UNKNOWN_CA => "unknown_ca",
            ACCESS_DENIED => "access_denied",
            DECODE_ERROR => "decode_error",
            DECRYPT_ERROR => "decrypt_error",
            PROTOCOL_VERSION => "protocol_version",
            INSUFFICIENT_SECURITY => "insufficient_security",
            INTERNAL_ERROR => "internal_error",
            86 => "inappropriate_fallback",
            USER_CANCELED => "user_canceled",
            NO_RENEGOTIATION => "no_renegotiation",
            109 => "missing_extension",
            110 => "unsupported_extension",
            112 => "unrecognized_name",
            BAD_CERTIFICATE_STATUS_RESPONSE => "bad_certificate_status_response",
            UNKNOWN_PSK_IDENTITY => "unknown_psk_identity",
            CERTIFICATE_REQUIRED => "certificate_required",
            NO_APPLICATION_PROTOCOL => "no_application_protocol",
            _ => "unknown alert",
        }
    }
}

/// Why a certificate is not acceptable. Closed: programs branch on the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateReason {
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYetValid,
    /// It is for another name.
    WrongName,
    /// Nobody whom we believe has signed it.
    UnknownIssuer,
    /// It signed itself, and is not one that we believe.
    SelfSigned,
    /// It was taken back.
    Revoked,
    /// No revocation list that is valid now covers it or one that signed it.
    RevocationUnknown,
    /// Its stapled OCSP response is missing, wrong or too old.
    BadStaple,
    /// No pin matches.
    PinMismatch,
    /// A signature is wrong.
    BadSignature,
    /// It may not be used for this.
    UnsuitablePurpose,
    /// There is none.
    Missing,
    /// It cannot be read.
    Malformed,
    /// Its key or signature is of a kind that is not accepted.
    UnsupportedAlgorithm,
    /// A replaced verifier said no.
    Rejected,
    /// It is good, and no peer rule fits it.
    NotAllowed,
}

impl CertificateReason {
    /// Every reason, for tests that walk them.
    pub const ALL: &'static [Self] = &[
        Self::Expired,
        Self::NotYetValid,
        Self::WrongName,
        Self::UnknownIssuer,
        Self::SelfSigned,
        Self::Revoked,
        Self::RevocationUnknown,
        Self::BadStaple,
        Self::PinMismatch,
        Self::BadSignature,
        Self::UnsuitablePurpose,
        Self::Missing,
        Self::Malformed,
        Self::UnsupportedAlgorithm,
        Self::Rejected,
        Self::NotAllowed,
    ];

    /// The word that crosses the seam (`error.reason`).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::WrongName => "wrong_name",
            Self::UnknownIssuer => "unknown_issuer",
            Self::SelfSigned => "self_signed",
            Self::Revoked => "revoked",
            Self::RevocationUnknown => "revocation_unknown",
            Self::BadStaple => "bad_staple",
            Self::PinMismatch => "pin_mismatch",
            Self::BadSignature => "bad_signature",
            Self::UnsuitablePurpose => "unsuitable_purpose",
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::UnsupportedAlgorithm => "unsupported_algorithm",
            Self::Rejected => "rejected",
            Self::NotAllowed => "not_allowed",
        }
    }

    /// The alert that tells the peer.
    pub fn alert(self) -> u8 {
        match self {
            Self::Expired | Self::NotYetValid => alert::CERTIFICATE_EXPIRED,
            Self::WrongName | Self::Malformed => alert::BAD_CERTIFICATE,
            Self::UnknownIssuer | Self::SelfSigned | Self::RevocationUnknown => alert::UNKNOWN_CA,
            Self::BadStaple => alert::BAD_CERTIFICATE_STATUS_RESPONSE,
            Self::Revoked => alert::CERTIFICATE_REVOKED,
            Self::PinMismatch | Self::Rejected | Self::NotAllowed => alert::ACCESS_DENIED,
            Self::BadSignature => alert::DECRYPT_ERROR,
            Self::UnsuitablePurpose => alert::UNSUPPORTED_CERTIFICATE,
            Self::Missing => alert::CERTIFICATE_REQUIRED,
            Self::UnsupportedAlgorithm => alert::CERTIFICATE_UNKNOWN,
        }
    }
}

/// A certificate that was refused.
#[derive(Clone, Debug)]
pub struct Rejection {
    /// Why, as a word.
    pub reason: CertificateReason,
    /// Why, for people.
    pub message: String,
}

impl Rejection {
    /// A refusal.
    pub fn new(reason: CertificateReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// The error that the user gets.
    pub(crate) fn into_error(self) -> Error {
        let kind = match self.reason {
            CertificateReason::NotAllowed => ErrorKind::PolicyDenied,
            _ => ErrorKind::Certificate,
        };
        Error::new(kind, self.message)
            .with_reason(self.reason.as_str())
            .with_alert(self.reason.alert())
            .with_direction(Direction::Decapsulate)
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Rejection {}

/// The error for a fatal alert that the peer sent.
pub(crate) fn alert_received(description: u8, psk: bool) -> Error {
    let (kind, reason, hint) = match description {
        alert::UNKNOWN_PSK_IDENTITY => {
            (ErrorKind::CredentialsRejected, None, ": it does not know our pre-shared key's identity")
        }
        alert::BAD_RECORD_MAC | alert::DECRYPT_ERROR | alert::ILLEGAL_PARAMETER if psk => {
            (ErrorKind::CredentialsRejected, None, ": its pre-shared key is probably another one")
        }
        alert::HANDSHAKE_FAILURE if psk => (
            ErrorKind::CredentialsRejected,
            None,
            ": no suite in common, or it does not know our pre-shared key's identity",
        ),
        alert::BAD_CERTIFICATE | alert::UNSUPPORTED_CERTIFICATE | alert::CERTIFICATE_UNKNOWN => {
            (ErrorKind::CredentialsRejected, None, ": it does not accept our certificate")
        }
        alert::ACCESS_DENIED => (ErrorKind::CredentialsRejected, None, ": it does not let us in"),
        alert::CERTIFICATE_REVOKED => (
            ErrorKind::CredentialsRejected,
            Some(CertificateReason::Revoked),
            ": it says that our certificate is revoked",
        ),
        alert::CERTIFICATE_EXPIRED => (
            ErrorKind::CredentialsRejected,
            Some(CertificateReason::Expired),
            ": it says that our certificate is out of its time",
        ),
        alert::UNKNOWN_CA => (
            ErrorKind::CredentialsRejected,
            Some(CertificateReason::UnknownIssuer),
            ": it does not know who signed our certificate",
        ),
        alert::CERTIFICATE_REQUIRED => (
            ErrorKind::CredentialsRejected,
            Some(CertificateReason::Missing),
            ": it wants a certificate from us",
        ),
        alert::HANDSHAKE_FAILURE | alert::INSUFFICIENT_SECURITY => {
            (ErrorKind::IncompatiblePeer, None, ": no suite or group in common, or it wants a certificate")
        }
        alert::PROTOCOL_VERSION => (ErrorKind::IncompatiblePeer, None, ": no protocol version in common"),
        alert::NO_APPLICATION_PROTOCOL => {
            (ErrorKind::IncompatiblePeer, None, ": no application protocol (ALPN) in common")
        }
        _ => (ErrorKind::Tls, None, ""),
    };
    let error = ended_by_alert(description, kind, hint);
    match reason {
        Some(reason) => error.with_reason(reason.as_str()),
        None => error,
    }
}

/// The same once hands were shaken: the suite, the version and the keys are agreed on, so that it can be about
/// none of them. A certificate of ours may still be refused then (TLS 1.3).
pub(crate) fn alert_in_traffic(description: u8) -> Error {
    match description {
        alert::HANDSHAKE_FAILURE
        | alert::INSUFFICIENT_SECURITY
        | alert::PROTOCOL_VERSION
        | alert::NO_APPLICATION_PROTOCOL => ended_by_alert(description, ErrorKind::Tls, ""),
        _ => alert_received(description, false),
    }
}

fn ended_by_alert(description: u8, kind: ErrorKind, hint: &str) -> Error {
    let name = alert::name(description);
    Error::new(kind, format!("the peer ended TLS with the alert {name} ({description}){hint}"))
        .with_alert_received(description)
        .with_direction(Direction::Decapsulate)
}

/// The peer broke the protocol; `description` is the alert that tells it.
pub(crate) fn peer_misbehaved(description: u8, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::RemoteProtocol, message)
        .with_alert(description)
        .with_direction(Direction::Decapsulate)
}

/// A record that does not verify; `or` is what else may be the cause.
pub(crate) fn bad_record(or: &str) -> Error {
    let text = format!("a record does not verify: it was changed, repeated or lost on its way{or}");
    Error::new(ErrorKind::Tls, text)
        .with_alert(alert::BAD_RECORD_MAC)
        .with_reason("bad_record_mac")
        .with_direction(Direction::Decapsulate)
}

/// A goodbye in the middle of a handshake: the same to us as a closed connection.
pub(crate) fn closed_in_handshake() -> Error {
    Error::new(ErrorKind::ConnectionLost, "the peer closed TLS during the handshake")
        .with_reason("truncated")
        .with_direction(Direction::Decapsulate)
}

/// A call that the connection's state does not allow.
pub(crate) fn misuse(message: &str) -> Error {
    Error::new(ErrorKind::ApiMisuse, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_distinct_words_and_fatal_alerts() {
        let mut words: Vec<_> = CertificateReason::ALL.iter().map(|r| r.as_str()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), CertificateReason::ALL.len());
        for reason in CertificateReason::ALL {
            assert_ne!(alert::name(reason.alert()), "unknown alert");
        }
    }

    #[test]
    fn the_same_alert_means_more_in_a_psk_handshake() {
        assert_eq!(alert_received(alert::DECRYPT_ERROR, true).kind(), ErrorKind::CredentialsRejected);
        assert_eq!(alert_received(alert::DECRYPT_ERROR, false).kind(), ErrorKind::Tls);
        assert_eq!(alert_received(alert::HANDSHAKE_FAILURE, true).kind(), ErrorKind::CredentialsRejected);
        let late = alert_in_traffic(alert::HANDSHAKE_FAILURE);
        assert_eq!((late.kind(), late.alert()), (ErrorKind::Tls, Some(40)));
        assert!(!late.message().contains("suite"), "{late}");
        assert_eq!(alert_in_traffic(alert::UNKNOWN_CA).kind(), ErrorKind::CredentialsRejected);
        let error = alert_received(alert::UNKNOWN_CA, false);
        assert_eq!(error.alert(), Some(48));
        assert!(error.alert_received());
        assert_eq!(error.reason(), Some("unknown_issuer"));
    }
}
