//! Coined words that the project no longer uses: neither in identifiers nor in
//! comments, texts and documents. A reader knows the standard term from
//! elsewhere.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Parts of identifiers, and what to write.
const IDENTIFIERS: [(&str, &str); 27] = [
    ("anew", "again, fresh"),
    ("beat", "signal"),
    ("charge", "reservation"),
    ("charges", "reservations"),
    ("door", "listener"),
    ("doors", "listeners"),
    ("farewell", "close request"),
    ("guesses", "throttle"),
    ("hear", "parse"),
    ("heard", "reply"),
    ("misfit", "validation error"),
    ("news", "events"),
    ("overdraw", "overcommit"),
    ("places", "slots, permits"),
    ("pokes", "wakes"),
    ("pulse", "keep awake"),
    ("speech", "protocol"),
    ("speeches", "protocols"),
    ("stranger", "unauthenticated"),
    ("strangers", "unauthenticated"),
    ("terms", "policy"),
    ("told", "notified"),
    ("tells", "reports"),
    ("tell", "log, print, notify"),
    ("trouble", "error"),
    ("twins", "duplicates"),
    ("whoever", "the noun"),
];

/// Phrases, and what to write.
const PHRASES: [(&str, &str); 44] = [
    ("anew", "again"),
    ("are told", "are notified"),
    ("at hand", "current; per-CPU"),
    ("be told", "be notified"),
    ("bends the curves", "limits throughput"),
    ("came to nothing", "failed"),
    ("duty", "polling worker"),
    ("farewell", "close request, closing ERROR"),
    ("files that are none", "files that failed to load"),
    ("give back", "release"),
    ("given back", "released"),
    ("gives back", "releases"),
    ("guesses", "authentication throttle"),
    ("is told", "is notified"),
    ("its turn", "a permit, a processor"),
    ("last good", "last-known-good"),
    ("last word", "closing ERROR"),
    ("last words", "closing ERROR"),
    ("let in", "admitted, accepted"),
    ("made anew", "fresh instance"),
    ("make room", "be evicted, free capacity"),
    ("makes room", "is evicted, frees capacity"),
    ("misfit", "validation error"),
    ("overdraw", "over-commit"),
    ("put back", "reset, released, parked"),
    ("puts back", "resets, releases, parks"),
    ("said who", "authenticated"),
    ("say who they are", "authenticate"),
    ("sent away", "evicted"),
    ("show who", "authenticate"),
    ("shown who", "authenticated"),
    ("step aside", "compensate"),
    ("steps aside", "compensates"),
    ("stranger", "unauthenticated peer"),
    ("strangers", "unauthenticated peers"),
    ("the way of a request", "life of a request"),
    ("their turn", "a permit, served"),
    ("to be had", "available"),
    ("was told", "was notified"),
    ("were told", "were notified"),
    ("what grows", "shared memory"),
    ("who is asking", "the principal"),
    ("whoever asks", "the noun"),
    ("whoever looks", "the noun"),
];

/// Where a word stays, in files whose path begins so, and why.
const EXCEPTIONS: [(&str, &str, &str); 0] = [];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below a folder that end in one of these, without what is generated.
fn files(dir: &str, endings: &[&str]) -> Vec<PathBuf> {
    fn collect(dir: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
        const GENERATED: [&str; 5] = ["target", "node_modules", "dist", "gen", "venv"];
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy();
            if path.is_symlink() || name.starts_with('.') || GENERATED.contains(&&*name) {
                continue;
            }
            if path.is_dir() {
                collect(&path, endings, found);
            } else if path
                .extension()
                .is_some_and(|extension| endings.iter().any(|ending| extension == *ending))
            {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    collect(&root().join(dir), endings, &mut found);
    found.sort();
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// The words of an identifier: `MaxTwins`, `max_twins` and `MAX_TWINS` have two.
fn parts(identifier: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut was_lower = false;
    for c in identifier.chars() {
        if c == '_' || c.is_uppercase() && was_lower {
            parts.push(String::new());
        }
        if c != '_' {
            parts.last_mut().unwrap().extend(c.to_lowercase());
        }
        was_lower = c.is_lowercase();
    }
    parts
}

/// The identifiers of a line of code, without its texts and its comment.
fn identifiers(line: &str) -> Vec<&str> {
    let code = line.split("//").next().unwrap();
    let code = code.split('"').step_by(2);
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    code.flat_map(|code| code.split(move |c| !is_part(c)))
        .filter(|word| !word.is_empty())
        .collect()
}

/// All the text in one line: an end of a line is a space, with the mark of a
/// comment behind it.
fn flowing(text: &str) -> String {
    let mut flowing = String::from(" ");
    for line in text.lines() {
        let line = line.trim_start().trim_end_matches('\\').trim_end();
        flowing += line.trim_start_matches(['/', '!', '#', '>']).trim_start();
        flowing.push(' ');
    }
    flowing.to_lowercase()
}

/// Where a phrase is, as whole words.
fn find(flowing: &str, phrase: &str) -> Option<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let whole = |at: &usize| {
        let before = flowing[..*at].chars().next_back();
        let after = flowing[at + phrase.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    };
    let mut hits = flowing.match_indices(phrase).map(|(at, _)| at);
    hits.find(whole)
}

/// Whether a word may stay; notes that this exception is needed.
fn may_stay(name: &str, word: &str, needed: &mut BTreeSet<usize>) -> bool {
    let exception = EXCEPTIONS
        .iter()
        .position(|(path, known, _)| name.starts_with(path) && *known == word);
    needed.extend(exception);
    exception.is_some()
}

#[test]
fn coined_words_are_not_used() {
    let mut found = Vec::new();
    let mut needed = BTreeSet::new();
    let is_this = |path: &PathBuf| path.ends_with("tests/all/project/words.rs");
    let code = ["src", "tests"].map(|dir| files(dir, &["rs"])).concat();
    for path in code.iter().filter(|path| !is_this(path)) {
        let (name, text) = (shown(path), fs::read_to_string(path).unwrap());
        for (number, line) in text.lines().enumerate() {
            for identifier in identifiers(line) {
                let parts = parts(identifier);
                let phrase = parts.join(" ");
                for (coined, better) in PHRASES {
                    if find(&phrase, coined).is_some() && !may_stay(&name, coined, &mut needed) {
                        found.push(format!("{name}:{}: {identifier}: {better}", number + 1));
                    }
                }
                for (word, better) in IDENTIFIERS {
                    if parts.iter().any(|part| part == word) && !may_stay(&name, word, &mut needed)
                    {
                        found.push(format!("{name}:{}: {identifier}: {better}", number + 1));
                    }
                }
            }
        }
    }
    let documents = ["admin", "services", "tests"].map(|dir| files(dir, &["md", "mjs"]));
    let mut texts = documents.concat();
    texts.extend(files("src", &["rs", "md"]));
    texts.extend(["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root().join(name)));
    for path in &texts {
        let (name, text) = (shown(path), flowing(&fs::read_to_string(path).unwrap()));
        for (phrase, better) in PHRASES {
            if let Some(at) = find(&text, phrase)
                && !may_stay(&name, phrase, &mut needed)
            {
                let from = text.floor_char_boundary(at.saturating_sub(40));
                let to = text.floor_char_boundary(at + phrase.len() + 20);
                found.push(format!("{name}: “{}”: {better}", &text[from..to]));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    for (index, (path, word, why)) in EXCEPTIONS.iter().enumerate() {
        assert!(needed.contains(&index), "{word} is not in {path}: {why}");
    }
}

#[test]
fn words_are_found_in_any_form() {
    assert_eq!(parts("MaxTwins"), ["max", "twins"]);
    assert_eq!(parts("MAX_TWINS"), ["max", "twins"]);
    assert_eq!(
        identifiers("let a_b = \"twins\" + c; // d"),
        ["let", "a_b", "c"]
    );
    let text = flowing("/// Is put\n    /// back.\n");
    assert!(find(&text, "put back").is_some() && find(&text, "put b").is_none());
}
