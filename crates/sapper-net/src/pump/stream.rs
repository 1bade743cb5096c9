//! One direction between two streams.

use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::flow::{Flow, FlowControl, FlowEnd};
use super::turns::TurnTaker;
use super::{FlowOptions, FlowStats};
use crate::buffer::Buffer;
use crate::error::{Phase, Result};
use crate::runtime;
use crate::stream::{RecordMarks, Stream};

/// Least room that a read is offered: a TLS record and a bit, so that an engine can always open one.
const MIN_READ: usize = 32 * 1024;

pub(super) struct StreamFlow {
    control: FlowControl,
    turns: TurnTaker,
    stats: Arc<FlowStats>,
    /// What was read and is not written yet. Holds no memory while the source is silent.
    waiting: Buffer,
    marks: RecordMarks,
    received_at: Option<Instant>,
}

impl StreamFlow {
    pub(super) fn new(options: FlowOptions) -> Self {
        let mut waiting = Buffer::new();
        if !options.initial.is_empty() {
            waiting.extend(&options.initial);
        }
        Self {
            control: FlowControl::new(&options),
            turns: TurnTaker::new(options.turns),
            stats: options.stats,
            waiting,
            marks: RecordMarks::ignored(),
            received_at: None,
        }
    }

    /// Bytes that were read and not written.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.data().len()
    }
}

impl FlowEnd for dyn Stream {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Stream::poll_flush(self, cx)
    }

    fn poll_send_eof(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Stream::poll_send_eof(self, cx)
    }

    fn has_lost(&mut self) -> bool {
        Stream::has_lost(self)
    }

    fn is_wanted(&self) -> bool {
        Stream::is_wanted(self)
    }
}

impl Flow for StreamFlow {
    type End = dyn Stream;

    fn control(&mut self) -> &mut FlowControl {
        &mut self.control
    }

    fn rounds(&self) -> usize {
        self.turns.rounds()
    }

    fn turn_over(&self) {
        self.turns.over();
    }

    fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn write(
        &mut self,
        cx: &mut Context<'_>,
        destination: &mut Self::End,
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

    fn read(&mut self, cx: &mut Context<'_>, source: &mut Self::End) -> Result<Poll<bool>> {
        if source.poll_readable(cx).map_err(|e| e.with_phase(Phase::Transfer))?.is_pending() {
            return Ok(Poll::Pending);
        }
        let room = self.waiting.reserve(MIN_READ);
        let most = room.len().min(self.turns.most_read());
        self.marks.clear();
        let read = source
            .poll_read(cx, &mut room[..most], &mut self.marks)
            .map_err(|e| e.with_phase(Phase::Transfer))?;
        if let Poll::Ready(n @ 1..) = read {
            self.waiting.commit(n);
            if self.turns.has_read() {
                source.widen();
            }
            runtime::pumped(n);
            self.received_at = Some(Instant::now());
        }
        Ok(read.map(|n| n > 0))
    }

    fn forget(&mut self) {
        self.waiting.consume(self.waiting.len());
    }

    fn release(&mut self) {
        self.waiting.release();
    }

    fn destination_replaced(&mut self) {
        self.control.destination_replaced();
        self.stats.flowing();
    }
}
