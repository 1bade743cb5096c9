//! OpenSSL's context, made from our settings: pre-shared keys, and the legacy modes that rustls
//! refuses on purpose.

use openssl::error::ErrorStack;
use openssl::ssl::{
    AlpnError, NameType, SniError, SslAlert, SslContext, SslContextBuilder, SslMethod, SslOptions,
    SslSessionCacheMode, SslVerifyMode, SslVersion, select_next_proto,
};
use openssl::x509::X509;
use rustls::pki_types::ServerName;

use super::openssl_ffi;
use super::options::{ClientAuth, TlsVersion};
use super::scene::{SessionSecrets, on_stage};
use super::settings::{OurCredentials, Settings};
use crate::error::{Error, ErrorKind, Result};

/// OpenSSL has rules of its own (key sizes at its security level, for one).
fn refused(field: &'static str) -> impl Fn(ErrorStack) -> Error {
    move |stack| Error::config(field, format!("OpenSSL does not take it: {}", reason(&stack)))
}

fn no_context(stack: ErrorStack) -> Error {
    Error::new(ErrorKind::ResourceLimit, format!("OpenSSL cannot make a context: {}", reason(&stack)))
}

fn reason(stack: &ErrorStack) -> &str {
    stack.errors().iter().find_map(openssl::error::Error::reason).unwrap_or("no reason given")
}

fn version(version: TlsVersion) -> SslVersion {
    match version {
        TlsVersion::V1_2 => SslVersion::TLS1_2,
        TlsVersion::V1_3 => SslVersion::TLS1_3,
    }
}

/// A context for one role.
pub(crate) fn context(settings: &Settings, is_client: bool) -> Result<SslContext> {
    let method = if is_client { SslMethod::tls_client() } else { SslMethod::tls_server() };
    let mut builder = SslContext::builder(method).map_err(no_context)?;
    if settings.security_level_0 {
        builder.set_security_level(0);
    }
    let mut options =
        SslOptions::NO_COMPRESSION | SslOptions::NO_TICKET | SslOptions::CIPHER_SERVER_PREFERENCE;
    if settings.legacy_renegotiation {
        options |= SslOptions::ALLOW_UNSAFE_LEGACY_RENEGOTIATION
            | SslOptions::from_bits_retain(openssl_sys::SSL_OP_LEGACY_SERVER_CONNECT);
    } else {
        options |= SslOptions::NO_RENEGOTIATION;
    }
    builder.set_options(options);
    // Nothing is resumed here: a pre-shared key is as cheap as a ticket, and the legacy modes are
    // better off without state that outlives them.
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    if !is_client {
        builder.set_num_tickets(0).map_err(no_context)?;
        set_name_check(&mut builder);
    }
    set_versions(&mut builder, settings, is_client)?;
    set_suites(&mut builder, settings)?;
    set_alpn(&mut builder, settings, is_client)?;
    match &settings.credentials {
        OurCredentials::Psk(_) => {
            set_psk(&mut builder, is_client);
            if is_client {
                // In TLS 1.3 a server may leave the key aside and show a certificate instead. There is
                // nobody who could vouch for it: the scene has no verifier, and it is refused.
                builder.set_verify(SslVerifyMode::PEER);
                openssl_ffi::set_verifier(&mut builder);
            }
        }
        OurCredentials::Certificate(own) => {
            builder.set_certificate(&own.chain[0]).map_err(refused("credentials.chain"))?;
            for above in &own.chain[1..] {
                builder.add_extra_chain_cert(above.clone()).map_err(refused("credentials.chain"))?;
            }
            builder.set_private_key(&own.key).map_err(refused("credentials.key"))?;
            set_verification(&mut builder, settings, is_client)?;
        }
        OurCredentials::None => set_verification(&mut builder, settings, is_client)?,
    }
    set_key_log(&mut builder, settings);
    openssl_ffi::set_alert_notes(&mut builder);
    Ok(builder.build())
}

fn set_versions(builder: &mut SslContextBuilder, settings: &Settings, is_client: bool) -> Result<()> {
    let mut max = settings.max_version;
    if let OurCredentials::Psk(psk) = &settings.credentials {
        // TLS 1.3 has no empty identity: whoever has only that one speaks TLS 1.2.
        if is_client && psk.identities.iter().all(|p| p.identity.is_empty()) {
            max = TlsVersion::V1_2;
        }
    }
    builder.set_min_proto_version(Some(version(settings.min_version))).map_err(refused("min_version"))?;
    builder.set_max_proto_version(Some(version(max))).map_err(refused("max_version"))
}

fn set_suites(builder: &mut SslContextBuilder, settings: &Settings) -> Result<()> {
    let list = |version| settings.suites_of(version).map(|s| s.openssl).collect::<Vec<_>>().join(":");
    let (old, new) = (list(TlsVersion::V1_2), list(TlsVersion::V1_3));
    if !old.is_empty() {
        builder.set_cipher_list(&old).map_err(refused("cipher_suites"))?;
    }
    if !new.is_empty() {
        builder.set_ciphersuites(&new).map_err(refused("cipher_suites"))?;
    }
    // The stars ask for a key share of the first two, so that a peer without the first does not cost
    // another round trip.
    let groups: Vec<_> = settings
        .groups
        .iter()
        .enumerate()
        .map(|(index, group)| format!("{}{}", if index < 2 { "*" } else { "" }, group.name))
        .collect();
    builder.set_groups_list(&groups.join(":")).map_err(refused("groups"))
}

fn set_alpn(builder: &mut SslContextBuilder, settings: &Settings, is_client: bool) -> Result<()> {
    if settings.alpn.is_empty() {
        return Ok(());
    }
    let mut wire = Vec::new();
    for protocol in &settings.alpn {
        wire.push(protocol.len() as u8);
        wire.extend_from_slice(protocol);
    }
    if is_client {
        return builder.set_alpn_protos(&wire).map_err(refused("alpn"));
    }
    builder.set_alpn_select_callback(move |_, offered| {
        let chosen = select_next_proto(&wire, offered).ok_or(AlpnError::ALERT_FATAL)?;
        // The choice must live as long as what was offered; both hold the same bytes.
        offered.windows(chosen.len()).find(|window| *window == chosen).ok_or(AlpnError::ALERT_FATAL)
    });
    Ok(())
}

/// The name that a client asks for goes into logs and PROXY headers. OpenSSL takes any bytes for one; as in
/// rustls a name is a DNS name, an address is none, and whatever else ends the handshake.
fn set_name_check(builder: &mut SslContextBuilder) {
    builder.set_servername_callback(|ssl, alert| {
        let Some(asked) = ssl.servername_raw(NameType::HOST_NAME) else { return Err(SniError::NOACK) };
        match ServerName::try_from(asked) {
            Ok(ServerName::DnsName(name)) => {
                on_stage(|scene| scene.server_name = Some(name.as_ref().to_ascii_lowercase()));
            }
            Ok(_) => {}
            Err(_) => {
                on_stage(|scene| scene.no_host_name = true);
                *alert = SslAlert::ILLEGAL_PARAMETER;
                return Err(SniError::ALERT_FATAL);
            }
        }
        // As without a call-back: the extension is not acknowledged.
        Err(SniError::NOACK)
    });
}

/// TLS 1.2 has call-backs of its own, which the openssl crate wraps; what they answer comes from the
/// connection's scene.
fn set_psk(builder: &mut SslContextBuilder, is_client: bool) {
    if is_client {
        builder.set_psk_client_callback(|_, _, identity, key| {
            let Some(Some(psk)) = on_stage(|scene| scene.psk.clone()) else { return Ok(0) };
            let Some(ours) = psk.identities.first() else { return Ok(0) };
            let (name, secret) = (&ours.identity[..], ours.key.expose());
            if name.len() >= identity.len() || secret.len() > key.len() {
                return Ok(0);
            }
            identity[..name.len()].copy_from_slice(name);
            identity[name.len()] = 0;
            key[..secret.len()].copy_from_slice(secret);
            Ok(secret.len())
        });
    } else {
        builder.set_psk_server_callback(|ssl, identity, key| {
            // In TLS 1.3 the session call-back has already answered.
            if ssl.version2() == Some(SslVersion::TLS1_3) {
                return Ok(0);
            }
            let Some(Some(psk)) = on_stage(|scene| scene.psk.clone()) else { return Ok(0) };
            let Some(secret) = openssl_ffi::find_identity(&psk, identity.unwrap_or_default()) else {
                return Ok(0);
            };
            if secret.len() > key.len() {
                return Ok(0);
            }
            key[..secret.len()].copy_from_slice(&secret);
            Ok(secret.len())
        });
    }
    openssl_ffi::set_psk_sessions(builder, !is_client);
}

fn set_verification(builder: &mut SslContextBuilder, settings: &Settings, is_client: bool) -> Result<()> {
    let mode = match settings.client_auth {
        _ if is_client => SslVerifyMode::PEER,
        ClientAuth::Off => return Ok(()),
        ClientAuth::Optional => SslVerifyMode::PEER,
        ClientAuth::Required => SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT,
    };
    builder.set_verify(mode);
    openssl_ffi::set_verifier(builder);
    if let (false, Some(roots)) = (is_client, &settings.own_roots) {
        for der in roots.certificates() {
            let certificate = X509::from_der(der).map_err(refused("roots"))?;
            builder.add_client_ca(&certificate).map_err(refused("roots"))?;
        }
    }
    Ok(())
}

/// Secrets reach the scene (for our record layer) and the user's key log.
fn set_key_log(builder: &mut SslContextBuilder, settings: &Settings) {
    let sink = settings.key_log.clone();
    builder.set_keylog_callback(move |_, line| {
        let mut words = line.split(' ');
        if let (Some(label), Some(random), Some(secret)) = (words.next(), words.next(), words.next())
            && SessionSecrets::wants(label)
            && let (Some(random), Some(secret)) = (unhex(random), unhex(secret))
        {
            on_stage(|scene| scene.secrets.keep(label, &random, &secret));
        }
        if let Some(sink) = &sink {
            sink.write(line);
        }
    });
}

fn unhex(text: &str) -> Option<zeroize::Zeroizing<Vec<u8>>> {
    let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(text.len() / 2));
    for pair in text.as_bytes().chunks(2) {
        bytes.push(u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?);
    }
    Some(bytes)
}
