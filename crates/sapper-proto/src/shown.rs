//! What a stranger wrote and somebody will read, in a log, a table or an error.

/// Whether the character changes how what stands around it is shown: a control character (a line's end, a
/// terminal's command), or one that parts lines or turns the direction of text (Unicode UAX #9; the trick of
/// CVE-2021-42574), behind which a name looks like another one.
pub fn misleads(c: char) -> bool {
    const TURNS: [std::ops::RangeInclusive<char>; 4] =
        ['\u{61c}'..='\u{61c}', '\u{200e}'..='\u{200f}', '\u{2028}'..='\u{202e}', '\u{2066}'..='\u{2069}'];
    c.is_control() || TURNS.iter().any(|turns| turns.contains(&c))
}

/// The same character, or the sign for one that cannot be shown.
pub fn clean(c: char) -> char {
    if misleads(c) { char::REPLACEMENT_CHARACTER } else { c }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_turns_text_around_is_not_shown() {
        assert_eq!(
            "gpj\u{202e}.exe\n\u{2028}\u{9b}".chars().map(clean).collect::<String>(),
            "gpj\u{fffd}.exe\u{fffd}\u{fffd}\u{fffd}"
        );
        let ordinary = "grüße, שלום مرحبا 日本 👩‍🚀";
        assert_eq!(ordinary.chars().map(clean).collect::<String>(), ordinary);
    }
}
