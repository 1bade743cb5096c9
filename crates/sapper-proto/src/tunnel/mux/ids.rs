//! Which ids the streams of one end have had. They rise, and begin again behind the last, so two numbers say it.

/// How far an id may lie ahead of the newest to be a later one; all others lie behind it.
const REACH: u32 = 1 << 31;

/// The ids of all streams that one end of a connection has opened.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ids {
    last: Option<u32>,
    /// How far the first one lies behind the last, as far as that can be told.
    span: u32,
}

impl Ids {
    /// The newest.
    pub(super) fn last(self) -> Option<u32> {
        self.last
    }

    /// Whether `id` can be the next one.
    pub(super) fn may_follow(self, id: u32) -> bool {
        self.last.is_none_or(|last| (1..REACH).contains(&id.wrapping_sub(last)))
    }

    /// Adds the next one; what cannot be the next one is not one more.
    pub(super) fn add(&mut self, id: u32) {
        if self.may_follow(id) {
            let step = self.last.map_or(0, |last| id.wrapping_sub(last));
            self.span = (self.span + step).min(REACH - 1);
            self.last = Some(id);
        }
    }

    /// Whether a stream can have had `id`: it lies between the first and the last.
    pub(super) fn may_have(self, id: u32) -> bool {
        self.last.is_some_and(|last| last.wrapping_sub(id) <= self.span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_and_begin_again() {
        let mut ids = Ids::default();
        assert!(ids.may_follow(7) && !ids.may_have(7), "none was yet");
        for id in [u32::MAX - 5, u32::MAX - 3, 2, 4] {
            assert!(ids.may_follow(id) && !ids.may_have(id), "{id}");
            ids.add(id);
            assert!(!ids.may_follow(id) && ids.may_have(id), "{id}");
        }
        assert_eq!(ids.last(), Some(4));
        assert!([u32::MAX - 5, u32::MAX - 1, 0, 3].into_iter().all(|id| ids.may_have(id)));
        assert!(![u32::MAX - 6, 5, REACH + 3].into_iter().any(|id| ids.may_have(id)));
        ids.add(2);
        assert_eq!(ids.last(), Some(4), "one of the past is no later one");
    }

    #[test]
    fn once_round_every_id_behind_the_newest_was() {
        let mut ids = Ids::default();
        let quarter = REACH / 2;
        for id in [1, 1 + quarter, 1 + 2 * quarter, 1 + 3 * quarter, 1] {
            ids.add(id);
        }
        assert!(ids.may_have(1) && ids.may_have(2 + REACH) && ids.may_have(u32::MAX));
        assert!(!ids.may_have(2) && !ids.may_have(1 + REACH));
    }
}
