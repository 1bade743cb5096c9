//! What belongs to one run: its contexts, its handles, its limits.

use std::collections::HashMap;

use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_tls::{WasiTlsCtx, WasiTlsCtxView, WasiTlsView};

use crate::allow::{Policy, Ports};
use crate::limits::Limits;

/// Handles (sockets, streams, pollables, …) that a guest may have open at a time. A socket of them is a
/// descriptor of this process.
const MOST_HANDLES: usize = 4096;

/// The data of a store.
pub(crate) struct State {
    pub(crate) wasi: WasiCtx,
    pub(crate) tls: WasiTlsCtx,
    pub(crate) table: ResourceTable,
    pub(crate) limits: Limits,
    pub(crate) policy: Policy,
    /// Look-ups under way (WASI 0.2): the ports that their answers are good for.
    pub(crate) lookups: HashMap<u32, Vec<Ports>>,
}

impl State {
    pub(crate) fn new(wasi: WasiCtx, tls: WasiTlsCtx, limits: Limits, policy: Policy) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(MOST_HANDLES);
        Self { wasi, tls, table, limits, policy, lookups: HashMap::new() }
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiTlsView for State {
    fn tls(&mut self) -> WasiTlsCtxView<'_> {
        WasiTlsCtxView { ctx: &mut self.tls, table: &mut self.table }
    }
}
