//! The listener over loopback.
