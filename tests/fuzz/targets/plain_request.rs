#![no_main]

#[path = "../checks/plain_request.rs"]
mod plain_request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| plain_request::check(data));
