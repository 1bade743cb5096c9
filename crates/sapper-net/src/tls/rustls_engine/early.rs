//! A server between its own part of a handshake and the client's Finished: it has taken early data, gives it
//! away and may answer. Its records are rustls' until then.

use rustls::server::ServerConnectionData;
use rustls::unbuffered::{ConnectionState, ReadEarlyData, UnbufferedStatus};
use rustls::{CipherSuite, SupportedCipherSuite};

use super::{Advance, Connection, Handshake, Step, hash_of, lost};
use crate::buffer::Buffer;
use crate::error::{Error, ErrorKind, Result};
use crate::stream::RecordMarks;
use crate::tls::failure::misuse;
use crate::tls::record::{ALERT, Aead, DirectionKeys, MAX_OVERHEAD, grant};
use crate::tls::traffic::Traffic;
use crate::tls::{MAX_RECORD, OpenState, Opened};

/// A server whose client has said something and not finished the handshake.
pub(super) struct Early {
    handshake: Handshake,
    /// Records of the peer's for rustls: it wants to see some of them again.
    incoming: Buffer,
    /// How much of the early data has been read.
    taken: usize,
    /// Records that went out under the keys of application data.
    sealed: u64,
    /// Our direction has ended: what rustls still says (tickets) stays here.
    ended: bool,
}

impl Early {
    pub(super) fn new(handshake: Handshake) -> Self {
        Self { handshake, incoming: Buffer::new(), taken: 0, sealed: 0, ended: false }
    }

    /// Gives early data; `None` when the handshake is whole.
    pub(super) fn open(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
    ) -> Result<Option<Opened>> {
        loop {
            let early = &self.handshake.early[self.taken..];
            if !early.is_empty() {
                let n = early.len().min(plain.len());
                plain[..n].copy_from_slice(&early[..n]);
                self.taken += n;
                let whole = n == early.len();
                if whole {
                    marks.push(n);
                    self.handshake.early = Vec::new();
                    self.taken = 0;
                }
                let records = usize::from(whole);
                return Ok(Some(Opened { produced: n, records, state: OpenState::Full }));
            }
            let next = grant(incoming.data());
            self.incoming.extend(&incoming.data()[..next]);
            incoming.consume(next);
            let mut unsaid = Buffer::new();
            let outgoing = if self.ended { &mut unsaid } else { &mut *outgoing };
            match self.handshake.advance(&mut self.incoming, outgoing)? {
                Advance::Early => {}
                Advance::Done => return Ok(None),
                Advance::Waits if next > 0 => {}
                Advance::Waits => {
                    self.incoming.release();
                    return Ok(Some(Opened { produced: 0, records: 0, state: OpenState::NeedMore }));
                }
            }
        }
    }

    /// By rustls, which seals tickets with the same keys when the handshake is whole.
    pub(super) fn seal(&mut self, plain: &[u8], outgoing: &mut Buffer) -> Result<()> {
        let cannot =
            || Error::new(ErrorKind::LocalProtocol, "rustls does not seal before the handshake's end");
        if self.ended {
            return Err(misuse("the TLS connection's sending direction has ended"));
        }
        let Connection::Server(connection) = &mut self.handshake.connection else { return Err(cannot()) };
        for part in plain.chunks(MAX_RECORD) {
            let seen = &mut self.incoming.data_mut()[..self.handshake.seen];
            let UnbufferedStatus { discard: 0, state: Ok(ConnectionState::WriteTraffic(mut traffic)) } =
                connection.process_tls_records(seen)
            else {
                return Err(cannot());
            };
            let space = outgoing.reserve(part.len() + MAX_OVERHEAD);
            let written = traffic.encrypt(part, space).map_err(|_| cannot())?;
            outgoing.commit(written);
            self.sealed += 1;
        }
        Ok(())
    }

    /// The connection as any other, once [`open`](Self::open) has said that the handshake is whole.
    pub(super) fn finish(self) -> Result<Traffic> {
        let mut traffic = self.handshake.finish()?;
        if self.ended {
            traffic.end_writing();
        }
        Ok(traffic)
    }

    pub(super) fn release_idle(&mut self) {
        self.incoming.release();
    }

    /// An alert behind which nothing is sealed any more: rustls has none of them.
    pub(super) fn say_last(&mut self, message: &[u8], outgoing: &mut Buffer) -> Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let (_, suite) = self.handshake.agreed()?;
        let secrets = self.handshake.scene.as_ref().map(|scene| &scene.secrets);
        let secret = secrets.and_then(|secrets| secrets.server_traffic.as_ref()).ok_or_else(lost)?;
        let keys = DirectionKeys::from_secret(aead_of(suite)?, hash_of(suite), secret)?;
        keys.continued_at(self.sealed).seal(ALERT, message, outgoing)
    }
}

/// Keeps what has come.
pub(super) fn take_early(
    state: &mut ReadEarlyData<'_, '_, ServerConnectionData>,
    early: &mut Vec<u8>,
) -> Result<Step, rustls::Error> {
    while let Some(record) = state.next_record() {
        early.extend_from_slice(record?.payload);
    }
    Ok(Step::Early)
}

fn aead_of(suite: SupportedCipherSuite) -> Result<Aead> {
    match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => Ok(Aead::Aes128Gcm),
        CipherSuite::TLS13_AES_256_GCM_SHA384 => Ok(Aead::Aes256Gcm),
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Ok(Aead::ChaCha20Poly1305),
        _ => Err(lost()),
    }
}
