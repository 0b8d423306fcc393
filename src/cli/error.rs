//! Why the configuration can't be used.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Why the configuration can't be used. The text names the key, the value and the fix.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// An environment variable that begins like ours but is none.
    #[error("unknown environment variable {name}; remove it, or use one of {known}")]
    UnknownEnv {
        /// The variable.
        name: String,
        /// The ones there are.
        known: String,
    },
    /// Two ways to say the password.
    #[error("both GRADESTORE_PASSWORD and GRADESTORE_PASSWORD_FILE are set; remove one of them")]
    TwoPasswords,
    /// A password that can't be one.
    #[error("the password in {key} {why}; put one there of at least one character, on one line")]
    BadPassword {
        /// Where it came from.
        key: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The password's file can't be read.
    #[error(
        "cannot read the password from --password-file {path}: {error}; make the file, readable for this user, with the password in it"
    )]
    PasswordFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// Two listeners at one address.
    #[error("{first} and {second} are both {address}; give each its own port")]
    SameAddress {
        /// A flag.
        first: &'static str,
        /// Another.
        second: &'static str,
        /// What both say.
        address: SocketAddr,
    },
    /// Nodes of one store must have one password.
    #[error(
        "--nats-url needs a password, the same for all nodes of the store; set GRADESTORE_PASSWORD \
         or --password-file"
    )]
    NoSharedPassword,
    /// A node can't be asked without a password.
    #[error("no password; set GRADESTORE_PASSWORD or --password-file to the node's")]
    NoPassword,
    /// No random bytes for a password.
    #[error("the system gave no random bytes for a password: {0}; set GRADESTORE_PASSWORD")]
    Random(#[from] getrandom::Error),
}
