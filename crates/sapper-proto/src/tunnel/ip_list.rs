//! Lists of addresses: who may visit.
//!
//! An entry is an address, a network (`10.0.0.0/8`), an IPv4 address with wildcards at its end
//! (`192.168.*`), a range (`10.0.0.5-10.0.0.9`, or `10.0.0.5-9`), or `*` for everybody. An IPv6 address
//! that carries an IPv4 one (`::ffff:10.0.0.5`, as dual-stack listeners report it) is that IPv4 address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Which addresses are in. Looked up by halving: thousands of entries cost no more than a few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IpList {
    /// Inclusive, in order, apart from one another.
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

/// Why an entry is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{entry:?} {what}")]
pub struct IpListError {
    /// Which one it is, from 0.
    pub index: usize,
    /// The entry, shortened.
    pub entry: String,
    /// What is wrong.
    pub what: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Span {
    V4(u32, u32),
    V6(u128, u128),
    All,
}

impl IpList {
    /// Of entries as users write them.
    pub fn parse<'a>(entries: impl IntoIterator<Item = &'a str>) -> Result<Self, IpListError> {
        let mut list = Self::default();
        for (index, entry) in entries.into_iter().enumerate() {
            match span(entry.trim()).map_err(|what| IpListError { index, entry: shown(entry), what })? {
                Span::V4(from, to) => list.v4.push((from, to)),
                Span::V6(from, to) => list.v6.push((from, to)),
                Span::All => {
                    list.v4.push((0, u32::MAX));
                    list.v6.push((0, u128::MAX));
                }
            }
        }
        list.v4 = joined(list.v4);
        list.v6 = joined(list.v6);
        Ok(list)
    }

    /// Whether the address is in.
    pub fn contains(&self, address: IpAddr) -> bool {
        match address.to_canonical() {
            IpAddr::V4(address) => holds(&self.v4, address.to_bits()),
            IpAddr::V6(address) => holds(&self.v6, address.to_bits()),
        }
    }

    /// Whether nobody is in.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// Who may visit: in `allow` (everybody, where there is no such list), and not in `deny`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VisitorRule {
    /// Who is let in; `None` is everybody.
    pub allow: Option<IpList>,
    /// Who is not, whatever `allow` says.
    pub deny: IpList,
}

impl VisitorRule {
    /// Whether a visitor from that address may come in.
    pub fn admits(&self, address: IpAddr) -> bool {
        !self.deny.contains(address) && self.allow.as_ref().is_none_or(|allow| allow.contains(address))
    }
}

fn shown(entry: &str) -> String {
    entry.chars().take(64).collect()
}

fn holds<T: Ord + Copy>(spans: &[(T, T)], value: T) -> bool {
    let behind = spans.partition_point(|(from, _)| *from <= value);
    behind > 0 && value <= spans[behind - 1].1
}

fn joined<T: Ord + Copy>(mut spans: Vec<(T, T)>) -> Vec<(T, T)> {
    spans.sort_unstable();
    let mut out: Vec<(T, T)> = Vec::with_capacity(spans.len());
    for (from, to) in spans {
        match out.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => out.push((from, to)),
        }
    }
    out
}

fn span(entry: &str) -> Result<Span, &'static str> {
    if entry == "*" {
        return Ok(Span::All);
    }
    if let Some((address, prefix)) = entry.split_once('/') {
        return network(address, prefix);
    }
    if let Some((from, to)) = entry.split_once('-') {
        return range(from.trim(), to.trim());
    }
    if entry.contains('*') {
        return wildcard(entry);
    }
    Ok(match address(entry)? {
        IpAddr::V4(address) => Span::V4(address.to_bits(), address.to_bits()),
        IpAddr::V6(address) => Span::V6(address.to_bits(), address.to_bits()),
    })
}

/// An address; one that is a mapped IPv4 address is that.
fn address(text: &str) -> Result<IpAddr, &'static str> {
    written(text).map(|address| address.to_canonical())
}

/// An address in the version that it is written in.
fn written(text: &str) -> Result<IpAddr, &'static str> {
    let text = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    IpAddr::from_str(text).map_err(|_| "is no address")
}

fn network(text: &str, prefix: &str) -> Result<Span, &'static str> {
    let whole = IpAddr::from_str(text).map_err(|_| "is no network: what stands before / is no address")?;
    if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("is no network: what stands behind / is no number");
    }
    let prefix: u32 = prefix.parse().map_err(|_| "is no network: the prefix is too long")?;
    let too_long = "is no network: the prefix is too long";
    // Bits beyond the prefix are most often a slip that lets in more than was meant.
    let beyond = "is no network: the address has bits beyond the prefix";
    match whole {
        IpAddr::V4(_) if prefix > 32 => Err(too_long),
        IpAddr::V4(address) => v4_network(address, prefix),
        IpAddr::V6(address) => {
            if prefix > 128 {
                return Err(too_long);
            }
            if let (Some(mapped), Some(prefix)) = (address.to_ipv4_mapped(), prefix.checked_sub(96)) {
                return v4_network(mapped, prefix);
            }
            let host = u128::MAX.checked_shr(prefix).unwrap_or(0);
            let bits = address.to_bits();
            if bits & host != 0 { Err(beyond) } else { Ok(Span::V6(bits, bits | host)) }
        }
    }
}

fn v4_network(address: Ipv4Addr, prefix: u32) -> Result<Span, &'static str> {
    let host = u32::MAX.checked_shr(prefix).unwrap_or(0);
    let bits = address.to_bits();
    if bits & host != 0 {
        return Err("is no network: the address has bits beyond the prefix");
    }
    Ok(Span::V4(bits, bits | host))
}

fn range(from: &str, to: &str) -> Result<Span, &'static str> {
    let from = address(from)?;
    let to = match from {
        // Only the last number.
        IpAddr::V4(from) if !to.is_empty() && to.bytes().all(|byte| byte.is_ascii_digit()) => {
            let last: u8 = to.parse().map_err(|_| "is no range: the last number is above 255")?;
            let [a, b, c, _] = from.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, last))
        }
        IpAddr::V4(_) => address(to)?,
        // `::/80` ends at ::ffff:255.255.255.255: behind a beginning that is no IPv4 address it is a number.
        IpAddr::V6(_) => written(to)?,
    };
    let (span, rises) = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (Span::V4(from.to_bits(), to.to_bits()), from <= to),
        (IpAddr::V6(from), IpAddr::V6(to)) => (Span::V6(from.to_bits(), to.to_bits()), from <= to),
        _ => return Err("is no range: its ends are of two IP versions"),
    };
    if rises { Ok(span) } else { Err("is no range: it ends before it begins") }
}

/// `10.*`, `10.1.*`, `10.*.*.*`: stars stand at the end only.
fn wildcard(text: &str) -> Result<Span, &'static str> {
    const WRONG: &str = "is no wildcard: stars stand for the last numbers of an IPv4 address";
    let parts: Vec<&str> = text.split('.').collect();
    let fixed = parts.iter().take_while(|part| **part != "*").count();
    if parts.len() > 4 || fixed == 0 || fixed == parts.len() || parts[fixed..].iter().any(|part| *part != "*")
    {
        return Err(WRONG);
    }
    let mut octets = [0u8; 4];
    for (octet, part) in octets.iter_mut().zip(&parts[..fixed]) {
        let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let plain = digits && (*part == "0" || !part.starts_with('0'));
        *octet = part.parse().ok().filter(|_| plain).ok_or(WRONG)?;
    }
    v4_network(Ipv4Addr::from(octets), fixed as u32 * 8)
}

impl std::fmt::Display for IpList {
    /// As ranges, which can be parsed again.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let v4 = self
            .v4
            .iter()
            .map(|(from, to)| (IpAddr::V4(Ipv4Addr::from_bits(*from)), IpAddr::V4(Ipv4Addr::from_bits(*to))));
        let v6 = self
            .v6
            .iter()
            .map(|(from, to)| (IpAddr::V6(Ipv6Addr::from_bits(*from)), IpAddr::V6(Ipv6Addr::from_bits(*to))));
        for (at, (from, to)) in v4.chain(v6).enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            if from == to { write!(f, "{comma}{from}")? } else { write!(f, "{comma}{from}-{to}")? }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(entries: &[&str]) -> IpList {
        IpList::parse(entries.iter().copied()).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn every_form() {
        for (entry, inside, outside) in [
            ("192.0.2.7", vec!["192.0.2.7", "::ffff:192.0.2.7"], vec!["192.0.2.8", "::192.0.2.7"]),
            (
                "10.0.0.0/8",
                vec!["10.0.0.0", "10.255.255.255", "::ffff:10.1.1.1"],
                vec!["11.0.0.0", "9.255.255.255"],
            ),
            ("0.0.0.0/0", vec!["1.2.3.4"], vec!["::1"]),
            ("::/0", vec!["::1", "ffff::"], vec!["1.2.3.4"]),
            ("192.0.2.7/32", vec!["192.0.2.7"], vec!["192.0.2.6"]),
            ("192.168.*", vec!["192.168.0.0", "192.168.255.255"], vec!["192.169.0.0"]),
            ("192.168.*.*", vec!["192.168.3.4"], vec!["192.167.255.255"]),
            ("10.0.0.5-10.0.1.9", vec!["10.0.0.5", "10.0.0.200", "10.0.1.9"], vec!["10.0.0.4", "10.0.1.10"]),
            ("10.0.0.5-9", vec!["10.0.0.9"], vec!["10.0.0.10"]),
            (" 10.0.0.5 - 10.0.0.9 ", vec!["10.0.0.7"], vec!["10.0.0.10"]),
            ("2001:db8::/32", vec!["2001:db8::1", "2001:db8:ffff::"], vec!["2001:db9::"]),
            ("2001:db8::5-2001:db8::9", vec!["2001:db8::6"], vec!["2001:db8::a"]),
            ("[::1]", vec!["::1"], vec!["127.0.0.1"]),
            ("::/80", vec!["::", "::fffe:1.2.3.4"], vec!["1.2.3.4", "::1:0:0:0"]),
            ("::5-::ffff:1.2.3.4", vec!["::5", "::1:1.2.3.4"], vec!["::4", "1.2.3.4"]),
            ("::ffff:10.0.0.0/104", vec!["10.9.9.9"], vec!["11.0.0.0"]),
            ("*", vec!["1.2.3.4", "::1"], vec![]),
        ] {
            let list = list(&[entry]);
            assert_eq!(IpList::parse(list.to_string().split(", ")).as_ref(), Ok(&list), "{list}");
            for address in inside {
                assert!(list.contains(ip(address)), "{entry} has {address}");
            }
            for address in outside {
                assert!(!list.contains(ip(address)), "{entry} does not have {address}");
            }
        }
    }

    #[test]
    fn what_is_none_is_refused_with_the_reason() {
        for (entry, what) in [
            ("", "address"),
            ("10.0.0", "address"),
            ("010.0.0.1", "address"),
            ("10.0.0.0/33", "prefix is too long"),
            ("::/129", "prefix is too long"),
            ("10.0.0.0/", "no number"),
            ("10.0.0.0/+8", "no number"),
            ("10.0.0.1/8", "bits beyond"),
            ("2001:db8::1/32", "bits beyond"),
            ("10.0.0.9-10.0.0.5", "before it begins"),
            ("10.0.0.9-5", "before it begins"),
            ("10.0.0.9-256", "above 255"),
            ("10.0.0.9-::1", "two IP versions"),
            ("10.*.3", "wildcard"),
            ("*.3", "wildcard"),
            ("10.0.0.1.*", "wildcard"),
            ("10.x.*", "wildcard"),
            ("10.+1.*", "wildcard"),
            ("2001:*", "wildcard"),
            ("host.example", "address"),
        ] {
            let error = IpList::parse([entry]).unwrap_err();
            assert!(error.what.contains(what), "{entry:?}: {}", error.what);
        }
        let long = IpList::parse([&*"x".repeat(5_000)]).unwrap_err();
        assert!(long.to_string().len() < 100);
    }

    #[test]
    fn rules_deny_before_they_allow() {
        let rule = VisitorRule { allow: Some(list(&["10.0.0.0/8"])), deny: list(&["10.0.0.7"]) };
        assert!(rule.admits(ip("10.0.0.8")) && !rule.admits(ip("10.0.0.7")) && !rule.admits(ip("::1")));
        let open = VisitorRule { allow: None, deny: list(&["10.0.0.7"]) };
        assert!(open.admits(ip("::1")) && !open.admits(ip("::ffff:10.0.0.7")));
        let nobody = VisitorRule { allow: Some(IpList::default()), deny: IpList::default() };
        assert!(!nobody.admits(ip("::1")));
    }

    proptest! {
        #[test]
        fn any_text_does_not_panic(text in "\\PC{0,40}", near in "[0-9a-f.:/*\\[\\] -]{0,30}") {
            let _ = IpList::parse([&*text]);
            let _ = IpList::parse([&*near]);
        }

        /// Many ranges together hold exactly what each of them holds, printed and read again too.
        #[test]
        fn lists_hold_what_their_entries_hold(
            ranges in proptest::collection::vec((0u32..200, 0u32..30), 0..20), value in 0u32..250,
        ) {
            let text = |bits: u32| Ipv4Addr::from_bits(bits).to_string();
            let entries: Vec<String> = ranges.iter().map(|(at, len)| format!("{}-{}", text(*at), text(at + len))).collect();
            let list = IpList::parse(entries.iter().map(String::as_str)).unwrap();
            let expected = ranges.iter().any(|(at, len)| (*at..=at + len).contains(&value));
            prop_assert_eq!(list.contains(IpAddr::V4(Ipv4Addr::from_bits(value))), expected);
            if !list.is_empty() {
                let printed = list.to_string();
                prop_assert_eq!(IpList::parse(printed.split(", ")), Ok(list));
            }
        }
    }
}
