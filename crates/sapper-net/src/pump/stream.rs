//! One direction between two streams.

use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::{FlowOptions, FlowState, FlowStats, PumpMode, ROUNDS, ended_by_stop, says_goodbye_to_nobody};
use crate::buffer::Buffer;
use crate::error::{Phase, Result};
use crate::stream::{RecordMarks, Stream};

/// Least room that a read is offered: a TLS record and a bit, so that an engine can always open one.
const MIN_READ: usize = 32 * 1024;

pub(super) struct StreamFlow {
    stats: Arc<FlowStats>,
    /// What was read and is not written yet. Holds no memory while the source is silent.
    waiting: Buffer,
    marks: RecordMarks,
    received_at: Option<Instant>,
    phase: FlowPhase,
    enabled: bool,
    forward_eof: bool,
    paused: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FlowPhase {
    Reading,
    /// The source ended; what waits is still to be written.
    SourceEnded,
    /// The destination was told.
    Ended,
}

impl StreamFlow {
    pub(super) fn new(options: FlowOptions) -> Self {
        let mut waiting = Buffer::new();
        if !options.initial.is_empty() {
            waiting.extend(&options.initial);
        }
        Self {
            stats: options.stats,
            waiting,
            marks: RecordMarks::ignored(),
            received_at: None,
            phase: FlowPhase::Reading,
            enabled: options.enabled,
            forward_eof: options.forward_eof,
            paused: false,
        }
    }

    /// Moves what can be moved; never waits for more than one of the two streams at a time.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut dyn Stream,
        destination: &mut dyn Stream,
        mode: PumpMode,
        peer_ended: bool,
        active: &mut bool,
    ) -> Result<FlowState> {
        if self.phase == FlowPhase::Ended {
            return Ok(FlowState::Ended);
        }
        for _ in 0..ROUNDS {
            if !destination.is_wanted() {
                // Whoever was to have it has gone, and meant to: that is an end of this direction alone.
                self.waiting.consume(self.waiting.len());
                return Ok(self.end());
            }
            if !self.waiting.is_empty() {
                if !self.write(cx, destination, active)? {
                    return Ok(FlowState::Open);
                }
                continue;
            }
            // Sealed records and answers to the peer may wait below even when no payload does.
            let flushed = match destination.poll_flush(cx) {
                Poll::Ready(Err(error)) if says_goodbye_to_nobody(peer_ended, mode, &error) => {
                    return Ok(self.end());
                }
                flushed => flushed.map_err(|e| e.with_phase(Phase::Transfer))?.is_ready(),
            };
            if self.phase == FlowPhase::SourceEnded {
                if self.forward_eof {
                    match destination.poll_send_eof(cx) {
                        Poll::Pending => return Ok(FlowState::Open),
                        Poll::Ready(Err(error)) if !says_goodbye_to_nobody(peer_ended, mode, &error) => {
                            return Err(error.with_phase(Phase::Close));
                        }
                        Poll::Ready(_) => {}
                    }
                }
                return Ok(self.end());
            }
            if !self.enabled {
                return Ok(if flushed { FlowState::Ended } else { FlowState::Open });
            }
            if self.paused && mode == PumpMode::Run {
                self.waiting.release();
                return Ok(FlowState::Open);
            }
            match ended_by_stop(mode, self.read(cx, source), 0)? {
                Poll::Ready(0) => self.phase = FlowPhase::SourceEnded,
                Poll::Ready(_) => *active = true,
                Poll::Pending => {
                    self.waiting.release();
                    if mode != PumpMode::Drain {
                        return Ok(FlowState::Open);
                    }
                    // What waited was read: a drain reads no further.
                    self.phase = FlowPhase::SourceEnded;
                }
            }
        }
        cx.waker().wake_by_ref();
        Ok(FlowState::Open)
    }

    /// Writes what waits; `false` when the destination takes no more now.
    fn write(
        &mut self,
        cx: &mut Context<'_>,
        destination: &mut dyn Stream,
        active: &mut bool,
    ) -> Result<bool> {
        while !self.waiting.is_empty() {
            let slices = [IoSlice::new(self.waiting.data())];
            match destination.poll_write(cx, &slices).map_err(|e| e.with_phase(Phase::Transfer))? {
                Poll::Ready(n) => {
                    self.stats.flowing();
                    self.stats.bytes.add(n as u64);
                    self.waiting.consume(n);
                    *active = true;
                }
                Poll::Pending => {
                    self.stats.blocked();
                    return Ok(false);
                }
            }
        }
        if let Some(received) = self.received_at.take() {
            self.stats.latency.record(received.elapsed());
        }
        Ok(true)
    }

    /// Reads what is there; takes a buffer only when something is.
    fn read(&mut self, cx: &mut Context<'_>, source: &mut dyn Stream) -> Result<Poll<usize>> {
        if source.poll_readable(cx).map_err(|e| e.with_phase(Phase::Transfer))?.is_pending() {
            return Ok(Poll::Pending);
        }
        let room = self.waiting.reserve(MIN_READ);
        self.marks.clear();
        let read = source.poll_read(cx, room, &mut self.marks).map_err(|e| e.with_phase(Phase::Transfer))?;
        if let Poll::Ready(n @ 1..) = read {
            self.waiting.commit(n);
            self.received_at = Some(Instant::now());
        }
        Ok(read)
    }

    fn end(&mut self) -> FlowState {
        self.phase = FlowPhase::Ended;
        self.waiting.release();
        FlowState::Ended
    }

    /// Whether the source has ended; what it sent may still be on its way.
    pub(super) fn source_ended(&self) -> bool {
        self.phase != FlowPhase::Reading
    }

    pub(super) fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// The sink that we read from is another one now.
    pub(super) fn source_replaced(&mut self) {
        if self.phase == FlowPhase::SourceEnded {
            self.phase = FlowPhase::Reading;
        }
    }

    /// The sink that we write to is another one now: what waits goes there.
    pub(super) fn destination_replaced(&mut self) {
        if self.phase == FlowPhase::Ended && self.forward_eof {
            // The new one has not heard of the end yet.
            self.phase = FlowPhase::SourceEnded;
        }
        self.stats.flowing();
    }
}
