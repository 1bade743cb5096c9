//! Certificates for development: an authority that a developer keeps ([`DevAuthority`]), and throw-away
//! ones for demonstrations and tests ([`dev_certificates`]). Not for production: nothing can be revoked.
//!
//! What is not here: files and where they are; that is the command line's.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use openssl::asn1::Asn1Time;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::X509;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::DnsName;

use super::options::Secret;
use crate::error::{Error, ErrorKind, Result};

/// Clocks of two machines differ; a certificate made now is valid since this long.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

/// What the name of a kept authority begins with: no other authority's files are taken for one.
const KEPT_AUTHORITY: &str = "Sapper development authority ";
/// The longest common name (RFC 5280, appendix A.1).
const LONGEST_COMMON_NAME: usize = 64;

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub struct DevIdentity {
    /// The certificate with its authority's behind it.
    pub chain: String,
    /// The key (PKCS#8).
    pub key: Secret,
}

/// What [`dev_certificates`] makes.
#[derive(Clone)]
pub struct DevCertificates {
    /// The authority's certificate, in PEM: the roots of the other side.
    pub authority: String,
    /// For a server of the names that were asked for.
    pub server: DevIdentity,
    /// For a client.
    pub client: DevIdentity,
}

impl fmt::Debug for DevCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DevCertificates")
    }
}

/// Makes an authority and one certificate for each role. `names` are DNS names and IP addresses.
pub fn dev_certificates(names: &[&str], valid: Duration) -> Result<DevCertificates> {
    let failed = |e: rcgen::Error| Error::config("names", format!("no certificate can be made: {e}"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    let (from, to) = (epoch + now.saturating_sub(CLOCK_SKEW), epoch + now + valid);
    let params = |names: Vec<String>, common_name: &str| -> Result<CertificateParams> {
        let mut params = CertificateParams::new(names).map_err(failed)?;
        params.not_before = from;
        params.not_after = to;
        params.distinguished_name.push(DnType::CommonName, common_name);
        Ok(params)
    };
    if names.is_empty() {
        return Err(Error::new(ErrorKind::Config, "a server's certificate needs a name").with_field("names"));
    }

    let common_name = format!("sapper throw-away authority {}", mark()?);
    let mut authority = params(Vec::new(), &common_name)?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority =
        CertifiedIssuer::self_signed(authority, KeyPair::generate().map_err(failed)?).map_err(failed)?;

    let issue = |mut params: CertificateParams, purpose| -> Result<DevIdentity> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &authority).map_err(failed)?;
        Ok(DevIdentity { chain: certificate.pem() + &authority.pem(), key: Secret::new(key.serialize_pem()) })
    };
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    let server = issue(params(names, "sapper throw-away server")?, ExtendedKeyUsagePurpose::ServerAuth)?;
    let client = issue(params(Vec::new(), "sapper throw-away client")?, ExtendedKeyUsagePurpose::ClientAuth)?;
    Ok(DevCertificates { authority: authority.pem(), server, client })
}

/// Two authorities of one name would be taken for each other, and their signatures for forged ones.
fn mark() -> Result<String> {
    let mut mark = [0; 4];
    aws_lc_rs::rand::fill(&mut mark)
        .map_err(|_| Error::new(ErrorKind::ResourceLimit, "the system gives no random numbers"))?;
    Ok(format!("{:08x}", u32::from_be_bytes(mark)))
}

/// An authority that a developer keeps, and that signs the certificates of the machine's services.
pub struct DevAuthority {
    /// Its certificate, in PEM.
    pub certificate: String,
    /// Its key (PKCS#8, PEM).
    pub key: Secret,
}

impl fmt::Debug for DevAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DevAuthority")
    }
}

/// What [`DevAuthority::issue`] makes.
#[derive(Debug)]
pub struct DevIssued {
    /// The certificate with its authority's behind it, and its key.
    pub identity: DevIdentity,
    /// The names in it.
    pub names: Vec<String>,
    /// When it ends: seconds since the epoch.
    pub expires: u64,
}

impl DevAuthority {
    /// Makes one.
    pub fn make(valid: Duration) -> Result<Self> {
        let common_name = format!("{KEPT_AUTHORITY}{}", mark()?);
        let mut params = kept_params(&common_name, valid)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(|e| no_authority(&e))?;
        let certificate = params.self_signed(&key).map_err(|e| no_authority(&e))?;
        Ok(Self { certificate: certificate.pem(), key: Secret::new(key.serialize_pem()) })
    }

    /// One that was made before, from its files; an error has the field `ca_dir`.
    pub fn read(certificate: &[u8], key: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::config("ca_dir", what);
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).map(str::to_owned).ok();
        let this = Self {
            certificate: text(certificate).ok_or_else(|| wrong("its certificate is no PEM text"))?,
            key: Secret::new(key),
        };
        let (x509, _) = this.parsed()?;
        // Ours is not encrypted; for another's, OpenSSL would ask for the password on the terminal.
        let own = PKey::private_key_from_pem_callback(key, |_| Ok(0))
            .map_err(|_| wrong("its key cannot be read"))?;
        if !x509.public_key().is_ok_and(|public| public.public_eq(&own)) {
            return Err(wrong("its key does not belong to its certificate"));
        }
        Ok(this)
    }

    /// A certificate for a server, or a client, of these names and addresses.
    pub fn issue(&self, names: &[String], valid: Duration) -> Result<DevIssued> {
        let (x509, common_name) = self.parsed()?;
        let left = Asn1Time::days_from_now(0).and_then(|now| now.diff(x509.not_after()));
        let left = left.map_err(|_| Error::config("ca_dir", "its certificate has no end"))?;
        let left = i64::from(left.days) * 86_400 + i64::from(left.secs);
        let left = Duration::from_secs(u64::try_from(left).unwrap_or(0));
        if left.is_zero() {
            return Err(Error::config("ca_dir", "the authority has expired: make a new one"));
        }
        let (params, names) = leaf_params(names, valid.min(left))?;
        let key_text = std::str::from_utf8(self.key.expose()).unwrap_or_default();
        let authority_key = KeyPair::from_pem(key_text).map_err(|e| no_authority(&e))?;
        // Its name and the hash of its key are all that a certificate says of who signed it.
        let authority = kept_params(&common_name, left)?;
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().map_err(|e| no_authority(&e))?;
        let certificate = params.signed_by(&key, &issuer).map_err(|e| no_authority(&e))?;
        let identity = DevIdentity {
            chain: certificate.pem() + &self.certificate,
            key: Secret::new(key.serialize_pem()),
        };
        let expires = u64::try_from(params.not_after.unix_timestamp()).unwrap_or(0);
        Ok(DevIssued { identity, names, expires })
    }

    /// Its certificate, and its name, which must be one of ours.
    fn parsed(&self) -> Result<(X509, String)> {
        let wrong = |what: &str| Error::config("ca_dir", what);
        let x509 = X509::from_pem(self.certificate.as_bytes())
            .map_err(|_| wrong("its certificate cannot be read"))?;
        let name = {
            let mut entries = x509.subject_name().entries();
            match (entries.next(), entries.next()) {
                (Some(only), None) if only.object().nid() == Nid::COMMONNAME => {
                    only.data().to_string().unwrap_or_default()
                }
                _ => String::new(),
            }
        };
        if !name.starts_with(KEPT_AUTHORITY) {
            return Err(wrong("this authority was not made here: it is not used to sign anything"));
        }
        Ok((x509, name))
    }
}

fn no_authority(error: &rcgen::Error) -> Error {
    Error::config("names", format!("no certificate can be made: {error}"))
}

/// Parameters of a certificate of this common name, from an hour ago on.
fn kept_params(common_name: &str, valid: Duration) -> Result<CertificateParams> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    let end = now + valid;
    // Years have four digits in a certificate.
    if end.as_secs() > 253_402_300_799 {
        return Err(Error::config("valid", "a certificate ends before the year 10000"));
    }
    let mut params = CertificateParams::default();
    params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + end;
    params.distinguished_name = DistinguishedName::new();
    if !common_name.is_empty() && common_name.len() <= LONGEST_COMMON_NAME {
        params.distinguished_name.push(DnType::CommonName, common_name);
    }
    Ok(params)
}

fn leaf_params(names: &[String], valid: Duration) -> Result<(CertificateParams, Vec<String>)> {
    let mut kept: Vec<String> = Vec::new();
    let mut alternatives = Vec::new();
    for name in names {
        let wrong = || Error::config("names", format!("{name:?} is neither a DNS name nor an IP address"));
        let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
        let (text, alternative) = match bare.parse::<IpAddr>() {
            Ok(address) => (address.to_string(), SanType::IpAddress(address)),
            Err(_) => {
                let text = name.to_ascii_lowercase();
                let host = text.strip_prefix("*.").unwrap_or(&text);
                DnsName::try_from(host).map_err(|_| wrong())?;
                let value = text.as_str().try_into().map_err(|_| wrong())?;
                (text, SanType::DnsName(value))
            }
        };
        if !kept.contains(&text) {
            kept.push(text);
            alternatives.push(alternative);
        }
    }
    let Some(first) = kept.first() else {
        return Err(Error::config("names", "a certificate needs a name"));
    };
    let mut params = kept_params(first, valid)?;
    params.subject_alt_names = alternatives;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Both, so that mutual TLS can be tried with it.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok((params, kept))
}
