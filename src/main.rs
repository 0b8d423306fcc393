//! The program: parse, build, run, exit code.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use gradestore::cli::{
    self, BackupArgs, Command, GeneratedPassword, HealthArgs, ImportArgs, ServeArgs, VerifyArgs,
    backup, health, import,
};
use gradestore::http::ops::StartupProgress;
use gradestore::log::{ClusterKey, RandomId};
use gradestore::node::data_dir::{Storage, StorageOptions};
use gradestore::node::lifecycle::{self, Sockets};
use gradestore::telemetry;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Returns memory to the system when connections or a backup are over (ADR 0005).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let command = cli::parse_args().command;
    let result = cli::check_env()
        .map_err(Into::into)
        .and_then(|()| run(command));
    match result {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(io::stderr(), "gradestore: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match command {
        Command::Serve(args) => serve(&args)?,
        Command::Backup(args) => download_backup(&args)?,
        Command::Import(args) => import_file(&args)?,
        Command::Verify(args) => return verify(&args),
        Command::Health(HealthArgs { ops }) => health::check(ops.ops_addr)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(args: &ServeArgs) -> Result<(), Box<dyn std::error::Error>> {
    telemetry::init_logs(args.log_format);
    let (config, generated_password) = args.config()?;
    let runtime = lifecycle::runtime(args.threads)?;
    let result = runtime.block_on(async {
        let node = RandomId::random()
            .map_err(|error| format!("cannot get random numbers from the system: {error}"))?;
        let mut shutdown = pin!(shutdown()?);
        let sockets = Sockets::bind(&config)?;
        let storage = args.storage();
        let progress = StartupProgress::default();
        let reported = progress.clone();
        let options = StorageOptions {
            node,
            url: lifecycle::advertised(&config.cluster, sockets.write.local_addr()?),
            ask_node: Arc::new(lifecycle::peer_client(&config)?),
            key: ClusterKey::derive(&config.credentials.for_client().password),
            restore_from: config.restore_from.clone(),
            progress: Arc::new(move |reason| reported.set(reason)),
        };
        let opening = tokio::task::spawn_blocking(move || Storage::open(&storage, options));
        let storage = tokio::select! {
            opened = lifecycle::serve_while_opening(&config, node, &sockets, progress, opening) => opened???,
            // A slow disk or an unreachable NATS must not delay the end of the process.
            () = &mut shutdown => return Ok(()),
        };
        let username = &args.credentials.username;
        print_addresses(&sockets, username, generated_password.as_ref())?;
        lifecycle::run(config, node, storage, sockets, shutdown).await?;
        Ok(())
    });
    // Dropping the runtime would wait for blocking jobs, which have had their deadline.
    std::mem::forget(runtime);
    result
}

fn download_backup(args: &BackupArgs) -> Result<(), Box<dyn std::error::Error>> {
    let password = args.credentials.password()?;
    let downloaded = run_client(backup::backup(args, &password))?;
    let summary = downloaded.ok_or("interrupted; no file was written")??;
    // The backup may go to standard output. It is complete even if standard error is closed.
    let _ = write!(io::stderr(), "{}", backup::describe(&summary));
    Ok(())
}

fn import_file(args: &ImportArgs) -> Result<(), Box<dyn std::error::Error>> {
    let password = args.credentials.password()?;
    let accepted = Arc::<AtomicU64>::default();
    let imported = run_client(import::import(args, &password, Arc::clone(&accepted)))?;
    let imported = imported.ok_or_else(|| {
        let accepted = accepted.load(Ordering::Relaxed);
        format!("interrupted; at least {accepted} rows were imported")
    })??;
    write!(io::stdout(), "{}", import::describe(&imported))?;
    Ok(())
}

/// Runs a client command. `None` if a signal ended it.
fn run_client<T>(command: impl Future<Output = T>) -> io::Result<Option<T>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let interrupted = cli::interrupted()?;
        tokio::select! {
            // First, so that a command that is complete does not count as interrupted.
            biased;
            ended = command => Ok(Some(ended)),
            () = interrupted => Ok(None),
        }
    });
    // Dropping the runtime would wait for a thread that reads or writes a pipe.
    runtime.shutdown_background();
    ended
}

/// Prints what the file contains, and the verdict.
fn verify(args: &VerifyArgs) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match backup::verify(&args.file) {
        Ok(summary) => {
            writeln!(io::stdout(), "{}OK", backup::describe(&summary))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) if error.is_damage() => {
            let _ = writeln!(io::stderr(), "CORRUPT: {}", error.in_file(&args.file));
            Ok(ExitCode::FAILURE)
        }
        Err(error) => Err(error.in_file(&args.file).into()),
    }
}

/// Resolves at the first SIGTERM or Ctrl-C. A second one ends the process at once. A separate thread
/// waits for it, because a disk may block the threads of the tasks.
fn shutdown() -> io::Result<impl Future<Output = ()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let mut first = Signals::new()?;
    let entered = runtime.enter();
    let mut both = Signals::new()?;
    drop(entered);
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                both.next().await;
                both.next().await;
            });
            std::process::exit(130);
        })?;
    Ok(async move { first.next().await })
}

/// The signals that end the process.
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

/// Logs the addresses of the node. Prints a generated password in commands to copy.
fn print_addresses(
    sockets: &Sockets,
    username: &str,
    generated: Option<&GeneratedPassword>,
) -> io::Result<()> {
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
    let Some(GeneratedPassword(password)) = generated else {
        return Ok(());
    };
    let user = format!("{username}:{password}").replace('\'', r"'\''");
    writeln!(
        io::stdout(),
        "\nGenerated a password for this run, because none is set. Write a grade and read it back:\n\n  \
         curl -u '{user}' -H 'content-type: application/json' -d '{{\"user_id\":\"alice\",\"spp\":5}}' {write}/set\n  \
         curl '{read}/get?user_id=alice'\n"
    )
}
