//! Walks through JSON Schemas.

use serde_json::{Map, Value};

/// Visits a schema and those inside it, the outer ones first. What stands there
/// as data is left out.
pub(super) fn visit_all(schema: &mut Value, visit: &mut impl FnMut(&mut Map<String, Value>)) {
    match schema {
        Value::Object(keywords) => {
            visit(keywords);
            for (keyword, value) in keywords {
                match (&**keyword, value) {
                    ("const" | "default" | "enum" | "example" | "examples", _) => {}
                    (
                        "$defs" | "definitions" | "dependentSchemas" | "patternProperties"
                        | "properties",
                        Value::Object(named),
                    ) => named.values_mut().for_each(|part| visit_all(part, visit)),
                    (_, value) => visit_all(value, visit),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| visit_all(item, visit)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schemas_are_visited_and_data_is_not() {
        let mut schema = json!({
            "mark": 1,
            "properties": {"mark": {"mark": 1}, "default": {"mark": 1}},
            "default": {"mark": 1},
            "allOf": [{"items": {"mark": 1}}],
            "enum": [{"mark": 1}],
        });
        visit_all(&mut schema, &mut |part| drop(part.remove("mark")));
        let left = json!({
            "properties": {"mark": {}, "default": {}},
            "default": {"mark": 1},
            "allOf": [{"items": {}}],
            "enum": [{"mark": 1}],
        });
        // A property may be named like the mark.
        assert_eq!(schema, left);
    }
}
