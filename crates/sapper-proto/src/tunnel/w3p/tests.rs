use proptest::prelude::*;

use super::*;
use crate::packet::testing::hex;

const LATER: Duration = Duration::from_secs(10);

fn accepted(port: u16, offer: Option<Offer>) -> Acknowledgement {
    Acknowledgement::Accepted { port, offer }
}

fn acknowledgement(body: &str) -> Result<Acknowledgement, W3pError> {
    match Acknowledgement::parse(&message(body))? {
        Parsed::Done { consumed, value } => {
            assert_eq!(consumed, PREFIX + body.len());
            Ok(value)
        }
        Parsed::NeedMore { .. } => panic!("it is whole"),
    }
}

#[test]
fn the_wire_forms() {
    let client = ClientHandshake::new(r#"{"id":"secret"}"#, LATER).unwrap();
    assert_eq!(client.message(), hex("57335054554e4c 0000000f 7b226964223a22736563726574227d"));
    assert_eq!(accepted(34567, None).encode(), hex("57335054554e4c 0000000e 7b22706f7274223a33343536377d"));
    assert_eq!(
        &accepted(34567, Some(Offer::OURS)).encode()[PREFIX..],
        br#"{"port":34567,"sapper":{"versions":[1,1],"capabilities":31}}"#
    );
    let refusal = |retry| Refusal { code: "rejected".into(), message: "no \"x\"".into(), retry };
    let body = |retry| Acknowledgement::Refused(refusal(retry)).encode().split_off(PREFIX);
    assert_eq!(
        std::str::from_utf8(&body(Retry::Never)),
        Ok(r#"{"error":{"code":"rejected","message":"no \"x\"","retry":false}}"#)
    );
    for retry in [Retry::Usual, Retry::Never, Retry::After(Duration::from_millis(1500))] {
        let text = String::from_utf8(body(retry)).unwrap();
        assert_eq!(acknowledgement(&text), Ok(Acknowledgement::Refused(refusal(retry))));
    }
}

#[test]
fn credentials_go_out_and_come_in_as_they_are() {
    // Order, spaces, numbers that a double cannot hold: the text is the user's.
    let text = r#"{ "z": 12345678901234567890, "a": {"ü": [null, 1.50]} }"#;
    let client = ClientHandshake::new(text, LATER).unwrap();
    let mut server = ServerHandshake::new(LATER);
    let Ok(Parsed::Done { consumed, value }) = server.handle_bytes(client.message()) else { panic!() };
    assert_eq!((consumed, value.text.as_str()), (client.message().len(), text));
    assert_eq!(format!("{value:?}"), format!("Credentials({} bytes)", text.len()));
    for wrong in ["[]", "1", "null", "\"x\""] {
        assert_eq!(ClientHandshake::new(wrong, LATER).unwrap_err(), W3pError::Message);
    }
    assert!(matches!(ClientHandshake::new("{", LATER), Err(W3pError::Json(_))));
    let long = format!("{{\"a\":\"{}\"}}", "x".repeat(LONGEST_HANDSHAKE));
    assert!(matches!(ClientHandshake::new(&long, LATER), Err(W3pError::TooLong(_))));
}

#[test]
fn credentials_are_what_json_parse_of_an_original_server_reads() {
    let read = |body: &str| ServerHandshake::new(LATER).handle_bytes(&message(body));
    let digits = format!("{{\"a\":{}}}", "9".repeat(6_000));
    let deep = |levels: usize| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
    let brackets_in_text = format!("{{\"a\":\"\\\"{}\"}}", "[".repeat(500));
    let accepted = [
        r#"{"a":"\ud800"}"#,
        r#"{"a":1e999}"#,
        " \n{\"a\":1,\"a\":2}\t",
        &digits,
        &brackets_in_text,
        &deep(127),
    ];
    for body in accepted {
        let Ok(Parsed::Done { value, .. }) = read(body) else { panic!("{body}: {:?}", read(body)) };
        assert_eq!(value.text, body);
    }
    let too_deep = deep(128);
    let endless = "[".repeat(LONGEST_HANDSHAKE);
    for body in
        [r#"{"a":NaN}"#, r#"{"a":"\u12"}"#, "{\"a\":\"\n\"}", "{}x", "", "{'a':1}", &too_deep, &endless]
    {
        assert!(matches!(read(body), Err(W3pError::Json(_))), "{body}: {:?}", read(body));
    }
    for body in ["[]", "1e999", "null", r#""\ud800""#] {
        assert_eq!(read(body), Err(W3pError::Message), "{body}");
    }
}

#[test]
fn what_a_server_answers_is_read_as_an_original_client_reads_it_and_better() {
    assert_eq!(acknowledgement(r#"{"port":1}"#), Ok(accepted(1, None)));
    assert_eq!(acknowledgement(r#"{"x":{},"port":8080.0}"#), Ok(accepted(8080, None)));
    for offer in [r#"1"#, r#"{}"#, r#"{"versions":[1]}"#, r#"{"versions":[1,999],"capabilities":1}"#] {
        assert_eq!(acknowledgement(&format!(r#"{{"port":1,"sapper":{offer}}}"#)), Ok(accepted(1, None)));
    }
    let newer = r#"{"port":1,"sapper":{"versions":[1,3],"capabilities":4294967295,"more":[]}}"#;
    let offer = Offer { newest: 3, oldest: 1, capabilities: Capabilities::ALL };
    assert_eq!(acknowledgement(newer), Ok(accepted(1, Some(offer))));
    assert_eq!(offer.common(Capabilities(3)), Some(Capabilities(3)));
    assert_eq!(Offer { oldest: 2, ..offer }.common(Capabilities::ALL), None);
    for wrong in [
        r#"{"port":"1"}"#,
        r#"{"port":0}"#,
        r#"{"port":65536}"#,
        r#"{"port":-1}"#,
        r#"{"port":1.5}"#,
        r#"{"port":null}"#,
        "{}",
        "[1]",
        r#"{"error":"no"}"#,
    ] {
        assert_eq!(acknowledgement(wrong), Err(W3pError::Message), "{wrong}");
    }
    let error = acknowledgement("{").unwrap_err().to_string();
    assert!(error.starts_with("Handshake message is not valid JSON: "), "{error}");
    let noisy = format!(r#"{{"error":{{"code":"a\u001bb","message":"{}"}}}}"#, "x".repeat(999));
    let Ok(Acknowledgement::Refused(refusal)) = acknowledgement(&noisy) else { panic!() };
    assert_eq!((refusal.code.as_str(), refusal.message.len()), ("a\u{fffd}b", 256));
    assert_eq!(refusal.retry, Retry::Usual);
    let Ok(Acknowledgement::Refused(refusal)) = acknowledgement(r#"{"error":{"code":"busy","retry":1e300}}"#)
    else {
        panic!()
    };
    assert_eq!(refusal.retry, Retry::After(Duration::from_secs(LONGEST_RETRY)));
}

#[test]
fn a_part_is_not_enough_and_lying_lengths_are_refused_early() {
    let bytes = accepted(1234, Some(Offer::OURS)).encode();
    for end in 0..bytes.len() {
        let Ok(Parsed::NeedMore { at_least }) = Acknowledgement::parse(&bytes[..end]) else { panic!() };
        assert!(at_least > end && at_least <= bytes.len());
    }
    let mut with_frames = bytes.clone();
    with_frames.extend([0, 0, 0, 5]);
    assert!(
        matches!(Acknowledgement::parse(&with_frames), Ok(Parsed::Done { consumed, .. }) if consumed == bytes.len())
    );
    let error = Acknowledgement::parse(&hex("57335054554e4c 00010001")).unwrap_err();
    assert_eq!(error.to_string(), "Declared message length 65537 is too long, maximum is 65536");
    let mut edge = hex("57335054554e4c 00010000");
    assert_eq!(Acknowledgement::parse(&edge), Ok(Parsed::NeedMore { at_least: PREFIX + 65_536 }));
    edge.extend(r#"{"port":7}"#.bytes().chain(std::iter::repeat_n(b' ', 65_526)));
    assert!(matches!(Acknowledgement::parse(&edge), Ok(Parsed::Done { .. })));
}

#[test]
fn those_who_speak_something_else_are_recognised() {
    let speech = |bytes: &[u8]| recognise(bytes).unwrap();
    assert_eq!(recognise(b""), None);
    assert_eq!(speech(b"W"), Speech::W3p);
    assert_eq!(speech(b"W3PTUNL\0"), Speech::W3p);
    assert_eq!(speech(b"W3PTUNX"), Speech::Other);
    assert_eq!(speech(&hex("16 0301 0200")), Speech::Tls);
    assert_eq!(speech(&TLS_ALERT), Speech::Tls);
    assert_eq!(speech(&[0x16]), Speech::Tls);
    assert_eq!(speech(&[0x16, 9]), Speech::Other);
    assert_eq!(speech(b"GET / HTTP/1.1"), Speech::Http);
    assert_eq!(speech(b"SSH-2.0"), Speech::Other);
    let error = Acknowledgement::parse(&TLS_ALERT).unwrap_err();
    assert_eq!(error, W3pError::Magic(Speech::Tls));
    assert_eq!(error.to_string(), "Invalid magic bytes");
}

#[test]
fn a_second_handshake_while_the_filter_runs_is_refused() {
    let client = ClientHandshake::new("{}", LATER).unwrap();
    let mut server = ServerHandshake::new(LATER);
    assert!(matches!(server.handle_bytes(client.message()), Ok(Parsed::Done { .. })));
    assert!(matches!(server.handle_bytes(client.message()), Ok(Parsed::NeedMore { at_least: 14 })));
    let twice = client.message().repeat(2);
    assert_eq!(server.handle_bytes(&twice).unwrap_err(), W3pError::Early);
    assert_eq!(ServerHandshake::new(LATER).handle_bytes(&twice).unwrap_err(), W3pError::Early);
    assert_eq!(server.answer(&accepted(9, None)), accepted(9, None).encode());
}

#[test]
fn three_bytes_do_not_hold_a_slot() {
    let mut server = ServerHandshake::new(LATER);
    assert!(matches!(server.handle_bytes(b"W3P"), Ok(Parsed::NeedMore { at_least: PREFIX })));
    assert_eq!(server.poll_timeout(), Some(LATER));
    assert_eq!(server.handle_timeout(LATER - Duration::from_nanos(1)), Ok(()));
    assert_eq!(server.handle_timeout(LATER), Err(W3pError::Deadline));
    let client = ClientHandshake::new("{}", LATER).unwrap();
    assert!(matches!(server.handle_bytes(client.message()), Ok(Parsed::Done { .. })));
    assert_eq!((server.poll_timeout(), server.handle_timeout(LATER)), (None, Ok(())));
    assert_eq!(client.handle_timeout(client.poll_timeout()), Err(W3pError::Deadline));
}

proptest! {
    #[test]
    fn perturbed_messages_do_not_panic(at in 0usize..70, value: u8, cut in 0usize..71) {
        let mut bytes = accepted(12345, Some(Offer::OURS)).encode();
        let at = at.min(bytes.len() - 1);
        bytes[at] = value;
        let bytes = &bytes[..cut.min(bytes.len())];
        let _ = Acknowledgement::parse(bytes);
        let _ = ServerHandshake::new(LATER).handle_bytes(bytes);
        let _ = recognise(bytes);
    }
}
