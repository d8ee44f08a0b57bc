//! Results as JUnit XML, which every CI shows: a suite a notebook, a case a code cell.

use std::fmt::Write;
use std::sync::LazyLock;

use regex::Regex;

pub struct Suite {
    pub name: String,
    pub seconds: f64,
    pub cases: Vec<Case>,
}

pub struct Case {
    pub name: String,
    pub seconds: f64,
    pub outcome: Outcome,
}

pub enum Outcome {
    Passed,
    Skipped(String),
    /// The cell did not do what the notebook promises: what kind of failure, in one line, in full.
    Failed {
        kind: String,
        message: String,
        details: String,
    },
    /// The notebook's process broke down.
    Broken(String),
}

pub fn xml(suites: &[Suite]) -> String {
    let all = || suites.iter().flat_map(|suite| &suite.cases);
    let seconds: f64 = suites.iter().map(|suite| suite.seconds).sum();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(xml, "<testsuites name=\"qlora-nb test\" {}>", counts(all(), seconds));
    for suite in suites {
        let name = escaped(&suite.name);
        let _ = writeln!(xml, "  <testsuite name=\"{name}\" {}>", counts(suite.cases.iter(), suite.seconds));
        for case in &suite.cases {
            let (case_name, seconds) = (escaped(&case.name), case.seconds);
            let _ = write!(xml, "    <testcase classname=\"{name}\" name=\"{case_name}\" time=\"{seconds:.3}\"");
            let _ = match &case.outcome {
                Outcome::Passed => writeln!(xml, "/>"),
                Outcome::Skipped(why) => writeln!(xml, "><skipped message=\"{}\"/></testcase>", escaped(why)),
                Outcome::Failed { kind, message, details } => {
                    let (kind, message, details) = (escaped(kind), escaped(message), escaped_text(details));
                    writeln!(xml, "><failure type=\"{kind}\" message=\"{message}\">{details}</failure></testcase>")
                }
                Outcome::Broken(why) => {
                    let first = escaped(why.lines().next().unwrap_or_default());
                    writeln!(xml, "><error message=\"{first}\">{}</error></testcase>", escaped_text(why))
                }
            };
        }
        xml.push_str("  </testsuite>\n");
    }
    xml.push_str("</testsuites>\n");
    xml
}

fn counts<'a>(cases: impl Iterator<Item = &'a Case>, seconds: f64) -> String {
    let (mut tests, mut failures, mut errors, mut skipped) = (0, 0, 0, 0);
    for case in cases {
        tests += 1;
        match case.outcome {
            Outcome::Passed => {}
            Outcome::Skipped(_) => skipped += 1,
            Outcome::Failed { .. } => failures += 1,
            Outcome::Broken(_) => errors += 1,
        }
    }
    format!("tests=\"{tests}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"{skipped}\" time=\"{seconds:.3}\"")
}

/// For an attribute, in which a reader would take a line's end for a space.
fn escaped(text: &str) -> String {
    escaped_text(text).replace('\n', "&#10;").replace('\t', "&#9;").replace('"', "&quot;")
}

/// XML knows no control characters, not even escaped; what colours a terminal goes as a whole.
fn escaped_text(text: &str) -> String {
    static COLOUR: LazyLock<Regex> = LazyLock::new(|| Regex::new("\u{1b}\\[[0-9;?]*[A-Za-z]").expect("a constant"));
    let allowed = |c: &char| (!c.is_control() || matches!(c, '\n' | '\t')) && !matches!(c, '\u{fffe}' | '\u{ffff}');
    let text: String = COLOUR.replace_all(text, "").chars().filter(allowed).collect();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_breaks_the_xml() {
        let failed = Outcome::Failed {
            kind: "Panic".into(),
            message: "a \"b\" <c>\nd".into(),
            details: "\u{1b}[31m]]> & \u{0}\u{8}诗\u{ffff}\u{1b}".into(),
        };
        let case = |outcome| Case { name: "cell 1: x && y".into(), seconds: 0.25, outcome };
        let cases = vec![case(failed), case(Outcome::Passed), case(Outcome::Skipped("tag".into()))];
        let xml = xml(&[Suite { name: "a.ipynb".into(), seconds: 1.5, cases }]);
        for expected in [
            "<testsuite name=\"a.ipynb\" tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\" time=\"1.500\">",
            "<testcase classname=\"a.ipynb\" name=\"cell 1: x &amp;&amp; y\" time=\"0.250\"/>",
            "<failure type=\"Panic\" message=\"a &quot;b&quot; &lt;c&gt;&#10;d\">]]&gt; &amp; 诗</failure>",
            "<skipped message=\"tag\"/>",
        ] {
            assert!(xml.contains(expected), "{xml}\n\nhas no {expected}");
        }
    }
}
