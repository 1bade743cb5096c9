//! The platform, behind small modules. Linux is the one that is tested; what another lacks is said
//! by an error of kind `Device`, never by a missing symbol.

mod claim;
mod process;
mod signal;
mod tcp;
mod thread;

pub use claim::Claim;
pub use process::{forks, machine};
pub use signal::Signal;
pub(crate) use tcp::round_trip;
pub(crate) use thread::take_short_turns;
