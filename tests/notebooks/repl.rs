//! The session in a terminal. Its editing needs one, which the second test makes; in the first, lines come through a pipe.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::libc;
use nix::pty::{OpenptyResult, openpty};
use nix::unistd::setsid;

use crate::{qlora_nb, text};

#[test]
fn cells_go_on_over_lines_and_failures_cost_no_variable() {
    let home = tempfile::tempdir().expect("a folder");
    let mut command = qlora_nb();
    // The history of whoever runs the tests stays as it is.
    command.arg("repl").env("XDG_DATA_HOME", home.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut repl = command.spawn().expect("qlora-nb starts");
    let lines = "let a = 2;\nfn twice(n: i32) -> i32 {\n    n * 2\n}\ntwice(a)\npanic!(\"on purpose\")\n\
                 println!(\"still {a}\");\n:quit\nprintln!(\"not reached\");\n";
    repl.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("written");
    let output = repl.wait_with_output().expect("it ends");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for expected in ["\n4\n", "panicked at", "on purpose", "still 2\n"] {
        assert!(said.contains(expected), "{said} does not contain {expected:?}");
    }
    assert!(!said.contains("not reached"), "{said}");
}

#[test]
fn ctrl_c_stops_a_cell_and_not_the_session() {
    let home = tempfile::tempdir().expect("a folder");
    let OpenptyResult { master, slave } = openpty(None, None).expect("a terminal");
    let mut command = qlora_nb();
    command.arg("repl").env("XDG_DATA_HOME", home.path()).env("TERM", "xterm");
    let end = || slave.try_clone().expect("a copy");
    command.stdin(end()).stdout(end()).stderr(end());
    // SAFETY: both are async-signal-safe. The session gets the terminal, and with it Ctrl-C.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    let mut repl = command.spawn().expect("qlora-nb starts");
    drop((command, slave));
    let mut keys = File::from(master);
    let screen = Arc::new(Mutex::new(String::new()));
    let (seen, mut shown) = (screen.clone(), keys.try_clone().expect("a copy"));
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = shown.read(&mut buffer) {
            *seen.lock().expect("the screen") += &String::from_utf8_lossy(&buffer[..n]);
        }
    });
    let wait_for = |text: &str| {
        for _ in 0..3000 {
            if screen.lock().expect("the screen").contains(text) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("no {text:?} in {}", screen.lock().expect("the screen"));
    };
    wait_for("> ");
    let cell = "{ let _guard = qlora_nb::interrupt::Guard::new()?; println!(\"{}\", 7 * 7 * 7); \
                while !qlora_nb::interrupt::requested() { std::thread::yield_now(); } println!(\"{}\", 11 * 11 * 11); }\r";
    for (typed, answer) in [("let kept = 41;\rkept + 1\r", "42"), (cell, "343"), ("\u{3}", "1331")] {
        keys.write_all(typed.as_bytes()).expect("typed");
        wait_for(answer);
    }
    keys.write_all(b"kept * 100\r").expect("typed");
    wait_for("4100");
    keys.write_all(b":quit\r").expect("typed");
    assert!(repl.wait().expect("it ends").success());
}
