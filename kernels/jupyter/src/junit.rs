//! Results as JUnit XML, which every CI shows: a suite a notebook, a case a code cell.

use std::fmt::Write as _;
use std::sync::LazyLock;

use regex::Regex;

/// One notebook.
pub struct Suite {
    pub name: String,
    pub seconds: f64,
    pub cases: Vec<Case>,
}

/// One cell's outcome; or the process's, as if it were a cell.
pub struct Case {
    pub name: String,
    pub seconds: f64,
    pub status: Status,
}

pub enum Status {
    Passed,
    /// Not run, and why.
    Skipped(&'static str),
    /// The cell did not do what the notebook promises: what kind of failure, in one line, in full.
    Failed {
        kind: String,
        message: String,
        details: String,
    },
    /// The notebook's process broke down, and why.
    Broken(String),
}

pub fn xml(suites: &[Suite]) -> String {
    let seconds: f64 = suites.iter().map(|suite| suite.seconds).sum();
    let cases = || suites.iter().flat_map(|suite| &suite.cases);
    let count = |is: fn(&Status) -> bool| cases().filter(|case| is(&case.status)).count();
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        out,
        "<testsuites name=\"qlora-nb test\" tests=\"{}\" failures=\"{}\" errors=\"{}\" time=\"{seconds:.3}\">",
        cases().count(),
        count(is_failed),
        count(is_broken)
    );
    for suite in suites {
        write_suite(&mut out, suite);
    }
    out.push_str("</testsuites>\n");
    out
}

fn write_suite(out: &mut String, suite: &Suite) {
    let count = |is: fn(&Status) -> bool| suite.cases.iter().filter(|case| is(&case.status)).count();
    let name = attribute(&suite.name);
    let _ = writeln!(
        out,
        "  <testsuite name=\"{name}\" tests=\"{}\" skipped=\"{}\" errors=\"{}\" failures=\"{}\" time=\"{:.3}\">",
        suite.cases.len(),
        count(|status| matches!(status, Status::Skipped(_))),
        count(is_broken),
        count(is_failed),
        suite.seconds
    );
    for case in &suite.cases {
        let (case_name, seconds) = (attribute(&case.name), case.seconds);
        let _ = write!(out, "    <testcase name=\"{case_name}\" classname=\"{name}\" time=\"{seconds:.3}\"");
        let outcome = outcome(&case.status);
        let end = if outcome.is_empty() { "/>".into() } else { format!(">\n      {outcome}\n    </testcase>") };
        let _ = writeln!(out, "{end}");
    }
    out.push_str("  </testsuite>\n");
}

/// The element within a case; nothing for one that passed.
fn outcome(status: &Status) -> String {
    match status {
        Status::Passed => String::new(),
        Status::Skipped(why) => format!("<skipped message=\"{}\"/>", attribute(why)),
        Status::Failed { kind, message, details } => {
            let (kind, message) = (attribute(kind), attribute(message));
            format!("<failure message=\"{message}\" type=\"{kind}\">{}</failure>", text(details))
        }
        Status::Broken(why) => {
            let message = attribute(why.lines().next().unwrap_or_default());
            format!("<error message=\"{message}\">{}</error>", text(why))
        }
    }
}

fn is_failed(status: &Status) -> bool {
    matches!(status, Status::Failed { .. })
}

fn is_broken(status: &Status) -> bool {
    matches!(status, Status::Broken(_))
}

/// In an attribute a reader takes a line's end for a space.
fn attribute(of: &str) -> String {
    text(of).replace('\n', " ")
}

/// Without colours and the like, and without the characters for which XML has no place.
fn text(of: &str) -> String {
    static TERMINAL: LazyLock<Regex> = LazyLock::new(|| {
        let (control, title) = (r"\[[0-?]*[ -/]*[@-~]", r"\][^\x07\x1b]*(\x07|\x1b\\)?");
        Regex::new(&format!(r"\x1b({control}|{title}|[ -/]*[0-~])?")).expect("a correct pattern")
    });
    let mut out = String::new();
    for c in TERMINAL.replace_all(of, "").chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\n' | '\t' => out.push(c),
            '\u{fffe}' | '\u{ffff}' => {}
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_breaks_the_xml() {
        let message = "a \"b\" <c>\nd".into();
        let details = "\u{1b}[1;31m]]> & \u{0}\u{8}诗\u{ffff}\u{1b}]8;;a\u{7}\u{1b}".into();
        let bad = Status::Failed { kind: "Panic".into(), message, details };
        let case = |status| Case { name: "cell 1: x && y".into(), seconds: 0.25, status };
        let cases = vec![case(bad), case(Status::Passed), case(Status::Skipped("tag"))];
        let xml = xml(&[Suite { name: "a.ipynb".into(), seconds: 1.5, cases }]);
        for expected in [
            "<testsuite name=\"a.ipynb\" tests=\"3\" skipped=\"1\" errors=\"0\" failures=\"1\" time=\"1.500\">",
            "<testcase name=\"cell 1: x &amp;&amp; y\" classname=\"a.ipynb\" time=\"0.250\"/>",
            "<failure message=\"a &quot;b&quot; &lt;c&gt; d\" type=\"Panic\">]]&gt; &amp; 诗</failure>",
            "<skipped message=\"tag\"/>",
        ] {
            assert!(xml.contains(expected), "{xml}\n\nhas no {expected}");
        }
    }
}
