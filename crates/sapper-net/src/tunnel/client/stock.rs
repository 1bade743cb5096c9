//! What a client has over all of its sessions: dialers, limits, and what is used up of them.

use std::sync::Arc;

use sapper_proto::tunnel::words::ClientWords;

use super::ClientOptions;
use crate::tunnel::limit::{Limits, Meter, Quota, Scope};
use crate::tunnel::link::Link;
use crate::tunnel::service::{Dialer, Exposed, Origin};

/// What a client has for all of its sessions: what was used up in one is used up in the next.
#[derive(Default)]
pub(super) struct Stock {
    limits: Limits,
    meter: Option<Arc<Meter>>,
    services: Vec<Stocked>,
    origin: Option<Origin>,
}

/// The same for a service, which is known by its name.
struct Stocked {
    name: String,
    dialer: Arc<Dialer>,
    limits: Limits,
    meter: Option<Arc<Meter>>,
}

impl Stock {
    /// The same for other options: what has its name, or its limits, goes on.
    pub(super) fn renewed(mut self, options: &ClientOptions) -> Self {
        if self.limits != options.limits {
            self.limits = options.limits.clone();
            self.meter = Meter::new(Scope::Client, &self.limits);
        }
        if self.origin.as_ref().is_none_or(|origin| !origin.is_of(&options.services)) {
            self.origin = Some(Origin::of(&options.services));
        }
        let mut before = std::mem::take(&mut self.services);
        let renew = |exposed: &Exposed| {
            let (name, limits) = (exposed.asked.name.clone(), exposed.limits.clone());
            let known = before.iter().position(|one| one.name == name).map(|at| before.swap_remove(at));
            let target = options.target(exposed);
            match known {
                Some(known) if known.limits == limits => {
                    known.dialer.replace(target);
                    known
                }
                Some(known) => {
                    known.dialer.replace(target);
                    let meter = Meter::new(Scope::Service, &limits);
                    Stocked { name, dialer: known.dialer, limits, meter }
                }
                None => {
                    let meter = Meter::new(Scope::Service, &limits);
                    Stocked { name, dialer: Dialer::new(target), limits, meter }
                }
            }
        };
        self.services = options.services.iter().map(renew).collect();
        self
    }

    fn quota(&self) -> Quota {
        Quota { meters: self.meter.iter().cloned().collect(), ..Quota::default() }
    }

    /// The limits are these now. A service that is not exposed any more keeps its own as long as its session does.
    pub(super) fn renew_limits(&self, link: &mut Link) {
        link.renew_limits(self.quota(), |service| {
            let known = self.services.iter().find(|one| one.name == service.info().name);
            known.map_or_else(|| service.meter(), |one| one.meter.clone())
        });
    }

    /// For a connection to the server with these options.
    pub(super) fn mine(&self, instance: &str, options: &ClientOptions) -> Mine {
        let asked = options.services.iter().map(|exposed| exposed.asked.clone()).collect();
        let words = ClientWords {
            instance: instance.to_owned(),
            origin: self.origin.as_ref().map_or_else(String::new, |origin| origin.word().to_owned()),
            lease: options.lease.clone(),
            services: asked,
        };
        Mine {
            dialers: self.services.iter().map(|one| Arc::clone(&one.dialer)).collect(),
            quota: self.quota(),
            meters: self.services.iter().map(|one| one.meter.clone()).collect(),
            words: words.encode(),
        }
    }
}

/// What a session begins with.
pub(super) struct Mine {
    pub(super) dialers: Arc<[Arc<Dialer>]>,
    pub(super) quota: Quota,
    /// Of each service.
    pub(super) meters: Vec<Option<Arc<Meter>>>,
    /// Our hello's.
    pub(super) words: Vec<u8>,
}
