//! What a JSON text takes as a tree of values, found out without building it.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;

/// Entries that one node of a `BTreeMap` has room for, and has at least once
/// the map has several.
const NODE: usize = 11;
const NODE_LEAST: usize = 5;

/// The most memory that a text takes while it is read into a [`Value`], in
/// bytes, the text itself included. Up to a hundred times its length, where it
/// holds many small objects.
///
/// # Errors
/// What such a value can't hold: a number beyond `f64`, half a surrogate pair.
pub(super) fn most_memory(text: &str) -> serde_json::Result<usize> {
    let Heap(heap) = serde_json::from_str(text)?;
    Ok(text.len() + size_of::<Value>() + heap)
}

/// Bytes on the heap, of one value.
struct Heap(usize);

impl<'de> Deserialize<'de> for Heap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Count)
    }
}

/// Counts what is passed by.
struct Count;

impl<'de> Visitor<'de> for Count {
    type Value = Heap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Heap, E> {
        Ok(Heap(0))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Heap, E> {
        Ok(Heap(0))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Heap, E> {
        Ok(Heap(0))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Heap, E> {
        Ok(Heap(0))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Heap, E> {
        Ok(Heap(0))
    }

    fn visit_str<E>(self, text: &str) -> Result<Heap, E> {
        Ok(Heap(block(text.len())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Heap, A::Error> {
        let (mut heap, mut count) = (0, 0_usize);
        while let Some(Heap(item)) = items.next_element()? {
            heap += item;
            count += 1;
        }
        if count > 0 {
            let capacity = count.next_power_of_two().max(4) * size_of::<Value>();
            // While it grows, half as much is there as well.
            heap += block(capacity) + block(capacity / 2);
        }
        Ok(Heap(heap))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Heap, A::Error> {
        let (mut heap, mut count) = (0, 0_usize);
        while let Some((Heap(key), Heap(value))) = entries.next_entry()? {
            heap += key + value;
            count += 1;
        }
        if count > 0 {
            let leaf = NODE * (size_of::<String>() + size_of::<Value>()) + 16;
            let inner = leaf + (NODE + 1) * size_of::<usize>();
            let leaves = if count <= NODE {
                1
            } else {
                count / NODE_LEAST + 1
            };
            let inners = if leaves == 1 {
                0
            } else {
                leaves / NODE_LEAST + 2
            };
            heap += leaves * block(leaf) + inners * block(inner);
        }
        Ok(Heap(heap))
    }
}

/// What the allocator takes for so many bytes.
fn block(bytes: usize) -> usize {
    if bytes == 0 {
        0
    } else {
        (bytes + 8).next_multiple_of(16).max(32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes on the heap as they are asked for, where a vector and a map have
    /// no more room than they need.
    fn least(value: &Value) -> usize {
        match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
            Value::String(text) => text.len(),
            Value::Array(items) => {
                items.capacity() * size_of::<Value>() + items.iter().map(least).sum::<usize>()
            }
            Value::Object(map) => {
                let entry = size_of::<String>() + size_of::<Value>();
                let entries = map
                    .iter()
                    .map(|(key, value)| entry + key.len() + least(value));
                entries.sum()
            }
        }
    }

    #[test]
    fn no_tree_takes_more() {
        for text in [
            "null",
            "[0,1.5,-1,true,null]",
            "\"text\"",
            r#"{"a":{"b":[{},[[]],"c"]},"d":""}"#,
            &format!("[{}0]", "0,".repeat(100_000)),
            &format!("[{}0]", "[0],".repeat(10_000)),
            &format!("[{}0]", r#"{"":0},"#.repeat(10_000)),
        ] {
            let most = most_memory(text).unwrap();
            let tree = serde_json::from_str(text).unwrap();
            assert!(most >= text.len() + least(&tree), "{most}");
        }
    }

    #[test]
    fn the_factor_is_that_of_the_content() {
        let factor = |item: &str| {
            let text = format!("[{}0]", item.repeat(1_000_000 / item.len()));
            most_memory(&text).unwrap() as f64 / text.len() as f64
        };
        let near = |found: f64, expected: f64| (found / expected - 1.0).abs() < 0.5;
        assert!(near(factor("0,"), 32.0), "{}", factor("0,"));
        assert!(
            near(factor(r#"{"":0},"#), 105.0),
            "{}",
            factor(r#"{"":0},"#)
        );
        let long = format!("{:?},", "x".repeat(10_000));
        assert!(near(factor(&long), 2.0), "{}", factor(&long));
    }

    #[test]
    fn what_no_tree_can_hold_is_an_error() {
        assert!(most_memory("[1e999]").is_err());
        assert!(most_memory("\"\\ud800\"").is_err());
    }
}
