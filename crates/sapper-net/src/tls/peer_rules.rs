//! [`PeerRule`]: who is welcome among those whose certificate is good.
//!
//! Rules run within the handshake, after the chain was verified and before any application data. What
//! is not here: whether a certificate is good ([`super::verify`]).

use std::fmt::Write as _;
use std::net::IpAddr;
use std::str::FromStr;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::failure::{CertificateReason, Rejection};
use super::options::{ClientAuth, Roots, TlsOptions};
use super::verify::public_key_pin;
use crate::error::{Error, ErrorKind, Result};

/// Bits before an IPv4 address that IPv6 wraps (`::ffff:0:0/96`).
const MAPPED: u8 = 96;

/// How much of a refused peer's names an error repeats.
const SHOWN: usize = 300;

/// What one kind of welcome peer has. Each list that is not empty must have an entry that the peer's own
/// certificate fits; a peer is let in by any one rule of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerRule {
    /// DNS names of its subject alternative names; `*.` in front stands for any one label.
    pub dns: Vec<String>,
    /// URIs of its subject alternative names; `*` at the end stands for any rest.
    pub uri: Vec<String>,
    /// Mail addresses of its subject alternative names.
    pub email: Vec<String>,
    /// Networks that hold an address of its subject alternative names.
    pub ip: Vec<IpRange>,
    /// Common names of its subject.
    pub cn: Vec<String>,
    /// Organizational units of its subject.
    pub ou: Vec<String>,
    /// SHA-256 of its public key (SubjectPublicKeyInfo).
    pub pin: Vec<[u8; 32]>,
}

/// An address, or the network that it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpRange {
    address: IpAddr,
    prefix: u8,
}

impl FromStr for IpRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::config("ip", format!("{text:?} is no IP address and no network (10.0.0.0/8)"));
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix: u8 = prefix.map_or(Ok(longest), |p| p.parse().map_err(|_| wrong()))?;
        if prefix > longest {
            return Err(wrong());
        }
        // An IPv4 address is one, also where IPv6 wraps it.
        Ok(match (address.to_canonical(), prefix.checked_sub(MAPPED)) {
            (four @ IpAddr::V4(_), Some(prefix)) if address.is_ipv6() => Self { address: four, prefix },
            _ => Self { address, prefix },
        })
    }
}

impl IpRange {
    /// Whether the address lies in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(a) => (u128::from(a.to_bits()) << 96, true),
            IpAddr::V6(a) => (a.to_bits(), false),
        };
        let ((ours, four), (theirs, also_four)) = (bits(self.address), bits(address.to_canonical()));
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
        four == also_four && (ours ^ theirs) & mask == 0
    }
}

impl PeerRule {
    /// A rule without any list would let everybody in.
    fn is_empty(&self) -> bool {
        self.dns.is_empty()
            && self.uri.is_empty()
            && self.email.is_empty()
            && self.ip.is_empty()
            && self.cn.is_empty()
            && self.ou.is_empty()
            && self.pin.is_empty()
    }

    fn check(&self) -> Result<()> {
        if self.is_empty() {
            return Err(Error::new(ErrorKind::Config, "a rule without any list would let everybody in"));
        }
        for (index, name) in self.dns.iter().enumerate() {
            let bare = name.strip_prefix("*.").unwrap_or(name);
            if bare.is_empty() || bare.contains('*') {
                let text = format!("{name:?}: a * stands alone and in front: \"*.example.com\"");
                return Err(Error::config(format!("dns.{index}"), text));
            }
            if let Some(why) = no_dns_name(bare) {
                let text = format!("{name:?} fits no certificate: {why}");
                return Err(Error::config(format!("dns.{index}"), text));
            }
        }
        for (index, email) in self.email.iter().enumerate() {
            let parts = email.rsplit_once('@').filter(|(who, domain)| !who.is_empty() && !domain.is_empty());
            let why = match parts {
                None if email.is_empty() => continue,
                None => "a mail address is name@domain",
                Some(_) if email.contains('*') => "a * stands for nothing in a mail address",
                Some(_) => continue,
            };
            let text = format!("{email:?} fits no certificate: {why}");
            return Err(Error::config(format!("email.{index}"), text));
        }
        for (index, uri) in self.uri.iter().enumerate() {
            if uri == "*" || uri.find('*').is_some_and(|at| at + 1 != uri.len()) {
                let text = format!("{uri:?}: a * stands at the end, for any rest");
                return Err(Error::config(format!("uri.{index}"), text));
            }
        }
        let lists = [
            ("dns", &self.dns),
            ("uri", &self.uri),
            ("email", &self.email),
            ("cn", &self.cn),
            ("ou", &self.ou),
        ];
        for (name, list) in lists {
            if let Some(index) = list.iter().position(String::is_empty) {
                return Err(Error::config(format!("{name}.{index}"), "is empty"));
            }
        }
        Ok(())
    }

    fn fits(&self, names: &Names<'_>) -> bool {
        let any = |rules: &[String], found: &[&str], fits: fn(&str, &str) -> bool| {
            rules.is_empty() || rules.iter().any(|rule| found.iter().any(|name| fits(rule, name)))
        };
        any(&self.dns, &names.dns, dns_fits)
            && any(&self.uri, &names.uri, uri_fits)
            && any(&self.email, &names.email, email_fits)
            && any(&self.cn, &names.cn, |rule, name| rule == name)
            && any(&self.ou, &names.ou, |rule, name| rule == name)
            && (self.ip.is_empty() || names.ip.iter().any(|&a| self.ip.iter().any(|range| range.contains(a))))
            && (self.pin.is_empty() || names.pin.is_some_and(|pin| self.pin.contains(&pin)))
    }
}

/// Why no certificate has this DNS name.
fn no_dns_name(name: &str) -> Option<&'static str> {
    if name.parse::<IpAddr>().is_ok() {
        return Some("addresses go by `ip`");
    }
    if name.ends_with('.') {
        return Some("names in certificates have no dot at the end");
    }
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let is_label = |label: &str| (1..=63).contains(&label.len()) && label.bytes().all(fits);
    (name.len() > 253 || !name.split('.').all(is_label)).then_some("it is no DNS name")
}

fn dns_fits(rule: &str, name: &str) -> bool {
    if rule.eq_ignore_ascii_case(name) {
        return true;
    }
    let (Some(suffix), Some((label, rest))) = (rule.strip_prefix("*."), name.split_once('.')) else {
        return false;
    };
    !label.is_empty() && suffix.eq_ignore_ascii_case(rest)
}

fn uri_fits(rule: &str, name: &str) -> bool {
    match rule.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => rule == name,
    }
}

/// The part before the @ is compared as it is, the domain without regard to case (RFC 5280, 4.2.1.6).
fn email_fits(rule: &str, name: &str) -> bool {
    match (rule.rsplit_once('@'), name.rsplit_once('@')) {
        (Some((who, domain)), Some((name, at))) => who == name && domain.eq_ignore_ascii_case(at),
        _ => false,
    }
}

/// All rules of a configuration.
#[derive(Debug, Default)]
pub(crate) struct PeerRules(Vec<PeerRule>);

/// Rules are asked about a certificate: a client that need not show one would get past them.
pub(super) fn check_asked(rules: bool, client_auth: ClientAuth) -> Result<()> {
    let text = match client_auth {
        ClientAuth::Required => return Ok(()),
        _ if !rules => return Ok(()),
        ClientAuth::Off => {
            "no client is asked for its certificate, so everybody would get in: give roots (or pins), and \
             client_auth = \"required\" or leave it away"
        }
        ClientAuth::Optional => {
            "with client_auth = \"optional\" whoever shows no certificate would get in: it must be \
             \"required\", or leave it away"
        }
    };
    let error = Error::config("peer_rules", text);
    // Where clients are asked, the rules have a use, only not with all.
    Err(if client_auth == ClientAuth::Off { error.with_reason("unused") } else { error })
}

impl PeerRules {
    /// Those of a configuration.
    pub(super) fn load(options: &TlsOptions) -> Result<Self> {
        let rules = Self::new(&options.peer_rules)?;
        if !rules.is_empty() && options.roots == Roots::DangerNone && options.pins.is_empty() {
            let text = "names in a certificate that nobody has checked say nothing: give roots or pins";
            return Err(Error::config("peer_rules", text).with_reason("unused"));
        }
        Ok(rules)
    }

    pub(crate) fn new(rules: &[PeerRule]) -> Result<Self> {
        for (index, rule) in rules.iter().enumerate() {
            rule.check().map_err(|error| match error.field() {
                None => Error::config(format!("peer_rules.{index}"), error.message()),
                Some(_) => error.of_table(format_args!("peer_rules.{index}")),
            })?;
        }
        Ok(Self(rules.to_vec()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the owner of this certificate (DER) is welcome.
    pub(crate) fn check(&self, certificate: &[u8]) -> Result<(), Rejection> {
        if self.0.is_empty() {
            return Ok(());
        }
        let malformed =
            || Rejection::new(CertificateReason::Malformed, "the peer's certificate cannot be read");
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| malformed())?;
        let names = Names::of(&parsed, public_key_pin(certificate).ok())?;
        if self.0.iter().any(|rule| rule.fits(&names)) {
            return Ok(());
        }
        let message = format!("the peer's certificate is good, but no peer rule fits it: {}", names.shown());
        Err(Rejection::new(CertificateReason::NotAllowed, message))
    }
}

/// What a certificate says of its owner.
#[derive(Default)]
struct Names<'a> {
    dns: Vec<&'a str>,
    uri: Vec<&'a str>,
    email: Vec<&'a str>,
    ip: Vec<IpAddr>,
    cn: Vec<&'a str>,
    ou: Vec<&'a str>,
    pin: Option<[u8; 32]>,
}

impl<'a> Names<'a> {
    fn of(certificate: &'a X509Certificate<'_>, pin: Option<[u8; 32]>) -> Result<Self, Rejection> {
        let mut names = Self { pin, ..Self::default() };
        let subject = certificate.subject();
        names.cn.extend(subject.iter_common_name().filter_map(|name| name.as_str().ok()));
        names.ou.extend(subject.iter_organizational_unit().filter_map(|name| name.as_str().ok()));
        let alternatives = certificate.subject_alternative_name().map_err(|_| {
            Rejection::new(CertificateReason::Malformed, "the names in the peer's certificate cannot be read")
        })?;
        for name in alternatives.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(name) => names.dns.push(name),
                GeneralName::URI(name) => names.uri.push(name),
                GeneralName::RFC822Name(name) => names.email.push(name),
                GeneralName::IPAddress(bytes) => {
                    let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                    let six = <[u8; 16]>::try_from(*bytes).map(IpAddr::from);
                    names.ip.extend(four.or(six));
                }
                _ => {}
            }
        }
        Ok(names)
    }

    /// For an error message. What a stranger wrote is escaped and cut.
    fn shown(&self) -> String {
        let mut text = String::new();
        for (what, list) in [
            ("cn", &self.cn),
            ("ou", &self.ou),
            ("dns", &self.dns),
            ("uri", &self.uri),
            ("email", &self.email),
        ] {
            for name in list {
                let _ = write!(text, "{what} {name:?}, ");
            }
        }
        for address in &self.ip {
            let _ = write!(text, "ip {address}, ");
        }
        text.truncate(text.floor_char_boundary(SHOWN));
        let pin = self.pin.map_or_else(String::new, |pin| {
            pin.iter().fold("pin ".to_owned(), |mut text, byte| {
                let _ = write!(text, "{byte:02x}");
                text
            })
        });
        text + &pin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_as_people_expect() {
        for (rule, name, fits) in [
            ("a.example", "A.Example", true),
            ("*.example", "a.example", true),
            ("*.example", "a.b.example", false),
            ("*.example", "example", false),
            ("*.example", ".example", false),
            ("a.example", "*.example", false),
            ("example", "a.example", false),
        ] {
            assert_eq!(dns_fits(rule, name), fits, "{rule} {name}");
        }
        assert!(uri_fits("spiffe://a/ns/*", "spiffe://a/ns/x"));
        assert!(!uri_fits("spiffe://a/ns/*", "spiffe://a/other"));
        assert!(!uri_fits("spiffe://a", "spiffe://a/b"));
        assert!(email_fits("me@Example.com", "me@example.COM"));
        assert!(!email_fits("Me@example.com", "me@example.com"));
        assert!(!email_fits("example.com", "example.com"));
    }

    #[test]
    fn ranges_hold_their_addresses_only() {
        for (range, address, inside) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "10.1.2.4", false),
            ("0.0.0.0/0", "192.0.2.1", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "::1", true),
            ("2001:db8::/32", "2001:db8:ffff::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("::ffff:10.0.0.1", "10.0.0.1", true),
            ("::ffff:10.0.0.0/104", "10.255.0.1", true),
            ("::ffff:10.0.0.0/104", "11.0.0.1", false),
            ("10.0.0.0/8", "::ffff:10.0.0.1", true),
            ("::ffff:0:0/95", "2001:db8::1", false),
        ] {
            let range: IpRange = range.parse().unwrap();
            assert_eq!(range.contains(address.parse().unwrap()), inside, "{range:?} {address}");
        }
        for wrong in ["", "10.0.0.0/33", "10.0.0", "::/129", "10.0.0.0/x", "a/8"] {
            assert_eq!(wrong.parse::<IpRange>().unwrap_err().field(), Some("ip"), "{wrong}");
        }
    }

    #[test]
    fn rules_that_mean_nothing_are_refused() {
        let dns = |name: &str| PeerRule { dns: vec![name.to_owned()], ..PeerRule::default() };
        let uri = |name: &str| PeerRule { uri: vec![name.to_owned()], ..PeerRule::default() };
        let email = |name: &str| PeerRule { email: vec![name.to_owned()], ..PeerRule::default() };
        let long = ["a"; 128].join(".");
        for name in ["a_b.test", "*.a.test", "xn--bcher-kva.example", "localhost", &long[..253]] {
            PeerRules::new(&[dns(name)]).unwrap();
        }
        PeerRules::new(&[email("a@b"), email("\"a@b\"@c.test")]).unwrap();
        for rule in [
            PeerRule::default(),
            dns("*"),
            dns("a.*.b"),
            dns("*."),
            dns(""),
            dns("a.test."),
            dns("a b"),
            dns("a..b"),
            dns("10.0.0.1"),
            dns("::1"),
            dns("b\u{fc}cher.example"),
            dns(&long),
            uri("*"),
            uri("a*b"),
            email("nodomain"),
            email("@a.test"),
            email("a@"),
            email("*@a.test"),
        ] {
            let error = PeerRules::new(&[rule]).unwrap_err();
            assert!(error.field().unwrap().starts_with("peer_rules.0"), "{error:?}");
        }
    }
}
