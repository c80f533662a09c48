//! Settings of who may come in, and what they may call.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::{
    OneOrMore, Share,
    define::{Bounds, settings},
    given,
    services::{covers, is_pattern},
};

/// The table whose settings hold for principals that have none of their own.
pub const DEFAULT_PRINCIPAL: &str = "default";
/// The principal of everybody who has shown nothing.
pub const ANONYMOUS: &str = "anonymous";
/// Longest name of a principal, in bytes.
pub const MAX_PRINCIPAL_SIZE: usize = 255;

/// Whether a listener authenticates its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auth {
    /// Nobody has to say, and everybody may call everything whose principal
    /// is given no rights of its own.
    None,
    /// Nobody has to say, and who says nothing may call what
    /// `principals.anonymous` may.
    Optional,
    /// Everybody has to, before anything else.
    Required,
}

/// What a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The wire protocol.
    Frames,
    /// HTTP/1.1 and 1.0.
    Http,
}

impl Protocol {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Frames, Self::Http];
}

/// Topics that may be called: `*`, `math.*` or `orders.create`, and after an
/// `@` the versions: `orders.create@1`, `orders.*@1.2`, `math.add@1.2.3`. The
/// version is the one that the caller asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    /// None for all.
    topic: Option<String>,
    /// Leading numbers of the version, as many as were given.
    version: Vec<u64>,
}

impl Right {
    /// The right to everything.
    #[must_use]
    pub fn everything() -> Self {
        Self {
            topic: None,
            version: Vec::new(),
        }
    }

    /// Whether it covers a topic in the version asked for.
    #[must_use]
    pub fn covers(&self, topic: &str, version: [u64; 3]) -> bool {
        let covered = |pattern: &String| covers(pattern, topic);
        self.topic.as_ref().is_none_or(covered) && version.starts_with(&self.version)
    }

    /// Whether any topic of a service may be covered, in any version.
    #[must_use]
    pub fn concerns(&self, service: &str) -> bool {
        let own = |pattern: &String| {
            pattern
                .strip_prefix(service)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        self.topic.as_ref().is_none_or(own)
    }
}

impl FromStr for Right {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (topic, version) = text
            .split_once('@')
            .map_or((text, None), |(topic, version)| (topic, Some(version)));
        let numbers: Option<Vec<u64>> = version.map_or(Some(Vec::new()), |version| {
            let numbers: Result<Vec<_>, _> = version.split('.').map(str::parse).collect();
            numbers.ok().filter(|numbers| numbers.len() <= 3)
        });
        match numbers {
            Some(version) if topic == "*" => Ok(Self {
                topic: None,
                version,
            }),
            Some(version) if is_pattern(topic) => Ok(Self {
                topic: Some(topic.into()),
                version,
            }),
            _ => Err(format!(
                "{text:?} is no right, as `*`, `math.*`, `orders.create` or `orders.create@1.2` is"
            )),
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.topic.as_deref().unwrap_or("*"))?;
        for (index, number) in self.version.iter().enumerate() {
            write!(f, "{}{number}", if index == 0 { '@' } else { '.' })?;
        }
        Ok(())
    }
}

impl Serialize for Right {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Right {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// All `[principals.…]` tables by name.
pub type Principals = BTreeMap<String, PrincipalSettings>;

settings! {
    /// What one principal may do. `[principals.default]` holds for those that
    /// have no table, `[principals.anonymous]` for peers without authentication.
    pub struct PrincipalSettings {
        /// What it may call: `*`, `math.*`, `orders.create`, and
        /// after an `@` the versions that the caller asks for, `orders.create@1.2`. A
        /// token that carries rights of its own has those instead.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub rights: Vec<Right> = Vec::new(),
        /// Requests a second over all its connections, those of `system` topics among
        /// them; the requests of one second may come at once. More get `RATE_LIMITED`.
        /// 0: no limit.
        pub rate: u32 = 0 => 0..=10_000_000,
        /// Calls that run at the same time over all its connections. A further call
        /// waits until its deadline. 0: no limit.
        pub concurrency: usize = 0 => 0..=10_000,
        /// Of the processors, what all its calls may use, 0 to 1,000 of them; 0
        /// for no bound. A call beyond it waits.
        pub cpu: Share = Share(0) => Share(0)..=Share(1_000_000),
    }
}

settings! {
    /// TLS of the listener on `tls.port`, and of those of `[[listeners]]` that
    /// have `tls = true`. Switched on by `cert`.
    pub struct Tls {
        /// TCP port of the listener with TLS, on the addresses of `host`. 0: the
        /// system chooses a free one.
        pub port: u16 = 8444,
        /// PEM file of the certificate chain, the server's own certificate first. Empty:
        /// no TLS.
        pub cert: PathBuf = PathBuf::new(),
        /// PEM file of the key of `cert`.
        pub key: PathBuf = PathBuf::new(),
        /// PEM file of the CAs of clients. Empty: the server asks no client for a
        /// certificate.
        pub ca: PathBuf = PathBuf::new(),
        /// PEM file of revocation lists for certificates of clients. Empty: none. The
        /// log warns of a CA without a list, and of a list past its next update.
        pub crl: PathBuf = PathBuf::new(),
        /// With `crl`: clients of a CA without a list, or with a list past its next
        /// update, are refused.
        pub crl_strict: bool = false,
        /// With `ca`: a client must show a valid certificate. `false`: a client without
        /// one stays anonymous.
        pub reject_unauthorized: bool = true,
    }
}

impl Tls {
    /// Whether TLS is switched on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        given(&self.cert).is_some()
    }

    /// All files that are named.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let files = [&self.cert, &self.key, &self.ca, &self.crl];
        files.into_iter().filter_map(|file| given(file))
    }

    /// Whether nobody gets past the handshake without a valid certificate.
    #[must_use]
    pub fn demands_certificate(&self) -> bool {
        self.reject_unauthorized && given(&self.ca).is_some()
    }
}

settings! {
    /// A listener.
    pub struct Listener {
        /// Addresses or names, one or a list.
        pub host: OneOrMore = OneOrMore::One("127.0.0.1".into()),
        /// TCP port, which must be given. 0: the system chooses a free one.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub port: Option<u16> = None,
        /// `true`: TLS with the files of `[tls]`.
        pub tls: bool = false,
        /// As the setting `auth`. Left out: that one holds.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub auth: Option<Auth> = None,
        /// As the setting `protocols`. Left out: that one holds.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub protocols: Option<Vec<Protocol>> = None,
        /// The most that any peer may call over this listener, whatever its own rights.
        /// Left out: everything.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub rights: Option<Vec<Right>> = None,
        /// Networks whose peers are admitted, such as `10.0.0.0/8`. Left out:
        /// all.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub allow: Vec<ipnet::IpNet> = Vec::new(),
        /// Networks whose peers are refused. It takes precedence over
        /// `allow`.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub deny: Vec<ipnet::IpNet> = Vec::new(),
        /// Networks of load balancers. Their connections must begin with
        /// a PROXY header of version 1 or 2; connections of others must not.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub proxy_from: Vec<ipnet::IpNet> = Vec::new(),
    }
}

/// Everything of this file that is out of bounds.
pub(super) fn check(
    tls: &Tls,
    principals: &Principals,
    listeners: &[Listener],
    bounds: &mut Bounds,
) {
    tls.check_ranges("tls.", bounds);
    let on = tls.is_on();
    bounds.that(
        "tls.key",
        !on || given(&tls.key).is_some(),
        "the file of the key of tls.cert",
    );
    bounds.that(
        "tls.cert",
        on || given(&tls.key).is_none(),
        "the file of the certificate that tls.key is for",
    );
    bounds.that(
        "tls.crl",
        given(&tls.crl).is_none() || given(&tls.ca).is_some(),
        "used with tls.ca",
    );
    bounds.that(
        "tls.crl_strict",
        !tls.crl_strict || given(&tls.crl).is_some(),
        "used with tls.crl",
    );
    for (name, principal) in principals {
        principal.check_ranges(&format!("principals.{name}."), bounds);
    }
    for (index, listener) in listeners.iter().enumerate() {
        let key = |setting: &str| format!("listeners.{index}.{setting}");
        listener.check_ranges(&key(""), bounds);
        bounds.that(key("host"), listener.host.is_sound(), OneOrMore::SOUND);
        bounds.that(key("port"), listener.port.is_some(), "given");
        bounds.that(
            key("tls"),
            on || !listener.tls,
            "false, or tls.cert and tls.key set",
        );
        bounds.that(
            key("protocols"),
            listener
                .protocols
                .as_ref()
                .is_none_or(|spoken| !spoken.is_empty()),
            "frames, http or both",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_cover_topics_and_versions() {
        let covers = |right: &str, topic: &str, version: [u64; 3]| {
            let right: Right = right.parse().unwrap();
            assert_eq!(right.to_string().parse::<Right>().unwrap(), right);
            right.covers(topic, version)
        };
        assert!(covers("*", "a.b", [1, 2, 3]));
        assert!(covers("*@1", "a.b", [1, 2, 3]) && !covers("*@1", "a.b", [2, 0, 0]));
        assert!(
            covers("math.*", "math.add", [1, 0, 0]) && covers("math.*", "math.deep.add", [0, 1, 0])
        );
        assert!(!covers("math.*", "maths.add", [1, 0, 0]) && !covers("math.*", "mat.h", [1, 0, 0]));
        assert!(
            covers("math.add", "math.add", [1, 0, 0])
                && !covers("math.add", "math.addition", [1, 0, 0])
        );
        assert!(
            covers("math.add@1.2", "math.add", [1, 2, 9])
                && !covers("math.add@1.2", "math.add", [1, 20, 0])
        );
        assert!(
            covers("math.add@1.2.3", "math.add", [1, 2, 3])
                && !covers("math.add@1.2.3", "math.add", [1, 2, 4])
        );
        let concerns =
            |right: &str, service: &str| right.parse::<Right>().unwrap().concerns(service);
        assert!(
            concerns("*", "math") && concerns("math.*", "math") && concerns("math.add@1", "math")
        );
        assert!(!concerns("maths.*", "math") && !concerns("math.add", "mat"));
        for wrong in [
            "",
            "math",
            "*.add",
            "math.*@",
            "math.add@1.2.3.4",
            "math.add@x",
            "math.a*",
            "@1",
        ] {
            assert!(wrong.parse::<Right>().is_err(), "{wrong}");
        }
    }
}
