//! 128-bit numbers as text.

/// Parses 32 hexadecimal digits, the format of `{:032x}`.
pub(crate) fn parse(text: &str) -> Option<u128> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = digits.then(|| u128::from_str_radix(text, 16));
    number?.ok()
}
