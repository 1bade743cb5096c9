//! From one port's packets to what another one takes: segments, complete checksums, sizes.
//!
//! The pump and the switch put an [`Adapter`] between two ports that differ. Between two that do not,
//! it exchanges the two batches and copies nothing. What is not here: coalescing, which needs no
//! memory of its own where the packets are written (a TUN port does it while it sends).

use sapper_proto::packet::gso::{Segmented, Segmenter};
use sapper_proto::packet::{PacketBatch, checksum};

use super::{Fit, PortAbilities};
use crate::stats::{DropReason, Drops};

/// Moves packets from the batch of one source to the batch of one destination. It may stop in the
/// middle of a large packet and goes on there.
#[derive(Debug, Default)]
pub struct Adapter {
    segmenter: Segmenter,
}

impl Adapter {
    /// An adapter at the beginning of a packet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves what fits from `from` to `to`, in the form that a port with these abilities takes;
    /// `true` when `from` is empty. Packets that cannot go there are dropped and counted.
    ///
    /// `false` means that `to` is full: send it, and call again with the same `from`. The abilities
    /// may have changed by then. Nothing is copied when `to` is empty and no packet needs cutting:
    /// the batches change places.
    pub fn adapt(
        &mut self,
        from: &mut PacketBatch,
        to: &mut PacketBatch,
        abilities: &PortAbilities,
        drops: &Drops,
    ) -> bool {
        if !self.segmenter.is_midway() && to.is_empty() && prepare(from, abilities, drops) {
            std::mem::swap(from, to);
            return true;
        }
        let mut cut = Segmented::default();
        while let Some(packet) = from.get(0) {
            let fit = if self.segmenter.is_midway() { Fit::Cut } else { abilities.fit(packet) };
            match fit {
                Fit::AsItIs if to.push(packet.data, *packet.meta) => from.advance(1),
                Fit::AsItIs if !to.is_empty() => break,
                Fit::Complete | Fit::Cut => {
                    if !self.segmenter.segment_front(from, to, abilities.max_packet, &mut cut) {
                        break;
                    }
                }
                // The second: larger than a whole batch.
                Fit::Never(_) | Fit::AsItIs => {
                    drops.add(if let Fit::Never(reason) = fit { reason } else { DropReason::TooLarge }, 1);
                    from.advance(1);
                }
            }
        }
        count(drops, cut);
        from.is_empty()
    }

    /// Whether some packet of `batch` cannot go as it is to a port with these abilities.
    pub fn is_needed(batch: &PacketBatch, abilities: &PortAbilities) -> bool {
        batch.iter().any(|packet| abilities.fit(packet) != Fit::AsItIs)
    }

    /// Whether the front packet of the source went out in part.
    pub fn is_midway(&self) -> bool {
        self.segmenter.is_midway()
    }

    /// Forgets the packet that went out in part: its source was cleared, or its destination changed.
    pub fn reset(&mut self) {
        self.segmenter.reset();
    }
}

fn count(drops: &Drops, cut: Segmented) {
    for (reason, n) in [(DropReason::TooLarge, cut.too_long), (DropReason::BadOffload, cut.malformed)] {
        if n > 0 {
            drops.add(reason, n as u64);
        }
    }
}

/// Completes checksums where the packets lie and drops what cannot go; `true` when every packet that
/// is left can go as it is. `false` leaves what the slow way has still to do.
fn prepare(batch: &mut PacketBatch, abilities: &PortAbilities, drops: &Drops) -> bool {
    let mut dead = false;
    for index in 0..batch.len() {
        let Some(packet) = batch.get(index) else { break };
        match abilities.fit(packet) {
            Fit::AsItIs => {}
            Fit::Cut => return false,
            Fit::Never(_) => dead = true,
            Fit::Complete => {
                dead |= !batch.get_mut(index).is_some_and(|mut packet| checksum::finish(&mut packet));
            }
        }
    }
    if dead {
        batch.retain(|packet| match abilities.fit(packet) {
            Fit::AsItIs => true,
            Fit::Complete | Fit::Cut => {
                drops.add(DropReason::BadOffload, 1);
                false
            }
            Fit::Never(reason) => {
                drops.add(reason, 1);
                false
            }
        });
    }
    true
}

#[cfg(test)]
mod tests {
    use sapper_proto::packet::checksum::{Verdict, verify};
    use sapper_proto::packet::{Checksum, Gso, PacketMeta};

    use super::super::PacketKind;
    use super::super::conformance::{packet, super_packet};
    use super::*;

    const PLAIN: PortAbilities = PortAbilities::plain(1500, PacketKind::Ip);
    const ABLE: PortAbilities =
        PortAbilities { tso4: true, tso6: true, uso: true, partial_checksum: true, ..PLAIN };

    /// An ordinary packet whose checksum is still to be completed.
    fn unfinished(number: u64) -> (Vec<u8>, PacketMeta) {
        let mut data = packet(number, 200);
        let pseudo = checksum::pseudo_header(&data, 17, 160).unwrap();
        data[46..48].copy_from_slice(&pseudo.to_be_bytes());
        (data, PacketMeta { checksum: Checksum::Partial { start: 40, offset: 6 }, ..PacketMeta::default() })
    }

    fn push(batch: &mut PacketBatch, (data, meta): (Vec<u8>, PacketMeta)) {
        assert!(batch.push(&data, meta));
    }

    fn arena(batch: &PacketBatch) -> *const u8 {
        batch.get(0).unwrap().data.as_ptr()
    }

    fn dropped(drops: &Drops, reason: DropReason) -> u64 {
        drops.iter().find(|drop| drop.0 == reason).unwrap().1
    }

    #[test]
    fn what_fits_is_exchanged_and_not_copied() {
        let (mut from, mut to) = (PacketBatch::new(1 << 17, 16), PacketBatch::new(1 << 17, 16));
        push(&mut from, super_packet(5000, 1000));
        push(&mut from, unfinished(1));
        let before = arena(&from);
        assert!(Adapter::new().adapt(&mut from, &mut to, &ABLE, &Drops::default()));
        assert_eq!((arena(&to), to.len(), from.len()), (before, 2, 0));
    }

    #[test]
    fn a_checksum_is_completed_where_the_packet_lies() {
        let (mut from, mut to) = (PacketBatch::new(1 << 17, 16), PacketBatch::new(1 << 17, 16));
        push(&mut from, unfinished(1));
        push(&mut from, (packet(2, 1501), PacketMeta::default()));
        push(&mut from, unfinished(3));
        push(&mut from, (packet(4, 60), unfinished(4).1));
        let lying = Checksum::Partial { start: 199, offset: 6 };
        push(&mut from, (packet(5, 200), PacketMeta { checksum: lying, ..PacketMeta::default() }));
        let (before, drops) = (arena(&from), Drops::default());
        assert!(Adapter::new().adapt(&mut from, &mut to, &PLAIN, &drops));
        assert_eq!(arena(&to), before);
        assert_eq!(to.len(), 3);
        for (got, number) in to.iter().take(2).zip([1, 3]) {
            assert_eq!((got.data, got.meta.checksum), (&packet(number, 200)[..], Checksum::Valid));
        }
        assert_eq!(dropped(&drops, DropReason::TooLarge), 1);
        assert_eq!(dropped(&drops, DropReason::BadOffload), 1);
    }

    #[test]
    fn large_packets_are_cut_and_the_cut_goes_on_where_it_stopped() {
        let (mut from, mut to) = (PacketBatch::new(1 << 17, 16), PacketBatch::new(1 << 17, 3));
        push(&mut from, (packet(1, 300), PacketMeta::default()));
        let (data, meta) = super_packet(7300, 1000);
        push(&mut from, (data.clone(), meta));
        push(&mut from, unfinished(2));
        let (mut adapter, drops) = (Adapter::new(), Drops::default());
        let mut arrived = Vec::new();
        loop {
            let done = adapter.adapt(&mut from, &mut to, &PLAIN, &drops);
            assert!(done || to.len() == 3, "it stops when the destination is full");
            arrived.extend(to.iter().map(|packet| (packet.data.to_vec(), *packet.meta)));
            to.clear();
            if done {
                break;
            }
        }
        assert_eq!(arrived.len(), 1 + 8 + 1);
        assert_eq!(arrived[0].0, packet(1, 300));
        assert_eq!(arrived[9].0, packet(2, 200));
        let mut payload = Vec::new();
        for (segment, meta) in &arrived[1..9] {
            assert_eq!((meta.gso, verify(segment)), (Gso::None, Verdict::Right));
            payload.extend_from_slice(&segment[60..]);
        }
        assert!(payload == data[60..]);
        assert_eq!(drops.total(), 0);
    }

    #[test]
    fn only_what_the_destination_does_not_take_is_cut() {
        let (mut from, mut to) = (PacketBatch::new(1 << 17, 16), PacketBatch::new(1 << 17, 64));
        let mut datagrams = packet(1, 2048);
        datagrams[44..46].copy_from_slice(&2008u16.to_be_bytes());
        let meta = PacketMeta { gso: Gso::Udp, gso_size: 500, header_len: 48, ..unfinished(1).1 };
        push(&mut from, super_packet(5000, 1000));
        push(&mut from, (datagrams, meta));
        push(&mut from, unfinished(2));
        let no_uso = PortAbilities { uso: false, ..ABLE };
        assert!(Adapter::new().adapt(&mut from, &mut to, &no_uso, &Drops::default()));
        let kinds: Vec<_> = to.iter().map(|packet| packet.meta.gso).collect();
        assert_eq!(kinds, [Gso::TcpV6, Gso::None, Gso::None, Gso::None, Gso::None, Gso::None]);
    }

    #[test]
    fn segments_follow_a_maximum_that_shrinks() {
        let (mut from, mut to) = (PacketBatch::new(1 << 17, 16), PacketBatch::new(1 << 17, 64));
        push(&mut from, super_packet(5000, 1400));
        let narrow = PortAbilities { max_packet: 1280, ..ABLE };
        assert!(Adapter::new().adapt(&mut from, &mut to, &narrow, &Drops::default()));
        assert!(to.len() == 5 && to.iter().all(|packet| packet.data.len() <= 1280));
    }

    #[test]
    fn a_lie_about_a_large_packet_is_a_drop() {
        let (mut from, mut to) = (PacketBatch::new(1 << 17, 16), PacketBatch::new(1 << 17, 16));
        let (data, meta) = super_packet(5000, 1000);
        push(&mut from, (data.clone(), PacketMeta { gso: Gso::TcpV4, ..meta }));
        push(&mut from, (data, PacketMeta { gso_size: 0, ..meta }));
        push(&mut from, (packet(1, 100), PacketMeta::default()));
        let drops = Drops::default();
        assert!(Adapter::new().adapt(&mut from, &mut to, &PLAIN, &drops));
        assert_eq!((to.len(), dropped(&drops, DropReason::BadOffload)), (1, 2));
    }
}
