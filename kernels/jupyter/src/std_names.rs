//! The commonest methods of the commonest standard types.
//!
//! The standard library's sources and documentation are components that many toolchains lack; a notebook uses few of
//! its names, and uses these.

use crate::api::Member;
use crate::scope::instantiated;

const SLICE: &str = "fn len(&self) -> usize\nfn is_empty(&self) -> bool\nfn first(&self) -> Option<&T>
fn last(&self) -> Option<&T>\nfn get(&self, index: usize) -> Option<&T>\nfn iter(&self) -> Iter<T>
fn iter_mut(&mut self) -> IterMut<T>\nfn contains(&self, value: &T) -> bool\nfn to_vec(&self) -> Vec<T>
fn join(&self, separator: &str) -> String\nfn chunks(&self, size: usize) -> Chunks<T>
fn windows(&self, size: usize) -> Windows<T>\nfn sort(&mut self)\nfn sort_by(&mut self, compare: F)
fn sort_by_key(&mut self, key: F)\nfn reverse(&mut self)\nfn swap(&mut self, a: usize, b: usize)";

const VEC: &str = "fn new() -> Vec<T>\nfn with_capacity(capacity: usize) -> Vec<T>\nfn push(&mut self, value: T)
fn pop(&mut self) -> Option<T>\nfn extend(&mut self, iter: I)\nfn insert(&mut self, index: usize, value: T)
fn remove(&mut self, index: usize) -> T\nfn clear(&mut self)\nfn truncate(&mut self, len: usize)
fn retain(&mut self, keep: F)\nfn dedup(&mut self)\nfn drain(&mut self, range: R) -> Drain<T>
fn into_iter(self) -> IntoIter<T>\nfn clone(&self) -> Vec<T>";

const STR: &str = "fn len(&self) -> usize\nfn is_empty(&self) -> bool\nfn chars(&self) -> Chars
fn bytes(&self) -> Bytes\nfn lines(&self) -> Lines\nfn trim(&self) -> &str\nfn trim_start(&self) -> &str
fn trim_end(&self) -> &str\nfn split(&self, pattern: P) -> Split\nfn split_whitespace(&self) -> SplitWhitespace
fn split_once(&self, pattern: P) -> Option<(&str, &str)>\nfn contains(&self, pattern: P) -> bool
fn starts_with(&self, pattern: P) -> bool\nfn ends_with(&self, pattern: P) -> bool
fn find(&self, pattern: P) -> Option<usize>\nfn replace(&self, from: P, to: &str) -> String
fn strip_prefix(&self, prefix: P) -> Option<&str>\nfn strip_suffix(&self, suffix: P) -> Option<&str>
fn parse(&self) -> Result<F>\nfn repeat(&self, n: usize) -> String\nfn to_lowercase(&self) -> String
fn to_uppercase(&self) -> String\nfn to_string(&self) -> String\nfn to_owned(&self) -> String
fn as_bytes(&self) -> &[u8]";

const STRING: &str = "fn new() -> String\nfn from_utf8(bytes: Vec<u8>) -> Result<String, FromUtf8Error>
fn push(&mut self, c: char)\nfn push_str(&mut self, text: &str)\nfn pop(&mut self) -> Option<char>
fn clear(&mut self)\nfn as_str(&self) -> &str\nfn insert_str(&mut self, index: usize, text: &str)
fn into_bytes(self) -> Vec<u8>\nfn clone(&self) -> String";

const OPTION: &str = "fn is_some(&self) -> bool\nfn is_none(&self) -> bool\nfn unwrap(self) -> T
fn expect(self, message: &str) -> T\nfn unwrap_or(self, default: T) -> T\nfn unwrap_or_default(self) -> T
fn unwrap_or_else(self, f: F) -> T\nfn map(self, f: F) -> Option<U>\nfn and_then(self, f: F) -> Option<U>
fn or(self, other: Option<T>) -> Option<T>\nfn ok_or(self, error: E) -> Result<T, E>
fn filter(self, f: F) -> Option<T>\nfn as_ref(&self) -> Option<&T>\nfn as_mut(&mut self) -> Option<&mut T>
fn as_deref(&self) -> Option<&T>\nfn take(&mut self) -> Option<T>\nfn cloned(self) -> Option<T>
fn copied(self) -> Option<T>";

const RESULT: &str = "fn is_ok(&self) -> bool\nfn is_err(&self) -> bool\nfn unwrap(self) -> T
fn expect(self, message: &str) -> T\nfn unwrap_or(self, default: T) -> T\nfn unwrap_or_default(self) -> T
fn unwrap_or_else(self, f: F) -> T\nfn unwrap_err(self) -> E\nfn ok(self) -> Option<T>\nfn err(self) -> Option<E>
fn map(self, f: F) -> Result<U, E>\nfn map_err(self, f: F) -> Result<T, U>\nfn and_then(self, f: F) -> Result<U, E>
fn as_ref(&self) -> Result<&T, &E>";

const MAP: &str = "fn new() -> Self\nfn len(&self) -> usize\nfn is_empty(&self) -> bool
fn get(&self, key: &K) -> Option<&V>\nfn get_mut(&mut self, key: &K) -> Option<&mut V>
fn insert(&mut self, key: K, value: V) -> Option<V>\nfn remove(&mut self, key: &K) -> Option<V>
fn contains_key(&self, key: &K) -> bool\nfn entry(&mut self, key: K) -> Entry<K, V>\nfn keys(&self) -> Keys<K, V>
fn values(&self) -> Values<K, V>\nfn iter(&self) -> Iter<K, V>\nfn extend(&mut self, iter: I)\nfn clear(&mut self)";

const ITERATOR: &str = "fn next(&mut self) -> Option<T>\nfn map(self, f: F) -> Map\nfn filter(self, f: F) -> Filter
fn filter_map(self, f: F) -> FilterMap\nfn flat_map(self, f: F) -> FlatMap\nfn enumerate(self) -> Enumerate
fn zip(self, other: I) -> Zip\nfn chain(self, other: I) -> Chain\nfn rev(self) -> Rev\nfn take(self, n: usize) -> Take
fn skip(self, n: usize) -> Skip\nfn step_by(self, step: usize) -> StepBy\nfn cloned(self) -> Cloned
fn copied(self) -> Copied\nfn collect(self) -> B\nfn sum(self) -> S\nfn count(self) -> usize
fn fold(self, init: B, f: F) -> B\nfn any(&mut self, f: F) -> bool\nfn all(&mut self, f: F) -> bool
fn find(&mut self, f: F) -> Option<T>\nfn position(&mut self, f: F) -> Option<usize>\nfn max(self) -> Option<T>
fn min(self) -> Option<T>\nfn last(self) -> Option<T>\nfn for_each(self, f: F)";

const FLOAT: &str = "fn abs(self) -> N\nfn sqrt(self) -> N\nfn powi(self, n: i32) -> N\nfn powf(self, n: N) -> N
fn exp(self) -> N\nfn ln(self) -> N\nfn log10(self) -> N\nfn sin(self) -> N\nfn cos(self) -> N\nfn tanh(self) -> N
fn floor(self) -> N\nfn ceil(self) -> N\nfn round(self) -> N\nfn max(self, other: N) -> N\nfn min(self, other: N) -> N
fn clamp(self, min: N, max: N) -> N\nfn is_nan(self) -> bool\nfn is_finite(self) -> bool\nfn to_string(&self) -> String";

const INTEGER: &str = "fn abs(self) -> N\nfn pow(self, n: u32) -> N\nfn max(self, other: N) -> N
fn min(self, other: N) -> N\nfn clamp(self, min: N, max: N) -> N\nfn abs_diff(self, other: N) -> N
fn div_ceil(self, by: N) -> N\nfn rem_euclid(self, by: N) -> N\nfn checked_add(self, other: N) -> Option<N>
fn saturating_sub(self, other: N) -> N\nfn wrapping_add(self, other: N) -> N\nfn to_string(&self) -> String";

const PATH: &str = "fn new(path: P) -> &Path\nfn join(&self, path: P) -> PathBuf\nfn display(&self) -> Display
fn exists(&self) -> bool\nfn is_dir(&self) -> bool\nfn is_file(&self) -> bool\nfn parent(&self) -> Option<&Path>
fn file_name(&self) -> Option<&OsStr>\nfn extension(&self) -> Option<&OsStr>\nfn to_owned(&self) -> PathBuf";

/// The members of a type with this name, these arguments, and this full text.
pub(crate) fn members(head: &str, arguments: &[&str], ty: &str) -> Vec<Member> {
    let (tables, parameters): (&[&str], &[&str]) = match head {
        "Vec" => (&[VEC, SLICE], &["T"]),
        "String" => (&[STRING, STR], &[]),
        "str" => (&[STR], &[]),
        "Option" => (&[OPTION], &["T"]),
        "Result" => (&[RESULT], &["T", "E"]),
        "HashMap" | "BTreeMap" => (&[MAP], &["K", "V"]),
        "Path" | "PathBuf" => (&[PATH], &[]),
        "f32" | "f64" => (&[FLOAT], &[]),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" | "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => {
            (&[INTEGER], &[])
        }
        "Iter" | "IterMut" | "IntoIter" | "Chunks" | "Windows" | "Drain" | "Chars" | "Bytes" | "Lines" | "Split"
        | "SplitWhitespace" | "Keys" | "Values" | "Map" | "Filter" | "FilterMap" | "FlatMap" | "Enumerate" | "Zip"
        | "Chain" | "Rev" | "Take" | "Skip" | "StepBy" | "Cloned" | "Copied" | "Range" | "RangeInclusive" => {
            (&[ITERATOR], &[])
        }
        _ if ty.starts_with('[') => {
            let element = ty.trim_matches(['[', ']']).split(';').next().unwrap_or("T").trim();
            return table(SLICE, &["T"], &[element]);
        }
        _ if ty.starts_with("impl Iterator") => (&[ITERATOR], &[]),
        _ => return Vec::new(),
    };
    let number = ["N"];
    let (parameters, arguments) =
        if parameters.is_empty() { (&number[..], &[head][..]) } else { (parameters, arguments) };
    tables.iter().flat_map(|lines| table(lines, parameters, arguments)).collect()
}

fn table(lines: &str, parameters: &[&str], arguments: &[&str]) -> Vec<Member> {
    let member = |line: &str| {
        let signature = instantiated(line.trim(), parameters, arguments);
        let name = signature.strip_prefix("fn ")?.split('(').next()?.to_owned();
        let kind = if signature.contains("self") { "method" } else { "function" };
        let ty = signature.split_once(" -> ").map_or("()", |(_, ty)| ty).to_owned();
        // One letter that is still there is a parameter of the method's own.
        let is_known = !ty.split(|c: char| !c.is_alphanumeric()).any(|word| word.len() == 1);
        Some(Member { name, kind: kind.into(), ty: is_known.then_some(ty), signature, ..Default::default() })
    };
    lines.lines().filter_map(member).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_methods_type_is_that_of_the_value() {
        let ty = |head: &str, arguments: &[&str], text: &str, name: &str| {
            let found = members(head, arguments, text).into_iter().find(|member| member.name == name);
            found.unwrap_or_else(|| panic!("no {name}")).ty
        };
        assert_eq!(ty("Vec", &["u32"], "Vec<u32>", "first").as_deref(), Some("Option<&u32>"));
        assert_eq!(ty("slice", &[], "[f32; 3]", "last").as_deref(), Some("Option<&f32>"));
        assert_eq!(ty("HashMap", &["String", "Tensor"], "", "get").as_deref(), Some("Option<&Tensor>"));
        assert_eq!(ty("f32", &[], "f32", "sqrt").as_deref(), Some("f32"));
        assert_eq!(ty("Option", &["u8"], "", "map"), None);
    }
}
