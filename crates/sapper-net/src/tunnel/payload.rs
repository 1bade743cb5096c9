//! Blocks that payload waits in until its frame is done: sent, or acknowledged.
//!
//! Three sizes, so that a frame of a few bytes does not hold 64 KiB for as long as a session can ask for it
//! again. They come from the thread's pool and go back to it.

use std::cell::RefCell;

/// Sizes of blocks.
const SIZES: [usize; 3] = [4 * 1024, 16 * 1024, 64 * 1024];
/// Blocks of each size that a thread keeps: 5.4 MiB at most stay after a burst.
const KEEP: usize = 64;

thread_local! {
    static POOL: RefCell<[Vec<Vec<u8>>; 3]> = const { RefCell::new([Vec::new(), Vec::new(), Vec::new()]) };
}

/// Payload of one frame.
pub(super) struct Payload {
    block: Vec<u8>,
    len: usize,
}

/// A block to read at least `wanted` bytes into (64 KiB at most).
pub(super) fn take(wanted: usize) -> Vec<u8> {
    let class = SIZES.iter().position(|size| *size >= wanted).unwrap_or(SIZES.len() - 1);
    POOL.with_borrow_mut(|pool| pool[class].pop()).unwrap_or_else(|| vec![0; SIZES[class]])
}

/// Gives a block back.
pub(super) fn give(block: Vec<u8>) {
    let Some(class) = SIZES.iter().position(|size| *size == block.len()) else { return };
    // A thread that ends has no pool any more: then the block is freed.
    let _ = POOL.try_with(|pool| {
        let pool = &mut pool.borrow_mut()[class];
        if pool.len() < KEEP {
            pool.push(block);
        }
    });
}

impl Payload {
    /// The first `len` bytes of a block; they move to a smaller one where they fit.
    pub(super) fn new(block: Vec<u8>, len: usize) -> Self {
        let fits = SIZES.iter().find(|size| **size >= len).copied().unwrap_or(block.len());
        if fits >= block.len() {
            return Self { block, len };
        }
        let mut smaller = take(fits);
        smaller[..len].copy_from_slice(&block[..len]);
        give(block);
        Self { block: smaller, len }
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        &self.block[..self.len]
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        give(std::mem::take(&mut self.block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_bytes_do_not_hold_a_large_block() {
        for (len, size) in [(1, SIZES[0]), (SIZES[0], SIZES[0]), (SIZES[0] + 1, SIZES[1]), (50_000, SIZES[2])]
        {
            let mut block = take(SIZES[2]);
            block[..len].fill(7);
            let payload = Payload::new(block, len);
            assert_eq!((payload.block.len(), payload.as_ref().len()), (size, len));
            assert!(payload.as_ref().iter().all(|byte| *byte == 7));
        }
    }
}
