//! Whom a guest may connect to: names and networks with ports, and nobody else.
//!
//! A guest asks for the addresses of a name, then connects to one of them. So a rule with a name allows
//! the look-up, and what the look-up answered is allowed on the ports of that rule from then on
//! ([`Learned`]). Looking up a name that no rule has is refused, before anything is asked.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};

use sapper_net::tls::options::IpRange;
use sapper_net::{Error, Result};

/// One entry of `allow_net`: `db.example.org:5432`, `*.example.org:443`, `10.0.0.0/8:*`, `[::1]:8000-8010`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    host: Host,
    ports: Ports,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    /// In lower case, without a dot at the end.
    Name(String),
    /// What stands behind `*.`: any one or more labels in front of it.
    Below(String),
    Range(IpRange),
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| Error::config("allow_net", format!("{text:?} {why}"));
        let (host, ports) = text
            .rsplit_once(':')
            .filter(|(host, _)| !host.is_empty())
            .ok_or_else(|| wrong("is not HOST:PORT; HOST:* allows every port"))?;
        let ports = match ports.split_once('-') {
            _ if ports == "*" => Some((1, u16::MAX)),
            Some((first, last)) => port(first).zip(port(last)),
            None => port(ports).map(|one| (one, one)),
        };
        let ports = ports
            .filter(|(first, last)| first <= last)
            .ok_or_else(|| wrong("has no port, range of ports or * behind its last colon"))?;
        let bracketed = host.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let host = match bracketed {
            Some((address, rest)) => Host::Range(range(&format!("{address}{rest}"), &wrong)?),
            None if host.contains(':') => return Err(wrong("has an IPv6 address without brackets")),
            None if host.contains('/') || host.parse::<IpAddr>().is_ok() => Host::Range(range(host, &wrong)?),
            None => match host.strip_prefix("*.") {
                Some(rest) => Host::Below(name(rest).ok_or_else(|| wrong("has no name behind *."))?),
                None => Host::Name(name(host).ok_or_else(|| wrong("is no name and no address"))?),
            },
        };
        Ok(Self { host, ports })
    }
}

fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port > 0)
}

fn range(text: &str, wrong: &dyn Fn(&str) -> Error) -> Result<IpRange> {
    text.parse().map_err(|_| wrong("is no IP address and no network (10.0.0.0/8:443)"))
}

/// A host name in the form in which names are compared.
fn name(text: &str) -> Option<String> {
    let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let ok = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let label = |label: &str| !label.is_empty() && label.len() <= 63 && label.chars().all(ok);
    (text.len() <= 253 && text.split('.').all(label)).then_some(text)
}

/// A pattern of names: an exact one, `*.` and a name, or `*`.
pub(crate) fn name_fits(pattern: &str, wanted: &str) -> bool {
    let Some(wanted) = name(wanted) else { return pattern == "*" };
    match pattern.strip_prefix("*.") {
        Some(rest) => name(rest).is_some_and(|rest| is_below(&wanted, &rest)),
        None => pattern == "*" || name(pattern).is_some_and(|pattern| pattern == wanted),
    }
}

/// Whether it is such a pattern, or an address, which fits itself.
pub(crate) fn is_pattern(text: &str) -> bool {
    text == "*" || text.parse::<IpAddr>().is_ok() || name(text.strip_prefix("*.").unwrap_or(text)).is_some()
}

fn is_below(wanted: &str, rest: &str) -> bool {
    wanted.strip_suffix(rest).is_some_and(|front| front.len() > 1 && front.ends_with('.'))
}

/// The ports (first and last) that a look-up made an address good for.
type Learned = HashMap<IpAddr, Vec<Ports>>;

/// A range of ports: first and last.
pub(crate) type Ports = (u16, u16);

/// The rules of a run, with the addresses that look-ups answered meanwhile.
#[derive(Clone, Default)]
pub(crate) struct Policy {
    rules: Arc<[Rule]>,
    /// Bounded: an answer of the resolver is, and a guest that looks up more than this is refused.
    learned: Arc<Mutex<Learned>>,
}

/// Addresses that one run may learn. Each is a few dozen bytes.
const MOST_LEARNED: usize = 4096;

impl Policy {
    pub(crate) fn new(rules: Vec<Rule>) -> Self {
        Self { rules: rules.into(), learned: Arc::default() }
    }

    /// Whether there is anything to connect to at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    fn learned(&self) -> MutexGuard<'_, Learned> {
        self.learned.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The ports of the rules that name this name; none of them is no.
    pub(crate) fn ports_of(&self, wanted: &str) -> Vec<Ports> {
        let Some(wanted) = name(wanted) else { return Vec::new() };
        let fits = |rule: &&Rule| match &rule.host {
            Host::Name(name) => *name == wanted,
            Host::Below(rest) => is_below(&wanted, rest),
            Host::Range(_) => false,
        };
        self.rules.iter().filter(fits).map(|rule| rule.ports).collect()
    }

    /// A look-up of a name with these ports answered this address. Whether there was room to note it.
    pub(crate) fn learn(&self, address: IpAddr, ports: &[Ports]) -> bool {
        let mut learned = self.learned();
        if learned.len() >= MOST_LEARNED && !learned.contains_key(&address) {
            return false;
        }
        let known = learned.entry(address).or_default();
        for ports in ports {
            if !known.contains(ports) {
                known.push(*ports);
            }
        }
        true
    }

    /// Whether a connection may go there.
    pub(crate) fn allows(&self, to: SocketAddr) -> bool {
        let address = to.ip().to_canonical();
        let fits = |ports: &Ports| (ports.0..=ports.1).contains(&to.port());
        let by_rule = |rule: &Rule| {
            let range = matches!(&rule.host, Host::Range(range) if range.contains(address));
            range && fits(&rule.ports)
        };
        self.rules.iter().any(by_rule)
            || self.learned().get(&address).is_some_and(|known| known.iter().any(fits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        Policy::new(rules.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn allows(policy: &Policy, to: &str) -> bool {
        policy.allows(to.parse().unwrap())
    }

    #[test]
    fn nothing_is_allowed_without_a_rule() {
        let none = policy(&[]);
        assert!(none.is_empty());
        assert!(!allows(&none, "127.0.0.1:80"));
        assert_eq!(none.ports_of("localhost"), []);
    }

    #[test]
    fn addresses_and_networks_have_ports() {
        let some = policy(&["10.0.0.0/8:443", "[2001:db8::/32]:8000-8010", "[::1]:*", "192.0.2.7:22"]);
        for (to, allowed) in [
            ("10.1.2.3:443", true),
            ("10.1.2.3:444", false),
            ("11.1.2.3:443", false),
            ("[::ffff:10.1.2.3]:443", true),
            ("[2001:db8::5]:8010", true),
            ("[2001:db8::5]:8011", false),
            ("[2001:db9::5]:8010", false),
            ("[::1]:1", true),
            ("192.0.2.7:22", true),
            ("192.0.2.8:22", false),
        ] {
            assert_eq!(allows(&some, to), allowed, "{to}");
        }
    }

    #[test]
    fn a_name_allows_what_its_look_up_answered_on_its_ports_alone() {
        let some = policy(&["DB.example.org.:5432", "*.example.org:443"]);
        let ports = some.ports_of("db.Example.org");
        assert_eq!(ports, [(5432, 5432), (443, 443)]);
        assert_eq!(some.ports_of("example.org"), []);
        assert_eq!(some.ports_of("notexample.org"), []);
        assert_eq!(some.ports_of("a.b.example.org."), [(443, 443)]);
        assert!(!allows(&some, "192.0.2.1:443"), "nothing was looked up");
        assert!(some.learn("192.0.2.1".parse().unwrap(), &some.ports_of("www.example.org")));
        assert!(allows(&some, "192.0.2.1:443"));
        assert!(!allows(&some, "192.0.2.1:5432"), "of another name");
        assert!(some.learn("192.0.2.1".parse().unwrap(), &ports));
        assert!(allows(&some, "192.0.2.1:5432"));
    }

    #[test]
    fn what_is_learned_is_bounded() {
        let some = policy(&["*.example.org:1"]);
        for n in 0..MOST_LEARNED as u32 {
            assert!(some.learn(IpAddr::V4(n.into()), &[(1, 1)]));
        }
        assert!(!some.learn("2001:db8::1".parse().unwrap(), &[(1, 1)]));
        assert!(some.learn(IpAddr::V4(0.into()), &[(2, 2)]), "a known one has room");
    }

    #[test]
    fn mistakes_are_named() {
        for text in [
            "",
            "example.org",
            ":443",
            "example.org:",
            "example.org:0",
            "example.org:65536",
            "example.org:5-4",
            "::1:443",
            "[::1:443",
            "10.0.0.0/33:1",
            "exa mple.org:443",
            "*.:443",
            "a..b:443",
            "*:443",
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert_eq!(error.field(), Some("allow_net"), "{text}");
            assert!(error.message().contains(&format!("{text:?}")), "{text}");
        }
    }

    #[test]
    fn patterns_of_names() {
        assert!(name_fits("*", "anything"));
        assert!(name_fits("*", "10.0.0.1"));
        assert!(name_fits("Db.Internal", "db.internal."));
        assert!(name_fits("*.internal", "a.db.internal"));
        assert!(!name_fits("*.internal", "internal"));
        assert!(!name_fits("*.internal", "no name"));
        assert!(!name_fits("db.internal", "db2.internal"));
    }
}
