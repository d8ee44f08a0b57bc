//! Results as JUnit XML, which every CI shows: a suite a notebook, a case a code cell.

use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

/// One cell's outcome; or the process's, as if it were a cell.
pub struct Case {
    pub name: String,
    pub seconds: f64,
    pub status: TestCaseStatus,
}

pub fn suite(name: &str, seconds: f64, cases: Vec<Case>) -> TestSuite {
    let mut suite = TestSuite::new(text(name));
    suite.set_time(duration(seconds));
    for Case { name: case, seconds, status } in cases {
        let mut case = TestCase::new(line(&case), status);
        case.set_classname(text(name)).set_time(duration(seconds));
        suite.add_test_case(case);
    }
    suite
}

pub fn skipped(why: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::skipped();
    status.set_message(why);
    status
}

/// The cell did not do what the notebook promises: what kind of failure, in one line, in full.
pub fn failed(kind: &str, message: &str, details: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
    status.set_type(line(kind)).set_message(line(message)).set_description(text(details));
    status
}

/// The notebook's process broke down.
pub fn broken(why: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
    status.set_message(text(why.lines().next().unwrap_or_default())).set_description(text(why));
    status
}

pub fn xml(suites: Vec<TestSuite>) -> Result<String> {
    let mut report = Report::new("qlora-nb test");
    report.set_time(suites.iter().filter_map(|suite| suite.time).sum());
    report.add_test_suites(suites);
    report.to_string().context("the results cannot be written as JUnit XML")
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// Text for an attribute, in which a reader takes a line's end for a space.
fn line(of: &str) -> String {
    text(of).replace('\n', " ")
}

/// XML has no place for two characters that quick-junit lets pass.
fn text(of: &str) -> String {
    of.replace(['\u{fffe}', '\u{ffff}'], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_breaks_the_xml() {
        let bad = failed("Panic", "a \"b\" <c>\nd", "\u{1b}[31m]]> & \u{0}\u{8}诗\u{ffff}\u{1b}");
        let case = |status| Case { name: "cell 1: x && y".into(), seconds: 0.25, status };
        let cases = vec![case(bad), case(TestCaseStatus::success()), case(skipped("tag"))];
        let xml = xml(vec![suite("a.ipynb", 1.5, cases)]).expect("XML");
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
