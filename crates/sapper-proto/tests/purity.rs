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

/// A machine without sockets, files and threads compiles it.
#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn it_compiles_for_bare_wasm() {
    const TARGET: &str = "wasm32-unknown-unknown";
    let rustc = std::path::Path::new(env!("CARGO")).with_file_name("rustc");
    let libraries = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output().ok();
    let installed = libraries
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .is_some_and(|folder| std::path::Path::new(folder.trim()).is_dir());
    if !installed {
        eprintln!("skipped: the target {TARGET} is not installed (rustup target add {TARGET})");
        return;
    }
    let output = Command::new(env!("CARGO"))
        .args(["check", "--offline", "--release", "--lib", "--target", TARGET])
        // Its own folder: another cargo may be building in the usual one.
        .args(["--target-dir", concat!(env!("CARGO_TARGET_TMPDIR"), "/wasm")])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs: it built this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
