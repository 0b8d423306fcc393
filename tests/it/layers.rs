//! The folders of `src` are layers: a module uses only its own layer and those below it.

use std::fs;
use std::path::{Path, PathBuf};

/// Lowest first, as in `src/lib.rs`.
const LAYERS: [&str; 10] = [
    "sys",
    "grade",
    "store",
    "log",
    "backup",
    "replication",
    "telemetry",
    "http",
    "node",
    "cli",
];

fn source_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The layers that the code of a file names, with the lines.
fn used(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = code.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim_start().starts_with("//"));
    lines.flat_map(|(index, line)| {
        line.match_indices("crate::").map(move |(at, found)| {
            let rest = &line[at + found.len()..];
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            (index + 1, &rest[..end.unwrap_or(rest.len())])
        })
    })
}

#[test]
fn no_module_uses_a_layer_above_its_own() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    source_files(&src, &mut files);
    let mut wrong = Vec::new();
    for path in files {
        let inside = path.strip_prefix(&src).unwrap();
        let code = fs::read_to_string(&path).unwrap();
        let place = |layer: &str| LAYERS.iter().position(|known| *known == layer);
        let first = inside.iter().next().unwrap().to_str().unwrap();
        if ["main.rs", "lib.rs"].contains(&first) {
            continue;
        }
        let own = place(first).unwrap_or_else(|| panic!("src/{first} is in no layer"));
        // The tests of a module may build what is above it.
        let code = code.split("#[cfg(test)]").next().unwrap();
        let is_test = inside
            .iter()
            .any(|part| part == "tests" || part == "tests.rs");
        if is_test {
            continue;
        }
        for (line, layer) in used(code) {
            match place(layer) {
                Some(used) if used <= own => {}
                _ => wrong.push(format!("{}:{line} uses {layer}", inside.display())),
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
    let map = fs::read_to_string(src.join("lib.rs")).unwrap();
    let listed: Vec<usize> = LAYERS
        .iter()
        .map(|layer| {
            let line = format!("//! - [`{layer}`]");
            map.find(&line)
                .unwrap_or_else(|| panic!("{line} is not in src/lib.rs"))
        })
        .collect();
    assert!(
        listed.is_sorted(),
        "the map in src/lib.rs has another order"
    );
}
