#![no_main]

#[path = "../checks/fast_request.rs"]
mod fast_request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fast_request::check(data));
