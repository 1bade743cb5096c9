//! Which packets a tap wants: a small part of tcpdump's filter language.
//!
//! ```text
//! expression  term { (and | && | or | ||) term }      both bind alike, from the left, as in tcpdump
//! term        not term | ! term | ( expression ) | primitive
//! primitive   ip | ip6 | tcp | udp | icmp | icmp6
//!             [ip | ip6] [src | dst] host ADDRESS     `src ADDRESS` is short for `src host ADDRESS`
//!             [ip | ip6] [src | dst] net ADDRESS/BITS
//!             [tcp | udp] [src | dst] port NUMBER
//!             greater NUMBER | less NUMBER            length of the packet, the number included
//! ```
//!
//! The empty filter wants everything. Differences from tcpdump: no names (hosts, ports), addresses
//! are looked for in IP packets only (not ARP), extension headers and VLAN tags are walked over.
//! Evaluating is total on any bytes: what a packet does not have, it does not match.

use std::net::IpAddr;

use crate::packet::ip::{self, Fragment, IpHeader, Version, protocol};
use crate::pcapng::LinkType;

/// The longest text that is taken.
pub const LONGEST: usize = 4_096;
/// The deepest nesting of parentheses.
pub const DEEPEST: usize = 64;

/// A filter that was understood.
///
/// Kept as a program of tests and forward jumps: evaluating it is one loop, whatever the text was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    text: String,
    program: Vec<Op>,
}

/// Why a text is no filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {problem}")]
pub struct FilterError {
    /// Where in the text, in bytes.
    pub at: usize,
    /// What is wrong there.
    pub problem: Problem,
}

/// What is wrong in a filter's text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A primitive, `not` or a parenthesis should be here.
    #[error("{0} where a primitive is expected")]
    Primitive(Word),
    /// Something else should be here.
    #[error("{found} where {expected} is expected")]
    Expected {
        /// What should be here.
        expected: &'static str,
        /// What is.
        found: Word,
    },
    /// `tcp host`, `ip port` and the like.
    #[error("{0}")]
    Qualifier(&'static str),
    /// `net` with address bits behind its prefix.
    #[error("network has bits behind its prefix")]
    HostBits,
    /// Longer than [`LONGEST`].
    #[error("longer than {LONGEST} bytes")]
    TooLong,
    /// Nested deeper than [`DEEPEST`].
    #[error("nested deeper than {DEEPEST}")]
    TooDeep,
}

/// A word of the text, or its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word(Option<String>);

impl std::fmt::Display for Word {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(word) => write!(f, "{word:?}"),
            None => f.write_str("end"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Test(Test),
    Not,
    /// Forward, to an index of the program.
    SkipIfFalse(usize),
    SkipIfTrue(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    Always,
    Version(Version),
    /// IP protocol; ICMP and its IPv6 form belong to one version each.
    Protocol(Option<Version>, u8),
    /// An address within a network of so many bits.
    Net(Side, IpAddr, u8),
    /// A port of TCP, UDP or (without a protocol) both.
    Port(Option<u8>, Side, u16),
    Greater(usize),
    Less(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
    Either,
}

impl Filter {
    /// Reads a filter.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        if text.len() > LONGEST {
            return Err(FilterError { at: LONGEST, problem: Problem::TooLong });
        }
        let mut parser = Parser { text, at: 0, program: Vec::new() };
        if parser.peek().is_empty() {
            parser.program.push(Op::Test(Test::Always));
        } else {
            parser.expression(0)?;
            if !parser.peek().is_empty() {
                return Err(parser.expected("\"and\", \"or\" or the end"));
            }
        }
        Ok(Self { text: text.to_owned(), program: parser.program })
    }

    /// The text that it was read from.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it wants this packet or frame.
    pub fn matches(&self, link: LinkType, bytes: &[u8]) -> bool {
        let view = View::new(link, bytes);
        let (mut result, mut at) = (true, 0);
        while let Some(op) = self.program.get(at) {
            at += 1;
            match *op {
                Op::Test(test) => result = view.test(test),
                Op::Not => result = !result,
                Op::SkipIfFalse(to) if !result => at = to,
                Op::SkipIfTrue(to) if result => at = to,
                Op::SkipIfFalse(_) | Op::SkipIfTrue(_) => {}
            }
        }
        result
    }
}

impl std::str::FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        Self::parse(text)
    }
}

/// A packet as the tests look at it.
struct View<'a> {
    len: usize,
    ip: &'a [u8],
    version: Option<Version>,
    header: Option<IpHeader>,
}

impl<'a> View<'a> {
    fn new(link: LinkType, bytes: &'a [u8]) -> Self {
        let ip = match link {
            LinkType::Raw => bytes,
            LinkType::Ethernet => ethernet_payload(bytes).unwrap_or_default(),
        };
        let header = IpHeader::parse(ip).ok();
        Self { len: bytes.len(), ip, version: ip::version(ip), header }
    }

    fn test(&self, test: Test) -> bool {
        match test {
            Test::Always => true,
            Test::Version(version) => self.version == Some(version),
            Test::Protocol(version, protocol) => {
                (version.is_none() || version == self.version)
                    && self.header.is_some_and(|header| header.protocol == protocol)
            }
            Test::Net(side, net, bits) => ip::addresses(self.ip).is_some_and(|(source, destination)| {
                side.any(contains(net, bits, source), contains(net, bits, destination))
            }),
            Test::Port(protocol, side, port) => self
                .ports(protocol)
                .is_some_and(|(source, destination)| side.any(source == port, destination == port)),
            Test::Greater(len) => self.len >= len,
            Test::Less(len) => self.len <= len,
        }
    }

    fn ports(&self, wanted: Option<u8>) -> Option<(u16, u16)> {
        let header = self.header.filter(|header| header.fragment != Fragment::Later)?;
        let has_ports = match wanted {
            Some(protocol) => header.protocol == protocol,
            None => matches!(header.protocol, protocol::TCP | protocol::UDP),
        };
        match self.ip.get(header.header_len..)? {
            &[a, b, c, d, ..] if has_ports => Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))),
            _ => None,
        }
    }
}

impl Side {
    fn any(self, source: bool, destination: bool) -> bool {
        match self {
            Self::Source => source,
            Self::Destination => destination,
            Self::Either => source || destination,
        }
    }
}

/// The IP packet in an Ethernet frame, behind up to two VLAN tags.
fn ethernet_payload(frame: &[u8]) -> Option<&[u8]> {
    let mut at = 12;
    for _ in 0..3 {
        match *frame.get(at..at + 2)? {
            [0x08, 0x00] | [0x86, 0xdd] => return frame.get(at + 2..),
            [0x81, 0x00] | [0x88, 0xa8] => at += 4,
            _ => return None,
        }
    }
    None
}

fn contains(net: IpAddr, bits: u8, address: IpAddr) -> bool {
    match (net, address) {
        (IpAddr::V4(net), IpAddr::V4(address)) => {
            (net.to_bits() ^ address.to_bits()).checked_shr(32 - u32::from(bits)).unwrap_or(0) == 0
        }
        (IpAddr::V6(net), IpAddr::V6(address)) => {
            (net.to_bits() ^ address.to_bits()).checked_shr(128 - u32::from(bits)).unwrap_or(0) == 0
        }
        _ => false,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    program: Vec<Op>,
}

impl<'a> Parser<'a> {
    /// The next word, not taken: a parenthesis, an operator sign, or everything up to one of them or
    /// a blank. Empty at the end.
    fn peek(&mut self) -> &'a str {
        self.at = self.text.len() - self.text[self.at..].trim_start().len();
        let rest = &self.text[self.at..];
        for sign in ["(", ")", "&&", "||", "!"] {
            if rest.starts_with(sign) {
                return &rest[..sign.len()];
            }
        }
        let end = |c: char| c.is_whitespace() || "()&|!".contains(c);
        // A lone "&" or "|" is a word of its own, and no good one.
        let len = rest.find(end).map_or(rest.len(), |len| len.max(usize::from(!rest.is_empty())));
        &rest[..len]
    }

    fn take(&mut self) -> &'a str {
        let word = self.peek();
        self.at += word.len();
        word
    }

    /// Takes the next word if it is this one.
    fn took(&mut self, word: &str) -> bool {
        let is = self.peek() == word;
        if is {
            self.at += word.len();
        }
        is
    }

    fn word(&mut self) -> Word {
        // As much of it as helps; a text of one long word is not thrown back whole.
        const SHOWN: usize = 40;
        let word = self.peek();
        Word((!word.is_empty()).then(|| word.chars().take(SHOWN).collect()))
    }

    fn error(&self, problem: Problem) -> FilterError {
        FilterError { at: self.at, problem }
    }

    fn expected(&mut self, expected: &'static str) -> FilterError {
        let found = self.word();
        self.error(Problem::Expected { expected, found })
    }

    fn expression(&mut self, depth: usize) -> Result<(), FilterError> {
        self.term(depth)?;
        loop {
            let and = self.took("and") || self.took("&&");
            if !and && !self.took("or") && !self.took("||") {
                return Ok(());
            }
            let skip = self.program.len();
            self.program.push(Op::Not);
            self.term(depth)?;
            let end = self.program.len();
            self.program[skip] = if and { Op::SkipIfFalse(end) } else { Op::SkipIfTrue(end) };
        }
    }

    fn term(&mut self, depth: usize) -> Result<(), FilterError> {
        let mut negated = false;
        while self.took("not") || self.took("!") {
            negated = !negated;
        }
        if self.took("(") {
            if depth == DEEPEST {
                return Err(self.error(Problem::TooDeep));
            }
            self.expression(depth + 1)?;
            if !self.took(")") {
                return Err(self.expected("\"and\", \"or\" or \")\""));
            }
        } else {
            self.primitive()?;
        }
        if negated {
            self.program.push(Op::Not);
        }
        Ok(())
    }

    fn primitive(&mut self) -> Result<(), FilterError> {
        let start = self.at;
        for (word, greater) in [("greater", true), ("less", false)] {
            if self.took(word) {
                let len = self.number("a length")?;
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                self.test(if greater { Test::Greater(len) } else { Test::Less(len) });
                return Ok(());
            }
        }
        let version = match self.peek() {
            "ip" => Some(Version::V4),
            "ip6" => Some(Version::V6),
            _ => None,
        };
        let protocol = match self.peek() {
            "tcp" => Some((None, protocol::TCP)),
            "udp" => Some((None, protocol::UDP)),
            "icmp" => Some((Some(Version::V4), protocol::ICMP)),
            "icmp6" => Some((Some(Version::V6), protocol::ICMPV6)),
            _ => None,
        };
        if version.is_some() || protocol.is_some() {
            self.take();
        }
        let side = if self.took("src") {
            Side::Source
        } else if self.took("dst") {
            Side::Destination
        } else {
            Side::Either
        };
        let what = match self.peek() {
            word @ ("host" | "net" | "port") => {
                self.take();
                word
            }
            _ if side != Side::Either => "host",
            _ => {
                match (version, protocol) {
                    (Some(version), _) => self.test(Test::Version(version)),
                    (_, Some((version, protocol))) => self.test(Test::Protocol(version, protocol)),
                    _ => {
                        let word = self.word();
                        return Err(self.error(Problem::Primitive(word)));
                    }
                }
                return Ok(());
            }
        };
        let misplaced = |problem| Err(FilterError { at: start, problem: Problem::Qualifier(problem) });
        if what == "port" {
            let protocol = match protocol {
                Some((None, protocol)) => Some(protocol),
                None if version.is_none() => None,
                _ => return misplaced("only tcp and udp have ports"),
            };
            let port = self.number("a port")?;
            let Ok(port) = u16::try_from(port) else { return misplaced("ports end at 65535") };
            self.test(Test::Port(protocol, side, port));
            return Ok(());
        }
        if protocol.is_some() {
            return misplaced("only ip and ip6 have addresses");
        }
        let (net, bits) = if what == "net" { self.net()? } else { self.host()? };
        if version.is_some_and(|version| (version == Version::V4) != net.is_ipv4()) {
            return misplaced("the address is of the other IP version");
        }
        self.test(Test::Net(side, net, bits));
        Ok(())
    }

    fn test(&mut self, test: Test) {
        self.program.push(Op::Test(test));
    }

    fn number(&mut self, expected: &'static str) -> Result<u64, FilterError> {
        let word = self.peek();
        let digits = word.bytes().all(|byte| byte.is_ascii_digit());
        match word.parse() {
            Ok(number) if digits => {
                self.take();
                Ok(number)
            }
            _ => Err(self.expected(expected)),
        }
    }

    fn host(&mut self) -> Result<(IpAddr, u8), FilterError> {
        match self.peek().parse::<IpAddr>() {
            Ok(address) => {
                self.take();
                Ok((address, if address.is_ipv4() { 32 } else { 128 }))
            }
            Err(_) => Err(self.expected("an address")),
        }
    }

    fn net(&mut self) -> Result<(IpAddr, u8), FilterError> {
        let parsed = self.peek().split_once('/').and_then(|(address, bits)| {
            let address: IpAddr = address.parse().ok()?;
            let digits = bits.len() <= 3 && bits.bytes().all(|byte| byte.is_ascii_digit());
            let bits: u8 = bits.parse().ok().filter(|_| digits)?;
            (bits <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, bits))
        });
        let Some((address, bits)) = parsed else { return Err(self.expected("ADDRESS/BITS")) };
        let behind = match address {
            IpAddr::V4(address) => u128::from(address.to_bits().checked_shl(bits.into()).unwrap_or(0)),
            IpAddr::V6(address) => address.to_bits().checked_shl(bits.into()).unwrap_or(0),
        };
        if behind != 0 {
            return Err(self.error(Problem::HostBits));
        }
        self.take();
        Ok((address, bits))
    }
}

#[cfg(test)]
mod tcpdump;
#[cfg(test)]
mod tests;
