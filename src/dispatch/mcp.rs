//! Actions as tools of the Model Context Protocol.

use std::collections::BTreeMap;

use super::{Answered, Core, Outcome, Redirect, Refusal, Request, run::stopped, take_rate};
use crate::{
    access::{Identity, NO_VERSION},
    budget::Reservation,
    catalog::Catalog,
    host::{WaitError, Waiter},
    http::{McpFields, McpReply, McpStep, Tool, is_of_objects},
    log::{AUDIT, Limiter},
    sandbox::SMALL_ANSWER,
    wire::{Header, Reason, Topic, Version},
};

impl Core {
    /// Responds to a body, or has it served as the call that it asks for.
    pub(super) fn mcp(
        &self,
        (header, payload): (&Header<'_>, &[u8]),
        fields: &McpFields,
        request: &Request<'_>,
    ) -> Result<Answered, Refusal> {
        let (identity, catalog) = (request.identity, self.catalog.load());
        let step = McpStep::of(payload, fields);
        let topic = match &step {
            McpStep::CallTool(_, name, _) => topic(&catalog, name, identity),
            McpStep::Respond(_) | McpStep::ListTools(_) => None,
        };
        if let McpStep::CallTool(reply, _, arguments) = &step
            && let Some(Ok(topic)) = topic.as_deref().map(Topic::parse)
        {
            // The call itself counts for the rate.
            let redirect = self.redirect((header, topic), reply.clone(), *arguments, request);
            return Ok(redirect.into());
        }
        take_rate(&identity.principal)?;
        let (status, body) = match step {
            McpStep::Respond(response) => response,
            McpStep::ListTools(reply) => (200, reply.tools(&tools(&catalog, identity))),
            McpStep::CallTool(reply, ..) => reply.no_such_tool(),
        };
        self.reserved(match status {
            200 => Outcome::Json(body),
            _ => Outcome::Response(status, body),
        })
    }

    /// The message becomes that of a call of this topic.
    fn redirect(
        &self,
        (header, topic): (&Header<'_>, Topic<'_>),
        reply: McpReply,
        arguments: Option<&str>,
        request: &Request<'_>,
    ) -> Outcome {
        let version = Version::new(0, 0, 0);
        let line = Header {
            topic,
            version,
            ..*header
        };
        let body = request.body;
        let (line, payload) = match arguments {
            Some(arguments) => {
                let start = arguments.as_ptr() as usize - body.as_ptr() as usize;
                (format!("{line}\n"), start..start + arguments.len())
            }
            None => (format!("{line}\n{{}}"), body.len()..body.len()),
        };
        let timeout = header.timeout.unwrap_or(self.config.default_timeout.0);
        let until = request.arrived + timeout;
        Outcome::Redirect(Box::new(Redirect {
            line,
            payload,
            reply,
            until,
        }))
    }

    /// Makes the answer of a call a response, which has it as a text too: it takes
    /// up to seven times the memory: each character of the text may need two
    /// bytes, in a buffer that has doubled.
    pub(super) fn tool_response(
        &self,
        reply: &McpReply,
        answered: &mut Answered,
        mut waiter: Waiter<'_>,
    ) -> Result<(), Refusal> {
        let Answered { outcome, held, .. } = answered;
        let size = 8 * outcome.size();
        let held = held.get_or_insert_with(|| Reservation::empty(&self.memory));
        if size > SMALL_ANSWER && !held.try_raise(size) {
            // What has run can't be handed back.
            waiter.is_outermost = false;
            let taken = match size > self.memory.limit() {
                true => Err(WaitError::Late),
                false => waiter.take(|until| held.raise_until(size, until)),
            };
            taken.map_err(|error| match error {
                WaitError::Stopped(stop) => stopped(stop),
                WaitError::Late | WaitError::Postponed => {
                    let message = format!("no memory for a response of up to {size} bytes");
                    Refusal::failed(Reason::AnswerSize, message)
                }
            })?;
        }
        let text = match outcome {
            Outcome::Json(text) => reply.called(text, false),
            Outcome::Binary(bytes) => reply.called_bytes(bytes),
            _ => return Ok(()),
        };
        *outcome = Outcome::Json(text);
        Ok(())
    }
}

/// The actions that can be tools: what takes objects, in the highest version of
/// each service.
fn candidates(catalog: &Catalog) -> impl Iterator<Item = Tool<'_>> {
    let mut last = None;
    let descriptions = catalog.services().map(|service| &service.description);
    let highest = descriptions.filter(move |next| last.replace(&*next.name) != Some(&next.name));
    highest.flat_map(|description| {
        description.actions.iter().filter_map(|action| {
            Some(Tool {
                service: &description.name,
                action: &action.name,
                description: &action.description,
                input: action.input.as_ref().filter(|input| is_of_objects(input))?,
                output: action.output.as_ref(),
            })
        })
    })
}

/// The tools of a caller, without those that share their name with another.
fn tools<'a>(catalog: &'a Catalog, identity: &Identity) -> Vec<Tool<'a>> {
    let mut named: BTreeMap<String, Vec<Tool<'_>>> = BTreeMap::new();
    for tool in candidates(catalog) {
        named.entry(tool.name()).or_default().push(tool);
    }
    let mut tools = Vec::new();
    for (name, same) in named {
        static LINES: Limiter = Limiter::new();
        if let [tool] = same[..] {
            tools.extend(Some(tool).filter(|tool| identity.may_call(&tool.topic(), NO_VERSION)));
        } else if LINES.allows("actions with the same name as a tool") {
            let topics: Vec<_> = same.iter().map(Tool::topic).collect();
            tracing::warn!(
                name,
                "not listed, because they have the same name as a tool: {}",
                topics.join(", ")
            );
        }
    }
    tools
}

/// The topic of the tool of this name, if it is the caller's.
fn topic(catalog: &Catalog, name: &str, identity: &Identity) -> Option<String> {
    let is_named = |tool: &Tool<'_>| name.starts_with(tool.service) && tool.name() == name;
    let mut same = candidates(catalog).filter(is_named);
    let (Some(tool), None) = (same.next(), same.next()) else {
        return None;
    };
    let topic = tool.topic();
    if identity.may_call(&topic, NO_VERSION) {
        return Some(topic);
    }
    static LINES: Limiter = Limiter::audit();
    // It may be probing: the response is the one for tools that are absent.
    if LINES.allows("forbidden") {
        tracing::warn!(
            target: AUDIT, security = "rights", connection = &*identity.caller.connection_id,
            peer = %identity.asks_from(), principal = &*identity.principal.name, topic,
            "forbidden: {} may not call it as a tool", identity.principal.name
        );
    }
    None
}
