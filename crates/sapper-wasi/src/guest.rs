//! A compiled guest, and the engines that compile.
//!
//! Two engines, because counting fuel costs a guest speed: one counts, the other does not. Neither uses
//! signals: their handlers belong to the whole process, and to Python's `faulthandler`, which may take
//! them at any time.

use std::sync::{Arc, LazyLock, OnceLock};

use sapper_net::{Error, Result};
use wasmtime::component::{Component, Linker};
use wasmtime::{Config, Engine};
use wasmtime_wasi::{p2, p3};
use wasmtime_wasi_tls as wasi_tls;

use crate::lookup;
use crate::run::check_process;
use crate::state::State;

/// The stack of a guest's native code, and the one that it runs on with the host's below it.
const GUEST_STACK: usize = 1 << 20;
const WHOLE_STACK: usize = 2 << 20;

struct Host {
    engine: Engine,
    linker: Linker<State>,
}

type MadeHost = Result<Host, wasmtime::Error>;

static PLAIN: LazyLock<MadeHost> = LazyLock::new(|| Host::new(false));
static METERED: LazyLock<MadeHost> = LazyLock::new(|| Host::new(true));

impl Host {
    fn of(metered: bool) -> Result<&'static Self> {
        let host = if metered { &METERED } else { &PLAIN };
        host.as_ref().map_err(|error| Error::config("guest", format!("no engine for guests: {error:#}")))
    }

    fn new(metered: bool) -> MadeHost {
        let mut config = Config::new();
        config
            .wasm_component_model(true)
            .wasm_component_model_async(true)
            .epoch_interruption(true)
            .consume_fuel(metered)
            .signals_based_traps(false)
            .max_wasm_stack(GUEST_STACK)
            .async_stack_size(WHOLE_STACK);
        let engine = Engine::new(&config)?;
        let mut linker = Linker::new(&engine);
        p2::add_to_linker_async(&mut linker)?;
        p3::add_to_linker(&mut linker)?;
        lookup::add_to_linker(&mut linker)?;
        let mut drafts = wasi_tls::p2::LinkOptions::default();
        drafts.tls(true);
        wasi_tls::p2::add_to_linker(&mut linker, &drafts)?;
        wasi_tls::p3::add_to_linker(&mut linker)?;
        Ok(Self { engine, linker })
    }
}

/// A program of either version of WASI.
#[derive(Clone)]
pub(crate) enum Command {
    P2(p2::bindings::CommandPre<State>),
    P3(p3::bindings::CommandPre<State>),
}

/// A component, compiled once for any number of runs.
pub struct Guest {
    bytes: Vec<u8>,
    plain: OnceLock<Result<Command>>,
    metered: OnceLock<Result<Command>>,
}

impl Guest {
    /// Checks and compiles a component; that takes a second for each few megabytes of it.
    pub fn new(bytes: Vec<u8>) -> Result<Arc<Self>> {
        // The compiler has threads too.
        check_process()?;
        let guest = Self { bytes, plain: OnceLock::new(), metered: OnceLock::new() };
        guest.command(false)?;
        Ok(Arc::new(guest))
    }

    /// Which WASI its `run` is of: `"0.2"` or `"0.3"`.
    pub fn wasi(&self) -> &'static str {
        match self.command(false) {
            Ok(Command::P3(_)) => "0.3",
            _ => "0.2",
        }
    }

    pub(crate) fn engine(metered: bool) -> Result<&'static Engine> {
        Ok(&Host::of(metered)?.engine)
    }

    /// The compiled form; the one that counts fuel is compiled when it is first asked for.
    pub(crate) fn command(&self, metered: bool) -> Result<Command> {
        let place = if metered { &self.metered } else { &self.plain };
        place.get_or_init(|| compile(&self.bytes, metered)).clone()
    }
}

fn wrong(why: impl Into<String>) -> Error {
    Error::config("guest", why)
}

fn compile(bytes: &[u8], metered: bool) -> Result<Command> {
    // Bytes 4 to 8 are the version and the layer: a core module's layer is 0, a component's is 1.
    match bytes {
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => {}
        [0, b'a', b's', b'm', _, _, 0, 0, ..] => {
            return Err(wrong(
                "it is a core module, and a host of WASI 0.2 and 0.3 runs components: build it for the target \
                 wasm32-wasip2, or make a component of it with `wasm-tools component new`",
            ));
        }
        _ => return Err(wrong("it is no WebAssembly component")),
    }
    let host = Host::of(metered)?;
    let component = Component::from_binary(&host.engine, bytes)
        .map_err(|error| wrong(format!("it cannot be compiled: {error:#}")))?;
    let exports = |version: &str| {
        let run = format!("wasi:cli/run@{version}");
        component.component_type().exports(&host.engine).any(|(name, _)| name.starts_with(&run))
    };
    let (is_p2, is_p3) = (exports("0.2."), exports("0.3."));
    let linked = host
        .linker
        .instantiate_pre(&component)
        .map_err(|error| wrong(format!("it asks for what this host has not: {error:#}")))?;
    if is_p3 {
        let command = p3::bindings::CommandPre::new(linked);
        command.map(Command::P3).map_err(|error| wrong(format!("its run is not WASI's: {error:#}")))
    } else if is_p2 {
        let command = p2::bindings::CommandPre::new(linked);
        command.map(Command::P2).map_err(|error| wrong(format!("its run is not WASI's: {error:#}")))
    } else {
        Err(wrong("it is a library, not a program: it exports no wasi:cli/run"))
    }
}
