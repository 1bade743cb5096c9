//! Throw-away certificates: an authority, a server and a client, for demonstrations and tests. Not
//! for production: the authority's key is not kept, and nothing can be revoked.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use super::options::Secret;
use crate::error::{Error, ErrorKind, Result};

/// Clocks of two machines differ; a certificate made now is valid since this long.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

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

    // Two authorities of one name would be taken for each other, and their signatures for forged ones.
    let mut mark = [0; 4];
    aws_lc_rs::rand::fill(&mut mark)
        .map_err(|_| Error::new(ErrorKind::ResourceLimit, "the system gives no random numbers"))?;
    let common_name = format!("sapper throw-away authority {:08x}", u32::from_be_bytes(mark));
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
