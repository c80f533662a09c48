//! Takes orders: adds up with `calc`, numbers with `counter`, and writes one
//! line into the log. Needs the grant `calls` for `calc.add` and
//! `counter.add`; the currency comes from the grant `config`.

use mb_service::{Failure, calls, config, log, service};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Items of one order.
const MAX_ITEMS: usize = 100;

#[derive(Deserialize, JsonSchema)]
struct Order {
    /// Who orders.
    customer: String,
    #[schemars(length(min = 1, max = 100))]
    items: Vec<Item>,
}

#[derive(Deserialize, JsonSchema)]
struct Item {
    name: String,
    /// Cents.
    price: u32,
    #[schemars(range(min = 1))]
    quantity: u32,
}

#[derive(Serialize, JsonSchema)]
struct Receipt {
    number: i64,
    /// Cents.
    total: u64,
    currency: String,
}

#[derive(Deserialize)]
struct Sum {
    sum: u64,
}

#[derive(Deserialize)]
struct Count {
    value: i64,
}

fn create(order: Order) -> Result<Receipt, Failure> {
    let lines = lines(&order)?;
    let currency = config::get_or("currency", "EUR".to_owned())?;
    let total = lines.iter().try_fold(0, |total, line| {
        calls::call::<Value, Sum>("calc.add", "1.0.0", &json!({"a": total, "b": line}))
            .map(|answer| answer.sum)
    })?;
    let Count { value: number } = calls::call("counter.add", "1.0.0", &json!({"name": "orders"}))?;
    log::info(format!(
        "order {number} of {}: {total} cents {currency}",
        order.customer
    ));
    Ok(Receipt {
        number,
        total,
        currency,
    })
}

/// What each line of the order costs.
fn lines(order: &Order) -> Result<Vec<u64>, Failure> {
    if order.items.is_empty() {
        return Err(Failure::new(
            "EMPTY_ORDER",
            "an order has at least one item",
        ));
    }
    if order.items.len() > MAX_ITEMS {
        return Err(Failure::new(
            "ORDER_TOO_LARGE",
            format!("an order has at most {MAX_ITEMS} items"),
        ));
    }
    let line = |item: &Item| match item.quantity {
        0 => Err(Failure::new(
            "INVALID_QUANTITY",
            format!("no {} is no order", item.name),
        )),
        quantity => Ok(u64::from(item.price) * u64::from(quantity)),
    };
    order.items.iter().map(line).collect()
}

service! {
    /// Takes an order: {"customer","items":[{"name","price","quantity"}]} →
    /// {"number","total","currency"}. Prices and totals are cents.
    "create" => create,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(items: Value, expected: Result<&[u64], &str>) {
        let order = serde_json::from_value(json!({"customer": "Ada", "items": items})).unwrap();
        assert_eq!(
            lines(&order).map_err(|failure| failure.code),
            expected.map(<[u64]>::to_vec).map_err(str::to_owned)
        );
    }

    #[test]
    fn lines_are_priced() {
        check(
            json!([{"name": "tea", "price": 250, "quantity": 3}, {"name": "cup", "price": 0, "quantity": 1}]),
            Ok(&[750, 0]),
        );
        check(json!([]), Err("EMPTY_ORDER"));
        check(
            json!([{"name": "tea", "price": 250, "quantity": 0}]),
            Err("INVALID_QUANTITY"),
        );
        let many = vec![json!({"name": "tea", "price": 1, "quantity": 1}); 101];
        check(json!(many), Err("ORDER_TOO_LARGE"));
    }
}
