//! Other limits for a link that works: a reload's.

use std::sync::Arc;

use super::Link;
use super::pieces::Pieces;
use crate::tunnel::limit::{FROM, Meter, Quota, TO};
use crate::tunnel::served::Served;

impl Link {
    /// Other limits from here on, those of its services by `meter`: for who comes, and for the bytes of who is there.
    pub(in crate::tunnel) fn renew_limits(
        &mut self,
        quota: Quota,
        meter: impl Fn(&Served) -> Option<Arc<Meter>>,
    ) {
        self.services.iter().for_each(|service| service.set_meter(meter(service)));
        let same = match (&self.quota.visitors, &quota.visitors) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            (before, now) => before.is_none() && now.is_none(),
        };
        self.quota = quota;
        for key in self.slots.keys() {
            let Some(slot) = self.slots.get_mut(key) else { continue };
            let due = slot.throttle.as_ref().map(|throttle| throttle.due()).unwrap_or_default();
            let from = slot.visitor.map(|(from, _)| from.ip());
            slot.throttle = self.quota.readmit(slot.throttle.take(), slot.service.meter(), from, same);
            let [read, write] = [FROM, TO]
                .map(|direction| due[direction].is_some_and(|at| self.waiting.remove(&(at, key, direction))));
            // What waited for the limits before asks those that are now.
            if read {
                self.mux.ready(key);
            }
            if write {
                self.deliver(key, Pieces::default());
            }
        }
    }
}
