//! Data plane of Sapper.
