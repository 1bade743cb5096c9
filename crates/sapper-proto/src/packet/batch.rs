//! A batch of packets in one arena: no allocation per packet, in-place framing.

use super::PacketMeta;

/// Bytes kept free in front of each packet that [`PacketBatch::reserve`] makes room for. The largest
/// prefix that is written in place is a superframe's: u32 length and 10 bytes of virtio-net header.
pub const HEADROOM: usize = 16;

/// Packets in the order they came, in one arena that is reused.
///
/// A source appends ([`reserve`](Self::reserve) + [`commit`](Self::commit), [`push`](Self::push) or
/// [`spare`](Self::spare)); a destination takes from the front ([`iter`](Self::iter),
/// [`advance`](Self::advance)). Both ends may stop half-way and go on later.
pub struct PacketBatch {
    bytes: Vec<u8>,
    slots: Vec<Slot>,
    max_packets: usize,
    /// Arena bytes in use.
    filled: usize,
    /// First slot that was not taken yet.
    next: usize,
}

#[derive(Clone, Copy)]
struct Slot {
    start: u32,
    len: u32,
    headroom: u32,
    meta: PacketMeta,
}

/// A packet as it lies in its batch.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// The packet itself.
    pub data: &'a [u8],
    /// What travels with it.
    pub meta: &'a PacketMeta,
}

/// A packet that may be changed in place.
pub struct PacketMut<'a> {
    /// The packet itself.
    pub data: &'a mut [u8],
    /// What travels with it.
    pub meta: &'a mut PacketMeta,
}

/// Sizes only: payload does not belong into logs.
impl std::fmt::Debug for PacketBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PacketBatch")
            .field("packets", &self.len())
            .field("bytes", &self.byte_len())
            .field("arena", &self.bytes.len())
            .finish()
    }
}

impl PacketBatch {
    /// An empty batch with an arena of `bytes` that takes at most `max_packets`.
    pub fn new(bytes: usize, max_packets: usize) -> Self {
        Self::from_arena(vec![0; bytes], max_packets)
    }

    /// The same over an arena from a pool (its length is its capacity, its content does not matter).
    pub fn from_arena(arena: Vec<u8>, max_packets: usize) -> Self {
        assert!(u32::try_from(arena.len()).is_ok(), "an arena is below 4 GiB");
        Self { bytes: arena, slots: Vec::with_capacity(max_packets), max_packets, filled: 0, next: 0 }
    }

    /// Gives the arena back (for its pool).
    pub fn into_arena(self) -> Vec<u8> {
        self.bytes
    }

    /// Packets that were not taken yet.
    pub fn len(&self) -> usize {
        self.slots.len() - self.next
    }

    /// Whether every packet was taken.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the packets that were not taken yet.
    pub fn byte_len(&self) -> usize {
        self.slots[self.next..].iter().map(|slot| slot.len as usize).sum()
    }

    /// Forgets all packets; the arena is free again.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.filled = 0;
        self.next = 0;
    }

    /// Whether one more packet of `len` bytes fits.
    pub fn has_room(&self, len: usize) -> bool {
        self.slots.len() < self.max_packets && self.bytes.len() - self.filled >= len + HEADROOM
    }

    /// Room for one packet of at most `len` bytes with [`HEADROOM`] in front of it, or `None` when
    /// the batch is full. Follow with [`commit`](Self::commit).
    pub fn reserve(&mut self, len: usize) -> Option<&mut [u8]> {
        if !self.has_room(len) {
            return None;
        }
        let start = self.filled + HEADROOM;
        Some(&mut self.bytes[start..start + len])
    }

    /// Like [`reserve`](Self::reserve), with the headroom's last `prefix` bytes in front: for sources
    /// that write a header and a packet in one read.
    pub fn reserve_with_prefix(&mut self, prefix: usize, len: usize) -> Option<&mut [u8]> {
        assert!(prefix <= HEADROOM);
        if !self.has_room(len) {
            return None;
        }
        let start = self.filled + HEADROOM;
        Some(&mut self.bytes[start - prefix..start + len])
    }

    /// Makes the first `len` bytes of the last reservation a packet.
    pub fn commit(&mut self, len: usize, meta: PacketMeta) {
        let start = self.filled + HEADROOM;
        assert!(start + len <= self.bytes.len() && self.slots.len() < self.max_packets);
        self.slots.push(Slot { start: start as u32, len: len as u32, headroom: HEADROOM as u32, meta });
        self.filled = start + len;
    }

    /// Copies a packet in; `false` when the batch is full.
    pub fn push(&mut self, data: &[u8], meta: PacketMeta) -> bool {
        let Some(room) = self.reserve(data.len()) else { return false };
        room.copy_from_slice(data);
        self.commit(data.len(), meta);
        true
    }

    /// All of the free arena at once, for sources that fill it themselves (many datagrams in one
    /// system call, a run of stream bytes). Such packets have only the headroom they were given.
    pub fn spare(&mut self) -> Spare<'_> {
        let base = self.filled;
        Spare { batch: self, base }
    }

    /// The packets not taken yet, from the front.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Packet<'_>> {
        self.slots[self.next..]
            .iter()
            .map(|slot| Packet { data: &self.bytes[slot.range()], meta: &slot.meta })
    }

    /// The packet at `index` from the front.
    pub fn get(&self, index: usize) -> Option<Packet<'_>> {
        let slot = self.slots.get(self.next + index)?;
        Some(Packet { data: &self.bytes[slot.range()], meta: &slot.meta })
    }

    /// The packet at `index` from the front, to change in place.
    pub fn get_mut(&mut self, index: usize) -> Option<PacketMut<'_>> {
        let slot = self.slots.get_mut(self.next + index)?;
        Some(PacketMut { data: &mut self.bytes[slot.range()], meta: &mut slot.meta })
    }

    /// The packet at `index` with `prefix` bytes of headroom in front of it, or `None` where it has
    /// less (packets that lie back to back in a stream). Writing there loses nothing.
    pub fn with_prefix(&mut self, index: usize, prefix: usize) -> Option<&mut [u8]> {
        let slot = *self.slots.get(self.next + index)?;
        if (slot.headroom as usize) < prefix {
            return None;
        }
        let range = slot.range();
        Some(&mut self.bytes[range.start - prefix..range.end])
    }

    /// The bytes at `index` together with the `prefix` bytes before them, as written by
    /// [`with_prefix`](Self::with_prefix).
    pub fn prefixed(&self, index: usize, prefix: usize) -> Option<&[u8]> {
        let slot = self.slots.get(self.next + index)?;
        if (slot.headroom as usize) < prefix {
            return None;
        }
        let range = slot.range();
        Some(&self.bytes[range.start - prefix..range.end])
    }

    /// Takes `count` packets from the front. When none are left the arena is free again.
    pub fn advance(&mut self, count: usize) {
        assert!(count <= self.len());
        self.next += count;
        if self.next == self.slots.len() {
            self.clear();
        }
    }

    /// Keeps only the packets for which `keep` says so; returns how many went.
    pub fn retain(&mut self, mut keep: impl FnMut(Packet<'_>) -> bool) -> usize {
        let before = self.slots.len();
        let (bytes, next) = (&self.bytes, self.next);
        let mut index = 0;
        self.slots.retain(|slot| {
            index += 1;
            index <= next || keep(Packet { data: &bytes[slot.range()], meta: &slot.meta })
        });
        let removed = before - self.slots.len();
        if self.next == self.slots.len() {
            self.clear();
        }
        removed
    }

    /// Cuts the packet at `index` to its first `len` bytes.
    pub fn truncate(&mut self, index: usize, len: usize) {
        let slot = &mut self.slots[self.next + index];
        slot.len = slot.len.min(len as u32);
    }
}

impl Slot {
    fn range(&self) -> std::ops::Range<usize> {
        self.start as usize..self.start as usize + self.len as usize
    }
}

/// The free part of a batch's arena.
pub struct Spare<'a> {
    batch: &'a mut PacketBatch,
    base: usize,
}

impl Spare<'_> {
    /// The free bytes. Offsets given to [`commit`](Self::commit) count from here.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.batch.bytes[self.base..]
    }

    /// How many packets may still be committed.
    pub fn packets_left(&self) -> usize {
        self.batch.max_packets - self.batch.slots.len()
    }

    /// Makes `len` bytes at `offset` a packet; `headroom` bytes in front of it are free to use.
    /// Packets are committed in rising order.
    pub fn commit(&mut self, offset: usize, len: usize, headroom: usize, meta: PacketMeta) {
        let start = self.base + offset;
        assert!(headroom <= offset && start + len <= self.batch.bytes.len() && self.packets_left() > 0);
        self.batch.slots.push(Slot { start: start as u32, len: len as u32, headroom: headroom as u32, meta });
        self.batch.filled = self.batch.filled.max(start + len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_come_out_in_order_and_the_arena_is_reused() {
        let mut batch = PacketBatch::new(64, 4);
        assert!(batch.push(b"one", PacketMeta::default()));
        assert!(batch.push(b"three", PacketMeta::default()));
        assert!(!batch.push(&[0; 64], PacketMeta::default()));
        assert_eq!(batch.get(0).unwrap().data, b"one");
        batch.advance(1);
        assert_eq!(batch.iter().map(|p| p.data.to_vec()).collect::<Vec<_>>(), [b"three".to_vec()]);
        batch.advance(1);
        assert!(batch.is_empty() && batch.has_room(48));
    }

    #[test]
    fn headroom_is_writable_and_does_not_touch_a_neighbour() {
        let mut batch = PacketBatch::new(128, 4);
        batch.push(b"aa", PacketMeta::default());
        batch.push(b"bb", PacketMeta::default());
        batch.with_prefix(1, 4).unwrap()[..4].copy_from_slice(&[0, 0, 0, 2]);
        assert_eq!(batch.prefixed(1, 4).unwrap(), [0, 0, 0, 2, b'b', b'b']);
        assert_eq!(batch.get(0).unwrap().data, b"aa");
        assert!(batch.with_prefix(0, HEADROOM + 1).is_none());
    }

    #[test]
    fn spare_packets_have_the_headroom_they_were_given() {
        let mut batch = PacketBatch::new(64, 4);
        let mut spare = batch.spare();
        spare.bytes()[..6].copy_from_slice(b"xxyyyy");
        spare.commit(0, 2, 0, PacketMeta::default());
        spare.commit(2, 4, 0, PacketMeta::default());
        assert_eq!(batch.get(1).unwrap().data, b"yyyy");
        assert!(batch.with_prefix(1, 1).is_none());
        assert_eq!(batch.retain(|p| p.data.len() == 4), 1);
        assert_eq!(batch.len(), 1);
    }
}
