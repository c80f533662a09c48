//! The topics that the server answers itself: `system.hello`, `system.ping`
//! and `system.services`.

use std::{sync::Arc, time::SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json, value::RawValue};

use super::{Core, MAX_REPEATED, Refusal};
use crate::{
    catalog::{Action, Description},
    host::context::Caller,
    wire::{Code, Header, PROTOCOL_VERSION, Payload, SYSTEM_VERSION, header::MAX_HEADER_SIZE, json as wire_json},
};

/// Characters of a client's name that the log shows.
const MAX_LOGGED_CLIENT: usize = 100;

impl Core {
    /// Answers a system topic.
    pub(super) fn system(
        &self,
        header: &Header<'_>,
        payload: Payload<'_>,
        caller: &Arc<Caller>,
    ) -> Result<String, Refusal> {
        if !SYSTEM_VERSION.serves(header.version) {
            let message = format!("system topics have version {SYSTEM_VERSION} only");
            let details = json!({"available": [SYSTEM_VERSION.to_string()]});
            return Err(Refusal::new(Code::VersionNotSupported, message).with(&details));
        }
        let action = header.topic.action();
        let answer: fn(&Self, &str, &Caller) -> Result<String, Refusal> = match action {
            "hello" => Self::hello,
            "ping" => |_, payload, _| ping(payload),
            "services" => |core, payload, _| core.services(payload),
            _ => return Err(Refusal::new(Code::TopicNotSupported, format!("the server has no action {action}"))),
        };
        match payload {
            Payload::Json(text) => answer(self, text, caller),
            Payload::Binary(_) => Err(Refusal::new(Code::InvalidRequest, "system topics take JSON, not bytes")),
        }
    }

    fn hello(&self, payload: &str, caller: &Caller) -> Result<String, Refusal> {
        let hello: Option<Map<String, Value>> = read(payload)?;
        let hello = hello.unwrap_or_default();
        let field = |name: &str| match hello.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(Refusal::new(Code::InvalidRequest, format!("wrong payload: {name} must be a text"))),
        };
        let (client, protocol, _token) = (field("client")?, field("protocol")?, field("token")?);
        let protocol = protocol.unwrap_or(PROTOCOL_VERSION);
        if protocol.split('.').next() != PROTOCOL_VERSION.split('.').next() {
            let asked: String = protocol.chars().take(MAX_REPEATED).collect();
            let message = format!("protocol {asked:?} asked for, this server speaks {PROTOCOL_VERSION}");
            let details = json!({"available": [PROTOCOL_VERSION]});
            return Err(Refusal::new(Code::VersionNotSupported, message).with(&details));
        }
        let client: String = client.unwrap_or_default().chars().take(MAX_LOGGED_CLIENT).collect();
        tracing::debug!(connection = caller.connection_id, ?client, "hello");
        let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let limits = &self.limits;
        let answer = json!({
            "server": concat!("mb-server/", env!("CARGO_PKG_VERSION")),
            "protocol": PROTOCOL_VERSION,
            "connectionId": caller.connection_id,
            "principal": caller.principal,
            "limits": {
                "maxMessageSize": limits.max_message_size,
                "maxHeaderSize": MAX_HEADER_SIZE,
                "maxInFlight": limits.max_in_flight,
                "keepAliveIntervalMs": millis(limits.keep_alive_interval),
                "idleTimeoutMs": millis(limits.idle_timeout),
                "defaultTimeoutMs": millis(limits.default_timeout),
            },
        });
        Ok(answer.to_string())
    }

    fn services(&self, payload: &str) -> Result<String, Refusal> {
        let _: Option<Map<String, Value>> = read(payload)?;
        #[derive(Serialize)]
        struct Row<'a> {
            name: &'a str,
            version: String,
            description: &'a str,
            digest: &'a str,
            actions: &'a [Action],
        }
        let catalog = self.catalog.load();
        let rows: Vec<_> = catalog
            .services()
            .map(|service| {
                let Description { name, version, description, actions } = &service.description;
                Row { name, version: version.to_string(), description, digest: &service.digest, actions }
            })
            .collect();
        Ok(json!({"services": rows}).to_string())
    }
}

/// Levels that the answer to a ping puts around what it gives back.
const PONG_DEPTH: usize = 1;

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

fn read<'a, T: Deserialize<'a>>(payload: &'a str) -> Result<T, Refusal> {
    serde_json::from_str(payload).map_err(wrong)
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
fn wrong(error: serde_json::Error) -> Refusal {
    let message: String = format!("wrong payload: {error}").chars().take(MAX_REPEATED).collect();
    Refusal::new(Code::InvalidRequest, message)
}
