//! Values as Python prints them: what Hugging Face's users see is `repr()`.

use std::fmt::{self, Write};

use serde_json::Value;

/// `'text'` as Python's `repr` quotes it. `\n`, `\\` and control characters are escaped,
/// letters of every script stand as they are.
pub fn py_str(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut repr = String::with_capacity(text.len() + 2);
    repr.push(quote);
    for c in text.chars() {
        match c {
            '\n' => repr.push_str("\\n"),
            '\r' => repr.push_str("\\r"),
            '\t' => repr.push_str("\\t"),
            '\\' => repr.push_str("\\\\"),
            c if c == quote => {
                repr.push('\\');
                repr.push(c);
            }
            c if printable(c) => repr.push(c),
            c => match u32::from(c) {
                code @ ..=0xff => repr.push_str(&format!("\\x{code:02x}")),
                code @ ..=0xffff => repr.push_str(&format!("\\u{code:04x}")),
                code => repr.push_str(&format!("\\U{code:08x}")),
            },
        }
    }
    repr.push(quote);
    repr
}

/// What Python calls printable, for the characters that text really holds: no controls, no
/// separators but the space, no format characters, no private use.
fn printable(c: char) -> bool {
    let hidden = matches!(c,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{e000}'..='\u{f8ff}' | '\u{feff}'
        | '\u{fff0}'..='\u{fffb}' | '\u{e0000}'..='\u{10ffff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || hidden)
}

/// A float as Python writes it: `1e-05`, `0.0`, `0.1`.
pub fn py_float(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) && x.is_finite() {
        let text = format!("{x:e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, digits) = match exponent.strip_prefix('-') {
            Some(digits) => ('-', digits),
            None => ('+', exponent),
        };
        return format!("{mantissa}e{sign}{digits:0>2}");
    }
    match x {
        _ if x.is_nan() => "nan".into(),
        _ if x.is_infinite() => if x > 0.0 { "inf" } else { "-inf" }.into(),
        _ if x.fract() == 0.0 => format!("{x:.1}"),
        _ => x.to_string(),
    }
}

/// `True` or `False`.
pub fn py_bool(b: bool) -> &'static str {
    if b { "True" } else { "False" }
}

/// Items with `, ` between them: the inside of a list.
pub fn commas(items: impl IntoIterator<Item = impl fmt::Display>) -> String {
    let mut text = String::new();
    for (i, item) in items.into_iter().enumerate() {
        let _ = write!(text, "{}{item}", if i == 0 { "" } else { ", " });
    }
    text
}

/// `{'name': value, ...}`
pub fn py_dict<K: AsRef<str>>(entries: impl IntoIterator<Item = (K, impl fmt::Display)>) -> String {
    let entry = |(name, value): (K, _)| format!("{}: {value}", py_str(name.as_ref()));
    format!("{{{}}}", commas(entries.into_iter().map(entry)))
}

/// What `json.loads` makes of it.
pub fn py_json(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(b) => py_bool(*b).into(),
        Value::Number(n) if n.is_f64() => py_float(n.as_f64().unwrap_or(f64::NAN)),
        Value::Number(n) => n.to_string(),
        Value::String(s) => py_str(s),
        Value::Array(items) => format!("[{}]", commas(items.iter().map(py_json))),
        Value::Object(entries) => py_dict(entries.iter().map(|(name, value)| (name, py_json(value)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Each pair was printed by Python 3.11: `print(repr(value))`.
    #[test]
    fn strings_are_quoted_as_python_quotes_them() {
        for (text, repr) in [
            ("Human: 如何写好一个简历?\n\nAssistant: ", r"'Human: 如何写好一个简历?\n\nAssistant: '"),
            ("it's", "\"it's\""),
            ("it's \"so\"", r#"'it\'s "so"'"#),
            ("\"so\"", "'\"so\"'"),
            ("a\\b\tc\r\u{7f}\u{1b}", r"'a\\b\tc\r\x7f\x1b'"),
            ("\u{3000}\u{200b}\u{feff}\u{a0}\u{e000}\u{fffd}", r"'\u3000\u200b\ufeff\xa0\ue000�'"),
            ("\u{f0000}🙂", r"'\U000f0000🙂'"),
        ] {
            assert_eq!(py_str(text), repr);
        }
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (x, repr) in [
            (0.0, "0.0"),
            (0.1, "0.1"),
            (1e-5, "1e-05"),
            (1.5e-5, "1.5e-05"),
            (1e-4, "0.0001"),
            (5e-324, "5e-324"),
            (1e16, "1e+16"),
            (123456789012345.0, "123456789012345.0"),
            (1e22, "1e+22"),
            (-2.0, "-2.0"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(py_float(x), repr);
        }
    }
}
