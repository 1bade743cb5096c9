//! [`TlsStream`]: a stream of records over another stream.
//!
//! One large receive, many records opened, straight into the reader's buffer; each slice that is
//! written becomes a record of its own, and one call is one write to the carrier. Buffers come from
//! the pool when there are bytes for them and go back when there are none.
//!
//! What is not here: whether a peer is welcome beyond its certificate (the session asks for that
//! after the handshake), and framing.

mod as_stream;

use std::future::poll_fn;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::time::{Sleep, sleep, timeout};

use super::capture::Flow;
use super::config::TlsConfig;
use super::early_data::{EarlyData, EarlyOutcome};
use super::failure::alert;
use super::{
    BoxEngine, HandshakeInfo, HandshakeProgress, MAX_RECORD, OpenState, Opened, Role, blocking, greeting,
};
use crate::buffer::{BLOCK, Buffer};
use crate::error::{Direction, Error, ErrorKind, Phase, Result};
use crate::stats::EndpointStats;
use crate::stream::{BoxStream, RecordMarks, Stream};

/// What a record adds at most, OpenSSL's CBC records included.
const RECORD_OVERHEAD: usize = 128;
/// Room that surely takes one record with what is cut off behind it.
const ONE_RECORD: usize = MAX_RECORD + 2048;
/// Answers (key updates, refusals) that may wait while we read on: a peer that asks and does not
/// take the answers waits then.
const MAX_ANSWERS: usize = 16 * 1024;
/// How long a last alert may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a client that has sent early data may take for the rest of its handshake.
const CONFIRMATION: Duration = Duration::from_secs(30);
/// How long we listen to who does not speak TLS, for a better error message.
const MORE_OF_A_STRANGER: Duration = Duration::from_millis(20);

/// Which way application data may go. Alerts, tickets and key updates are handled in every case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamDirection {
    /// Both ways.
    #[default]
    Duplex,
    /// To the peer only: data from it is an error.
    EncryptOnly,
    /// From the peer only: writing is an error.
    DecryptOnly,
}

/// Hears whether a client has finished the handshake.
pub type OnConfirmed = Box<dyn FnOnce(Result<()>) + Send>;

/// While a client has sent early data and not finished the handshake.
struct Unconfirmed {
    deadline: Pin<Box<Sleep>>,
    waiting: Vec<OnConfirmed>,
}

impl Drop for Unconfirmed {
    fn drop(&mut self) {
        for tell in self.waiting.drain(..) {
            let text = "the connection ended before the client had finished the handshake";
            tell(Err(Error::new(ErrorKind::Closed, text)));
        }
    }
}

/// A TLS connection over a stream.
pub struct TlsStream {
    engine: BoxEngine,
    carrier: BoxStream,
    /// Ciphertext that was received.
    incoming: Buffer,
    /// Plaintext that was opened for a reader whose buffer was too small for a record.
    plain: Buffer,
    plain_taken: usize,
    plain_marks: Option<RecordMarks>,
    /// Whether opening `incoming` may give something.
    unopened: bool,
    /// Ciphertext that is still to be sent.
    outgoing: Buffer,
    /// How much of it answers what the peer sent.
    answers: usize,
    version: &'static str,
    /// Our place in a capture, where the user wants one.
    captured: Option<Box<Flow>>,
    /// The carrier's, with the records.
    stats: Arc<EndpointStats>,
    direction: StreamDirection,
    /// It is a sink's: what it reads is on its way to the network.
    turned: bool,
    allow_truncation: bool,
    /// The peer has ended its direction, or we do not read any more.
    read_ended: bool,
    /// We have ended our direction.
    write_ended: bool,
    /// The end of the connection, told to whoever calls.
    failed: Option<Error>,
    /// The end of our sending direction only; what the peer has sent can still be read.
    write_failed: Option<Error>,
    /// How much of `outgoing` ends with payload; what lies behind it is TLS's own.
    payload_waits: usize,
    /// The client's Finished has not come.
    unfinished: Option<Box<Unconfirmed>>,
}

impl TlsStream {
    /// Shakes hands over `carrier`. `initial` is ciphertext that was received already. The caller sets
    /// the deadline; dropping the future ends everything, the carrier included.
    pub async fn handshake(
        carrier: BoxStream,
        config: &TlsConfig,
        role: &Role,
        initial: &[u8],
    ) -> Result<(Self, HandshakeInfo)> {
        Self::handshake_with_early_data(carrier, config, role, initial, None).await
    }

    /// The same, of a client that has something to say before the handshake, where there is a session that
    /// allows it; [`HandshakeInfo::early_data`] tells what became of it.
    ///
    /// A server that takes early data (its configuration says so) is done when some has come: the client has
    /// not finished the handshake then, see [`when_confirmed`](Self::when_confirmed).
    pub async fn handshake_with_early_data(
        carrier: BoxStream,
        config: &TlsConfig,
        role: &Role,
        initial: &[u8],
        early: Option<&EarlyData>,
    ) -> Result<(Self, HandshakeInfo)> {
        let is_client = matches!(role, Role::Client { .. });
        let captured = config.captured(is_client, carrier.local_address(), carrier.peer_address())?;
        let mut stream = Self {
            engine: match early {
                Some(early) => config.engine_with_early_data(role, &early.bytes)?,
                None => config.engine(role)?,
            },
            captured,
            stats: Arc::clone(carrier.stats()),
            carrier,
            incoming: Buffer::new(),
            plain: Buffer::new(),
            plain_taken: 0,
            plain_marks: None,
            unopened: false,
            outgoing: Buffer::new(),
            answers: 0,
            version: "TLS",
            direction: StreamDirection::Duplex,
            turned: false,
            allow_truncation: config.allows_truncation(),
            read_ended: false,
            write_ended: false,
            failed: None,
            write_failed: None,
            payload_waits: 0,
            unfinished: None,
        };
        if !initial.is_empty() {
            stream.incoming.extend(initial);
            stream.note_received(initial.len());
        }
        match stream.shake_hands(is_client, config.may_block(role)).await {
            Ok(info) => {
                if let Some(early) = early {
                    stream.send_rest(early, info.early_data).await.map_err(Error::in_handshake)?;
                }
                Ok((stream, info))
            }
            Err(error) => {
                stream.last_words().await;
                Err(error.in_handshake())
            }
        }
    }

    /// What could not be said early. It fits what may wait to be sent.
    async fn send_rest(&mut self, early: &EarlyData, outcome: Option<EarlyOutcome>) -> Result<()> {
        let mut rest = early.rest(outcome);
        while !rest.is_empty() {
            let n = poll_fn(|cx| self.poll_write(cx, &[IoSlice::new(rest)])).await?;
            rest = &rest[n..];
        }
        Ok(())
    }

    /// An alert, and the end behind it: a carrier that is dropped unended may throw away what it was given. What
    /// does not leave in time is not worth a longer wait.
    async fn last_words(&mut self) {
        let said = async {
            poll_fn(|cx| self.poll_drain(cx)).await?;
            poll_fn(|cx| self.carrier.poll_send_eof(cx)).await
        };
        let _ = timeout(LAST_WORDS, said).await;
    }

    async fn shake_hands(&mut self, is_client: bool, may_block: bool) -> Result<HandshakeInfo> {
        let mut greeted = false;
        let mut lost = None;
        loop {
            if !greeted {
                greeted = self.check_greeting(is_client).await?;
            }
            let progress = if may_block {
                // Boxed: who does not need it does not carry it.
                Box::pin(blocking::handshake(&mut self.engine, &mut self.incoming, &mut self.outgoing)).await
            } else {
                self.engine.handshake(&mut self.incoming, &mut self.outgoing)
            };
            if let Some(flow) = &mut self.captured {
                flow.explained(matches!(progress, Ok(HandshakeProgress::Done(_))));
            }
            match progress? {
                HandshakeProgress::Done(info) => {
                    self.version = info.version;
                    // All that a server still sends in TLS 1.3 is tickets: the peer may read them when it
                    // likes, and one that has said everything and closed does not want them.
                    let only_tickets = !is_client && info.version == "TLSv1.3";
                    poll_fn(|cx| match self.poll_drain(cx) {
                        Poll::Pending | Poll::Ready(Err(_)) if only_tickets => Poll::Ready(Ok(())),
                        drained => drained,
                    })
                    .await?;
                    self.write_failed = None;
                    self.unopened = !self.incoming.is_empty();
                    if !self.engine.is_confirmed() {
                        self.unopened = true;
                        let deadline = Box::pin(sleep(CONFIRMATION));
                        self.unfinished = Some(Box::new(Unconfirmed { deadline, waiting: Vec::new() }));
                    }
                    self.incoming.release();
                    return Ok(*info);
                }
                HandshakeProgress::NeedMore => {
                    match poll_fn(|cx| self.poll_drain(cx)).await {
                        Err(error) if error.kind() == ErrorKind::ConnectionLost => lost = Some(error),
                        drained => drained?,
                    }
                    let received = poll_fn(|cx| self.poll_receive(cx));
                    let received = match &lost {
                        None => received.await?,
                        // Why it is lost may have come before our flight met the closed connection.
                        Some(error) => match timeout(LAST_WORDS, received).await {
                            Ok(Ok(n @ 1..)) => n,
                            _ => return Err(error.clone()),
                        },
                    };
                    if received == 0 {
                        let how = if greeted { "during" } else { "before it said anything in" };
                        return Err(Error::new(
                            ErrorKind::ConnectionLost,
                            format!("the peer closed the connection {how} the TLS handshake"),
                        )
                        .with_reason("truncated")
                        .with_direction(Direction::Decapsulate));
                    }
                }
            }
        }
    }

    async fn check_greeting(&mut self, is_client: bool) -> Result<bool> {
        let error = match greeting::check(self.incoming.data(), is_client) {
            Ok(greeted) => return Ok(greeted),
            Err(error) => error,
        };
        // The first receive may have brought a byte or two; what is there by now tells people more.
        if self.incoming.len() >= 8 {
            return Err(error);
        }
        match timeout(MORE_OF_A_STRANGER, poll_fn(|cx| self.poll_receive(cx))).await {
            Ok(Ok(1..)) => greeting::check(self.incoming.data(), is_client),
            _ => Err(error),
        }
    }

    /// Limits application data to one direction.
    pub fn set_direction(&mut self, direction: StreamDirection) {
        self.direction = direction;
    }

    /// It is a sink's: its errors say so.
    pub fn turn(&mut self) {
        self.turned = true;
    }

    /// New keys for our direction (TLS 1.3). [`poll_flush`](Stream::poll_flush) sends the message;
    /// otherwise it goes out with the next data.
    pub fn update_keys(&mut self) -> Result<()> {
        self.check_failed()?;
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

    /// Tells when the client has finished the handshake: at once, unless it has begun with early data, which
    /// somebody may have recorded elsewhere.
    pub fn when_confirmed(&mut self, tell: OnConfirmed) {
        match (&mut self.unfinished, &self.failed) {
            (_, Some(error)) => tell(Err(error.clone())),
            (Some(unfinished), None) => unfinished.waiting.push(tell),
            (None, None) => tell(Ok(())),
        }
    }

    fn tell_confirmed(&mut self, outcome: &Result<()>) {
        for tell in self.unfinished.take().into_iter().flat_map(|mut one| std::mem::take(&mut one.waiting)) {
            tell(outcome.clone());
        }
    }

    /// Whether the client has let the time for the rest of its handshake pass.
    fn poll_too_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.unfinished {
            Some(unfinished) => unfinished.deadline.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }

    /// Ends the session with a fatal alert (a policy said no).
    pub async fn abort(&mut self, alert: u8) {
        self.fatal_alert(alert);
        self.last_words().await;
    }

    /// The same without waiting: it is sent as far as the carrier takes it now, and
    /// [`poll_flush`](Stream::poll_flush) sends the rest.
    pub fn fatal_alert(&mut self, alert: u8) {
        self.engine.fatal_alert(alert, &mut self.outgoing);
        self.write_ended = true;
        self.read_ended = true;
        let _ = self.poll_drain(&mut Context::from_waker(Waker::noop()));
    }

    /// What the carrier had behind the peer's close_notify: the beginning of another protocol.
    pub fn unused_data(&mut self) -> Vec<u8> {
        if !self.read_ended {
            return Vec::new();
        }
        let unused = self.incoming.data().to_vec();
        self.incoming.consume(unused.len());
        self.incoming.release();
        unused
    }

    /// Ready when the peer has ended its direction, or the connection has failed, where nobody reads
    /// yet. What comes before the end waits for the reader; behind a record of it nothing is seen.
    pub fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        loop {
            if let Some(error) = &self.failed {
                return Poll::Ready(Err(error.clone()));
            }
            if !self.plain.is_empty() {
                return Poll::Pending;
            }
            if self.read_ended {
                return Poll::Ready(Ok(()));
            }
            if !self.outgoing.is_empty() {
                let drained = self.poll_drain(cx);
                if self.answers > MAX_ANSWERS {
                    let _ = ready!(drained);
                }
            }
            if self.unopened {
                self.open_aside(cx)?;
                continue;
            }
            match ready!(self.poll_receive(cx)) {
                Ok(0) => ready!(self.truncated(cx)).map(|_| ())?,
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(self.fail(cx, error))),
            }
        }
    }

    /// Whether it has ended with an error, its own or the carrier's.
    pub fn has_failed(&self) -> bool {
        self.check_failed().is_err()
    }

    /// What it runs over.
    pub fn carrier(&mut self) -> &mut dyn Stream {
        self.carrier.as_mut()
    }

    fn check_failed(&self) -> Result<()> {
        self.failed.as_ref().or(self.write_failed.as_ref()).map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Remembers the end, and lets the alert go out as far as the carrier takes it.
    fn fail(&mut self, cx: &mut Context<'_>, error: Error) -> Error {
        let error = self.seen_from_here(error.with_phase(Phase::Transfer));
        self.failed = Some(error.clone());
        self.tell_confirmed(&Err(error.clone()));
        self.write_ended = true;
        let _ = self.poll_drain(cx);
        error
    }

    fn seen_from_here(&self, error: Error) -> Error {
        if self.turned { error.turned() } else { error }
    }

    /// One receive into what is free; 0 is the carrier's end.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
        // What waits is less than a record; moved to the front, the rest of the block is free.
        let want = BLOCK - self.incoming.len().min(BLOCK / 2);
        let space = self.incoming.reserve(want);
        let result = self.carrier.poll_read(cx, space, &mut RecordMarks::ignored());
        match result {
            Poll::Ready(Ok(n)) => {
                self.incoming.commit(n);
                self.note_received(n);
                self.unopened |= n > 0;
                Poll::Ready(Ok(n))
            }
            other => {
                self.incoming.release();
                other
            }
        }
    }

    /// The last `n` bytes of what is there have just come.
    fn note_received(&mut self, n: usize) {
        if let Some(flow) = &mut self.captured {
            let there = self.incoming.data();
            flow.received(&there[there.len() - n..]);
        }
    }

    /// Ready when nothing waits to be sent.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        while !self.outgoing.is_empty() {
            let result = self.carrier.poll_write(cx, &[IoSlice::new(self.outgoing.data())]);
            match ready!(result) {
                Ok(n) => {
                    if let Some(flow) = &mut self.captured {
                        flow.sent(&self.outgoing.data()[..n]);
                    }
                    self.outgoing.consume(n);
                    self.payload_waits = self.payload_waits.saturating_sub(n);
                }
                Err(error) => {
                    self.outgoing.consume(self.outgoing.len());
                    self.outgoing.release();
                    self.write_failed = Some(error.clone());
                    return Poll::Ready(Err(error));
                }
            }
        }
        self.answers = 0;
        self.outgoing.release();
        Poll::Ready(Ok(()))
    }

    /// Opens what is there into `buf`; `Ok(None)` asks for more ciphertext.
    fn open(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        marks: &mut RecordMarks,
    ) -> Result<Option<usize>> {
        while self.unopened {
            let opened = self.open_into(cx, buf, marks)?;
            if opened.produced > 0 {
                return Ok(Some(opened.produced));
            }
            match opened.state {
                OpenState::NeedMore => return Ok(None),
                OpenState::Closed => return Ok(Some(0)),
                OpenState::Full => {}
            }
            // The reader's buffer is smaller than the next record.
            let opened = self.open_aside(cx)?;
            if opened.produced > 0 {
                return Ok(Some(self.take_plain(buf, marks)));
            }
            if opened.state == OpenState::Closed {
                return Ok(Some(0));
            }
        }
        Ok(None)
    }

    /// Opens a record for a later reader.
    fn open_aside(&mut self, cx: &mut Context<'_>) -> Result<Opened> {
        let mut plain = std::mem::take(&mut self.plain);
        let mut plain_marks = self.plain_marks.take().unwrap_or_else(RecordMarks::wanted);
        plain_marks.clear();
        let space = &mut plain.reserve(ONE_RECORD)[..ONE_RECORD];
        let result = self.open_into(cx, space, &mut plain_marks);
        plain.commit(result.as_ref().map_or(0, |opened| opened.produced));
        plain.release();
        self.plain = plain;
        self.plain_marks = Some(plain_marks);
        self.plain_taken = 0;
        result
    }

    /// One call of the engine, with what follows from its result.
    fn open_into(
        &mut self,
        cx: &mut Context<'_>,
        plain: &mut [u8],
        marks: &mut RecordMarks,
    ) -> Result<Opened> {
        let before = self.outgoing.len();
        let result = self.engine.open(&mut self.incoming, plain, marks, &mut self.outgoing);
        self.answers += self.outgoing.len() - before;
        let opened = result.map_err(|error| self.fail(cx, error))?;
        self.unopened = opened.state == OpenState::Full;
        if self.unfinished.is_some() && self.engine.is_confirmed() {
            self.tell_confirmed(&Ok(()));
        }
        self.read_ended |= opened.state == OpenState::Closed;
        self.stats.records_received.add(opened.records as u64);
        if opened.produced > 0 {
            self.check_incoming_data(cx)?;
        }
        Ok(opened)
    }

    fn check_incoming_data(&mut self, cx: &mut Context<'_>) -> Result<()> {
        if self.direction != StreamDirection::EncryptOnly {
            return Ok(());
        }
        self.engine.fatal_alert(alert::UNEXPECTED_MESSAGE, &mut self.outgoing);
        let error = Error::new(
            ErrorKind::RemoteProtocol,
            "the peer sent application data over a connection that only encrypts",
        )
        .with_alert(alert::UNEXPECTED_MESSAGE)
        .with_direction(Direction::Decapsulate);
        Err(self.fail(cx, error))
    }

    fn take_plain(&mut self, buf: &mut [u8], marks: &mut RecordMarks) -> usize {
        let n = self.plain.len().min(buf.len());
        buf[..n].copy_from_slice(&self.plain.data()[..n]);
        self.plain.consume(n);
        let (from, to) = (self.plain_taken, self.plain_taken + n);
        for &end in self.plain_marks.iter().flat_map(RecordMarks::ends) {
            let end = end as usize;
            if end > from && end <= to {
                marks.push(end - from);
            }
        }
        self.plain_taken = to;
        if self.plain.is_empty() {
            self.plain.release();
        }
        n
    }

    fn truncated(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
        self.read_ended = true;
        // A record that was cut off is no orderly end, whatever was allowed.
        if self.allow_truncation && self.incoming.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.incoming.consume(self.incoming.len());
        self.incoming.release();
        let error = Error::new(
            ErrorKind::ConnectionLost,
            "the peer's end came without close_notify: what it sent may have been cut off",
        )
        .with_reason("truncated")
        .with_direction(Direction::Decapsulate);
        Poll::Ready(Err(self.fail(cx, error)))
    }
}
