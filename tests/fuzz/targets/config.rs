#![no_main]

#[path = "../checks/config.rs"]
mod config;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let input = config::input(data);
    let names: Vec<_> = input
        .variables
        .iter()
        .map(|(name, _)| name.clone())
        .collect();
    for (name, value) in &input.variables {
        // SAFETY: this process has one thread that reads or writes the environment.
        unsafe { std::env::set_var(name, value) };
    }
    config::check(input);
    for name in names {
        // SAFETY: as above.
        unsafe { std::env::remove_var(name) };
    }
});
