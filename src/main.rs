//! The program: parse, build, run, exit code.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use gradestore::cli::{
    self, BackupArgs, Command, HealthArgs, ImportArgs, PasswordSource, ServeArgs, VerifyArgs,
    backup, health, import,
};
use gradestore::http::Credentials;
use gradestore::http::ops::StartupProgress;
use gradestore::log::RandomId;
use gradestore::node::data_dir::{Storage, StorageOptions};
use gradestore::node::lifecycle::{self, Sockets};
use gradestore::node::signals;
use gradestore::sys::signals::{STOP, Signals, numbered};
use gradestore::telemetry;

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
    let (config, source) = args.config()?;
    log_start(args, &source);
    let runtime = lifecycle::runtime(args.threads)?;
    let result = runtime.block_on(async {
        let node = RandomId::random()
            .map_err(|error| format!("cannot get random numbers from the system: {error}"))?;
        let mut shutdown = pin!(shutdown()?);
        let (reloaded, credentials) = (source.clone(), config.credentials.clone());
        signals::handle(move || reloaded.reload(&credentials))?;
        let sockets = Sockets::bind(&config)?;
        let storage = args.storage();
        let progress = StartupProgress::default();
        let reported = progress.clone();
        let options = StorageOptions {
            node,
            url: lifecycle::advertised(&config.cluster, sockets.write.local_addr()?),
            ask_node: Arc::new(lifecycle::peer_client(&config)?),
            key: config.credentials.cluster_key(),
            restore_from: config.restore_from.clone(),
            progress: Arc::new(move |reason| reported.set(reason)),
        };
        let opening = tokio::task::spawn_blocking(move || Storage::open(&storage, options));
        let storage = tokio::select! {
            opened = lifecycle::serve_while_opening(&config, node, &sockets, progress, opening) => opened???,
            // A slow disk or an unreachable NATS must not delay the end of the process.
            () = &mut shutdown => return Ok(()),
        };
        source.keep(&config.credentials)?;
        print_addresses(&sockets, &source, &config.credentials)?;
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

/// Resolves at the first SIGTERM, SIGQUIT or Ctrl-C. A second one ends the process at once. A separate thread
/// waits for it, because a disk may block the threads of the tasks.
fn shutdown() -> io::Result<impl Future<Output = ()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let mut first = Signals::handle(numbered(&STOP))?;
    let entered = runtime.enter();
    let mut both = Signals::handle(numbered(&STOP))?;
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
    Ok(async move {
        first.next().await;
    })
}

/// Logs where the node keeps its data and its password.
fn log_start(args: &ServeArgs, source: &PasswordSource) {
    let data_dir = match args.ephemeral {
        true => "none (--ephemeral)".to_owned(),
        false => absolute(&args.data_dir),
    };
    let password = match source {
        PasswordSource::File(path) | PasswordSource::Kept(path) => absolute(path),
        PasswordSource::Env => "GRADESTORE_PASSWORD".to_owned(),
        PasswordSource::Generated => "generated for this run".to_owned(),
    };
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, data_dir, password, "starting");
}

/// Logs the addresses of the node. With a generated password, prints commands to copy.
fn print_addresses(
    sockets: &Sockets,
    source: &PasswordSource,
    credentials: &Credentials,
) -> io::Result<()> {
    let url = |address: SocketAddr| format!("http://{}", health::reachable(address));
    let (write, read) = (
        url(sockets.write.local_addr()?),
        url(sockets.read.local_addr()?),
    );
    let ops = url(sockets.ops.local_addr()?);
    tracing::info!(
        write,
        read,
        ops,
        status_page = format!("{ops}/"),
        "listening"
    );
    let account = credentials.for_client();
    let (user, which) = match source {
        PasswordSource::Env | PasswordSource::File(_) => return Ok(()),
        PasswordSource::Kept(path) => {
            let (user, file) = (quoted(&format!("{}:", account.username())), absolute(path));
            // Not the password itself, because service managers keep this output.
            let with_password = format!("{user}\"$(cat {})\"", quoted(&file));
            (
                with_password,
                format!("The generated password is in {file}."),
            )
        }
        PasswordSource::Generated => {
            let user = format!("{}:{}", account.username(), account.password());
            let which = "Generated a password for this run, because none is set.".to_owned();
            (quoted(&user), which)
        }
    };
    writeln!(
        io::stdout(),
        "\n{which} The status page is {ops}/.\nWrite a grade and read it back:\n\n  \
         curl -u {user} -H 'content-type: application/json' -d '{{\"user_id\":\"alice\",\"spp\":5}}' {write}/set\n  \
         curl '{read}/get?user_id=alice'\n"
    )
}

/// A path that is valid in another working directory, too.
fn absolute(path: &Path) -> String {
    let absolute = std::path::absolute(path);
    absolute.as_deref().unwrap_or(path).display().to_string()
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
