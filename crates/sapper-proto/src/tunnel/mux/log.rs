//! What goes out: frames in order, from being queued until nobody can ask for them again.
//!
//! A frame's header is written here; its payload stays where the caller has it, behind a handle that is
//! dropped when the frame is done: sent, or, where the session can be resumed, acknowledged. A cursor
//! stands between what this carrier has taken and what it has not; a new carrier sets it back.

use std::collections::VecDeque;
use std::io::IoSlice;

use super::super::frame::{HEADER, Header};

/// What a queued frame costs besides its bytes. Counted, so that a flood of tiny frames meets the same
/// bound as large ones.
pub(super) const OVERHEAD: usize = 128;

/// The bytes behind a header.
pub(super) enum Body<B> {
    None,
    /// The caller's.
    Payload(B),
    /// Of a frame that is no payload.
    Own(Box<[u8]>),
}

struct Segment<B> {
    header: [u8; HEADER],
    /// Whether it has a place in the counted bytes of the session.
    counted: bool,
    body: Body<B>,
}

impl<B: AsRef<[u8]>> Segment<B> {
    fn body(&self) -> &[u8] {
        match &self.body {
            Body::None => &[],
            Body::Payload(payload) => payload.as_ref(),
            Body::Own(bytes) => bytes,
        }
    }

    fn len(&self) -> usize {
        HEADER + self.body().len()
    }
}

/// The queue.
pub(super) struct Log<B> {
    segments: VecDeque<Segment<B>>,
    /// The segment that the carrier takes next, and how much of it has been taken.
    cursor: usize,
    taken: usize,
    /// The session's offset of the first counted segment here.
    base: u64,
    /// The session's offset of the first counted byte that was not taken yet.
    sent: u64,
    /// Bytes behind the cursor.
    unsent: usize,
    /// Bytes and overhead of all segments.
    held: usize,
    /// Of these, bytes that stand before our hello.
    uncounted: usize,
    /// Whether frames are counted, and stay until they are acknowledged.
    keeps: bool,
    /// The highest offset that was ever taken by a carrier.
    reached: u64,
}

impl<B: AsRef<[u8]>> Log<B> {
    pub(super) fn new() -> Self {
        Self {
            segments: VecDeque::new(),
            cursor: 0,
            taken: 0,
            base: 0,
            sent: 0,
            unsent: 0,
            uncounted: 0,
            held: 0,
            keeps: false,
            reached: 0,
        }
    }

    pub(super) fn push(&mut self, header: Header, body: Body<B>) {
        let segment = Segment { header: header.encode(), counted: self.keeps, body };
        self.unsent += segment.len();
        self.held += segment.len() + OVERHEAD;
        self.segments.push_back(segment);
    }

    /// Bytes that no carrier has taken.
    pub(super) fn unsent(&self) -> usize {
        self.unsent
    }

    /// What is held, with overhead.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Whether a link frame may go now: no frame is half taken.
    pub(super) fn at_boundary(&self) -> bool {
        self.taken == 0
    }

    /// Frames that are queued from here on count. What waits already goes before our hello.
    pub(super) fn begin_counting(&mut self) {
        self.keeps = true;
        (self.base, self.sent, self.reached) = (0, 0, 0);
        self.uncounted = self.unsent;
    }

    /// Frames need not be kept: the peer cannot resume.
    pub(super) fn stop_keeping(&mut self) {
        self.keeps = false;
        while self.cursor > 0 {
            self.pop();
        }
    }

    /// What the carrier should take next: at most `slices` slices and `bytes` bytes.
    pub(super) fn slices<'a>(&'a self, out: &mut Vec<IoSlice<'a>>, slices: usize, bytes: usize) {
        let (mut taken, mut bytes_left) = (self.taken, bytes);
        for segment in self.segments.iter().skip(self.cursor) {
            for part in [&segment.header[..], segment.body()] {
                let skipped = taken.min(part.len());
                taken -= skipped;
                let part = &part[skipped..];
                if part.is_empty() {
                    continue;
                }
                if out.len() >= slices || bytes_left == 0 {
                    return;
                }
                let part = &part[..part.len().min(bytes_left)];
                bytes_left -= part.len();
                out.push(IoSlice::new(part));
            }
        }
    }

    /// Bytes that have to go before a link frame can: the rest of a half-taken frame, and all that was
    /// queued before our hello.
    pub(super) fn before_link(&self) -> usize {
        self.rest().max(self.uncounted)
    }

    /// The rest of a half-taken frame.
    pub(super) fn rest(&self) -> usize {
        match self.segments.get(self.cursor) {
            Some(segment) if self.taken > 0 => segment.len() - self.taken,
            _ => 0,
        }
    }

    /// A carrier took `n` bytes.
    pub(super) fn advance(&mut self, mut n: usize) {
        debug_assert!(n <= self.unsent);
        self.unsent -= n;
        while n > 0 {
            let segment = &self.segments[self.cursor];
            let step = n.min(segment.len() - self.taken);
            n -= step;
            self.taken += step;
            let (whole, counted) = (self.taken == segment.len(), segment.counted);
            if counted {
                self.sent += step as u64;
                self.reached = self.reached.max(self.sent);
            } else {
                self.uncounted = self.uncounted.saturating_sub(step);
            }
            if whole {
                self.cursor += 1;
                self.taken = 0;
                // A frame of the time before counting stands in front of all others.
                if !counted || !self.keeps {
                    self.pop();
                }
            }
        }
    }

    /// The peer has all counted bytes below `offset`. False where it cannot have them.
    pub(super) fn acknowledge(&mut self, offset: u64) -> bool {
        if offset > self.reached {
            return false;
        }
        while self.cursor > 0 && self.base + self.segments[0].len() as u64 <= offset {
            self.pop();
        }
        true
    }

    /// Sets the cursor to where the peer's count is. False where that is not within what is held.
    pub(super) fn rewind(&mut self, offset: u64) -> bool {
        // What stood before our hello, and no carrier will ever finish.
        self.uncounted = 0;
        while self.segments.front().is_some_and(|segment| !segment.counted) {
            self.drop_uncounted();
        }
        if offset < self.base || offset > self.reached {
            return false;
        }
        let (mut index, mut at) = (0, self.base);
        while let Some(segment) = self.segments.get(index) {
            let end = at + segment.len() as u64;
            if end > offset {
                break;
            }
            (index, at) = (index + 1, end);
        }
        let counted: usize = self.segments.iter().map(Segment::len).sum();
        self.cursor = index;
        self.taken = (offset - at) as usize;
        self.sent = offset;
        self.unsent = counted - (offset - self.base) as usize;
        while self.cursor > 0 {
            self.pop();
        }
        true
    }

    /// Everything goes: the session is over.
    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }

    /// Whether frames stay until they are acknowledged.
    pub(super) fn keeps(&self) -> bool {
        self.keeps
    }

    fn pop(&mut self) {
        let segment = self.segments.pop_front().expect("the cursor is behind it");
        self.held -= segment.len() + OVERHEAD;
        if segment.counted {
            self.base += segment.len() as u64;
        }
        self.cursor -= 1;
    }

    fn drop_uncounted(&mut self) {
        let segment = self.segments.pop_front().expect("it was looked at");
        self.held -= segment.len() + OVERHEAD;
        if self.cursor > 0 {
            self.cursor -= 1;
        } else {
            self.unsent -= segment.len() - self.taken;
            self.taken = 0;
        }
    }

    /// The session's offset up to which this carrier has taken bytes.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::frame::Kind;
    use super::*;

    fn data(log: &mut Log<Vec<u8>>, payload: &[u8]) -> Vec<u8> {
        let header = Header { stream: 1, kind: Kind::Data, payload: payload.len() as u32 };
        log.push(header, Body::Payload(payload.to_vec()));
        [&header.encode()[..], payload].concat()
    }

    fn take(log: &mut Log<Vec<u8>>, bytes: usize) -> Vec<u8> {
        let mut slices = Vec::new();
        log.slices(&mut slices, 1000, bytes);
        let taken: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        log.advance(taken.len());
        taken
    }

    #[test]
    fn without_counting_nothing_is_kept() {
        let mut log = Log::new();
        let wire = [data(&mut log, b"one"), data(&mut log, b""), data(&mut log, b"two")].concat();
        assert_eq!((log.unsent(), log.held()), (wire.len(), wire.len() + 3 * OVERHEAD));
        assert_eq!(take(&mut log, 10), wire[..10]);
        assert!(!log.at_boundary());
        assert_eq!(log.before_link(), 2);
        assert_eq!(take(&mut log, 999), wire[10..]);
        assert_eq!((log.unsent(), log.held(), log.at_boundary()), (0, 0, true));
    }

    #[test]
    fn the_number_of_slices_is_bounded() {
        let mut log = Log::new();
        for _ in 0..9 {
            data(&mut log, b"x");
        }
        let mut slices = Vec::new();
        log.slices(&mut slices, 5, usize::MAX);
        assert_eq!(slices.len(), 5);
    }

    #[test]
    fn a_frame_that_was_half_taken_before_counting_is_not_replayed() {
        let mut log = Log::new();
        let wire = data(&mut log, b"early");
        assert_eq!(take(&mut log, 4), wire[..4]);
        log.begin_counting();
        let later = data(&mut log, b"later");
        assert_eq!(log.before_link(), 10);
        assert_eq!(take(&mut log, 12), [&wire[4..], &later[..2]].concat());
        assert_eq!((log.sent(), log.before_link()), (2, 12));
        assert!(log.rewind(0));
        assert_eq!(take(&mut log, 99), later);
        // The same, where the carrier went before the half frame was done.
        let mut log = Log::new();
        data(&mut log, b"early");
        take(&mut log, 4);
        log.begin_counting();
        let later = data(&mut log, b"later");
        assert!(log.rewind(0));
        assert_eq!((log.unsent(), log.before_link(), take(&mut log, 99)), (later.len(), 0, later));
    }

    proptest! {
        /// However the carrier takes, loses and acknowledges: the peer sees each byte once.
        #[test]
        fn every_byte_arrives_once(steps in proptest::collection::vec((0u8..5, 0usize..40), 0..120)) {
            let mut log = Log::new();
            log.begin_counting();
            let (mut written, mut arrived, mut on_the_way) = (Vec::new(), Vec::new(), Vec::new());
            for (what, n) in steps {
                match what {
                    0 => written.extend(data(&mut log, &vec![n as u8; n])),
                    1 => on_the_way.extend(take(&mut log, n)),
                    2 => arrived.extend(on_the_way.drain(..n.min(on_the_way.len()))),
                    3 => prop_assert!(log.acknowledge(arrived.len().saturating_sub(n) as u64)),
                    _ => {
                        on_the_way.clear();
                        prop_assert!(log.rewind(arrived.len() as u64));
                        prop_assert!(!log.rewind(written.len() as u64 + 1));
                    }
                }
                prop_assert_eq!(log.sent() as usize, arrived.len() + on_the_way.len());
                prop_assert_eq!(log.unsent(), written.len() - log.sent() as usize);
            }
            log.rewind(arrived.len() as u64);
            arrived.extend(take(&mut log, usize::MAX));
            prop_assert_eq!(&arrived, &written);
            prop_assert!(log.acknowledge(written.len() as u64));
            prop_assert_eq!(log.held(), 0);
        }
    }
}
