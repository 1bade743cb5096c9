//! `wasi:sockets/ip-name-lookup` with a policy: names that no rule has are refused before anything is
//! asked, and what the resolver answers is remembered as allowed.

use wasmtime::component::{Accessor, HasData, Linker, Resource};
use wasmtime_wasi::p2;
use wasmtime_wasi::p2::bindings::sockets::ip_name_lookup as lookup2;
use wasmtime_wasi::p2::bindings::sockets::network as network2;
use wasmtime_wasi::p3::bindings::sockets::ip_name_lookup as lookup3;
use wasmtime_wasi::p3::bindings::sockets::types as types3;
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsCtxView, WasiSocketsView as _};

use std::net::IpAddr;

use crate::allow::Ports;
use crate::state::State;

/// Marks our own implementation, for both versions of WASI.
struct NamedLookup;

impl HasData for NamedLookup {
    type Data<'a> = &'a mut State;
}

/// Replaces the look-ups that are in the linker.
pub(crate) fn add_to_linker(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    lookup2::add_to_linker::<State, NamedLookup>(linker, |state| state)?;
    lookup3::add_to_linker::<State, NamedLookup>(linker, |state| state)?;
    linker.allow_shadowing(false);
    Ok(())
}

impl State {
    fn inner(&mut self) -> WasiSocketsCtxView<'_> {
        self.sockets()
    }

    /// The ports of a name, or of an address in its place: that asks nobody, and teaches nothing.
    fn lookup_ports(&self, name: &str) -> Option<Vec<Ports>> {
        let ports = self.policy.ports_of(name);
        (!ports.is_empty() || name.parse::<IpAddr>().is_ok()).then_some(ports)
    }
}

// What a look-up's interface takes for granted; all of it as it is.
impl network2::Host for State {
    fn convert_error_code(&mut self, error: p2::SocketError) -> wasmtime::Result<network2::ErrorCode> {
        network2::Host::convert_error_code(&mut self.inner(), error)
    }

    fn network_error_code(
        &mut self,
        error: Resource<p2::IoError>,
    ) -> wasmtime::Result<Option<network2::ErrorCode>> {
        network2::Host::network_error_code(&mut self.inner(), error)
    }
}

impl network2::HostNetwork for State {
    fn drop(&mut self, network: Resource<network2::Network>) -> wasmtime::Result<()> {
        network2::HostNetwork::drop(&mut self.inner(), network)
    }
}

type Lookup = Resource<lookup2::ResolveAddressStream>;

impl lookup2::Host for State {
    fn resolve_addresses(
        &mut self,
        network: Resource<network2::Network>,
        name: String,
    ) -> Result<Lookup, p2::SocketError> {
        let Some(ports) = self.lookup_ports(&name) else {
            return Err(network2::ErrorCode::AccessDenied.into());
        };
        let lookup = lookup2::Host::resolve_addresses(&mut self.inner(), network, name)?;
        self.lookups.insert(lookup.rep(), ports);
        Ok(lookup)
    }
}

impl lookup2::HostResolveAddressStream for State {
    fn resolve_next_address(
        &mut self,
        lookup: Lookup,
    ) -> Result<Option<network2::IpAddress>, p2::SocketError> {
        let rep = lookup.rep();
        let next = lookup2::HostResolveAddressStream::resolve_next_address(&mut self.inner(), lookup)?;
        if let (Some(address), Some(ports)) = (&next, self.lookups.get(&rep)) {
            let address = match address {
                network2::IpAddress::Ipv4((a, b, c, d)) => IpAddr::from([*a, *b, *c, *d]),
                network2::IpAddress::Ipv6((a, b, c, d, e, f, g, h)) => {
                    IpAddr::from([*a, *b, *c, *d, *e, *f, *g, *h])
                }
            };
            if !self.policy.learn(address, ports) {
                return Err(network2::ErrorCode::OutOfMemory.into());
            }
        }
        Ok(next)
    }

    fn subscribe(&mut self, lookup: Lookup) -> wasmtime::Result<Resource<p2::DynPollable>> {
        lookup2::HostResolveAddressStream::subscribe(&mut self.inner(), lookup)
    }

    fn drop(&mut self, lookup: Lookup) -> wasmtime::Result<()> {
        self.lookups.remove(&lookup.rep());
        lookup2::HostResolveAddressStream::drop(&mut self.inner(), lookup)
    }
}

impl lookup3::Host for State {}

impl lookup3::HostWithStore<State> for NamedLookup {
    async fn resolve_addresses(
        store: &Accessor<State, Self>,
        name: String,
    ) -> wasmtime::Result<Result<Vec<types3::IpAddress>, lookup3::ErrorCode>> {
        let ports = store.with(|mut access| access.get().lookup_ports(&name));
        let Some(ports) = ports else {
            return Ok(Err(lookup3::ErrorCode::AccessDenied));
        };
        let sockets = store.with_getter::<WasiSockets>(State::sockets);
        let found = <WasiSockets as lookup3::HostWithStore<State>>::resolve_addresses(&sockets, name).await?;
        let Ok(addresses) = &found else { return Ok(found) };
        let all = store.with(|mut access| {
            let policy = &access.get().policy;
            addresses.iter().all(|address| {
                let address = match address {
                    types3::IpAddress::Ipv4((a, b, c, d)) => IpAddr::from([*a, *b, *c, *d]),
                    types3::IpAddress::Ipv6((a, b, c, d, e, f, g, h)) => {
                        IpAddr::from([*a, *b, *c, *d, *e, *f, *g, *h])
                    }
                };
                policy.learn(address, &ports)
            })
        });
        Ok(if all { found } else { Err(lookup3::ErrorCode::TemporaryResolverFailure) })
    }
}
