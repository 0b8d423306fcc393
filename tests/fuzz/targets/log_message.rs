#![no_main]

#[path = "../checks/log_message.rs"]
mod log_message;

libfuzzer_sys::fuzz_target!(|data: &[u8]| log_message::check(data));
