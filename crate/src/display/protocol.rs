//! What the library and our kernel say to each other about outputs: one line of stdout each.
//!
//! The kernel sets `QLORA_NB_DISPLAY=1` for the process that runs the cells and takes these lines
//! out of the text. Stock evcxr_jupyter does not know them; there the variable is not set.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

const VARIABLE: &str = "QLORA_NB_DISPLAY";
const MARKER: &str = "EVCXR_QLORA_NB ";

/// Whether somebody understands these lines.
pub(super) fn is_spoken() -> bool {
    #[cfg(test)]
    if capture::is_on() {
        return true;
    }
    std::env::var_os(VARIABLE).is_some_and(|value| value == "1")
}

/// `op` is `display` or `update`. Volatile is what differs between two runs of the same cells,
/// such as a rate: `qlora-nb test` does not compare it.
pub(super) fn output<S: AsRef<str>>(op: &str, id: Option<&str>, forms: &[(&str, S)], volatile: bool) {
    let data: Map<_, _> = forms.iter().map(|(mime, form)| (mime.to_string(), form.as_ref().into())).collect();
    let metadata = if volatile { json!({ "qlora_nb": { "volatile": true } }) } else { json!({}) };
    let mut message = json!({ "op": op });
    if let Some(id) = id {
        message["id"] = id.into();
    }
    message["data"] = data.into();
    message["metadata"] = metadata;
    send(&message);
}

/// Empties the cell's output; with `wait`, when the next output comes.
pub(super) fn clear(wait: bool) {
    send(&json!({ "op": "clear", "wait": wait }));
}

fn send(message: &Value) {
    #[cfg(test)]
    if capture::push(message) {
        return;
    }
    // One write of the whole line: threads that print cannot cut it apart.
    let mut out = io::stdout().lock();
    let _ = out.write_all(line(message).as_bytes()).and_then(|()| out.flush());
}

fn line(message: &Value) -> String {
    // JSON escapes line breaks, so that this is one line.
    format!("{MARKER}{message}\n")
}

/// Lets tests read what the kernel would be told.
#[cfg(test)]
pub(crate) mod capture {
    use std::cell::RefCell;

    use serde_json::Value;

    thread_local! {
        static MESSAGES: RefCell<Option<Vec<Value>>> = const { RefCell::new(None) };
    }

    /// The messages that `call` sends on this thread, under our kernel as far as it can tell.
    pub(crate) fn messages<T>(call: impl FnOnce() -> T) -> (T, Vec<Value>) {
        MESSAGES.with(|m| *m.borrow_mut() = Some(Vec::new()));
        let result = call();
        (result, MESSAGES.with(|m| m.borrow_mut().take()).unwrap_or_default())
    }

    pub(super) fn is_on() -> bool {
        MESSAGES.with(|m| m.borrow().is_some())
    }

    pub(super) fn push(message: &Value) -> bool {
        MESSAGES.with(|m| m.borrow_mut().as_mut().map(|all| all.push(message.clone()))).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_agreed_form() {
        let ((), sent) = capture::messages(|| {
            output("display", Some("7-1"), &[("text/html", "<b>\n</b>"), ("text/plain", "b")], true);
            output("update", Some("7-1"), &[("text/plain", "c\n")], false);
            output("display", None, &[("text/plain", "d")], false);
            clear(true);
        });
        let expected = [
            json!({"op": "display", "id": "7-1", "data": {"text/html": "<b>\n</b>", "text/plain": "b"},
                   "metadata": {"qlora_nb": {"volatile": true}}}),
            json!({"op": "update", "id": "7-1", "data": {"text/plain": "c\n"}, "metadata": {}}),
            json!({"op": "display", "data": {"text/plain": "d"}, "metadata": {}}),
            json!({"op": "clear", "wait": true}),
        ];
        assert_eq!(sent, expected);
        let expected = r#"EVCXR_QLORA_NB {"op":"update","id":"7-1","data":{"text/plain":"c\n"},"metadata":{}}"#;
        assert_eq!(line(&sent[1]), format!("{expected}\n"));
    }

    #[test]
    fn without_a_kernel_nothing_is_spoken() {
        assert!(!is_spoken());
        let (inside, _) = capture::messages(is_spoken);
        assert!(inside);
    }
}
