//! What of a new version would break those who call the old one.

use serde_json::{Map, Value};

use super::description::{Action, Description};

/// Schemas are compared this deep; below, any difference counts.
const MAX_DEPTH: usize = 32;

/// What breaks callers of `old` when `new` takes its place, a sentence each.
/// Callers of the same major version are meant: the server routes them to the
/// highest that is loaded.
#[must_use]
pub fn breaks(old: &Description, new: &Description) -> Vec<String> {
    let mut found = Vec::new();
    if old.name != new.name {
        found.push(format!(
            "the service was called {}, and is called {}: its topics change",
            old.name, new.name
        ));
    }
    for action in &old.actions {
        let Some(now) = new.actions.iter().find(|now| now.name == action.name) else {
            found.push(format!("the action {} is gone", action.name));
            continue;
        };
        let Action {
            name,
            description: _,
            input,
            output,
            valid: _,
        } = now;
        if let (Some(before), Some(now)) = (&action.input, input) {
            let at = format!("{name} takes: payload");
            found.extend(Comparison::of(before, now, Side::Takes, at));
        }
        match (&action.output, output) {
            (Some(before), Some(now)) => {
                let at = format!("{name} answers: payload");
                found.extend(Comparison::of(before, now, Side::Answers, at));
            }
            (Some(_), None) => found.push(format!("{name} no longer declares what it answers")),
            (None, _) => {}
        }
    }
    found
}

/// Whether a change of the version's numbers allows to break callers.
#[must_use]
pub fn may_break(old: &Description, new: &Description) -> bool {
    !new.version.serves(old.version)
}

/// What callers give must go on to be taken; what they get must go on to be
/// what they know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Takes,
    Answers,
}

type Schema = Map<String, Value>;

/// One schema compared with another.
struct Comparison {
    side: Side,
    /// Where in the payload it is.
    at: String,
    depth: usize,
    found: Vec<String>,
}

impl Comparison {
    fn of(old: &Value, new: &Value, side: Side, at: String) -> Vec<String> {
        let mut comparison = Self {
            side,
            at,
            depth: 0,
            found: Vec::new(),
        };
        comparison.compare(old, new);
        comparison.found
    }

    fn say(&mut self, what: impl std::fmt::Display) {
        self.found.push(format!("{}{what}", self.at));
    }

    fn below(&mut self, name: &str, work: impl FnOnce(&mut Self)) {
        let length = self.at.len();
        self.at += &format!("/{name}");
        self.depth += 1;
        work(self);
        self.depth -= 1;
        self.at.truncate(length);
    }

    /// The one that must fit into the other comes first.
    fn narrow_and_wide<T>(&self, before: T, now: T) -> (T, T) {
        match self.side {
            Side::Takes => (before, now),
            Side::Answers => (now, before),
        }
    }

    fn compare(&mut self, old: &Value, new: &Value) {
        if old == new {
            return;
        }
        let (Some(old), Some(new)) = (old.as_object(), new.as_object()) else {
            return self.say(": its schema is another one");
        };
        if self.depth >= MAX_DEPTH {
            return self.say(": its schema has changed");
        }
        self.types(old, new);
        self.choices(old, new);
        self.required(old, new);
        let is_closed = new.get("additionalProperties") == Some(&Value::Bool(false));
        for (name, before) in properties(old) {
            let now = properties(new).find(|(now, _)| *now == name);
            self.below(name, |this| match (now, this.side) {
                (Some((_, now)), _) => this.compare(before, now),
                (None, Side::Answers) => this.say(" is gone"),
                (None, Side::Takes) if is_closed => this.say(" is not taken any more"),
                (None, Side::Takes) => {}
            });
        }
        if let (Some(before), Some(now)) = (old.get("items"), new.get("items")) {
            self.below("*", |this| this.compare(before, now));
        }
        // The narrower bound breaks who gives, the wider one who gets.
        for (bound, grows) in [
            ("minimum", true),
            ("exclusiveMinimum", true),
            ("minLength", true),
            ("minItems", true),
            ("maximum", false),
            ("exclusiveMaximum", false),
            ("maxLength", false),
            ("maxItems", false),
        ] {
            let value = |schema: &Schema| schema.get(bound).and_then(Value::as_f64);
            let narrower = match (value(old), value(new)) {
                (_, None) => false,
                (None, Some(_)) => true,
                (Some(before), Some(now)) => (now > before) == grows && (now - before).abs() > 0.0,
            };
            if self.side == Side::Takes && narrower {
                self.say(format_args!(": {bound} is stricter than it was"));
            }
        }
    }

    fn types(&mut self, old: &Schema, new: &Schema) {
        let (Some(before), Some(now)) = (type_names(old), type_names(new)) else {
            return;
        };
        let (narrow, wide) = self.narrow_and_wide(&before, &now);
        // An integer is a number too.
        let fits =
            |name: &&str| wide.contains(name) || (*name == "integer" && wide.contains(&"number"));
        if !narrow.iter().all(fits) {
            let (before, now) = (before.join(" or "), now.join(" or "));
            self.say(format_args!(": was {before}, is {now}"));
        }
    }

    fn choices(&mut self, old: &Schema, new: &Schema) {
        let list = |schema| Schema::get(schema, "enum").and_then(Value::as_array);
        let (narrow, wide) = self.narrow_and_wide(list(old), list(new));
        let Some(wide) = wide else { return };
        let Some(narrow) = narrow else {
            return self.say(": not every value is possible any more, or more than before");
        };
        let what = match self.side {
            Side::Takes => "is not taken any more",
            Side::Answers => "may come now",
        };
        for value in narrow.iter().filter(|value| !wide.contains(value)) {
            self.say(format_args!(": the value {value} {what}"));
        }
    }

    fn required(&mut self, old: &Schema, new: &Schema) {
        let (more, than, what) = match self.side {
            Side::Takes => (new, old, "is required now"),
            Side::Answers => (old, new, "may be missing now"),
        };
        let than: Vec<_> = required(than).collect();
        for name in required(more).filter(|name| !than.contains(name)) {
            // What is gone altogether is said elsewhere.
            if self.side == Side::Takes || properties(new).any(|(known, _)| known == name) {
                self.say(format_args!("/{name} {what}"));
            }
        }
    }
}

fn type_names(schema: &Schema) -> Option<Vec<&str>> {
    match schema.get("type")? {
        Value::String(name) => Some(vec![name]),
        Value::Array(names) => Some(names.iter().filter_map(Value::as_str).collect()),
        _ => None,
    }
}

fn required(schema: &Schema) -> impl Iterator<Item = &str> {
    let list = schema.get("required").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str)
}

fn properties(schema: &Schema) -> impl Iterator<Item = (&String, &Value)> {
    schema
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn described(version: &str, input: &Value, output: &Value) -> Description {
        let action = json!({"name": "x", "input": input, "output": output});
        Description::parse(
            &json!({"name": "a", "version": version, "actions": [action]}).to_string(),
        )
        .unwrap()
    }

    #[test]
    fn what_breaks_callers_is_reported() {
        let object = |required: &[&str], properties: Value| json!({"type": "object", "required": required, "properties": properties});
        let check = |old: Value, new: Value, takes: &[&str], answers: &[&str]| {
            let other = object(&[], json!({}));
            let found = breaks(
                &described("1.0.0", &old, &other),
                &described("1.1.0", &new, &other),
            );
            assert_eq!(found.len(), takes.len(), "{old} to {new}: {found:?}");
            assert!(
                found
                    .iter()
                    .zip(takes)
                    .all(|(found, part)| found.contains(part)),
                "{found:?}"
            );
            let found = breaks(
                &described("1.0.0", &other, &old),
                &described("1.1.0", &other, &new),
            );
            assert_eq!(found.len(), answers.len(), "{old} to {new}: {found:?}");
            assert!(
                found
                    .iter()
                    .zip(answers)
                    .all(|(found, part)| found.contains(part)),
                "{found:?}"
            );
        };
        let a = json!({"type": "string"});
        check(
            object(&["a"], json!({"a": a})),
            object(&["a"], json!({"a": a, "b": a})),
            &[],
            &[],
        );
        check(
            object(&[], json!({"a": a})),
            object(&["a"], json!({"a": a})),
            &["/a is required now"],
            &[],
        );
        check(
            object(&["a"], json!({"a": a})),
            object(&[], json!({"a": a})),
            &[],
            &["/a may be missing now"],
        );
        check(
            object(&["a"], json!({"a": a})),
            object(&[], json!({})),
            &[],
            &["/a is gone"],
        );
        check(
            json!({"type": "integer"}),
            json!({"type": "number"}),
            &[],
            &["was integer, is number"],
        );
        check(
            json!({"type": "number"}),
            json!({"type": "integer"}),
            &["was number, is integer"],
            &[],
        );
        check(
            json!({"enum": [1, 2]}),
            json!({"enum": [1]}),
            &["2 is not taken"],
            &[],
        );
        check(
            json!({"enum": [1]}),
            json!({"enum": [1, 2]}),
            &[],
            &["2 may come now"],
        );
        check(
            json!({"maxLength": 5}),
            json!({"maxLength": 4}),
            &["maxLength is stricter"],
            &[],
        );
        check(
            json!({"items": {"type": "string"}}),
            json!({"items": {"type": "array"}}),
            &["/*: was"],
            &["/*: was"],
        );
    }

    #[test]
    fn actions_and_versions() {
        let any = json!(true);
        let (old, mut new) = (
            described("1.0.0", &any, &any),
            described("2.0.0", &any, &any),
        );
        assert!(may_break(&old, &new) && !may_break(&old, &described("1.4.0", &any, &any)));
        assert_eq!(breaks(&old, &new), Vec::<String>::new());
        new.actions[0].name = "y".into();
        new.name = "b".into();
        assert_eq!(breaks(&old, &new).len(), 2);
    }
}
