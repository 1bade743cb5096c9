//! Payload of one stream in several pieces, as its frames stand in what was read: written at once, without a copy.

use std::io::IoSlice;

/// Pieces at a time: a large read holds no more quanta than this, and their ends.
const MOST: usize = 8;

/// Some bytes, in order.
#[derive(Clone, Copy, Default)]
pub(super) struct Pieces<'a> {
    parts: [&'a [u8]; MOST],
    /// Those before are written, those from `end` on are not there.
    start: usize,
    end: usize,
}

impl<'a> Pieces<'a> {
    /// One.
    pub(super) fn of(part: &'a [u8]) -> Self {
        let mut pieces = Self::default();
        pieces.push(part);
        pieces
    }

    /// Adds one; false where there is no place.
    pub(super) fn push(&mut self, part: &'a [u8]) -> bool {
        let Some(place) = self.parts.get_mut(self.end) else { return false };
        *place = part;
        self.end += 1;
        true
    }

    /// What is left of them.
    pub(super) fn parts(&self) -> impl Iterator<Item = &'a [u8]> {
        self.parts[self.start..self.end].iter().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.parts().map(<[u8]>::len).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts().all(<[u8]>::is_empty)
    }

    /// The first `n` bytes are done.
    pub(super) fn advance(&mut self, mut n: usize) {
        while n > 0 {
            let part = &mut self.parts[self.start];
            let step = n.min(part.len());
            *part = &part[step..];
            n -= step;
            self.start += usize::from(part.is_empty());
        }
    }

    /// For one write of `most` bytes, behind what waits already: slices, and how many of them there are.
    pub(super) fn behind<'b>(
        &self,
        waiting: [&'b [u8]; 2],
        mut most: usize,
    ) -> ([IoSlice<'b>; MOST + 2], usize)
    where
        'a: 'b,
    {
        let mut slices = [IoSlice::new(&[]); MOST + 2];
        let mut count = 0;
        for part in waiting.into_iter().chain(self.parts()) {
            let part = &part[..part.len().min(most)];
            if !part.is_empty() {
                slices[count] = IoSlice::new(part);
                count += 1;
                most -= part.len();
            }
        }
        (slices, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(slices: &[IoSlice<'_>]) -> Vec<u8> {
        slices.iter().flat_map(|slice| slice.iter().copied()).collect()
    }

    /// Of seven bytes and what is left of nine, at most eight.
    fn count_of(first: usize) -> usize {
        8.min(7 + 9 - first)
    }

    #[test]
    fn pieces_are_one_text_however_they_are_taken() {
        let words: [&[u8]; 4] = [b"one", b"", b"three", b"4"];
        for first in 0..=9 {
            let mut pieces = Pieces::default();
            words.iter().for_each(|word| assert!(pieces.push(word)));
            assert_eq!(pieces.len(), 9);
            pieces.advance(first);
            let (slices, count) = pieces.behind([b"", b"before "], 99);
            assert_eq!(text(&slices[..count]), [b"before ", &b"onethree4"[first..]].concat());
            let (slices, count) = pieces.behind([b"be", b"fore "], 8);
            assert_eq!(
                text(&slices[..count]),
                [b"before ", &b"onethree4"[first..]].concat()[..count_of(first)]
            );
            assert_eq!((pieces.len(), pieces.is_empty()), (9 - first, first == 9));
        }
    }

    #[test]
    fn there_are_so_many_places() {
        let mut pieces = Pieces::of(b"x");
        assert_eq!((1..20).filter(|_| pieces.push(b"y")).count(), MOST - 1);
        let (slices, count) = pieces.behind([b"a", b"b"], 99);
        assert_eq!((count, text(&slices[..count]).len()), (MOST + 2, MOST + 2));
    }
}
