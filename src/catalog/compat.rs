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
            compare(
                before,
                now,
                Side::Takes,
                &mut format!("{name} takes: payload"),
                0,
                &mut found,
            );
        }
        match (&action.output, output) {
            (Some(before), Some(now)) => {
                compare(
                    before,
                    now,
                    Side::Answers,
                    &mut format!("{name} answers: payload"),
                    0,
                    &mut found,
                );
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

fn compare(
    old: &Value,
    new: &Value,
    side: Side,
    at: &mut String,
    depth: usize,
    found: &mut Vec<String>,
) {
    if old == new {
        return;
    }
    let (Some(old), Some(new)) = (old.as_object(), new.as_object()) else {
        found.push(format!("{at}: its schema is another one"));
        return;
    };
    if depth >= MAX_DEPTH {
        found.push(format!("{at}: its schema has changed"));
        return;
    }
    types(old, new, side, at, found);
    choices(old, new, side, at, found);
    required(old, new, side, at, found);
    for (name, before) in properties(old) {
        let length = at.len();
        *at += &format!("/{name}");
        match (properties(new).find(|(now, _)| *now == name), side) {
            (Some((_, now)), _) => compare(before, now, side, at, depth + 1, found),
            (None, Side::Answers) => found.push(format!("{at} is gone")),
            (None, Side::Takes) if new.get("additionalProperties") == Some(&Value::Bool(false)) => {
                found.push(format!("{at} is not taken any more"));
            }
            (None, Side::Takes) => {}
        }
        at.truncate(length);
    }
    if let (Some(before), Some(now)) = (old.get("items"), new.get("items")) {
        let length = at.len();
        *at += "/*";
        compare(before, now, side, at, depth + 1, found);
        at.truncate(length);
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
        let value = |schema: &Map<String, Value>| schema.get(bound).and_then(Value::as_f64);
        let (before, now) = (value(old), value(new));
        let narrower = match (before, now) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(before), Some(now)) => (now > before) == grows && (now - before).abs() > 0.0,
        };
        if side == Side::Takes && narrower {
            found.push(format!("{at}: {bound} is stricter than it was"));
        }
    }
}

fn types(
    old: &Map<String, Value>,
    new: &Map<String, Value>,
    side: Side,
    at: &str,
    found: &mut Vec<String>,
) {
    let (Some(before), Some(now)) = (type_names(old), type_names(new)) else {
        return;
    };
    let (narrow, wide) = if side == Side::Takes {
        (&before, &now)
    } else {
        (&now, &before)
    };
    // An integer is a number too.
    let fits =
        |name: &&str| wide.contains(name) || (*name == "integer" && wide.contains(&"number"));
    if !narrow.iter().all(fits) {
        found.push(format!(
            "{at}: was {}, is {}",
            before.join(" or "),
            now.join(" or ")
        ));
    }
}

fn type_names(schema: &Map<String, Value>) -> Option<Vec<&str>> {
    match schema.get("type")? {
        Value::String(name) => Some(vec![name]),
        Value::Array(names) => Some(names.iter().filter_map(Value::as_str).collect()),
        _ => None,
    }
}

fn choices(
    old: &Map<String, Value>,
    new: &Map<String, Value>,
    side: Side,
    at: &str,
    found: &mut Vec<String>,
) {
    let list = |schema: &Map<String, Value>| schema.get("enum").and_then(Value::as_array).cloned();
    let (before, now) = (list(old), list(new));
    let (narrow, wide) = if side == Side::Takes {
        (before, now)
    } else {
        (now, before)
    };
    let Some(wide) = wide else { return };
    match narrow {
        None => found.push(format!(
            "{at}: not every value is possible any more, or more than before"
        )),
        Some(narrow) => {
            for value in narrow.iter().filter(|value| !wide.contains(value)) {
                let what = if side == Side::Takes {
                    "is not taken any more"
                } else {
                    "may come now"
                };
                found.push(format!("{at}: the value {value} {what}"));
            }
        }
    }
}

fn required(
    old: &Map<String, Value>,
    new: &Map<String, Value>,
    side: Side,
    at: &str,
    found: &mut Vec<String>,
) {
    let names = |schema: &Map<String, Value>| -> Vec<String> {
        let list = schema.get("required").and_then(Value::as_array);
        list.into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    let (before, now) = (names(old), names(new));
    let (more, than, what) = match side {
        Side::Takes => (now, before, "is required now"),
        Side::Answers => (before, now, "may be missing now"),
    };
    // What is gone altogether is said elsewhere.
    let there =
        |name: &String| side == Side::Takes || properties(new).any(|(known, _)| known == name);
    for name in more
        .iter()
        .filter(|name| !than.contains(name) && there(name))
    {
        found.push(format!("{at}/{name} {what}"));
    }
}

fn properties(schema: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
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
