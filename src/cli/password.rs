//! Reads or generates the password.

use std::path::Path;

use super::error::ConfigError;
use super::values::env_value;

/// A password that was generated because none was given; to be printed once.
pub struct GeneratedPassword(pub String);

/// The variable with the password. There is no flag, because other users of the machine can see
/// command lines.
pub(super) const ENV: &str = "GRADESTORE_PASSWORD";

/// The password in the file or in the environment.
pub(super) fn given(password_file: Option<&Path>) -> Result<Option<String>, ConfigError> {
    let from_env = env_value(ENV);
    let file_by_flag = std::env::args_os().any(|arg| {
        arg.to_str()
            .is_some_and(|arg| arg.starts_with("--password-file"))
    });
    match (password_file, from_env) {
        (Some(_), Some(_)) if !file_by_flag => Err(ConfigError::TwoPasswords),
        (Some(path), _) => read_file(path).map(Some),
        (None, Some(password)) => {
            let password = password.to_str().unwrap_or_default();
            check(password, ENV).map(Some)
        }
        (None, None) => Ok(None),
    }
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::PasswordFile {
        path: path.to_owned(),
        error,
    })?;
    // Editors and echo add a newline.
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    check(password, &format!("--password-file {}", path.display()))
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
