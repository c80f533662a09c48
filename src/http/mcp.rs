//! Model Context Protocol over Streamable HTTP, without sessions: what a body
//! asks for, and the response to it. No I/O and no clock.
//!
//! Revision 2025-11-25 begins with `initialize`. In 2026-07-28 each request
//! stands alone: it names its revision, and fields of its head repeat what its
//! body says, for those in between.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::{Value, json, value::RawValue};

use super::schema::visit_all;
use crate::wire::json as wire_json;

/// The revisions that are spoken.
const REVISIONS: [&str; 2] = ["2025-11-25", "2026-07-28"];
/// Longest JSON of an id or a name that is looked at, in bytes.
const MAX_WORD: usize = 1024;
/// Characters of a peer's own text that an error repeats at most.
const MAX_REPEATED: usize = 64;

const PARSE_ERROR: i32 = -32700;
const INVALID_REQUEST: i32 = -32600;
const METHOD_NOT_FOUND: i32 = -32601;
const INVALID_PARAMS: i32 = -32602;
const HEADER_MISMATCH: i32 = -32020;
const UNSUPPORTED_REVISION: i32 = -32022;

/// What lists and descriptions say of how long they hold.
const CACHING: &str = r#""ttlMs":0,"cacheScope":"private""#;

/// Fields of a head that repeat what the body says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct McpFields {
    /// `MCP-Protocol-Version`.
    pub revision: Option<Box<str>>,
    /// `Mcp-Method`.
    pub method: Option<Box<str>>,
    /// `Mcp-Name`.
    pub name: Option<Box<str>>,
}

/// Status and body of a response; no body where that is empty.
pub type McpResponse = (u16, String);

/// What follows a body.
#[derive(Debug, PartialEq, Eq)]
pub enum McpStep<'a> {
    /// This response.
    Respond(McpResponse),
    /// The response is [`McpReply::tools`].
    ListTools(McpReply),
    /// A tool of this name is called with a JSON object of the body; the
    /// response is [`McpReply::called`].
    CallTool(McpReply, String, Option<&'a str>),
}

/// Writes the response to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct McpReply {
    /// JSON of the request's id.
    id: Box<str>,
    /// The request stands alone.
    stands_alone: bool,
}

/// An action as a tool.
#[derive(Debug, Clone, Copy)]
pub struct Tool<'a> {
    /// First segment of its topic.
    pub service: &'a str,
    /// The rest of it.
    pub action: &'a str,
    /// For a person; may be empty.
    pub description: &'a str,
    /// JSON Schema of its arguments.
    pub input: &'a Value,
    /// JSON Schema of its answer.
    pub output: Option<&'a Value>,
}

impl Tool<'_> {
    /// `calc_add`: models take no dots in names.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}_{}", self.service, self.action.replace('.', "_"))
    }

    /// `calc.add`.
    #[must_use]
    pub fn topic(&self) -> String {
        format!("{}.{}", self.service, self.action)
    }

    fn listed(&self) -> Value {
        let mut input = self.input.clone();
        // Clients would repeat arguments in fields that nobody compares.
        visit_all(&mut input, &mut |part| drop(part.remove("x-mcp-header")));
        let mut listed =
            json!({"name": self.name(), "description": self.description, "inputSchema": input});
        if let Some(output) = self.output.filter(|output| is_of_objects(output)) {
            listed["outputSchema"] = output.clone();
        }
        listed
    }
}

/// Whether a schema is one of objects, as those of tools must be.
#[must_use]
pub fn is_of_objects(schema: &Value) -> bool {
    schema.get("type").is_some_and(|kind| kind == "object")
}

/// Borrows from the body: a tree of it would take many times the memory.
#[derive(Deserialize)]
struct Envelope<'a> {
    jsonrpc: Option<&'a str>,
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    method: Option<&'a RawValue>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct Params<'a> {
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    arguments: Option<&'a RawValue>,
    #[serde(borrow, rename = "_meta")]
    meta: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Meta<'a> {
    #[serde(borrow, rename = "io.modelcontextprotocol/protocolVersion")]
    revision: Option<&'a RawValue>,
    #[serde(rename = "io.modelcontextprotocol/clientCapabilities")]
    capabilities: Option<IgnoredAny>,
}

/// An id of `null` is present, unlike that of a notification.
fn present<'a, D: Deserializer<'a>>(value: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(value).map(Some)
}

/// serde would also take an array for a struct.
fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Option<T> {
    let is_object = text.trim_start().starts_with('{');
    is_object.then(|| serde_json::from_str(text).ok()).flatten()
}

/// A text that is not too long to be a name.
fn word(raw: Option<&RawValue>) -> Option<String> {
    let raw = raw?.get();
    let fits = raw.len() <= MAX_WORD;
    fits.then(|| serde_json::from_str(raw).ok()).flatten()
}

fn server() -> Value {
    json!({"name": "mb-server", "version": env!("CARGO_PKG_VERSION")})
}

impl<'a> McpStep<'a> {
    /// Decides what follows a body.
    #[must_use]
    pub fn of(body: &'a [u8], fields: &McpFields) -> Self {
        Self::read(body, fields).unwrap_or_else(Self::Respond)
    }

    fn read(body: &'a [u8], fields: &McpFields) -> Result<Self, McpResponse> {
        let no_json = |error| McpReply::unnamed().refuse(PARSE_ERROR, &format!("it is {error}"));
        let body = wire_json::check(body).map_err(no_json)?;
        let unnamed = |message| McpReply::unnamed().refuse(INVALID_REQUEST, message);
        // A batch is none: the revisions have dropped them.
        let envelope = object::<Envelope<'_>>(body)
            .ok_or_else(|| unnamed("the body is not one JSON-RPC request"))?;
        let (Some("2.0"), Some(method)) = (envelope.jsonrpc, word(envelope.method)) else {
            return Err(unnamed("the body is not a JSON-RPC 2.0 request"));
        };
        let revision = fields.revision.as_deref().unwrap_or(REVISIONS[0]);
        if !REVISIONS.contains(&revision) {
            let asked: String = revision.chars().take(MAX_REPEATED).collect();
            return Err(McpReply::unnamed().refuse_with(&json!({
                "code": UNSUPPORTED_REVISION,
                "message": "unsupported protocol version",
                "data": {"supported": REVISIONS, "requested": asked},
            })));
        }
        let Some(id) = envelope.id.map(RawValue::get) else {
            return Ok(Self::Respond((202, String::new())));
        };
        let digits = id.strip_prefix('-').unwrap_or(id);
        let is_integer = digits.bytes().all(|byte| byte.is_ascii_digit());
        if id.len() > MAX_WORD || !is_integer && !id.starts_with('"') {
            return Err(unnamed("id must be a text or an integer"));
        }
        let reply = McpReply {
            id: id.into(),
            stands_alone: revision == REVISIONS[1],
        };
        let wrong = |message| reply.refuse(INVALID_PARAMS, message);
        let params: Params<'_> = match envelope.params {
            None => Params::default(),
            Some(raw) => object(raw.get()).ok_or_else(|| wrong("params must be an object"))?,
        };
        if reply.stands_alone {
            reply.check(&params, fields, &method)?;
        }
        let result = match (&*method, reply.stands_alone) {
            ("initialize", false) => format!(
                r#""protocolVersion":"{revision}","capabilities":{{"tools":{{}}}},"serverInfo":{}"#,
                server()
            ),
            ("ping", false) => String::new(),
            ("server/discover", true) => format!(
                r#""supportedVersions":{},"capabilities":{{"tools":{{}}}},{CACHING}"#,
                json!(REVISIONS)
            ),
            ("tools/list", _) => return Ok(Self::ListTools(reply)),
            ("tools/call", _) => {
                let name = word(params.name).ok_or_else(|| wrong("params must have a name"))?;
                let arguments = params.arguments.map(RawValue::get);
                if arguments.is_some_and(|arguments| !arguments.starts_with('{')) {
                    return Err(wrong("arguments must be an object"));
                }
                return Ok(Self::CallTool(reply, name, arguments));
            }
            _ => return Err(reply.refuse(METHOD_NOT_FOUND, "no such method")),
        };
        Ok(Self::Respond((200, reply.result(&[&result]))))
    }
}

impl McpReply {
    /// To a body whose id is not known.
    fn unnamed() -> Self {
        Self {
            id: "null".into(),
            stands_alone: true,
        }
    }

    /// Checks what the head repeats of a request that stands alone.
    fn check(
        &self,
        params: &Params<'_>,
        fields: &McpFields,
        method: &str,
    ) -> Result<(), McpResponse> {
        let Some(Meta {
            revision: Some(revision),
            capabilities: Some(_),
        }) = params.meta.and_then(|raw| object(raw.get()))
        else {
            let message = "params._meta must have io.modelcontextprotocol/protocolVersion and \
                           io.modelcontextprotocol/clientCapabilities";
            return Err(self.refuse(INVALID_PARAMS, message));
        };
        let is_call = method == "tools/call";
        let differs = if word(Some(revision)).as_deref() != fields.revision.as_deref() {
            "MCP-Protocol-Version differs from what params._meta says"
        } else if fields.method.as_deref() != Some(method) {
            "Mcp-Method differs from method"
        } else if is_call && fields.name.as_deref() != word(params.name).as_deref() {
            "Mcp-Name differs from params.name"
        } else {
            return Ok(());
        };
        Err(self.refuse(HEADER_MISMATCH, differs))
    }

    /// The error that the caller has no such tool.
    #[must_use]
    pub fn no_such_tool(&self) -> McpResponse {
        self.refuse(INVALID_PARAMS, "no such tool")
    }

    fn refuse(&self, code: i32, message: &str) -> McpResponse {
        self.refuse_with(&json!({"code": code, "message": message}))
    }

    fn refuse_with(&self, error: &Value) -> McpResponse {
        let status = match self.stands_alone {
            // Earlier clients read no body behind another status.
            false => 200,
            true if error["code"] == METHOD_NOT_FOUND => 404,
            true => 400,
        };
        let body = format!(r#"{{"jsonrpc":"2.0","id":{},"error":{error}}}"#, self.id);
        (status, body)
    }

    /// The response that lists tools.
    #[must_use]
    pub fn tools(&self, tools: &[Tool<'_>]) -> String {
        let tools: Vec<_> = tools.iter().map(|tool| tool.listed().to_string()).collect();
        self.result(&[r#""tools":["#, &tools.join(","), "],", CACHING])
    }

    /// The response to a call: its JSON, or the ERROR object where it failed.
    #[must_use]
    pub fn called(&self, answer: &str, failed: bool) -> String {
        // Clients take objects alone.
        let structured = match !failed && answer.trim_start().starts_with('{') {
            true => [r#","structuredContent":"#, answer],
            false => ["", ""],
        };
        let text = serde_json::to_string(answer).unwrap_or_default();
        let is_error = if failed { "true" } else { "false" };
        let content = r#""content":[{"type":"text","text":"#;
        let end = r#"}],"isError":"#;
        self.result(&[content, &text, end, is_error, structured[0], structured[1]])
    }

    /// The same for an answer of bytes.
    #[must_use]
    pub fn called_bytes(&self, answer: &[u8]) -> String {
        let blob = BASE64_STANDARD.encode(answer);
        let content = r#""content":[{"type":"resource","resource":{"uri":"mb:answer","mimeType":"application/octet-stream","blob":""#;
        self.result(&[content, &blob, r#""}}],"isError":false"#])
    }

    /// Of parts that follow each other: they are large, and copied once.
    fn result(&self, members: &[&str]) -> String {
        let more = match self.stands_alone {
            true => format!(
                r#","resultType":"complete","_meta":{{"io.modelcontextprotocol/serverInfo":{}}}"#,
                server()
            ),
            false => String::new(),
        };
        let head = [r#"{"jsonrpc":"2.0","id":"#, &self.id, r#","result":{"#];
        [&head, members, &[&more, "}}"]].concat().concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = r#""_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}"#;

    fn tool<'a>(input: &'a Value, output: Option<&'a Value>) -> Tool<'a> {
        Tool {
            service: "calc",
            action: "add.two",
            description: "Adds",
            input,
            output,
        }
    }

    fn reply(stands_alone: bool) -> McpReply {
        McpReply {
            id: "7".into(),
            stands_alone,
        }
    }

    fn fields(parts: [Option<&str>; 3]) -> McpFields {
        let [revision, method, name] = parts.map(|part| part.map(Into::into));
        McpFields {
            revision,
            method,
            name,
        }
    }

    /// The status of the response to a body, and what is in it.
    #[track_caller]
    fn check(body: &str, fields: &McpFields, status: u16, part: &str) {
        let McpStep::Respond((found, text)) = McpStep::of(body.as_bytes(), fields) else {
            panic!("{body} is no fixed response");
        };
        assert_eq!(found, status, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
        assert!(text.is_empty() || serde_json::from_str::<Value>(&text).is_ok());
    }

    #[test]
    fn requests_of_a_session_that_there_is_not() {
        let plain = McpFields::default();
        let ask = |rest: &str| format!(r#"{{"jsonrpc":"2.0","id":7,{rest}}}"#);
        for (body, status, part) in [
            (
                &*ask(r#""method":"initialize","params":{"protocolVersion":"1"}"#),
                200,
                REVISIONS[0],
            ),
            (&ask(r#""method":"ping""#), 200, r#""id":7,"result":{}}"#),
            (&ask(r#""method":"server/discover""#), 200, "-32601"),
            (&ask(r#""method":"nope","params":{}"#), 200, "-32601"),
            (&ask(r#""method":"tools/list","params":[]"#), 200, "-32602"),
            (&ask(r#""method":"tools/call""#), 200, "-32602"),
            (
                &ask(r#""method":"tools/call","params":{"name":"x","arguments":[]}"#),
                200,
                "-32602",
            ),
            (r#"{"jsonrpc":"2.0","method":"notifications/x"}"#, 202, ""),
            (
                r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#,
                400,
                "-32600",
            ),
            ("{", 400, "-32700"),
            ("", 400, "-32700"),
            (r#"["2.0",1,"ping",null]"#, 400, "-32600"),
            ("null", 400, "-32600"),
            (r#"{"jsonrpc":"2.0","id":1,"result":{}}"#, 400, "-32600"),
            (
                r#"{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}"#,
                400,
                "-32600",
            ),
            (r#"{"jsonrpc":"1.0","id":1,"method":"ping"}"#, 400, "-32600"),
            (
                r#"{"jsonrpc":"2.0","id":{},"method":"ping"}"#,
                400,
                "id must",
            ),
            (
                r#"{"jsonrpc":"2.0","id":null,"method":"ping"}"#,
                400,
                "id must",
            ),
            (
                r#"{"jsonrpc":"2.0","id":1.5,"method":"ping"}"#,
                400,
                "id must",
            ),
        ] {
            check(body, &plain, status, part);
        }
        let long = format!(
            r#"{{"jsonrpc":"2.0","id":"{}","method":"ping"}}"#,
            "x".repeat(2000)
        );
        check(&long, &plain, 400, "id must");
        let other = fields([Some("2024-11-05"), None, None]);
        check(
            &ask(r#""method":"ping""#),
            &other,
            400,
            r#""requested":"2024-11-05""#,
        );
        for body in [
            r#"{"jsonrpc":"2.0","id":"a\"b","method":"tools/call","params":{"name":"calc_add","arguments":{"a":1}}}"#,
            r#"{"params":{"arguments":{"a":1},"name":"calc\u005fadd"},"method":"tools/call","id":"a\"b","jsonrpc":"2.0"}"#,
        ] {
            let McpStep::CallTool(reply, name, arguments) = McpStep::of(body.as_bytes(), &plain)
            else {
                panic!("{body}");
            };
            assert_eq!((&*name, arguments), ("calc_add", Some(r#"{"a":1}"#)));
            assert_eq!(&*reply.id, r#""a\"b""#);
        }
    }

    #[test]
    fn requests_that_stand_alone() {
        let ask = |method: &str, rest: &str| {
            format!(r#"{{"jsonrpc":"2.0","id":7,"method":"{method}","params":{{{rest}}}}}"#)
        };
        let new = |method, name| fields([Some(REVISIONS[1]), Some(method), name]);
        let discover = ask("server/discover", META);
        let good = new("server/discover", None);
        check(
            &discover,
            &good,
            200,
            r#""supportedVersions":["2025-11-25","2026-07-28"]"#,
        );
        check(&discover, &good, 200, r#""resultType":"complete""#);
        check(&discover, &new("tools/list", None), 400, "-32020");
        check(
            &discover,
            &fields([Some(REVISIONS[1]), None, None]),
            400,
            "-32020",
        );
        check(&ask("server/discover", ""), &good, 400, "-32602");
        let older = META.replace("2026-07-28", "2025-11-25");
        check(&ask("server/discover", &older), &good, 400, "-32020");
        let without = META.replace("clientCapabilities", "other");
        check(&ask("server/discover", &without), &good, 400, "-32602");
        check(
            &ask("initialize", META),
            &new("initialize", None),
            404,
            "-32601",
        );
        let call = ask("tools/call", &format!(r#"{META},"name":"calc_add""#));
        check(&call, &new("tools/call", None), 400, "-32020");
        check(&call, &new("tools/call", Some("calc_sub")), 400, "-32020");
        let step = McpStep::of(call.as_bytes(), &good_call());
        assert_eq!(
            step,
            McpStep::CallTool(reply(true), "calc_add".into(), None)
        );

        fn good_call() -> McpFields {
            fields([Some(REVISIONS[1]), Some("tools/call"), Some("calc_add")])
        }
    }

    #[test]
    fn tools_are_listed_with_what_clients_read() {
        let input = json!({"type": "object", "properties": {"a": {"x-mcp-header": "A"}}});
        let (list, object) = (json!({"type": "array"}), json!({"type": "object"}));
        let tools = [tool(&input, Some(&list)), tool(&input, Some(&object))];
        for stands_alone in [false, true] {
            let text = reply(stands_alone).tools(&tools);
            let body: Value = serde_json::from_str(&text).unwrap();
            let [first, second] = [&body["result"]["tools"][0], &body["result"]["tools"][1]];
            assert_eq!(
                (&first["name"], &first["description"]),
                (&json!("calc_add_two"), &json!("Adds"))
            );
            assert_eq!(
                first["inputSchema"],
                json!({"type": "object", "properties": {"a": {}}})
            );
            assert_eq!(
                (first.get("outputSchema"), &second["outputSchema"]),
                (None, &object)
            );
            assert_eq!(body["result"].get("resultType").is_some(), stands_alone);
        }
    }

    #[test]
    fn answers_are_results_and_so_are_failures() {
        let body = |text: String| serde_json::from_str::<Value>(&text).unwrap()["result"].take();
        let failed = body(reply(false).called(r#"{"code":"TIMEOUT"}"#, true));
        assert_eq!(failed["isError"], true);
        assert_eq!(failed["content"][0]["text"], r#"{"code":"TIMEOUT"}"#);
        assert_eq!(failed.get("structuredContent"), None);
        let sum = body(reply(true).called(r#"{"sum":3}"#, false));
        assert_eq!(
            (&sum["isError"], &sum["structuredContent"]["sum"]),
            (&json!(false), &json!(3))
        );
        let list = body(reply(true).called("[1]", false));
        assert_eq!(
            (&list["content"][0]["text"], list.get("structuredContent")),
            (&json!("[1]"), None)
        );
        let bytes = body(reply(false).called_bytes(b"\xff\0"));
        assert_eq!(bytes["content"][0]["resource"]["blob"], "/wA=");
    }
}
