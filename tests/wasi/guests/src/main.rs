//! What a guest of WASI 0.2 sees: `probe_p2 WHAT [HOST PORT NAME]` prints it, a line each.

use std::io::{Read, Write};
use std::process::exit;

use sapper_wasi_examples::{ClientHandshake, Tcp, Tls, resolve};
use wasip2::io::streams::StreamError;

fn say(what: impl std::fmt::Display) {
    println!("{what}");
}

fn told<T>(result: Result<T, String>) -> Option<T> {
    result.map_err(|error| say(format!("error: {error}"))).ok()
}

/// What a read of everything comes to.
fn read_all(tls: &mut Tls) -> String {
    let mut bytes = 0;
    loop {
        match tls.input.blocking_read(65_536) {
            Ok(some) => bytes += some.len(),
            Err(StreamError::Closed) => return format!("{bytes} bytes, then the end"),
            Err(StreamError::LastOperationFailed(error)) => {
                return format!("{bytes} bytes, then {}", error.to_debug_string());
            }
        }
    }
}

fn finish_twice(tcp: Tcp, name: &str) {
    let Tcp { input, output, socket } = tcp;
    let future = ClientHandshake::finish(ClientHandshake::new(name, input, output));
    say(format!("at first: {}", if future.get().is_none() { "none" } else { "some" }));
    future.subscribe().block();
    let streams = match future.get() {
        Some(Ok(Ok(streams))) => streams,
        Some(Ok(Err(error))) => return say(format!("error: {}", error.to_debug_string())),
        other => return say(format!("unexpected: {}", other.is_some())),
    };
    say("then: streams");
    say(match future.get() {
        Some(Err(())) => "again: some(err)",
        Some(Ok(_)) => "again: some(ok)",
        None => "again: none",
    });
    let (connection, input, output) = streams;
    drop((input, output));
    drop((connection, socket));
}

/// Sends `total` bytes in pieces without flushing, and reads them back.
fn echo(tls: &mut Tls, total: usize) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let pattern: Vec<u8> = (0..65_536_u32).map(|n| (n * 31 + n / 251) as u8).collect();
    let mut back = vec![0; pattern.len()];
    let mut left = total;
    while left > 0 {
        let n = left.min(pattern.len());
        tls.write_all(&pattern[..n]).map_err(text)?;
        tls.read_exact(&mut back[..n]).map_err(text)?;
        if back[..n] != pattern[..n] {
            return Err("other bytes came back".into());
        }
        left -= n;
    }
    Ok(())
}

fn with_tls(what: &str, tcp: Tcp, name: &str) {
    if what == "finish-twice" {
        return finish_twice(tcp, name);
    }
    let Some(mut tls) = told(tcp.over_tls(name)) else { return };
    say("streams");
    match what {
        "handshake" => {}
        "read" => say(read_all(&mut tls)),
        // The other side reads all of it before it answers.
        "upload" => {
            let _ = told(tls.write_all(&vec![7; 3_000_000]).map_err(|error| error.to_string()));
            tls.close_output();
            say(read_all(&mut tls));
        }
        "close-output" => {
            tls.close_output();
            tls.connection.close_output();
            say(read_all(&mut tls));
            loop {
                match tls.output.check_write() {
                    Ok(0) => tls.output.subscribe().block(),
                    Ok(_) => break say("open"),
                    Err(StreamError::Closed) => break say("closed"),
                    Err(StreamError::LastOperationFailed(error)) => break say(error.to_debug_string()),
                }
            }
        }
        "drop-input" => {
            let Tls { input, output, connection, socket } = tls;
            drop(input);
            let written = output.blocking_write_and_flush(b"still here");
            say(if written.is_ok() { "written" } else { "not written" });
            drop(output);
            drop((connection, socket));
        }
        "drop-all" => drop(tls),
        _ => match what.strip_prefix("echo-").and_then(|count| count.parse().ok()) {
            Some(count) => {
                if told(echo(&mut tls, count)).is_some() {
                    say("the same");
                }
            }
            None => exit(99),
        },
    }
}

fn main() {
    let args: Vec<_> = std::env::args().collect();
    let words: Vec<_> = args[1..].iter().map(String::as_str).collect();
    match words[..] {
        ["args", ..] => args.iter().for_each(say),
        ["env"] => std::env::vars().for_each(|(name, value)| say(format!("{name}={value}"))),
        ["stdin"] => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).unwrap();
            std::io::stdout().write_all(&bytes).unwrap();
            eprintln!("{} bytes", bytes.len());
        }
        ["read-file", path] => match std::fs::read_to_string(path) {
            Ok(text) => print!("{text}"),
            Err(error) => say(format!("error: {:?}", error.kind())),
        },
        ["write-file", path] => match std::fs::write(path, "written") {
            Ok(()) => say("written"),
            Err(error) => say(format!("error: {:?}", error.kind())),
        },
        ["lookup", name] => match resolve(name) {
            Ok(addresses) => say(if addresses.is_empty() { "nothing" } else { "addresses" }),
            Err(error) => say(format!("error: {error}")),
        },
        ["connect", address] => match std::net::TcpStream::connect(address) {
            Ok(_) => say("connected"),
            Err(error) => say(format!("error: {:?}", error.kind())),
        },
        ["listen"] => match std::net::TcpListener::bind("127.0.0.1:0") {
            Ok(_) => say("listening"),
            Err(error) => say(format!("error: {:?}", error.kind())),
        },
        ["udp"] => match std::net::UdpSocket::bind("127.0.0.1:0") {
            Ok(_) => say("bound"),
            Err(error) => say(format!("error: {:?}", error.kind())),
        },
        ["exit", code] => exit(code.parse().unwrap()),
        ["panic"] => panic!("this guest panics"),
        ["spin"] => loop {
            std::hint::black_box(0);
        },
        ["sleep"] => std::thread::sleep(std::time::Duration::from_secs(3600)),
        ["memory", bytes] => {
            let block = vec![1_u8; bytes.parse().unwrap()];
            say(block.iter().map(|&byte| u64::from(byte)).sum::<u64>());
        }
        ["print", bytes] => {
            let text = vec![b'x'; bytes.parse().unwrap()];
            std::io::stdout().write_all(&text).unwrap();
        }
        ["handles"] => {
            let kept: Vec<_> =
                (0..1_000_000).map(|_| wasip2::clocks::monotonic_clock::subscribe_duration(1)).collect();
            say(kept.len());
        }
        [what, host, port, name] => {
            if let Some(tcp) = told(Tcp::connect(host, port.parse().unwrap())) {
                with_tls(what, tcp, name);
            }
        }
        _ => exit(99),
    }
}
