//! Principals and what they may do: tokens, rights, rates, and a throttle on
//! failures to authenticate.

mod throttle;
pub mod tokens;

use std::{
    collections::HashMap,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use throttle::AuthThrottle;
pub use throttle::{Failure, whole_address};
use tokens::{Tokens, TokensError};

use crate::{
    budget::{Budget, Rate},
    config::{
        Auth, Principals, Right,
        access::{ANONYMOUS, DEFAULT_PRINCIPAL, PrincipalSettings},
    },
    host::context::Caller,
    locks::lock,
    log::{AUDIT, Limiter},
};

/// What a request asks for that names no version: rights that name one do not
/// cover it.
pub const NO_VERSION: [u64; 3] = [u64::MAX; 3];

/// Principals that are remembered at the same time; unused ones are displaced.
const MAX_PRINCIPALS: usize = 10_000;

/// A principal, over all its connections.
#[derive(Debug)]
pub struct Principal {
    /// Its name.
    pub name: String,
    /// What it may call.
    pub rights: Arc<[Right]>,
    /// Requests a second that it may send; none for no limit.
    pub rate: Option<Rate>,
    /// Permits for its calls that run at the same time; none for no limit.
    pub calls: Option<Arc<Budget>>,
}

/// What a listener requires of its peers.
#[derive(Debug, Clone)]
pub struct ListenerPolicy {
    /// Whether they must authenticate.
    pub auth: Auth,
    /// The most that anybody may call; none for everything.
    pub rights: Option<Arc<[Right]>>,
    /// Tokens are accepted over connections that others can read.
    pub allow_unsecure: bool,
}

/// The identity of a connection's peer. Replaced as a whole when the peer
/// authenticates, and by [`Access::current`] when the settings of principals
/// have changed.
#[derive(Debug, Clone)]
pub struct Identity {
    /// As services see it.
    pub caller: Arc<Caller>,
    /// Whose rates and permits count.
    pub principal: Arc<Principal>,
    /// Rights of its token, which replace the principal's.
    rights: Option<Arc<[Right]>>,
    policy: Arc<ListenerPolicy>,
    token: Option<Arc<tokens::Token>>,
    /// Its certificate is no longer valid.
    certificate_invalid: bool,
    /// Generation of the settings that rights and rates are from.
    generation: u64,
    /// The right to everything.
    everything: Arc<[Right]>,
    address: IpAddr,
    /// For whom a trusted proxy asks.
    forwarded: Option<IpAddr>,
}

/// Why a peer is not authenticated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// The token is unknown, expired or revoked.
    Token,
    /// There is no token.
    NoToken,
    /// A token over a connection that others can read.
    Exposed,
    /// Too many failures; the time until the next try is allowed.
    TooMany(Duration),
}

/// The message for peers whose address has failed too often.
pub const TOO_MANY_FAILURES: &str = "too many failures from this address";

impl Denied {
    /// One word, for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::NoToken => "missing",
            Self::Exposed => "exposed",
            Self::TooMany(_) => "too-many",
        }
    }

    /// The message for the peer.
    #[must_use]
    pub fn message(&self) -> &'static str {
        match self {
            Self::Token => "the token is unknown, expired or revoked",
            Self::NoToken => {
                "system.hello must carry a token here, or over HTTP the field Authorization: Bearer TOKEN"
            }
            Self::Exposed => {
                "a token is taken over TLS only, since others can read this connection"
            }
            Self::TooMany(_) => TOO_MANY_FAILURES,
        }
    }
}

/// Tokens, principals and the throttle of one server.
pub struct Access {
    /// Counts the changes of the settings; raised after them.
    generation: AtomicU64,
    file: PathBuf,
    tokens: ArcSwap<Tokens>,
    settings: ArcSwap<Principals>,
    principals: Mutex<HashMap<String, Arc<Principal>>>,
    throttle: AuthThrottle,
    everything: ArcSwap<Principal>,
}

impl Access {
    /// Creates it with the tokens of a file, which need not exist yet.
    ///
    /// # Errors
    /// If the file is there and can't be used.
    pub fn new(
        settings: Principals,
        file: PathBuf,
        failures_per_minute: u32,
    ) -> Result<Arc<Self>, TokensError> {
        let tokens = ArcSwap::from_pointee(Tokens::load(&file)?);
        Ok(Arc::new(Self {
            generation: AtomicU64::new(0),
            file,
            tokens,
            everything: ArcSwap::from_pointee(everything(&settings)),
            settings: ArcSwap::from_pointee(settings),
            principals: Mutex::default(),
            throttle: AuthThrottle::new(failures_per_minute),
        }))
    }

    /// Reads the tokens again. Revoked ones are invalid at once, on open
    /// connections too.
    ///
    /// # Errors
    /// If the file can't be used; the earlier tokens stay in effect.
    pub fn reload(&self) -> Result<usize, TokensError> {
        let fresh = Tokens::load(&self.file)?;
        let count = fresh.len();
        self.tokens
            .store(Arc::new(fresh.replacing(&self.tokens.load())));
        Ok(count)
    }

    /// Replaces the settings. They apply from the next request on, on open
    /// connections too.
    pub fn set_principals(&self, settings: Principals) {
        let mut principals = lock(&self.principals);
        let before = self.settings.load_full();
        // Where nothing has changed, what was counted goes on to count.
        principals.retain(|name, _| settings_of(&before, name) == settings_of(&settings, name));
        if before.get(ANONYMOUS) != settings.get(ANONYMOUS) {
            self.everything.store(Arc::new(everything(&settings)));
        }
        self.settings.store(Arc::new(settings));
        drop(principals);
        self.generation.fetch_add(1, Release);
    }

    /// Returns the identity with the rights and rates of the current settings;
    /// none if it has them.
    #[must_use]
    #[inline]
    pub fn current(&self, identity: &Identity) -> Option<Identity> {
        // Read first: what changes meanwhile is found the next time.
        let generation = self.generation.load(Acquire);
        (generation != identity.generation).then(|| {
            let principal = if identity.is_authenticated() {
                self.principal(&identity.principal.name)
            } else {
                self.of_unauthenticated(identity.policy.auth)
            };
            Identity {
                principal,
                generation,
                ..identity.clone()
            }
        })
    }

    fn of_unauthenticated(&self, auth: Auth) -> Arc<Principal> {
        match auth {
            Auth::None => self.everything.load_full(),
            Auth::Optional | Auth::Required => self.principal(ANONYMOUS),
        }
    }

    /// The file of the tokens.
    #[must_use]
    pub fn file(&self) -> &PathBuf {
        &self.file
    }

    /// Returns the identity of a new connection.
    #[must_use]
    pub fn unauthenticated(
        &self,
        connection_id: String,
        address: IpAddr,
        encrypted: bool,
        policy: &Arc<ListenerPolicy>,
    ) -> Identity {
        let generation = self.generation.load(Acquire);
        let principal = self.of_unauthenticated(policy.auth);
        let caller = Arc::new(Caller {
            connection_id,
            principal: None,
            encrypted,
        });
        let everything = Arc::clone(&self.everything.load().rights);
        Identity {
            caller,
            principal,
            rights: None,
            policy: Arc::clone(policy),
            token: None,
            certificate_invalid: false,
            generation,
            everything,
            address,
            forwarded: None,
        }
    }

    /// Returns the identity under the principal of its certificate.
    #[must_use]
    pub fn certified(&self, identity: &Identity, name: &str) -> Identity {
        let known = identity.become_principal(self.principal(name), None);
        log_login(&known, "certificate");
        known
    }

    /// Returns the time until an address may try again, if it has failed too
    /// often in one way.
    #[must_use]
    pub fn throttled_for(&self, address: IpAddr, way: Failure) -> Option<Duration> {
        self.throttle.wait(address, way, Instant::now())
    }

    /// Whether an address has failed too often in any way.
    #[must_use]
    pub fn is_throttled(&self, address: IpAddr) -> bool {
        [Failure::NoToken, Failure::WrongToken, Failure::Certificate]
            .into_iter()
            .any(|way| self.throttled_for(address, way).is_some())
    }

    /// Returns the identity under the principal of its token.
    ///
    /// # Errors
    /// Why not. A wrong token counts as a failure of its address.
    pub fn authenticate(&self, identity: &Identity, token: &str) -> Result<Identity, Denied> {
        if let Some(wait) = self.throttled_for(identity.asks_from(), Failure::WrongToken) {
            log_refusal(identity, "too many failures");
            return Err(Denied::TooMany(wait));
        }
        if !identity.may_show_token() {
            log_refusal(identity, "token without TLS");
            return Err(Denied::Exposed);
        }
        match self
            .tokens
            .load()
            .find(token)
            .filter(|token| token.holds(SystemTime::now()))
        {
            Some(token) => {
                let principal = self.principal(&token.principal);
                let known = identity.become_principal(principal, Some(Arc::clone(token)));
                log_login(&known, "token");
                Ok(known)
            }
            None => {
                self.failed(identity, Failure::WrongToken);
                Err(Denied::Token)
            }
        }
    }

    /// Why a peer that must authenticate may not go on without a token,
    /// which counts as a failure of its address.
    #[must_use]
    pub fn without_token(&self, identity: &Identity) -> Denied {
        if let Some(wait) = self.throttled_for(identity.asks_from(), Failure::NoToken) {
            log_refusal(identity, "too many failures");
            return Denied::TooMany(wait);
        }
        self.failed(identity, Failure::NoToken);
        Denied::NoToken
    }

    /// Counts a failure to authenticate against the peer's address.
    pub fn failed(&self, identity: &Identity, way: Failure) {
        self.throttle
            .failed(identity.asks_from(), way, Instant::now());
        let reason = match way {
            Failure::NoToken => "no token",
            Failure::WrongToken => "wrong token",
            Failure::Certificate => "no valid certificate",
        };
        log_refusal(identity, reason);
    }

    fn principal(&self, name: &str) -> Arc<Principal> {
        let mut principals = lock(&self.principals);
        if let Some(known) = principals.get(name) {
            return Arc::clone(known);
        }
        if principals.len() >= MAX_PRINCIPALS {
            principals.retain(|_, principal| Arc::strong_count(principal) > 1);
        }
        let settings = settings_of(&self.settings.load(), name)
            .cloned()
            .unwrap_or_default();
        let principal = Arc::new(Principal {
            name: name.to_owned(),
            rights: settings.rights.into(),
            rate: Rate::per_second(settings.rate),
            calls: semaphore(settings.concurrency),
        });
        principals.insert(name.to_owned(), Arc::clone(&principal));
        principal
    }
}

/// Returns the settings of a principal: its own, or those of `default`.
fn settings_of<'a>(settings: &'a Principals, name: &str) -> Option<&'a PrincipalSettings> {
    let fallback = || {
        settings
            .get(DEFAULT_PRINCIPAL)
            .filter(|_| name != ANONYMOUS)
    };
    settings.get(name).or_else(fallback)
}

/// Logs in the audit trail that a peer is not, or no longer, authenticated.
pub fn log_refusal(identity: &Identity, reason: &str) {
    static LINES: Limiter = Limiter::audit();
    if LINES.allows("not authenticated") {
        let connection = &*identity.caller.connection_id;
        tracing::warn!(target: AUDIT, security = "authentication", connection, peer = %identity.asks_from(), reason, "not authenticated");
    }
}

/// Logs that a peer has authenticated by its token or its certificate.
fn log_login(identity: &Identity, by: &str) {
    static LINES: Limiter = Limiter::audit();
    if LINES.allows("authenticated") {
        let connection = &*identity.caller.connection_id;
        let principal = &*identity.principal.name;
        tracing::info!(target: AUDIT, security = "login", connection, peer = %identity.asks_from(), principal, by, "authenticated");
    }
}

/// Returns the principal of unauthenticated peers.
fn everything(settings: &Principals) -> Principal {
    let own = settings.get(ANONYMOUS);
    Principal {
        name: ANONYMOUS.into(),
        rights: [Right::everything()].into(),
        rate: own.and_then(|own| Rate::per_second(own.rate)),
        calls: own.and_then(|own| semaphore(own.concurrency)),
    }
}

fn semaphore(concurrency: usize) -> Option<Arc<Budget>> {
    (concurrency > 0).then(|| Budget::new(concurrency))
}

impl Identity {
    fn become_principal(
        &self,
        principal: Arc<Principal>,
        token: Option<Arc<tokens::Token>>,
    ) -> Self {
        let caller = Caller {
            principal: Some(principal.name.clone()),
            ..(*self.caller).clone()
        };
        let rights = token.as_ref().and_then(|token| token.rights.clone());
        Self {
            caller: Arc::new(caller),
            principal,
            rights,
            token,
            ..self.clone()
        }
    }

    /// Whether the peer has authenticated.
    #[must_use]
    pub fn is_authenticated(&self) -> bool {
        self.caller.principal.is_some()
    }

    /// Whether the peer must authenticate before anything else.
    #[must_use]
    pub fn must_authenticate(&self) -> bool {
        self.is_authentication_required() && !self.is_authenticated()
    }

    /// Whether its listener requires that peers authenticate.
    #[must_use]
    pub fn is_authentication_required(&self) -> bool {
        self.policy.auth == Auth::Required
    }

    /// Whether its token or certificate has expired or was revoked since.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        let token_invalid = |token: &Arc<tokens::Token>| token.is_invalid(Instant::now());
        self.certificate_invalid || self.token.as_ref().is_some_and(token_invalid)
    }

    /// Returns the identity, marked as one whose certificate is no longer
    /// valid.
    #[must_use]
    pub fn with_invalid_certificate(&self) -> Self {
        Self {
            certificate_invalid: true,
            ..self.clone()
        }
    }

    /// Whether it may call a topic in the requested version.
    #[must_use]
    pub fn may_call(&self, topic: &str, version: [u64; 3]) -> bool {
        let allow = |rights: &[Right]| rights.iter().any(|right| right.covers(topic, version));
        allow(self.rights()) && self.policy.rights.as_deref().is_none_or(allow)
    }

    /// The same for a request that a trusted proxy passes on from an address.
    /// Its rights are those of the connection.
    #[must_use]
    pub fn forwarded_for(&self, address: Option<IpAddr>) -> Self {
        Self {
            forwarded: address,
            ..self.clone()
        }
    }

    /// The address that failures to authenticate count for.
    #[must_use]
    pub fn asks_from(&self) -> IpAddr {
        self.forwarded.unwrap_or(self.address)
    }

    /// Whether it may call any action of a service.
    #[must_use]
    pub fn may_see(&self, service: &str) -> bool {
        let allow = |rights: &[Right]| rights.iter().any(|right| right.concerns(service));
        allow(self.rights()) && self.policy.rights.as_deref().is_none_or(allow)
    }

    fn rights(&self) -> &[Right] {
        match &self.rights {
            Some(rights) => rights,
            // Where nobody is asked, a name alone takes nothing away.
            None if self.policy.auth == Auth::None && self.principal.rights.is_empty() => {
                &self.everything
            }
            None => &self.principal.rights,
        }
    }

    fn may_show_token(&self) -> bool {
        self.caller.encrypted || self.address.is_loopback() || self.policy.allow_unsecure
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::access::PrincipalSettings;

    fn rights(texts: &[&str]) -> Vec<Right> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn access(dir: &std::path::Path) -> Arc<Access> {
        let settings = [
            (
                "ann",
                PrincipalSettings {
                    rights: rights(&["math.*", "orders.create@1"]),
                    ..Default::default()
                },
            ),
            (
                "anonymous",
                PrincipalSettings {
                    rights: rights(&["echo.say"]),
                    ..Default::default()
                },
            ),
        ];
        let settings = settings
            .map(|(name, settings)| (name.to_owned(), settings))
            .into();
        Access::new(settings, dir.join("tokens.json"), 3).unwrap()
    }

    fn policy(auth: Auth, cap: Option<&[&str]>) -> Arc<ListenerPolicy> {
        Arc::new(ListenerPolicy {
            auth,
            rights: cap.map(|cap| rights(cap).into()),
            allow_unsecure: false,
        })
    }

    #[test]
    fn principals_by_services_by_versions() {
        let dir = tempfile::tempdir().unwrap();
        let access = access(dir.path());
        let local: IpAddr = "127.0.0.1".parse().unwrap();
        let identity = |auth, cap: Option<&[&str]>, name: Option<&str>| {
            let unauthenticated =
                access.unauthenticated("1".into(), local, true, &policy(auth, cap));
            name.map_or(unauthenticated.clone(), |name| {
                access.certified(&unauthenticated, name)
            })
        };
        let v1 = [1, 0, 0];
        let v2 = [2, 0, 0];
        let topics = [
            ("math.add", v1),
            ("math.add", v2),
            ("orders.create", v1),
            ("orders.create", v2),
            ("echo.say", v1),
        ];
        let check = |identity: &Identity, expected: [bool; 5]| {
            assert_eq!(
                topics.map(|(topic, version)| identity.may_call(topic, version)),
                expected,
                "{identity:?}"
            );
        };
        check(&identity(Auth::None, None, None), [true; 5]);
        check(&identity(Auth::None, None, Some("bob")), [true; 5]);
        check(
            &identity(Auth::None, None, Some("ann")),
            [true, true, true, false, false],
        );
        check(
            &identity(Auth::Optional, None, None),
            [false, false, false, false, true],
        );
        check(
            &identity(Auth::Required, None, Some("ann")),
            [true, true, true, false, false],
        );
        check(&identity(Auth::Required, None, Some("bob")), [false; 5]);
        check(
            &identity(Auth::Required, Some(&["math.add@2"]), Some("ann")),
            [false, true, false, false, false],
        );
        assert!(identity(Auth::Required, None, None).must_authenticate());
        assert!(!identity(Auth::Required, None, Some("ann")).must_authenticate());
        let ann = identity(Auth::Required, None, Some("ann"));
        assert!(
            ann.may_see("math")
                && ann.may_see("orders")
                && !ann.may_see("echo")
                && !ann.may_see("mat")
        );
    }

    #[test]
    fn tokens_hold_until_they_are_revoked_and_guessing_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens.json");
        let (id, token) = tokens::create(&file, "ann", None, Some(rights(&["math.add"]))).unwrap();
        let access = access(dir.path());
        let peer: IpAddr = "192.0.2.1".parse().unwrap();
        let plain = access.unauthenticated("1".into(), peer, false, &policy(Auth::Required, None));
        assert_eq!(
            access.authenticate(&plain, &token).unwrap_err(),
            Denied::Exposed
        );
        let unauthenticated =
            access.unauthenticated("2".into(), peer, true, &policy(Auth::Required, None));
        let ann = access.authenticate(&unauthenticated, &token).unwrap();
        assert_eq!(ann.caller.principal.as_deref(), Some("ann"));
        assert!(
            ann.may_call("math.add", [1, 0, 0]) && !ann.may_call("math.sub", [1, 0, 0]),
            "the token's rights"
        );
        assert!(!ann.is_invalid());
        tokens::revoke(&file, &id).unwrap();
        assert_eq!(access.reload().unwrap(), 0);
        assert!(ann.is_invalid());
        for _ in 0..3 {
            assert_eq!(
                access.authenticate(&unauthenticated, &token).unwrap_err(),
                Denied::Token
            );
        }
        assert!(matches!(
            access.authenticate(&unauthenticated, &token),
            Err(Denied::TooMany(_))
        ));
        assert!(
            access.throttled_for(peer, Failure::WrongToken).is_some()
                && access.throttled_for(peer, Failure::NoToken).is_none()
                && access.is_throttled(peer)
                && !access.is_throttled("192.0.2.2".parse().unwrap())
        );
    }

    #[test]
    fn open_connections_have_the_rights_of_the_moment() {
        let dir = tempfile::tempdir().unwrap();
        let access = access(dir.path());
        let local: IpAddr = "127.0.0.1".parse().unwrap();
        let unauthenticated =
            access.unauthenticated("1".into(), local, true, &policy(Auth::Optional, None));
        let ann = access.certified(&unauthenticated, "ann");
        assert!(access.current(&ann).is_none() && access.current(&unauthenticated).is_none());
        let mut settings = Principals::clone(&access.settings.load());
        settings.get_mut("ann").unwrap().rights = rights(&["math.add"]);
        access.set_principals(settings);
        let ann = access.current(&ann).unwrap();
        assert!(
            ann.may_call("math.add", [1, 0, 0]) && !ann.may_call("orders.create", [1, 0, 0]),
            "{ann:?}"
        );
        let same = access.current(&unauthenticated).unwrap();
        assert!(
            Arc::ptr_eq(&same.principal, &unauthenticated.principal),
            "what has not changed goes on counting"
        );
        assert!(access.current(&ann).is_none() && access.current(&same).is_none());
        assert!(!ann.is_invalid() && ann.with_invalid_certificate().is_invalid());
    }
}
