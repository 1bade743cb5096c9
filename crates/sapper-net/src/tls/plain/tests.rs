//! Every way in which a peer can be wrong is said in words.

use std::sync::Arc;
use std::time::Duration;

use rustls::OtherError;
use rustls::crypto::KeyExchangeAlgorithm;
use rustls::pki_types::ServerName;

use super::*;

const INCOMPATIBLE: &[PeerIncompatible] = {
    use PeerIncompatible as P;
    &[
        P::EcPointsExtensionRequired,
        P::ExtendedMasterSecretExtensionRequired,
        P::IncorrectCertificateTypeExtension,
        P::KeyShareExtensionRequired,
        P::NamedGroupsExtensionRequired,
        P::NoCertificateRequestSignatureSchemesInCommon,
        P::NoCipherSuitesInCommon,
        P::NoEcPointFormatsInCommon,
        P::NoKxGroupsInCommon,
        P::NoSignatureSchemesInCommon,
        P::NullCompressionRequired,
        P::ServerDoesNotSupportTls12Or13,
        P::ServerSentHelloRetryRequestWithUnknownExtension,
        P::ServerTlsVersionIsDisabledByOurConfig,
        P::SignatureAlgorithmsExtensionRequired,
        P::SupportedVersionsExtensionRequired,
        P::Tls12NotOffered,
        P::Tls12NotOfferedOrEnabled,
        P::Tls13RequiredForQuic,
        P::UncompressedEcPointsRequired,
        P::UnsolicitedCertificateTypeExtension,
        P::ServerRejectedEncryptedClientHello(None),
    ]
};

const MISBEHAVED: &[PeerMisbehaved] = {
    use PeerMisbehaved as P;
    &[
        P::AttemptedDowngradeToTls12WhenTls13IsSupported,
        P::BadCertChainExtensions,
        P::CipherSuiteDifferedOnRetry,
        P::DisallowedEncryptedExtension,
        P::DuplicateClientHelloExtensions,
        P::DuplicateEncryptedExtensions,
        P::DuplicateHelloRetryRequestExtensions,
        P::DuplicateNewSessionTicketExtensions,
        P::DuplicateServerHelloExtensions,
        P::DuplicateServerNameTypes,
        P::EarlyDataAttemptedInSecondClientHello,
        P::EarlyDataExtensionWithoutResumption,
        P::EarlyDataOfferedWithVariedCipherSuite,
        P::EchAcceptanceVariedAfterRetry,
        P::HandshakeHashVariedAfterRetry,
        P::IllegalHelloRetryRequestWithEmptyCookie,
        P::IllegalHelloRetryRequestWithNoChanges,
        P::IllegalHelloRetryRequestWithOfferedGroup,
        P::IllegalHelloRetryRequestWithUnofferedCipherSuite,
        P::IllegalHelloRetryRequestWithUnofferedNamedGroup,
        P::IllegalHelloRetryRequestWithUnsupportedVersion,
        P::IllegalHelloRetryRequestWithWrongSessionId,
        P::IllegalHelloRetryRequestWithInvalidEch,
        P::IllegalMiddleboxChangeCipherSpec,
        P::IllegalTlsInnerPlaintext,
        P::IncorrectBinder,
        P::InvalidCertCompression,
        P::InvalidMaxEarlyDataSize,
        P::InvalidKeyShare,
        P::KeyEpochWithPendingFragment,
        P::KeyUpdateReceivedInQuicConnection,
        P::MessageInterleavedWithHandshakeMessage,
        P::MissingBinderInPskExtension,
        P::MissingKeyShare,
        P::MissingPskExtensionInSecondClientHello,
        P::MissingPskModesExtension,
        P::MissingQuicTransportParameters,
        P::OfferedDuplicateCertificateCompressions,
        P::OfferedDuplicateKeyShares,
        P::OfferedEarlyDataWithOldProtocolVersion,
        P::OfferedEmptyApplicationProtocol,
        P::OfferedIncorrectCompressions,
        P::PskExtensionMustBeLast,
        P::PskExtensionWithMismatchedIdsAndBinders,
        P::RefusedToFollowHelloRetryRequest,
        P::RejectedEarlyDataInterleavedWithHandshakeMessage,
        P::ResumptionAttemptedWithVariedEms,
        P::ResumptionOfferedWithVariedCipherSuite,
        P::ResumptionOfferedWithVariedEms,
        P::ResumptionOfferedWithIncompatibleCipherSuite,
        P::SelectedDifferentCipherSuiteAfterRetry,
        P::SelectedInvalidPsk,
        P::SelectedTls12UsingTls13VersionExtension,
        P::SelectedUnofferedApplicationProtocol,
        P::SelectedUnofferedCertCompression,
        P::SelectedUnofferedCipherSuite,
        P::SelectedUnofferedCompression,
        P::SelectedUnofferedKxGroup,
        P::SelectedUnofferedPsk,
        P::SelectedUnusableCipherSuiteForVersion,
        P::ServerEchoedCompatibilitySessionId,
        P::ServerHelloMustOfferUncompressedEcPoints,
        P::ServerNameDifferedOnRetry,
        P::ServerNameMustContainOneHostName,
        P::SignedKxWithWrongAlgorithm,
        P::SignedHandshakeWithUnadvertisedSigScheme,
        P::TooManyEmptyFragments,
        P::TooManyKeyUpdateRequests,
        P::TooManyRenegotiationRequests,
        P::TooManyWarningAlertsReceived,
        P::TooMuchEarlyDataReceived,
        P::UnexpectedCleartextExtension,
        P::UnsolicitedCertExtension,
        P::UnsolicitedEncryptedExtension,
        P::UnsolicitedSctList,
        P::UnsolicitedServerHelloExtension,
        P::WrongGroupForKeyShare,
        P::UnsolicitedEchExtension,
    ]
};

const UNREADABLE: &[InvalidMessage] = {
    use InvalidMessage as I;
    &[
        I::CertificatePayloadTooLarge,
        I::HandshakePayloadTooLarge,
        I::InvalidCcs,
        I::InvalidContentType,
        I::InvalidCertificateStatusType,
        I::InvalidCertRequest,
        I::InvalidDhParams,
        I::InvalidEmptyPayload,
        I::InvalidKeyUpdate,
        I::InvalidServerName,
        I::MessageTooLarge,
        I::MessageTooShort,
        I::MissingData("cipher suites"),
        I::MissingKeyExchange,
        I::NoSignatureSchemes,
        I::TrailingData("x"),
        I::UnexpectedMessage("x"),
        I::UnknownProtocolVersion,
        I::UnsupportedCompression,
        I::UnsupportedCurveType,
        I::UnsupportedKeyExchangeAlgorithm(KeyExchangeAlgorithm::DHE),
        I::EmptyTicketValue,
        I::IllegalEmptyList("x"),
        I::IllegalEmptyValue,
        I::DuplicateExtension(43),
        I::PreSharedKeyIsNotFinalExtension,
        I::UnknownHelloRetryRequestExtension,
        I::UnknownCertificateExtension,
    ]
};

/// Those that rustls has no word for.
const IN_CHAIN: &[webpki::Error] = {
    use webpki::Error as W;
    &[
        W::CaUsedAsEndEntity,
        W::CertDistrusted,
        W::EmptyEkuExtension,
        W::EndEntityUsedAsCa,
        W::ExtensionValueInvalid,
        W::InvalidCrlNumber,
        W::InvalidNetworkMaskConstraint,
        W::InvalidSerialNumber,
        W::MalformedDnsIdentifier,
        W::MalformedExtensions,
        W::MalformedNameConstraint,
        W::MaximumNameConstraintComparisonsExceeded,
        W::MaximumPathBuildCallsExceeded,
        W::MaximumPathDepthExceeded,
        W::MaximumSignatureChecksExceeded,
        W::NameConstraintViolation,
        W::PathLenConstraintViolated,
        W::SignatureAlgorithmMismatch,
        W::UnsupportedCertVersion,
        W::UnsupportedCriticalExtension,
        W::UnsupportedNameType,
    ]
};

fn certificates() -> Vec<CertificateError> {
    use CertificateError as C;
    let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let (time, soon, name) =
        (at(1_800_000_000), at(1_700_000_000), ServerName::try_from("one.test").unwrap());
    let mut all = vec![
        C::BadEncoding,
        C::Expired,
        C::ExpiredContext { time, not_after: soon },
        C::NotValidYet,
        C::NotValidYetContext { time, not_before: soon },
        C::Revoked,
        C::UnhandledCriticalExtension,
        C::UnknownIssuer,
        C::UnknownRevocationStatus,
        C::ExpiredRevocationList,
        C::ExpiredRevocationListContext { time, next_update: at(u64::MAX) },
        C::BadSignature,
        C::UnsupportedSignatureAlgorithmContext {
            signature_algorithm_id: vec![1],
            supported_algorithms: Vec::new(),
        },
        C::UnsupportedSignatureAlgorithmForPublicKeyContext {
            signature_algorithm_id: vec![1],
            public_key_algorithm_id: vec![2],
        },
        C::NotValidForName,
        C::NotValidForNameContext { expected: name.clone(), presented: Vec::new() },
        C::NotValidForNameContext { expected: name, presented: vec![r#"DnsName("two.test")"#.to_owned()] },
        C::InvalidPurpose,
        C::InvalidPurposeContext { required: ExtendedKeyPurpose::ServerAuth, presented: Vec::new() },
        C::InvalidPurposeContext {
            required: ExtendedKeyPurpose::ServerAuth,
            presented: vec![ExtendedKeyPurpose::ClientAuth, ExtendedKeyPurpose::Other(vec![1, 3, 6])],
        },
        C::InvalidOcspResponse,
        C::ApplicationVerificationFailure,
        C::Other(OtherError(Arc::new(std::fmt::Error))),
    ];
    all.extend(IN_CHAIN.iter().map(|error| C::Other(OtherError(Arc::new(error.clone())))));
    all
}

fn lists() -> Vec<CertRevocationListError> {
    use CertRevocationListError as L;
    vec![
        L::BadSignature,
        L::UnsupportedSignatureAlgorithmContext {
            signature_algorithm_id: vec![1],
            supported_algorithms: Vec::new(),
        },
        L::UnsupportedSignatureAlgorithmForPublicKeyContext {
            signature_algorithm_id: vec![1],
            public_key_algorithm_id: vec![2],
        },
        L::InvalidCrlNumber,
        L::InvalidRevokedCertSerialNumber,
        L::IssuerInvalidForCrl,
        L::ParseError,
        L::UnsupportedCrlVersion,
        L::UnsupportedCriticalExtension,
        L::UnsupportedDeltaCrl,
        L::UnsupportedIndirectCrl,
        L::UnsupportedRevocationReason,
        L::Other(OtherError(Arc::new(std::fmt::Error))),
    ]
}

/// A sentence for people, and not the name of a variant taken apart.
fn check(error: &dyn std::fmt::Debug, text: &str) {
    assert!(text.split_whitespace().count() >= 3, "{error:?}: {text}");
    assert_ne!(text, spelled(error), "{error:?} has no words of its own");
    let letters: Vec<_> = text.chars().collect();
    let is_name = letters.windows(2).any(|pair| pair[0].is_lowercase() && pair[1].is_uppercase());
    assert!(!is_name, "{error:?}: {text}");
    assert!(!text.contains(['{', '[', '"', '_']), "{error:?}: {text}");
}

#[test]
fn whatever_a_peer_does_is_said_in_words() {
    INCOMPATIBLE.iter().for_each(|why| check(why, &incompatible(why)));
    MISBEHAVED.iter().for_each(|what| check(what, &misbehaved(what)));
    UNREADABLE.iter().for_each(|why| check(why, &unreadable(why)));
    certificates().iter().for_each(|why| check(why, &certificate(why)));
    lists().iter().for_each(|why| check(why, &revocation_list(why)));
}

#[test]
fn dates_and_names_are_those_of_people() {
    let said: Vec<_> = certificates().iter().map(|why| certificate(why).into_owned()).collect();
    for text in [
        "it was valid until Nov 14 22:13:20 2023 +00:00",
        "it is for another name: one.test is wanted, it is for no name at all",
        "it is for another name: one.test is wanted, it is for two.test",
        "it may not be used for server authentication, only for client authentication and other purposes",
        "the revocation list was valid until a time beyond all dates",
    ] {
        assert!(said.iter().any(|one| one == text), "{text}: {said:#?}");
    }
}

#[test]
fn names_of_a_stranger_are_few_short_and_printable() {
    let long = format!("DnsName(\"\u{1b}[2J\n{}\")", "x".repeat(10_000));
    let presented: Vec<_> = std::iter::repeat_n(long, 1_000).collect();
    let text = another_name("one.test", &presented);
    assert!(text.len() < 1_000, "{} bytes", text.len());
    assert!(!text.contains(char::is_control), "{text:?}");
    assert!(text.ends_with(" and 992 more"), "{text}");
    assert_eq!(bare("IpAddress(192.0.2.1)"), "192.0.2.1");
    assert_eq!(bare("DirectoryName"), "DirectoryName");
}

#[test]
fn what_comes_out_of_turn_is_named_by_its_rfc() {
    assert_eq!(
        message_out_of_turn(HandshakeType::Finished, &[HandshakeType::ClientHello, HandshakeType::from(99)]),
        "a handshake message came out of turn: Finished, where ClientHello or type 99 was expected"
    );
    assert_eq!(
        record_out_of_turn(ContentType::ApplicationData, &[]),
        "a record came out of turn: application data, where none was expected"
    );
}

#[test]
fn a_variant_of_a_newer_library_is_spelled() {
    assert_eq!(spelled(&InvalidMessage::MissingData("a place")), "missing data");
    assert_eq!(spelled(&PeerMisbehaved::SelectedUnofferedPsk), "selected unoffered psk");
}

/// Version 1, which says nothing but a name and a key.
fn of_version_1() -> Vec<u8> {
    let key = openssl::ec::EcKey::generate(
        &openssl::ec::EcGroup::from_curve_name(openssl::nid::Nid::X9_62_PRIME256V1).unwrap(),
    );
    let key = openssl::pkey::PKey::from_ec_key(key.unwrap()).unwrap();
    let mut one = openssl::x509::X509::builder().unwrap();
    one.set_version(0).unwrap();
    one.set_pubkey(&key).unwrap();
    one.set_not_before(&openssl::asn1::Asn1Time::days_from_now(0).unwrap()).unwrap();
    one.set_not_after(&openssl::asn1::Asn1Time::days_from_now(1).unwrap()).unwrap();
    one.set_serial_number(&openssl::bn::BigNum::from_u32(1).unwrap().to_asn1_integer().unwrap()).unwrap();
    one.sign(&key, openssl::hash::MessageDigest::sha256()).unwrap();
    one.build().to_der().unwrap()
}

/// rustls wraps what it has no word for: it is ours to name only as long as both use the same webpki.
#[test]
fn what_rustls_passes_on_is_found_in_its_wrapping() {
    let certificate = of_version_1();
    let der = rustls::pki_types::CertificateDer::from(certificate.as_slice());
    let error = rustls::server::ParsedCertificate::try_from(&der).err().unwrap();
    let rejection = crate::tls::verify::rejection(&error, &certificate);
    assert_eq!(
        rejection.message,
        "the peer's certificate is not acceptable: \
         it is not of version 3, the only one that says what a certificate is for"
    );
    assert_eq!(rejection.reason, crate::tls::failure::CertificateReason::Malformed);
}
