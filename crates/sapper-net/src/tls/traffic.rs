//! A TLS connection after its handshake, for both engines: application data, alerts, tickets, key
//! updates, refused renegotiation.
//!
//! The libraries do handshakes; the records that follow are ours. rustls allocates for each record
//! in both directions and OpenSSL spends a third of a microsecond around each AEAD call; here a
//! record is opened straight into the caller's buffer and sealed straight out of it.

use std::time::Instant;

use zeroize::Zeroizing;

use super::failure::{self, alert, misuse, peer_misbehaved};
use super::fruitless::Fruitless;
use super::key_schedule::{Exporter, Hash, next_traffic_secret};
use super::options::TlsVersion;
use super::record::{ALERT, APPLICATION_DATA, Aead, DirectionKeys, HANDSHAKE};
use super::{MAX_RECORD, OpenState, Opened};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::stream::RecordMarks;

/// Handshake messages (RFC 8446, section 4; RFC 5246, section 7.4).
const HELLO_REQUEST: u8 = 0;
const CLIENT_HELLO: u8 = 1;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Largest message after the handshake: a ticket of 65,535 bytes, and what is around it.
const MAX_MESSAGE: usize = 65_535 + 1024;
/// Tickets that are kept; a client needs one at a time.
const MAX_TICKETS: u8 = 4;

/// Takes the body of a NewSessionTicket.
pub(crate) type TicketSink = Box<dyn FnMut(&[u8]) -> Result<()> + Send>;

/// TLS 1.3: secrets from which the next keys follow.
pub(crate) struct TrafficSecrets {
    pub(crate) seal: Zeroizing<Vec<u8>>,
    pub(crate) open: Zeroizing<Vec<u8>>,
}

/// What a handshake hands over.
pub(crate) struct TrafficParts {
    pub(crate) version: TlsVersion,
    pub(crate) is_client: bool,
    pub(crate) aead: Aead,
    pub(crate) hash: Hash,
    pub(crate) seal: DirectionKeys,
    pub(crate) open: DirectionKeys,
    pub(crate) secrets: Option<TrafficSecrets>,
    pub(crate) exporter: Exporter,
    pub(crate) tickets: Option<TicketSink>,
    /// Largest plaintext that the peer takes in one record.
    pub(crate) max_plain: usize,
}

/// A connection that moves data.
pub(crate) struct Traffic {
    parts: TrafficParts,
    /// Handshake message of which more fragments are to come.
    partial: Vec<u8>,
    fruitless: Fruitless,
    tickets_seen: u8,
    /// We asked for new keys of the peer's and it has not answered.
    update_requested: bool,
    /// The keys that we seal with are not the handshake's any more.
    updated: bool,
    read_closed: bool,
    write_closed: bool,
    failed: bool,
    /// An error that came behind data; the next call gets it.
    pending: Option<Error>,
}

impl Traffic {
    pub(crate) fn new(parts: TrafficParts) -> Self {
        Self {
            parts,
            partial: Vec::new(),
            fruitless: Fruitless::default(),
            tickets_seen: 0,
            update_requested: false,
            updated: false,
            read_closed: false,
            write_closed: false,
            failed: false,
            pending: None,
        }
    }

    pub(crate) fn open(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
    ) -> Result<Opened> {
        if let Some(error) = self.pending.take() {
            return Err(error);
        }
        if self.failed {
            return Err(misuse("the TLS connection failed before"));
        }
        let mut opened = Opened { produced: 0, records: 0, state: OpenState::NeedMore };
        match self.open_records(incoming, plain, marks, outgoing, &mut opened) {
            Ok(state) => {
                opened.state = state;
                Ok(opened)
            }
            Err(error) => {
                self.failed = true;
                if let (Some(description), false) = (error.alert(), error.alert_received()) {
                    self.fatal_alert(description, outgoing);
                }
                self.write_closed = true;
                if opened.produced == 0 {
                    return Err(error);
                }
                self.pending = Some(error);
                opened.state = OpenState::Full;
                Ok(opened)
            }
        }
    }

    fn open_records(
        &mut self,
        incoming: &mut Buffer,
        plain: &mut [u8],
        marks: &mut RecordMarks,
        outgoing: &mut Buffer,
        opened: &mut Opened,
    ) -> Result<OpenState> {
        loop {
            if self.read_closed {
                return Ok(OpenState::Closed);
            }
            let Some(size) = self.parts.open.find(incoming.data())? else {
                return Ok(OpenState::NeedMore);
            };
            let record = &incoming.data()[..size];
            let room = &mut plain[opened.produced..];
            if room.len() < self.parts.open.room(record) {
                return Ok(OpenState::Full);
            }
            let (content_type, n) = self.parts.open.open(record, room)?;
            if content_type == APPLICATION_DATA && n > 0 && self.partial.is_empty() {
                incoming.consume(size);
                opened.produced += n;
                opened.records += 1;
                marks.push(opened.produced);
                self.fruitless.data();
                if self.parts.open.wants_rekey() && !self.update_requested {
                    self.request_update(outgoing)?;
                }
                continue;
            }
            // The rest is rare and small; what it holds must not stay in the caller's buffer.
            let content = Zeroizing::new(room[..n].to_vec());
            room[..n].fill(0);
            self.control(content_type, &content, outgoing)?;
            incoming.consume(size);
        }
    }

    /// Everything that is not application data.
    fn control(&mut self, content_type: u8, content: &[u8], outgoing: &mut Buffer) -> Result<()> {
        if !self.fruitless.one_more(Instant::now()) {
            return Err(peer_misbehaved(
                alert::UNEXPECTED_MESSAGE,
                "the peer sends records without data and does not stop",
            ));
        }
        if content_type != HANDSHAKE && !self.partial.is_empty() {
            return Err(peer_misbehaved(
                alert::UNEXPECTED_MESSAGE,
                "another record came in the middle of a handshake message",
            ));
        }
        match content_type {
            APPLICATION_DATA => Ok(()),
            ALERT => self.alert(content),
            HANDSHAKE => self.handshake_fragment(content, outgoing),
            other => Err(peer_misbehaved(
                alert::UNEXPECTED_MESSAGE,
                format!("a record of type {other} is not allowed after the handshake"),
            )),
        }
    }

    fn alert(&mut self, content: &[u8]) -> Result<()> {
        let &[level, description] = content else {
            return Err(peer_misbehaved(alert::DECODE_ERROR, "an alert has two bytes, this one has not"));
        };
        if description == alert::CLOSE_NOTIFY {
            self.read_closed = true;
            return Ok(());
        }
        let warning = match self.parts.version {
            TlsVersion::V1_3 => description == alert::USER_CANCELED,
            TlsVersion::V1_2 => level == 1,
        };
        if warning { Ok(()) } else { Err(failure::alert_in_traffic(description)) }
    }

    /// Messages may be split over records, and a record may hold several.
    fn handshake_fragment(&mut self, content: &[u8], outgoing: &mut Buffer) -> Result<()> {
        if content.is_empty() && self.parts.version == TlsVersion::V1_3 {
            return Err(peer_misbehaved(alert::UNEXPECTED_MESSAGE, "a handshake record is empty"));
        }
        if self.partial.len() + content.len() > MAX_MESSAGE {
            return Err(peer_misbehaved(alert::DECODE_ERROR, "a handshake message is too large"));
        }
        let mut joined = std::mem::take(&mut self.partial);
        let mut rest = if joined.is_empty() {
            content
        } else {
            joined.extend_from_slice(content);
            &joined[..]
        };
        while let Some((&[kind, a, b, c], body)) = rest.split_first_chunk::<4>() {
            let len = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if len > MAX_MESSAGE {
                return Err(peer_misbehaved(alert::DECODE_ERROR, "a handshake message is too large"));
            }
            let Some((body, after)) = body.split_at_checked(len) else { break };
            self.handshake_message(kind, body, after.is_empty(), outgoing)?;
            rest = after;
        }
        self.partial = rest.to_vec();
        Ok(())
    }

    fn handshake_message(
        &mut self,
        kind: u8,
        body: &[u8],
        last_in_record: bool,
        outgoing: &mut Buffer,
    ) -> Result<()> {
        match (self.parts.version, self.parts.is_client, kind) {
            (TlsVersion::V1_3, true, NEW_SESSION_TICKET) => self.ticket(body),
            (TlsVersion::V1_3, _, KEY_UPDATE) => {
                if !last_in_record {
                    return Err(peer_misbehaved(
                        alert::UNEXPECTED_MESSAGE,
                        "a key update must be the last message of its record",
                    ));
                }
                match body {
                    [0] => self.peer_updates(false, outgoing),
                    [1] => self.peer_updates(true, outgoing),
                    [_] => {
                        Err(peer_misbehaved(alert::ILLEGAL_PARAMETER, "a key update asks for the unknown"))
                    }
                    _ => Err(peer_misbehaved(
                        alert::DECODE_ERROR,
                        "a key update has one byte, this one has not",
                    )),
                }
            }
            (TlsVersion::V1_2, true, HELLO_REQUEST) | (TlsVersion::V1_2, false, CLIENT_HELLO) => {
                // Renegotiation is not done; the warning lets the peer decide whether it goes on.
                if !self.write_closed {
                    self.parts.seal.seal(ALERT, &[1, alert::NO_RENEGOTIATION], outgoing)?;
                }
                Ok(())
            }
            _ => Err(peer_misbehaved(
                alert::UNEXPECTED_MESSAGE,
                format!("a handshake message of type {kind} is not allowed after the handshake"),
            )),
        }
    }

    fn ticket(&mut self, body: &[u8]) -> Result<()> {
        self.tickets_seen = self.tickets_seen.saturating_add(1);
        if let Some(sink) = &mut self.parts.tickets {
            sink(body)?;
        }
        if self.tickets_seen >= MAX_TICKETS {
            self.parts.tickets = None;
        }
        Ok(())
    }

    fn peer_updates(&mut self, answer: bool, outgoing: &mut Buffer) -> Result<()> {
        let (aead, hash) = (self.parts.aead, self.parts.hash);
        let Some(secrets) = &mut self.parts.secrets else {
            return Err(misuse("a key update without secrets"));
        };
        let next = next_traffic_secret(hash, &secrets.open)?;
        self.parts.open = DirectionKeys::from_secret(aead, hash, &next)?;
        secrets.open = next;
        self.update_requested = false;
        if answer && !self.write_closed {
            self.send_update(false, outgoing)?;
        }
        Ok(())
    }

    fn request_update(&mut self, outgoing: &mut Buffer) -> Result<()> {
        if !self.write_closed {
            self.send_update(true, outgoing)?;
            self.update_requested = true;
        }
        Ok(())
    }

    fn send_update(&mut self, request: bool, outgoing: &mut Buffer) -> Result<()> {
        let (aead, hash) = (self.parts.aead, self.parts.hash);
        let Some(secrets) = &mut self.parts.secrets else {
            return Err(misuse("keys are updated in TLS 1.3 only"));
        };
        let next = next_traffic_secret(hash, &secrets.seal)?;
        let keys = DirectionKeys::from_secret(aead, hash, &next)?;
        self.parts.seal.seal(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, u8::from(request)], outgoing)?;
        self.parts.seal = keys;
        secrets.seal = next;
        self.updated = true;
        Ok(())
    }

    #[inline]
    pub(crate) fn seal(&mut self, plain: &[u8], outgoing: &mut Buffer) -> Result<()> {
        if self.write_closed {
            return Err(misuse("the TLS connection's sending direction has ended"));
        }
        for part in plain.chunks(self.parts.max_plain) {
            if self.parts.seal.wants_rekey() {
                self.send_update(false, outgoing)?;
            }
            self.parts.seal.seal(APPLICATION_DATA, part, outgoing)?;
        }
        Ok(())
    }

    pub(crate) fn close_notify(&mut self, outgoing: &mut Buffer) -> Result<()> {
        if self.write_closed {
            return Ok(());
        }
        self.write_closed = true;
        self.parts.seal.seal(ALERT, &[1, alert::CLOSE_NOTIFY], outgoing)
    }

    /// Our direction has ended before this was made.
    pub(crate) fn end_writing(&mut self) {
        self.write_closed = true;
    }

    pub(crate) fn fatal_alert(&mut self, description: u8, outgoing: &mut Buffer) {
        if !self.write_closed {
            self.write_closed = true;
            // It can fail for want of keys only, and then nothing can be said any more.
            let _ = self.parts.seal.seal(ALERT, &[2, description], outgoing);
        }
    }

    pub(crate) fn update_keys(&mut self, outgoing: &mut Buffer) -> Result<()> {
        if self.write_closed {
            return Err(misuse("the TLS connection's sending direction has ended"));
        }
        if self.updated && self.parts.seal.is_unused() {
            // As new as can be. A record for each call would look like a flood to the peer.
            return Ok(());
        }
        self.send_update(false, outgoing)
    }

    pub(crate) fn export(&self, label: &str, context: Option<&[u8]>, out: &mut [u8]) -> Result<()> {
        self.parts.exporter.export(self.parts.hash, label, context, out)
    }

    /// Tickets come right after the handshake; whoever is idle has had them, and the state that
    /// keeps them is the largest thing here.
    pub(crate) fn release_idle(&mut self) {
        if self.tickets_seen > 0 {
            self.parts.tickets = None;
        }
        self.partial.shrink_to_fit();
    }
}

/// The largest plaintext of a record towards a peer that asked for fragments of `code`
/// (RFC 6066, section 4).
pub(crate) fn max_fragment(code: u8) -> usize {
    match code {
        1..=4 => 256 << code,
        _ => MAX_RECORD,
    }
}
