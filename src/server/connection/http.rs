//! What a request of HTTP may do, decided once its head has arrived: origin,
//! path, credentials and Host, before a byte of its body is read.

use std::{net::IpAddr, sync::Arc};

use super::Connection;
use crate::{
    access::{Denied, Identity},
    http::{Exchange, Framing, Head, Method, Refusal, Response, Route, Upgrade, no_such_path},
    server::settings::contains,
    wire::Code,
};

/// Who asks over HTTP: a token authenticates one request, so the identity
/// without it is kept, and that of the last token.
#[derive(Default)]
pub(super) struct Credentials {
    /// Requests so far.
    requests: u64,
    /// Without a token.
    own: Option<Arc<Identity>>,
    /// The last token, and whose it is.
    last: Option<(Box<str>, Arc<Identity>)>,
}

/// What is done with a request.
enum Verdict<'a> {
    /// Its body is read and it is served.
    Serve,
    /// The connection goes on with WebSocket.
    Upgrade(&'a Upgrade),
    /// It is answered at once.
    Respond(Response<'static>),
}

const ALIVE: Verdict<'_> = Verdict::Respond(Response::Json(b"{\"status\":\"ok\"}"));

impl Connection {
    pub(super) fn decide_on(&mut self, head: &Head) {
        self.http.requests += 1;
        let made = || format!("http-{}-{}", self.peer.number(), self.http.requests).into();
        let is_id = |id: &&str| crate::wire::header::is_request_id(id);
        let named = head.request_id.as_deref().filter(is_id);
        let config = &self.common.settings.config.http;
        let is_listed = |origin: &&str| config.origins.iter().any(|listed| listed == origin);
        let mut exchange = Exchange {
            request_id: named.map_or_else(made, Into::into),
            origin: head.origin.as_deref().filter(is_listed).map(Into::into),
            asks: head.asks(),
            is_head: head.method == Method::Head,
            is_publish: matches!(
                head.asked,
                Ok(Route::Message {
                    is_publish: true,
                    ..
                })
            ),
            is_http10: head.is_http10,
            closes: head.closes || self.peer.close_request().is_some(),
        };
        let own = self.whose(head);
        // A body that is not read is in the way of the next request.
        let closes = head.framing != Framing::Length(0);
        match own.and_then(|own| self.judge(head, own, exchange.origin.is_some())) {
            Ok(Verdict::Serve) => self.machine.admit(head, exchange, &self.peer),
            Ok(Verdict::Upgrade(upgrade)) => {
                let must_authenticate = self.identity.must_authenticate();
                self.machine
                    .upgrade(upgrade, exchange, must_authenticate, &self.peer);
            }
            Ok(Verdict::Respond(response)) => {
                self.machine
                    .respond(&response, exchange, closes, &self.peer);
            }
            Err(refusal) => {
                self.common.metrics.count_error(Some(refusal.code));
                // Nobody is to guess tokens over one connection.
                exchange.closes |= refusal.status == 401;
                self.machine.refuse(&refusal, exchange, closes, &self.peer);
            }
        }
    }

    /// Who asks if the request has no token: the peer of the connection, or whom
    /// a trusted proxy names.
    fn whose(&mut self, head: &Head) -> Result<Arc<Identity>, Refusal> {
        let own = self
            .http
            .own
            .get_or_insert_with(|| Arc::clone(&self.identity));
        let proxies = &self.common.settings.config.http.forwarded_from;
        let is_proxy = |address: IpAddr| contains(proxies, address);
        if proxies.is_empty() || !is_proxy(self.peer.address().ip()) {
            return Ok(Arc::clone(own));
        }
        let Some(forwarded) = &head.forwarded else {
            let message =
                "both Forwarded and X-Forwarded-For; the proxy is to set one and remove the other";
            return Err(Refusal::new(Code::InvalidRequest, message));
        };
        let mut address = forwarded.iter().copied();
        let address = address.find(|address| !is_proxy(*address));
        if own.asks_from() != address.unwrap_or(self.peer.address().ip()) {
            *own = Arc::new(own.forwarded_for(address));
        }
        Ok(Arc::clone(own))
    }

    fn judge<'a>(
        &mut self,
        head: &'a Head,
        own: Arc<Identity>,
        is_listed: bool,
    ) -> Result<Verdict<'a>, Refusal> {
        if !is_listed && (head.origin.is_some() || head.is_cross_site) {
            let message = "pages of this origin may not ask; http.origins lists those that may";
            return Err(Refusal::new(Code::Forbidden, message));
        }
        if head.mcp.is_some() && !self.common.settings.config.http.mcp {
            return Err(no_such_path());
        }
        let route = head.asked.as_ref().map_err(Clone::clone)?;
        if head.method == Method::Options {
            if is_listed {
                return Ok(Verdict::Respond(Response::Preflight));
            }
            let message = "OPTIONS is for pages of other origins";
            return Err(Refusal {
                allow: Some(match route {
                    Route::Message { .. } | Route::Mcp => "POST",
                    Route::WebSocket(_) => "GET",
                    _ => "GET, HEAD",
                }),
                ..Refusal::with_status(405, Code::InvalidRequest, message)
            });
        }
        match route {
            Route::Health => return Ok(ALIVE),
            Route::Ready if self.peer.is_draining() => {
                let message = "the server shuts down";
                return Err(Refusal::new(Code::ShuttingDown, message));
            }
            Route::Ready => return Ok(ALIVE),
            Route::Message { .. }
            | Route::Services
            | Route::OpenApi
            | Route::Mcp
            | Route::WebSocket(_) => {}
        }
        // On a WebSocket, system.hello can authenticate as well.
        let is_demanded = !matches!(route, Route::WebSocket(_));
        self.authenticate_request(head.token.as_deref(), &own, is_demanded)?;
        if !self.identity.is_authenticated() && !self.answers_to(head.host.as_deref()) {
            let message = "this Host is not answered without authentication; use an address or \
                           localhost, or add it to http.hosts";
            return Err(Refusal::with_status(421, Code::Forbidden, message));
        }
        Ok(match route {
            Route::WebSocket(upgrade) => Verdict::Upgrade(upgrade),
            _ => Verdict::Serve,
        })
    }

    /// Whose request it is: of its token, or else of the connection.
    fn authenticate_request(
        &mut self,
        token: Option<&str>,
        own: &Arc<Identity>,
        is_demanded: bool,
    ) -> Result<(), Refusal> {
        let Some(token) = token else {
            if is_demanded && own.must_authenticate() {
                return Err(self.denied(&self.common.access.without_token(own)));
            }
            // Nothing of a token or a hello is left, whoever the connection is of.
            if !Arc::ptr_eq(&self.identity, own) {
                self.set_identity(own.as_ref().clone());
                self.http.own = Some(Arc::clone(&self.identity));
            }
            return Ok(());
        };
        if let Some((last, identity)) = &self.http.last
            && **last == *token
            && Arc::ptr_eq(identity, &self.identity)
            && identity.asks_from() == own.asks_from()
        {
            // It is looked at again before its message is served.
            return Ok(());
        }
        match self.common.access.authenticate(own, token) {
            Ok(identity) => {
                self.authenticate_as(identity);
                self.http.last = Some((token.into(), Arc::clone(&self.identity)));
                Ok(())
            }
            Err(denied) => Err(self.denied(&denied)),
        }
    }

    fn denied(&self, denied: &Denied) -> Refusal {
        self.common.metrics.auth_failures.add(denied.reason());
        Refusal::new(Code::Unauthorized, denied.message())
    }

    /// Whether a Host is none that another site can choose for a browser.
    fn answers_to(&self, host: Option<&str>) -> bool {
        let Some(host) = host else {
            return true;
        };
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None if host.matches(':').count() == 1 => host.split(':').next().unwrap_or_default(),
            None => host,
        };
        let listed = &self.common.settings.config.http.hosts;
        name.parse::<IpAddr>().is_ok()
            || name.trim_end_matches('.').eq_ignore_ascii_case("localhost")
            || listed
                .iter()
                .any(|listed| listed.eq_ignore_ascii_case(name))
    }
}
