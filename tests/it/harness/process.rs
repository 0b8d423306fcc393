//! The program and other commands as child processes.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, mpsc};

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};

use super::wire::TIMEOUT;

/// The program without the `GRADESTORE_*` variables and RUST_LOG of this process.
pub(crate) fn program() -> Command {
    program_at(Path::new(env!("CARGO_BIN_EXE_gradestore")))
}

/// Another build of the program.
pub(crate) fn program_at(path: &Path) -> Command {
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        let of_ours = name
            .to_str()
            .is_some_and(|name| name.starts_with("GRADESTORE_"));
        if of_ours || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    // Unless a test sets a data directory.
    command.env("GRADESTORE_EPHEMERAL", "true");
    command
}

/// `command` as the last arguments of `runner`.
pub(crate) fn wrapped_by(runner: &[&str], command: &Command) -> Command {
    let mut run = Command::new(runner[0]);
    run.args(&runner[1..])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => run.env(name, value),
            None => run.env_remove(name),
        };
    }
    run
}

/// Runs a command that must exit by itself.
pub(crate) fn run(command: &mut Command) -> Output {
    let command = command.stdin(Stdio::null());
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&child);
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    match end.recv_timeout(TIMEOUT) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            kill_process(pid, Signal::KILL).unwrap();
            panic!("timeout: {command:?}");
        }
    }
}

/// A child process that is killed when dropped.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Collects the lines of a child's output.
pub(crate) fn collect_output(pipe: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let printed = Arc::new(Mutex::new(String::new()));
    let lines = Arc::clone(&printed);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            lines.lock().push_str(&format!("{line}\n"));
        }
    });
    printed
}

/// `command` without root's capabilities, so that file permissions apply to it.
pub(crate) fn without_root_capabilities(command: &Command) -> Command {
    match rustix::process::geteuid().is_root() {
        true => wrapped_by(
            &["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
            command,
        ),
        false => wrapped_by(&["env"], command),
    }
}
