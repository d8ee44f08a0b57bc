//! Colours for failures, where a terminal or a notebook shows them.

const RED: &str = "\u{1b}[1;31m";
const BLUE: &str = "\u{1b}[1;34m";
const CYAN: &str = "\u{1b}[1;36m";
const END: &str = "\u{1b}[0m";

/// The lines of a traceback, in rustc's colours. The first one names the kind of failure.
pub fn traceback(name: &str, details: &str) -> Vec<String> {
    let mut out = vec![format!("{RED}{name}{END}")];
    out.extend(details.lines().map(coloured));
    out
}

fn coloured(line: &str) -> String {
    // `   3 | let x` and `     | ----^^^`
    if let Some((gutter, rest)) = line.split_once('|').filter(|(gutter, _)| is_gutter(gutter)) {
        let rest = match rest.find(['^', '-']).filter(|at| rest[..*at].trim().is_empty()) {
            Some(at) if rest[at..].starts_with('^') => format!("{}{RED}{}{END}", &rest[..at], &rest[at..]),
            Some(at) => format!("{}{BLUE}{}{END}", &rest[..at], &rest[at..]),
            None => rest.to_owned(),
        };
        return format!("{BLUE}{gutter}|{END}{rest}");
    }
    // `error[E0308]: mismatched types`
    if line.starts_with("error[") || line.starts_with("error:") {
        let (head, message) = line.split_once(':').unwrap_or((line, ""));
        return format!("{RED}{head}{END}:{message}");
    }
    for (start, colour) in [("panicked at", RED), ("help:", CYAN), ("note:", CYAN), ("remedy:", CYAN)] {
        if let Some(rest) = line.strip_prefix(start) {
            return format!("{colour}{start}{END}{rest}");
        }
    }
    line.to_owned()
}

fn is_gutter(text: &str) -> bool {
    text.len() >= 5 && text.chars().all(|c| c == ' ' || c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_rustcs() {
        assert_eq!(coloured("error[E0308]: mismatched types"), format!("{RED}error[E0308]{END}: mismatched types"));
        assert_eq!(coloured("   2 | let y"), format!("{BLUE}   2 |{END} let y"));
        assert_eq!(coloured("     |   ^^^ here"), format!("{BLUE}     |{END}   {RED}^^^ here{END}"));
        assert_eq!(coloured("help: try this"), format!("{CYAN}help:{END} try this"));
        assert_eq!(coloured("a | b"), "a | b");
        assert_eq!(coloured("errors happen"), "errors happen");
    }
}
