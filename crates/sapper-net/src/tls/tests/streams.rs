//! [`TlsStream`] over a pipe: data both ways, back-pressure, half-close, truncation, directions,
//! strangers, deadlines.

use std::future::poll_fn;
use std::io::IoSlice;
use std::task::{Context, Poll, Waker};

use tokio::time::timeout;

use super::pipe::{Pipe, pipe};
use super::*;
use crate::error::{ErrorKind, Phase};
use crate::stream::Stream;
use crate::tls::HandshakeInfo;
use crate::tls::failure::alert;
use crate::tls::stream::{StreamDirection, TlsStream};

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Virtual time: waits pass at once when nothing else can happen.
fn run_paused<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(future)
}

async fn shake(end: Pipe, options: &TlsOptions, role: Role) -> Result<(TlsStream, HandshakeInfo)> {
    let config = TlsConfig::new(options)?;
    TlsStream::handshake(Box::new(end), &config, &role, &[]).await
}

async fn streams(client: &TlsOptions, server: &TlsOptions, capacity: usize) -> (TlsStream, TlsStream) {
    let (a, b) = pipe(capacity);
    let (client, server) = tokio::join!(shake(a, client, role()), shake(b, server, Role::Server));
    (client.unwrap().0, server.unwrap().0)
}

async fn write_all(stream: &mut TlsStream, mut data: &[u8]) -> Result<()> {
    while !data.is_empty() {
        let n = poll_fn(|cx| stream.poll_write(cx, &[IoSlice::new(data)])).await?;
        data = &data[n..];
    }
    poll_fn(|cx| stream.poll_flush(cx)).await
}

async fn read(stream: &mut TlsStream, room: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0; room];
    let n = poll_fn(|cx| stream.poll_read(cx, &mut buf, &mut RecordMarks::ignored())).await?;
    buf.truncate(n);
    Ok(buf)
}

async fn read_to_end(stream: &mut TlsStream, room: usize) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let part = read(stream, room).await?;
        if part.is_empty() {
            return Ok(all);
        }
        all.extend(part);
    }
}

async fn send_eof(stream: &mut TlsStream) -> Result<()> {
    poll_fn(|cx| stream.poll_send_eof(cx)).await
}

fn numbers(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[test]
fn megabytes_pass_both_ways_through_a_narrow_pipe() {
    run(async {
        for (kind, client, server) in kinds() {
            for (capacity, room) in [(100, 50_000), (1 << 20, 7), (70_000, 300_000)] {
                let data = numbers(if room < 10 { 30_000 } else { 1_500_000 });
                let (mut client, mut server) = streams(&client, &server, capacity).await;
                let there = async {
                    write_all(&mut client, &data).await.unwrap();
                    send_eof(&mut client).await.unwrap();
                    assert!(read_to_end(&mut client, room).await.unwrap() == data, "{kind}");
                    client
                };
                let back = async {
                    let got = read_to_end(&mut server, room).await.unwrap();
                    assert!(got == data, "{kind}");
                    // The other direction goes on after close_notify.
                    write_all(&mut server, &got).await.unwrap();
                    send_eof(&mut server).await.unwrap();
                    server
                };
                let (client, server) = tokio::join!(there, back);
                for stats in [client.stats(), server.stats()] {
                    assert!(stats.records_sent.get() >= (data.len() / 16_384) as u64);
                    assert!(stats.records_received.get() >= (data.len() / 16_384) as u64);
                }
            }
        }
    });
}

#[test]
fn two_ends_that_write_before_they_read_do_not_wait_for_each_other() {
    run(async {
        for (kind, client, server) in kinds() {
            let (client, server) = streams(&client, &server, 5000).await;
            let data = numbers(3_000_000);
            // Reads only while it cannot write, as a pump of both directions does.
            let both = |mut stream: TlsStream| {
                let data = &data;
                async move {
                    let (mut sent, mut got) = (0, Vec::new());
                    let mut buf = vec![0; 50_000];
                    poll_fn(|cx| {
                        let mut moved = true;
                        while moved {
                            moved = false;
                            if sent < data.len() {
                                while let Poll::Ready(n) =
                                    stream.poll_write(cx, &[IoSlice::new(&data[sent..])])
                                {
                                    sent += n.unwrap();
                                    moved = true;
                                    if sent == data.len() {
                                        break;
                                    }
                                }
                            }
                            let mut marks = RecordMarks::ignored();
                            while got.len() < data.len() {
                                let Poll::Ready(n) = stream.poll_read(cx, &mut buf, &mut marks) else {
                                    break;
                                };
                                got.extend_from_slice(&buf[..n.unwrap()]);
                                moved = true;
                            }
                        }
                        let flushed = stream.poll_flush(cx).is_ready();
                        if sent == data.len() && got.len() == data.len() && flushed {
                            Poll::Ready(())
                        } else {
                            Poll::Pending
                        }
                    })
                    .await;
                    assert!(got == *data);
                }
            };
            let (a, b) = (both(client), both(server));
            let done = timeout(Duration::from_secs(20), async { tokio::join!(a, b) }).await;
            assert!(done.is_ok(), "{kind}");
        }
    });
}

#[test]
fn each_slice_is_a_record_and_marks_say_where() {
    run(async {
        for (_, client, server) in kinds() {
            let (mut client, mut server) = streams(&client, &server, 1 << 20).await;
            let packets = [numbers(100), numbers(1), numbers(1280)];
            let slices: Vec<_> = packets.iter().map(|p| IoSlice::new(p)).collect();
            assert_eq!(poll_fn(|cx| client.poll_write(cx, &slices)).await.unwrap(), 1381);
            let mut marks = RecordMarks::wanted();
            let mut buf = vec![0; 70_000];
            let n = poll_fn(|cx| server.poll_read(cx, &mut buf, &mut marks)).await.unwrap();
            assert_eq!((n, marks.ends()), (1381, &[100, 101, 1381][..]));
        }
    });
}

#[test]
fn a_small_reader_gets_the_same_marks() {
    run(async {
        let (client, server) = (client_options(), server_options());
        let (mut client, mut server) = streams(&client, &server, 1 << 20).await;
        let packets = [numbers(10), numbers(5), numbers(25)];
        let slices: Vec<_> = packets.iter().map(|p| IoSlice::new(p)).collect();
        poll_fn(|cx| client.poll_write(cx, &slices)).await.unwrap();
        let (mut at, mut ends, mut all) = (0, Vec::new(), Vec::new());
        while all.len() < 40 {
            let mut marks = RecordMarks::wanted();
            let mut buf = [0; 4];
            let n = poll_fn(|cx| server.poll_read(cx, &mut buf, &mut marks)).await.unwrap();
            ends.extend(marks.ends().iter().map(|end| at + end));
            all.extend_from_slice(&buf[..n]);
            at += n as u32;
        }
        assert_eq!(ends, [10, 15, 40]);
        assert_eq!(all, packets.concat());
    });
}

#[test]
fn an_end_without_close_notify_is_truncation_unless_allowed() {
    run(async {
        for (kind, client, server) in kinds() {
            for ignore in [false, true] {
                let client = TlsOptions { danger_ignore_truncation: ignore, ..client.clone() };
                let (mut client, mut server) = streams(&client, &server, 1 << 20).await;
                write_all(&mut server, b"the start").await.unwrap();
                drop(server);
                assert_eq!(read(&mut client, 50_000).await.unwrap(), b"the start");
                let end = read(&mut client, 50_000).await;
                if ignore {
                    assert_eq!(end.unwrap(), b"", "{kind}");
                } else {
                    let error = end.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{kind}");
                    assert_eq!(error.reason(), Some("truncated"));
                    assert_eq!(error.phase(), Some(Phase::Transfer));
                }
            }
        }
    });
}

#[test]
fn a_record_that_was_cut_off_is_truncation_whatever_is_allowed() {
    run(async {
        let client = TlsOptions { danger_ignore_truncation: true, ..client_options() };
        let (mut client, mut server) = streams(&client, &server_options(), 1 << 20).await;
        below_tls(&mut server, &[23, 3, 3, 0, 40, 1, 2, 3]);
        drop(server);
        let error = read(&mut client, 50_000).await.unwrap_err();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::ConnectionLost, Some("truncated")));
        assert!(client.unused_data().is_empty());
    });
}

#[test]
fn what_follows_close_notify_is_kept_apart() {
    run(async {
        for (kind, client, server) in kinds() {
            let (a, b) = pipe(1 << 20);
            let (a, b) = tokio::join!(shake(a, &client, role()), shake(b, &server, Role::Server));
            let (mut client, mut server) = (a.unwrap().0, b.unwrap().0);
            write_all(&mut server, b"last").await.unwrap();
            send_eof(&mut server).await.unwrap();
            // Not TLS any more.
            below_tls(&mut server, b"plain text");
            assert_eq!(read(&mut client, 50_000).await.unwrap(), b"last", "{kind}");
            assert_eq!(read(&mut client, 50_000).await.unwrap(), b"", "{kind}");
            assert_eq!(client.unused_data(), b"plain text", "{kind}");
        }
    });
}

/// Sends bytes below TLS.
fn below_tls(stream: &mut TlsStream, bytes: &[u8]) {
    let mut cx = Context::from_waker(Waker::noop());
    let sent = stream.carrier().poll_write(&mut cx, &[IoSlice::new(bytes)]);
    assert!(matches!(sent, Poll::Ready(Ok(n)) if n == bytes.len()));
}

#[test]
fn a_direction_that_is_closed_to_data_stays_open_to_key_updates() {
    run(async {
        for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
            let (client, server) = (only(version, client_options()), only(version, server_options()));
            let (mut client, mut server) = streams(&client, &server, 1 << 20).await;
            client.set_direction(StreamDirection::EncryptOnly);
            server.set_direction(StreamDirection::DecryptOnly);
            if version == TlsVersion::V1_3 {
                server.update_keys().unwrap();
                poll_fn(|cx| server.poll_flush(cx)).await.unwrap();
            }
            write_all(&mut client, b"one way").await.unwrap();
            assert_eq!(read(&mut server, 50_000).await.unwrap(), b"one way");
            let refused = poll_fn(|cx| server.poll_write(cx, &[IoSlice::new(b"x")])).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ApiMisuse);
            // A peer that sends all the same.
            server.set_direction(StreamDirection::Duplex);
            write_all(&mut server, b"the other").await.unwrap();
            let error = read(&mut client, 50_000).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::RemoteProtocol);
            assert_eq!(error.alert(), Some(alert::UNEXPECTED_MESSAGE));
            let told = read(&mut server, 50_000).await.unwrap_err();
            assert_eq!((told.kind(), told.alert()), (ErrorKind::Tls, Some(alert::UNEXPECTED_MESSAGE)));
            assert!(told.alert_received());
        }
    });
}

#[test]
fn keys_that_are_new_are_not_updated_again() {
    run(async {
        let version = TlsVersion::V1_3;
        let (client, server) = (only(version, client_options()), only(version, server_options()));
        let (mut client, mut server) = streams(&client, &server, 1 << 20).await;
        for round in 0..2 {
            // More than a peer takes without data.
            for _ in 0..100 {
                server.update_keys().unwrap();
            }
            write_all(&mut server, &[round]).await.unwrap();
            assert_eq!(read(&mut client, 1).await.unwrap(), [round]);
        }
    });
}

#[test]
fn strangers_are_told_apart() {
    run_paused(async {
        for (words, role_is_client) in [
            ("SSH-2.0-OpenSSH_9.2\r\n", true),
            ("GET / HTTP/1.1\r\n\r\n", false),
            ("H", true),
            ("\0\0\0\x08", false),
        ] {
            let (a, mut b) = pipe(1 << 20);
            b.inject(words.as_bytes());
            let (options, role) =
                if role_is_client { (client_options(), role()) } else { (server_options(), Role::Server) };
            let error = shake(a, &options, role).await.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::IncompatiblePeer, "{words:?}");
            assert_eq!(error.phase(), Some(Phase::Handshake));
            assert!(error.message().starts_with("the peer does not speak TLS: it began with "), "{error}");
        }
    });
}

#[test]
fn a_stranger_that_begins_with_one_byte_is_quoted_in_full() {
    run_paused(async {
        let (a, mut b) = pipe(1 << 20);
        b.inject(b"H");
        let options = client_options();
        let later = async {
            tokio::task::yield_now().await;
            b.inject(b"TTP/1.0 400 Bad Request\r\n");
            std::future::pending::<()>().await;
        };
        let error = tokio::select! {
            result = shake(a, &options, role()) => result.err().unwrap(),
            () = later => unreachable!(),
        };
        assert!(error.message().contains("HTTP/1.0 400 Bad Request"), "{error}");
    });
}

#[test]
fn a_peer_that_closes_or_stalls_in_the_handshake_is_an_error_in_time() {
    run_paused(async {
        let options = client_options();
        let (a, b) = pipe(1 << 20);
        drop(b);
        let error = shake(a, &options, role()).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::ConnectionLost);
        assert_eq!(error.phase(), Some(Phase::Handshake));

        let (a, mut b) = pipe(1 << 20);
        b.end();
        let error = shake(a, &options, role()).await.err().unwrap();
        assert_eq!((error.kind(), error.reason()), (ErrorKind::ConnectionLost, Some("truncated")));

        // A goodbye says it too, while the connection is held: of each engine.
        for options in [client_options(), psk_options(b"x", &[7; 32])] {
            let (a, mut b) = pipe(1 << 20);
            b.inject(&[21, 3, 3, 0, 2, 1, alert::CLOSE_NOTIFY]);
            let error = timeout(Duration::from_secs(10), shake(a, &options, role())).await;
            let error = error.expect("at once").err().unwrap();
            assert_eq!((error.kind(), error.reason()), (ErrorKind::ConnectionLost, Some("truncated")));
        }

        // A deadline drops the future.
        let (a, b) = pipe(1 << 20);
        assert!(timeout(Duration::from_secs(10), shake(a, &options, role())).await.is_err());
        assert!(b.has_ended(), "the carrier is gone with the handshake");
    });
}

#[test]
fn bytes_that_were_read_before_the_handshake_count() {
    run(async {
        let (a, mut b) = pipe(1 << 20);
        let client_options = client_options();
        let client = shake(a, &client_options, role());
        let server = async {
            let mut first = Vec::new();
            while first.len() < 20 {
                tokio::task::yield_now().await;
                first.extend(b.take());
            }
            let config = TlsConfig::new(&server_options()).unwrap();
            TlsStream::handshake(Box::new(b), &config, &Role::Server, &first).await
        };
        let (client, server) = tokio::join!(client, server);
        assert_eq!(client.unwrap().1.version, "TLSv1.3");
        server.unwrap();
    });
}

#[test]
fn the_failing_side_tells_the_other_by_alert() {
    run(async {
        let (a, b) = pipe(1 << 20);
        let client =
            TlsOptions { roots: Roots::Own(other_authority().into_bytes().into()), ..TlsOptions::default() };
        let server = server_options();
        let (client, server) = tokio::join!(shake(a, &client, role()), shake(b, &server, Role::Server));
        let (client, server) = (client.err().unwrap(), server.err().unwrap());
        assert_eq!((client.kind(), client.reason()), (ErrorKind::Certificate, Some("unknown_issuer")));
        assert_eq!((client.alert(), client.alert_received()), (Some(alert::UNKNOWN_CA), false));
        assert_eq!(
            (server.kind(), server.alert()),
            (ErrorKind::CredentialsRejected, Some(alert::UNKNOWN_CA))
        );
        assert!(server.alert_received());
    });
}

#[test]
fn a_policy_that_says_no_reaches_the_peer() {
    run(async {
        let (mut client, mut server) = streams(&client_options(), &server_options(), 1 << 20).await;
        server.fatal_alert(alert::ACCESS_DENIED);
        let error = read(&mut client, 50_000).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.alert()),
            (ErrorKind::CredentialsRejected, Some(alert::ACCESS_DENIED))
        );
        let after = poll_fn(|cx| server.poll_write(cx, &[IoSlice::new(b"x")])).await.unwrap_err();
        assert_eq!(after.kind(), ErrorKind::Closed);
    });
}

#[test]
fn a_writer_waits_while_the_carrier_is_full() {
    run(async {
        for (_, client, server) in kinds() {
            let (mut client, mut server) = streams(&client, &server, 10_000).await;
            let data = numbers(64 * 1024);
            let mut cx = Context::from_waker(Waker::noop());
            let mut sent = 0;
            while let Poll::Ready(n) = client.poll_write(&mut cx, &[IoSlice::new(&data)]) {
                sent += n.unwrap();
                assert!(sent < 400 * 1024, "it takes without end");
            }
            let reader = async {
                let mut got = 0;
                while got < sent {
                    got += read(&mut server, 50_000).await.unwrap().len();
                }
            };
            tokio::join!(async { poll_fn(|cx| client.poll_flush(cx)).await.unwrap() }, reader);
        }
    });
}

#[test]
fn an_error_behind_data_is_told_without_anything_more_coming() {
    run(async {
        for (kind, client, server) in kinds() {
            let (mut client, mut server) = streams(&client, &server, 1 << 20).await;
            write_all(&mut server, b"data").await.unwrap();
            // No record at all, and shorter than the length it would announce.
            below_tls(&mut server, b"\x17\x09garbage");
            assert_eq!(read(&mut client, 50_000).await.unwrap(), b"data", "{kind}");
            poll_fn(|cx| client.poll_readable(cx)).await.unwrap();
            let error = read(&mut client, 50_000).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::RemoteProtocol, "{kind}: {error}");
            let told = read(&mut server, 50_000).await.unwrap_err();
            assert_eq!(told.alert(), Some(alert::UNEXPECTED_MESSAGE), "{kind}: {told}");
        }
    });
}
