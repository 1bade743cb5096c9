//! `wasi:tls` by Sapper's engines: which configuration a name gets, and the handshake.

use std::sync::Arc;
use std::time::Duration;

use sapper_net::tls::config::TlsConfig;
use sapper_net::tls::stream::TlsStream;
use sapper_net::tls::{Role, SharedTlsConfig};
use sapper_net::{Error, Result};
use wasmtime_wasi_tls::{Error as GuestError, TlsProvider, TlsTransport};

use crate::allow::{is_pattern, name_fits};
use crate::carrier::{Carrier, Cleartext, failed};

/// Configurations by the name of the server that a guest asks for: a guest shows a certificate to whom
/// it is meant for.
#[derive(Clone, Default)]
pub struct Configurations {
    /// Names (`db.example.org`, `*.example.org`, `*`) with their configuration; the first that fits.
    by_name: Vec<(String, SharedTlsConfig)>,
}

impl Configurations {
    /// The first pattern that fits a name is its configuration; a name that none fits is refused.
    pub fn new(by_name: Vec<(String, SharedTlsConfig)>) -> Result<Self> {
        for (pattern, _) in &by_name {
            if !is_pattern(pattern) {
                let why = format!("{pattern:?} is no name, no *.name, no address and no *");
                return Err(Error::config("tls", why));
            }
        }
        Ok(Self { by_name })
    }

    fn of(&self, server_name: &str) -> Option<&SharedTlsConfig> {
        let fits = |pattern: &str| pattern == server_name || name_fits(pattern, server_name);
        self.by_name.iter().find(|(pattern, _)| fits(pattern)).map(|(_, config)| config)
    }
}

/// What wasmtime asks for connections.
pub(crate) struct Engines {
    pub(crate) configurations: Configurations,
    pub(crate) handshake_timeout: Duration,
}

type Connecting =
    std::pin::Pin<Box<dyn Future<Output = Result<Box<dyn wasmtime_wasi_tls::TlsStream>, GuestError>> + Send>>;

impl TlsProvider for Engines {
    fn connect(&self, server_name: String, transport: Box<dyn TlsTransport>) -> Connecting {
        let config = self.configurations.of(&server_name).cloned();
        let within = self.handshake_timeout;
        Box::pin(async move {
            let config = config.ok_or_else(|| {
                GuestError::msg(format!("no TLS configuration of this host is meant for {server_name:?}"))
            })?;
            let stream = connect(config, server_name, transport, within).await?;
            Ok(Box::new(Cleartext::new(stream)) as Box<dyn wasmtime_wasi_tls::TlsStream>)
        })
    }
}

async fn connect(
    config: Arc<TlsConfig>,
    server_name: String,
    transport: Box<dyn TlsTransport>,
    within: Duration,
) -> Result<TlsStream, GuestError> {
    let role = Role::Client { server_name: Some(server_name) };
    config.check(&role).map_err(|error| match error.field() {
        Some("server_hostname") => GuestError::msg("invalid server name"),
        _ => failed(&error),
    })?;
    let carrier = Box::new(Carrier::new(transport));
    let shaking = TlsStream::handshake(carrier, &config, &role, &[]);
    match tokio::time::timeout(within, shaking).await {
        Ok(Ok((stream, _info))) => Ok(stream),
        Ok(Err(error)) => Err(failed(&error)),
        Err(_late) => Err(GuestError::msg(format!("the TLS handshake took longer than {within:?}"))),
    }
}
