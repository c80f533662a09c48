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
/// by hand.
macro_rules! settings {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$doc:meta])* pub $field:ident: $type:ty = $default:expr $(=> $range:expr)?,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
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
        }
    };
}
pub(super) use settings;

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
    pub(in crate::config) fn range<T>(
        &mut self,
        key: impl Into<String>,
        value: T,
        range: RangeInclusive<T>,
    ) where
        T: PartialOrd + Display,
    {
        if !range.contains(&value) {
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
