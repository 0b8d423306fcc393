//! The body of `POST /set`: no bytes panic, and the fast parser takes exactly what serde_json takes.

#![no_main]

use gradestore::grade::Patch;
use gradestore::http::parse_patch;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let fast = parse_patch(body).ok();
    let plain = serde_json::from_slice::<Patch<String>>(body).ok();
    assert_eq!(fast, plain.map(|patch| patch.to_owned()));
});
