//! Fails to load: its version is none.

guests::describes!(r#"{"name":"badversion","version":"1.0","actions":[{"name":"say"}]}"#.into());
