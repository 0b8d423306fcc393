//! Errors of the configuration.

use std::net::SocketAddr;
use std::path::PathBuf;

/// An error of the configuration. The text has the setting, its value and the fix.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A variable with the prefix of this program that is not a setting.
    #[error("unknown environment variable {name}; remove it, or use one of {known}")]
    UnknownEnv {
        /// The variable.
        name: String,
        /// The known variables.
        known: String,
    },
    /// A variable as Kubernetes sets it in pods, outside of one.
    #[error(
        "unknown environment variable {name}; remove it, or set the ports with \
         GRADESTORE_WRITE_ADDR, GRADESTORE_READ_ADDR and GRADESTORE_OPS_ADDR (only in a pod of \
         Kubernetes, which has KUBERNETES_SERVICE_HOST, such variables are ignored)"
    )]
    EnvOfService {
        /// The variable.
        name: String,
    },
    /// Two passwords.
    #[error("both GRADESTORE_PASSWORD and GRADESTORE_PASSWORD_FILE are set; remove one of them")]
    TwoPasswords,
    /// An invalid password.
    #[error("the password in {key} {why}; set a password of at least one character, on one line")]
    BadPassword {
        /// The source of the password.
        key: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The password file can't be read.
    #[error(
        "cannot read the password from {file}: {error}; create the file with the \
         password in it as UTF-8 text, readable by this user"
    )]
    PasswordFile {
        /// The file, with its flag.
        file: String,
        /// The system's error.
        error: std::io::Error,
    },
    /// The generated password can't be kept in the data directory.
    #[error("cannot write the generated password to {path}: {error}; set GRADESTORE_PASSWORD")]
    KeepPassword {
        /// The file.
        path: PathBuf,
        /// The system's error.
        error: std::io::Error,
    },
    /// Two ports with the same address.
    #[error("{first} and {second} are both {address}; give each its own port")]
    SameAddress {
        /// The flag of one port.
        first: &'static str,
        /// The flag of the other port.
        second: &'static str,
        /// The address of both.
        address: SocketAddr,
    },
    /// A node of a cluster has no password.
    #[error(
        "--nats-url needs a password, the same on all nodes of the cluster; set GRADESTORE_PASSWORD \
         or --password-file"
    )]
    NoSharedPassword,
    /// No password for requests to a node.
    #[error("no password; set GRADESTORE_PASSWORD or --password-file to that of the node")]
    NoPassword,
    /// No random bytes for a password.
    #[error(
        "cannot generate a password: the system returned no random bytes: {0}; set GRADESTORE_PASSWORD"
    )]
    Random(#[from] getrandom::Error),
}
