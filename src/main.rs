//! The program: parse, build, run, exit code.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use gradestore::cli::{
    self, BackupArgs, Command, HealthArgs, ImportArgs, MadePassword, ServeArgs, VerifyArgs, backup,
    health, import,
};
use gradestore::http::ops::OpeningProgress;
use gradestore::log::{ClusterKey, RandomId};
use gradestore::node::data_dir::{Opening, Storage};
use gradestore::node::lifecycle::{self, Sockets};
use gradestore::telemetry;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Gives memory back when a crowd of connections or a backup is over, where the system's allocator
/// keeps nearly all of it, and takes less time a request (ADR 0005).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How long fetching a backup may take to tidy up once it is interrupted.
const INTERRUPT_WAIT_MAX: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let command = cli::parse_args().command;
    let done = cli::check_env()
        .map_err(Into::into)
        .and_then(|()| match command {
            Command::Serve(args) => serve(&args),
            Command::Backup(args) => fetch_backup(&args),
            Command::Import(args) => import_file(args),
            Command::Verify(args) => verify(&args),
            Command::Health(HealthArgs { ops_addr }) => health::check(ops_addr).map_err(Into::into),
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "gradestore: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &ServeArgs) -> Result<(), Box<dyn std::error::Error>> {
    telemetry::init_logs(args.log_format);
    let (config, made_password) = args.config()?;
    let runtime = lifecycle::runtime(args.threads)?;
    let ended = runtime.block_on(async {
        let node = RandomId::random()?;
        let mut shutdown = pin!(shutdown()?);
        let sockets = Sockets::bind(&config)?;
        let storage = args.storage();
        let progress = OpeningProgress::default();
        let told = progress.clone();
        let opening = Opening {
            node,
            url: lifecycle::advertised(&config.cluster, sockets.write.local_addr()?),
            ask_node: Arc::new(lifecycle::client_to_peers(&config)?),
            key: ClusterKey::derive(&config.credentials.for_client().password),
            restore_from: config.restore_from.clone(),
            progress: Arc::new(move |what| told.set(what)),
        };
        let opening = tokio::task::spawn_blocking(move || Storage::open(&storage, opening));
        let storage = tokio::select! {
            opened = lifecycle::alive_while(&config, node, &sockets, progress, opening) => opened???,
            // A slow disk, or a broker that is away, must not keep the process from being stopped.
            () = &mut shutdown => return Ok(()),
        };
        greet(&sockets, &args.credentials.username, made_password.as_ref())?;
        lifecycle::run(config, node, storage, sockets, shutdown).await?;
        Ok(())
    });
    // What did not end within its deadline is not waited for again: dropped here, it might wait for a
    // disk.
    std::mem::forget(runtime);
    ended
}

fn fetch_backup(args: &BackupArgs) -> Result<(), Box<dyn std::error::Error>> {
    let password = args.credentials.password()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let fetched = runtime.block_on(async {
        let shutdown = shutdown()?;
        let args = args.clone();
        let mut fetching = tokio::spawn(async move { backup::backup(&args, &password).await });
        tokio::select! {
            fetched = &mut fetching => Ok(fetched??),
            () = shutdown => {
                fetching.abort();
                let _ = tokio::time::timeout(INTERRUPT_WAIT_MAX, fetching).await;
                Err::<_, Box<dyn std::error::Error>>("interrupted; nothing was kept".into())
            }
        }
    });
    runtime.shutdown_background();
    let summary = fetched?;
    // Standard output may be the backup.
    write!(io::stderr(), "{}", backup::describe(&summary))?;
    Ok(())
}

fn import_file(args: ImportArgs) -> Result<(), Box<dyn std::error::Error>> {
    let password = args.credentials.password()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let imported = runtime.block_on(async {
        let shutdown = shutdown()?;
        let accepted = Arc::<AtomicU64>::default();
        let importing = import::import(&args, &password, Arc::clone(&accepted));
        tokio::select! {
            imported = importing => Ok(imported?),
            () = shutdown => {
                let accepted = accepted.load(Ordering::Relaxed);
                let said = format!("interrupted; {accepted} rows or some more were accepted and stay");
                Err::<_, Box<dyn std::error::Error>>(said.into())
            }
        }
    });
    runtime.shutdown_background();
    write!(io::stdout(), "{}", import::describe(&imported?))?;
    Ok(())
}

fn verify(args: &VerifyArgs) -> Result<(), Box<dyn std::error::Error>> {
    let file = args.file.display();
    let summary = backup::verify(&args.file).map_err(|error| format!("{file}: {error}"))?;
    write!(io::stdout(), "{}", backup::describe(&summary))?;
    Ok(())
}

/// Resolves at the first SIGTERM or Ctrl-C; a second one ends the process at once. That is seen to on
/// a thread of its own, as the one that tasks share may be waiting for a disk.
fn shutdown() -> io::Result<impl Future<Output = ()>> {
    let aside = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let mut first = Signals::new()?;
    let entered = aside.enter();
    let mut both = Signals::new()?;
    drop(entered);
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            aside.block_on(async {
                both.next().await;
                both.next().await;
            });
            std::process::exit(130);
        })?;
    Ok(async move { first.next().await })
}

/// What asks the process to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Says where the node listens, and shows a password that was made, once, in a line to paste.
fn greet(sockets: &Sockets, username: &str, made: Option<&MadePassword>) -> io::Result<()> {
    let url = |address: SocketAddr| format!("http://{}", health::reachable(address));
    let (write, read) = (
        url(sockets.write.local_addr()?),
        url(sockets.read.local_addr()?),
    );
    let ops = url(sockets.ops.local_addr()?);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        write,
        read,
        ops,
        "listening"
    );
    let Some(MadePassword(password)) = made else {
        return Ok(());
    };
    let user = format!("{username}:{password}").replace('\'', r"'\''");
    writeln!(
        io::stdout(),
        "\nNo password was given, so one was made for this run. Set a grade and get it back:\n\n  \
         curl -u '{user}' -H 'content-type: application/json' -d '{{\"user_id\":\"alice\",\"spp\":5}}' {write}/set\n  \
         curl '{read}/get?user_id=alice'\n"
    )
}
