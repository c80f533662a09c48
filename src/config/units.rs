//! Settings with a unit: durations and sizes, as numbers or as text.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize, Serializer};

/// A duration: a number is milliseconds, a text carries its unit (`"60s"`,
/// `"1m 30s"`) or is such a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "Raw")]
pub struct Millis(pub Duration);

impl Millis {
    /// A duration of whole milliseconds.
    #[must_use]
    pub const fn new(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// A duration of whole seconds.
    #[must_use]
    pub const fn secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    /// The duration; `None` for 0, where that stands for no bound.
    #[must_use]
    pub fn unless_zero(self) -> Option<Duration> {
        Some(self.0).filter(|duration| !duration.is_zero())
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        match (millis % 1000, millis / 1000) {
            (0, secs) => write!(f, "{secs}s"),
            _ => write!(f, "{millis}ms"),
        }
    }
}

/// A size: a number is bytes, a text carries its unit (`"1MiB"`, `"64 kB"`)
/// or is such a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "Raw")]
pub struct Bytes(pub usize);

impl Bytes {
    /// A size of whole KiB.
    #[must_use]
    pub const fn kib(kib: usize) -> Self {
        Self(kib * 1024)
    }

    /// A size of whole MiB.
    #[must_use]
    pub const fn mib(mib: usize) -> Self {
        Self(mib * 1024 * 1024)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes > 0 && bytes.is_multiple_of(1024 * 1024) => {
                write!(f, "{}MiB", bytes / (1024 * 1024))
            }
            bytes if bytes > 0 && bytes.is_multiple_of(1024) => write!(f, "{}KiB", bytes / 1024),
            bytes => write!(f, "{bytes}B"),
        }
    }
}

/// A share of the processors: 1 is one of them, `0.5` half of one. Kept in
/// thousandths.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "Raw")]
pub struct Share(pub u32);

impl Share {
    /// In processors; none for no bound.
    #[must_use]
    pub fn bound(self) -> Option<f64> {
        (self.0 > 0).then(|| f64::from(self.0) / 1000.0)
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / 1000.0)
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / 1000.0)
    }
}

/// A number, or a text, as environment variables have it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or a text")]
enum Raw {
    Whole(u64),
    Number(f64),
    Text(String),
}

impl Raw {
    fn read<T>(self, parse: fn(&str) -> Option<T>, expected: &str) -> Result<T, String> {
        let text = match self {
            Self::Whole(number) => number.to_string(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text,
        };
        parse(&text).ok_or_else(|| format!("{text:?} is not {expected}"))
    }
}

impl TryFrom<Raw> for Millis {
    type Error = String;

    fn try_from(raw: Raw) -> Result<Self, String> {
        let parse = |text: &str| match text.parse() {
            Ok(millis) => Some(Self::new(millis)),
            Err(_) => humantime::parse_duration(text).ok().map(Self),
        };
        raw.read(
            parse,
            "a number of milliseconds, or a duration with its unit such as \"60s\"",
        )
    }
}

impl TryFrom<Raw> for Bytes {
    type Error = String;

    fn try_from(raw: Raw) -> Result<Self, String> {
        let parse = |text: &str| {
            let size: bytesize::ByteSize = text.parse().ok()?;
            usize::try_from(size.as_u64()).ok().map(Self)
        };
        raw.read(
            parse,
            "a number of bytes, or a size with its unit such as \"1MiB\"",
        )
    }
}

impl TryFrom<Raw> for Share {
    type Error = String;

    fn try_from(raw: Raw) -> Result<Self, String> {
        let parse = |text: &str| {
            let number: f64 = text.parse().ok()?;
            let thousandths = (number * 1000.0).round();
            let known = (0.0..=f64::from(u32::MAX)).contains(&thousandths);
            // What is not nothing does not become no bound.
            (known && (thousandths > 0.0 || number <= 0.0)).then_some(Self(thousandths as u32))
        };
        raw.read(
            parse,
            "a share of the processors such as 0.5, in thousandths",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let check = |json: &str, expected: Option<u64>| {
            assert_eq!(
                serde_json::from_str(json).ok(),
                expected.map(Millis::new),
                "{json}"
            );
        };
        check("60000", Some(60_000));
        check("\"60000\"", Some(60_000));
        check("\"60s\"", Some(60_000));
        check("\"1m 30s\"", Some(90_000));
        check("\"250ms\"", Some(250));
        check("-1", None);
        check("1.5", None);
        check("\"soon\"", None);
        check("true", None);
        assert_eq!(
            (Millis::secs(60).to_string(), Millis::new(250).to_string()),
            ("60s".into(), "250ms".into())
        );
    }

    #[test]
    fn shares() {
        let check = |json: &str, expected: Option<u32>| {
            let share = serde_json::from_str(json).ok();
            assert_eq!(share, expected.map(Share), "{json}");
        };
        check("0.5", Some(500));
        check("2", Some(2000));
        check("\"0.25\"", Some(250));
        check("0", Some(0));
        check("0.0001", None);
        check("-1", None);
        check("\"much\"", None);
        assert_eq!(
            (Share(500).to_string(), Share(2000).to_string()),
            ("0.5".into(), "2".into())
        );
        assert_eq!((Share(500).bound(), Share(0).bound()), (Some(0.5), None));
    }

    #[test]
    fn sizes() {
        let check = |json: &str, expected: Option<usize>| {
            assert_eq!(
                serde_json::from_str(json).ok(),
                expected.map(Bytes),
                "{json}"
            );
        };
        check("1048576", Some(1_048_576));
        check("\"1MiB\"", Some(1_048_576));
        check("\"64 KiB\"", Some(65_536));
        check("\"1kB\"", Some(1000));
        check("\"1000B\"", Some(1000));
        check("\"big\"", None);
        check("-5", None);
        for size in [Bytes::mib(64), Bytes::kib(512), Bytes(1000), Bytes(0)] {
            let json = serde_json::to_string(&size).unwrap();
            assert_eq!(serde_json::from_str::<Bytes>(&json).unwrap(), size);
        }
    }
}
