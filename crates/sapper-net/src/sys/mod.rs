//! The platform, behind small modules. Linux is the one that is tested; what another lacks is said
//! by an error of kind `Device`, never by a missing symbol.

mod children;
mod claim;
mod descriptors;
mod process;
mod signal;
mod tcp;
mod thread;

pub use children::NotForChildren;
pub use claim::Claim;
pub(crate) use descriptors::descriptors_left;
pub use process::{forks, machine};
pub use signal::Signal;
pub(crate) use tcp::round_trip;
pub(crate) use thread::{offer_core, take_short_turns};
