//! [`TlsConfig`]: options parsed and checked once, shared by any number of connections of both roles.
//!
//! What is not here: what the options mean ([`super::settings`]), and the engines' own configurations
//! ([`super::rustls_config`], [`super::openssl_config`]), which are made from those when a role is first used.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use openssl::ssl::SslContext;

use super::capture::Flow;
use super::key_log::KeyLogSink;
use super::options::TlsOptions;
use super::server_configs::ServerConfigs;
use super::settings::{Library, OurCredentials, Settings};
use super::{BoxEngine, Role, openssl_config, openssl_engine, rustls_config, rustls_engine};
use crate::error::{Error, Result};

/// Credentials, verification, versions and suites, ready for use. Share it by `Arc`.
pub struct TlsConfig {
    /// What new connections get. Running ones keep what they have.
    loaded: RwLock<Arc<Loaded>>,
    /// As they were last loaded, for the next reload. Held during one.
    options: Mutex<TlsOptions>,
    /// The same with other application protocols, youngest last: what is reloaded here is reloaded there.
    offering: Mutex<Vec<Offer>>,
}

/// Application protocols, and the configuration that offers them.
type Offer = (Vec<Vec<u8>>, Arc<TlsConfig>);

/// Sets of application protocols that one configuration is used with at a time: upgrades have one, endpoints
/// may name their own.
const MAX_OFFERS: usize = 16;

/// Options as they were at one moment.
struct Loaded {
    settings: Settings,
    rustls_client: OnceLock<Result<Arc<rustls::ClientConfig>>>,
    /// The same, for clients that send early data.
    rustls_early: OnceLock<Result<Arc<rustls::ClientConfig>>>,
    rustls_server: OnceLock<Result<Arc<ServerConfigs>>>,
    openssl_client: OnceLock<Result<SslContext>>,
    openssl_server: OnceLock<Result<SslContext>>,
}

impl TlsConfig {
    /// Checks the options; an error names the field.
    pub fn new(options: &TlsOptions) -> Result<Self> {
        let key_log = KeyLogSink::open(options)?.map(Arc::new);
        let loaded = Loaded::new(options, key_log)?;
        Ok(Self::of(loaded, options.clone()))
    }

    fn of(loaded: Loaded, options: TlsOptions) -> Self {
        Self {
            loaded: RwLock::new(Arc::new(loaded)),
            options: Mutex::new(options),
            offering: Mutex::default(),
        }
    }

    /// The same with these application protocols: reloaded with this one, into the same key log and capture,
    /// and the same one each time, so that its sessions are kept.
    pub fn with_alpn(&self, alpn: &[Vec<u8>]) -> Result<Arc<Self>> {
        let options = self.options.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut offering = self.offering.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, made)) = offering.iter().find(|(offered, _)| offered == alpn) {
            return Ok(Arc::clone(made));
        }
        let options = TlsOptions { alpn: alpn.to_vec(), ..options.clone() };
        let loaded = Loaded::new(&options, self.loaded().settings.key_log.clone())?;
        let made = Arc::new(Self::of(loaded, options));
        if offering.len() == MAX_OFFERS {
            offering.remove(0);
        }
        offering.push((alpn.to_vec(), Arc::clone(&made)));
        Ok(made)
    }

    /// A new connection's engine.
    pub fn engine(&self, role: &Role) -> Result<BoxEngine> {
        self.loaded().engine(role, None)
    }

    /// The same, of a client that says `early` before the handshake as far as its ticket allows.
    pub(crate) fn engine_with_early_data(&self, role: &Role, early: &[u8]) -> Result<BoxEngine> {
        self.check_early_data(role, early.len())?;
        self.loaded().engine(role, Some(early))
    }

    /// Whether a connection in this role may begin with so many bytes of early data.
    pub fn check_early_data(&self, role: &Role, len: usize) -> Result<()> {
        let allowed = self.early_data();
        let wrong = |text| Err(Error::config("early_data", text));
        match role {
            Role::Server => {
                wrong("a server has none to send: danger_early_data lets it take some".to_owned())
            }
            _ if allowed == 0 => wrong(
                "it can be recorded and sent again by others: allow it by danger_early_data of the TlsConfig"
                    .to_owned(),
            ),
            _ if len > allowed => wrong(format!("{len} bytes are more than danger_early_data = {allowed}")),
            Role::Client { .. } => Ok(()),
        }
    }

    /// How many bytes of early data are allowed; 0 is off.
    pub fn early_data(&self) -> usize {
        self.loaded().settings.early_data
    }

    /// Finds what is wrong with a connection in this role before there is one. Not whether the system
    /// has roots: that takes a look at the disk, and is no mistake of the caller's.
    pub fn check(&self, role: &Role) -> Result<()> {
        self.loaded().check(role)
    }

    /// Reads all files again; whether anything has changed. New connections get it, running ones go on.
    /// Sessions from before are not resumed: what they were decided by is gone. After an error (which
    /// names the field) everything stays as it was.
    pub fn reload(&self) -> Result<bool> {
        let mut options = self.options.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fresh = options.read_again()?;
        let same = fresh.credentials == options.credentials
            && fresh.more_certificates == options.more_certificates
            && fresh.roots == options.roots
            && fresh.crls == options.crls;
        if same {
            return Ok(false);
        }
        let before = self.loaded();
        let after = Loaded::new(&fresh, before.settings.key_log.clone())?;
        // OpenSSL judges keys when its context is made, and must do so before the old one is gone.
        after.make_as(&before)?;
        *self.loaded.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Arc::new(after);
        *options = fresh;
        let offering = self.offering.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        offering.iter().try_for_each(|(_, made)| made.reload().map(drop))?;
        Ok(true)
    }

    /// The files that [`reload`](Self::reload) reads.
    pub fn files(&self) -> Vec<PathBuf> {
        self.options.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).files()
    }

    /// Which library does the handshakes: `"rustls"` or `"openssl"`.
    pub fn engine_name(&self) -> &'static str {
        self.loaded().engine_name()
    }

    /// Whether a handshake in this role may block.
    pub(crate) fn may_block(&self, role: &Role) -> bool {
        let loaded = self.loaded();
        let asks = matches!(&loaded.settings.credentials, OurCredentials::Psk(psk) if psk.lookup.is_some());
        asks && matches!(role, Role::Server)
    }

    /// Whether a certificate that a peer shows is verified by roots or pins.
    pub(crate) fn verifies_peers(&self) -> bool {
        self.loaded().settings.verifies_peers
    }

    /// Whether an end without close_notify counts as an orderly one.
    pub fn allows_truncation(&self) -> bool {
        self.loaded().settings.ignore_truncation
    }

    /// A new connection's place in the capture, where there is one.
    pub(crate) fn captured(
        &self,
        is_client: bool,
        local: Option<SocketAddr>,
        peer: Option<SocketAddr>,
    ) -> Result<Option<Box<Flow>>> {
        let loaded = self.loaded();
        let capture = loaded.settings.key_log.as_ref().and_then(|log| log.capture.as_ref());
        capture.map(|capture| capture.flow(is_client, local, peer).map(Box::new)).transpose()
    }

    /// Who decides about peers.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn verifier(&self) -> Arc<dyn crate::tls::verify::PeerVerifier> {
        Arc::clone(&self.loaded().settings.verifier)
    }

    fn loaded(&self) -> Arc<Loaded> {
        Arc::clone(&self.loaded.read().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

impl Loaded {
    fn new(options: &TlsOptions, key_log: Option<Arc<KeyLogSink>>) -> Result<Self> {
        Ok(Self {
            settings: Settings::new(options, key_log)?,
            rustls_client: OnceLock::new(),
            rustls_early: OnceLock::new(),
            rustls_server: OnceLock::new(),
            openssl_client: OnceLock::new(),
            openssl_server: OnceLock::new(),
        })
    }

    fn engine(&self, role: &Role, early: Option<&[u8]>) -> Result<BoxEngine> {
        let name = self.settings.check_role(role)?;
        match self.settings.library {
            Library::Rustls => match role {
                Role::Client { .. } => {
                    let config = if early.is_some() { self.rustls_early()? } else { self.rustls_client()? };
                    rustls_engine::client(Arc::clone(config), name, early)
                }
                Role::Server => rustls_engine::server(Arc::clone(self.rustls_server()?)),
            },
            Library::Openssl => {
                let is_client = matches!(role, Role::Client { .. });
                openssl_engine::engine(self.openssl(is_client)?, &self.settings, is_client, name)
            }
        }
    }

    fn check(&self, role: &Role) -> Result<()> {
        self.settings.check_name_and_credentials(role)?;
        self.prepare(role)
    }

    /// Makes what all connections in this role share.
    fn prepare(&self, role: &Role) -> Result<()> {
        match (self.settings.library, role) {
            (Library::Rustls, Role::Client { .. }) => self.rustls_client().map(drop),
            (Library::Rustls, Role::Server) => self.rustls_server().map(drop),
            (Library::Openssl, _) => self.openssl(matches!(role, Role::Client { .. })).map(drop),
        }
    }

    fn rustls_client(&self) -> Result<&Arc<rustls::ClientConfig>> {
        once(&self.rustls_client, || rustls_config::client(&self.settings))
    }

    fn rustls_early(&self) -> Result<&Arc<rustls::ClientConfig>> {
        once(&self.rustls_early, || {
            // It shares the sessions with the other one.
            let mut config = rustls::ClientConfig::clone(self.rustls_client()?);
            config.enable_early_data = true;
            Ok(Arc::new(config))
        })
    }

    fn rustls_server(&self) -> Result<&Arc<ServerConfigs>> {
        once(&self.rustls_server, || rustls_config::server(&self.settings))
    }

    fn openssl(&self, is_client: bool) -> Result<&SslContext> {
        let slot = if is_client { &self.openssl_client } else { &self.openssl_server };
        once(slot, || openssl_config::context(&self.settings, is_client))
    }

    /// Makes what another one had made by now.
    fn make_as(&self, other: &Self) -> Result<()> {
        if other.rustls_client.get().is_some() {
            self.rustls_client()?;
        }
        if other.rustls_server.get().is_some() {
            self.rustls_server()?;
        }
        if other.openssl_client.get().is_some() {
            self.openssl(true)?;
        }
        if other.openssl_server.get().is_some() {
            self.openssl(false)?;
        }
        Ok(())
    }

    fn engine_name(&self) -> &'static str {
        match self.settings.library {
            Library::Rustls => "rustls",
            Library::Openssl => "openssl",
        }
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loaded = self.loaded();
        let settings = &loaded.settings;
        let credentials = match &settings.credentials {
            OurCredentials::None => "none".to_owned(),
            OurCredentials::Certificate(c) => format!("a chain of {}", c.chain.len()),
            OurCredentials::Psk(psk) => format!("{} pre-shared keys", psk.identities.len()),
        };
        let suites: Vec<_> = settings.suites.iter().map(|s| s.iana).collect();
        f.debug_struct("TlsConfig")
            .field("engine", &loaded.engine_name())
            .field("credentials", &credentials)
            .field("verifier", &settings.verifier)
            .field("min_version", &settings.min_version.as_str())
            .field("max_version", &settings.max_version.as_str())
            .field("suites", &suites)
            .finish_non_exhaustive()
    }
}

/// Makes the part at its first use; a failure stays, as the options do not change.
fn once<T>(slot: &OnceLock<Result<T>>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    slot.get_or_init(make).as_ref().map_err(Clone::clone)
}
