//! Numbers as people write them, texts as HTML needs them.

use std::time::Duration;

/// `1234567` as `1,234,567`.
pub fn thousands(n: usize) -> String {
    indicatif::HumanCount(n as u64).to_string()
}

/// `m:ss`, or `h:mm:ss` from an hour on.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs_f64().round() as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s / 60 % 60, s % 60),
    }
}

/// A rate with three digits or so: `12,345`, `123`, `12.3`, `1.23`.
pub fn rate(x: f64) -> String {
    match x {
        x if !x.is_finite() => "?".into(),
        x if x >= 99.95 => thousands(x.round() as usize),
        x if x >= 9.995 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

/// Makes a text safe inside HTML and SVG, attributes included.
pub fn escape_html(text: &str) -> String {
    // First the mark that the others are written with.
    let escapes = [('&', "&amp;"), ('<', "&lt;"), ('>', "&gt;"), ('"', "&quot;"), ('\'', "&#39;")];
    escapes.iter().fold(text.to_owned(), |text, (c, escape)| text.replace(*c, escape))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_times() {
        for (n, expected) in [(0, "0"), (999, "999"), (1000, "1,000"), (1572864, "1,572,864")] {
            assert_eq!(thousands(n), expected);
        }
        for (s, expected) in [(0.4, "0:00"), (61.0, "1:01"), (3599.6, "1:00:00"), (86399.0, "23:59:59")] {
            assert_eq!(duration(Duration::from_secs_f64(s)), expected);
        }
        for (x, expected) in [(1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346"), (f64::NAN, "?")] {
            assert_eq!(rate(x), expected);
        }
    }

    #[test]
    fn html_is_escaped() {
        assert_eq!(escape_html("<b a='\"'>&"), "&lt;b a=&#39;&quot;&#39;&gt;&amp;");
    }
}
