//! Byte buffers that belong to a pool while they are empty.
//!
//! An idle connection holds none: [`Buffer`] takes its memory from the thread's pool at the first
//! byte and gives it back when it is drained. Each I/O thread has its own pool, so no lock is taken.

use std::cell::RefCell;

/// Size of every pooled block. One large receive fills it; a 64 KB super-packet with its records'
/// overhead fits several times.
pub const BLOCK: usize = 256 * 1024;

/// Blocks that a thread keeps for reuse: 8 MiB at most stay after a burst.
const KEEP: usize = 32;

thread_local! {
    static POOL: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A block of [`BLOCK`] bytes; its content is whatever its last user left.
pub fn take_block() -> Vec<u8> {
    POOL.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BLOCK])
}

/// Gives a block back. A block of another size is freed.
pub fn give_block(block: Vec<u8>) {
    if block.len() == BLOCK {
        // A thread that ends has no pool any more: then the block is freed.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < KEEP {
                pool.push(block);
            }
        });
    }
}

/// Bytes in order: appended behind, taken in front. Grows beyond one block only when one unit does
/// not fit ([`reserve`](Self::reserve) with more than is free).
#[derive(Default)]
pub struct Buffer {
    block: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    /// Empty, without memory.
    pub const fn new() -> Self {
        Self { block: Vec::new(), start: 0, end: 0 }
    }

    /// The bytes that wait.
    pub fn data(&self) -> &[u8] {
        &self.block[self.start..self.end]
    }

    /// The same, to change in place (decryption).
    pub fn data_mut(&mut self) -> &mut [u8] {
        &mut self.block[self.start..self.end]
    }

    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Free space behind the bytes, of at least `min`: waiting bytes move to the front when that
    /// makes room, and a larger block is taken when it does not. Then [`commit`](Self::commit).
    pub fn reserve(&mut self, min: usize) -> &mut [u8] {
        if self.block.is_empty() {
            self.block = take_block();
        }
        if self.block.len() - self.end < min {
            self.block.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.block.len() - self.end < min {
                self.block.resize((self.end + min).next_power_of_two(), 0);
            }
        }
        &mut self.block[self.end..]
    }

    /// Makes the first `n` bytes of the reserved space part of the data.
    pub fn commit(&mut self, n: usize) {
        assert!(self.end + n <= self.block.len());
        self.end += n;
    }

    /// Appends a copy.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.reserve(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    /// Takes `n` bytes from the front. The memory stays until [`release`](Self::release).
    pub fn consume(&mut self, n: usize) {
        assert!(n <= self.len());
        self.start += n;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Whether it has memory now.
    #[cfg(test)]
    pub(crate) fn holds_memory(&self) -> bool {
        self.block.capacity() > 0
    }

    /// Gives the memory back when no byte waits. Called when an endpoint goes idle.
    pub fn release(&mut self) {
        if self.is_empty() && !self.block.is_empty() {
            self.start = 0;
            self.end = 0;
            give_block(std::mem::take(&mut self.block));
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        give_block(std::mem::take(&mut self.block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_their_order_across_moves_and_growth() {
        let mut buffer = Buffer::new();
        buffer.extend(&[1; 1000]);
        buffer.consume(999);
        buffer.extend(&vec![2; BLOCK]);
        assert_eq!(buffer.len(), BLOCK + 1);
        assert_eq!(buffer.data()[0], 1);
        assert!(buffer.data()[1..].iter().all(|&b| b == 2));
    }

    #[test]
    fn an_idle_buffer_holds_no_memory() {
        let mut buffer = Buffer::new();
        buffer.extend(b"x");
        buffer.consume(1);
        buffer.release();
        assert_eq!(buffer.block.capacity(), 0);
    }
}
