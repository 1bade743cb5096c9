//! What the fuzz targets of this part's parsers do with an input, as in [`crate::tls::fuzzed`].

use sapper_proto::tunnel::w3p::recognise;

use super::greeting::{ClientWords, final_port};

/// The words in both hellos: nothing is believed that does not have its form.
pub fn words(input: &[u8]) {
    let words = ClientWords::parse(input);
    assert!(words.instance.len() <= 256 && words.lease.as_ref().is_none_or(|lease| lease.len() <= 256));
    assert_eq!(ClientWords::parse(&words.encode()), words);
    let _ = final_port(input);
    let _ = recognise(input);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_words(input in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..80),
            r#"\{"(instance|lease|port)": ?("[a-z]{0,300}"|[0-9]{0,7}|null)\}"#.prop_map(String::into_bytes),
        ]) {
            words(&input);
        }
    }
}
