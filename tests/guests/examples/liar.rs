//! Fails to load: the file says `liar`, the component `honest`.

guests::describes!(r#"{"name":"honest","version":"1.0.0","actions":[{"name":"say"}]}"#.into());
