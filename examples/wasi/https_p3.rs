//! An HTTPS request from a guest of WASI 0.3: `https_p3 HOST PORT [PATH]` prints what the server answers.
//!
//! `wasi:tls@0.3.0-draft` transforms streams: cleartext into ciphertext for the socket, and back.

use std::io::{self, Write};

use wasip3::sockets::ip_name_lookup::resolve_addresses;
use wasip3::sockets::types::{
    IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, Ipv6SocketAddress, TcpSocket,
};

mod bindings {
    wasip3::wit_bindgen::generate!({
        path: "wit/p3",
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

impl wasip3::exports::cli::run::Guest for Guest {
    async fn run() -> Result<(), ()> {
        let args: Vec<_> = std::env::args().skip(1).collect();
        let (host, port, path) = match &args[..] {
            [host, port] => (host, port, "/"),
            [host, port, path] => (host, port, path.as_str()),
            _ => {
                eprintln!("usage: https_p3 HOST PORT [PATH]");
                return Err(());
            }
        };
        request(host, port, path).await.map_err(|error| eprintln!("{error}"))
    }
}

async fn connect(host: &str, port: u16) -> Result<TcpSocket, String> {
    let found = resolve_addresses(host.into()).await;
    let mut last = format!("{host} has no address");
    for address in found.map_err(|error| format!("looking {host} up: {error:?}"))? {
        let (family, to) = match address {
            IpAddress::Ipv4(address) => {
                (IpAddressFamily::Ipv4, IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address }))
            }
            IpAddress::Ipv6(address) => {
                let to = Ipv6SocketAddress { port, flow_info: 0, address, scope_id: 0 };
                (IpAddressFamily::Ipv6, IpSocketAddress::Ipv6(to))
            }
        };
        let socket = TcpSocket::create(family).map_err(|error| format!("{error:?}"))?;
        match socket.connect(to).await {
            Ok(()) => return Ok(socket),
            Err(error) => last = format!("connecting to {host}:{port}: {error:?}"),
        }
    }
    Err(last)
}

fn text(error: Error) -> String {
    error.to_debug_string()
}

async fn request(host: &str, port: &str, path: &str) -> Result<(), String> {
    let socket = connect(host, port.parse().map_err(|_| format!("{port} is no port"))?).await?;
    let connector = Connector::new();
    let (mut request, cleartext) = wit_stream::new();
    let (ciphertext, sent) = connector.send(cleartext);
    let _to_the_network = socket.send(ciphertext);
    let (ciphertext, _from_the_network) = socket.receive();
    let (answer, received) = connector.receive(ciphertext);
    Connector::connect(connector, host.into()).await.map_err(text)?;

    let head = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    if !request.write_all(head.into_bytes()).await.is_empty() {
        return Err(sent.await.map_err(text).err().unwrap_or_else(|| "the request was cut off".into()));
    }
    let answer = answer.collect().await;
    // The end of what we say is the end for a server that waits for it. The results say whether these were
    // all bytes: an end without close_notify is an error.
    drop(request);
    sent.await.map_err(text)?;
    received.await.map_err(text)?;
    io::stdout().write_all(&answer).map_err(|error| error.to_string())
}
