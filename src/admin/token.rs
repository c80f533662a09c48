//! The token that changing things takes: whoever can read the operator's
//! files has it, and no page in a browser does.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

/// Bytes of chance in a token.
const SIZE: usize = 32;
/// Longest file that is read as one.
const MAX_FILE: u64 = 1024;

/// Reads the token, or makes one that only this user can read.
///
/// # Errors
/// If the file can't be read or made, or holds nothing.
pub fn load_or_create(file: &Path) -> io::Result<String> {
    if let Some(dir) = file.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
    }
    match fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
    {
        Ok(mut made) => {
            let mut bytes = [0; SIZE];
            getrandom::fill(&mut bytes)?;
            let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            made.write_all(format!("{token}\n").as_bytes())?;
            Ok(token)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => load(file),
        Err(error) => Err(error),
    }
}

/// Reads the token.
///
/// # Errors
/// If the file can't be read, or holds nothing.
pub fn load(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(file)?
        .take(MAX_FILE)
        .read_to_string(&mut text)?;
    let token = text.trim();
    if token.len() < 16 {
        return Err(io::Error::other(
            "it holds no token of at least 16 characters; delete it to have one made",
        ));
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
        fs::write(&file, "\n").unwrap();
        assert!(load_or_create(&file).is_err());
    }
}
