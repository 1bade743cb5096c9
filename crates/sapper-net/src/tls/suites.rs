//! Names of suites and groups: one table for both engines, IANA and OpenSSL spelling accepted.

use super::options::TlsVersion;

/// How a suite authenticates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Auth {
    /// TLS 1.3: the suite does not say.
    Any,
    /// Certificates.
    Certificate,
    /// Pre-shared keys.
    Psk,
}

/// A suite that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Suite {
    /// The two bytes on the wire.
    pub(crate) id: u16,
    /// IANA's name.
    pub(crate) iana: &'static str,
    /// OpenSSL's name.
    pub(crate) openssl: &'static str,
    pub(crate) version: TlsVersion,
    pub(crate) auth: Auth,
    /// CBC, or a certificate's key used for encryption: only by `danger_legacy_suites`.
    pub(crate) legacy: bool,
}

const fn suite(id: u16, iana: &'static str, openssl: &'static str, auth: Auth, legacy: bool) -> Suite {
    let version = if matches!(auth, Auth::Any) { TlsVersion::V1_3 } else { TlsVersion::V1_2 };
    Suite { id, iana, openssl, version, auth, legacy }
}

/// All of them, best first. AES-128 leads TLS 1.3, as it does in Go and in browsers: both are beyond
/// anybody's reach, it takes ten rounds in place of fourteen, and SHA-256 has instructions of its own.
/// The order of the pre-shared ones is what packet tunnels expect.
#[rustfmt::skip]
pub(crate) const SUITES: &[Suite] = &[
    suite(0x1301, "TLS_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256", Auth::Any, false),
    suite(0x1302, "TLS_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384", Auth::Any, false),
    suite(0x1303, "TLS_CHACHA20_POLY1305_SHA256", "TLS_CHACHA20_POLY1305_SHA256", Auth::Any, false),

    suite(0xc02c, "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384", Auth::Certificate, false),
    suite(0xc02b, "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256", Auth::Certificate, false),
    suite(0xcca9, "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305", Auth::Certificate, false),
    suite(0xc030, "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "ECDHE-RSA-AES256-GCM-SHA384", Auth::Certificate, false),
    suite(0xc02f, "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "ECDHE-RSA-AES128-GCM-SHA256", Auth::Certificate, false),
    suite(0xcca8, "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-RSA-CHACHA20-POLY1305", Auth::Certificate, false),

    suite(0xc024, "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA384", "ECDHE-ECDSA-AES256-SHA384", Auth::Certificate, true),
    suite(0xc023, "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256", "ECDHE-ECDSA-AES128-SHA256", Auth::Certificate, true),
    suite(0xc028, "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA384", "ECDHE-RSA-AES256-SHA384", Auth::Certificate, true),
    suite(0xc027, "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256", "ECDHE-RSA-AES128-SHA256", Auth::Certificate, true),
    suite(0xc00a, "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA", "ECDHE-ECDSA-AES256-SHA", Auth::Certificate, true),
    suite(0xc009, "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA", "ECDHE-ECDSA-AES128-SHA", Auth::Certificate, true),
    suite(0xc014, "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA", "ECDHE-RSA-AES256-SHA", Auth::Certificate, true),
    suite(0xc013, "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", "ECDHE-RSA-AES128-SHA", Auth::Certificate, true),
    suite(0x009d, "TLS_RSA_WITH_AES_256_GCM_SHA384", "AES256-GCM-SHA384", Auth::Certificate, true),
    suite(0x009c, "TLS_RSA_WITH_AES_128_GCM_SHA256", "AES128-GCM-SHA256", Auth::Certificate, true),
    suite(0x003d, "TLS_RSA_WITH_AES_256_CBC_SHA256", "AES256-SHA256", Auth::Certificate, true),
    suite(0x003c, "TLS_RSA_WITH_AES_128_CBC_SHA256", "AES128-SHA256", Auth::Certificate, true),
    suite(0x0035, "TLS_RSA_WITH_AES_256_CBC_SHA", "AES256-SHA", Auth::Certificate, true),
    suite(0x002f, "TLS_RSA_WITH_AES_128_CBC_SHA", "AES128-SHA", Auth::Certificate, true),

    suite(0x00a9, "TLS_PSK_WITH_AES_256_GCM_SHA384", "PSK-AES256-GCM-SHA384", Auth::Psk, false),
    suite(0x00a8, "TLS_PSK_WITH_AES_128_GCM_SHA256", "PSK-AES128-GCM-SHA256", Auth::Psk, false),
    suite(0xccac, "TLS_ECDHE_PSK_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-PSK-CHACHA20-POLY1305", Auth::Psk, false),
    suite(0xccab, "TLS_PSK_WITH_CHACHA20_POLY1305_SHA256", "PSK-CHACHA20-POLY1305", Auth::Psk, false),
    suite(0x00af, "TLS_PSK_WITH_AES_256_CBC_SHA384", "PSK-AES256-CBC-SHA384", Auth::Psk, true),
    suite(0x00ae, "TLS_PSK_WITH_AES_128_CBC_SHA256", "PSK-AES128-CBC-SHA256", Auth::Psk, true),
    suite(0x008d, "TLS_PSK_WITH_AES_256_CBC_SHA", "PSK-AES256-CBC-SHA", Auth::Psk, true),
    suite(0x008c, "TLS_PSK_WITH_AES_128_CBC_SHA", "PSK-AES128-CBC-SHA", Auth::Psk, true),
];

impl Suite {
    /// Looks a name up, in either spelling and any case.
    pub(crate) fn by_name(name: &str) -> Option<&'static Suite> {
        SUITES.iter().find(|s| s.iana.eq_ignore_ascii_case(name) || s.openssl.eq_ignore_ascii_case(name))
    }

    /// Looks the wire's number up.
    pub(crate) fn by_id(id: u16) -> Option<&'static Suite> {
        SUITES.iter().find(|s| s.id == id)
    }

    /// Whether TLS 1.3 hashes with SHA-384 in this suite.
    pub(crate) fn is_sha384(&self) -> bool {
        self.openssl.ends_with("SHA384")
    }
}

/// A key exchange group that both engines know: IANA's name and other spellings.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) name: &'static str,
    aliases: &'static [&'static str],
}

/// All of them, best first.
pub(crate) const GROUPS: &[Group] = &[
    Group { name: "X25519MLKEM768", aliases: &[] },
    Group { name: "X25519", aliases: &["curve25519"] },
    Group { name: "secp256r1", aliases: &["P-256", "prime256v1", "P256"] },
    Group { name: "secp384r1", aliases: &["P-384", "P384"] },
    Group { name: "SecP256r1MLKEM768", aliases: &[] },
];

/// How many of [`GROUPS`] are used without being asked for.
pub(crate) const DEFAULT_GROUPS: usize = 4;

impl Group {
    /// Whether TLS 1.2 does not know it.
    pub(crate) fn is_new(&self) -> bool {
        self.name.ends_with("MLKEM768")
    }

    /// Looks a name up, in any spelling and case.
    pub(crate) fn by_name(name: &str) -> Option<&'static Group> {
        GROUPS.iter().find(|g| {
            g.name.eq_ignore_ascii_case(name) || g.aliases.iter().any(|a| a.eq_ignore_ascii_case(name))
        })
    }
}

/// The names a person may have meant, for an error message.
pub(crate) fn similar_suites(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    let near: Vec<_> = SUITES
        .iter()
        .filter(|s| upper.len() >= 4 && (s.iana.contains(&upper) || s.openssl.contains(&upper)))
        .map(|s| s.iana)
        .take(3)
        .collect();
    if near.is_empty() { "e.g. TLS_AES_256_GCM_SHA384".to_owned() } else { near.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_find_the_same_suite() {
        for suite in SUITES {
            assert_eq!(Suite::by_name(suite.iana), Some(suite));
            assert_eq!(Suite::by_name(&suite.openssl.to_lowercase()), Some(suite));
            assert_eq!(Suite::by_id(suite.id), Some(suite));
        }
        assert_eq!(Suite::by_name("TLS_NULL_WITH_NULL_NULL"), None);
    }

    #[test]
    fn openssl_knows_every_suite_by_these_names() {
        let mut builder = openssl::ssl::SslContext::builder(openssl::ssl::SslMethod::tls()).unwrap();
        builder.set_security_level(0);
        for suite in SUITES {
            match suite.version {
                TlsVersion::V1_2 => builder.set_cipher_list(suite.openssl).unwrap(),
                TlsVersion::V1_3 => builder.set_ciphersuites(suite.openssl).unwrap(),
            }
            assert_eq!(openssl::ssl::cipher_name(suite.iana), suite.openssl, "{}", suite.iana);
        }
    }

    #[test]
    fn openssl_knows_every_group() {
        let mut builder = openssl::ssl::SslContext::builder(openssl::ssl::SslMethod::tls()).unwrap();
        for group in GROUPS {
            builder.set_groups_list(group.name).unwrap();
        }
        assert_eq!(Group::by_name("p-256").unwrap().name, "secp256r1");
    }
}
