//! This crate stays pure: nothing in its dependency tree does I/O, waits, or rolls dice. What its own
//! code may not name stands in clippy.toml.

use std::process::Command;

/// JSON, error derives, and what these two are made of.
const ALLOWED: [&str; 11] = [
    "itoa",
    "memchr",
    "proc-macro2",
    "quote",
    "sapper-proto",
    "serde_core",
    "serde_json",
    "syn",
    "thiserror",
    "thiserror-impl",
    "unicode-ident",
];
/// Number formatting of serde_json, by its successive names.
const FORMATTERS: [&str; 2] = ["ryu", "zmij"];

#[test]
fn the_dependency_tree_is_pure() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--edges", "normal,build", "--prefix", "none", "--format", "{p}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs: it built this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).expect("crate names are text");
    let names: Vec<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.contains(&"serde_json"), "the tree was read: {names:?}");
    let strangers: Vec<_> =
        names.iter().filter(|name| !ALLOWED.contains(name) && !FORMATTERS.contains(name)).collect();
    assert!(strangers.is_empty(), "sapper-proto must not depend on {strangers:?}");
}
