//! Keys, certificates, lists and staples: what a user gives in files, and what a peer shows.

use std::sync::OnceLock;
use std::time::Duration;

use super::Script;
use crate::error::{Error, ErrorKind, Result};
use crate::tls::bench::BENCH_SERVER_NAME;
use crate::tls::certificate;
use crate::tls::config::TlsConfig;
use crate::tls::credentials::{read_certificates, read_key, read_pkcs12};
use crate::tls::dev_cert::{DevAuthority, dev_certificates};
use crate::tls::failure::Rejection;
use crate::tls::options::{Roots, Secret, TlsOptions};
use crate::tls::peer_rules::{PeerRule, PeerRules};
use crate::tls::revocation::check_own_staple;
use crate::tls::server_end_point;
use crate::tls::verify::{PeerCertificates, PeerVerifier, public_key_pin};

/// A mistake in what a user gave blames one of these fields, and says why in a few words.
fn blames(error: &Error, fields: &[&str]) {
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.field().is_some_and(|field| fields.contains(&field)), "{:?}: {error}", error.field());
    assert!(error.message().len() < 2_000);
}

/// An authority's certificate and one that it signed, in DER.
fn chain() -> &'static [Vec<u8>; 2] {
    static MADE: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    MADE.get_or_init(|| {
        let made = dev_certificates(&[BENCH_SERVER_NAME], Duration::from_secs(86_400)).expect("certificates");
        let first = |pem: &str| read_certificates(pem.as_bytes(), "roots").expect("made here").swap_remove(0);
        [first(&made.server.chain), first(&made.authority)]
    })
}

/// Certificates that a user gives: PEM or DER.
pub fn certificates(input: &[u8]) {
    match read_certificates(input, "roots") {
        Ok(found) => {
            assert!(!found.is_empty());
            for der in &found {
                assert_eq!(
                    read_certificates(der, "roots").expect("it was read once"),
                    std::slice::from_ref(der)
                );
            }
        }
        Err(error) => blames(&error, &["roots"]),
    }
    let options = TlsOptions { roots: Roots::Own(input.to_vec().into()), ..TlsOptions::default() };
    if let Err(error) = TlsConfig::new(&options) {
        blames(&error, &["roots"]);
    }
}

/// A private key that a user gives, with a password where the first byte is odd.
pub fn private_key(input: &[u8]) {
    let Some((&choice, bytes)) = input.split_first() else { return };
    let password = (choice & 1 == 1).then(|| Secret::new(*b"password"));
    if let Err(error) = read_key(bytes, password.as_ref()) {
        blames(&error, &["key", "password"]);
    }
    // The key of an authority that was kept, which is never encrypted.
    if let Err(error) = DevAuthority::read(bytes, bytes) {
        blames(&error, &["ca_dir"]);
    }
}

/// A PKCS#12 file, with a password where the first byte is odd.
pub fn pkcs12(input: &[u8]) {
    let Some((&choice, bytes)) = input.split_first() else { return };
    let password = (choice & 1 == 1).then(|| Secret::new(*b"password"));
    match read_pkcs12(bytes, password.as_ref()) {
        Ok((chain, _)) => assert!(!chain.is_empty()),
        Err(error) => blames(&error, &["file", "password"]),
    }
}

/// Revocation lists that a user gives: PEM or DER, as one or in two parts.
///
/// Input: a byte for where the second one begins, then the lists.
pub fn crls(input: &[u8]) {
    let Some((&cut, bytes)) = input.split_first() else { return };
    let (one, other) = bytes.split_at(bytes.len() * usize::from(cut) / 256);
    let lists = [one, other].into_iter().filter(|list| !list.is_empty());
    let options = TlsOptions {
        roots: Roots::Own(chain()[1].clone().into()),
        crls: lists.map(|list| list.to_vec().into()).collect(),
        ..TlsOptions::default()
    };
    match TlsConfig::new(&options) {
        // What they say of our certificate is a verdict, never a panic.
        Ok(config) => {
            let _ = show(config.verifier().as_ref(), &[&chain()[0]], &[], false);
        }
        Err(error) => blames(&error, &["crls.0", "crls.1", "crls"]),
    }
}

/// An OCSP response: one that a user gives to be stapled, and one that a server stapled. Nobody but the
/// authority, whose key is gone, can make one that is believed.
pub fn ocsp_response(input: &[u8]) {
    let error = check_own_staple(input, chain()).expect_err("nobody signed this");
    blames(&error, &["ocsp_response"]);
    static CONFIG: OnceLock<TlsConfig> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let roots = Roots::Own(chain()[1].clone().into());
        TlsConfig::new(&TlsOptions { roots, ..TlsOptions::default() }).expect("good options")
    });
    let verdict = show(config.verifier().as_ref(), &[&chain()[0]], input, false);
    assert_eq!(verdict.is_ok(), input.is_empty(), "a staple that nobody signed is not believed");
}

/// Certificates that a peer shows, in DER: to a verifier with roots, pins and rules, and to all who
/// describe them. None is believed.
///
/// Input: a byte for the role, two for the length of the first certificate, then two of them.
pub fn peer_certificates(input: &[u8]) {
    let mut script = Script(input);
    let (Some(choice), Some(high), Some(low)) = (script.byte(), script.byte(), script.byte()) else { return };
    let leaf = script.bytes(usize::from(high) << 8 | usize::from(low));
    if let Ok(said) = certificate::describe(leaf) {
        assert!(said.serial.len() % 2 == 0 && said.version >= 1);
        assert!(public_key_pin(leaf).is_ok());
    }
    let _ = server_end_point(leaf);
    static MADE: OnceLock<([TlsConfig; 2], PeerRules)> = OnceLock::new();
    let (configs, rules) = MADE.get_or_init(|| {
        let made = |roots, pins| {
            TlsConfig::new(&TlsOptions { roots, pins, ..TlsOptions::default() }).expect("good options")
        };
        // The last is a hash that nothing has.
        let rule = PeerRule {
            dns: vec!["*.x".to_owned()],
            uri: vec!["spiffe://*".to_owned()],
            cn: vec!["x".to_owned()],
            pin: vec![[7; 32]],
            ..PeerRule::default()
        };
        let configs =
            [made(Roots::Own(chain()[1].clone().into()), Vec::new()), made(Roots::Default, vec![[7; 32]])];
        (configs, PeerRules::new(&[rule]).expect("good rules"))
    });
    let shown: &[&[u8]] = if script.0.is_empty() { &[leaf] } else { &[leaf, script.0] };
    let verdicts = configs.iter().map(|config| show(config.verifier().as_ref(), shown, &[], choice & 1 == 1));
    for verdict in verdicts.chain([rules.check(leaf)]) {
        let rejection = verdict.expect_err("nobody knows this certificate");
        assert!(rejection.message.len() < 4_000, "{rejection:?}");
    }
}

fn show(
    verifier: &dyn PeerVerifier,
    chain: &[&[u8]],
    ocsp: &[u8],
    peer_is_client: bool,
) -> Result<(), Rejection> {
    let server_name = (!peer_is_client).then_some(BENCH_SERVER_NAME);
    verifier.verify(&PeerCertificates { chain, peer_is_client, server_name, ocsp })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes(input in vec(any::<u8>(), 0..200)) {
            certificates(&input);
            private_key(&input);
            pkcs12(&input);
            crls(&input);
            ocsp_response(&input);
            peer_certificates(&input);
        }

        /// What is nearly right is looked at more closely.
        #[test]
        fn changed_certificates(at in 0usize..600, turn in 1u8.., role: u8) {
            let mut leaf = chain()[0].clone();
            let at = at % leaf.len();
            leaf[at] ^= turn;
            let mut input = vec![role, (leaf.len() >> 8) as u8, leaf.len() as u8];
            input.extend(&leaf);
            peer_certificates(&input);
            certificates(&leaf);
        }
    }

    #[test]
    fn a_good_certificate_is_not_believed_where_it_is_unknown() {
        let leaf = &chain()[0];
        let verifier = TlsConfig::new(&TlsOptions {
            roots: Roots::Own(chain()[1].clone().into()),
            ..TlsOptions::default()
        });
        assert!(show(verifier.unwrap().verifier().as_ref(), &[leaf], &[], false).is_ok());
    }
}
