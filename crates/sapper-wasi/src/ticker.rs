//! The clock that takes the processor from guests: a guest that computes gives way at each tick, so that
//! deadlines, other guests and their sockets are served.
//!
//! A thread of its own: the threads that run guests may all be busy with them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use wasmtime::Engine;

const TICK: Duration = Duration::from_millis(10);

#[derive(Default)]
struct Ticker {
    started: bool,
    /// Engines with a run under way, once for each run.
    engines: Vec<Engine>,
}

static TICKER: Mutex<Ticker> = Mutex::new(Ticker { started: false, engines: Vec::new() });
static BUSY: Condvar = Condvar::new();

fn ticker() -> MutexGuard<'static, Ticker> {
    TICKER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, the engine's guests are interrupted at each tick.
pub(crate) struct Ticking(Engine);

impl Ticking {
    pub(crate) fn start(engine: &Engine) -> std::io::Result<Self> {
        let mut ticker = ticker();
        if !ticker.started {
            thread::Builder::new().name("sapper-wasi-tick".into()).spawn(tick)?;
            ticker.started = true;
        }
        ticker.engines.push(engine.clone());
        BUSY.notify_one();
        Ok(Self(engine.clone()))
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        let mut ticker = ticker();
        if let Some(at) = ticker.engines.iter().position(|one| Engine::same(one, &self.0)) {
            ticker.engines.swap_remove(at);
        }
    }
}

fn tick() {
    let mut state = ticker();
    loop {
        // Sleeps for good while nothing runs.
        state =
            BUSY.wait_while(state, |state| state.engines.is_empty()).unwrap_or_else(PoisonError::into_inner);
        drop(state);
        thread::sleep(TICK);
        state = ticker();
        for (at, engine) in state.engines.iter().enumerate() {
            if !state.engines[..at].iter().any(|earlier| Engine::same(earlier, engine)) {
                engine.increment_epoch();
            }
        }
    }
}
