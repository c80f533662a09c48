//! The same over HTTP, for `wasmtime serve`.

use wasip2::http::types::{
    Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam,
};

include!("../../work.rs");

struct Wrap;

wasip2::http::proxy::export!(Wrap);

impl wasip2::exports::http::incoming_handler::Guest for Wrap {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let body = request.consume().expect("a body");
        let stream = body.stream().expect("a stream");
        let mut read = Vec::new();
        while let Ok(chunk) = stream.blocking_read(64 * 1024) {
            read.extend_from_slice(&chunk);
        }
        let value = serde_json::from_slice(&read).expect("JSON");
        let text = wrap(value).to_string();
        let response = OutgoingResponse::new(Fields::new());
        let out = response.body().expect("a body");
        ResponseOutparam::set(answer, Ok(response));
        let stream = out.write().expect("a stream");
        stream
            .blocking_write_and_flush(text.as_bytes())
            .expect("room");
        drop(stream);
        OutgoingBody::finish(out, None).expect("an end");
    }
}
