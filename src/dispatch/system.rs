//! The topics that the server answers itself: `system.hello`, `system.ping`
//! and `system.services`.

use std::{borrow::Cow, fmt, time::SystemTime};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::{json, value::RawValue};

use super::{Core, MAX_REPEATED, Refusal, take_rate};
use crate::{
    access::{Denied, Identity},
    catalog::{Action, Description},
    config::MAX_IN_FLIGHT,
    wire::{
        Code, Header, PROTOCOL_VERSION, Payload, SYSTEM_VERSION, header::MAX_HEADER_SIZE,
        json as wire_json,
    },
};

/// Characters of a client's name that the log shows.
const MAX_LOGGED_CLIENT: usize = 100;

impl Core {
    /// Answers a system topic, within the rate of its principal.
    pub(super) fn system(
        &self,
        header: &Header<'_>,
        payload: Payload<'_>,
        identity: &Identity,
        known: &mut Option<Identity>,
    ) -> Result<String, Refusal> {
        // A peer authenticates once on a connection. That does not count for
        // the rate that all share who have not: they could keep it out.
        let may_authenticate = header.topic.action() == "hello" && !identity.is_authenticated();
        if !may_authenticate {
            take_rate(&identity.principal)?;
        }
        let answer = self.system_answer(header, payload, identity, known);
        if may_authenticate && known.is_none() && !identity.must_authenticate() {
            take_rate(&identity.principal)?;
        }
        answer
    }

    fn system_answer(
        &self,
        header: &Header<'_>,
        payload: Payload<'_>,
        identity: &Identity,
        known: &mut Option<Identity>,
    ) -> Result<String, Refusal> {
        if !SYSTEM_VERSION.serves(header.version) {
            let message = format!("system topics have version {SYSTEM_VERSION} only");
            let details = json!({"available": [SYSTEM_VERSION.to_string()]});
            return Err(Refusal::new(Code::VersionNotSupported, message).with(&details));
        }
        let action = header.topic.action();
        if !["heartbeat", "hello", "ping", "services"].contains(&action) {
            return Err(Refusal::new(
                Code::TopicNotSupported,
                format!("the server has no action {action}"),
            ));
        }
        let Payload::Json(text) = payload else {
            return Err(Refusal::new(
                Code::InvalidRequest,
                "system topics take JSON, not bytes",
            ));
        };
        match action {
            "hello" => self.hello(text, identity, known),
            "ping" => ping(text),
            "heartbeat" => Ok(heartbeat()),
            _ => self.services(text, identity),
        }
    }

    fn hello(
        &self,
        payload: &str,
        identity: &Identity,
        known: &mut Option<Identity>,
    ) -> Result<String, Refusal> {
        let [client, protocol, token] = fields(payload, ["client", "protocol", "token"])?;
        let text = |field: Option<&RawValue>, name: &str| match field {
            None => Ok(None),
            Some(value) => read::<Option<String>>(value.get()).map_err(|_| {
                let message = format!("wrong payload: {name} must be a text");
                Refusal::new(Code::InvalidRequest, message)
            }),
        };
        let (client, token) = (text(client, "client")?, text(token, "token")?);
        let protocol = text(protocol, "protocol")?;
        let protocol = protocol.as_deref().unwrap_or(PROTOCOL_VERSION);
        if protocol.split('.').next() != PROTOCOL_VERSION.split('.').next() {
            let asked: String = protocol.chars().take(MAX_REPEATED).collect();
            let message =
                format!("protocol {asked:?} asked for, this server speaks {PROTOCOL_VERSION}");
            let details = json!({"available": [PROTOCOL_VERSION]});
            return Err(Refusal::new(Code::VersionNotSupported, message).with(&details));
        }
        let client: String = client
            .unwrap_or_default()
            .chars()
            .take(MAX_LOGGED_CLIENT)
            .collect();
        if let Some(token) = token {
            let shown = self.access.authenticate(identity, &token);
            *known = Some(shown.map_err(|denied| self.denied(&denied))?);
        } else if identity.must_authenticate() {
            return Err(self.denied(&self.access.without_token(identity)));
        }
        let caller = &known.as_ref().unwrap_or(identity).caller;
        tracing::debug!(connection = caller.connection_id, ?client, "hello");
        let millis =
            |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let config = &self.config;
        let answer = json!({
            "server": concat!("mb-server/", env!("CARGO_PKG_VERSION")),
            "protocol": PROTOCOL_VERSION,
            "connectionId": caller.connection_id,
            "principal": caller.principal,
            "limits": {
                "maxMessageSize": config.max_message_size.0,
                "maxHeaderSize": MAX_HEADER_SIZE,
                "maxInFlight": MAX_IN_FLIGHT,
                "keepAliveIntervalMs": millis(config.keep_alive_within()),
                "idleTimeoutMs": millis(config.idle_timeout.0),
                "defaultTimeoutMs": millis(config.default_timeout.0),
            },
        });
        Ok(answer.to_string())
    }

    fn denied(&self, denied: &Denied) -> Refusal {
        self.metrics.auth_failures.add(denied.reason());
        let refusal = Refusal::new(Code::Unauthorized, denied.message());
        match denied {
            Denied::TooMany(wait) => {
                refusal.with(&json!({"retryAfterMs": wait.as_millis() as u64 + 1}))
            }
            Denied::Token | Denied::NoToken | Denied::Exposed => refusal,
        }
    }

    fn services(&self, payload: &str, identity: &Identity) -> Result<String, Refusal> {
        let [] = fields(payload, [])?;
        #[derive(Serialize)]
        struct Services<'a> {
            services: Vec<Row<'a>>,
        }
        #[derive(Serialize)]
        struct Row<'a> {
            name: &'a str,
            version: String,
            description: &'a str,
            digest: &'a str,
            actions: Vec<&'a Action>,
        }
        let catalog = self.catalog.load();
        let rows: Vec<_> = catalog
            .services()
            .filter(|service| identity.may_see(&service.description.name))
            .map(|service| {
                let Description {
                    name,
                    version,
                    description,
                    actions,
                } = &service.description;
                let numbers = [version.major, version.minor, version.patch];
                let may_call = |action: &&Action| {
                    identity.may_call(&format!("{name}.{}", action.name), numbers)
                };
                let actions = actions.iter().filter(may_call).collect();
                Row {
                    name,
                    version: version.to_string(),
                    description,
                    digest: &service.digest,
                    actions,
                }
            })
            .collect();
        let services = rows
            .into_iter()
            .filter(|row| !row.actions.is_empty())
            .collect();
        serde_json::to_string(&Services { services }).map_err(wrong)
    }
}

/// Levels that the answer to a ping puts around what it returns.
const PONG_DEPTH: usize = 1;

/// Clients send it to stay connected. What they send with it is not looked at.
fn heartbeat() -> String {
    let now = humantime::format_rfc3339_millis(SystemTime::now());
    json!({"timestamp": now.to_string()}).to_string()
}

fn ping(payload: &str) -> Result<String, Refusal> {
    #[derive(Serialize)]
    struct Pong<'a> {
        now: String,
        echo: &'a RawValue,
    }
    wire_json::check_depth(payload, wire_json::MAX_DEPTH - PONG_DEPTH)
        .map_err(|error| Refusal::new(Code::InvalidRequest, format!("wrong payload: {error}")))?;
    let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let echo: &RawValue = read(payload)?;
    serde_json::to_string(&Pong { now, echo }).map_err(wrong)
}

/// The named fields of a payload that is an object or `null`. Nothing of it is
/// copied or built: of a peer's JSON, a tree takes up to a hundred times the
/// memory. Of a name that stands twice the last one counts.
fn fields<'a, const N: usize>(
    payload: &'a str,
    names: [&'static str; N],
) -> Result<[Option<&'a RawValue>; N], Refusal> {
    struct Fields<const N: usize>([&'static str; N]);

    impl<'a, const N: usize> Visitor<'a> for Fields<N> {
        type Value = [Option<&'a RawValue>; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok([None; N])
        }

        fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = [None; N];
            while let Some(Key(key)) = map.next_key()? {
                match self.0.iter().position(|name| *name == key) {
                    Some(at) => found[at] = Some(map.next_value()?),
                    None => drop(map.next_value::<IgnoredAny>()?),
                }
            }
            Ok(found)
        }
    }

    let mut deserializer = serde_json::Deserializer::from_str(payload);
    deserializer.deserialize_any(Fields(names)).map_err(wrong)
}

/// Borrowed where nothing in it is escaped.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

fn read<'a, T: Deserialize<'a>>(payload: &'a str) -> Result<T, Refusal> {
    serde_json::from_str(payload).map_err(wrong)
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "used as a function in map_err"
)]
fn wrong(error: serde_json::Error) -> Refusal {
    let message: String = format!("wrong payload: {error}")
        .chars()
        .take(MAX_REPEATED)
        .collect();
    Refusal::new(Code::InvalidRequest, message)
}
