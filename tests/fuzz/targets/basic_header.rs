#![no_main]

#[path = "../checks/basic_header.rs"]
mod basic_header;

libfuzzer_sys::fuzz_target!(|data: &[u8]| basic_header::check(data));
