//! Files of PEM, read so that nothing in them is passed over in silence: what
//! looks like a section is read, is known not to matter, or is an error that
//! names its line.

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
};

use rustls::pki_types::{
    PrivateKeyDer,
    pem::{Error, PemObject as _, SectionKind},
};

use crate::files;

/// What a byte order mark is in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Longest file, in bytes; the CAs of a system have 0.3 MB together.
const MAX_FILE: u64 = 64 * 1024 * 1024;

/// Longest part of a line that an error shows, in characters.
const SHOWN: usize = 60;

/// A file that TLS needs, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", .file.display())]
pub struct TlsError {
    file: PathBuf,
    problem: String,
}

impl TlsError {
    pub(super) fn new(file: &Path, problem: impl fmt::Display) -> Self {
        Self {
            file: file.to_owned(),
            problem: problem.to_string(),
        }
    }
}

/// What a file is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// A chain of certificates; the key may lie in the same file.
    Chain,
    /// CAs that are trusted.
    Cas,
    /// Revocation lists.
    Crls,
    /// A private key; its certificate may lie in the same file.
    Key,
}

/// Reads the one private key of a file that may hold its certificate, too.
///
/// # Errors
/// As [`read`]; an encrypted key is named as that.
pub(super) fn read_key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let wrong = |problem: String| TlsError::new(file, problem);
    let text = read_file(file)?;
    let sections = sections(&text, Content::Key).map_err(wrong)?;
    match &*sections {
        [] => Err(wrong(nothing_found(&text, Content::Key))),
        [section] => PrivateKeyDer::from_pem_slice(section.text)
            .map_err(|error| wrong(section.describe(&error))),
        [first, second, ..] => Err(wrong(format!(
            "keys at line {} and at line {}, of which one alone can be used",
            first.line, second.line
        ))),
    }
}

fn read_file(file: &Path) -> Result<Vec<u8>, TlsError> {
    File::open(file)
        .and_then(|opened| files::read_bounded(opened, MAX_FILE))
        .map_err(|error| TlsError::new(file, error))
}

/// Reads certificates or revocation lists, at least one.
///
/// # Errors
/// Names the file, and the line where there is one.
pub(super) fn read<T: From<Vec<u8>>>(file: &Path, content: Content) -> Result<Vec<T>, TlsError> {
    let wrong = |problem: String| TlsError::new(file, problem);
    let text = read_file(file)?;
    let sections = sections(&text, content).map_err(wrong)?;
    if sections.is_empty() {
        return Err(wrong(nothing_found(&text, content)));
    }
    let decoded = sections.iter().map(|section| {
        <(SectionKind, Vec<u8>)>::from_pem_slice(section.text)
            .map(|(_, der)| der.into())
            .map_err(|error| wrong(section.describe(&error)))
    });
    decoded.collect()
}

/// One section that is to be decoded, from its first line to its last.
struct Section<'a> {
    text: &'a [u8],
    /// Number of its first line.
    line: usize,
}

impl Section<'_> {
    fn describe(&self, error: &Error) -> String {
        let line = self.line;
        match error {
            Error::Base64Decode(_) => format!("the section at line {line} is not base64"),
            error => format!("the section at line {line} can't be read: {error}"),
        }
    }
}

/// Finds what is to be read, and refuses what would be passed over.
fn sections(text: &[u8], content: Content) -> Result<Vec<Section<'_>>, String> {
    let mut found = Vec::new();
    // Label, offset and line of the section that has begun.
    let mut open: Option<(&[u8], usize, usize)> = None;
    for (number, offset, line) in lines(text) {
        // One is in front of each file that was joined.
        let mark = if line.starts_with(BYTE_ORDER_MARK) {
            BYTE_ORDER_MARK.len()
        } else {
            0
        };
        let (offset, line) = (offset + mark, line[mark..].trim_ascii_end());
        let at = |problem: &str| {
            let shown: String = String::from_utf8_lossy(line).chars().take(SHOWN).collect();
            format!("line {number}, {shown:?}: {problem}")
        };
        let begin = label(line, b"-----BEGIN ");
        match open {
            None => match begin {
                Some(label) => {
                    check_label(label, content).map_err(|problem| at(&problem))?;
                    open = Some((label, offset, number));
                }
                None if looks_like_a_boundary(line) => {
                    return Err(at(
                        "looks like a section but is not one, because the line must be -----BEGIN and the kind of section, \
                         from its first column to its end, and -----END alone in a line must end it",
                    ));
                }
                None => {}
            },
            Some((label_of, start, first)) => {
                if label(line, b"-----END ") == Some(label_of) {
                    if is_wanted(label_of, content) {
                        let end = offset + line.len();
                        found.push(Section {
                            text: &text[start..end],
                            line: first,
                        });
                    }
                    open = None;
                } else if looks_like_a_boundary(line) {
                    return Err(at(&format!(
                        "the section that begins at line {first} must end with its -----END, alone in a line, before anything else"
                    )));
                } else if content == Content::Key && line.starts_with(b"Proc-Type:") {
                    return Err(at(ENCRYPTED));
                }
            }
        }
    }
    match open {
        Some((label, _, line)) => Err(format!(
            "the section {} that begins at line {line} has no end",
            String::from_utf8_lossy(label)
        )),
        None => Ok(found),
    }
}

const ENCRYPTED: &str = "the key is encrypted, and the server asks for no password; decrypt it with openssl pkey -in FILE -out \
     PLAIN.key (keep that at mode 0600)";

/// Lines with their numbers and offsets; each of `\n`, `\r\n` and `\r` ends one.
fn lines(text: &[u8]) -> impl Iterator<Item = (usize, usize, &[u8])> {
    let mut offset = 0;
    let mut number = 0;
    std::iter::from_fn(move || {
        let rest = text.get(offset..).filter(|rest| !rest.is_empty())?;
        let length = rest
            .iter()
            .position(|byte| matches!(byte, b'\n' | b'\r'))
            .unwrap_or(rest.len());
        let line = (number + 1, offset, &rest[..length]);
        let ending = if rest[length..].starts_with(b"\r\n") {
            2
        } else {
            1
        };
        (offset, number) = (offset + length + ending, number + 1);
        Some(line)
    })
}

/// The kind of section in a line that is whole.
fn label<'a>(line: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    let label = line.strip_prefix(prefix)?.strip_suffix(b"-----")?;
    (!label.contains(&b'-')).then_some(label)
}

/// Whether somebody may have meant a line to begin or end a section: dashes,
/// also such as editors make of them, in front of BEGIN or END.
fn looks_like_a_boundary(line: &[u8]) -> bool {
    // Without what UTF-16 has between its letters.
    let text = String::from_utf8_lossy(line)
        .replace('\0', "")
        .to_ascii_uppercase();
    ["BEGIN", "END"].into_iter().any(|word| {
        text.match_indices(word).any(|(at, _)| {
            let before = text[..at].trim_end();
            before.ends_with("----")
                || before.ends_with([
                    '\u{2010}', '\u{2011}', '\u{2012}', '\u{2013}', '\u{2014}', '\u{2212}',
                ])
        })
    })
}

fn is_key(label: &[u8]) -> bool {
    matches!(
        label,
        b"PRIVATE KEY" | b"RSA PRIVATE KEY" | b"EC PRIVATE KEY"
    )
}

fn is_wanted(label: &[u8], content: Content) -> bool {
    match content {
        Content::Chain | Content::Cas => label == b"CERTIFICATE",
        Content::Crls => label == b"X509 CRL",
        Content::Key => is_key(label),
    }
}

/// Refuses a section that would not be read, unless it belongs there.
fn check_label(label: &[u8], content: Content) -> Result<(), String> {
    // What `openssl ecparam` and programs with one file for both write.
    let beside = match content {
        Content::Cas | Content::Crls => false,
        Content::Chain => {
            is_key(label)
                || matches!(
                    label,
                    b"ENCRYPTED PRIVATE KEY" | b"EC PARAMETERS" | b"DH PARAMETERS"
                )
        }
        Content::Key => matches!(label, b"CERTIFICATE" | b"EC PARAMETERS" | b"DH PARAMETERS"),
    };
    if is_wanted(label, content) || beside {
        return Ok(());
    }
    let (wanted, _) = content.names();
    let hint = match label {
        b"ENCRYPTED PRIVATE KEY" if content == Content::Key => return Err(ENCRYPTED.into()),
        b"TRUSTED CERTIFICATE" | b"X509 CERTIFICATE" if content != Content::Crls => {
            "; openssl x509 -in FILE -out NEW writes it as CERTIFICATE"
        }
        b"CRL" if content == Content::Crls => "; call the section X509 CRL",
        b"X509 CRL" | b"CRL" => "; revocation lists belong into the file of tls.crl",
        b"CERTIFICATE" => "; certificates of CAs belong into the file of tls.ca",
        b"PKCS7" | b"CMS" if content != Content::Key => {
            "; openssl pkcs7 -in FILE -print_certs -out NEW takes the certificates out of it"
        }
        b"CERTIFICATE REQUEST" | b"NEW CERTIFICATE REQUEST" => {
            "; a CA makes a certificate of it: openssl x509 -req -in FILE -CA ca.crt -CAkey ca.key -out NEW"
        }
        b"OPENSSH PRIVATE KEY" => {
            "; ssh-keygen -p -m PEM -f FILE writes it as a key that openssl reads"
        }
        b"DSA PRIVATE KEY" => {
            "; keys of DSA can't be used, openssl genpkey -algorithm EC -pkeyopt \
                               ec_paramgen_curve:P-256 makes one that can"
        }
        _ => "",
    };
    Err(format!(
        "a section of that kind is not read here, only {wanted}{hint}"
    ))
}

impl Content {
    /// The sections that are read, and what openssl calls such a file.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Chain | Self::Cas => ("CERTIFICATE", "x509"),
            Self::Crls => ("X509 CRL", "crl"),
            Self::Key => ("PRIVATE KEY", "pkey"),
        }
    }
}

/// What is wrong with a file in which there is nothing of what it should hold.
fn nothing_found(text: &[u8], content: Content) -> String {
    let (wanted, command) = content.names();
    let hint = if text.starts_with(&[0x30]) {
        format!("; if it is DER, openssl {command} -inform der -in FILE -out NEW writes it as PEM")
    } else if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        "; it is UTF-16, save it as ASCII or UTF-8".into()
    } else {
        String::new()
    };
    format!("no {wanted} section in it{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRL: &str = "-----BEGIN X509 CRL-----\nAAAA\nAAAA\n-----END X509 CRL-----\n";

    fn check(text: impl AsRef<[u8]>, content: Content, expected: Result<usize, &str>) {
        let text = text.as_ref();
        let found = sections(text, content);
        let shown = String::from_utf8_lossy(text);
        match (found, expected) {
            (Ok(found), Ok(count)) => {
                assert_eq!(found.len(), count, "{shown:?}");
                for section in found {
                    assert!(section.text.starts_with(b"-----BEGIN "), "{shown:?}");
                    <(SectionKind, Vec<u8>)>::from_pem_slice(section.text).unwrap();
                }
            }
            (Err(problem), Err(part)) => assert!(problem.contains(part), "{shown:?}: {problem}"),
            (found, expected) => panic!(
                "{shown:?}: {:?}, expected {expected:?}",
                found.map(|found| found.len())
            ),
        }
    }

    #[test]
    fn what_looks_like_a_section_is_read_or_refused() {
        let crls = |text: &str, expected| check(text, Content::Crls, expected);
        let two = format!("{CRL}{CRL}");
        crls("", Ok(0));
        crls(&two, Ok(2));
        crls(&two.replace('\n', "\r\n"), Ok(2));
        crls(&two.replace('\n', "\r"), Ok(2));
        crls(&two.replace("-----\n", "-----  \n"), Ok(2));
        crls(two.trim_end(), Ok(2));
        crls(
            &format!("Issuer: the end of it\n--\n{CRL}text begins\n{CRL}"),
            Ok(2),
        );
        crls(&format!("\u{feff}{CRL}\u{feff}{CRL}"), Ok(2));

        crls(
            &format!("{CRL} {CRL}"),
            Err("line 5, \" -----BEGIN X509 CRL-----\""),
        );
        crls(&format!("{CRL}\t{CRL}"), Err("line 5"));
        crls(&format!("{CRL}\u{a0}{CRL}"), Err("line 5"));
        crls(&format!("{}{CRL}", CRL.trim_end()), Err("line 4"));
        crls(&two.replacen("-----BEGIN", "----BEGIN", 1), Err("line 1"));
        crls(
            &two.replacen("-----BEGIN", "\u{2014}\u{2013}BEGIN", 1),
            Err("line 1"),
        );
        crls(&two.replacen("-----BEGIN", "----- BEGIN", 1), Err("line 1"));
        crls(&two.replacen("-----BEGIN", "-----begin", 1), Err("line 1"));
        crls(&two.replacen("CRL-----\n", "CRL----\n", 1), Err("line 1"));
        crls(&two.replacen("BEGIN X509", "BEGNI X509", 1), Err("line 4"));
        crls(
            &two.replacen("-----END X509 CRL-----\n", "", 1),
            Err("line 4"),
        );
        crls(&two.replacen("END X509", "END X590", 1), Err("line 4"));
        crls(&two[..two.len() - 10], Err("line 8"));
        crls(&two[..two.len() - 30], Err("begins at line 5 has no end"));
        let wide: String = CRL.chars().flat_map(|c| [c, '\0']).collect();
        crls(&format!("{CRL}{wide}"), Err("line 5"));
        crls(
            &CRL.replace("X509 CRL", "CRL"),
            Err("call the section X509 CRL"),
        );
        crls(&CRL.replace("X509 CRL", "CERTIFICATE"), Err("tls.ca"));
    }

    #[test]
    fn what_belongs_into_which_file() {
        let kind = |label: &str| CRL.replace("X509 CRL", label);
        let (cert, key) = (kind("CERTIFICATE"), kind("PRIVATE KEY"));
        check(format!("{key}{cert}{cert}"), Content::Chain, Ok(2));
        check(format!("{cert}{key}"), Content::Key, Ok(1));
        check(
            kind("EC PARAMETERS") + &kind("EC PRIVATE KEY"),
            Content::Key,
            Ok(1),
        );
        check(format!("{key}{key}"), Content::Key, Ok(2));
        check(format!("{cert}{key}"), Content::Cas, Err("line 5"));
        check(format!("{cert}{CRL}"), Content::Cas, Err("tls.crl"));
        check(format!("{cert}{CRL}"), Content::Chain, Err("tls.crl"));
        check(
            kind("TRUSTED CERTIFICATE"),
            Content::Cas,
            Err("openssl x509"),
        );
        check(
            kind("ENCRYPTED PRIVATE KEY"),
            Content::Key,
            Err("openssl pkey"),
        );
        let old = kind("RSA PRIVATE KEY").replacen(
            "AAAA",
            "Proc-Type: 4,ENCRYPTED\nDEK-Info: x\n\nAAAA",
            1,
        );
        check(old, Content::Key, Err("openssl pkey"));
        check(kind("OPENSSH PRIVATE KEY"), Content::Key, Err("ssh-keygen"));
        check(kind("PKCS7"), Content::Chain, Err("openssl pkcs7"));
        check(kind("SOMETHING"), Content::Cas, Err("only CERTIFICATE"));
        for (text, part) in [
            (&b"\x30\x82\x01"[..], "openssl x509 -inform der"),
            (b"\xff\xfe-\0", "UTF-16"),
            (b"text", "no CERTIFICATE section in it"),
        ] {
            assert!(nothing_found(text, Content::Cas).contains(part));
        }
    }
}
