//! An HTTPS request from a guest of WASI 0.2: `https HOST PORT [PATH]` prints what the server answers.

use std::io::{self, Read, Write};

use sapper_wasi_examples::Tcp;

fn request(host: &str, port: u16, path: &str) -> Result<(), String> {
    let mut tls = Tcp::connect(host, port)?.over_tls(host)?;
    write!(tls, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").map_err(text)?;
    tls.flush().map_err(text)?;
    let mut answer = Vec::new();
    // An end without close_notify is an error here: the answer may have been cut off.
    tls.read_to_end(&mut answer).map_err(text)?;
    io::stdout().write_all(&answer).map_err(text)
}

fn text(error: io::Error) -> String {
    error.to_string()
}

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let (host, port, path) = match &args[..] {
        [host, port] => (host, port, "/"),
        [host, port, path] => (host, port, path.as_str()),
        _ => {
            eprintln!("usage: https HOST PORT [PATH]");
            std::process::exit(2);
        }
    };
    let port = port.parse().map_err(|_| format!("{port} is no port"));
    if let Err(error) = port.and_then(|port| request(host, port, path)) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}
