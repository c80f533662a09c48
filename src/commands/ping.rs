//! `mb-server ping`: whether a server answers, and how quickly.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{Exit, Result, connect::Connect, failure, output, printable};
use crate::{
    client::{ClientError, Request},
    wire::{Payload, Topic},
};

/// Check that a server answers
///
/// Prints one line for each answer. Exit codes: 0 all answered, 1 the server
/// refuses the connection, 2 wrong usage, 3 the server could not be reached or an
/// answer is missing.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    connect: Connect,
    /// How often
    #[arg(long, short = 'c', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// Time between two, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(0..=3_600_000))]
    interval: u64,
    /// How long an answer may take, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    timeout: u64,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let timeout = Duration::from_millis(arguments.timeout);
    let topic = Topic::parse("system.ping").map_err(failure)?;
    let client = arguments.connect.open(timeout)?;
    let mut times = Vec::new();
    let mut lost = 0;
    for number in 1..=arguments.count {
        let payload = number.to_string();
        let request = Request {
            timeout,
            idempotent: true,
            ..Request::new(topic, Payload::Json(&payload))
        };
        let begun = Instant::now();
        match client.call(&request) {
            Ok(_) => {
                let time = begun.elapsed();
                times.push(time);
                say!(
                    "answer {number} after {:.3} ms",
                    time.as_secs_f64() * 1000.0
                );
            }
            Err(ClientError::Answered(refusal)) => return Err(failure(refusal)),
            Err(error) => {
                lost += 1;
                complain!("{number}: {}", printable(&error.to_string()));
            }
        }
        if output::is_over() {
            break;
        }
        if number < arguments.count {
            thread::sleep(
                Duration::from_millis(arguments.interval).saturating_sub(begun.elapsed()),
            );
        }
    }
    if times.len() > 1 {
        times.sort_unstable();
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let (least, most) = (millis(times[0]), millis(times[times.len() - 1]));
        say!(
            "{} answers, {lost} lost; least {least:.3}, median {:.3}, most {most:.3} ms",
            times.len(),
            millis(times[times.len() / 2])
        );
    }
    Ok(if lost == 0 {
        Exit::Success
    } else {
        Exit::Unreachable
    })
}
