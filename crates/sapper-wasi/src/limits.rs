//! How much memory a guest may have.

use wasmtime::ResourceLimiter;

/// Entries of all tables of one guest together: a few bytes each on our side.
const MOST_TABLE_ENTRIES: usize = 1_000_000;
/// Instances of core modules, their tables and memories: what a toolchain makes has less than ten.
const MOST_PARTS: usize = 256;

/// The limits of one run, with what is in use.
pub(crate) struct Limits {
    most_memory: usize,
    memory: usize,
    table_entries: usize,
    /// Whether the guest was refused memory. What it does then is its own affair; most end with a trap.
    pub(crate) memory_refused: bool,
}

impl Limits {
    pub(crate) fn new(most_memory: usize) -> Self {
        Self { most_memory, memory: 0, table_entries: 0, memory_refused: false }
    }
}

impl ResourceLimiter for Limits {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let after = self.memory.saturating_add(desired.saturating_sub(current));
        if after > self.most_memory {
            self.memory_refused = true;
            return Ok(false);
        }
        self.memory = after;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let after = self.table_entries.saturating_add(desired.saturating_sub(current));
        if after > MOST_TABLE_ENTRIES {
            return Ok(false);
        }
        self.table_entries = after;
        Ok(true)
    }

    fn instances(&self) -> usize {
        MOST_PARTS
    }

    fn tables(&self) -> usize {
        MOST_PARTS
    }

    fn memories(&self) -> usize {
        MOST_PARTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memories_are_counted_together() {
        let mut limits = Limits::new(100);
        assert!(limits.memory_growing(0, 60, None).unwrap());
        assert!(limits.memory_growing(0, 40, None).unwrap());
        assert!(!limits.memory_refused);
        assert!(!limits.memory_growing(40, 41, None).unwrap());
        assert!(limits.memory_refused);
    }

    #[test]
    fn tables_are_bounded() {
        let mut limits = Limits::new(100);
        assert!(limits.table_growing(0, MOST_TABLE_ENTRIES, None).unwrap());
        assert!(!limits.table_growing(0, 1, None).unwrap());
    }
}
