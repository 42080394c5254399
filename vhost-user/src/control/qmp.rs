//! The dialect: how commands, answers and events are written.
//!
//! Specification: QEMU's `docs/interop/qmp-spec.rst`. Differences: one command a line, and no
//! out-of-band execution.

use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// What a command is answered with when it fails.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    class: &'static str,
    description: String,
}

impl Failure {
    /// Anything that has no class of its own.
    pub(super) fn generic(description: impl ToString) -> Self {
        Self {
            class: "GenericError",
            description: description.to_string(),
        }
    }

    /// The command is not known, or not in this mode.
    pub(super) fn command_not_found(description: impl ToString) -> Self {
        Self {
            class: "CommandNotFound",
            description: description.to_string(),
        }
    }

    /// There is no balloon at the moment.
    pub(super) fn not_active(description: impl ToString) -> Self {
        Self {
            class: "DeviceNotActive",
            description: description.to_string(),
        }
    }
}

/// A command as it was sent.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) name: String,
    pub(super) arguments: Arguments,
    pub(super) id: Option<Value>,
}

/// A command's arguments; each is taken once, and none may be left over.
#[derive(Debug, Default)]
pub(super) struct Arguments(Map<String, Value>);

impl Arguments {
    pub(super) fn take(&mut self, name: &str) -> Result<Value, Failure> {
        self.take_optional(name)
            .ok_or_else(|| Failure::generic(format!("Parameter '{name}' is missing")))
    }

    pub(super) fn take_optional(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// An integer that is not negative.
    pub(super) fn take_u64(&mut self, name: &str) -> Result<u64, Failure> {
        self.take(name)?.as_u64().ok_or_else(|| {
            Failure::generic(format!(
                "Invalid parameter type for '{name}', expected: a non-negative integer"
            ))
        })
    }

    pub(super) fn take_string(&mut self, name: &str) -> Result<String, Failure> {
        match self.take(name)? {
            Value::String(text) => Ok(text),
            _ => Err(Failure::generic(format!(
                "Invalid parameter type for '{name}', expected: string"
            ))),
        }
    }

    /// Refuses what was not taken.
    pub(super) fn done(self) -> Result<(), Failure> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(Failure::generic(format!(
                "Parameter '{name}' is unexpected"
            ))),
        }
    }
}

/// Reads a command; on failure also the `id` to answer with, if there was one.
pub(super) fn parse(line: &[u8]) -> Result<Command, (Failure, Option<Value>)> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| (Failure::generic(format!("JSON parse error: {error}")), None))?;
    let Value::Object(mut object) = value else {
        return Err((Failure::generic("QMP input must be a JSON object"), None));
    };
    let id = object.remove("id");
    match parse_object(object) {
        Ok((name, arguments)) => Ok(Command {
            name,
            arguments,
            id,
        }),
        Err(failure) => Err((failure, id)),
    }
}

fn parse_object(mut object: Map<String, Value>) -> Result<(String, Arguments), Failure> {
    let name = match object.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(wrong_member("execute", "a string")),
        None => return Err(Failure::generic("QMP input lacks member 'execute'")),
    };
    let arguments = match object.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(wrong_member("arguments", "an object")),
    };
    match object.keys().next() {
        None => Ok((name, Arguments(arguments))),
        Some(member) => Err(Failure::generic(format!(
            "QMP input member '{member}' is unexpected"
        ))),
    }
}

fn wrong_member(name: &str, expected: &str) -> Failure {
    Failure::generic(format!("QMP input member '{name}' must be {expected}"))
}

/// What a new client sees first.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// The answer to `query-version`. Tools look for QEMU's number; it is this program's that they find.
pub(super) fn version() -> Value {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    json!({
        "qemu": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": part(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("aerostat ", env!("CARGO_PKG_VERSION")),
    })
}

/// The answer to a command, with its `id`.
pub(super) fn answer(result: Result<Value, Failure>, id: Option<Value>) -> Value {
    let mut answer = Map::new();
    match result {
        Ok(value) => answer.insert("return".to_owned(), value),
        Err(failure) => answer.insert(
            "error".to_owned(),
            json!({ "class": failure.class, "desc": failure.description }),
        ),
    };
    if let Some(id) = id {
        answer.insert("id".to_owned(), id);
    }
    Value::Object(answer)
}

/// The driver changed its `actual`; `left` bytes of memory are the guest's now.
pub(super) fn balloon_change(left: u64) -> Value {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    json!({
        "event": "BALLOON_CHANGE",
        "data": { "actual": left },
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_with_their_id() {
        let line = br#"{"execute":"balloon","arguments":{"value":5},"id":[1,"x"]}"#;
        let mut command = parse(line).unwrap();
        assert_eq!(command.name, "balloon");
        assert_eq!(command.id, Some(json!([1, "x"])));
        assert_eq!(command.arguments.take_u64("value"), Ok(5));
        command.arguments.done().unwrap();
    }

    #[test]
    fn garbage_is_refused_with_a_reason() {
        for line in [
            "",
            "{",
            "[]",
            "1",
            "\"x\"",
            "{}",
            "null",
            "\u{0}",
            "{\"execute\":1}",
            "{\"execute\":\"x\",\"arguments\":[]}",
            "{\"execute\":\"x\",\"control\":1}",
        ] {
            let (failure, _) = parse(line.as_bytes()).unwrap_err();
            assert_eq!(failure.class, "GenericError", "{line}");
        }
        assert!(parse(&[0xff, 0xfe]).is_err());
        assert!(parse("[".repeat(60_000).as_bytes()).is_err());
        let (_, id) = parse(br#"{"id":7,"what":1}"#).unwrap_err();
        assert_eq!(id, Some(json!(7)));
    }

    #[test]
    fn arguments_have_types_and_none_is_left_over() {
        let mut command =
            parse(br#"{"execute":"x","arguments":{"a":-1,"b":1.5,"c":"s","d":0}}"#).unwrap();
        assert!(command.arguments.take_u64("a").is_err());
        assert!(command.arguments.take_u64("b").is_err());
        assert!(command.arguments.take_u64("c").is_err());
        assert!(command.arguments.take_u64("e").is_err());
        assert!(command.arguments.done().is_err());
    }
}
