//! Who may use whom, held against the sources.

use std::{fs, path::Path};

/// Each module and the modules of the project that it may use.
const MAY_USE: [(&str, &[&str]); 20] = [
    ("wire", &[]),
    ("reset", &[]),
    ("log", &[]),
    ("transport", &["config"]),
    ("config", &[]),
    ("metrics", &["wire"]),
    ("budget", &[]),
    ("store", &[]),
    ("host", &["budget", "config", "store", "wire"]),
    ("access", &["budget", "config", "host"]),
    ("sandbox", &["budget", "config", "host", "wire"]),
    (
        "catalog",
        &[
            "budget", "config", "host", "metrics", "sandbox", "store", "wire",
        ],
    ),
    (
        "dispatch",
        &[
            "access", "budget", "catalog", "config", "host", "metrics", "sandbox", "wire",
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
            "metrics",
            "system",
            "transport",
            "wire",
        ],
    ),
    ("system", &["transport"]),
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
            "load",
            "metrics",
            "project",
            "sandbox",
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

#[test]
fn the_reader_of_imports_sees_them() {
    let text =
        "use crate::{\n  wire::{A, b},\n  server,\n};\nuse crate::host::X; crate::metrics::y()";
    assert_eq!(
        used_modules(text),
        ["wire", "server", "", "host", "metrics"]
    );
}
