//! Where durable values are kept, and how the engine is reached.

use std::path::PathBuf;

use super::{
    OneOrMore,
    define::{Bounds, settings},
    given,
};

/// Connections to one process of an engine. It works on one command at a time,
/// so that more only wait there.
pub const MAX_CONNECTIONS: usize = 64;
/// Port of Valkey and Redis where a URL names none.
const PORT: u16 = 6379;
/// Port of their Sentinels.
const SENTINEL_PORT: u16 = 26379;

settings! {
    /// Where durable values are kept.
    pub struct Store {
        /// Valkey or Redis for the durable values: `redis://[USER@]HOST[:PORT][/DB]`,
        /// with TLS `rediss://`. For a cluster a list of nodes; it finds the
        /// others. For Sentinels `redis+sentinel://[USER@]HOST[:PORT]/NAME[/DB]`, with
        /// TLS `rediss+sentinel://`, or a list. Empty: the file `store.redb` in
        /// `state_dir`.
        pub url: OneOrMore = OneOrMore::One(String::new()),
        /// File of the password. It is read again for each connection. Empty: none.
        pub password_file: PathBuf = PathBuf::new(),
        /// PEM file of the CAs that issue the certificates of the engine, such as
        /// `/etc/ssl/certs/ca-certificates.crt`. TLS needs it.
        pub ca: PathBuf = PathBuf::new(),
    }
}

/// An engine that is reached over the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// The nodes, or the Sentinels.
    pub nodes: Vec<Node>,
    /// What the Sentinels call the primary; none without them.
    pub primary: Option<String>,
    /// Whether TLS is spoken.
    pub tls: bool,
    /// Name of the user; none for the default one.
    pub user: Option<String>,
    /// Number of the database.
    pub db: u32,
    /// See [`Store::password_file`].
    pub password_file: Option<PathBuf>,
    /// See [`Store::ca`].
    pub ca: Option<PathBuf>,
}

/// Where one process of an engine listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node {
    /// Name or address, an IPv6 one without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl std::fmt::Display for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') {
            write!(f, "[{host}]:{port}")
        } else {
            write!(f, "{host}:{port}")
        }
    }
}

impl Store {
    /// The engine that `url` names; none where it is empty.
    ///
    /// # Errors
    /// What is wrong with `url`.
    pub fn remote(&self) -> Result<Option<Remote>, String> {
        let urls = self.url.as_slice();
        if urls == [""] {
            return Ok(None);
        }
        if urls.is_empty() {
            return Err("one or more URLs".into());
        }
        let mut all: Option<Remote> = None;
        for url in urls {
            let mut one = parse(url)?;
            one.password_file = given(&self.password_file).map(Into::into);
            one.ca = given(&self.ca).map(Into::into);
            match &mut all {
                None => all = Some(one),
                Some(all) => {
                    let nodes = std::mem::take(&mut one.nodes);
                    let others = std::mem::take(&mut all.nodes);
                    if *all != one {
                        return Err("URLs that differ in host and port only".into());
                    }
                    all.nodes = others.into_iter().chain(nodes).collect();
                }
            }
        }
        Ok(all)
    }

    pub(super) fn check(&self, bounds: &mut Bounds) {
        match self.remote() {
            Err(allowed) => bounds.that("store.url", false, &allowed),
            Ok(None) => {}
            Ok(Some(remote)) => {
                bounds.that(
                    "store.url",
                    cfg!(feature = "redis"),
                    "empty: this program was built without the feature redis",
                );
                bounds.that(
                    "store.ca",
                    !remote.tls || remote.ca.is_some(),
                    "set for TLS: the file of the CAs",
                );
                bounds.that(
                    "store.url",
                    remote.db == 0 || remote.nodes.len() == 1 || remote.primary.is_some(),
                    "without a database: a cluster has one only",
                );
            }
        }
    }
}

/// Parses one URL.
fn parse(url: &str) -> Result<Remote, String> {
    const FORM: &str =
        "redis://[USER@]HOST[:PORT][/DB], rediss://… with TLS, or redis+sentinel://…/NAME";
    let wrong = || FORM.to_owned();
    let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
    let (tls, sentinel) = match scheme {
        "redis" | "valkey" => (false, false),
        "rediss" | "valkeys" => (true, false),
        "redis+sentinel" => (false, true),
        "rediss+sentinel" => (true, true),
        _ => return Err(wrong()),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, address) = match authority.rsplit_once('@') {
        Some((user, _)) if user.contains(':') => {
            return Err(
                "without a password, which belongs into the file store.password_file".into(),
            );
        }
        Some((user, address)) => (Some(user).filter(|user| !user.is_empty()), address),
        None => (None, authority),
    };
    let default = if sentinel { SENTINEL_PORT } else { PORT };
    let node = parse_node(address, default).ok_or_else(wrong)?;
    let (primary, db) = if sentinel {
        let (name, db) = path.split_once('/').unwrap_or((path, ""));
        if name.is_empty() {
            return Err(wrong());
        }
        (Some(name.to_owned()), db)
    } else {
        (None, path)
    };
    let db = if db.is_empty() {
        0
    } else {
        db.parse().map_err(|_| wrong())?
    };
    let plain = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'%')
    };
    if !plain(url) {
        return Err("printable ASCII without spaces and %".into());
    }
    Ok(Remote {
        nodes: vec![node],
        primary,
        tls,
        user: user.map(Into::into),
        db,
        password_file: None,
        ca: None,
    })
}

/// Parses `HOST`, `HOST:PORT`, `[IPv6]` or `[IPv6]:PORT`.
fn parse_node(address: &str, default: u16) -> Option<Node> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (
                host,
                port.strip_prefix(':').or(port.is_empty().then_some(""))?,
            )
        }
        None => address.split_once(':').unwrap_or((address, "")),
    };
    let port = if port.is_empty() {
        default
    } else {
        port.parse().ok().filter(|port| *port > 0)?
    };
    (!host.is_empty()).then(|| Node {
        host: host.into(),
        port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(urls: &[&str]) -> Result<Option<Remote>, String> {
        Store {
            url: OneOrMore::More(urls.iter().map(|url| (*url).into()).collect()),
            ..Store::default()
        }
        .remote()
    }

    fn one(url: &str) -> (String, Option<String>, bool, Option<String>, u32) {
        let Remote {
            nodes,
            primary,
            tls,
            user,
            db,
            password_file: _,
            ca: _,
        } = remote(&[url]).unwrap().unwrap();
        (nodes[0].to_string(), primary, tls, user, db)
    }

    #[test]
    fn urls_say_how_an_engine_is_reached() {
        assert_eq!(Store::default().remote(), Ok(None));
        let plain = |node: &str, db| (node.to_owned(), None, false, None, db);
        assert_eq!(one("redis://a"), plain("a:6379", 0));
        assert_eq!(one("redis://a:1/3"), plain("a:1", 3));
        assert_eq!(one("redis://[::1]:7"), plain("[::1]:7", 0));
        assert_eq!(
            one("rediss://mb@a"),
            ("a:6379".into(), None, true, Some("mb".into()), 0)
        );
        assert_eq!(
            one("redis+sentinel://s/mine/2"),
            ("s:26379".into(), Some("mine".into()), false, None, 2)
        );
        let cluster = remote(&["redis://a", "redis://b:2"]).unwrap().unwrap();
        assert_eq!(cluster.nodes.len(), 2);
        for wrong in [
            "a",
            "http://a",
            "redis://",
            "redis://a:0",
            "redis://a:x",
            "redis://a/x",
            "redis+sentinel://s",
            "redis://[::1",
            "redis://u:secret@a",
            "redis://a b",
        ] {
            let error = remote(&[wrong]).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(remote(&["redis://a", "rediss://b"]).is_err());
        assert!(remote(&[]).is_err());
    }
}
