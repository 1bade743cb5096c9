//! Connectors against real listeners.
