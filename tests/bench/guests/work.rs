/// Wraps what it is sent; before, turns `spin` times, if it says so.
fn wrap(value: serde_json::Value) -> serde_json::Value {
    let mut state = 1_u64;
    for _ in 0..value["spin"].as_u64().unwrap_or(0) {
        state ^= state << 13;
        state ^= state >> 7;
        state = std::hint::black_box(state ^ (state << 17));
    }
    serde_json::json!({ "ok": true, "echo": value })
}
