//! What a component says. It is not trusted: it is checked before the instance
//! goes back to the idle ones, because a failure ends the instance.

use super::CallError;
use crate::wire::{
    Reason,
    codes::is_service_code,
    json::{JsonError, MAX_DEPTH, check_depth},
};

/// Longest message of a service's failure, in bytes. Escaped, a text may take
/// six times as much.
const MAX_FAILURE_MESSAGE: usize = 4096;

/// An answer of so many bytes is small: it fits into what each connection has
/// for what is to be sent, 64 of them together.
pub const SMALL_ANSWER: usize = 1024;

/// Levels that an ERROR puts around its details.
const DETAILS_DEPTH: usize = 1;

/// What a component said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceAnswer {
    /// One JSON text.
    Json(String),
    /// Opaque bytes.
    Binary(Vec<u8>),
    /// The service's own refusal.
    Failure {
        /// Its code.
        code: String,
        /// For a person.
        message: String,
        /// One JSON text.
        details: Option<String>,
    },
}

impl ServiceAnswer {
    /// Bytes on the heap.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Json(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
            Self::Failure {
                code,
                message,
                details,
            } => code.len() + message.len() + details.as_ref().map_or(0, String::len),
        }
    }

    /// Checks the grammar, and the size in bytes against a limit.
    pub(super) fn check(&self, limit: usize) -> Result<(), CallError> {
        let failed = |reason, message: String| Err(CallError::Failed { reason, message });
        let sized = |size: usize| match size <= limit {
            true => Ok(()),
            false => failed(
                Reason::AnswerSize,
                format!("answer of {size} bytes exceeds the limit of {limit}"),
            ),
        };
        let checked_json = |what: &str, text: &str, depth| {
            check_depth(text, depth).or_else(|error| {
                let hint = not_a_number(text, &error).map_or_else(String::new, |name| {
                    format!(
                        ": {name}, which JSON does not have; Python's json.dumps writes it unless allow_nan=False"
                    )
                });
                failed(Reason::InvalidAnswer, format!("{what} is {error}{hint}"))
            })
        };
        match self {
            Self::Json(text) => {
                sized(text.len())?;
                checked_json("answer", text, MAX_DEPTH)
            }
            Self::Binary(bytes) => sized(bytes.len()),
            Self::Failure {
                code,
                message,
                details,
            } => {
                if message.len() > MAX_FAILURE_MESSAGE {
                    let size = message.len();
                    let message = format!(
                        "failure message of {size} bytes exceeds the limit of {MAX_FAILURE_MESSAGE}"
                    );
                    return failed(Reason::AnswerSize, message);
                }
                sized(self.size())?;
                if !is_service_code(code) {
                    let message = "failure code breaks its grammar [A-Z][A-Z0-9_]{0,63}";
                    return failed(Reason::InvalidAnswer, message.into());
                }
                details.as_ref().map_or(Ok(()), |details| {
                    checked_json("failure details", details, MAX_DEPTH - DETAILS_DEPTH)
                })
            }
        }
    }
}

/// The number without a form in JSON that stands where a text stops to be JSON.
fn not_a_number<'a>(text: &'a str, error: &JsonError) -> Option<&'a str> {
    let JsonError::Grammar { line, column } = error else {
        return None;
    };
    let line = text.split('\n').nth(line - 1)?;
    let at = column - 1;
    ["NaN", "Infinity", "-Infinity"]
        .into_iter()
        .find_map(|name| {
            // The checker stops at the letter after a sign.
            let begin = at.saturating_sub(usize::from(name.starts_with('-')));
            let found = line.get(begin..begin + name.len())?;
            (found == name).then_some(found)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_checked() {
        let check = |answer: ServiceAnswer, expected: Result<(), Reason>| {
            let found = answer.check(1000).map_err(|error| match error {
                CallError::Failed { reason, .. } => reason,
                other => panic!("{other:?}"),
            });
            assert_eq!(found, expected, "{answer:?}");
        };
        let failure = |code: &str, details: Option<&str>| ServiceAnswer::Failure {
            code: code.into(),
            message: "m".into(),
            details: details.map(str::to_owned),
        };
        let (invalid, size) = (Err(Reason::InvalidAnswer), Err(Reason::AnswerSize));
        check(ServiceAnswer::Json("[]".into()), Ok(()));
        check(ServiceAnswer::Json(String::new()), invalid);
        check(ServiceAnswer::Json("{".into()), invalid);
        check(ServiceAnswer::Binary(vec![0; 1000]), Ok(()));
        check(ServiceAnswer::Binary(vec![0; 1001]), size);
        check(failure("NOT_FOUND", Some("{}")), Ok(()));
        check(failure("not ok", None), invalid);
        check(failure("NOT_FOUND", Some("{")), invalid);
        check(failure("NOT_FOUND", Some(&"1".repeat(1000))), size);
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        check(ServiceAnswer::Json(nested(127)), Ok(()));
        check(failure("NOT_FOUND", Some(&nested(126))), Ok(()));
        // The ERROR nests one deeper.
        check(failure("NOT_FOUND", Some(&nested(127))), invalid);
    }
}
