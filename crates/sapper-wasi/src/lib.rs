//! A host for wasm guests: WASI, and `wasi:tls` by Sapper's engines and configuration.
//!
//! A [`Guest`] is a compiled component that exports `wasi:cli/run`, of WASI 0.2 or 0.3. [`start`] runs it
//! with what its [`Options`] give it, and that is all it has: no network but what [`allow`] names, no
//! folder but what is opened for it, no environment. Both drafts of `wasi:tls` are there; their streams
//! are ordinary streams of this process, so that payload never leaves native code.
//!
//! What is not here: Python (`sapper-wasi-py`), and TLS itself (`sapper-net`).

pub mod allow;
mod carrier;
mod guest;
mod limits;
mod lookup;
mod run;
mod state;
mod ticker;
pub mod tls;

pub use guest::Guest;
pub use run::{Captured, Folder, Options, Outcome, Output, Report, Run, start};
