#![no_main]

#[path = "../checks/position_header.rs"]
mod position_header;

libfuzzer_sys::fuzz_target!(|data: &[u8]| position_header::check(data));
