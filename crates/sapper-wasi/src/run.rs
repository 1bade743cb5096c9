//! A run: what a guest is given, the task that it runs in, and how it ended.

use std::io::{PipeReader, pipe};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sapper_net::{Error, ErrorKind, Result, sys};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use wasmtime::{Store, Trap};
use wasmtime_wasi::p2::pipe::{MemoryInputPipe, MemoryOutputPipe};
use wasmtime_wasi::sockets::SocketAddrUse;
use wasmtime_wasi::{FsPerms, I32Exit, WasiCtx, WasiCtxBuilder};
use wasmtime_wasi_tls::WasiTlsCtxBuilder;

use crate::allow::{Policy, Rule};
use crate::guest::{Command, Guest};
use crate::limits::Limits;
use crate::state::State;
use crate::ticker::Ticking;
use crate::tls::{Configurations, Engines};

/// What a guest is given. The default is nothing.
pub struct Options {
    /// Arguments, the program's name first.
    pub args: Vec<String>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// Bytes of standard input; `None` is this process's own.
    pub stdin: Option<Vec<u8>>,
    /// Where standard output goes.
    pub stdout: Output,
    /// Where standard error goes.
    pub stderr: Output,
    /// Folders.
    pub folders: Vec<Folder>,
    /// Whom it may connect to.
    pub allow_net: Vec<Rule>,
    /// TLS, by the name of the server.
    pub tls: Configurations,
    /// How long one TLS handshake may take.
    pub handshake_timeout: Duration,
    /// How long all of it may take.
    pub timeout: Option<Duration>,
    /// Instructions that it may run, roughly.
    pub fuel: Option<u64>,
    /// Bytes of all of its memories together.
    pub memory: usize,
}

/// A folder of ours under a name of the guest's.
pub struct Folder {
    /// Its path here.
    pub host: PathBuf,
    /// Its path there.
    pub guest: String,
    /// Whether anything in it may be changed.
    pub writable: bool,
}

/// Where what a guest prints goes.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    /// To this process's own.
    Inherit,
    /// Nowhere.
    Discard,
    /// Kept, at most so many bytes.
    Capture(usize),
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest ended with this code.
    Exited(i32),
    /// It did what a guest must not; the text says what.
    Trapped(String),
    /// [`Run::cancel`] was called.
    Cancelled,
    /// A limit or the deadline; the error's reason says which.
    Stopped(Error),
}

/// Bytes that were kept, where they were to be.
pub type Captured = Option<Vec<u8>>;

/// What there is to say of a run that is over.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Its standard output, also where it ended badly.
    pub stdout: Captured,
    /// Its standard error, also where it ended badly.
    pub stderr: Captured,
    /// The fuel that was used, where it was counted.
    pub fuel: Option<u64>,
}

/// The threads that guests run on, and the process that they are in.
static THREADS: LazyLock<(std::io::Result<Runtime>, u32)> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get()).clamp(2, 8);
    let forks = sys::forks();
    let runtime = Builder::new_multi_thread()
        .worker_threads(cores)
        .thread_name("sapper-wasi")
        .enable_all()
        // Guests that compute give way all the time: sockets and deadlines must not wait for many of them.
        .event_interval(8)
        .build();
    (runtime, forks)
});

/// A child of a fork has the guests of its parent, but not their threads.
pub(crate) fn check_process() -> Result<()> {
    if THREADS.1 == sys::forks() {
        return Ok(());
    }
    let why = "guests were run before this process was forked, and their threads do not exist here. Start \
               processes with the \"spawn\" or \"forkserver\" method, or run guests only after the fork";
    Err(Error::new(ErrorKind::ApiMisuse, why).with_reason("forked"))
}

fn threads() -> Result<&'static Runtime> {
    check_process()?;
    THREADS.0.as_ref().map_err(|error| Error::io(ErrorKind::ResourceLimit, "no threads for guests", error))
}

/// A guest that runs, or has run. Dropping it ends the guest.
pub struct Run {
    shared: Arc<Shared>,
    /// At its end when the run is over.
    ended: PipeReader,
    cancel: watch::Sender<bool>,
}

#[derive(Default)]
struct Shared {
    report: Mutex<(bool, Option<Report>)>,
    over: Condvar,
}

impl Shared {
    fn report(&self) -> MutexGuard<'_, (bool, Option<Report>)> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run {
    /// Ends the guest at its next tick or wait.
    pub fn cancel(&self) {
        let _ = self.cancel.send(true);
    }

    /// Readable (at its end) when the run is over: an event loop watches it.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Waits until it is over, at most this long; whether it is.
    pub fn wait(&self, at_most: Duration) -> bool {
        let report = self.shared.report();
        let (report, _) = self
            .shared
            .over
            .wait_timeout_while(report, at_most, |(over, _)| !*over)
            .unwrap_or_else(PoisonError::into_inner);
        report.0
    }

    /// What there is to say of it; once, and only when it is over.
    pub fn report(&self) -> Option<Report> {
        self.shared.report().1.take()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Starts a guest.
pub fn start(guest: &Guest, options: Options) -> Result<Run> {
    let runtime = threads()?;
    // The contexts of a run look for the runtime that they belong to.
    let _entered = runtime.enter();
    let job = Job::new(guest, options)?;
    let (ended, over) =
        pipe().map_err(|error| Error::io(ErrorKind::ResourceLimit, "no pipe for a guest's end", &error))?;
    let (cancel, cancelled) = watch::channel(false);
    let shared = Arc::new(Shared::default());
    let run = Run { shared: Arc::clone(&shared), ended, cancel };
    runtime.spawn(async move {
        // In a task of its own: a panic of the host's becomes an outcome, and takes nothing else along.
        let report = match tokio::spawn(job.run(cancelled)).await {
            Ok(report) => report,
            Err(panic) => Report {
                outcome: Outcome::Trapped(format!("a defect of the host: {panic}")),
                stdout: None,
                stderr: None,
                fuel: None,
            },
        };
        *shared.report() = (true, Some(report));
        shared.over.notify_all();
        drop(over);
    });
    Ok(run)
}

/// Everything that can be checked without waiting has been.
struct Job {
    store: Store<State>,
    command: Command,
    ticking: Ticking,
    timeout: Option<Duration>,
    fuel: Option<u64>,
    stdout: Option<(MemoryOutputPipe, usize)>,
    stderr: Option<(MemoryOutputPipe, usize)>,
}

impl Job {
    fn new(guest: &Guest, options: Options) -> Result<Self> {
        let metered = options.fuel.is_some();
        let command = guest.command(metered)?;
        let engine = Guest::engine(metered)?;
        let policy = Policy::new(options.allow_net);
        let mut wasi = WasiCtx::builder();
        wasi.args(&options.args).envs(&options.env);
        match options.stdin {
            Some(bytes) => wasi.stdin(MemoryInputPipe::new(bytes)),
            None => wasi.inherit_stdin(),
        };
        let stdout = kept(options.stdout);
        match (&stdout, options.stdout) {
            (Some((pipe, _)), _) => wasi.stdout(pipe.clone()),
            (None, Output::Inherit) => wasi.inherit_stdout(),
            (None, _) => &mut wasi,
        };
        let stderr = kept(options.stderr);
        match (&stderr, options.stderr) {
            (Some((pipe, _)), _) => wasi.stderr(pipe.clone()),
            (None, Output::Inherit) => wasi.inherit_stderr(),
            (None, _) => &mut wasi,
        };
        for folder in &options.folders {
            let rights = if folder.writable { FsPerms::ReadWrite } else { FsPerms::ReadOnly };
            wasi.preopened_dir(&folder.host, &folder.guest, rights)
                .map_err(|error| Error::config("dirs", format!("{}: {error:#}", folder.host.display())))?;
        }
        allow(&mut wasi, &policy);
        let engines = Engines { configurations: options.tls, handshake_timeout: options.handshake_timeout };
        let tls = WasiTlsCtxBuilder::new().provider(Box::new(engines)).build();
        let state = State::new(wasi.build(), tls, Limits::new(options.memory), policy);
        let mut store = Store::new(engine, state);
        store.limiter(|state| &mut state.limits);
        store.epoch_deadline_async_yield_and_update(1);
        store.set_epoch_deadline(1);
        if let Some(fuel) = options.fuel {
            store.set_fuel(fuel).map_err(|error| Error::config("fuel", error.to_string()))?;
        }
        let ticking = Ticking::start(engine)
            .map_err(|error| Error::io(ErrorKind::ResourceLimit, "no thread for the ticker", &error))?;
        Ok(Self { store, command, ticking, timeout: options.timeout, fuel: options.fuel, stdout, stderr })
    }

    async fn run(self, mut cancelled: watch::Receiver<bool>) -> Report {
        let Self { mut store, command, ticking, timeout, fuel, stdout, stderr } = self;
        // The sender gone is the run's handle gone: nobody wants it any more.
        let cancelled = async move {
            let _ = cancelled.wait_for(|cancelled| *cancelled).await;
        };
        let ended = tokio::select! {
            ended = call(&command, &mut store) => Ok(ended),
            () = cancelled => Err(Outcome::Cancelled),
            () = deadline(timeout) => Err(Outcome::Stopped(
                Error::new(ErrorKind::RpcDeadline, format!("the guest did not end within {:?}", timeout.unwrap_or_default()))
                    .with_reason("timeout"),
            )),
        };
        let full = |kept: &Option<(MemoryOutputPipe, usize)>| {
            kept.as_ref().is_some_and(|(pipe, most)| pipe.contents().len() >= *most)
        };
        let refused = store.data().limits.memory_refused;
        let outcome = ended
            .map_or_else(|outcome| outcome, |ended| judge(ended, refused, full(&stdout) || full(&stderr)));
        let fuel = fuel.map(|given| given - store.get_fuel().unwrap_or(0).min(given));
        // Sockets are closed and tasks ended before anybody hears that it is over.
        drop(store);
        drop(ticking);
        let bytes = |kept: Option<(MemoryOutputPipe, usize)>| kept.map(|(pipe, _)| pipe.contents().to_vec());
        Report { outcome, stdout: bytes(stdout), stderr: bytes(stderr), fuel }
    }
}

fn kept(output: Output) -> Option<(MemoryOutputPipe, usize)> {
    match output {
        Output::Capture(most) => Some((MemoryOutputPipe::new(most), most)),
        Output::Inherit | Output::Discard => None,
    }
}

/// The network: TCP, outgoing, to whom the rules name.
fn allow(wasi: &mut WasiCtxBuilder, policy: &Policy) {
    let some = !policy.is_empty();
    wasi.allow_tcp(some).allow_udp(false).allow_ip_name_lookup(some);
    let policy = policy.clone();
    wasi.socket_addr_check(move |address, usage| {
        let allowed = match usage {
            SocketAddrUse::TcpConnect => policy.allows(address),
            // What comes before connecting: any port of our own choice.
            SocketAddrUse::TcpBind => address.ip().is_unspecified() && address.port() == 0,
            _ => false,
        };
        Box::pin(std::future::ready(allowed))
    });
}

async fn deadline(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

type Ended = wasmtime::Result<std::result::Result<(), ()>>;

async fn call(command: &Command, store: &mut Store<State>) -> Ended {
    match command {
        Command::P2(command) => {
            let command = command.instantiate_async(&mut *store).await?;
            command.wasi_cli_run().call_run(store).await
        }
        Command::P3(command) => {
            let command = command.instantiate_async(&mut *store).await?;
            store.run_concurrent(async move |store| command.wasi_cli_run().call_run(store).await).await?
        }
    }
}

/// What the end of `run` means.
fn judge(ended: Ended, memory_refused: bool, output_full: bool) -> Outcome {
    let limit = |message: &str| Error::new(ErrorKind::ResourceLimit, message);
    match ended {
        Ok(Ok(())) => Outcome::Exited(0),
        // A guest that ends in order although it was refused something has coped with that.
        Err(ref error)
            if let Some(&I32Exit(code)) = error.downcast_ref()
                && (code == 0 || !(memory_refused || output_full)) =>
        {
            Outcome::Exited(code)
        }
        Err(ref error) if matches!(error.downcast_ref(), Some(Trap::OutOfFuel)) => {
            Outcome::Stopped(limit("the guest has used up its fuel").with_reason("fuel"))
        }
        _ if memory_refused => {
            Outcome::Stopped(limit("the guest needs more memory than it may have").with_reason("memory"))
        }
        _ if output_full => {
            Outcome::Stopped(limit("the guest printed more than is kept").with_reason("capture"))
        }
        Ok(Err(())) => Outcome::Exited(1),
        Err(error) => Outcome::Trapped(format!("{error:#}")),
    }
}
