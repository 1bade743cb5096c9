//! Which way a connection takes: by the server name in its hello.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Inbound, RouteOptions, entry};
use crate::error::{Error, Result};

/// All ways through a proxy.
pub(super) struct Routes {
    exact: HashMap<String, Arc<RouteOptions>>,
    /// By what follows `*.`.
    wildcard: HashMap<String, Arc<RouteOptions>>,
    default: Option<Arc<RouteOptions>>,
    /// Whether the hello must be looked at before anything else.
    by_hello: bool,
}

impl Routes {
    pub(super) fn new(routes: Vec<RouteOptions>) -> Result<Self> {
        let mut all =
            Self { exact: HashMap::new(), wildcard: HashMap::new(), default: None, by_hello: false };
        if routes.is_empty() {
            return Err(Error::config("to", "a proxy needs a service to go to"));
        }
        let plain = |route: &RouteOptions| matches!(route.inbound, Inbound::Plain);
        if routes.len() > 1 && routes.iter().any(plain) {
            return Err(Error::config(
                "routes",
                "clients without TLS name no server: there is one way for all of them",
            ));
        }
        for (index, route) in routes.into_iter().map(Arc::new).enumerate() {
            let of_route = |error: Error| error.of_table(format_args!("routes.{index}"));
            if plain(&route) && !route.names.is_empty() {
                return Err(of_route(Error::config("names", "clients without TLS name no server")));
            }
            // What is passed on is looked at too: so a stranger is told here that this is TLS.
            all.by_hello |= !route.names.is_empty() || matches!(route.inbound, Inbound::PassThrough);
            if route.names.is_empty() && all.default.replace(Arc::clone(&route)).is_some() {
                return Err(Error::config("routes", "two ways are for those that no other one wants"));
            }
            for (index, name) in route.names.iter().enumerate() {
                let field = || entry("names", index, route.names.len());
                let (table, name) =
                    match normal(name).map_err(|text| of_route(Error::config(field(), text)))? {
                        (true, suffix) => (&mut all.wildcard, suffix),
                        (false, name) => (&mut all.exact, name),
                    };
                if table.insert(name, Arc::clone(&route)).is_some() {
                    return Err(of_route(Error::config(field(), "this name has two ways")));
                }
            }
        }
        Ok(all)
    }

    /// Whether [`find`](Self::find) needs the client's hello.
    pub(super) fn by_hello(&self) -> bool {
        self.by_hello
    }

    /// The way for a name (in lower case, as a hello's parser gives it); an exact one comes first.
    pub(super) fn find(&self, name: Option<&str>) -> Option<&Arc<RouteOptions>> {
        let named =
            name.and_then(|name| self.exact.get(name).or_else(|| self.wildcard.get(name.split_once('.')?.1)));
        named.or(self.default.as_ref())
    }
}

/// Whether it is a wildcard, and the name without `*.`, in lower case.
fn normal(name: &str) -> std::result::Result<(bool, String), String> {
    let bare = name.strip_prefix("*.").unwrap_or(name);
    let bare = bare.strip_suffix('.').unwrap_or(bare);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let label = |label: &str| !label.is_empty() && label.len() <= 63 && label.bytes().all(plain);
    if bare.parse::<std::net::IpAddr>().is_ok() {
        return Err(format!(
            "{name:?} is an address, and no client names one: who connects to it takes the way without names"
        ));
    }
    if bare.len() > 253 || !bare.split('.').all(label) {
        return Err(format!("{name:?} is no server name (and no *.name)"));
    }
    Ok((name.starts_with("*."), bare.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::Upstream;

    fn route(names: &[&str], port: u16) -> RouteOptions {
        RouteOptions {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            inbound: Inbound::PassThrough,
            upstreams: vec![Upstream::Tcp { host: "127.0.0.1".to_owned(), port }],
            keep_source: false,
            upstream_tls: None,
            send_proxy: None,
        }
    }

    fn port(routes: &Routes, name: Option<&str>) -> Option<u16> {
        routes.find(name).map(|route| match route.upstreams[0] {
            Upstream::Tcp { port, .. } => port,
            Upstream::Unix(_) | Upstream::Original => 0,
        })
    }

    #[test]
    fn the_exact_name_comes_before_the_wildcard_and_that_before_the_default() {
        let routes =
            Routes::new(vec![route(&["Www.Example.org."], 1), route(&["*.example.org"], 2), route(&[], 3)])
                .unwrap();
        assert!(routes.by_hello());
        assert_eq!(port(&routes, Some("www.example.org")), Some(1));
        assert_eq!(port(&routes, Some("mail.example.org")), Some(2));
        // One label, not two, and not none.
        assert_eq!(port(&routes, Some("a.b.example.org")), Some(3));
        assert_eq!(port(&routes, Some("example.org")), Some(3));
        assert_eq!(port(&routes, None), Some(3));
    }

    #[test]
    fn without_a_default_strangers_have_no_way() {
        let routes = Routes::new(vec![route(&["a.test"], 1)]).unwrap();
        assert_eq!(port(&routes, Some("b.test")), None);
        assert_eq!(port(&routes, None), None);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let plain = RouteOptions { inbound: Inbound::Plain, ..route(&[], 1) };
        for (routes, field) in [
            (vec![], "to"),
            (vec![route(&[], 1), route(&[], 2)], "routes"),
            (vec![route(&["a.test"], 1), route(&["A.test"], 2)], "routes.1.names"),
            (vec![route(&["*.*.test"], 1)], "routes.0.names"),
            (vec![route(&["a b"], 1)], "routes.0.names"),
            (vec![route(&["x.test"], 1), plain.clone()], "routes"),
            (vec![RouteOptions { names: vec!["a.test".to_owned()], ..plain }], "routes.0.names"),
        ] {
            assert_eq!(Routes::new(routes).err().unwrap().field(), Some(field));
        }
    }
}
