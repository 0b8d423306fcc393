//! The structure of `src`: layers, modules without circles, one definition for each type name, and
//! files of a readable length.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

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
/// Without its tests.
const FILE_LINES_MAX: usize = 500;

/// One file of `src`, without its tests and without comments.
struct SourceFile {
    /// From the top of `src`: `log/wal/mod.rs`.
    name: String,
    /// Its path as a module: `["log", "wal"]`.
    module: Vec<String>,
    code: String,
    /// With comments, without tests.
    lines: usize,
}

impl SourceFile {
    fn read(src: &Path, path: &Path) -> Self {
        let name = path.strip_prefix(src).unwrap().to_str().unwrap().to_owned();
        let module = name.trim_end_matches(".rs").split('/');
        let module = module.filter(|part| *part != "mod").map(str::to_owned);
        let text = without_tests(&fs::read_to_string(path).unwrap());
        let code = text.lines().map(|line| {
            let is_comment = line.trim_start().starts_with("//");
            // Empty, so that line numbers stay.
            if is_comment { "" } else { line }
        });
        Self {
            module: module.collect(),
            code: code.collect::<Vec<_>>().join("\n"),
            lines: text.lines().count(),
            name,
        }
    }

    /// All paths that the code names, from the top of the crate.
    fn paths(&self) -> Vec<Vec<String>> {
        let mut paths = Vec::new();
        for start in ["crate::", "super::", "self::"] {
            for (at, _) in self.code.match_indices(start) {
                // `super::super::` and the like are found at their beginning.
                let before = self.code[..at].chars().next_back();
                if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                    expand("", &self.code[at..], &mut paths);
                }
            }
        }
        paths.iter().map(|path| self.absolute(path)).collect()
    }

    fn absolute(&self, path: &str) -> Vec<String> {
        let mut absolute = self.module.clone();
        for part in path.split("::") {
            match part {
                "crate" => absolute.clear(),
                "super" => drop(absolute.pop()),
                "self" => {}
                _ => absolute.push(part.to_owned()),
            }
        }
        absolute
    }
}

/// `text` without items under `#[cfg(test)]`, which rustfmt has laid out.
fn without_tests(text: &str) -> String {
    let mut kept = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push(line);
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        // The first line with the same indentation that can end an item, a field or a statement.
        let is_last = |line: &&str| {
            let code = line.strip_prefix(indent);
            code.is_some_and(|code| !code.starts_with(' ') && code.ends_with(['}', ';', ',']))
        };
        lines.find(is_last);
    }
    kept.join("\n")
}

/// Pushes the paths that `text` begins with: `a::{b, c::d}` has two. Returns what follows them.
fn expand<'a>(prefix: &str, text: &'a str, paths: &mut Vec<String>) -> &'a str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    let (head, mut rest) = text.split_at(end.unwrap_or(text.len()));
    let path = format!("{prefix}{head}");
    if !path.ends_with("::") || !rest.starts_with('{') {
        paths.push(path.trim_end_matches("::").to_owned());
        return rest;
    }
    while rest.starts_with(['{', ',']) {
        rest = rest[1..].trim_start();
        if !rest.starts_with('}') {
            rest = expand(&path, rest, paths);
            // A new name, `a as b`, ends with the next comma or brace.
            rest = &rest[rest.find([',', '}']).unwrap_or(rest.len())..];
        }
    }
    rest.strip_prefix('}').unwrap_or(rest)
}

fn source_files() -> Vec<SourceFile> {
    fn add(src: &Path, dir: &Path, files: &mut Vec<SourceFile>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let is_test = path.ends_with("tests") || path.ends_with("tests.rs");
            if path.is_dir() && !is_test {
                add(src, &path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test {
                files.push(SourceFile::read(src, &path));
            }
        }
    }
    let (src, mut files) = (
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        Vec::new(),
    );
    add(&src, &src, &mut files);
    files.sort_by(|one, other| one.name.cmp(&other.name));
    files
}

#[test]
fn modules_use_only_their_own_layer_and_those_below() {
    let rank = |layer: &str| LAYERS.iter().position(|known| *known == layer);
    let mut wrong = BTreeSet::new();
    for file in source_files() {
        let layer = file.module[0].as_str();
        if ["main", "lib"].contains(&layer) {
            continue;
        }
        let own = rank(layer).unwrap_or_else(|| panic!("src/{layer} is in no layer"));
        for path in file.paths() {
            let used = path.first().and_then(|layer| rank(layer));
            if used.is_none_or(|used| used > own) {
                wrong.insert(format!("{} uses {}", file.name, path.join("::")));
            }
        }
    }
    assert_eq!(wrong, BTreeSet::new());
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let listed = LAYERS.map(|layer| {
        let line = format!("//! - [`{layer}`]");
        map.find(&line)
            .unwrap_or_else(|| panic!("{line} is not in src/lib.rs"))
    });
    assert!(
        listed.is_sorted(),
        "src/lib.rs lists the layers in another order"
    );
}

/// The modules of each folder, and which of its siblings each uses. An item that the folder's own
/// module re-exports counts as an item of the module that defines it.
fn sibling_uses(files: &[SourceFile]) -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let mut folders: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for file in files {
        for depth in 1..file.module.len() {
            let folder = folders.entry(file.module[..depth].join("::")).or_default();
            folder.entry(file.module[depth].clone()).or_default();
        }
    }
    let mut reexports: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for file in files {
        let folder = file.module.join("::");
        let Some(modules) = folders.get(&folder) else {
            continue;
        };
        let names = reexports.entry(folder).or_default();
        for (at, _) in file.code.match_indices("use ") {
            let mut paths = Vec::new();
            expand(
                "",
                file.code[at + 4..].trim_start_matches("self::"),
                &mut paths,
            );
            for path in paths {
                let (module, name) = path.split_once("::").unwrap_or((&path, ""));
                if modules.contains_key(module) {
                    let name = name.rsplit("::").next().unwrap();
                    names.insert(name.to_owned(), module.to_owned());
                }
            }
        }
    }
    for file in files {
        for path in file.paths() {
            for depth in 1..file.module.len() {
                let folder = file.module[..depth].join("::");
                if path.len() <= depth || path[..depth] != file.module[..depth] {
                    continue;
                }
                let modules = folders.get_mut(&folder).unwrap();
                let used = match modules.contains_key(&path[depth]) {
                    true => Some(&path[depth]),
                    false => reexports[&folder].get(&path[depth]),
                };
                if let Some(used) = used.filter(|used| **used != file.module[depth]) {
                    let uses = modules.get_mut(&file.module[depth]).unwrap();
                    uses.insert(used.clone());
                }
            }
        }
    }
    folders
}

/// The modules that `from` uses, directly or through others.
fn reachable(uses: &BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<String> {
    let (mut found, mut left) = (BTreeSet::new(), vec![from.to_owned()]);
    while let Some(module) = left.pop() {
        for used in &uses[&module] {
            if found.insert(used.clone()) {
                left.push(used.clone());
            }
        }
    }
    found
}

#[test]
fn modules_of_a_folder_do_not_use_each_other_in_a_circle() {
    let mut circles = BTreeSet::new();
    for (folder, uses) in sibling_uses(&source_files()) {
        for module in uses.keys() {
            let mut circle: Vec<String> = reachable(&uses, module)
                .into_iter()
                .filter(|other| reachable(&uses, other).contains(module))
                .collect();
            circle.sort();
            if circle.len() > 1 {
                circles.insert(format!("{folder}: {}", circle.join(", ")));
            }
        }
    }
    assert_eq!(circles, BTreeSet::new());
}

#[test]
fn each_type_name_has_one_definition() {
    let mut defined: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in source_files() {
        for line in file.code.lines() {
            let mut words = line.split([' ', '<', '(', ';', '{', ':']);
            let is_item = |word: &&str| ["struct", "enum", "trait", "type", "union"].contains(word);
            // An item of a module is not indented.
            let first = words.find(|word| !["pub", "crate)", "super)", "unsafe"].contains(word));
            if first.as_ref().is_some_and(is_item)
                && let Some(name) = words.next()
            {
                defined
                    .entry(name.to_owned())
                    .or_default()
                    .push(file.name.clone());
            }
        }
    }
    let twice = defined.iter().filter(|(_, files)| files.len() > 1);
    let twice: Vec<_> = twice.collect();
    let names: Vec<&str> = twice.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [""; 0], "{twice:#?}");
}

#[test]
fn files_are_not_longer_than_500_lines() {
    let files = source_files();
    let long = files.iter().filter(|file| file.lines > FILE_LINES_MAX);
    let long: Vec<_> = long.map(|file| (&*file.name, file.lines)).collect();
    let names: Vec<&str> = long.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, [""; 0], "{long:?}");
}
