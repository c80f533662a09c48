//! Who may use whom, held against the sources.

use std::{collections::HashMap, fs, path::Path};

/// Each module and the modules of the project that it may use.
const MAY_USE: [(&str, &[&str]); 23] = [
    ("wire", &[]),
    ("reset", &[]),
    ("log", &[]),
    ("transport", &["config", "wire"]),
    ("config", &[]),
    ("http", &["wire"]),
    ("websocket", &["wire"]),
    ("metrics", &["wire"]),
    ("budget", &[]),
    ("store", &["budget", "config", "transport"]),
    ("scheduler", &["system"]),
    ("host", &["budget", "config", "scheduler", "store", "wire"]),
    ("access", &["budget", "config", "host"]),
    (
        "sandbox",
        &["budget", "config", "host", "scheduler", "wire"],
    ),
    (
        "catalog",
        &[
            "budget",
            "config",
            "host",
            "metrics",
            "sandbox",
            "scheduler",
            "store",
            "wire",
        ],
    ),
    (
        "dispatch",
        &[
            "access",
            "budget",
            "catalog",
            "config",
            "host",
            "http",
            "metrics",
            "sandbox",
            "scheduler",
            "wire",
        ],
    ),
    (
        "server",
        &[
            "access",
            "budget",
            "config",
            "dispatch",
            "host",
            "http",
            "metrics",
            "scheduler",
            "system",
            "transport",
            "websocket",
            "wire",
        ],
    ),
    ("system", &["budget", "transport"]),
    ("admin", &["budget", "metrics", "wire"]),
    ("client", &["transport", "wire"]),
    ("project", &["sandbox"]),
    ("load", &["wire"]),
    (
        "commands",
        &[
            "access",
            "admin",
            "budget",
            "catalog",
            "client",
            "config",
            "dispatch",
            "host",
            "http",
            "load",
            "metrics",
            "project",
            "sandbox",
            "scheduler",
            "server",
            "system",
            "transport",
            "wire",
            "store",
        ],
    ),
];

fn sources(dir: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push((
                path.display().to_string(),
                fs::read_to_string(&path).unwrap(),
            ));
        }
    }
}

#[test]
fn imports_point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let modules: Vec<_> = MAY_USE.iter().map(|(module, _)| *module).collect();
    for entry in fs::read_dir(&src).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(
            !path.is_dir() || modules.contains(&&*name),
            "{name} is not in the table"
        );
    }
    for (module, allowed) in MAY_USE {
        let mut files = Vec::new();
        sources(&src.join(module), &mut files);
        assert!(!files.is_empty(), "{module}");
        for (file, text) in files {
            // `use crate::{a::x, b}` and `crate::a::x` alike: the first word
            // behind `crate::`, or each at the first level of its braces.
            for used in used_modules(&text) {
                let known = modules.contains(&&*used);
                let fine = used == module || allowed.contains(&&*used) || used == "log";
                assert!(!known || fine, "{file} uses {used}, which {module} may not");
            }
        }
    }
}

fn used_modules(text: &str) -> Vec<String> {
    let word = |text: &str| {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    let mut used = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            used.push(word(rest));
            continue;
        };
        let (mut depth, mut start) = (0, 0);
        for (index, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => {
                    used.push(word(group[start..index].trim_start()));
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    used.push(word(group[start..index].trim_start()));
                    start = index + 1;
                }
                _ => {}
            }
        }
    }
    used
}

/// No file of the server's core needs another one that needs it.
#[test]
fn no_file_of_the_server_imports_in_a_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/server");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let module = |file: &str| {
        let path = Path::new(file).strip_prefix(&root).unwrap();
        let path = path.with_extension("").to_string_lossy().replace('/', "::");
        path.trim_end_matches("mod")
            .trim_end_matches("::")
            .to_owned()
    };
    let modules: Vec<_> = files.iter().map(|(file, _)| module(file)).collect();
    let mut imports: HashMap<&str, Vec<&str>> = HashMap::new();
    for ((_, text), own) in files.iter().zip(&modules) {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for path in imported(code) {
            let above = own.rsplit_once("::").map_or("", |(above, _)| above);
            let absolute = if let Some(path) = path.strip_prefix("crate::server::") {
                path.to_owned()
            } else if let Some(path) = path.strip_prefix("super::") {
                format!("{above}::{path}")
            } else {
                format!("{own}::{path}")
            };
            let absolute = absolute.trim_start_matches("::");
            let names = |module: &&String| {
                let rest = absolute.strip_prefix(&***module);
                module.is_empty()
                    || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
            };
            let used = modules
                .iter()
                .filter(names)
                .max_by_key(|module| module.len());
            // What lies at the top is named by its path from there.
            let is_here = path.starts_with("super::") || path.starts_with("crate::server::");
            if let Some(used) = used.filter(|used| *used != own && (is_here || !used.is_empty())) {
                imports.entry(own).or_default().push(used);
            }
        }
    }
    assert!(imports[""].contains(&"workers") && imports["workers"].contains(&"connection"));
    for own in &modules {
        let (mut next, mut seen) = (vec![&**own], Vec::new());
        while let Some(module) = next.pop() {
            for used in imports.get(module).into_iter().flatten() {
                assert!(used != own, "{own} needs {module}, which needs {own}");
                if !seen.contains(used) {
                    seen.push(used);
                    next.push(used);
                }
            }
        }
    }
}

/// All paths that the `use` items of a text name, without their braces.
fn imported(text: &str) -> Vec<String> {
    fn paths(tree: &str, before: &str, all: &mut Vec<String>) {
        let Some((prefix, group)) = tree.split_once('{') else {
            all.push(format!("{before}{}", tree.trim()));
            return;
        };
        let group = group.trim_end();
        let group = group.strip_suffix('}').unwrap_or(group);
        let (mut depth, mut start) = (0, 0);
        let before = format!("{before}{}", prefix.trim());
        for (at, c) in group.char_indices().chain([(group.len(), ',')]) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    if !group[start..at].trim().is_empty() {
                        paths(&group[start..at], &before, all);
                    }
                    start = at + 1;
                }
                _ => {}
            }
        }
    }
    let mut all = Vec::new();
    for (at, _) in text.match_indices("use ") {
        let begins = text[..at].rsplit('\n').next().unwrap();
        if begins.is_empty() || begins.starts_with("pub") {
            let tree = text[at + 4..].split(';').next().unwrap();
            paths(tree, "", &mut all);
        }
    }
    all
}

#[test]
fn the_reader_of_imports_sees_them() {
    let text =
        "use crate::{\n  wire::{A, b},\n  server,\n};\nuse crate::host::X; crate::metrics::y()";
    assert_eq!(
        used_modules(text),
        ["wire", "server", "", "host", "metrics"]
    );
}
