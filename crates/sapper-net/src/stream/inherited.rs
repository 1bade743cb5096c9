//! Sockets that a service manager hands over (sd_listen_fds(3): LISTEN_PID, LISTEN_FDS,
//! LISTEN_FDNAMES).

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// The first descriptor that is handed over; the others follow it.
const FIRST: RawFd = 3;

/// More than this is no configuration but a mistake.
const MAX_INHERITED: usize = 1024;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// One inherited descriptor.
#[derive(Debug)]
pub struct Inherited {
    /// It is ours from now on, and closes when a program is started.
    pub fd: OwnedFd,
    /// Its name in LISTEN_FDNAMES; `unknown` where there is none.
    pub name: String,
}

/// The values of the three variables.
#[derive(Clone, Copy, Debug, Default)]
pub struct Variables<'a> {
    /// LISTEN_PID.
    pub pid: Option<&'a str>,
    /// LISTEN_FDS.
    pub fds: Option<&'a str>,
    /// LISTEN_FDNAMES.
    pub names: Option<&'a str>,
}

/// Takes what the service manager handed to this process: once, a second call is an error. Nothing
/// was handed over: an empty list.
pub fn take_inherited() -> Result<Vec<Inherited>> {
    let variable = |name| std::env::var(name).ok();
    let (pid, fds, names) = (variable("LISTEN_PID"), variable("LISTEN_FDS"), variable("LISTEN_FDNAMES"));
    let variables = Variables { pid: pid.as_deref(), fds: fds.as_deref(), names: names.as_deref() };
    let names = parse(variables, std::process::id())?;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let taken = || Error::new(ErrorKind::ApiMisuse, "the inherited sockets were taken already");
    if TAKEN.load(Ordering::SeqCst) {
        return Err(taken());
    }
    // All are looked at before one is owned: what is not open, or was opened here under a number that was
    // not handed over (an event loop's descriptor takes the first that is free), must not be closed later.
    let numbers = FIRST..;
    for (number, _) in numbers.clone().zip(&names) {
        must_listen(number)?;
    }
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(taken());
    }
    for (number, _) in numbers.clone().zip(&names) {
        set_cloexec(number).map_err(|source| {
            Error::io(ErrorKind::Device, format_args!("LISTEN_FDS: use descriptor {number}"), &source)
                .with_field("LISTEN_FDS")
        })?;
    }
    let own = |(number, name)| {
        // SAFETY: LISTEN_PID names this process, so the service manager gave it these descriptors;
        // they are open, and TAKEN sees to it that they are owned once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        Inherited { fd, name }
    };
    Ok(numbers.zip(names).map(own).collect())
}

/// The names of the descriptors that are meant for process `own_pid`, in their order.
pub fn parse(variables: Variables<'_>, own_pid: u32) -> Result<Vec<String>> {
    let (Some(pid), Some(fds)) = (variables.pid, variables.fds) else { return Ok(Vec::new()) };
    let pid: u32 =
        pid.parse().map_err(|_| Error::config("LISTEN_PID", format!("is a process number, not {pid:?}")))?;
    // Inherited by a child of the process that they were meant for.
    if pid != own_pid {
        return Ok(Vec::new());
    }
    let count: usize = match fds.parse() {
        Ok(count) if count <= MAX_INHERITED => count,
        _ => {
            return Err(Error::config(
                "LISTEN_FDS",
                format!("is a number from 0 to {MAX_INHERITED}, not {fds:?}"),
            ));
        }
    };
    let mut names: Vec<String> = match variables.names {
        Some(names) if !names.is_empty() => names.split(':').map(str::to_owned).collect(),
        _ => vec!["unknown".to_owned(); count],
    };
    if names.len() != count {
        let message = format!("has {} names for {count} descriptors", names.len());
        return Err(Error::config("LISTEN_FDNAMES", message));
    }
    for name in &mut names {
        if name.is_empty() {
            *name = "unknown".to_owned();
        }
    }
    Ok(names)
}

/// An error where the descriptor is no listening socket.
fn must_listen(number: RawFd) -> Result<()> {
    let mut listens: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both pointers are to locals of the sizes that are said; for a number that is not open, or
    // no socket, it fails.
    let asked = unsafe {
        libc::getsockopt(
            number,
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listens).cast(),
            &raw mut size,
        )
    };
    if asked == 0 && listens != 0 {
        return Ok(());
    }
    let why = if asked == 0 { "does not listen" } else { "is no socket that was handed over" };
    Err(Error::config("LISTEN_FDS", format!("descriptor {number} {why}")))
}

fn set_cloexec(number: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD touches no memory, and for a number that is not open it fails.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl AsFd for Inherited {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pid: &str, fds: &str, names: Option<&str>) -> Result<Vec<String>> {
        parse(Variables { pid: Some(pid), fds: Some(fds), names }, 42)
    }

    #[test]
    fn what_is_meant_for_us_is_named() {
        assert_eq!(names("42", "2", Some("web:admin")).unwrap(), ["web", "admin"]);
        assert_eq!(names("42", "2", Some("web:")).unwrap(), ["web", "unknown"]);
        assert_eq!(names("42", "2", None).unwrap(), ["unknown", "unknown"]);
        assert!(names("42", "0", None).unwrap().is_empty());
    }

    #[test]
    fn only_what_listens_was_handed_over() {
        use std::os::fd::AsRawFd;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        must_listen(listener.as_raw_fd()).unwrap();
        let connected = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (read, _write) = io::pipe().unwrap();
        for (number, why) in [
            (connected.as_raw_fd(), "does not listen"),
            (read.as_raw_fd(), "is no socket"),
            (RawFd::MAX, "is no socket"),
        ] {
            let error = must_listen(number).unwrap_err();
            assert_eq!(error.field(), Some("LISTEN_FDS"));
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn what_is_meant_for_another_is_left_alone() {
        assert!(names("43", "2", None).unwrap().is_empty());
        assert!(parse(Variables { pid: Some("42"), ..Variables::default() }, 42).unwrap().is_empty());
        assert!(parse(Variables::default(), 42).unwrap().is_empty());
    }

    #[test]
    fn nonsense_names_its_variable() {
        assert_eq!(names("x", "1", None).unwrap_err().field(), Some("LISTEN_PID"));
        for fds in ["-1", "x", "", "1025", "99999999999999999999"] {
            assert_eq!(names("42", fds, None).unwrap_err().field(), Some("LISTEN_FDS"), "{fds}");
        }
        assert_eq!(names("42", "2", Some("one")).unwrap_err().field(), Some("LISTEN_FDNAMES"));
    }
}
