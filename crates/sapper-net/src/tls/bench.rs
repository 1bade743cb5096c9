//! Two engines facing each other in memory: what a handshake costs without any I/O.

use super::config::TlsConfig;
use super::{BoxEngine, HandshakeInfo, HandshakeProgress, Role};
use crate::buffer::Buffer;
use crate::error::{Error, ErrorKind, Result};

/// Name that the client of [`bench_handshake_pair`] asks for.
pub const BENCH_SERVER_NAME: &str = "localhost";

/// Does one handshake between two new engines and drops them.
pub fn bench_handshake_pair(client: &TlsConfig, server: &TlsConfig) -> Result<()> {
    let role = Role::Client { server_name: Some(BENCH_SERVER_NAME.to_owned()) };
    let mut pair = EnginePair::new(client.engine(&role)?, server.engine(&Role::Server)?);
    pair.shake_hands().map_err(|(_, error)| error)
}

/// One end with what is on its way to it.
pub(crate) struct EngineEnd {
    pub(crate) engine: BoxEngine,
    pub(crate) incoming: Buffer,
    pub(crate) outgoing: Buffer,
    pub(crate) info: Option<Box<HandshakeInfo>>,
}

impl EngineEnd {
    pub(crate) fn new(engine: BoxEngine) -> Self {
        Self { engine, incoming: Buffer::new(), outgoing: Buffer::new(), info: None }
    }

    /// One step of the handshake.
    pub(crate) fn step(&mut self) -> Result<()> {
        if let HandshakeProgress::Done(info) =
            self.engine.handshake(&mut self.incoming, &mut self.outgoing)?
        {
            self.info = Some(info);
        }
        Ok(())
    }
}

/// Two ends.
pub(crate) struct EnginePair {
    pub(crate) client: EngineEnd,
    pub(crate) server: EngineEnd,
}

impl EnginePair {
    pub(crate) fn new(client: BoxEngine, server: BoxEngine) -> Self {
        Self { client: EngineEnd::new(client), server: EngineEnd::new(server) }
    }

    /// Moves what each has sent to the other; whether there was anything.
    pub(crate) fn deliver(&mut self) -> bool {
        let mut moved = false;
        for (from, to) in [
            (&mut self.client.outgoing, &mut self.server.incoming),
            (&mut self.server.outgoing, &mut self.client.incoming),
        ] {
            if !from.is_empty() {
                to.extend(from.data());
                from.consume(from.len());
                moved = true;
            }
        }
        moved
    }

    /// Until both are done. An error says whether it is the client's; the other end has been given
    /// what was sent with it, but has not looked.
    pub(crate) fn shake_hands(&mut self) -> Result<(), (bool, Error)> {
        loop {
            if self.client.info.is_none() {
                let result = self.client.step();
                self.deliver();
                result.map_err(|error| (true, error))?;
            }
            if self.server.info.is_none() {
                let result = self.server.step();
                self.deliver();
                result.map_err(|error| (false, error))?;
            }
            if self.client.info.is_some() && self.server.info.is_some() {
                return Ok(());
            }
            let more = !self.client.incoming.is_empty() || !self.server.incoming.is_empty();
            if !more {
                return Err((true, Error::new(ErrorKind::LocalProtocol, "both ends wait for each other")));
            }
        }
    }
}
