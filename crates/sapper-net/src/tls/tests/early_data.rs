//! Early data between our own ends: taken once, by a server that answers before the handshake's end.

use std::future::poll_fn;
use std::io::IoSlice;
use std::sync::{Arc, Mutex};

use super::pipe::{Pipe, pipe};
use super::*;
use crate::error::ErrorKind;
use crate::stream::Stream;
use crate::tls::HandshakeInfo;
use crate::tls::early_data::{EarlyData, EarlyOutcome, LARGEST};
use crate::tls::failure::alert;
use crate::tls::stream::TlsStream;

const LONG: usize = 1 << 20;

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn configs(allowed: usize) -> (TlsConfig, TlsConfig) {
    let client = TlsOptions { danger_early_data: LARGEST, ..client_options() };
    let server = TlsOptions { danger_early_data: allowed, ..server_options() };
    (TlsConfig::new(&client).unwrap(), TlsConfig::new(&server).unwrap())
}

fn early(bytes: &[u8], resend: bool) -> EarlyData {
    EarlyData { bytes: bytes.to_vec(), resend }
}

async fn client(
    end: Pipe,
    config: &TlsConfig,
    say: Option<&EarlyData>,
) -> Result<(TlsStream, HandshakeInfo)> {
    TlsStream::handshake_with_early_data(Box::new(end), config, &role(), &[], say).await
}

async fn server(end: Pipe, config: &TlsConfig) -> Result<(TlsStream, HandshakeInfo)> {
    TlsStream::handshake(Box::new(end), config, &Role::Server, &[]).await
}

async fn read(stream: &mut TlsStream, room: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0; room];
    let n = poll_fn(|cx| stream.poll_read(cx, &mut buf, &mut RecordMarks::ignored())).await?;
    buf.truncate(n);
    Ok(buf)
}

async fn read_exactly(stream: &mut TlsStream, len: usize, room: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let part = read(stream, room).await.unwrap();
        assert!(!part.is_empty(), "an end behind {} bytes of {len}", all.len());
        all.extend(part);
    }
    all
}

async fn write(stream: &mut TlsStream, data: &[u8]) {
    let n = poll_fn(|cx| stream.poll_write(cx, &[IoSlice::new(data)])).await.unwrap();
    assert_eq!(n, data.len());
    poll_fn(|cx| stream.poll_flush(cx)).await.unwrap();
}

/// A connection with what was agreed on.
type End = (TlsStream, HandshakeInfo);

/// Both ends of one connection; the tickets have come to the client.
async fn connect(configs: &(TlsConfig, TlsConfig), say: Option<&EarlyData>) -> (End, End) {
    let (a, b) = pipe(LONG);
    let (client, server) = tokio::join!(client(a, &configs.0, say), server(b, &configs.1));
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    if say.is_none() {
        write(&mut server.0, b"tickets came before").await;
        assert_eq!(read(&mut client.0, 100).await.unwrap(), b"tickets came before");
    }
    (client, server)
}

fn confirmation(stream: &mut TlsStream) -> Arc<Mutex<Option<Result<()>>>> {
    let heard = Arc::new(Mutex::new(None));
    let its = Arc::clone(&heard);
    stream.when_confirmed(Box::new(move |outcome| *its.lock().unwrap() = Some(outcome)));
    heard
}

#[test]
fn a_server_answers_before_the_clients_finished() {
    run(async {
        let configs = configs(LARGEST);
        connect(&configs, None).await;
        let (a, b) = pipe(LONG);
        let say = early(b"a question", false);
        let mut asking = Box::pin(client(a, &configs.0, Some(&say)));
        // The client's first flight, and nothing more of it.
        assert!(poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx).is_pending())).await);
        let (mut server, info) = server(b, &configs.1).await.unwrap();
        assert_eq!(info.early_data, Some(EarlyOutcome::Accepted(0)));
        assert!(info.resumed);
        let heard = confirmation(&mut server);
        assert_eq!(read(&mut server, 4).await.unwrap(), b"a qu");
        assert_eq!(read(&mut server, 100).await.unwrap(), b"estion");
        write(&mut server, b"an answer").await;
        // What belongs to a whole handshake has to wait.
        let refused = server.export_keying_material("EXPORTER-x", None, &mut [0; 32]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotStarted);
        assert_eq!(server.update_keys().unwrap_err().kind(), ErrorKind::NotStarted);
        assert!(heard.lock().unwrap().is_none());

        let (mut client, info) = asking.await.unwrap();
        assert_eq!(info.early_data, Some(EarlyOutcome::Accepted(10)));
        assert_eq!(read(&mut client, 100).await.unwrap(), b"an answer");
        write(&mut client, b"more").await;
        assert_eq!(read(&mut server, 100).await.unwrap(), b"more");
        assert!(matches!(*heard.lock().unwrap(), Some(Ok(()))));
        assert!(matches!(*confirmation(&mut server).lock().unwrap(), Some(Ok(()))));

        // The same keys at both ends, and each direction goes on behind what rustls has sealed.
        let mut keys = [[0; 32]; 2];
        client.export_keying_material("EXPORTER-x", None, &mut keys[0]).unwrap();
        server.export_keying_material("EXPORTER-x", None, &mut keys[1]).unwrap();
        assert_eq!(keys[0], keys[1]);
        server.update_keys().unwrap();
        write(&mut server, b"behind new keys").await;
        assert_eq!(read(&mut client, 100).await.unwrap(), b"behind new keys");
    });
}

#[test]
fn a_ticket_is_good_for_one_early_question() {
    run(async {
        let configs = configs(LARGEST);
        connect(&configs, None).await;
        let say = early(b"once", false);
        // What somebody on the way has seen of the first flight.
        let (a, mut stranger) = pipe(LONG);
        let mut asking = Box::pin(client(a, &configs.0, Some(&say)));
        assert!(poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx).is_pending())).await);
        let recorded = stranger.take();
        for time in 0..2 {
            let (mut replayer, end) = pipe(LONG);
            replayer.inject(&recorded);
            let mut answering = Box::pin(server(end, &configs.1));
            let done = poll_fn(|cx| std::task::Poll::Ready(answering.as_mut().poll(cx))).await;
            if time == 0 {
                let std::task::Poll::Ready(Ok((mut server, _))) = done else { panic!("not taken at first") };
                assert_eq!(read(&mut server, 100).await.unwrap(), b"once");
            } else {
                // A full handshake is offered, which a recording cannot finish.
                assert!(done.is_pending());
            }
        }
    });
}

#[test]
fn a_client_without_a_ticket_sends_nothing_early() {
    run(async {
        for resend in [false, true] {
            let configs = configs(LARGEST);
            let say = early(b"hello", resend);
            let ((mut client, info), (mut server, theirs)) = connect(&configs, Some(&say)).await;
            assert_eq!((info.early_data, theirs.early_data), (None, None));
            write(&mut client, b"|").await;
            let expected: &[u8] = if resend { b"hello|" } else { b"|" };
            assert_eq!(read_exactly(&mut server, expected.len(), 100).await, expected);
        }
    });
}

#[test]
fn what_a_server_rejects_is_sent_again_where_that_was_asked_for() {
    run(async {
        for resend in [false, true] {
            let configs = configs(LARGEST);
            connect(&configs, None).await;
            // Another server with the same certificate, which knows none of the sessions.
            let configs = (configs.0, self::configs(LARGEST).1);
            let say = early(b"hello", resend);
            let ((mut client, info), (mut server, theirs)) = connect(&configs, Some(&say)).await;
            assert_eq!((info.early_data, theirs.early_data), (Some(EarlyOutcome::Rejected), None));
            assert!(!info.resumed);
            write(&mut client, b"|").await;
            let expected: &[u8] = if resend { b"hello|" } else { b"|" };
            assert_eq!(read_exactly(&mut server, expected.len(), 100).await, expected);
        }
    });
}

#[test]
fn what_is_longer_than_the_server_allows_follows_behind() {
    run(async {
        let all: Vec<u8> = (0..40_000_u32).map(|i| (i % 251) as u8).collect();
        for allowed in [1, 100, 16_384, 16_385, 40_000] {
            for room in [7, 20_000] {
                let configs = configs(allowed);
                connect(&configs, None).await;
                let say = early(&all, true);
                let ((mut client, info), (mut server, _)) = connect(&configs, Some(&say)).await;
                assert_eq!(info.early_data, Some(EarlyOutcome::Accepted(allowed)));
                write(&mut client, b"|").await;
                let got = read_exactly(&mut server, all.len() + 1, room).await;
                assert_eq!((&got[..all.len()], &got[all.len()..]), (&all[..], &b"|"[..]), "{allowed}");
            }
        }
    });
}

#[test]
fn a_server_may_end_or_refuse_before_the_handshake_does() {
    run(async {
        for refuses in [false, true] {
            let configs = configs(LARGEST);
            connect(&configs, None).await;
            let (a, b) = pipe(LONG);
            let say = early(b"x", false);
            let mut asking = Box::pin(client(a, &configs.0, Some(&say)));
            assert!(poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx).is_pending())).await);
            let (mut server, _) = server(b, &configs.1).await.unwrap();
            write(&mut server, b"bye").await;
            if refuses {
                server.abort(alert::ACCESS_DENIED).await;
            } else {
                poll_fn(|cx| server.poll_send_eof(cx)).await.unwrap();
            }
            let (mut client, _) = asking.await.unwrap();
            assert_eq!(read(&mut client, 100).await.unwrap(), b"bye");
            let end = read(&mut client, 100).await;
            if refuses {
                assert_eq!(end.unwrap_err().alert(), Some(alert::ACCESS_DENIED));
                continue;
            }
            assert_eq!(end.unwrap(), b"");
            // The other direction goes on, through the end of the handshake.
            write(&mut client, b"still here").await;
            assert_eq!(read_exactly(&mut server, 11, 100).await, b"xstill here");
            let refused = poll_fn(|cx| server.poll_write(cx, &[IoSlice::new(b"x")])).await;
            assert!(refused.is_err());
        }
    });
}

#[test]
fn a_client_that_never_finishes_meets_a_deadline() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.unwrap().block_on(async {
        let configs = configs(LARGEST);
        connect(&configs, None).await;
        let (a, b) = pipe(LONG);
        let say = early(b"x", false);
        let mut asking = Box::pin(client(a, &configs.0, Some(&say)));
        assert!(poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx).is_pending())).await);
        let (mut server, _) = server(b, &configs.1).await.unwrap();
        let heard = confirmation(&mut server);
        assert_eq!(read(&mut server, 100).await.unwrap(), b"x");
        let error = read(&mut server, 100).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HandshakeDeadline);
        assert!(matches!(&*heard.lock().unwrap(), Some(Err(e)) if e.kind() == ErrorKind::HandshakeDeadline));
    });
}

#[test]
fn one_that_is_gone_tells_who_waits() {
    run(async {
        let configs = configs(LARGEST);
        connect(&configs, None).await;
        let (a, b) = pipe(LONG);
        let say = early(b"x", false);
        let mut asking = Box::pin(client(a, &configs.0, Some(&say)));
        assert!(poll_fn(|cx| std::task::Poll::Ready(asking.as_mut().poll(cx).is_pending())).await);
        let (mut server, _) = server(b, &configs.1).await.unwrap();
        let heard = confirmation(&mut server);
        drop(server);
        assert!(matches!(&*heard.lock().unwrap(), Some(Err(e)) if e.kind() == ErrorKind::Closed));
    });
}

#[test]
fn it_is_off_and_refused_by_name_where_it_cannot_be() {
    let refused = |options: TlsOptions| TlsConfig::new(&options).unwrap_err().field().map(str::to_owned);
    let field = Some("danger_early_data".to_owned());
    let with = |danger_early_data, options| TlsOptions { danger_early_data, ..options };
    assert_eq!(refused(with(LARGEST + 1, server_options())), field);
    assert_eq!(refused(with(1, psk_options(b"x", &[7; 32]))), field);
    assert_eq!(refused(with(1, only(TlsVersion::V1_2, server_options()))), field);
    assert_eq!(refused(with(1, TlsOptions { resumption: false, ..server_options() })), field);

    let field = |config: &TlsOptions, role: Role, len| {
        let error = TlsConfig::new(config).unwrap().check_early_data(&role, len).unwrap_err();
        assert_eq!(error.field(), Some("early_data"));
    };
    field(&client_options(), role(), 1);
    field(&with(10, client_options()), role(), 11);
    field(&with(10, server_options()), Role::Server, 1);
    TlsConfig::new(&with(10, client_options())).unwrap().check_early_data(&role(), 10).unwrap();
}
