//! Handshakes that may block: a server that asks somebody for a client's pre-shared key.
//!
//! OpenSSL's call-back cannot suspend, so such a step of a handshake runs on a thread of its own, and the
//! event loop goes on. Their number is bounded: a peer that names keys which take long to find holds up
//! others that do the same, and nobody else.

use std::sync::{Arc, LazyLock};

use tokio::sync::{Semaphore, oneshot};

use super::failure::misuse;
use super::{BoxEngine, HandshakeProgress, Opened, TlsEngine};
use crate::buffer::Buffer;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime;
use crate::stream::RecordMarks;

/// Handshakes that may block at a time in this process. Others wait for their turn, under their own
/// deadline.
const MAX_BLOCKED: usize = 32;

static TURNS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(MAX_BLOCKED)));

/// [`TlsEngine::handshake`] on a thread of its own. Dropped before it is done, the engine is gone with
/// what it was doing.
pub(crate) async fn handshake(
    engine: &mut BoxEngine,
    incoming: &mut Buffer,
    outgoing: &mut Buffer,
) -> Result<HandshakeProgress> {
    let turn = Arc::clone(&TURNS).acquire_owned().await.expect("the semaphore is never closed");
    let mut work =
        (std::mem::replace(engine, Box::new(Away)), std::mem::take(incoming), std::mem::take(outgoing));
    let (answer, answered) = oneshot::channel();
    runtime::spawn_thread("sapper-psk", move || {
        let (engine, incoming, outgoing) = &mut work;
        let result = engine.handshake(incoming, outgoing);
        // Back before the answer is read: whoever waited may go on.
        drop(turn);
        let _ = answer.send((work, result));
    })
    .map_err(|source| Error::io(ErrorKind::ResourceLimit, "start a thread for a handshake", &source))?;
    let failed = |_| Error::new(ErrorKind::LocalProtocol, "a handshake's thread ended without an answer");
    let ((its, read, written), result) = answered.await.map_err(failed)?;
    (*engine, *incoming, *outgoing) = (its, read, written);
    result
}

/// Stands in for an engine that is at work on a thread.
struct Away;

fn away<T>() -> Result<T> {
    Err(misuse("the handshake is not done"))
}

impl TlsEngine for Away {
    fn handshake(&mut self, _: &mut Buffer, _: &mut Buffer) -> Result<HandshakeProgress> {
        away()
    }
    fn open(&mut self, _: &mut Buffer, _: &mut [u8], _: &mut RecordMarks, _: &mut Buffer) -> Result<Opened> {
        away()
    }
    fn seal(&mut self, _: &[u8], _: &mut Buffer) -> Result<()> {
        away()
    }
    fn close_notify(&mut self, _: &mut Buffer) -> Result<()> {
        Ok(())
    }
    fn fatal_alert(&mut self, _: u8, _: &mut Buffer) {}
    fn update_keys(&mut self, _: &mut Buffer) -> Result<()> {
        away()
    }
    fn export_keying_material(&mut self, _: &str, _: Option<&[u8]>, _: &mut [u8]) -> Result<()> {
        away()
    }
    fn release_idle(&mut self) {}
    fn name(&self) -> &'static str {
        "none"
    }
}
