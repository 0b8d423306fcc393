//! The command line: flags, environment variables, and the client commands.

mod args;
pub mod backup;
mod error;
pub mod health;
pub mod import;
mod interrupt;
mod parse;
mod password;
mod values;

pub use args::{
    BackupArgs, Cli, Command, CredentialArgs, HealthArgs, ImportArgs, OpsAddrArgs, ServeArgs,
    VerifyArgs,
};
pub use error::ConfigError;
pub use interrupt::interrupted;
pub use parse::{check_env, check_env_names, parse, parse_args};
pub use password::PasswordSource;
