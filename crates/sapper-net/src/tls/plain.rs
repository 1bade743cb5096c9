//! What rustls and webpki found wrong, in plain words.
//!
//! Their enums may grow: what is not named here is spelled from the variant's name, never shown as it is. Which
//! error of ours each becomes is decided where it is found ([`super::rustls_engine`], [`super::verify`]).

use std::borrow::Cow;

use rustls::pki_types::UnixTime;
use rustls::{
    CertRevocationListError, CertificateError, ContentType, ExtendedKeyPurpose, HandshakeType,
    InvalidMessage, PeerIncompatible, PeerMisbehaved,
};
use x509_parser::time::ASN1Time;

#[cfg(test)]
mod tests;

type Words = Cow<'static, str>;

/// Why there is nothing in common with a peer.
pub(super) fn incompatible(why: &PeerIncompatible) -> Words {
    use PeerIncompatible as P;
    Cow::Borrowed(match why {
        P::EcPointsExtensionRequired => "it does not say which forms of curve points it reads",
        P::ExtendedMasterSecretExtensionRequired => "it does not have the extended master secret",
        P::IncorrectCertificateTypeExtension => "it wants another type of certificate",
        P::KeyShareExtensionRequired => "it offers TLS 1.3 without a key share",
        P::NamedGroupsExtensionRequired => "it does not say which groups it has",
        P::NoCertificateRequestSignatureSchemesInCommon => {
            "it takes no kind of signature that our certificate can make"
        }
        P::NoCipherSuitesInCommon => "no cipher suite in common",
        P::NoEcPointFormatsInCommon => "no form of curve points in common",
        P::NoKxGroupsInCommon => "no group in common",
        P::NoSignatureSchemesInCommon => "no kind of signature in common",
        P::NullCompressionRequired => "it wants all records compressed",
        P::ServerDoesNotSupportTls12Or13 => "it has neither TLS 1.2 nor TLS 1.3",
        P::ServerSentHelloRetryRequestWithUnknownExtension => {
            "it asks for another hello, with an extension that is not known"
        }
        P::ServerTlsVersionIsDisabledByOurConfig => "it has only versions of TLS that are off here",
        P::SignatureAlgorithmsExtensionRequired => "it does not say which signatures it takes",
        P::SupportedVersionsExtensionRequired => {
            "it does not say that it has TLS 1.3, which is the oldest here"
        }
        P::Tls12NotOffered => "it does not have TLS 1.2, which is the newest here",
        P::Tls12NotOfferedOrEnabled => "it has only versions of TLS that are not here, or off",
        P::Tls13RequiredForQuic => "it does not have TLS 1.3, which QUIC needs",
        P::UncompressedEcPointsRequired => "it does not read curve points that are written out",
        P::UnsolicitedCertificateTypeExtension => "it chose a type of certificate that was not offered",
        P::ServerRejectedEncryptedClientHello(_) => "it cannot read our encrypted hello",
        other => return spelled(other),
    })
}

/// What a peer did that TLS forbids.
pub(super) fn misbehaved(what: &PeerMisbehaved) -> Words {
    use PeerMisbehaved as P;
    Cow::Borrowed(match what {
        P::AttemptedDowngradeToTls12WhenTls13IsSupported => {
            "somebody between took the newest version out of our hello"
        }
        P::BadCertChainExtensions => "a certificate of its chain has extensions that do not belong there",
        P::CipherSuiteDifferedOnRetry => "it offers other cipher suites in its second hello",
        P::DisallowedEncryptedExtension => "an extension came encrypted that may not",
        P::DuplicateClientHelloExtensions => "its hello has an extension twice",
        P::DuplicateEncryptedExtensions => "its encrypted extensions have one twice",
        P::DuplicateHelloRetryRequestExtensions => "its request for another hello has an extension twice",
        P::DuplicateNewSessionTicketExtensions => "its session ticket has an extension twice",
        P::DuplicateServerHelloExtensions => "its hello has an extension twice",
        P::DuplicateServerNameTypes => "it asks for two server names of one type",
        P::EarlyDataAttemptedInSecondClientHello => "it offers early data in its second hello",
        P::EarlyDataExtensionWithoutResumption => "it takes early data without a session to resume",
        P::EarlyDataOfferedWithVariedCipherSuite => "it takes early data with another cipher suite",
        P::EchAcceptanceVariedAfterRetry => {
            "it read our first encrypted hello and not the second, or the reverse"
        }
        P::HandshakeHashVariedAfterRetry => "it changed the hash after it asked for another hello",
        P::IllegalHelloRetryRequestWithEmptyCookie => "its request for another hello has an empty cookie",
        P::IllegalHelloRetryRequestWithNoChanges => "it asks for another hello that is the same",
        P::IllegalHelloRetryRequestWithOfferedGroup => "it asks for a group that our hello had",
        P::IllegalHelloRetryRequestWithUnofferedCipherSuite => {
            "it asks for another hello with a cipher suite that was not offered"
        }
        P::IllegalHelloRetryRequestWithUnofferedNamedGroup => "it asks for a group that was not offered",
        P::IllegalHelloRetryRequestWithUnsupportedVersion => {
            "it asks for another hello with a version that was not offered"
        }
        P::IllegalHelloRetryRequestWithWrongSessionId => {
            "its request for another hello has another session's number"
        }
        P::IllegalHelloRetryRequestWithInvalidEch => {
            "its request for another hello answers our encrypted hello wrongly"
        }
        P::IllegalMiddleboxChangeCipherSpec => "a change of the cipher came where none may be",
        P::IllegalTlsInnerPlaintext => "an encrypted record has no type",
        P::IncorrectBinder => "it does not know the key of the session that it wants to resume",
        P::InvalidCertCompression => "its certificate is compressed wrongly",
        P::InvalidMaxEarlyDataSize => "its session ticket allows a wrong amount of early data",
        P::InvalidKeyShare => "its key share is no key of its group",
        P::KeyEpochWithPendingFragment => "a message goes on behind a change of keys",
        P::KeyUpdateReceivedInQuicConnection => "it changes keys the way of TLS in a QUIC connection",
        P::MessageInterleavedWithHandshakeMessage => {
            "another record came in the middle of a handshake message"
        }
        P::MissingBinderInPskExtension => "it wants to resume a session without proof that it knows the key",
        P::MissingKeyShare => "its hello has no key share",
        P::MissingPskExtensionInSecondClientHello => "its second hello leaves out the session to resume",
        P::MissingPskModesExtension => "it wants to resume a session and does not say how",
        P::MissingQuicTransportParameters => "it sent no transport parameters of QUIC",
        P::OfferedDuplicateCertificateCompressions => "it offers a compression of certificates twice",
        P::OfferedDuplicateKeyShares => "it offers a key share of one group twice",
        P::OfferedEarlyDataWithOldProtocolVersion => "it offers early data with a version that has none",
        P::OfferedEmptyApplicationProtocol => "it offers an application protocol (ALPN) without a name",
        P::OfferedIncorrectCompressions => "it offers other compressions than none",
        P::PskExtensionMustBeLast => "its pre-shared keys are not the last extension",
        P::PskExtensionWithMismatchedIdsAndBinders => "it offers more or fewer keys than proofs of them",
        P::RefusedToFollowHelloRetryRequest => "it was asked for a group and did not send its key share",
        P::RejectedEarlyDataInterleavedWithHandshakeMessage => {
            "early data came in the middle of a handshake message"
        }
        P::ResumptionAttemptedWithVariedEms | P::ResumptionOfferedWithVariedEms => {
            "it resumes a session with, or without, the extended master secret, other than it began"
        }
        P::ResumptionOfferedWithVariedCipherSuite => "it resumes a session with another cipher suite",
        P::ResumptionOfferedWithIncompatibleCipherSuite => {
            "it resumes a session with a cipher suite of another hash"
        }
        P::SelectedDifferentCipherSuiteAfterRetry => {
            "it chose another cipher suite than where it asked for another hello"
        }
        P::SelectedInvalidPsk => "it chose a key that cannot be used with its cipher suite",
        P::SelectedTls12UsingTls13VersionExtension => "it chose TLS 1.2 the way of TLS 1.3",
        P::SelectedUnofferedApplicationProtocol => {
            "it chose an application protocol (ALPN) that was not offered"
        }
        P::SelectedUnofferedCertCompression => "it compressed its certificate in a way that was not offered",
        P::SelectedUnofferedCipherSuite => "it chose a cipher suite that was not offered",
        P::SelectedUnofferedCompression => "it chose a compression that was not offered",
        P::SelectedUnofferedKxGroup => "it chose a group that was not offered",
        P::SelectedUnofferedPsk => "it chose a key that was not offered",
        P::SelectedUnusableCipherSuiteForVersion => "it chose a cipher suite that its version does not have",
        P::ServerEchoedCompatibilitySessionId => "it resumed a session that was never there",
        P::ServerHelloMustOfferUncompressedEcPoints => "it does not read curve points that are written out",
        P::ServerNameDifferedOnRetry => "its second hello asks for another server name",
        P::ServerNameMustContainOneHostName => "the server name that it asks for is not the name of one host",
        P::SignedKxWithWrongAlgorithm => "it signed its key share with an algorithm of another cipher suite",
        P::SignedHandshakeWithUnadvertisedSigScheme => "it made a kind of signature that was not offered",
        P::TooManyEmptyFragments => "it sent too many empty records",
        P::TooManyKeyUpdateRequests => "it changed keys too often",
        P::TooManyRenegotiationRequests => "it asked too often to shake hands again",
        P::TooManyWarningAlertsReceived => "it sent too many warnings",
        P::TooMuchEarlyDataReceived => "it sent more early data than it may",
        P::UnexpectedCleartextExtension => "an extension came in clear that has to be encrypted",
        P::UnsolicitedCertExtension => "its certificate has an extension that nobody asked for",
        P::UnsolicitedEncryptedExtension => "it sent an encrypted extension that nobody asked for",
        P::UnsolicitedSctList => "it sent timestamps of its certificate that nobody asked for",
        P::UnsolicitedServerHelloExtension => "its hello has an extension that nobody asked for",
        P::WrongGroupForKeyShare => "its key share is of another group than it was asked for",
        P::UnsolicitedEchExtension => "it answers an encrypted hello that was not sent",
        other => return spelled(other),
    })
}

/// Why a message cannot be read.
pub(super) fn unreadable(why: &InvalidMessage) -> Words {
    use InvalidMessage as I;
    Cow::Borrowed(match why {
        I::CertificatePayloadTooLarge => "its certificates are larger than 64 KB",
        I::HandshakePayloadTooLarge => "a handshake message is larger than any may be",
        I::InvalidCcs => "a change of the cipher is not written as one",
        I::InvalidContentType => "a record is of a type that is not known",
        I::InvalidCertificateStatusType => "the state of its certificate is of a type that is not known",
        I::InvalidCertRequest => "its wish for a certificate names a request that was never made",
        I::InvalidDhParams => "its Diffie-Hellman parameters are not written as such",
        I::InvalidEmptyPayload => "a record is empty that may not be",
        I::InvalidKeyUpdate => "a change of keys is not written as one",
        I::InvalidServerName => "the server name that it asks for is not the name of one host",
        I::MessageTooLarge => "a record is larger than any may be",
        I::MessageTooShort => "it is shorter than it says",
        I::MissingData(_) => "a part of it is cut off",
        I::MissingKeyExchange => "it does not say which groups it has",
        I::NoSignatureSchemes => "it takes no kind of signature",
        I::TrailingData(_) => "something stands behind its end",
        I::UnexpectedMessage(_) => "it is another message than belongs there",
        I::UnknownProtocolVersion => "a record is of a version that is not known: this may be no TLS",
        I::UnsupportedCompression => "it is compressed, which is not done here",
        I::UnsupportedCurveType => "its curve is of a kind that is not known",
        I::UnsupportedKeyExchangeAlgorithm(_) => "it exchanges keys in a way that is not done here",
        I::EmptyTicketValue => "its session ticket is empty",
        I::IllegalEmptyList(_) => "a list in it is empty that may not be",
        I::IllegalEmptyValue => "a value in it is empty that may not be",
        I::DuplicateExtension(kind) => return format!("it has an extension twice (number {kind})").into(),
        I::PreSharedKeyIsNotFinalExtension => "its pre-shared keys are not the last extension",
        I::UnknownHelloRetryRequestExtension => {
            "its request for another hello has an extension that is not known"
        }
        I::UnknownCertificateExtension => "its certificate came with an extension that is not known",
        other => return spelled(other),
    })
}

/// A record out of turn.
pub(super) fn record_out_of_turn(got: ContentType, expected: &[ContentType]) -> String {
    out_of_turn("a record", content_type(got), expected.iter().map(|kind| content_type(*kind)))
}

/// A handshake message out of turn.
pub(super) fn message_out_of_turn(got: HandshakeType, expected: &[HandshakeType]) -> String {
    out_of_turn("a handshake message", handshake_type(got), expected.iter().map(|kind| handshake_type(*kind)))
}

fn out_of_turn(what: &str, got: Words, expected: impl Iterator<Item = Words>) -> String {
    let expected: Vec<_> = expected.collect();
    let instead = if expected.is_empty() { "none".to_owned() } else { expected.join(" or ") };
    format!("{what} came out of turn: {got}, where {instead} was expected")
}

fn content_type(kind: ContentType) -> Words {
    kind.as_str().map_or_else(|| format!("type {}", u8::from(kind)).into(), spelled_name)
}

fn handshake_type(kind: HandshakeType) -> Words {
    kind.as_str().map_or_else(|| format!("type {}", u8::from(kind)).into(), Cow::Borrowed)
}

/// Why a certificate is not acceptable.
pub(super) fn certificate(error: &CertificateError) -> Words {
    use CertificateError as C;
    Cow::Borrowed(match error {
        C::BadEncoding => "it is not written as a certificate",
        C::Expired => "its time is over",
        C::ExpiredContext { not_after, .. } => {
            return format!("it was valid until {}", date(*not_after)).into();
        }
        C::NotValidYet => "its time has not come",
        C::NotValidYetContext { not_before, .. } => {
            return format!("it is valid from {} only", date(*not_before)).into();
        }
        C::Revoked => "it, or one that signed it, is revoked",
        C::UnhandledCriticalExtension => "it has a critical extension that is not known here",
        C::UnknownIssuer => "it is not known who signed it",
        C::UnknownRevocationStatus => "no list says whether it is revoked",
        C::ExpiredRevocationList => "the revocation list is out of date",
        C::ExpiredRevocationListContext { next_update, .. } => {
            return format!("the revocation list was valid until {}", date(*next_update)).into();
        }
        C::BadSignature => "its signature is wrong",
        C::UnsupportedSignatureAlgorithmContext { .. } => {
            "its signature is of a kind that is not accepted here"
        }
        C::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "its signature is of a kind that its key cannot make, or its key is of a kind that is not accepted here"
        }
        C::NotValidForName => "it is for another name",
        C::NotValidForNameContext { expected, presented } => {
            return another_name(&expected.to_str(), presented).into();
        }
        C::InvalidPurpose => "it may not be used for this",
        C::InvalidPurposeContext { required, presented } => {
            return another_purpose(required, presented).into();
        }
        C::InvalidOcspResponse => "its stapled OCSP response is wrong",
        C::ApplicationVerificationFailure => "it was refused",
        C::Other(other) => {
            return other.0.downcast_ref().map_or(Cow::Borrowed("it cannot be checked"), in_chain);
        }
        other => return spelled(other),
    })
}

/// Purposes without a name of ours are numbers, of which a stranger may list any number.
fn another_purpose(required: &ExtendedKeyPurpose, presented: &[ExtendedKeyPurpose]) -> String {
    let known = |purpose: &&ExtendedKeyPurpose| !matches!(purpose, ExtendedKeyPurpose::Other(_));
    let mut listed: Vec<_> = presented.iter().filter(known).map(ToString::to_string).collect();
    listed.dedup();
    if presented.iter().any(|purpose| !known(&purpose)) || listed.is_empty() {
        listed.push("other purposes".to_owned());
    }
    format!("it may not be used for {required}, only for {}", listed.join(" and "))
}

/// The names are a stranger's: so many of them, so long, and nothing that moves a cursor.
fn another_name(expected: &str, presented: &[String]) -> String {
    const MOST: usize = 8;
    const LONGEST: usize = 64;
    let mut names: Vec<_> = presented.iter().take(MOST).map(|one| bare(one).chars().take(LONGEST)).collect();
    let shown: Vec<_> =
        names.iter_mut().map(|name| name.flat_map(char::escape_debug).collect::<String>()).collect();
    let is_for = if shown.is_empty() { "no name at all".to_owned() } else { shown.join(", ") };
    let more = match presented.len().saturating_sub(MOST) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("it is for another name: {expected} is wanted, it is for {is_for}{more}")
}

/// webpki writes a name as `DnsName("x")`, `IpAddress(x)`.
fn bare(presented: &str) -> &str {
    let inner =
        presented.split_once('(').map_or(presented, |(_, inner)| inner.strip_suffix(')').unwrap_or(inner));
    inner.strip_prefix('"').and_then(|inner| inner.strip_suffix('"')).unwrap_or(inner)
}

/// What webpki found that rustls has no word for.
fn in_chain(error: &webpki::Error) -> Words {
    use webpki::Error as W;
    Cow::Borrowed(match error {
        W::BadDer | W::BadDerTime | W::TrailingData(_) => "it is not written as a certificate",
        W::CaUsedAsEndEntity => "it is an authority's, not one for a connection",
        W::CertDistrusted => "its key is distrusted",
        W::EmptyEkuExtension => "it lists the purposes that it may be used for, and there are none",
        W::EndEntityUsedAsCa => "one that is no authority's has signed it",
        W::ExtensionValueInvalid | W::MalformedExtensions => "an extension of it is not written as such",
        W::InvalidCertValidity => "its time ends before it begins",
        W::InvalidNetworkMaskConstraint | W::MalformedNameConstraint => {
            "the names to which its authority is restricted are not written as such"
        }
        W::InvalidSerialNumber => "its serial number is wrong",
        W::InvalidCrlNumber => "the revocation list's number is wrong",
        W::MalformedDnsIdentifier => "a name in it is no DNS name",
        W::MaximumNameConstraintComparisonsExceeded
        | W::MaximumPathBuildCallsExceeded
        | W::MaximumSignatureChecksExceeded => "its chain takes too long to follow",
        // webpki's MAX_SUB_CA_COUNT.
        W::MaximumPathDepthExceeded => {
            "no root is found behind 6 certificates of authorities, and chains are followed no further"
        }
        W::NameConstraintViolation => "its name is none of those to which its authority is restricted",
        W::PathLenConstraintViolated => "more authorities are between than one of them allows",
        W::SignatureAlgorithmMismatch => "it names two kinds of signature",
        W::UnsupportedCertVersion => {
            "it is not of version 3, the only one that says what a certificate is for"
        }
        W::UnsupportedCriticalExtension => "it has a critical extension that is not known here",
        W::UnsupportedNameType => "a name in it is of a kind that is not known here",
        other => return spelled(other),
    })
}

/// Why a revocation list cannot be used.
pub(super) fn revocation_list(error: &CertRevocationListError) -> Words {
    use CertRevocationListError as L;
    Cow::Borrowed(match error {
        L::BadSignature => "its signature is wrong",
        L::UnsupportedSignatureAlgorithmContext { .. } => {
            "its signature is of a kind that is not accepted here"
        }
        L::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "its signature is of a kind that its authority's key cannot make"
        }
        L::InvalidCrlNumber => "its number is wrong",
        L::InvalidRevokedCertSerialNumber => "a serial number in it is wrong",
        L::IssuerInvalidForCrl => "who signed it may not sign revocation lists",
        L::ParseError => "it is not written as one",
        L::UnsupportedCrlVersion => "it is not of version 2",
        L::UnsupportedCriticalExtension => "it has a critical extension that is not known here",
        L::UnsupportedDeltaCrl => "it lists only what changed since another one",
        L::UnsupportedIndirectCrl => "it lists certificates of another authority",
        L::UnsupportedRevocationReason => "it gives a reason that is not known here",
        L::Other(_) => "it cannot be used here",
        other => return spelled(other),
    })
}

/// Any error of rustls, where only a text is wanted.
pub(super) fn said(error: &rustls::Error) -> Words {
    use rustls::Error as E;
    match error {
        E::InvalidMessage(why) => unreadable(why),
        E::PeerIncompatible(why) => incompatible(why),
        E::PeerMisbehaved(why) => misbehaved(why),
        E::InvalidCertificate(why) => certificate(why),
        E::InvalidCertRevocationList(why) => revocation_list(why),
        E::InappropriateMessage { expect_types, got_type } => {
            record_out_of_turn(*got_type, expect_types).into()
        }
        E::InappropriateHandshakeMessage { expect_types, got_type } => {
            message_out_of_turn(*got_type, expect_types).into()
        }
        // Words of its own, not those of an enum.
        other => other.to_string().into(),
    }
}

fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    ASN1Time::from_timestamp(seconds)
        .map_or_else(|_| "a time beyond all dates".to_owned(), |date| date.to_string())
}

/// The variant's name as words: `SelectedUnofferedPsk` is "selected unoffered psk". What it carries is left out.
fn spelled(variant: &dyn std::fmt::Debug) -> Words {
    spelled_name(&format!("{variant:?}"))
}

fn spelled_name(name: &str) -> Words {
    let mut words = String::new();
    for letter in name.chars().take_while(char::is_ascii_alphanumeric) {
        if letter.is_ascii_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.push(letter.to_ascii_lowercase());
    }
    words.into()
}
