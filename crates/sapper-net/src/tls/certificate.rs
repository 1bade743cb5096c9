//! What a certificate says of itself, for people and for other libraries. Never used to decide about trust.

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

use crate::error::{Error, Result};

/// A name: its parts in order, each a list of (attribute, value).
pub type Name = Vec<Vec<(String, String)>>;

/// What people want to know of a certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Whom it is for.
    pub subject: Name,
    /// Who signed it.
    pub issuer: Name,
    /// X.509 version: 1 to 3.
    pub version: u32,
    /// Upper-case hexadecimal digits, an even number of them.
    pub serial: String,
    /// Seconds since 1970.
    pub not_before: i64,
    /// Seconds since 1970.
    pub not_after: i64,
    /// Other names: kind (`DNS`, `IP Address`, `URI`, `email`) and value.
    pub alternative_names: Vec<(&'static str, String)>,
    /// Object identifier of the algorithm that it was signed with.
    pub signature_algorithm: String,
}

/// Reads a certificate in DER.
pub fn describe(der: &[u8]) -> Result<Description> {
    let wrong = |why: String| Error::config("certificate", format!("is no certificate: {why}"));
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| wrong(error.to_string()))?;
    let names = certificate.subject_alternative_name().map_err(|error| wrong(error.to_string()))?;
    let names = names.iter().flat_map(|extension| &extension.value.general_names);
    Ok(Description {
        subject: name(certificate.subject()),
        issuer: name(certificate.issuer()),
        version: certificate.version().0 + 1,
        serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect(),
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
        alternative_names: names.filter_map(alternative).collect(),
        signature_algorithm: certificate.signature_algorithm.algorithm.to_id_string(),
    })
}

fn name(name: &X509Name<'_>) -> Name {
    let attribute = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
        let oid = attribute.attr_type().to_id_string();
        let word = ATTRIBUTES.iter().find(|(known, _)| *known == oid).map(|(_, word)| (*word).to_owned());
        let value = attribute.as_str().map_or_else(
            |_| String::from_utf8_lossy(attribute.attr_value().data).into_owned(),
            str::to_owned,
        );
        (word.unwrap_or(oid), value)
    };
    name.iter_rdn().map(|part| part.iter().map(attribute).collect()).collect()
}

/// The names that OpenSSL gives them.
const ATTRIBUTES: [(&str, &str); 12] = [
    ("2.5.4.3", "commonName"),
    ("2.5.4.4", "surname"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "countryName"),
    ("2.5.4.7", "localityName"),
    ("2.5.4.8", "stateOrProvinceName"),
    ("2.5.4.9", "streetAddress"),
    ("2.5.4.10", "organizationName"),
    ("2.5.4.11", "organizationalUnitName"),
    ("2.5.4.12", "title"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
    ("0.9.2342.19200300.100.1.25", "domainComponent"),
];

fn alternative(name: &GeneralName<'_>) -> Option<(&'static str, String)> {
    match name {
        GeneralName::DNSName(name) => Some(("DNS", (*name).to_owned())),
        GeneralName::RFC822Name(name) => Some(("email", (*name).to_owned())),
        GeneralName::URI(name) => Some(("URI", (*name).to_owned())),
        GeneralName::IPAddress(bytes) => {
            let address = match bytes.len() {
                4 => std::net::IpAddr::from(<[u8; 4]>::try_from(*bytes).ok()?),
                16 => std::net::IpAddr::from(<[u8; 16]>::try_from(*bytes).ok()?),
                _ => return None,
            };
            Some(("IP Address", address.to_string()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::dev_cert::dev_certificates;

    #[test]
    fn a_certificate_is_described_and_garbage_is_refused() {
        let made =
            dev_certificates(&["localhost", "127.0.0.1"], std::time::Duration::from_secs(3600)).unwrap();
        let pem =
            x509_parser::pem::Pem::iter_from_buffer(made.server.chain.as_bytes()).next().unwrap().unwrap();
        let said = describe(&pem.contents).unwrap();
        assert_eq!(said.version, 3);
        assert_eq!(
            said.alternative_names,
            [("DNS", "localhost".to_owned()), ("IP Address", "127.0.0.1".to_owned())]
        );
        assert!(said.not_after - said.not_before >= 3600);
        assert!(!said.issuer.is_empty());
        assert_eq!(describe(b"garbage").unwrap_err().field(), Some("certificate"));
    }
}
