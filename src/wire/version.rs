//! Versions of services, and which one serves which request.

use std::{fmt, str::FromStr};

/// Longest text of a version, in bytes.
pub const MAX_VERSION_SIZE: usize = 20;

/// `MAJOR.MINOR.PATCH`, nothing else: no leading zeros, no pre-release, no
/// build. Ordered as semver orders them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Changes when callers have to.
    pub major: u64,
    /// Changes when something is added.
    pub minor: u64,
    /// Changes when something is mended.
    pub patch: u64,
}

impl Version {
    /// A version from its numbers.
    #[must_use]
    pub const fn new(major: u64, minor: u64, patch: u64) -> Self {
        Self {
            major,
            minor,
            patch,
        }
    }

    /// Whether this version may serve a client written against `asked`: the
    /// caret rule of semver. Same major and not lower; for `0.y` the same
    /// minor too; for `0.0.z` the same altogether.
    #[must_use]
    pub fn serves(self, asked: Self) -> bool {
        let same_line = match (asked.major, asked.minor) {
            (0, 0) => self == asked,
            (0, minor) => self.major == 0 && self.minor == minor,
            (major, _) => self.major == major,
        };
        same_line && self >= asked
    }

    /// Appends it as it is displayed.
    pub fn append_to(self, out: &mut Vec<u8>) {
        append_number(out, self.major);
        for number in [self.minor, self.patch] {
            out.push(b'.');
            append_number(out, number);
        }
    }
}

/// Appends a number in decimal, without the formatting machinery.
pub fn append_number(out: &mut Vec<u8>, number: u64) {
    if number >= 10 {
        append_number(out, number / 10);
    }
    #[allow(clippy::cast_possible_truncation, reason = "a digit")]
    out.push(b'0' + (number % 10) as u8);
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The text is not `MAJOR.MINOR.PATCH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a version is MAJOR.MINOR.PATCH in at most 20 bytes, without leading zeros, pre-release or build"
)]
pub struct VersionError;

impl FromStr for Version {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        if text.len() > MAX_VERSION_SIZE {
            return Err(VersionError);
        }
        // In one pass: the version of every message goes through here.
        let (mut numbers, mut index, mut digits) = ([0_u64; 3], 0, 0);
        for byte in text.bytes() {
            match byte {
                b'0'..=b'9' if index < 3 && (digits == 0 || numbers[index] > 0) => {
                    let more = numbers[index]
                        .checked_mul(10)
                        .and_then(|tens| tens.checked_add(u64::from(byte - b'0')));
                    numbers[index] = more.ok_or(VersionError)?;
                    digits += 1;
                }
                b'.' if digits > 0 && index < 2 => (index, digits) = (index + 1, 0),
                _ => return Err(VersionError),
            }
        }
        let [major, minor, patch] = numbers;
        if index == 2 && digits > 0 {
            Ok(Self {
                major,
                minor,
                patch,
            })
        } else {
            Err(VersionError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for good in ["0.0.0", "1.0.0", "10.20.30", "1.2.9999999999999999"] {
            assert_eq!(
                good.parse::<Version>().map(|v| v.to_string()).as_deref(),
                Ok(good)
            );
        }
        for bad in [
            "",
            ".",
            "..",
            "1",
            "1.0",
            "1.0.0.0",
            "1..0",
            "01.0.0",
            "1.00.0",
            "1.0.0-rc1",
            "1.0.0+b",
            "+1.0.0",
            " 1.0.0",
            "1.0.x",
            "1.0.00",
            "1.2.99999999999999999",
        ] {
            assert_eq!(bad.parse::<Version>(), Err(VersionError), "{bad:?}");
        }
    }

    #[test]
    fn caret_rule() {
        let check = |loaded: &str, asked: &str, expected: bool| {
            let (loaded, asked): (Version, Version) =
                (loaded.parse().unwrap(), asked.parse().unwrap());
            assert_eq!(loaded.serves(asked), expected, "{loaded} for {asked}");
        };
        check("1.0.0", "1.0.0", true);
        check("1.2.0", "1.0.5", true);
        check("1.0.4", "1.0.5", false);
        check("2.0.0", "1.9.9", false);
        check("1.9.9", "2.0.0", false);
        check("0.2.5", "0.2.1", true);
        check("0.2.0", "0.2.1", false);
        check("0.3.0", "0.2.1", false);
        check("1.0.0", "0.2.1", false);
        check("0.0.3", "0.0.3", true);
        check("0.0.4", "0.0.3", false);
        check("0.1.0", "0.0.3", false);
        check("0.0.0", "0.0.0", true);
    }
}
