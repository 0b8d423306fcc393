//! Reads or generates the password, and reads it again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::values::env_value;
use crate::http::Credentials;
use crate::sys::files;

/// The variable with the password. There is no flag, because other users of the machine can see
/// command lines.
pub(super) const ENV: &str = "GRADESTORE_PASSWORD";
/// The file in the data directory with the generated password.
const GENERATED: &str = "password";

/// Where a password comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasswordSource {
    /// The environment.
    Env,
    /// A file, which may be read again.
    File(PathBuf),
    /// The file in the data directory with the password that the node generated at its first start.
    Kept(PathBuf),
    /// It was generated for this run only.
    Generated,
}

impl PasswordSource {
    /// The source of a password that was generated, for a node with this data directory, if any.
    pub(super) fn of_generated(data_dir: Option<&Path>) -> Self {
        data_dir.map_or(Self::Generated, |dir| Self::Kept(dir.join(GENERATED)))
    }

    /// Keeps the generated password of `credentials`, or replaces it by the one that an earlier
    /// start has kept. To be called while the data directory is locked, and before the ports accept
    /// requests.
    ///
    /// # Errors
    /// The file can't be read or written.
    pub fn keep(&self, credentials: &Credentials) -> Result<(), ConfigError> {
        let Self::Kept(path) = self else {
            return Ok(());
        };
        match read_regular_file(path) {
            Ok(password) => {
                warn_if_public(path);
                credentials.replace_password(&password);
                Ok(())
            }
            Err(ConfigError::PasswordFile { error, .. })
                if error.kind() == io::ErrorKind::NotFound =>
            {
                let password = credentials.for_client().password();
                let written = files::write(path, &format!("{password}\n"));
                written.map_err(|error| ConfigError::KeepPassword {
                    path: path.clone(),
                    error,
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the password again and replaces that of `credentials`. Logs the result. If it cannot
    /// be read, the old one remains. Blocks.
    pub fn reload(&self, credentials: &Credentials) {
        let (Self::File(path) | Self::Kept(path)) = self else {
            tracing::info!("nothing to reload: the password is not from a file");
            return;
        };
        let file = path.display();
        match read_regular_file(path) {
            Ok(password) => match credentials.replace_password(&password) {
                true => tracing::info!(%file, "password reloaded"),
                false => tracing::info!(%file, "password unchanged"),
            },
            Err(error) => {
                tracing::error!(%error, "password not reloaded: the old one remains valid");
            }
        }
    }
}

/// The password in the file or in the environment, and which of these.
pub(super) fn given(
    password_file: Option<&Path>,
) -> Result<Option<(String, PasswordSource)>, ConfigError> {
    let from_env = env_value(ENV);
    let file_by_flag = std::env::args_os().any(|arg| {
        arg.to_str()
            .is_some_and(|arg| arg.starts_with("--password-file"))
    });
    match (password_file, from_env) {
        (Some(_), Some(_)) if !file_by_flag => Err(ConfigError::TwoPasswords),
        (Some(path), _) => {
            let password = read_file(path, &format!("--password-file {}", path.display()))?;
            Ok(Some((password, PasswordSource::File(path.to_owned()))))
        }
        (None, Some(password)) => {
            let password = check(password.to_str().unwrap_or_default(), ENV)?;
            Ok(Some((password, PasswordSource::Env)))
        }
        (None, None) => Ok(None),
    }
}

/// Reads the password in the file at `path`. Refuses a pipe, whose writer may never come.
fn read_regular_file(path: &Path) -> Result<String, ConfigError> {
    let file = path.display().to_string();
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => Err(ConfigError::PasswordFile {
            file,
            error: io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"),
        }),
        // Reading it returns the error.
        Ok(_) | Err(_) => read_file(path, &file),
    }
}

/// Warns if other users may read the file that holds the password.
fn warn_if_public(path: &Path) {
    let mode = fs::metadata(path).map_or(0, |metadata| metadata.mode());
    if mode & 0o077 != 0 {
        let (file, mode) = (path.display(), mode & 0o777);
        tracing::warn!(
            %file,
            "other users may read or write the password: its mode is {mode:o}; run chmod 600 {file}"
        );
    }
}

/// Reads the password in the file at `path`, which errors call `file`.
fn read_file(path: &Path, file: &str) -> Result<String, ConfigError> {
    let text = fs::read_to_string(path).map_err(|error| ConfigError::PasswordFile {
        file: file.to_owned(),
        error,
    })?;
    // Editors and echo add a newline.
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    check(password, file)
}

fn check(password: &str, key: &str) -> Result<String, ConfigError> {
    // Some editors begin a file with a byte order mark.
    let password = password.strip_prefix('\u{feff}').unwrap_or(password);
    let wrong = |why| ConfigError::BadPassword {
        key: key.to_owned(),
        why,
    };
    if password.is_empty() {
        return Err(wrong("is empty or not UTF-8"));
    }
    if password.chars().any(char::is_control) {
        return Err(wrong("has a control character or a second line"));
    }
    Ok(password.to_owned())
}

/// Generates a password of 24 letters and digits (120 bits).
pub(super) fn generate() -> Result<String, getrandom::Error> {
    // 32, so that each is equally likely, and without similar ones such as l and 1.
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes)?;
    let chars = bytes
        .iter()
        .filter_map(|byte| ALPHABET.get(usize::from(byte % 32)));
    Ok(chars.map(|byte| char::from(*byte)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_passwords_differ_and_need_no_quoting() {
        let password = generate().unwrap();
        assert_eq!(password.len(), 24);
        assert!(password.chars().all(|c| c.is_ascii_alphanumeric()));
        assert_ne!(password, generate().unwrap());
    }
}
