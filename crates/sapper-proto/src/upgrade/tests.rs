//! Both roles of every upgrade against each other, and each against what a hostile peer says.

use proptest::prelude::*;

use super::*;

/// One role with its wires.
struct Side {
    negotiation: Negotiation,
    wires: Wires,
}

impl Side {
    fn new(upgrade: Upgrade, role: Role) -> Self {
        Self { negotiation: Negotiation::new(upgrade, role), wires: Wires::default() }
    }

    fn step(&mut self) -> Result<Wants, UpgradeError> {
        self.negotiation.step(&mut self.wires)
    }

    /// Receives from the network; what it answers.
    fn hear(&mut self, bytes: impl AsRef<[u8]>) -> (Result<Wants, UpgradeError>, Vec<u8>) {
        self.wires.from_network.extend_from_slice(bytes.as_ref());
        let wants = self.step();
        (wants, std::mem::take(&mut self.wires.to_network))
    }

    fn hear_inside(&mut self, bytes: impl AsRef<[u8]>) -> (Result<Wants, UpgradeError>, Vec<u8>) {
        self.wires.from_inner.extend_from_slice(bytes.as_ref());
        let wants = self.step();
        (wants, std::mem::take(&mut self.wires.to_inner))
    }
}

fn client(upgrade: Upgrade) -> Side {
    Side::new(upgrade, Role::Client)
}

fn server(upgrade: Upgrade) -> Side {
    Side::new(upgrade, Role::Server)
}

/// What a service says first, and what a program answers, where a protocol has that.
fn service(upgrade: Upgrade) -> Vec<u8> {
    match upgrade {
        Upgrade::Smtp => b"220-mail.example\r\n220 ready\r\n".to_vec(),
        Upgrade::Imap => b"* OK [CAPABILITY IMAP4rev1] ready\r\n".to_vec(),
        Upgrade::Mysql => packet(0, &greeting(0xf7ff)),
        Upgrade::Postgres | Upgrade::PostgresDirect => Vec::new(),
    }
}

fn greeting(capabilities: u16) -> Vec<u8> {
    let mut payload = b"\x0a11.4.5-MariaDB\0\x07\0\0\0saltsalt\0".to_vec();
    payload.extend(capabilities.to_le_bytes());
    payload.extend(b"\x2d\x02\0\xff\xc7\x15\0\0\0\0\0\0\0\0\0\0moresaltmore\0mysql_native_password\0");
    payload
}

fn log_in() -> Vec<u8> {
    let mut payload = vec![0x85, 0xa2, 0x3f, 0x00, 0, 0, 0, 1, 45];
    payload.resize(32, 0);
    payload.extend(b"somebody\0\x14aaaaaaaaaaaaaaaaaaaamysql_native_password\0");
    payload
}

fn packet(sequence: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_le_bytes()[..3].to_vec();
    bytes.push(sequence);
    bytes.extend_from_slice(payload);
    bytes
}

fn carry_a_byte(from: &mut Side, to: &mut Side) {
    if !from.wires.to_network.is_empty() {
        to.wires.from_network.push(from.wires.to_network.remove(0));
    }
}

/// Runs our client against our server, byte by byte, a program and a service behind them.
fn meet(upgrade: Upgrade) -> (Side, Side) {
    let (mut near, mut far) = (client(upgrade), server(upgrade));
    far.wires.from_inner = service(upgrade);
    let mut wants = (Wants::Either, Wants::Either);
    for _ in 0..5_000 {
        if wants.0 != Wants::Tls {
            wants.0 = near.step().unwrap();
        }
        if wants.1 != Wants::Tls {
            wants.1 = far.step().unwrap();
        }
        if wants == (Wants::Tls, Wants::Tls) {
            return (near, far);
        }
        if upgrade == Upgrade::Mysql && !near.wires.to_inner.is_empty() {
            // The program: it sees a server without TLS.
            assert_eq!(near.wires.to_inner, service(upgrade));
            near.wires.to_inner.clear();
            near.wires.from_inner = packet(1, &log_in());
        }
        if upgrade == Upgrade::PostgresDirect {
            far.wires.from_network = vec![22, 3, 1];
        }
        carry_a_byte(&mut near, &mut far);
        carry_a_byte(&mut far, &mut near);
    }
    panic!("{upgrade:?}: {wants:?} {:?} {:?}", near.wires, far.wires);
}

#[test]
fn both_roles_of_every_upgrade_agree() {
    for (name, upgrade) in Upgrade::NAMES {
        assert_eq!(Upgrade::from_name(name), Some(upgrade));
        assert_eq!(upgrade.name(), name);
        let (mut near, mut far) = meet(upgrade);
        assert!(near.wires.to_network.is_empty() || upgrade == Upgrade::Mysql);
        if upgrade == Upgrade::PostgresDirect {
            far.wires.from_network.clear(); // TLS took it
        }
        if upgrade == Upgrade::Mysql {
            continue; // the_log_in_of_mysql_is_numbered_anew
        }
        assert_eq!(near.step(), Ok(Wants::Done), "{name}");
        assert_eq!(far.step(), Ok(Wants::Done), "{name}");
        let greeted = matches!(upgrade, Upgrade::Smtp | Upgrade::Imap);
        assert_eq!(!near.wires.to_inner.is_empty(), greeted, "{name}: a program hears a greeting");
        assert_eq!(far.wires, Wires::default(), "{name}: a service's greeting stops here");
    }
    assert_eq!(Upgrade::from_name("gopher"), None);
}

#[test]
fn the_wire_forms() {
    let mut postgres = client(Upgrade::Postgres);
    assert_eq!(postgres.hear(b""), (Ok(Wants::Network), vec![0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f]));
    assert_eq!(postgres.hear(b"S"), (Ok(Wants::Tls), vec![]));

    let mut smtp = client(Upgrade::Smtp);
    assert_eq!(smtp.hear(b""), (Ok(Wants::Network), vec![]));
    assert_eq!(
        smtp.hear(b"220 mail.example ESMTP\r\n"),
        (Ok(Wants::Network), b"EHLO localhost\r\n".to_vec())
    );
    let offer = b"250-mail.example\r\n250-SIZE 1000\r\n250 starttls\r\n";
    assert_eq!(smtp.hear(offer), (Ok(Wants::Network), b"STARTTLS\r\n".to_vec()));
    assert_eq!(smtp.hear(b"220 go\r\n"), (Ok(Wants::Tls), vec![]));

    let mut imap = client(Upgrade::Imap);
    assert_eq!(imap.hear(b"* OK hello\r\n"), (Ok(Wants::Network), b"S1 STARTTLS\r\n".to_vec()));
    assert_eq!(imap.hear(b"* CAPABILITY IMAP4rev1\r\nS1 OK go\r\n"), (Ok(Wants::Tls), vec![]));

    let mut direct = client(Upgrade::PostgresDirect);
    assert_eq!(direct.hear(b""), (Ok(Wants::Tls), vec![]));
}

/// CVE-2011-0411 (commands behind STARTTLS), CVE-2021-23222 (answers behind the last one in clear).
#[test]
fn nothing_may_lie_behind_the_last_word_in_clear() {
    let said: [(Side, &[&[u8]]); 7] = [
        (server(Upgrade::Smtp), &[b"EHLO x\r\n", b"STARTTLS\r\nMAIL FROM:<evil@example>\r\n"]),
        (server(Upgrade::Imap), &[b"a STARTTLS\r\nb NOOP\r\n"]),
        (server(Upgrade::Postgres), &[b"\0\0\0\x08\x04\xd2\x16\x2f\0\0\0\x09\0\x03\0\0\0"]),
        (client(Upgrade::Smtp), &[b"220 x\r\n", b"250-x\r\n250 STARTTLS\r\n", b"220 go\r\n250 evil\r\n"]),
        (client(Upgrade::Smtp), &[b"220 x\r\n", b"250-x\r\n250 STARTTLS\r\n220 go\r\n"]),
        (client(Upgrade::Imap), &[b"* OK x\r\n", b"S1 OK go\r\n* CAPABILITY EVIL\r\n"]),
        (client(Upgrade::Postgres), &[b"", b"SR\0\0\0\x08\0\0\0\0"]),
    ];
    for (mut side, messages) in said {
        let what = format!("{:?} {messages:?}", side.negotiation);
        let (last, before) = messages.split_last().unwrap();
        for message in before {
            assert_eq!(side.hear(message).0, Ok(Wants::Network), "{what}");
        }
        let (result, answer) = side.hear(last);
        assert!(matches!(result, Err(UpgradeError::Early(_))), "{what}: {result:?}");
        assert!(answer.is_empty(), "{what}: nobody is told that TLS begins");
    }
    let (mut near, mut far) = (client(Upgrade::Mysql), server(Upgrade::Mysql));
    near.wires.from_inner = packet(1, &log_in());
    let twice = [packet(0, &greeting(0xffff)), packet(2, b"\0\0\0")].concat();
    assert!(matches!(near.hear(twice).0, Err(UpgradeError::Early(_))));
    far.hear_inside(service(Upgrade::Mysql)).0.unwrap();
    let mut request = log_in();
    request.truncate(32);
    request[1] |= 8;
    let (result, answer) = far.hear([packet(1, &request), packet(2, &log_in())].concat());
    assert!(matches!(result, Err(UpgradeError::Early(_))));
    assert!(answer.is_empty());
    // TLS itself may lie there: this request has no answer to wait for.
    let mut far = server(Upgrade::Mysql);
    far.hear_inside(service(Upgrade::Mysql)).0.unwrap();
    assert_eq!(far.hear([packet(1, &request), vec![22, 3, 1]].concat()).0, Ok(Wants::Tls));
    assert_eq!(far.wires.from_network, [22, 3, 1]);
}

#[test]
fn a_peer_without_tls_is_refused_and_told() {
    let refused = |mut side: Side, messages: &[&[u8]]| {
        let mut answer = Vec::new();
        for (n, message) in messages.iter().enumerate() {
            let (result, said) = side.hear(message);
            answer = said;
            if n + 1 == messages.len() {
                assert!(matches!(result, Err(UpgradeError::Refused(_))), "{messages:?}: {result:?}");
            }
        }
        answer
    };
    refused(client(Upgrade::Postgres), &[b"N"]);
    refused(client(Upgrade::Postgres), &[b"E\0\0\0\x40FATAL: whatever a stranger likes"]);
    refused(client(Upgrade::Smtp), &[b"554 no\r\n"]);
    refused(client(Upgrade::Smtp), &[b"220 x\r\n", b"250-x\r\n250 SIZE\r\n"]);
    refused(client(Upgrade::Smtp), &[b"220 x\r\n", b"250-x\r\n250 STARTTLS\r\n", b"454 not now\r\n"]);
    refused(client(Upgrade::Imap), &[b"* PREAUTH you are in\r\n"]);
    refused(client(Upgrade::Imap), &[b"* BYE\r\n"]);
    refused(client(Upgrade::Imap), &[b"* OK x\r\n", b"S1 NO not here\r\n"]);
    refused(client(Upgrade::Mysql), &[&packet(0, &greeting(0xf7ff))]);
    let told =
        refused(server(Upgrade::Postgres), &[b"\0\0\0\x08\x04\xd2\x16\x30", b"\0\0\0\x0d\0\x03\0\0user\0"]);
    assert_eq!(told[0], b'E');
    assert_eq!(u32::from_be_bytes(told[1..5].try_into().unwrap()) as usize, told.len() - 1);
    refused(server(Upgrade::PostgresDirect), &[b"\0\0\0\x08\x04\xd2\x16\x2f"]);
    refused(server(Upgrade::Imap), &[b"a LOGIN {3}\r\n"]);
    let mut mysql = server(Upgrade::Mysql);
    mysql.hear_inside(service(Upgrade::Mysql)).0.unwrap();
    let (result, told) = mysql.hear(packet(1, &log_in()));
    assert!(matches!(result, Err(UpgradeError::Refused(_))));
    assert!(told.ends_with(b"under TLS only"));

    let mut smtp = server(Upgrade::Smtp);
    smtp.hear(b"").0.unwrap();
    for command in ["MAIL FROM:<a@b>\r\n", "AUTH PLAIN x\r\n", "DATA\r\n"] {
        let (result, answer) = smtp.hear(command);
        assert_eq!(result, Ok(Wants::Network));
        assert!(answer.starts_with(b"530 "));
    }
    let (result, answer) = smtp.hear("QUIT\r\n");
    assert_eq!(result, Err(UpgradeError::Left));
    assert!(answer.starts_with(b"221 "));
    let mut chunked = server(Upgrade::Smtp);
    chunked.hear(b"").0.unwrap();
    let (result, answer) = chunked.hear("bdat 10 LAST\r\nRSET\r\nNOOP\r\n");
    assert!(matches!(result, Err(UpgradeError::Refused(_))), "a chunk is no commands: {result:?}");
    assert!(answer.starts_with(b"530 ") && !answer.windows(4).any(|part| part == b"250 "));
    let mut imap = server(Upgrade::Imap);
    imap.hear(b"").0.unwrap();
    assert!(imap.hear(b"a LOGIN me secret\r\n").1.starts_with(b"a NO [PRIVACYREQUIRED]"));
    assert!(imap.hear(b"b CAPABILITY\r\n").1.starts_with(b"* CAPABILITY"));
    assert_eq!(imap.hear(b"c LOGOUT\r\n").0, Err(UpgradeError::Left));
}

#[test]
fn tls_at_once_needs_its_application_protocol() {
    let mut far = server(Upgrade::Postgres);
    assert_eq!(far.hear([22, 3, 1, 0]).0, Ok(Wants::Tls));
    assert_eq!(far.wires.from_network, [22, 3, 1, 0], "they are TLS's");
    assert_eq!(far.negotiation.check_alpn(Some(b"postgresql")), Ok(()));
    for agreed in [None, Some(&b"h2"[..])] {
        assert_eq!(far.negotiation.check_alpn(agreed), Err(UpgradeError::Alpn("postgresql")));
    }
    // Who asked for TLS need not agree on it: clients before version 17 do not.
    let (_, asked) = meet(Upgrade::Postgres);
    assert_eq!(asked.negotiation.check_alpn(None), Ok(()));
}

#[test]
fn the_log_in_of_mysql_is_numbered_anew() {
    let (mut near, mut far) = meet(Upgrade::Mysql);
    let moved = |from: &mut Vec<u8>, to: &mut Vec<u8>| to.append(from);
    // Under TLS now: the program's log-in arrives as it was written.
    assert_eq!(near.step(), Ok(Wants::Either));
    moved(&mut near.wires.to_network, &mut far.wires.from_network);
    assert_eq!(far.step(), Ok(Wants::Either));
    assert_eq!(far.wires.to_inner, packet(1, &log_in()));
    far.wires.to_inner.clear();
    // The service asks for another method, the program answers, the service agrees.
    for (from_service, payload) in
        [(true, &b"\xfemysql_native_password\0salt\0"[..]), (false, b"hash"), (true, b"\0\0\0\x02\0\0\0")]
    {
        let number = if from_service { if payload[0] == 0 { 4 } else { 2 } } else { 3 };
        let inside = packet(number, payload);
        let outside = packet(number + 1, payload);
        let (from, to) = if from_service { (&mut far, &mut near) } else { (&mut near, &mut far) };
        from.wires.from_inner.extend(&inside);
        from.step().unwrap();
        assert_eq!(from.wires.to_network, outside);
        moved(&mut from.wires.to_network, &mut to.wires.from_network);
        to.step().unwrap();
        assert_eq!(to.wires.to_inner, inside);
        to.wires.to_inner.clear();
    }
    assert_eq!((near.step(), far.step()), (Ok(Wants::Done), Ok(Wants::Done)));
}

#[test]
fn a_service_that_is_not_ready_is_an_error_of_the_inside() {
    for (upgrade, asks, says) in [
        (Upgrade::Smtp, &b"STARTTLS\r\n"[..], &b"421 busy\r\n"[..]),
        (Upgrade::Smtp, b"STARTTLS\r\n", b"HTTP/1.1 400\r\n"),
        (Upgrade::Imap, b"a STARTTLS\r\n", b"* PREAUTH come in\r\n"),
        (Upgrade::Imap, b"a STARTTLS\r\n", b"* BYE\r\n"),
    ] {
        let mut far = server(upgrade);
        assert_eq!(far.hear(asks).0, Ok(Wants::Tls));
        assert_eq!(far.step(), Ok(Wants::Inner));
        assert!(matches!(far.hear_inside(says).0, Err(UpgradeError::Inside(_))));
    }
    let mut mysql = server(Upgrade::Mysql);
    mysql.wires.from_inner = packet(0, b"\xff\x10\x04Too many connections");
    let (result, told) = mysql.hear(b"");
    assert!(matches!(result, Err(UpgradeError::Inside(_))));
    assert!(told.ends_with(b"Too many connections"), "the client hears why");
}

#[test]
fn who_talks_without_end_is_cut_off() {
    let mut line = server(Upgrade::Smtp);
    assert_eq!(line.hear(vec![b'x'; 3_000]).0, Err(UpgradeError::TooMuch));
    for (mut side, word) in [
        (server(Upgrade::Smtp), "NOOP\r\n"),
        (server(Upgrade::Imap), "a NOOP\r\n"),
        (client(Upgrade::Imap), "* OK\r\n"),
        (client(Upgrade::Smtp), "220-x\r\n"),
    ] {
        if word.starts_with('*') {
            side.hear("* OK hello\r\n").0.unwrap();
        }
        let result = (0..1_000).find_map(|_| side.hear(word).0.err());
        assert_eq!(result, Some(UpgradeError::TooMuch), "{word:?}");
    }
    // Only CR LF ends a line.
    for text in ["STARTTLS\n", "NOOP\rSTARTTLS\r\n", "NO\0OP\r\n"] {
        assert_eq!(server(Upgrade::Smtp).hear(text).0, Err(UpgradeError::Malformed("SMTP")));
    }
}

fn any_side() -> impl Strategy<Value = (Upgrade, Role)> {
    (0..Upgrade::NAMES.len(), prop::bool::ANY)
        .prop_map(|(n, is_client)| (Upgrade::NAMES[n].1, if is_client { Role::Client } else { Role::Server }))
}

proptest! {
    #[test]
    fn nothing_that_arrives_breaks_it(
        (upgrade, role) in any_side(),
        pieces in prop::collection::vec((prop::bool::ANY, prop::collection::vec(any::<u8>(), 0..200)), 0..20),
    ) {
        let mut side = Side::new(upgrade, role);
        side.wires.from_inner = service(upgrade);
        for (inside, piece) in pieces {
            let to = if inside { &mut side.wires.from_inner } else { &mut side.wires.from_network };
            to.extend(piece);
            if side.step().is_err() {
                break;
            }
        }
    }

    #[test]
    fn however_it_is_cut_it_says_the_same(
        (upgrade, role) in any_side(), text in "(EHLO x\r\n|a NOOP\r\n|a STARTTLS\r\n|STARTTLS\r\n|220 x\r\n|250 STARTTLS\r\n|[* ]OK\r\n){0,4}",
    ) {
        let run = |pieces: Vec<&[u8]>| {
            let mut side = Side::new(upgrade, role);
            let mut said = Vec::new();
            for piece in pieces {
                let (result, answer) = side.hear(piece);
                said.extend(answer);
                match result {
                    Ok(Wants::Network | Wants::Inner | Wants::Either) => {}
                    // What lies behind depends on what had arrived by then.
                    _ => break,
                }
            }
            said
        };
        let whole = run(vec![text.as_bytes()]);
        let cut = run(text.as_bytes().chunks(1).collect());
        prop_assert!(whole.is_empty() || cut.starts_with(&whole) || whole.starts_with(&cut));
    }
}
