//! Servers that stand for a limit: a bare echo of frames, and our own server
//! with a handler in native code in the place of the sandbox.

use std::{
    io::{Read, Write},
    net::TcpListener,
    sync::Arc,
    thread,
    time::Duration,
};

use mb_server::{
    access::{Access, ListenerPolicy},
    budget::Budget,
    config::{Auth, Config, Principals, access::Listener},
    dispatch::{Handle, Outcome, Reply, Request},
    metrics::Metrics,
    server::{Buffers, ListenerSettings, Server, ServerSettings},
    transport::Inherited,
    wire::{Code, ErrorBody, Header},
};
use serde_json::{Value, json};

/// A thread for each connection that reads, and writes back what is whole.
pub fn echo(port: u16) -> ! {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    loop {
        let Ok((mut stream, _)) = listener.accept() else {
            continue;
        };
        let _ = stream.set_nodelay(true);
        thread::spawn(move || {
            let mut buf = vec![0; 64 * 1024];
            let mut filled = 0;
            loop {
                if filled == buf.len() {
                    buf.resize(buf.len() * 2, 0);
                }
                match stream.read(&mut buf[filled..]) {
                    Ok(count @ 1..) => filled += count,
                    _ => return,
                }
                let mut whole = 0;
                while let Some(head) = buf[whole..filled].first_chunk::<8>() {
                    let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
                    if whole + 8 + length > filled {
                        break;
                    }
                    whole += 8 + length;
                }
                if stream.write_all(&buf[..whole]).is_err() {
                    return;
                }
                buf.copy_within(whole..filled, 0);
                filled -= whole;
            }
        });
    }
}

struct Native;

impl Handle for Native {
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a> {
        let refused = |message: String| {
            let body = ErrorBody::server(Code::InvalidPayload, message);
            Outcome::Error(Some(Code::InvalidPayload), body)
        };
        match Header::parse(request.body) {
            Err(error) => Reply::new(None, refused(error.to_string())),
            Ok((header, payload)) => {
                let outcome = match serde_json::from_slice::<Value>(payload) {
                    // As the guest does; `Value::to_string` goes by way of the
                    // formatter, which takes longer.
                    Ok(value) => Outcome::Json(
                        serde_json::to_string(&json!({ "ok": true, "echo": value }))
                            .expect("names are text"),
                    ),
                    Err(error) => refused(error.to_string()),
                };
                Reply::new(Some(header), outcome)
            }
        }
    }
}

/// What arrives is the answer, header line and all.
struct Parrot;

impl Handle for Parrot {
    fn handle<'a>(&self, request: Request<'a>) -> Reply<'a> {
        let body = request.body.to_vec();
        let outcome = if request.binary {
            Outcome::Binary(body)
        } else {
            Outcome::Json(String::from_utf8(body).expect("text is UTF-8"))
        };
        Reply::new(None, outcome)
    }
}

/// Our server with a native handler.
pub fn native(port: u16) -> ! {
    serve(port, Arc::new(Native))
}

/// Our server that sends back whole messages, for Autobahn.
pub fn parrot(port: u16) -> ! {
    serve(port, Arc::new(Parrot))
}

fn serve(port: u16, handle: Arc<dyn Handle>) -> ! {
    let listener = ListenerSettings {
        config: Listener {
            port: Some(port),
            ..Listener::default()
        },
        tls: None,
        policy: Arc::new(ListenerPolicy {
            auth: Auth::None,
            rights: None,
            allow_unsecure: false,
        }),
    };
    let settings = ServerSettings {
        listeners: vec![Arc::new(listener)],
        config: Arc::new(Config::default()),
        max_connections: 12_000,
        reserved: 0,
        max_ending: 64,
        buffers: Buffers::default(),
        thread_stack: 512 * 1024,
        memory: Budget::new(64 << 20),
    };
    let access =
        Access::new(Principals::new(), "/nowhere/tokens.json".into(), 1).expect("no tokens");
    let _server = Server::start(
        settings,
        &mut Inherited::default(),
        handle,
        Arc::new(Metrics::default()),
        access,
    )
    .expect("a free port");
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}
