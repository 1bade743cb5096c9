//! Written next.
/// Parsed once, shared by any number of connections.
pub struct TlsConfig;
