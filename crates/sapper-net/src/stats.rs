//! Counters that a pump writes and anybody reads. Relaxed atomics: one writer, approximate readers.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. There is one writer, so a plain load and store do (no locked instruction).
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Why a packet was dropped. Each drop is counted under one of these.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DropReason { $($(#[$doc])* $name,)* }

        impl DropReason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)*];

            /// The word in stats and metrics.
            pub fn as_str(self) -> &'static str {
                match self { $(DropReason::$name => $text,)* }
            }
        }
    };
}

drop_reasons! {
    /// Larger than the other side takes.
    TooLarge = "too_large";
    /// Not a packet that the framing carries (bad header, other IP version).
    Malformed = "malformed";
    /// The receiver's queue was full and the port may drop.
    QueueFull = "queue_full";
    /// The device refused it (down, no memory).
    Refused = "refused";
    /// A large packet whose state could not be used.
    BadOffload = "bad_offload";
    /// Nobody takes packets for that destination.
    NoRoute = "no_route";
    /// Skipped while looking for the next record boundary.
    Resync = "resync";
}

/// Drops by reason.
#[derive(Debug, Default)]
pub struct Drops([Counter; DropReason::ALL.len()]);

impl Drops {
    /// Counts `n` drops.
    pub fn add(&self, reason: DropReason, n: u64) {
        self.0[reason as usize].add(n);
    }

    /// Each reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&reason| (reason, self.0[reason as usize].get()))
    }

    /// All drops.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }
}

/// What one endpoint has done. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct EndpointStats {
    /// Bytes received from the endpoint (stream bytes, or bytes of packets).
    pub bytes_received: Counter,
    /// Bytes sent to the endpoint.
    pub bytes_sent: Counter,
    /// Packets received, counted as they would lie on a wire (segments of a super-packet each).
    pub packets_received: Counter,
    /// Packets sent, counted the same way.
    pub packets_sent: Counter,
    /// TLS records opened.
    pub records_received: Counter,
    /// TLS records sealed.
    pub records_sent: Counter,
    /// System calls that received.
    pub receive_calls: Counter,
    /// System calls that sent.
    pub send_calls: Counter,
    /// Packets that were to be sent and were dropped.
    pub drops: Drops,
    /// Packets that came from the endpoint and were dropped.
    pub receive_drops: Drops,
}

/// Powers of two that a [`LatencyHistogram`] tells apart, the first one being below 128 ns: the last
/// bucket begins at 34 s and takes all that is above.
const OCTAVES: usize = 30;
const FIRST_OCTAVE: u32 = 7;

/// A histogram's coarse buckets, one for each power of two. Their bounds never change.
pub const LATENCY_BUCKETS: usize = OCTAVES;

/// Where each coarse bucket ends, but for the last one, which has no end.
pub fn latency_bounds() -> impl Iterator<Item = Duration> {
    (FIRST_OCTAVE..).take(LATENCY_BUCKETS - 1).map(|power| Duration::from_nanos(1 << power))
}

/// Durations in buckets of fixed bounds: each power of two is cut into equal parts, so that the error
/// of a quantile is bounded by one part.
///
/// Recording is a load and a store; the buckets are allocated at the first record, so that a
/// connection that never moved anything holds none.
pub struct LatencyHistogram {
    parts: usize,
    /// The buckets, and last the nanoseconds in all: an idle connection pays for neither.
    buckets: OnceLock<Box<[Counter]>>,
    largest: AtomicU64,
}

impl LatencyHistogram {
    /// Eight parts in a power of two: 2 KB once used, quantiles within an eighth. For every bridge.
    pub const fn coarse() -> Self {
        Self { parts: 8, buckets: OnceLock::new(), largest: AtomicU64::new(0) }
    }

    /// None: nothing is recorded. For an owner that has many connections and keeps bytes of each alone.
    pub const fn off() -> Self {
        Self { parts: 0, buckets: OnceLock::new(), largest: AtomicU64::new(0) }
    }

    /// Sixty-four parts: 15 KB once used, quantiles within a sixty-fourth. For measuring.
    pub const fn fine() -> Self {
        Self { parts: 64, buckets: OnceLock::new(), largest: AtomicU64::new(0) }
    }

    fn index(&self, nanos: u64) -> usize {
        let octave = (u64::BITS - nanos.leading_zeros()).saturating_sub(FIRST_OCTAVE) as usize;
        if octave == 0 {
            return (nanos as usize * self.parts) >> FIRST_OCTAVE;
        }
        if octave >= OCTAVES {
            return OCTAVES * self.parts - 1;
        }
        // The value lies in [2^(octave+6), 2^(octave+7)).
        let base = octave as u32 + FIRST_OCTAVE - 1;
        octave * self.parts + (((nanos - (1 << base)) as usize * self.parts) >> base)
    }

    /// Where the bucket begins, in nanoseconds.
    fn lower_bound(&self, index: usize) -> f64 {
        let (octave, part) = (index / self.parts, index % self.parts);
        let (base, width) = match octave {
            0 => (0.0, f64::from(1 << FIRST_OCTAVE)),
            _ => {
                let base = (1u64 << (octave as u32 + FIRST_OCTAVE - 1)) as f64;
                (base, base)
            }
        };
        base + width * part as f64 / self.parts as f64
    }

    /// Counts `n` packets that took this long.
    pub fn record_many(&self, took: Duration, n: u64) {
        if self.parts == 0 {
            return;
        }
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let buckets = self.buckets.get_or_init(|| {
            std::iter::repeat_with(Counter::default).take(OCTAVES * self.parts + 1).collect()
        });
        buckets[self.index(nanos)].add(n);
        buckets[OCTAVES * self.parts].add(nanos.saturating_mul(n));
        if nanos > self.largest.load(Relaxed) {
            self.largest.store(nanos, Relaxed);
        }
    }

    /// Counts one.
    pub fn record(&self, took: Duration) {
        self.record_many(took, 1);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.counts().iter().map(Counter::get).sum()
    }

    /// The fine buckets; none before the first record.
    fn counts(&self) -> &[Counter] {
        self.buckets.get().map_or(&[], |buckets| &buckets[..OCTAVES * self.parts])
    }

    /// How many lie in each coarse bucket: below the bound of its place in [`latency_bounds`], and not below the one
    /// before it.
    pub fn coarse_counts(&self) -> [u64; LATENCY_BUCKETS] {
        let mut coarse = [0; LATENCY_BUCKETS];
        for (index, bucket) in self.counts().iter().enumerate() {
            coarse[index / self.parts] += bucket.get();
        }
        coarse
    }

    /// All of them added up.
    pub fn sum(&self) -> Duration {
        self.buckets
            .get()
            .map_or(Duration::ZERO, |buckets| Duration::from_nanos(buckets[OCTAVES * self.parts].get()))
    }

    /// The duration that the fraction `q` (0 to 1) of all stayed below, interpolated within a bucket.
    /// `None` when nothing was counted.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let total = self.count();
        if total == 0 {
            return None;
        }
        let wanted = q.clamp(0.0, 1.0) * total as f64;
        let largest = self.largest.load(Relaxed) as f64;
        let mut below = 0.0;
        for (index, bucket) in self.counts().iter().enumerate() {
            let here = bucket.get() as f64;
            if here > 0.0 && below + here >= wanted {
                let (from, to) = (self.lower_bound(index), self.lower_bound(index + 1));
                let nanos = from + (to - from) * ((wanted - below) / here);
                return Some(Duration::from_nanos(nanos.min(largest) as u64));
            }
            below += here;
        }
        Some(self.largest())
    }

    /// The longest one.
    pub fn largest(&self) -> Duration {
        Duration::from_nanos(self.largest.load(Relaxed))
    }
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self::coarse()
    }
}

impl fmt::Debug for LatencyHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatencyHistogram")
            .field("count", &self.count())
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("largest", &self.largest())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_in_the_bucket_that_holds_it() {
        for histogram in [LatencyHistogram::coarse(), LatencyHistogram::fine()] {
            let mut last = 0;
            for shift in 0..40 {
                for nanos in [1u64 << shift, (1 << shift) + (1 << shift) / 3, (1 << (shift + 1)) - 1] {
                    let index = histogram.index(nanos);
                    assert!(index >= last, "{nanos} goes back to {index} from {last}");
                    last = index;
                    assert!(histogram.lower_bound(index) <= nanos as f64, "{nanos}");
                    if index + 1 < OCTAVES * histogram.parts {
                        assert!((nanos as f64) < histogram.lower_bound(index + 1), "{nanos}");
                    }
                }
            }
            assert_eq!(histogram.index(u64::MAX), OCTAVES * histogram.parts - 1);
        }
    }

    #[test]
    fn coarse_buckets_hold_what_is_below_their_bounds() {
        let bounds: Vec<_> = latency_bounds().collect();
        for histogram in [LatencyHistogram::coarse(), LatencyHistogram::fine()] {
            assert_eq!((histogram.coarse_counts(), histogram.sum()), ([0; LATENCY_BUCKETS], Duration::ZERO));
            let nano = Duration::from_nanos(1);
            for bound in &bounds {
                histogram.record(*bound - nano);
                histogram.record_many(*bound, 2);
            }
            let mut expected = [3; LATENCY_BUCKETS];
            (expected[0], expected[LATENCY_BUCKETS - 1]) = (1, 2);
            assert_eq!(histogram.coarse_counts(), expected);
            assert_eq!(histogram.count(), 3 * bounds.len() as u64, "the sum is no bucket");
            assert_eq!(histogram.sum() + nano * bounds.len() as u32, 3 * bounds.iter().sum::<Duration>());
        }
        let off = LatencyHistogram::off();
        off.record(Duration::from_secs(1));
        assert_eq!((off.coarse_counts(), off.sum()), ([0; LATENCY_BUCKETS], Duration::ZERO));
    }

    #[test]
    fn quantiles_are_as_near_as_the_parts_are_narrow() {
        let histogram = LatencyHistogram::fine();
        assert_eq!(histogram.quantile(0.5), None);
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        for (q, micros) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let got = histogram.quantile(q).unwrap().as_secs_f64() * 1e6;
            assert!((got / micros - 1.0).abs() < 0.02, "{q}: {got} µs");
        }
        assert_eq!(histogram.count(), 1000);
    }
}
