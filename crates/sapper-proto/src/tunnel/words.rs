//! What two ends of our own kind say to each other above the streams, in the application part of their
//! hellos: which services a client exposes and where it would like them, and what the server gave it.
//!
//! JSON, so that what a newer end adds is skipped. What a stranger says is believed only where it has its
//! form: a list of services that has not is refused as a whole, with a sentence that says where.
//!
//! What is not here: which ports a server allows ([`lease`](super::lease) and the server's options).

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::w3p::{Refusal, read_refusal, refusal_value};
use crate::shown;

/// Services that a client can name. A server allows as many as it likes below that.
pub const MOST_SERVICES: usize = 256;
/// The longest name of a service, in bytes.
pub const LONGEST_NAME: usize = 128;
/// The longest name of an instance or a lease that a server takes.
pub const LONGEST_LEASE: usize = 256;
/// The longest name of a host.
const LONGEST_HOST: usize = 253;

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientWords {
    /// Which client process: a connection of the same one is stale.
    pub instance: String,
    /// What it is beyond its process: its machine and its services. Who is started again is of the same one.
    pub origin: String,
    /// Whose public ports it wants, whatever its credentials are.
    pub lease: Option<String>,
    /// What it exposes, at least one. A stream's `open` names one by its place in this list.
    pub services: Vec<Asked>,
}

impl Default for ClientWords {
    fn default() -> Self {
        Self { instance: String::new(), origin: String::new(), lease: None, services: vec![Asked::default()] }
    }
}

/// A service, and the public port that its client would like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Whose port it is among the client's services. The one without a name has the port of the client itself.
    pub name: String,
    /// First and last port that will do, twice the same for that one; none for any.
    pub ports: Option<(u16, u16)>,
    /// Where its public port should listen, where that is not the server's usual place.
    pub host: Option<IpAddr>,
}

/// What is wrong with a client's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("services{place}: {what}")]
pub struct WordsError {
    place: String,
    what: &'static str,
}

impl ClientWords {
    /// As a hello carries it.
    pub fn encode(&self) -> Vec<u8> {
        let services: Vec<Value> = self.services.iter().map(Asked::value).collect();
        json!({"instance": self.instance, "lease": self.lease, "origin": self.origin, "services": services})
            .to_string()
            .into_bytes()
    }

    /// Reads a hello's. Without a list of services there is one without a name.
    pub fn parse(bytes: &[u8]) -> Result<Self, WordsError> {
        let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
        let word = |key: &str| value[key].as_str().filter(|word| is_lease(word)).map(str::to_owned);
        let mut words = Self {
            instance: word("instance").unwrap_or_default(),
            origin: word("origin").unwrap_or_default(),
            lease: word("lease"),
            ..Self::default()
        };
        if let Some(services) = value.get("services") {
            words.services = asked(services)?;
        }
        Ok(words)
    }
}

fn asked(services: &Value) -> Result<Vec<Asked>, WordsError> {
    let all = |what| WordsError { place: String::new(), what };
    let services = services.as_array().ok_or_else(|| all("is no list"))?;
    if services.is_empty() || services.len() > MOST_SERVICES {
        return Err(all("are none, or too many"));
    }
    let mut read: Vec<Asked> = Vec::with_capacity(services.len());
    for (at, service) in services.iter().enumerate() {
        let wrong = |what| WordsError { place: format!("[{at}]"), what };
        let service = Asked::read(service).map_err(wrong)?;
        if read.iter().any(|other| other.name == service.name) {
            return Err(wrong("has the name of another one"));
        }
        read.push(service);
    }
    Ok(read)
}

impl Asked {
    fn value(&self) -> Value {
        let mut value = Map::new();
        value.insert("name".to_owned(), json!(self.name));
        if let Some((first, last)) = self.ports {
            value.insert("ports".to_owned(), json!([first, last]));
        }
        if let Some(host) = self.host {
            value.insert("host".to_owned(), json!(host.to_string()));
        }
        Value::Object(value)
    }

    fn read(value: &Value) -> Result<Self, &'static str> {
        let name = value["name"].as_str().ok_or("has no name")?;
        if !is_name(name) {
            return Err("has a name that is too long, or not printable");
        }
        let ports = match &value["ports"] {
            Value::Null => None,
            ports => {
                let port = |at: usize| {
                    let port = ports.get(at)?.as_u64().and_then(|port| u16::try_from(port).ok());
                    port.filter(|port| *port > 0)
                };
                let range = port(0).zip(port(1)).filter(|(first, last)| first <= last);
                Some(range.ok_or("wants ports that are none")?)
            }
        };
        let host = match &value["host"] {
            Value::Null => None,
            host => Some(host.as_str().and_then(|host| host.parse().ok()).ok_or("wants no address")?),
        };
        Ok(Self { name: name.to_owned(), ports, host })
    }
}

/// Whether a lease, or an instance, can be called that. A server passes over one that cannot.
pub fn is_lease(name: &str) -> bool {
    !name.is_empty() && name.len() <= LONGEST_LEASE
}

/// Whether a service can be called that. It goes into logs and labels.
pub fn is_name(name: &str) -> bool {
    name.len() <= LONGEST_NAME && !name.chars().any(shown::misleads)
}

/// Whether it is an address, or can be a host's name. It goes into links.
pub fn is_host(host: &str) -> bool {
    let in_a_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let is_name = !host.is_empty() && host.len() <= LONGEST_HOST && host.bytes().all(in_a_name);
    is_name || host.parse::<IpAddr>().is_ok()
}

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerWords {
    /// The client gets what it asks for.
    Granted {
        /// The public ports, in the order of the client's services.
        ports: Vec<u16>,
        /// Whether visitors speak TLS to the server there.
        tls: bool,
        /// Where visitors of each come in, where that is not the host at which the client found the server. Empty where the
        /// server does not tell.
        hosts: Vec<Option<String>>,
    },
    /// The client gets none of them, and which one it is about.
    Refused {
        /// Why, and when to come again.
        refusal: Refusal,
        /// The service's place in the client's list, where it is about one.
        service: Option<u16>,
    },
}

impl ServerWords {
    /// As a hello carries it.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Granted { ports, tls, hosts } => {
                let mut value = json!({"port": ports.first(), "ports": ports});
                if !hosts.is_empty() {
                    value["hosts"] = json!(hosts);
                }
                if *tls {
                    value["tls"] = json!(true);
                }
                value
            }
            Self::Refused { refusal, service } => {
                let mut error = refusal_value(refusal);
                if let Some(service) = service {
                    error["service"] = json!(service);
                }
                json!({"error": error})
            }
        }
        .to_string()
        .into_bytes()
    }

    /// Reads a hello's: `None` where it has another form, or not one port for each of so many services.
    pub fn parse(bytes: &[u8], services: usize) -> Option<Self> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        if let Some(error) = value.get("error") {
            let service = error["service"].as_u64().and_then(|at| u16::try_from(at).ok());
            let service = service.filter(|at| usize::from(*at) < services);
            return Some(Self::Refused { refusal: read_refusal(error)?, service });
        }
        let port =
            |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        let ports: Vec<u16> = match value["ports"].as_array() {
            Some(ports) if ports.len() <= MOST_SERVICES => ports.iter().map(port).collect::<Option<_>>()?,
            Some(_) => return None,
            None => vec![port(&value["port"])?],
        };
        let tls = value["tls"] == json!(true);
        let host = |host: &Value| host.as_str().filter(|host| is_host(host)).map(str::to_owned);
        let hosts = value["hosts"].as_array().map_or_else(Vec::new, |hosts| hosts.iter().map(host).collect());
        let hosts = if hosts.len() == services { hosts } else { Vec::new() };
        (ports.len() == services).then_some(Self::Granted { ports, tls, hosts })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::w3p::Retry;
    use super::*;

    #[test]
    fn a_lease_that_is_passed_over_is_none_that_may_be_asked_for() {
        for (length, may) in [(0, false), (1, true), (LONGEST_LEASE, true), (LONGEST_LEASE + 1, false)] {
            let lease = "l".repeat(length);
            let words = ClientWords { lease: Some(lease.clone()), ..ClientWords::default() };
            let heard = ClientWords::parse(&words.encode()).unwrap().lease;
            assert_eq!((heard == Some(lease.clone()), is_lease(&lease)), (may, may), "{length}");
        }
    }

    #[test]
    fn the_wire_forms() {
        let words = ClientWords {
            instance: "i".into(),
            origin: "o".into(),
            lease: None,
            services: vec![
                Asked::default(),
                Asked { name: "db".into(), ports: Some((8000, 8010)), host: Some("::1".parse().unwrap()) },
            ],
        };
        let text = r#"{"instance":"i","lease":null,"origin":"o","services":[{"name":""},{"host":"::1","name":"db","ports":[8000,8010]}]}"#;
        assert_eq!(String::from_utf8(words.encode()).unwrap(), text);
        assert_eq!(ClientWords::parse(text.as_bytes()), Ok(words));
        let granted = |ports, tls| ServerWords::Granted { ports, tls, hosts: Vec::new() };
        assert_eq!(granted(vec![8000, 9], false).encode(), br#"{"port":8000,"ports":[8000,9]}"#);
        assert_eq!(granted(vec![8000, 9], true).encode(), br#"{"port":8000,"ports":[8000,9],"tls":true}"#);
        let refusal =
            Refusal { code: "port_taken".into(), message: "it is not free".into(), retry: Retry::Usual };
        let refused = ServerWords::Refused { refusal, service: Some(1) };
        let text = r#"{"error":{"code":"port_taken","message":"it is not free","retry":true,"service":1}}"#;
        assert_eq!(refused.encode(), text.as_bytes());
        assert_eq!(ServerWords::parse(text.as_bytes(), 2), Some(refused));
        assert_eq!(ServerWords::parse(br#"{"port":7}"#, 1), Some(granted(vec![7], false)));
        for (text, tls) in [(r#"{"port":7,"tls":true}"#, true), (r#"{"port":7,"tls":1}"#, false)] {
            assert_eq!(ServerWords::parse(text.as_bytes(), 1), Some(granted(vec![7], tls)));
        }
    }

    #[test]
    fn where_visitors_come_in_is_said_where_it_is_another_host() {
        let said = |hosts: &[Option<&str>]| ServerWords::Granted {
            ports: vec![7, 8],
            tls: false,
            hosts: hosts.iter().map(|host| host.map(str::to_owned)).collect(),
        };
        let text = br#"{"hosts":[null,"192.0.2.7"],"port":7,"ports":[7,8]}"#;
        assert_eq!(said(&[None, Some("192.0.2.7")]).encode(), text);
        assert_eq!(ServerWords::parse(text, 2), Some(said(&[None, Some("192.0.2.7")])));
        // It goes into a link, and onto a terminal.
        for (hosts, heard) in [
            (r#"["visitors.example","::1"]"#, &[Some("visitors.example"), Some("::1")][..]),
            (r#"["a b","x/y"]"#, &[None, None]),
            (r#"["[::1]","x@y"]"#, &[None, None]),
            (r#"["\u001b[2J",7]"#, &[None, None]),
            (r#"["",[]]"#, &[None, None]),
            (r#"["x"]"#, &[]),
            (r#""x""#, &[]),
        ] {
            let text = format!(r#"{{"ports":[7,8],"hosts":{hosts}}}"#);
            assert_eq!(ServerWords::parse(text.as_bytes(), 2), Some(said(heard)), "{hosts}");
        }
    }

    #[test]
    fn words_without_services_are_of_one() {
        for text in ["", "{}", "[1]", "no", r#"{"services":[{"name":"","new":1}]}"#] {
            assert_eq!(ClientWords::parse(text.as_bytes()), Ok(ClientWords::default()), "{text}");
        }
    }

    #[test]
    fn what_has_not_its_form_is_refused_with_its_place() {
        for (services, error) in [
            ("7", "services: is no list"),
            ("[]", "services: are none, or too many"),
            (r#"[{"name":""},{}]"#, "services[1]: has no name"),
            (r#"[{"name":"a\u0007"}]"#, "services[0]: has a name that is too long, or not printable"),
            (r#"[{"name":"a"},{"name":"a"}]"#, "services[1]: has the name of another one"),
            (r#"[{"name":"","ports":[0,1]}]"#, "services[0]: wants ports that are none"),
            (r#"[{"name":"","ports":[2,1]}]"#, "services[0]: wants ports that are none"),
            (r#"[{"name":"","ports":[65536,65536]}]"#, "services[0]: wants ports that are none"),
            (r#"[{"name":"","ports":80}]"#, "services[0]: wants ports that are none"),
            (r#"[{"name":"","host":"localhost"}]"#, "services[0]: wants no address"),
        ] {
            let text = format!(r#"{{"services":{services}}}"#);
            assert_eq!(ClientWords::parse(text.as_bytes()).unwrap_err().to_string(), error);
        }
        for text in ["", "{}", r#"{"port":0}"#, r#"{"ports":[1]}"#, r#"{"ports":[1,2,3]}"#, r#"{"error":{}}"#]
        {
            assert_eq!(ServerWords::parse(text.as_bytes(), 2), None, "{text}");
        }
    }

    fn any_host() -> impl Strategy<Value = Option<String>> {
        let host =
            prop_oneof![any::<IpAddr>().prop_map(|address| address.to_string()), "[a-zA-Z0-9._-]{1,20}"];
        proptest::option::of(host)
    }

    fn any_asked() -> impl Strategy<Value = Asked> {
        let ports = proptest::option::of((1u16.., 0u16..99));
        ("[^\\p{C}\\p{Zl}\\p{Zp}]{0,20}", ports, any::<Option<IpAddr>>()).prop_map(|(name, ports, host)| {
            let ports = ports.map(|(first, more)| (first, first.saturating_add(more)));
            Asked { name, ports, host }
        })
    }

    proptest! {
        #[test]
        fn what_one_says_the_other_hears(
            instance in "[a-f0-9]{0,32}",
            origin in "[a-f0-9]{0,64}",
            lease in proptest::option::of("[a-z]{1,9}"),
            mut services in proptest::collection::vec(any_asked(), 1..9),
            ports in proptest::collection::vec(1u16.., 1..9),
            seconds in 0u64..9_999,
            about in 0u16..9,
            tls: bool,
            mut hosts in proptest::collection::vec(any_host(), 0..9),
        ) {
            services.sort_by(|a, b| a.name.cmp(&b.name));
            services.dedup_by(|a, b| a.name == b.name);
            let words = ClientWords { instance, origin, lease, services };
            prop_assert_eq!(ClientWords::parse(&words.encode()), Ok(words));
            let count = ports.len();
            hosts.resize(if hosts.is_empty() { 0 } else { count }, None);
            let granted = ServerWords::Granted { ports, tls, hosts };
            prop_assert_eq!(ServerWords::parse(&granted.encode(), count), Some(granted.clone()));
            prop_assert_eq!(ServerWords::parse(&granted.encode(), count + 1), None);
            let retry = Retry::After(Duration::from_secs(seconds));
            let refusal = Refusal { code: "c".into(), message: "m".into(), retry };
            let refused = ServerWords::Refused { refusal, service: Some(about) };
            prop_assert_eq!(ServerWords::parse(&refused.encode(), 9), Some(refused));
        }

        /// Whatever somebody says, what is believed of it can be said again.
        #[test]
        fn nothing_else_is_believed(text in r#"\{"services":\[(\{("name":("[a-z"]?"|[0-9]),?|"ports":\[[0-9]{1,6}(,[0-9]{1,6})?\],?|"host":"[0-9:.]{0,9}",?){0,3}\},?){0,4}\](,"lease":".{0,300}")?\}"#) {
            if let Ok(words) = ClientWords::parse(text.as_bytes()) {
                prop_assert!(!words.services.is_empty() && words.services.len() <= MOST_SERVICES);
                prop_assert_eq!(ClientWords::parse(&words.encode()), Ok(words));
            }
            let _ = ServerWords::parse(text.as_bytes(), 1);
        }
    }
}
