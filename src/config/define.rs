//! How settings are defined: each once, with documentation, default and bounds.

use std::{fmt::Display, ops::RangeInclusive};

/// Defines a table of settings. A setting is written as
///
/// ```text
/// /// What it is, 1 to 9.
/// pub size: u32 = 3 => 1..=9,
/// ```
///
/// with its default behind `=` and, where a range bounds it, that range behind
/// `=>`. `check_ranges` reports what is out of range; other bounds are checked
/// by hand, and its documentation names them. The reference for operators is
/// generated from all of this.
macro_rules! settings {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $(
                $(#[doc = $doc:literal])*
                $(#[serde($($serde:tt)*)])*
                pub $field:ident: $type:ty = $default:expr $(=> $range:expr)?,
            )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $(
                $(#[doc = $doc])*
                $(#[doc = concat!("\n\nRange: `", stringify!($range), "`.")])?
                $(#[serde($($serde)*)])*
                pub $field: $type,
            )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $name {
            /// Reports what is out of its range; `table` stands before each key.
            #[allow(unused_variables, reason = "not every table has ranges")]
            pub(in crate::config) fn check_ranges(&self, table: &str, bounds: &mut Bounds) {
                $($(bounds.range(
                    format!("{table}{}", stringify!($field)),
                    self.$field,
                    $range,
                );)?)*
            }

            /// Returns what the reference says of each setting.
            #[cfg(test)]
            pub(crate) fn reference() -> Vec<$crate::config::Entry> {
                vec![$(
                    $crate::config::Entry::new(
                        stringify!($field),
                        concat!($($doc, "\n"),*),
                        serde_json::to_value({ let default: $type = $default; default }),
                        String::new() $(+ &$crate::config::Entry::bounds(&$range))?,
                    ),
                )*]
            }
        }
    };
}
pub(super) use settings;

/// What the reference says of one setting.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its name, without its table.
    pub(crate) name: &'static str,
    /// Its default, as TOML has it; empty where there is none.
    pub(crate) default: String,
    /// Its range; empty where none bounds it.
    pub(crate) bounds: String,
    /// Its documentation, on one line.
    pub(crate) text: String,
}

#[cfg(test)]
impl Entry {
    pub(in crate::config) fn new(
        name: &'static str,
        documentation: &str,
        default: serde_json::Result<serde_json::Value>,
        bounds: String,
    ) -> Self {
        let words: Vec<_> = documentation.split_whitespace().collect();
        Self {
            name,
            // JSON writes texts, numbers, lists and truths as TOML does.
            default: match default.expect("settings have a JSON form") {
                serde_json::Value::Null | serde_json::Value::Object(_) => String::new(),
                serde_json::Value::String(text) => format!("{:?}", readable(&text)),
                value => value.to_string(),
            },
            bounds,
            text: words.join(" "),
        }
    }

    /// Writes a range for people.
    pub(in crate::config) fn bounds<T: Display>(range: &RangeInclusive<T>) -> String {
        let (least, most) = (range.start().to_string(), range.end().to_string());
        format!("{} to {}", readable(&least), readable(&most))
    }
}

/// A value in its largest unit; a number in groups of three digits.
#[cfg(test)]
fn readable(value: &str) -> String {
    if value.bytes().all(|byte| byte.is_ascii_digit()) {
        let digits: Vec<_> = value.bytes().rev().map(char::from).collect();
        let groups: Vec<String> = digits
            .chunks(3)
            .map(|group| group.iter().collect())
            .collect();
        return groups.join(",").chars().rev().collect();
    }
    if let Some(mebibytes) = value
        .strip_suffix("MiB")
        .and_then(|n| n.parse::<u64>().ok())
    {
        let units = [(1024 * 1024, "TiB"), (1024, "GiB"), (1, "MiB")];
        let unit = units
            .into_iter()
            .find(|(size, _)| mebibytes >= *size && mebibytes % size == 0);
        return unit.map_or(value.into(), |(size, unit)| {
            format!("{}{unit}", mebibytes / size)
        });
    }
    match value.strip_suffix('s').and_then(|n| n.parse().ok()) {
        Some(seconds @ 1..) => {
            let text = humantime::format_duration(std::time::Duration::from_secs(seconds));
            text.to_string().replace(' ', "")
        }
        _ => value.into(),
    }
}

/// A setting out of its bounds: its key and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutOfBounds {
    /// Levels joined by dots.
    pub key: String,
    /// What it is, and what it may be.
    pub problem: String,
}

/// Collects what is out of bounds.
pub(in crate::config) struct Bounds(pub(in crate::config) Vec<OutOfBounds>);

impl Bounds {
    /// Checks a value, where it is given.
    pub(in crate::config) fn range<T>(
        &mut self,
        key: impl Into<String>,
        value: impl Into<Option<T>>,
        range: RangeInclusive<T>,
    ) where
        T: PartialOrd + Display,
    {
        if let Some(value) = value.into()
            && !range.contains(&value)
        {
            let (least, most) = (range.start(), range.end());
            let problem = format!("is {value}, allowed is {least} to {most}");
            self.0.push(OutOfBounds {
                key: key.into(),
                problem,
            });
        }
    }

    pub(in crate::config) fn that(&mut self, key: impl Into<String>, holds: bool, allowed: &str) {
        if !holds {
            self.0.push(OutOfBounds {
                key: key.into(),
                problem: format!("must be {allowed}"),
            });
        }
    }
}
