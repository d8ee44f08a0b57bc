//! What Cargo.toml has compiled without optimising: all of rust-analyzer, and nothing that the library is made of.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use super::repository;

/// Compiled with the library since others name them, and never called.
const NEVER_CALLED: [&str; 4] = ["arrow-ord", "gemm-c32", "gemm-c64", "num-bigint"];

/// The packages of `[profile.release.package]` and their levels.
fn levels() -> BTreeMap<String, char> {
    let manifest = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    let (_, table) = manifest.split_once("[profile.release.package]\n").unwrap();
    let table = table.split("\n[").next().unwrap_or_default();
    let lines = table.lines().filter_map(|line| line.split_once(" = { opt-level = "));
    lines.map(|(name, rest)| (name.into(), rest.chars().next().unwrap())).collect()
}

/// Every package of Cargo.lock with the names of those that it depends on.
fn locked() -> BTreeMap<String, BTreeSet<String>> {
    let lock = fs::read_to_string(repository().join("Cargo.lock")).unwrap();
    let mut packages: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let name = package.split("name = \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
        let (_, list) = package.split_once("dependencies = [").unwrap_or_default();
        // `"name"`, or `"name version"` where there are several.
        let names = list.split('"').skip(1).step_by(2).filter_map(|entry| entry.split(' ').next());
        packages.entry(name.into()).or_default().extend(names.map(String::from));
    }
    packages
}

#[test]
fn rust_analyzer_is_compiled_without_optimising() {
    let (levels, locked) = (levels(), locked());
    let gone: Vec<&String> = levels.keys().filter(|name| !locked.contains_key(*name)).collect();
    assert!(gone.is_empty(), "Cargo.toml has levels for packages that are not in Cargo.lock: {gone:?}");
    let analyzer = locked.keys().filter(|name| name.starts_with("ra_ap_") || name.starts_with("ra-ap-"));
    let missing: Vec<&String> = analyzer.filter(|name| levels.get(*name) != Some(&'0')).collect();
    assert!(missing.is_empty(), "rust-analyzer's packages that Cargo.toml has optimised: {missing:?}");
}

#[test]
fn what_the_library_is_made_of_is_optimised() {
    let (levels, locked) = (levels(), locked());
    let (mut library, mut left) = (BTreeSet::new(), vec!["qlora-nb"]);
    while let Some(name) = left.pop() {
        if library.insert(name) {
            left.extend(locked[name].iter().map(String::as_str));
        }
    }
    assert!(library.contains("candle-core"), "{library:?}");
    let slow: Vec<&str> = library.into_iter().filter(|name| levels.get(*name) == Some(&'0')).collect();
    let slow: Vec<&str> = slow.into_iter().filter(|name| !NEVER_CALLED.contains(name)).collect();
    assert!(slow.is_empty(), "the library's packages that Cargo.toml has compiled without optimising: {slow:?}");
}
