//! TLS for guests of WASI 0.2: a connection over `wasi:sockets`, then `wasi:tls@0.2.0-draft` over it.
//!
//! [`Tcp::connect`] and [`Tcp::over_tls`] are all there is to it; [`Tls`] reads and writes like any stream of
//! Rust's. What is not here: WASI 0.3, where nothing has to be wrapped (`https_p3.rs`).

use std::io::{self, Read, Write};

use wasip2::io::streams::{InputStream, OutputStream, StreamError};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::ip_name_lookup::resolve_addresses;
use wasip2::sockets::network::{
    ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, Ipv6SocketAddress,
};
use wasip2::sockets::tcp::TcpSocket;
use wasip2::sockets::tcp_create_socket::create_tcp_socket;

/// The draft's interface, as `wit-bindgen` makes it.
pub mod bindings {
    wit_bindgen::generate!({
        path: "wit/p2",
        world: "with-tls",
        features: ["tls"],
        with: {
            "wasi:io/error@0.2.12": wasip2::io::error,
            "wasi:io/poll@0.2.12": wasip2::io::poll,
            "wasi:io/streams@0.2.12": wasip2::io::streams,
        },
        generate_all,
    });
}

pub use bindings::wasi::tls::types::{ClientConnection, ClientHandshake, FutureClientStreams};

/// A connection in clear. The streams are children of the socket: they must go first.
pub struct Tcp {
    pub input: InputStream,
    pub output: OutputStream,
    pub socket: TcpSocket,
}

/// A connection over TLS. The streams are children of the connection: they must go first.
pub struct Tls {
    pub input: InputStream,
    pub output: OutputStream,
    pub connection: ClientConnection,
    pub socket: TcpSocket,
}

/// The addresses of a name.
pub fn resolve(host: &str) -> Result<Vec<IpAddress>, String> {
    let network = instance_network();
    let failed = |error: ErrorCode| format!("looking {host} up: {}", error.name());
    let answers = resolve_addresses(&network, host).map_err(failed)?;
    let mut addresses = Vec::new();
    loop {
        match answers.resolve_next_address() {
            Ok(Some(address)) => addresses.push(address),
            Ok(None) => return Ok(addresses),
            Err(ErrorCode::WouldBlock) => answers.subscribe().block(),
            Err(error) => return Err(failed(error)),
        }
    }
}

fn connect_to(address: IpAddress, port: u16) -> Result<Tcp, ErrorCode> {
    let (family, to) = match address {
        IpAddress::Ipv4(address) => {
            (IpAddressFamily::Ipv4, IpSocketAddress::Ipv4(Ipv4SocketAddress { port, address }))
        }
        IpAddress::Ipv6(address) => {
            let to = Ipv6SocketAddress { port, flow_info: 0, address, scope_id: 0 };
            (IpAddressFamily::Ipv6, IpSocketAddress::Ipv6(to))
        }
    };
    let socket = create_tcp_socket(family)?;
    socket.start_connect(&instance_network(), to)?;
    loop {
        match socket.finish_connect() {
            Ok((input, output)) => return Ok(Tcp { input, output, socket }),
            Err(ErrorCode::WouldBlock) => socket.subscribe().block(),
            Err(error) => return Err(error),
        }
    }
}

impl Tcp {
    /// Connects to the first address of a name that answers.
    pub fn connect(host: &str, port: u16) -> Result<Self, String> {
        let mut last = format!("{host} has no address");
        for address in resolve(host)? {
            match connect_to(address, port) {
                Ok(connection) => return Ok(connection),
                Err(error) => last = format!("connecting to {host}:{port}: {}", error.name()),
            }
        }
        Err(last)
    }

    /// Hands the connection to the host, and gets a secure one back.
    pub fn over_tls(self, server_name: &str) -> Result<Tls, String> {
        let Self { input, output, socket } = self;
        let future = ClientHandshake::finish(ClientHandshake::new(server_name, input, output));
        future.subscribe().block();
        match future.get() {
            Some(Ok(Ok((connection, input, output)))) => Ok(Tls { input, output, connection, socket }),
            Some(Ok(Err(error))) => Err(error.to_debug_string()),
            Some(Err(())) | None => Err("the handshake's future gave nothing".into()),
        }
    }
}

impl Tls {
    /// Ends our direction with close_notify; the other goes on.
    pub fn close_output(&self) {
        self.connection.close_output();
    }
}

impl Read for Tls {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self.input.blocking_read(bytes.len() as u64) {
            Ok(read) => {
                bytes[..read.len()].copy_from_slice(&read);
                Ok(read.len())
            }
            Err(StreamError::Closed) => Ok(0),
            Err(StreamError::LastOperationFailed(error)) => Err(io::Error::other(error.to_debug_string())),
        }
    }
}

impl Write for Tls {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(&mut self.output, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Write::flush(&mut self.output)
    }
}
