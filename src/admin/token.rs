//! The token that changing things takes: whoever can read the operator's
//! files has it, and no page in a browser does.

use std::{fs, io, path::Path};

use crate::files;
use crate::trusted::{self, Purpose};

/// Bytes of chance in a token.
const SIZE: usize = 32;
/// Shortest token that is taken, in characters.
const MIN_SIZE: usize = 16;
/// Longest file that is read as one, in bytes.
const MAX_FILE: u64 = 1024;

/// Reads the token, or creates one that only this user can read.
///
/// # Errors
/// If the file can't be read or created, or holds something else.
pub fn load_or_create(file: &Path) -> io::Result<String> {
    if let Some(dir) = file.parent() {
        files::private_dir(dir)?;
        trusted::check(dir)?;
    }
    let created = match trusted::open(file, Purpose::Data)
        .and_then(|file| files::read_text(file, MAX_FILE))
    {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            files::create(file, files::PRIVATE, new_token()?.as_bytes())
        }
        Err(error) => Err(error),
    };
    match created {
        // Another server was quicker.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => load(file),
    }
}

/// The token in a value of the header Authorization; the scheme is written in
/// any case.
pub(super) fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim_matches(' '))
}

/// A token in hexadecimal and a line feed.
fn new_token() -> io::Result<String> {
    let mut bytes = [0; SIZE];
    getrandom::fill(&mut bytes)?;
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(token + "\n")
}

/// Reads the token.
///
/// # Errors
/// If the file can't be read, or holds none.
pub fn load(file: &Path) -> io::Result<String> {
    // Whose file it is matters to the server; root may use that of its user.
    let text = files::read_text(fs::File::open(file)?, MAX_FILE)?;
    let token = text.trim();
    if token.len() < MIN_SIZE {
        return Err(io::Error::other(format!(
            "it holds no token of at least {MIN_SIZE} characters; delete it, and the next start creates one"
        )));
    }
    Ok(token.to_owned())
}

/// Compares in a time that tells nothing about how much of it is right.
pub(super) fn is_same(token: &str, shown: &str) -> bool {
    let differing = token
        .bytes()
        .zip(shown.bytes())
        .fold(0, |differing, (a, b)| differing | (a ^ b));
    token.len() == shown.len() && std::hint::black_box(differing) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_token_is_made_once_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state/admin.token");
        let token = load_or_create(&file).unwrap();
        assert_eq!(token.len(), 64);
        assert_eq!(load_or_create(&file).unwrap(), token);
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(
            is_same(&token, &token.clone())
                && !is_same(&token, "")
                && !is_same(&token, &token[1..])
        );
    }

    #[test]
    fn a_file_that_holds_no_token_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("admin.token");
        fs::write(&file, "a token of my own\n").unwrap();
        assert_eq!(load_or_create(&file).unwrap(), "a token of my own");
        for none in ["", "short\n"] {
            fs::write(&file, none).unwrap();
            let error = load_or_create(&file).unwrap_err().to_string();
            assert!(error.contains("delete it"), "{error}");
            assert_eq!(fs::read_to_string(&file).unwrap(), none);
        }
    }
}
