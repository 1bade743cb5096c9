//! [`Settings`]: what a configuration's options mean, parsed and checked together; an error names the field.
//!
//! What is not here: sharing, reloading, and the two libraries' own configurations ([`super::config`]).

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::ServerName;

use super::Role;
use super::credentials::{CertifiedCredentials, PskCredentials, read_certificates};
use super::early_data::LARGEST as LARGEST_EARLY_DATA;
use super::key_log::KeyLogSink;
use super::options::{
    ClientAuth, Credentials, LONGEST_TICKET_LIFETIME, Material, OcspCheck, PskHash, Roots, TlsOptions,
    TlsVersion,
};
use super::peer_rules::{PeerRules, check_asked};
use super::revocation::{self, StapleCheck};
use super::shown::ShownCertificates;
use super::suites::{Auth, DEFAULT_GROUPS, GROUPS, Group, SUITES, Suite, similar_suites};
use super::verify::{ChainVerifier, GuardedVerifier, OwnRoots, PeerVerifier, ReplacedVerifier, Trust};
use crate::error::{Error, Result};

/// Bytes of all application protocols as they are written in a hello. A list's length has 16 bits there, and
/// so have all extensions together: this leaves room for the others.
const LONGEST_ALPN: usize = 60 * 1024;

/// What is proved to the peer, parsed.
#[derive(Clone)]
pub(crate) enum OurCredentials {
    None,
    Certificate(Arc<CertifiedCredentials>),
    Psk(Arc<PskCredentials>),
}

/// Which library does the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Library {
    Rustls,
    Openssl,
}

/// The checked options.
pub(crate) struct Settings {
    pub(crate) credentials: OurCredentials,
    /// Certificates in rustls' form, where rustls does the handshakes.
    pub(crate) shown: Option<Arc<ShownCertificates>>,
    /// For OpenSSL without the rules: it has no alert for their refusal.
    pub(crate) verifier: Arc<dyn PeerVerifier>,
    /// The rules that the verifier does not know.
    pub(crate) later_rules: Arc<PeerRules>,
    /// The same, where it asks the system.
    pub(super) system: Option<Arc<ChainVerifier>>,
    /// A server tells its clients their names.
    pub(crate) own_roots: Option<Arc<OwnRoots>>,
    pub(crate) client_auth: ClientAuth,
    /// Whether there are rules on the peer.
    pub(super) has_rules: bool,
    /// Whether anybody is asked about the peer's certificate.
    pub(super) verifies_peers: bool,
    pub(crate) min_version: TlsVersion,
    pub(crate) max_version: TlsVersion,
    pub(crate) suites: Vec<&'static Suite>,
    pub(crate) groups: Vec<&'static Group>,
    pub(crate) alpn: Vec<Vec<u8>>,
    pub(crate) resumption: bool,
    pub(crate) ticket_lifetime: Duration,
    pub(crate) key_log: Option<Arc<KeyLogSink>>,
    pub(crate) legacy_renegotiation: bool,
    /// What was said and has no use at a server, and why.
    useless_at_a_server: Option<(&'static str, &'static str)>,
    pub(crate) security_level_0: bool,
    pub(crate) ignore_truncation: bool,
    /// Bytes; 0 is off.
    pub(crate) early_data: usize,
    /// Whether a client must say whom it expects.
    pub(super) needs_name: bool,
    pub(super) library: Library,
}

impl Settings {
    pub(super) fn new(options: &TlsOptions, key_log: Option<Arc<KeyLogSink>>) -> Result<Self> {
        if options.min_version > options.max_version {
            return Err(Error::config(
                "min_version",
                format!(
                    "{} is newer than max_version, {}",
                    options.min_version.as_str(),
                    options.max_version.as_str()
                ),
            ));
        }
        let credentials = load_credentials(options)?;
        let psk = matches!(credentials, OurCredentials::Psk(_));
        check_psk_has_no_certificates(options, psk)?;
        let suites = choose_suites(options, &credentials)?;
        let wants_openssl = psk
            || options.danger_legacy_renegotiation
            || options.danger_security_level_0
            || suites.iter().any(|s| s.legacy);
        check_use(options, psk, wants_openssl, &suites)?;
        let groups = choose_groups(options, &suites)?;
        for (index, protocol) in options.alpn.iter().enumerate() {
            if protocol.is_empty() || protocol.len() > 255 {
                let text = "an application protocol's name has 1 to 255 bytes";
                return Err(Error::config(format!("alpn.{index}"), text).with_reason("out_of_range"));
            }
        }
        // Each is written with its length in front (RFC 7301, section 3.1).
        if options.alpn.iter().map(|protocol| 1 + protocol.len()).sum::<usize>() > LONGEST_ALPN {
            let message = format!(
                "the application protocols are longer than a hello can carry: {LONGEST_ALPN} bytes in all, \
                 one more for each"
            );
            return Err(Error::config("alpn", message));
        }
        let shown = load_shown(options, &credentials, wants_openssl)?;
        if !(Duration::from_secs(1)..=LONGEST_TICKET_LIFETIME).contains(&options.ticket_lifetime) {
            let longest = LONGEST_TICKET_LIFETIME.as_secs();
            let text = format!("must be from 1 to {longest} seconds");
            return Err(Error::config("ticket_lifetime", text).with_reason("out_of_range"));
        }
        check_early_data(options, wants_openssl)?;
        // A version without a suite of its own is not spoken.
        let spoken = |version| suites.iter().any(|s| s.version == version);
        let min_version = if spoken(TlsVersion::V1_2) { TlsVersion::V1_2 } else { TlsVersion::V1_3 };
        let max_version = if spoken(TlsVersion::V1_3) { TlsVersion::V1_3 } else { TlsVersion::V1_2 };
        let loaded = load_verifier(options)?;
        let rules = Arc::new(PeerRules::load(options)?);
        let has_rules = !rules.is_empty();
        let staple = load_staple_check(options, wants_openssl, loaded.own_roots.as_deref())?;
        let (rules, later_rules) =
            if wants_openssl { (Arc::default(), rules) } else { (rules, Arc::default()) };
        let verifier = Arc::new(GuardedVerifier { verifier: loaded.verifier, staple, rules });
        if options.client_auth != ClientAuth::Off && options.verifier.is_none() {
            let nobody =
                loaded.own_roots.is_none() && options.pins.is_empty() && options.roots != Roots::DangerNone;
            if nobody || options.roots == Roots::System {
                return Err(Error::config(
                    "roots",
                    "clients' certificates are checked against roots of your own (or pins), not the system's",
                ));
            }
        }
        Ok(Self {
            credentials,
            shown,
            verifier,
            later_rules,
            system: loaded.system.filter(|_| !psk),
            own_roots: loaded.own_roots,
            client_auth: options.client_auth,
            has_rules,
            verifies_peers: options.roots != Roots::DangerNone || !options.pins.is_empty(),
            min_version,
            max_version,
            suites,
            groups,
            alpn: options.alpn.clone(),
            resumption: options.resumption,
            ticket_lifetime: options.ticket_lifetime,
            key_log,
            legacy_renegotiation: options.danger_legacy_renegotiation,
            useless_at_a_server: useless_at_a_server(options),
            security_level_0: options.danger_security_level_0,
            ignore_truncation: options.danger_ignore_truncation,
            early_data: options.danger_early_data,
            needs_name: loaded.needs_name && !psk,
            library: if wants_openssl { Library::Openssl } else { Library::Rustls },
        })
    }

    /// Whether the options fit the role; the server's name where there is one.
    pub(super) fn check_role(&self, role: &Role) -> Result<Option<ServerName<'static>>> {
        let name = self.check_name_and_credentials(role)?;
        if let (Role::Client { .. }, Some(system)) = (role, &self.system) {
            system.check_system()?;
        }
        Ok(name)
    }

    pub(super) fn check_name_and_credentials(&self, role: &Role) -> Result<Option<ServerName<'static>>> {
        match (role, &self.credentials) {
            (Role::Server, OurCredentials::None) => {
                Err(Error::config("credentials", "a server needs a certificate or a pre-shared key"))
            }
            (Role::Server, _) => {
                if let Some((field, why)) = self.useless_at_a_server {
                    return Err(Error::config(field, why).with_reason("unused"));
                }
                check_asked(self.has_rules, self.client_auth)?;
                Ok(None)
            }
            (Role::Client { .. }, OurCredentials::Psk(psk)) if psk.identities.len() != 1 => {
                Err(Error::config("credentials", "a client uses one pre-shared key, which it knows"))
            }
            (Role::Client { server_name }, _) => {
                let name = server_name.as_deref().map(parse_server_name).transpose()?;
                if name.is_none() && self.needs_name {
                    return Err(Error::config(
                        "server_hostname",
                        "the server's name is needed to check its certificate (or danger_ignore_server_name)",
                    ));
                }
                Ok(name)
            }
        }
    }

    /// The suites of one version.
    pub(crate) fn suites_of(&self, version: TlsVersion) -> impl Iterator<Item = &'static Suite> + '_ {
        self.suites.iter().copied().filter(move |s| s.version == version)
    }
}

/// A DNS name, or an IP address (IPv6 also in brackets).
fn parse_server_name(name: &str) -> Result<ServerName<'static>> {
    let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    if let Ok(address) = IpAddr::from_str(bare) {
        return Ok(ServerName::from(address));
    }
    let dns = name.strip_suffix('.').unwrap_or(name);
    ServerName::try_from(dns.to_owned()).map_err(|_| {
        Error::config("server_hostname", format!("{name:?} is neither a DNS name nor an IP address"))
    })
}

fn load_credentials(options: &TlsOptions) -> Result<OurCredentials> {
    Ok(match &options.credentials {
        Credentials::None => OurCredentials::None,
        Credentials::Certificate(own) => {
            let loaded = CertifiedCredentials::load(own).map_err(|error| error.of_table("credentials"))?;
            OurCredentials::Certificate(Arc::new(loaded))
        }
        Credentials::Psk { identities, hash } => OurCredentials::Psk(Arc::new(PskCredentials::check(
            identities,
            *hash,
            options.min_version == TlsVersion::V1_3,
            options.danger_short_psk,
        )?)),
        Credentials::PskLookup { lookup, hash } => OurCredentials::Psk(Arc::new(PskCredentials::looked_up(
            lookup.clone(),
            *hash,
            options.danger_short_psk,
        ))),
    })
}

/// An option that would do nothing is an error, not a surprise.
fn check_psk_has_no_certificates(options: &TlsOptions, psk: bool) -> Result<()> {
    let field = match () {
        () if !psk => return Ok(()),
        () if options.roots == Roots::DangerNone => "danger_accept_any_certificate",
        () if options.roots != Roots::Default => "roots",
        () if !options.pins.is_empty() => "pins",
        () if options.client_auth != ClientAuth::Off => "client_auth",
        () if options.verifier.is_some() => "verifier",
        () if !options.more_certificates.is_empty() => "more_credentials",
        () if !options.peer_rules.is_empty() => "peer_rules",
        () if !options.crls.is_empty() => "crls",
        () if options.ocsp.is_some_and(|ocsp| ocsp != OcspCheck::Off) => "ocsp",
        () => return Ok(()),
    };
    Err(Error::config(field, "with a pre-shared key there is no certificate to check").with_reason("unused"))
}

/// The same of what needs something else beside it.
fn check_use(options: &TlsOptions, psk: bool, wants_openssl: bool, suites: &[&Suite]) -> Result<()> {
    let spoken = |version| suites.iter().any(|s| s.version == version);
    let old = "is about TLS 1.2, which is not spoken";
    let hash = match &options.credentials {
        Credentials::Psk { hash, .. } | Credentials::PskLookup { hash, .. } => *hash,
        _ => PskHash::Sha256,
    };
    let (field, why) = match () {
        () if options.danger_short_psk && !psk => {
            ("danger_short_psk", "there is no pre-shared key, of whatever length")
        }
        () if hash != PskHash::Sha256 && !spoken(TlsVersion::V1_3) => {
            ("credentials.hash", "is about TLS 1.3, which is not spoken")
        }
        () if options.danger_legacy_renegotiation && !spoken(TlsVersion::V1_2) => {
            ("danger_legacy_renegotiation", old)
        }
        () if options.danger_legacy_suites && !spoken(TlsVersion::V1_2) => ("danger_legacy_suites", old),
        () if options.danger_legacy_suites && !suites.iter().any(|s| s.legacy) => {
            ("danger_legacy_suites", "none of the suites is one of them")
        }
        () if options.ticket_lifetime == LONGEST_TICKET_LIFETIME => return Ok(()),
        () if psk || !options.resumption => ("ticket_lifetime", "nothing is resumed: there are no tickets"),
        () if wants_openssl => {
            ("ticket_lifetime", "legacy modes and suites resume nothing: there are no tickets")
        }
        () => return Ok(()),
    };
    Err(Error::config(field, why).with_reason("unused"))
}

/// What is about the certificates of servers: whoever says it at a server believes that its clients are checked
/// that way. What is for a server alone asks a client for nothing: one configuration may be both ends'.
fn useless_at_a_server(options: &TlsOptions) -> Option<(&'static str, &'static str)> {
    match () {
        () if options.danger_legacy_renegotiation => {
            Some(("danger_legacy_renegotiation", "is for a client: it has no use at a server"))
        }
        () if options.danger_ignore_server_name => {
            Some(("danger_ignore_server_name", "is for a client: it has no use at a server"))
        }
        () if options.ocsp == Some(OcspCheck::Required) => {
            Some(("ocsp", "is for a client: clients staple no response to their certificates"))
        }
        () => None,
    }
}

/// Certificates as rustls shows them.
fn load_shown(
    options: &TlsOptions,
    credentials: &OurCredentials,
    wants_openssl: bool,
) -> Result<Option<Arc<ShownCertificates>>> {
    let own = match (credentials, &options.credentials) {
        (OurCredentials::Certificate(certified), Credentials::Certificate(own)) => Some((certified, own)),
        _ => None,
    };
    let Some((certified, own)) = own else {
        if options.more_certificates.is_empty() {
            return Ok(None);
        }
        let text = "one is chosen where no name fits: give it as credentials";
        return Err(Error::config("more_credentials", text));
    };
    if wants_openssl {
        for (field, given) in [
            ("more_credentials", !options.more_certificates.is_empty()),
            ("credentials.ocsp_response", own.ocsp_response.is_some()),
            ("credentials.names", !own.names.is_empty()),
        ] {
            if given {
                let text = "legacy modes and suites know one certificate and no staple";
                return Err(Error::config(field, text).with_reason("unused"));
            }
        }
        return Ok(None);
    }
    let shown = ShownCertificates::new(certified, own);
    let mut shown = shown.map_err(|error| error.of_table("credentials"))?;
    if options.more_certificates.is_empty() && !own.names.is_empty() {
        let text = "there is no other certificate: this one is shown for any name";
        return Err(Error::config("credentials.names", text).with_reason("unused"));
    }
    for (index, own) in options.more_certificates.iter().enumerate() {
        let added = CertifiedCredentials::load(own).and_then(|certified| shown.add(&certified, own));
        added.map_err(|error| error.of_table(format_args!("more_credentials.{index}")))?;
    }
    Ok(Some(Arc::new(shown)))
}

/// Early data belongs to resumed sessions of TLS 1.3.
fn check_early_data(options: &TlsOptions, wants_openssl: bool) -> Result<()> {
    let why = match options.danger_early_data {
        0 => return Ok(()),
        _ if wants_openssl => "pre-shared keys, legacy modes and legacy suites have no early data",
        _ if options.max_version < TlsVersion::V1_3 => "early data needs TLS 1.3",
        _ if !options.resumption => "early data needs resumption",
        bytes if bytes > LARGEST_EARLY_DATA => {
            let text = "must be at most 65536 bytes";
            return Err(Error::config("danger_early_data", text).with_reason("out_of_range"));
        }
        _ => return Ok(()),
    };
    Err(Error::config("danger_early_data", why).with_reason("unused"))
}

fn load_staple_check(
    options: &TlsOptions,
    wants_openssl: bool,
    roots: Option<&OwnRoots>,
) -> Result<StapleCheck> {
    let nobody = options.roots == Roots::DangerNone;
    let wanted = match options.ocsp {
        None if wants_openssl || nobody => OcspCheck::Off,
        None => OcspCheck::IfStapled,
        Some(OcspCheck::Off) => OcspCheck::Off,
        Some(_) if wants_openssl => {
            let text = "legacy modes and suites know no stapled responses";
            return Err(Error::config("ocsp", text).with_reason("unused"));
        }
        Some(_) if nobody => {
            let text = "nobody is asked about the peer's certificate: leave it away";
            return Err(Error::config("ocsp", text).with_reason("unused"));
        }
        Some(wanted) => wanted,
    };
    Ok(StapleCheck::new(wanted, roots.map_or_else(Vec::new, |roots| roots.certificates().to_vec())))
}

struct LoadedVerifier {
    verifier: Arc<dyn PeerVerifier>,
    system: Option<Arc<ChainVerifier>>,
    own_roots: Option<Arc<OwnRoots>>,
    /// Whether it compares the server's name.
    needs_name: bool,
}

fn load_verifier(options: &TlsOptions) -> Result<LoadedVerifier> {
    let provider = Arc::new(default_provider());
    let chain = |trust, check_name| {
        Arc::new(ChainVerifier {
            trust,
            pins: options.pins.clone(),
            check_name,
            provider: Arc::clone(&provider),
        })
    };
    let crls = revocation::read_crls(&options.crls)?;
    if !crls.is_empty() && (options.verifier.is_some() || !matches!(options.roots, Roots::Own(_))) {
        let text = "revocation lists belong to roots of your own: give them too";
        return Err(Error::config("crls", text).with_reason("unused"));
    }
    let loaded =
        |verifier, needs_name| LoadedVerifier { verifier, system: None, own_roots: None, needs_name };
    if let Some(verifier) = &options.verifier {
        if options.roots != Roots::Default {
            return Err(Error::config("roots", "the replaced verifier decides alone; leave roots away"));
        }
        let pins = (!options.pins.is_empty()).then(|| chain(Trust::Nobody, false));
        return Ok(loaded(Arc::new(ReplacedVerifier { verifier: Arc::clone(verifier), pins }), false));
    }
    let check_name = !options.danger_ignore_server_name;
    Ok(match &options.roots {
        Roots::Default if !options.pins.is_empty() => loaded(chain(Trust::Nobody, check_name), false),
        Roots::Default | Roots::System => {
            let system = chain(Trust::System(OnceLock::new()), check_name);
            LoadedVerifier { system: Some(Arc::clone(&system)), ..loaded(system, check_name) }
        }
        Roots::DangerNone => loaded(chain(Trust::Nobody, false), false),
        Roots::Own(material) => {
            let certificates = read_certificates(material.expose(), "roots");
            let certificates = certificates.map_err(|error| material.blame(error))?;
            let roots = OwnRoots::new(certificates.clone(), crls, &provider);
            let roots = roots.map_err(|error| culprit(error, &options.crls, &certificates, &provider))?;
            let roots = Arc::new(roots);
            let verifier = chain(Trust::Own(Arc::clone(&roots)), check_name);
            LoadedVerifier { own_roots: Some(roots), ..loaded(verifier, check_name) }
        }
    })
}

/// Which of several revocation lists cannot be used.
fn culprit(
    error: Error,
    crls: &[Material],
    certificates: &[Vec<u8>],
    provider: &Arc<CryptoProvider>,
) -> Error {
    if error.field() != Some("crls") {
        return error;
    }
    for (index, material) in crls.iter().enumerate() {
        let alone = revocation::read_crls(std::slice::from_ref(material))
            .and_then(|lists| OwnRoots::new(certificates.to_vec(), lists, provider));
        if let Err(wrong) = alone {
            return material.blame(Error::config(format!("crls.{index}"), wrong.message()));
        }
    }
    error
}

fn choose_suites(options: &TlsOptions, credentials: &OurCredentials) -> Result<Vec<&'static Suite>> {
    let psk_hash = match credentials {
        OurCredentials::Psk(psk) => Some(psk.hash),
        _ => None,
    };
    let mut chosen: Vec<&'static Suite> = Vec::new();
    if options.cipher_suites.is_empty() {
        let fits = |s: &&Suite| misfit(s, psk_hash).is_none() && (!s.legacy || options.danger_legacy_suites);
        chosen.extend(SUITES.iter().filter(fits));
    } else {
        for (index, name) in options.cipher_suites.iter().enumerate() {
            let field = || format!("cipher_suites.{index}");
            let suite = named_suite(name, field, options)?;
            if let Some(why) = misfit(suite, psk_hash) {
                return Err(Error::config(field(), format!("{} {why}", suite.iana)));
            }
            if suite.version < options.min_version || suite.version > options.max_version {
                let text = format!("{} is of {}, which is not spoken", suite.iana, suite.version.as_str());
                return Err(Error::config(field(), text).with_reason("unused"));
            }
            if !chosen.contains(&suite) {
                chosen.push(suite);
            }
        }
    }
    chosen.retain(|s| (options.min_version..=options.max_version).contains(&s.version));
    if chosen.is_empty() {
        return Err(Error::config("cipher_suites", "none of these suites belongs to the versions allowed"));
    }
    Ok(chosen)
}

/// Why a suite cannot be used with these credentials.
fn misfit(suite: &Suite, psk_hash: Option<PskHash>) -> Option<&'static str> {
    match (suite.auth, psk_hash) {
        (Auth::Any | Auth::Certificate, None) | (Auth::Psk, Some(_)) => None,
        (Auth::Psk, None) => Some("needs a pre-shared key"),
        (Auth::Certificate, Some(_)) => Some("needs a certificate, not a pre-shared key"),
        // The hash of a key is the hash of the suite (RFC 8446, section 4.2.11).
        (Auth::Any, Some(hash)) => match (hash, suite.is_sha384()) {
            (PskHash::Sha256, true) => Some("needs a pre-shared key that was made for SHA-384"),
            (PskHash::Sha384, false) => Some("needs a pre-shared key that was made for SHA-256"),
            _ => None,
        },
    }
}

fn named_suite(name: &str, field: impl Fn() -> String, options: &TlsOptions) -> Result<&'static Suite> {
    let suite = Suite::by_name(name).ok_or_else(|| {
        Error::config(
            field(),
            format!("{name:?} is not a suite that is known here; {}", similar_suites(name)),
        )
    })?;
    if suite.legacy && !options.danger_legacy_suites {
        return Err(Error::config(
            field(),
            format!("{} has CBC or no forward secrecy; allow it by danger_legacy_suites", suite.iana),
        ));
    }
    Ok(suite)
}

fn choose_groups(options: &TlsOptions, suites: &[&Suite]) -> Result<Vec<&'static Group>> {
    if options.groups.is_empty() {
        return Ok(GROUPS[..DEFAULT_GROUPS].iter().collect());
    }
    // Plain pre-shared keys and RSA's own key exchange agree on no group.
    if suites.iter().all(|s| s.version == TlsVersion::V1_2 && !s.iana.starts_with("TLS_ECDHE_")) {
        let text = "none of the suites has a key exchange in a group";
        return Err(Error::config("groups", text).with_reason("unused"));
    }
    let spoken = suites.iter().any(|s| s.version == TlsVersion::V1_3);
    let choose = |(index, name): (usize, &String)| {
        let field = format!("groups.{index}");
        let Some(group) = Group::by_name(name) else {
            let known: Vec<_> = GROUPS.iter().map(|g| g.name).collect();
            let text = format!("{name:?} is not a group that is known here; these are: {}", known.join(", "));
            return Err(Error::config(field, text));
        };
        if group.is_new() && !spoken {
            let text = format!("{} is of TLS 1.3, which is not spoken", group.name);
            return Err(Error::config(field, text).with_reason("unused"));
        }
        Ok(group)
    };
    options.groups.iter().enumerate().map(choose).collect()
}
