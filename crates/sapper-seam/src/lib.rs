//! What the bindings convert alike: errors, TLS options, warnings, handles that know their process.
//!
//! There are two bindings, because the host for wasm guests is a distribution of its own
//! (`sapper-py`, `sapper-wasi-py`). Handles do not cross from one native module to the other; plain
//! values do, and errors are the same classes in both.

pub mod errors;
pub mod log;
pub mod process;
pub mod tls;
pub mod values;
