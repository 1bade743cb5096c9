//! A login to PostgreSQL with mutual TLS, from a guest of WASI 0.2:
//! `postgres HOST PORT USER DATABASE QUERY` prints the rows of the query's answer.
//!
//! The guest has no key and no certificate: the host shows them to the server, and the server's rule
//! `cert` lets the user in without a password. The guest only asks for TLS in the middle of the
//! connection, as PostgreSQL wants it (SSLRequest), and hands the connection over.

use std::io::{self, Read, Write};

use sapper_wasi_examples::{Tcp, Tls};

const SSL_REQUEST: i32 = 80_877_103;
const PROTOCOL_3: i32 = 196_608;
/// Longest message that is believed.
const LONGEST: usize = 1 << 20;

fn text(error: io::Error) -> String {
    error.to_string()
}

fn connect(host: &str, port: u16) -> Result<Tls, String> {
    let mut tcp = Tcp::connect(host, port)?;
    let mut request = Vec::from(8_i32.to_be_bytes());
    request.extend(SSL_REQUEST.to_be_bytes());
    tcp.output.write_all(&request).map_err(text)?;
    Write::flush(&mut tcp.output).map_err(text)?;
    // One byte and not more: what follows it in clear is not the server's word.
    let mut answer = [0];
    tcp.input.read_exact(&mut answer).map_err(text)?;
    match answer[0] {
        b'S' => tcp.over_tls(host),
        b'N' => Err("the server has no TLS".into()),
        other => Err(format!("the server answered {other:#x} to SSLRequest")),
    }
}

fn send(tls: &mut Tls, kind: Option<u8>, body: &[u8]) -> Result<(), String> {
    let mut message: Vec<u8> = kind.into_iter().collect();
    message.extend((body.len() as i32 + 4).to_be_bytes());
    message.extend(body);
    tls.write_all(&message).and_then(|()| tls.flush()).map_err(text)
}

fn receive(tls: &mut Tls) -> Result<(u8, Vec<u8>), String> {
    let mut head = [0; 5];
    tls.read_exact(&mut head).map_err(text)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let length = length.checked_sub(4).filter(|length| *length <= LONGEST);
    let mut body = vec![0; length.ok_or("the server sent a message of a length that is none")?];
    tls.read_exact(&mut body).map_err(text)?;
    Ok((head[0], body))
}

/// The fields of an error: the one that people read.
fn complaint(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0);
    let message = fields.filter(|field| field.first() == Some(&b'M')).map(|field| &field[1..]).next();
    String::from_utf8_lossy(message.unwrap_or(b"no message")).into_owned()
}

fn row(body: &[u8]) -> Option<String> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut fields = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>()?;
        rest = after;
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            fields.push("NULL".into());
            continue;
        };
        let (field, after) = rest.split_at_checked(length)?;
        rest = after;
        fields.push(String::from_utf8_lossy(field).into_owned());
    }
    Some(fields.join("|"))
}

fn run(host: &str, port: &str, user: &str, database: &str, query: &str) -> Result<(), String> {
    let mut tls = connect(host, port.parse().map_err(|_| format!("{port} is no port"))?)?;
    let mut hello = Vec::from(PROTOCOL_3.to_be_bytes());
    for word in ["user", user, "database", database, ""] {
        hello.extend(word.bytes().chain([0]));
    }
    send(&mut tls, None, &hello)?;
    let mut asked = false;
    loop {
        let (kind, body) = receive(&mut tls)?;
        match kind {
            b'E' => return Err(complaint(&body)),
            b'R' if body != [0; 4] => return Err("the server wants a password, not a certificate".into()),
            b'D' => println!("{}", row(&body).ok_or("the server sent half a row")?),
            b'Z' if asked => break,
            b'Z' => {
                send(&mut tls, Some(b'Q'), &[query.as_bytes(), &[0]].concat())?;
                asked = true;
            }
            _ => {}
        }
    }
    send(&mut tls, Some(b'X'), &[])?;
    tls.close_output();
    Ok(())
}

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [host, port, user, database, query] = &args[..] else {
        eprintln!("usage: postgres HOST PORT USER DATABASE QUERY");
        std::process::exit(2);
    };
    if let Err(error) = run(host, port, user, database, query) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}
