//! Where the password comes from.

use std::path::Path;

use super::error::ConfigError;

/// A password that was made because none was given; to be shown once.
pub struct GeneratedPassword(pub String);

/// The password itself; it has no flag, since a command line is public on its machine.
pub(super) const ENV: &str = "GRADESTORE_PASSWORD";

/// The password that was given, in a file or the environment.
pub(super) fn given(password_file: Option<&Path>) -> Result<Option<String>, ConfigError> {
    let from_env = std::env::var_os(ENV);
    let file_by_flag = std::env::args_os().any(|arg| {
        arg.to_str()
            .is_some_and(|arg| arg.starts_with("--password-file"))
    });
    match (password_file, from_env) {
        (Some(_), Some(_)) if !file_by_flag => Err(ConfigError::TwoPasswords),
        (Some(path), _) => in_file(path).map(Some),
        (None, Some(password)) => {
            let password = password.to_str().unwrap_or_default();
            check(password, ENV).map(Some)
        }
        (None, None) => Ok(None),
    }
}

fn in_file(path: &Path) -> Result<String, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::PasswordFile {
        path: path.to_owned(),
        error,
    })?;
    // Editors and echo end the line.
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    check(password, &format!("--password-file {}", path.display()))
}

fn check(password: &str, key: &str) -> Result<String, ConfigError> {
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

/// 24 letters and digits: over 120 bits.
pub(super) fn make() -> Result<String, getrandom::Error> {
    // 32 of them, so that a byte's low bits choose evenly; none that looks like another.
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes)?;
    let letters = bytes
        .iter()
        .filter_map(|byte| LETTERS.get(usize::from(byte % 32)));
    Ok(letters.map(|letter| char::from(*letter)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_passwords_differ_and_need_no_quoting() {
        let one = make().unwrap();
        assert_eq!(one.len(), 24);
        assert!(one.chars().all(|c| c.is_ascii_alphanumeric()));
        assert_ne!(one, make().unwrap());
    }
}
