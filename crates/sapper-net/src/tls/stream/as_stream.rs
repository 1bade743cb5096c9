//! A [`TlsStream`] as a [`Stream`]: reading, writing and ending, as every stream does.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use super::*;
use crate::tls::failure::misuse;

impl Stream for TlsStream {
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
        marks: &mut RecordMarks,
    ) -> Poll<Result<usize>> {
        if !self.plain.is_empty() {
            let n = self.take_plain(buf, marks);
            return Poll::Ready(Ok(n));
        }
        loop {
            if let Some(error) = &self.failed {
                return Poll::Ready(Err(error.clone()));
            }
            if self.read_ended {
                return Poll::Ready(Ok(0));
            }
            if self.poll_too_late(cx).is_ready() {
                let seconds = CONFIRMATION.as_secs();
                let text =
                    format!("the client sent early data and did not finish its handshake in {seconds} s");
                return Poll::Ready(Err(self.fail(cx, Error::new(ErrorKind::HandshakeDeadline, text))));
            }
            if self.answers > MAX_ANSWERS {
                // Its failure is the writers' business; reading goes on without answers.
                let _ = ready!(self.poll_drain(cx));
            }
            let opened = self.open(cx, buf, marks);
            if !self.outgoing.is_empty() {
                let _ = self.poll_drain(cx);
            }
            match opened {
                Ok(Some(n)) => {
                    return Poll::Ready(Ok(n));
                }
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            match ready!(self.poll_receive(cx)) {
                Ok(0) => return self.truncated(cx),
                Ok(_) => {}
                Err(error) => {
                    let error = error.with_direction(Direction::Decapsulate);
                    return Poll::Ready(Err(self.fail(cx, error)));
                }
            }
        }
    }

    fn widen(&mut self) {
        self.carrier.widen();
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let ready = !self.plain.is_empty() || self.read_ended || self.failed.is_some() || self.unopened;
        if ready || self.poll_too_late(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        if !self.outgoing.is_empty() {
            let _ = self.poll_drain(cx);
        }
        self.carrier.poll_readable(cx)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        self.check_failed()?;
        if self.direction == StreamDirection::DecryptOnly {
            return Poll::Ready(Err(misuse("this connection only decrypts")));
        }
        if self.write_ended {
            return Poll::Ready(Err(Error::new(ErrorKind::Closed, "the sending direction has ended")));
        }
        let mut taken = 0;
        loop {
            for slice in slices {
                let room = BLOCK.saturating_sub(self.outgoing.len());
                let records = slice.len().div_ceil(MAX_RECORD);
                if slice.len() + records * RECORD_OVERHEAD <= room {
                    self.seal(slice, records)?;
                    taken += slice.len();
                    continue;
                }
                // Whole records of a slice that will never fit as a whole, or not now.
                let records = room / (MAX_RECORD + RECORD_OVERHEAD);
                if taken == 0 && records > 0 && slice.len() > records * MAX_RECORD {
                    self.seal(&slice[..records * MAX_RECORD], records)?;
                    taken = records * MAX_RECORD;
                }
                break;
            }
            if taken > 0 || slices.iter().all(|slice| slice.is_empty()) {
                // What it took is ours now; the rest is sent when the carrier wakes us.
                let _ = self.poll_drain(cx);
                return Poll::Ready(Ok(taken));
            }
            ready!(self.poll_drain(cx))?;
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if let Some(error) = &self.write_failed {
            return Poll::Ready(Err(error.clone()));
        }
        ready!(self.poll_drain(cx))?;
        self.carrier.poll_flush(cx)
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if let Some(error) = &self.write_failed {
            return Poll::Ready(Err(error.clone()));
        }
        if !self.write_ended {
            ready!(self.poll_drain(cx))?;
            self.write_ended = true;
            self.engine.close_notify(&mut self.outgoing)?;
        }
        // All data has left. A goodbye that finds nobody is no loss: both sides often say theirs at once,
        // and how the peer went is told to whoever reads.
        let goodbye = match ready!(self.poll_drain(cx)) {
            Ok(()) => ready!(self.carrier.poll_send_eof(cx)),
            failed => failed,
        };
        Poll::Ready(match goodbye {
            Err(error) if error.kind() == ErrorKind::ConnectionLost => Ok(()),
            goodbye => goodbye,
        })
    }

    fn reset(&mut self, code: u64) {
        // Without close_notify, so that the peer does not take it for an orderly end.
        self.write_ended = true;
        self.outgoing.consume(self.outgoing.len());
        self.outgoing.release();
        self.carrier.reset(code);
    }

    fn stop(&mut self, code: u64) {
        self.read_ended = true;
        self.incoming.consume(self.incoming.len());
        self.plain.consume(self.plain.len());
        self.release_idle();
        self.carrier.stop(code);
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        // The carrier's descriptor carries ciphertext: nobody may move bytes past us.
        None
    }

    fn release_idle(&mut self) {
        self.incoming.release();
        self.plain.release();
        if self.plain.is_empty() {
            self.plain_marks = None;
        }
        self.outgoing.release();
        self.engine.release_idle();
        self.carrier.release_idle();
    }

    fn is_movable(&self) -> bool {
        // A deadline belongs to its thread.
        self.unfinished.is_none() && self.carrier.is_movable()
    }

    fn moved(&mut self) -> Result<()> {
        self.carrier.moved()
    }

    fn stats(&self) -> &Arc<EndpointStats> {
        &self.stats
    }

    fn describe(&self) -> String {
        format!("{} ({}) over {}", self.version, self.engine.name(), self.carrier.describe())
    }

    fn tls_mut(&mut self) -> Option<&mut TlsStream> {
        Some(self)
    }

    fn unconfirmed(&self) -> usize {
        self.outgoing.len() + self.carrier.unconfirmed()
    }

    fn has_lost(&self) -> bool {
        self.payload_waits > 0 && self.write_failed.is_some()
    }

    fn peer_address(&self) -> Option<SocketAddr> {
        self.carrier.peer_address()
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.carrier.local_address()
    }
}

impl TlsStream {
    fn seal(&mut self, plain: &[u8], records: usize) -> Result<()> {
        if let Err(error) = self.engine.seal(plain, &mut self.outgoing) {
            let error = error.with_phase(Phase::Transfer).with_direction(Direction::Encapsulate);
            return Err(self.seen_from_here(error));
        }
        self.payload_waits = self.outgoing.len();
        self.stats.records_sent.add(records as u64);
        Ok(())
    }
}
