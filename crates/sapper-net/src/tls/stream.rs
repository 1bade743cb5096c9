//! TLS as a stream over a stream: one large receive, many records opened; many records sealed, one
//! write.
//!
//! An idle connection holds no buffer. Ciphertext that the carrier did not take yet is bounded by
//! what one call sealed: nothing is accepted while it waits.

use std::future::poll_fn;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::timeout;

use super::config::TlsConfig;
use super::{BoxEngine, HandshakeInfo, HandshakeProgress, MAX_RECORD, OpenState, Role};
use crate::buffer::{BLOCK, Buffer};
use crate::error::{Direction, Error, ErrorKind, Phase, Result};
use crate::stats::EndpointStats;
use crate::stream::{BoxStream, RecordMarks, Stream};

/// Ciphertext of the largest record (RFC 5246, section 6.2.3: 2,048 bytes of expansion).
const MAX_CIPHERTEXT: usize = 5 + MAX_RECORD + 2048;

/// A write stops sealing here, so that its ciphertext lies in one pooled block.
const SEAL_LIMIT: usize = BLOCK - MAX_CIPHERTEXT;

/// A peer that reads nothing does not hold up the end of a failed connection.
const ALERT_PATIENCE: Duration = Duration::from_secs(1);

const UNEXPECTED_MESSAGE: u8 = 10;

/// Which way application data may flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamDirection {
    /// Both ways.
    #[default]
    Duplex,
    /// From us only: data from the peer is its error. Alerts, tickets and key updates are handled.
    EncryptOnly,
    /// To us only: a write is ours.
    DecryptOnly,
}

/// A TLS session over any stream.
pub struct TlsStream {
    carrier: BoxStream,
    engine: BoxEngine,
    incoming: Buffer,
    outgoing: Buffer,
    /// Plaintext of a record that did not fit a small read.
    opened: Buffer,
    /// Whether `incoming` may hold a whole record.
    unopened: bool,
    reading: Reading,
    close_sent: bool,
    direction: StreamDirection,
    allow_truncation: bool,
    stats: Arc<EndpointStats>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    Open,
    /// By close_notify, or by an end that was allowed.
    Ended,
    Failed,
}

impl TlsStream {
    /// Shakes hands over `carrier`. `initial` is ciphertext that was received already. The caller
    /// sets the deadline; dropping the future closes the carrier.
    pub async fn handshake(
        carrier: BoxStream,
        config: &TlsConfig,
        role: &Role,
        initial: &[u8],
    ) -> Result<(Self, HandshakeInfo)> {
        let stats = Arc::clone(carrier.stats());
        let mut stream = Self {
            engine: config.engine(role)?,
            carrier,
            incoming: Buffer::new(),
            outgoing: Buffer::new(),
            opened: Buffer::new(),
            unopened: false,
            reading: Reading::Open,
            close_sent: false,
            direction: StreamDirection::Duplex,
            allow_truncation: config.allows_truncation(),
            stats,
        };
        if !initial.is_empty() {
            stream.incoming.extend(initial);
        }
        let info = stream.shake_hands().await.map_err(|error| error.with_phase(Phase::Handshake))?;
        stream.unopened = !stream.incoming.is_empty();
        stream.incoming.release();
        stream.outgoing.release();
        Ok((stream, info))
    }

    async fn shake_hands(&mut self) -> Result<HandshakeInfo> {
        loop {
            let progress = self.engine.handshake(&mut self.incoming, &mut self.outgoing);
            // A failure's alert goes out too, but its cause is what counts.
            match progress {
                Ok(HandshakeProgress::Done(info)) => {
                    poll_fn(|cx| self.poll_flush(cx)).await?;
                    return Ok(*info);
                }
                Ok(HandshakeProgress::NeedMore) => poll_fn(|cx| self.poll_flush(cx)).await?,
                Err(error) => {
                    let _ = timeout(ALERT_PATIENCE, poll_fn(|cx| self.poll_flush(cx))).await;
                    return Err(error);
                }
            }
            if poll_fn(|cx| self.poll_receive(cx)).await? == 0 {
                return Err(Error::new(
                    ErrorKind::ConnectionLost,
                    "the peer closed during the TLS handshake",
                )
                .with_reason("truncated"));
            }
        }
    }

    /// Which way application data may flow from now on.
    pub fn set_direction(&mut self, direction: StreamDirection) {
        self.direction = direction;
    }

    /// New keys for our direction (TLS 1.3); they are in use from the next record on.
    pub fn update_keys(&mut self) -> Result<()> {
        self.engine.update_keys(&mut self.outgoing)
    }

    /// Keying material for a purpose (RFC 5705; RFC 8446, section 7.5).
    pub fn export_keying_material(
        &mut self,
        label: &str,
        context: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<()> {
        self.engine.export_keying_material(label, context, out)
    }

    /// What the carrier had behind the peer's close_notify: the beginning of another protocol.
    pub fn unused_data(&mut self) -> Vec<u8> {
        if self.reading != Reading::Ended {
            return Vec::new();
        }
        let unused = self.incoming.data().to_vec();
        self.incoming.consume(unused.len());
        self.incoming.release();
        unused
    }

    /// Ends the session with a fatal alert. Waits a second at most for the carrier to take it.
    pub async fn abort(&mut self, alert: u8) {
        self.engine.fatal_alert(alert, &mut self.outgoing);
        self.reading = Reading::Failed;
        let _ = timeout(ALERT_PATIENCE, poll_fn(|cx| self.poll_flush(cx))).await;
    }

    /// What it runs over.
    pub fn carrier(&mut self) -> &mut dyn Stream {
        self.carrier.as_mut()
    }

    /// Receives once, as much as is there and fits; 0 is the carrier's end.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
        ready!(self.carrier.poll_readable(cx))?;
        let room = self.incoming.reserve(MAX_CIPHERTEXT);
        let n = ready!(self.carrier.poll_read(cx, room, &mut RecordMarks::ignored()))?;
        self.incoming.commit(n);
        Poll::Ready(Ok(n))
    }

    /// Opens records into `buf`; `None` when more ciphertext is needed.
    fn open(&mut self, buf: &mut [u8], marks: &mut RecordMarks) -> Result<Option<usize>> {
        let opened = self.engine.open(&mut self.incoming, buf, marks, &mut self.outgoing)?;
        self.unopened = opened.state == OpenState::Full;
        self.stats.records_received.add(opened.records as u64);
        if opened.state == OpenState::Closed {
            self.reading = Reading::Ended;
        }
        if opened.produced > 0 && self.direction == StreamDirection::EncryptOnly {
            self.engine.fatal_alert(UNEXPECTED_MESSAGE, &mut self.outgoing);
            return Err(Error::new(
                ErrorKind::RemoteProtocol,
                "the peer sent application data on a connection that only encrypts",
            )
            .with_alert(UNEXPECTED_MESSAGE)
            .with_direction(Direction::Decapsulate));
        }
        match opened.state {
            _ if opened.produced > 0 => Ok(Some(opened.produced)),
            OpenState::Closed => Ok(Some(0)),
            OpenState::NeedMore => Ok(None),
            // A record that is larger than `buf`: it is opened whole and given out in parts.
            OpenState::Full => {
                let room = self.opened.reserve(MAX_RECORD);
                let whole = self.engine.open(
                    &mut self.incoming,
                    &mut room[..MAX_RECORD],
                    marks,
                    &mut self.outgoing,
                )?;
                self.opened.commit(whole.produced);
                self.stats.records_received.add(whole.records as u64);
                self.unopened = whole.state == OpenState::Full;
                if whole.state == OpenState::Closed {
                    self.reading = Reading::Ended;
                }
                Ok(Some(self.take_opened(buf)))
            }
        }
    }

    fn take_opened(&mut self, buf: &mut [u8]) -> usize {
        let n = self.opened.len().min(buf.len());
        buf[..n].copy_from_slice(&self.opened.data()[..n]);
        self.opened.consume(n);
        self.opened.release();
        n
    }

    /// Hands sealed records to the carrier; ready when none are left.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        while !self.outgoing.is_empty() {
            let n = ready!(self.carrier.poll_write(cx, &[IoSlice::new(self.outgoing.data())]))?;
            self.outgoing.consume(n);
        }
        self.outgoing.release();
        Poll::Ready(Ok(()))
    }

    fn seal(&mut self, plain: &[u8]) -> Result<()> {
        self.engine.seal(plain, &mut self.outgoing)?;
        self.stats.records_sent.add(plain.len().div_ceil(MAX_RECORD) as u64);
        Ok(())
    }
}

impl Stream for TlsStream {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        marks: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        if !self.opened.is_empty() {
            return Poll::Ready(Ok(self.take_opened(buf)));
        }
        loop {
            match self.reading {
                Reading::Ended => return Poll::Ready(Ok(0)),
                Reading::Failed => {
                    return Poll::Ready(Err(Error::new(
                        ErrorKind::Closed,
                        "the TLS session has failed already",
                    )));
                }
                Reading::Open => {}
            }
            if self.unopened {
                match self.open(buf, marks) {
                    Ok(Some(n)) => return Poll::Ready(Ok(n)),
                    Ok(None) => {}
                    Err(error) => {
                        self.reading = Reading::Failed;
                        let _ = self.poll_drain(cx);
                        return Poll::Ready(Err(error));
                    }
                }
            }
            // Answers to the peer (alerts, key updates) must not wait for the next write.
            if !self.outgoing.is_empty() {
                let _ = self.poll_drain(cx)?;
            }
            let received = self.poll_receive(cx);
            if self.incoming.is_empty() {
                self.incoming.release();
            }
            if ready!(received)? > 0 {
                self.unopened = true;
                continue;
            }
            if self.allow_truncation && self.incoming.is_empty() {
                self.reading = Reading::Ended;
                continue;
            }
            self.reading = Reading::Failed;
            return Poll::Ready(Err(Error::new(
                ErrorKind::ConnectionLost,
                "the connection ended without the peer's close_notify: data may be missing",
            )
            .with_reason("truncated")));
        }
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.unopened || !self.opened.is_empty() || self.reading != Reading::Open {
            return Poll::Ready(Ok(()));
        }
        self.carrier.poll_readable(cx)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        if self.close_sent {
            return Poll::Ready(Err(Error::new(
                ErrorKind::Closed,
                "written after the end of the TLS stream",
            )));
        }
        if self.direction == StreamDirection::DecryptOnly {
            return Poll::Ready(Err(Error::new(
                ErrorKind::LocalProtocol,
                "application data was written to a connection that only decrypts",
            )
            .with_direction(Direction::Encapsulate)));
        }
        ready!(self.poll_drain(cx))?;
        let mut taken = 0;
        for slice in slices {
            let room = SEAL_LIMIT.saturating_sub(self.outgoing.len());
            if slice.len() > room {
                if slice.len() > MAX_RECORD && room >= MAX_RECORD {
                    let part = room / MAX_RECORD * MAX_RECORD;
                    self.seal(&slice[..part])?;
                    taken += part;
                }
                break;
            }
            if !slice.is_empty() {
                self.seal(slice)?;
            }
            taken += slice.len();
        }
        // What the carrier does not take now goes first in the next call.
        if let Poll::Ready(Err(error)) = self.poll_drain(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(self.poll_drain(cx))?;
        self.carrier.poll_flush(cx)
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if !self.close_sent {
            self.close_sent = true;
            if self.reading != Reading::Failed {
                self.engine.close_notify(&mut self.outgoing)?;
            }
        }
        ready!(self.poll_drain(cx))?;
        self.carrier.poll_send_eof(cx)
    }

    fn reset(&mut self, code: u64) {
        self.close_sent = true;
        self.carrier.reset(code);
    }

    fn stop(&mut self, code: u64) {
        self.reading = Reading::Ended;
        self.carrier.stop(code);
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.carrier.as_fd()
    }

    fn release_idle(&mut self) {
        self.incoming.release();
        self.outgoing.release();
        self.engine.release_idle();
        self.carrier.release_idle();
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        format!("tls ({}) over {}", self.engine.name(), self.carrier.describe())
    }

    fn tls_mut(&mut self) -> Option<&mut TlsStream> {
        Some(self)
    }

    fn peer_address(&self) -> Option<std::net::SocketAddr> {
        self.carrier.peer_address()
    }
}
