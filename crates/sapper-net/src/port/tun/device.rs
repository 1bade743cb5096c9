//! The descriptor behind a TUN port: how it is opened, its header, its offloads, its MTU.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sapper_proto::packet::{HEADROOM, Offloads, PacketMeta, ip, virtio};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tun_rs::{DeviceBuilder, Layer};

use super::super::sys::{self, watch};
use super::{TunHeader, TunOptions, Version};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::fd::open_flags;
use crate::stats::DropReason;

/// How old the MTU may be. A change takes effect this late at most.
const MTU_AGE: Duration = Duration::from_secs(1);

/// Taken for the MTU where the system does not say.
const UNKNOWN_MTU: usize = 65_535;

/// Ethernet header with a VLAN tag: a frame may be longer than the MTU by this.
const FRAME_OVERHEAD: usize = 18;

/// A TUN or TAP descriptor that does not block.
pub(super) struct Device {
    io: Arc<AsyncFd<OwnedFd>>,
    /// The caller's open file was blocking before us.
    was_blocking: bool,
    name: String,
    pub(super) header: TunHeader,
    /// Bytes of the virtio-net header.
    vnet_header: usize,
    pub(super) ethernet: bool,
    /// What the interface takes on sending.
    pub(super) offloads: Offloads,
    /// Why USO is off, where the rest is on.
    no_uso: &'static str,
    /// What the interface was asked to hand over whole.
    asked: Asked,
    mtu: Mtu,
}

type Guard<'a> = AsyncFdReadyGuard<'a, OwnedFd>;

/// What became of asking for offloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// The options said no.
    No,
    /// The descriptor has no header to carry them in.
    NoHeader,
    /// The system took them.
    Yes,
    /// The system refused, with this error.
    Refused(i32),
}

impl Device {
    pub(super) fn open(name: &str, options: &TunOptions) -> Result<Self> {
        let header = match options.header {
            Some(header) => header,
            None if options.offload && cfg!(target_os = "linux") => TunHeader::VirtioNet,
            None if cfg!(any(target_os = "macos", target_os = "ios")) => TunHeader::Utun,
            None => TunHeader::None,
        };
        if !cfg!(target_os = "linux") && options.addresses.iter().filter(|(ip, _)| ip.is_ipv4()).count() > 1 {
            return Err(Error::config("addresses", "an interface gets one IPv4 address on this system"));
        }
        for &(address, prefix) in &options.addresses {
            if prefix > if address.is_ipv4() { 32 } else { 128 } {
                return Err(Error::config("addresses", format!("{address}/{prefix} has no such prefix")));
            }
        }
        if name.len() > 15 || name.contains(['/', ' ', '\0']) {
            return Err(Error::config("tun", format!("{name:?} is no interface name (15 bytes at most)")));
        }
        let shown = if name.is_empty() { "a new interface" } else { name };
        let made = build(name, header, options, false).or_else(|error| {
            // An existing interface of several queues wants to be asked for one of them.
            if error.raw_os_error() == Some(libc::EINVAL) {
                build(name, header, options, true)
            } else {
                Err(error)
            }
        });
        let fd = made.map_err(|source| {
            let what = if options.ethernet { "TAP" } else { "TUN" };
            let hint = match source.raw_os_error() {
                Some(libc::EBUSY) => " (another program has it open)",
                Some(libc::EINVAL) => " (an interface of this name but of another kind?)",
                Some(libc::EPERM | libc::EACCES) => {
                    " (needs CAP_NET_ADMIN, or an interface made for this user)"
                }
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                    " (is the tun module there, and /dev/net/tun?)"
                }
                _ => "",
            };
            Error::io(ErrorKind::Device, format_args!("open {what} {shown}{hint}"), &source)
                .with_phase(Phase::Connect)
        })?;
        let device = Self::over(fd, header, options.offload, options.ethernet)?;
        #[cfg(target_os = "linux")]
        for &(address, prefix) in &options.addresses {
            sys::address::add_address(&device.name, address, prefix).map_err(|source| {
                let what = format_args!("give {address}/{prefix} to {}", device.name);
                Error::io(ErrorKind::Device, what, &source).with_phase(Phase::Connect)
            })?;
        }
        Ok(device)
    }

    pub(super) fn adopt(fd: OwnedFd, options: &TunOptions) -> Result<Self> {
        if !options.addresses.is_empty() || options.mtu.is_some() {
            let field = if options.mtu.is_some() { "mtu" } else { "addresses" };
            return Err(Error::config(
                field,
                "an adopted descriptor's interface is configured by who opened it",
            ));
        }
        let header = header_of(fd.as_fd(), options.header)?;
        let attributes = sys::tun::attributes(fd.as_fd());
        let ethernet = attributes.map_or(options.ethernet, |attributes| attributes.tap);
        Self::over(fd, header, options.offload, ethernet)
    }

    /// The rest is the same for both; `fd` needs not be a TUN here (tests use socket pairs).
    pub(super) fn over(fd: OwnedFd, header: TunHeader, offload: bool, ethernet: bool) -> Result<Self> {
        let attributes = sys::tun::attributes(fd.as_fd());
        let mut vnet_header = 0;
        if header == TunHeader::VirtioNet {
            vnet_header = attributes.as_ref().map_or(virtio::HEADER_LEN, |attributes| attributes.vnet_header);
            check_len(vnet_header)?;
        }
        let (asked, offloads, no_uso) = ask_for_offloads(fd.as_fd(), header, offload, ethernet);
        let name = attributes.map(|attributes| attributes.name).unwrap_or_default();
        let mtu = Mtu::new(fd.as_fd(), &name);
        let failed = |source: io::Error| Error::io(ErrorKind::Device, "make the TUN non-blocking", &source);
        let was_blocking = set_blocking(fd.as_fd(), false).map_err(failed)?;
        let watched = match fd.try_clone() {
            Ok(kept) => watch(fd, "the TUN").inspect_err(|_| restore(kept.as_fd(), was_blocking)),
            Err(source) => {
                restore(fd.as_fd(), was_blocking);
                Err(failed(source))
            }
        };
        Ok(Self {
            io: Arc::new(watched?),
            was_blocking,
            name,
            header,
            vnet_header,
            ethernet,
            offloads,
            no_uso,
            asked,
            mtu,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn max_packet(&self) -> usize {
        self.mtu.now() + if self.ethernet { FRAME_OVERHEAD } else { 0 }
    }

    pub(super) fn header_len(&self) -> usize {
        match self.header {
            TunHeader::None => 0,
            TunHeader::PacketInformation | TunHeader::Utun => 4,
            TunHeader::VirtioNet => self.vnet_header,
        }
    }

    /// Writes the header for a packet that begins with `packet` and returns its length.
    pub(super) fn encode_header(
        &self,
        head: &mut [u8; 12],
        meta: &PacketMeta,
        packet: &[u8],
    ) -> Result<usize, DropReason> {
        let version = || ip::version(packet).ok_or(DropReason::Malformed);
        match self.header {
            TunHeader::None => {}
            TunHeader::PacketInformation => {
                let protocol: u16 = match self.ethernet {
                    true => 0,
                    false if version()? == Version::V4 => 0x0800,
                    false => 0x86dd,
                };
                head[2..4].copy_from_slice(&protocol.to_be_bytes());
            }
            TunHeader::Utun => head[3] = if version()? == Version::V4 { 2 } else { 30 },
            TunHeader::VirtioNet => {
                head[..virtio::HEADER_LEN].copy_from_slice(&virtio::encode(meta, packet));
            }
        }
        Ok(self.header_len())
    }

    /// A first packet that is none, but would be one with another header in front, or without any: no system
    /// tells whether there is packet information.
    pub(super) fn has_another_header(&self, bytes: &[u8]) -> Option<Error> {
        let is_packet = |bytes: &[u8]| ip::check_len(bytes).is_ok();
        let unnamed = |what: &str| {
            format!("packets of this descriptor have a header in front that was not named: {what:?}?")
        };
        let (first, rest) = bytes.split_first_chunk()?;
        let text = match (self.header, first) {
            _ if self.ethernet => return None,
            (TunHeader::PacketInformation | TunHeader::Utun, _) if is_packet(bytes) => self.no_header(),
            (TunHeader::None, &[_, _, 0x86, 0xdd] | &[_, _, 0x08, 0x00]) if is_packet(rest) => unnamed("pi"),
            (TunHeader::None, &[0, 0, 0, 2 | 10 | 28 | 30]) if is_packet(rest) => unnamed("utun"),
            (TunHeader::VirtioNet, &[_, _, 0x86, 0xdd] | &[_, _, 0x08, 0x00])
                if rest.get(self.vnet_header..).is_some_and(is_packet) =>
            {
                "packets of this descriptor have packet information before their virtio-net header: open it \
                 with IFF_NO_PI"
                    .to_owned()
            }
            _ => return None,
        };
        Some(Error::config("header", text))
    }

    /// The interface takes no packet that begins with the header which was named.
    pub(super) fn refuses_header(&self) -> Option<Error> {
        let named = self.header == TunHeader::PacketInformation && !self.ethernet;
        named.then(|| Error::config("header", self.no_header()).with_phase(Phase::Transfer))
    }

    fn no_header(&self) -> String {
        let named = self.header.as_str();
        format!("packets of this descriptor have no header in front (IFF_NO_PI), and {named:?} was named")
    }

    /// The system refused a UDP super-packet.
    pub(super) fn give_up_uso(&mut self) {
        self.offloads.uso = false;
        self.no_uso = "off: the system refused a UDP super-packet";
    }

    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<Result<Guard<'_>>> {
        self.io.poll_read_ready(cx).map_err(|source| self.failed("wait for", &source))
    }

    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<Result<Guard<'_>>> {
        self.io.poll_write_ready(cx).map_err(|source| self.failed("wait for", &source))
    }

    pub(super) fn failed(&self, what: &str, source: &io::Error) -> Error {
        match source.raw_os_error() {
            // What a queue says whose interface was deleted.
            Some(libc::EFAULT | libc::ENODEV | libc::ENXIO) => self.ended(),
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Some(libc::EBADFD) => self.ended(),
            _ => Error::io(ErrorKind::Device, format_args!("{what} {}", self.describe()), source)
                .with_phase(Phase::Transfer),
        }
    }

    pub(super) fn ended(&self) -> Error {
        Error::new(ErrorKind::Device, format!("{} is gone: the interface was deleted", self.describe()))
            .with_phase(Phase::Transfer)
            .with_reason("gone")
    }

    pub(super) fn describe(&self) -> String {
        let kind = if self.ethernet { "tap" } else { "tun" };
        let header = match self.header {
            TunHeader::None => "no header",
            TunHeader::PacketInformation => "packet information",
            TunHeader::Utun => "utun",
            TunHeader::VirtioNet => "virtio-net",
        };
        let Offloads { tso4, tso6, uso, .. } = self.offloads;
        let mut text = format!("{kind} {} ({header}", self.name);
        for (on, word) in [(tso4, " TSO4"), (tso6, " TSO6"), (uso, " USO")] {
            if on {
                text.push_str(word);
            }
        }
        text.push(')');
        text
    }

    pub(super) fn say_offloads(&self) -> Vec<(&'static str, String)> {
        let off = match self.asked {
            Asked::Yes | Asked::No if self.ethernet => {
                "off: frames of a TAP are not cut or joined here".to_owned()
            }
            Asked::Yes => "off".to_owned(),
            Asked::No => "off: not asked for".to_owned(),
            Asked::NoHeader => "off: the descriptor has no virtio-net header".to_owned(),
            Asked::Refused(errno) => {
                format!("off: the system refused ({})", io::Error::from_raw_os_error(errno))
            }
        };
        let say = |on: bool| if on { "on".to_owned() } else { off.clone() };
        let Offloads { checksum, tso4, tso6, uso } = self.offloads;
        let uso = if !uso && !self.no_uso.is_empty() { self.no_uso.to_owned() } else { say(uso) };
        vec![("checksum", say(checksum)), ("tso4", say(tso4)), ("tso6", say(tso6)), ("uso", uso)]
    }
}

#[cfg(test)]
impl Device {
    pub(super) fn set_max_packet(&mut self, max_packet: usize) {
        self.mtu.value.set(max_packet);
    }

    /// Lets the MTU be old.
    pub(super) fn forget_mtu(&self) {
        self.mtu.read_at.set(self.mtu.read_at.get() - 2 * MTU_AGE);
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.io.as_raw_fd()
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        restore(self.as_fd(), self.was_blocking);
    }
}

/// Waits for the error event of an interface that goes away, which wakes no reader.
pub(super) struct Gone(Pin<Box<dyn Future<Output = ()> + Send>>);

impl Gone {
    pub(super) fn of(device: &Device) -> Self {
        let io = Arc::downgrade(&device.io);
        Self(Box::pin(async move {
            if let Some(io) = io.upgrade() {
                // A loop that ends takes everything with it.
                let _ = io.ready(Interest::ERROR).await;
            }
        }))
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        self.0.as_mut().poll(cx).is_ready()
    }
}

/// The interface's MTU, read again when it is old.
struct Mtu {
    control: Option<OwnedFd>,
    name: String,
    value: Cell<usize>,
    read_at: Cell<Instant>,
}

impl Mtu {
    fn new(fd: BorrowedFd<'_>, name: &str) -> Self {
        let known = !name.is_empty() && !sys::tun::in_other_namespace(fd);
        let control = if known { sys::tun::control_socket() } else { None };
        let mtu = Self {
            control,
            name: name.to_owned(),
            value: Cell::new(UNKNOWN_MTU),
            read_at: Cell::new(Instant::now()),
        };
        mtu.read();
        mtu
    }

    fn read(&self) {
        if let Some(control) = &self.control
            && let Ok(mtu) = sys::tun::mtu(control, &self.name)
        {
            self.value.set(mtu);
        }
    }

    fn now(&self) -> usize {
        if self.control.is_some() {
            let now = Instant::now();
            if now.duration_since(self.read_at.get()) > MTU_AGE {
                self.read_at.set(now);
                self.read();
            }
        }
        self.value.get()
    }
}

/// What lies in front of the packets of somebody's descriptor, where that and what the descriptor says of
/// itself go together. Whoever knows the option to blame adds it.
pub(super) fn header_of(fd: BorrowedFd<'_>, named: Option<TunHeader>) -> Result<TunHeader> {
    let wrong = |header: TunHeader, text: &str| {
        Error::new(
            ErrorKind::Config,
            format!("header={}: this descriptor was opened {text}", header.as_str()),
        )
    };
    let attributes = sys::tun::attributes(fd);
    let has_header = attributes.as_ref().map(|attributes| attributes.vnet_header > 0);
    let header = named.unwrap_or(match has_header {
        Some(true) => TunHeader::VirtioNet,
        _ => TunHeader::None,
    });
    match (header, has_header) {
        _ if cfg!(target_os = "linux") && attributes.is_none() => {
            Err(Error::new(ErrorKind::Device, "this descriptor is no TUN or TAP"))
        }
        (TunHeader::Utun, Some(_)) => Err(Error::new(
            ErrorKind::Config,
            "header=utun: that is macOS's: \"pi\" where this one was opened without IFF_NO_PI, or leave it away",
        )),
        (TunHeader::VirtioNet, Some(false)) => {
            Err(wrong(header, "without a virtio-net header (IFF_VNET_HDR)"))
        }
        (TunHeader::None | TunHeader::PacketInformation, Some(true)) => {
            Err(wrong(header, "with a virtio-net header (IFF_VNET_HDR): \"vnet\", or leave it away"))
        }
        (TunHeader::VirtioNet, _) => {
            check_len(attributes.map_or(virtio::HEADER_LEN, |attributes| attributes.vnet_header))?;
            Ok(header)
        }
        _ => Ok(header),
    }
}

fn check_len(vnet_header: usize) -> Result<()> {
    if vnet_header == virtio::HEADER_LEN || vnet_header == virtio::HEADER_LEN + 2 {
        return Ok(());
    }
    let text = format!("a virtio-net header of {vnet_header} bytes is not supported: 10 and 12 are");
    Err(Error::new(ErrorKind::Config, text))
}

/// Asks for as much as the system has: all, without UDP, only checksums.
fn ask_for_offloads(
    fd: BorrowedFd<'_>,
    header: TunHeader,
    wanted: bool,
    ethernet: bool,
) -> (Asked, Offloads, &'static str) {
    if header != TunHeader::VirtioNet {
        return (if wanted { Asked::NoHeader } else { Asked::No }, Offloads::NONE, "");
    }
    let checksum = Offloads { checksum: true, ..Offloads::NONE };
    if ethernet {
        // Frames are not looked into here, so large ones could not be checked.
        let asked = match sys::tun::set_offloads(fd, if wanted { checksum } else { Offloads::NONE }) {
            Ok(()) if wanted => Asked::Yes,
            Ok(()) => Asked::No,
            Err(error) => Asked::Refused(error.raw_os_error().unwrap_or_default()),
        };
        return (asked, checksum, "");
    }
    let no_uso = Offloads { uso: false, ..Offloads::ALL };
    if !wanted {
        // What the interface hands over stays as it was. It takes super-packets all the same: the
        // header says what they are.
        return (Asked::No, no_uso, "off: not asked for");
    }
    let mut refused = 0;
    for (offloads, why) in
        [(Offloads::ALL, ""), (no_uso, "off: the kernel has it from 6.2 on"), (checksum, "off")]
    {
        match sys::tun::set_offloads(fd, offloads) {
            Ok(()) => return (Asked::Yes, offloads, why),
            Err(error) => refused = error.raw_os_error().unwrap_or_default(),
        }
    }
    (Asked::Refused(refused), Offloads::NONE, "")
}

fn build(name: &str, header: TunHeader, options: &TunOptions, many_queues: bool) -> io::Result<OwnedFd> {
    let mut builder = DeviceBuilder::new().layer(if options.ethernet { Layer::L2 } else { Layer::L3 });
    if !name.is_empty() {
        builder = builder.name(name);
    }
    if let Some(mtu) = options.mtu {
        builder = builder.mtu(mtu);
    }
    #[cfg(not(target_os = "linux"))]
    for &(address, prefix) in &options.addresses {
        use std::net::IpAddr;
        builder = match address {
            IpAddr::V4(address) => builder.ipv4(address, prefix, None),
            IpAddr::V6(address) => builder.ipv6(address, prefix),
        };
    }
    builder = if options.up { builder.enable(true) } else { builder.inherit_enable_state() };
    #[cfg(target_os = "linux")]
    {
        builder = builder.with(|linux| {
            linux
                .offload(header == TunHeader::VirtioNet)
                .packet_information(header == TunHeader::PacketInformation)
                .multi_queue(many_queues);
        });
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (header, many_queues);
    let fd = builder.build_sync()?.into_raw_fd();
    // SAFETY: the device gives up its descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets or clears `O_NONBLOCK`; returns whether the file was blocking.
fn set_blocking(fd: BorrowedFd<'_>, blocking: bool) -> io::Result<bool> {
    let flags = open_flags(fd)?;
    let wanted = if blocking { flags & !libc::O_NONBLOCK } else { flags | libc::O_NONBLOCK };
    // SAFETY: F_SETFL touches no memory.
    if wanted != flags && unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, wanted) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(flags & libc::O_NONBLOCK == 0)
}

/// Undoes it at the end. It can only fail for a descriptor that is not open.
fn restore(fd: BorrowedFd<'_>, was_blocking: bool) {
    if was_blocking {
        let _ = set_blocking(fd, true);
    }
}

const _: () = assert!(virtio::HEADER_LEN + 2 <= HEADROOM);
