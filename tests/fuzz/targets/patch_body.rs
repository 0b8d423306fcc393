#![no_main]

#[path = "../checks/patch_body.rs"]
mod patch_body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| patch_body::check(data));
