//! What a guest of WASI 0.3 sees: `probe_p3 WHAT [HOST PORT NAME]` prints it, a line each.

use wasip3::sockets::ip_name_lookup::resolve_addresses;
use wasip3::sockets::types::{
    IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, Ipv6SocketAddress, TcpSocket,
};
use wasip3::wit_bindgen::{FutureReader, StreamReader};

mod bindings {
    wasip3::wit_bindgen::generate!({
        path: "../../../examples/wasi/wit/p3",
        world: "imports",
        runtime_path: "wasip3::wit_bindgen::rt",
        generate_all,
    });
}

use bindings::wasi::tls::client::Connector;
use bindings::wasi::tls::types::Error;
use bindings::wit_stream;

struct Guest;

wasip3::cli::command::export!(Guest);

type Done = FutureReader<Result<(), Error>>;

fn say(what: impl std::fmt::Display) {
    println!("{what}");
}

async fn tell(what: &str, done: Done) {
    match done.await {
        Ok(()) => say(format!("{what}: ok")),
        Err(error) => say(format!("{what}: {}", error.to_debug_string())),
    }
}

async fn end_of(what: &str, stream: StreamReader<u8>) {
    say(format!("{what}: {} bytes", stream.collect().await.len()));
}

async fn tell_connected(connector: Connector, name: &str) -> bool {
    match Connector::connect(connector, name.into()).await {
        Ok(()) => say("connect: ok"),
        Err(error) => {
            say(format!("connect: {}", error.to_debug_string()));
            return false;
        }
    }
    true
}

async fn connect(host: &str, port: u16) -> Result<TcpSocket, String> {
    let found = resolve_addresses(host.into()).await.map_err(|error| format!("lookup: {error:?}"))?;
    let mut last = "no address".into();
    for address in found {
        let (family, to) = match address {
            IpAddress::Ipv4(address) => {
                (IpAddressFamily::Ipv4, IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address }))
            }
            IpAddress::Ipv6(address) => {
                let to = Ipv6SocketAddress { port, flow_info: 0, address, scope_id: 0 };
                (IpAddressFamily::Ipv6, IpSocketAddress::Ipv6(to))
            }
        };
        let socket = TcpSocket::create(family).map_err(|error| format!("create: {error:?}"))?;
        match socket.connect(to).await {
            Ok(()) => return Ok(socket),
            Err(error) => last = format!("connect: {error:?}"),
        }
    }
    Err(last)
}

/// What can be asked of a connector without a connection.
async fn alone(what: &str) {
    let connector = Connector::new();
    match what {
        "send-twice" => {
            let (_cleartext, reader) = wit_stream::new();
            let _first = connector.send(reader);
            let (_cleartext, reader) = wit_stream::new();
            let (ciphertext, done) = connector.send(reader);
            end_of("ciphertext", ciphertext).await;
            tell("send", done).await;
        }
        "receive-twice" => {
            let (_ciphertext, reader) = wit_stream::new();
            let _first = connector.receive(reader);
            let (_ciphertext, reader) = wit_stream::new();
            let (cleartext, done) = connector.receive(reader);
            end_of("cleartext", cleartext).await;
            tell("receive", done).await;
        }
        "nothing" => {
            tell_connected(connector, "localhost").await;
        }
        "send-alone" => {
            let (cleartext, reader) = wit_stream::new();
            let (ciphertext, done) = connector.send(reader);
            tell_connected(connector, "localhost").await;
            drop(cleartext);
            end_of("ciphertext", ciphertext).await;
            tell("send", done).await;
        }
        "receive-alone" => {
            let (_ciphertext, reader) = wit_stream::new();
            let _received = connector.receive(reader);
            tell_connected(connector, "localhost").await;
        }
        "bad-name" => {
            let (cleartext_writer, reader) = wit_stream::new();
            let (ciphertext, sent) = connector.send(reader);
            let (writer, reader) = wit_stream::new();
            let (cleartext, received) = connector.receive(reader);
            tell_connected(connector, "no name").await;
            drop(writer);
            end_of("ciphertext", ciphertext).await;
            end_of("cleartext", cleartext).await;
            tell("receive", received).await;
            drop(cleartext_writer);
            tell("send", sent).await;
        }
        _ => say("there is no such probe"),
    }
}

async fn over_tls(what: &str, socket: TcpSocket, name: &str) {
    let connector = Connector::new();
    let (mut cleartext, reader) = wit_stream::new();
    let (ciphertext, sent) = connector.send(reader);
    let to_network = socket.send(ciphertext);
    let (ciphertext, from_network) = socket.receive();
    let (mut answers, received) = connector.receive(ciphertext);
    if !tell_connected(connector, name).await {
        if what == "handshake-alone" {
            return;
        }
        drop(cleartext);
        end_of("cleartext", answers).await;
        tell("receive", received).await;
        tell("send", sent).await;
        return;
    }
    match what {
        "handshake" | "handshake-alone" => {}
        "read" => {
            end_of("cleartext", answers).await;
            drop(cleartext);
            tell("receive", received).await;
        }
        "upload" => {
            let rest = cleartext.write_all(vec![7; 3_000_000]).await;
            say(format!("left: {}", rest.len()));
            drop(cleartext);
            tell("send", sent).await;
            end_of("cleartext", answers).await;
            tell("receive", received).await;
        }
        "drop-answers" => {
            drop(answers);
            let rest = cleartext.write_all(b"still here".to_vec()).await;
            say(format!("left: {}", rest.len()));
            drop(cleartext);
            tell("send", sent).await;
            tell("receive", received).await;
        }
        "echo" => {
            let pattern: Vec<u8> = (0..100_000_u32).map(|n| (n * 31 + n / 251) as u8).collect();
            let mut back = Vec::new();
            for piece in pattern.chunks(10_000) {
                cleartext.write_all(piece.to_vec()).await;
                let mut left = piece.len();
                while left > 0 {
                    let (_, some) = answers.read(Vec::with_capacity(left)).await;
                    if some.is_empty() {
                        return say("the answer ended");
                    }
                    left -= some.len();
                    back.extend(some);
                }
            }
            say(if back == pattern { "the same" } else { "other bytes" });
            drop(cleartext);
            tell("send", sent).await;
            end_of("cleartext", answers).await;
            tell("receive", received).await;
        }
        _ => say("there is no such probe"),
    }
    drop((to_network, from_network));
}

impl wasip3::exports::cli::run::Guest for Guest {
    async fn run() -> Result<(), ()> {
        let args: Vec<_> = std::env::args().skip(1).collect();
        let words: Vec<_> = args.iter().map(String::as_str).collect();
        match words[..] {
            ["exit", code] => wasip3::cli::exit::exit_with_code(code.parse().unwrap_or(99)),
            ["spin"] => loop {
                std::hint::black_box(0);
            },
            ["fail"] => return Err(()),
            [what] => alone(what).await,
            [what, host, port, name] => match connect(host, port.parse().unwrap_or(0)).await {
                Ok(socket) => over_tls(what, socket, name).await,
                Err(error) => say(error),
            },
            _ => return Err(()),
        }
        Ok(())
    }
}
