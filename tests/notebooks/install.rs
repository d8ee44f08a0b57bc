//! What `install` and `uninstall` write, remove and refuse.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::{qlora_nb, refuses, text};

/// The command without any layout, and with a home of its own.
fn bare(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qlora-nb"));
    // Cargo and rustup have their own places in the true home.
    for (name, folder) in [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")] {
        if let (None, Some(true_home)) = (std::env::var_os(name), std::env::var_os("HOME")) {
            command.env(name, Path::new(&true_home).join(folder));
        }
    }
    for name in ["QLORA_NB_PREFIX", "XDG_DATA_HOME", "JUPYTER_DATA_DIR", "VIRTUAL_ENV", "CONDA_PREFIX"] {
        command.env_remove(name);
    }
    command.env("HOME", home);
    command
}

fn prefix_of(command: &Command) -> PathBuf {
    let prefix = command.get_envs().find_map(|(name, value)| (name == "QLORA_NB_PREFIX").then_some(value?));
    prefix.expect("a prefix").into()
}

/// A folder that looks like an installation for this user.
fn installed(home: &Path) -> (PathBuf, PathBuf) {
    let layout = home.join(".local/share/qlora-nb");
    let spec = home.join(".local/share/jupyter/kernels/qlora-nb");
    let write = |path: PathBuf, content: &str| {
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, content).expect("written");
    };
    write(layout.join("qlora-nb.json"), &format!("{{\"kernelspec\": {spec:?}}}"));
    write(spec.join("kernel.json"), &format!("{{\"env\": {{\"QLORA_NB_PREFIX\": {layout:?}}}}}"));
    write(spec.join("logo-svg.svg"), "<svg/>");
    for file in ["lib/libqlora_nb.so", "deps/a.rmeta", "evcxr/init.evcxr", "bin/qlora-nb", "rustc", "built", "api.json"]
    {
        write(layout.join(file), "old");
    }
    (layout, spec)
}

#[test]
fn the_kernelspec_starts_the_installed_kernel() {
    let prefix = prefix_of(&qlora_nb());
    let spec = prefix.join("share/jupyter/kernels/qlora-nb");
    let json = fs::read(spec.join("kernel.json")).expect("a kernelspec");
    let json: Value = serde_json::from_slice(&json).expect("JSON");
    let binary = prefix.join("bin/qlora-nb");
    assert_eq!(json["argv"][0], *binary.to_string_lossy());
    assert_eq!((&json["argv"][1], &json["argv"][2]), (&"kernel".into(), &"{connection_file}".into()));
    assert_eq!((&json["language"], &json["interrupt_mode"]), (&"rust".into(), &"message".into()));
    assert_eq!(json["env"]["QLORA_NB_PREFIX"], *prefix.to_string_lossy());
    let version = Command::new(binary).arg("--version").output().expect("the kernel starts");
    assert!(text(&version).starts_with("qlora-nb "), "{}", text(&version));
    for (logo, begin) in [("logo-32x32.png", b"\x89PNG"), ("logo-64x64.png", b"\x89PNG"), ("logo-svg.svg", b"<svg")] {
        assert!(fs::read(spec.join(logo)).expect("a logo").starts_with(begin), "{logo}");
    }
    let mode = fs::metadata(spec.join("kernel.json")).expect("its rights").permissions().mode();
    assert_eq!(mode & 0o400, 0o400);
}

#[test]
fn installing_again_changes_nothing() {
    let install = || qlora_nb().arg("install").output().expect("qlora-nb starts");
    install();
    let dylib = prefix_of(&qlora_nb()).join("lib/libqlora_nb.so");
    let modified = || fs::metadata(&dylib).and_then(|file| file.modified()).expect("a dylib");
    let before = modified();
    let again = install();
    assert!(again.status.success() && text(&again).contains("is up to date"), "{}", text(&again));
    assert_eq!(modified(), before);
    // The installed binary finds its own layout, and may install itself.
    let mut own = Command::new(prefix_of(&qlora_nb()).join("bin/qlora-nb"));
    let own = own.arg("install").env("QLORA_NB_PREFIX", prefix_of(&qlora_nb())).output().expect("starts");
    assert!(own.status.success() && text(&own).contains("is up to date"), "{}", text(&own));
}

/// As a build of the workspace does with the binary that it is run from.
#[test]
fn a_program_that_is_replaced_while_it_installs_goes_on() {
    let home = tempfile::tempdir().expect("a folder");
    let own = home.path().join("qlora-nb");
    fs::copy(env!("CARGO_BIN_EXE_qlora-nb"), &own).expect("copied");
    let path = std::env::var("PATH").expect("PATH");
    let cargo = home.path().join("cargo");
    let script = format!(
        "#!/bin/sh\ncp --remove-destination {} {}\nPATH='{path}' exec cargo \"$@\"\n",
        env!("CARGO_BIN_EXE_qlora-nb"),
        own.display()
    );
    fs::write(&cargo, script).expect("written");
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).expect("executable");
    let mut install = Command::new(&own);
    install.arg("install").env("QLORA_NB_PREFIX", prefix_of(&qlora_nb()));
    install.env("PATH", format!("{}:{path}", home.path().display()));
    let output = install.output().expect("qlora-nb starts");
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn uninstall_removes_the_installation_and_nothing_else() {
    let home = tempfile::tempdir().expect("a folder");
    let (layout, spec) = installed(home.path());
    let others = spec.with_file_name("another");
    fs::create_dir_all(&others).expect("made");
    let output = bare(home.path()).arg("uninstall").output().expect("qlora-nb starts");
    assert!(output.status.success(), "{}", text(&output));
    for gone in [&layout, &spec] {
        assert!(!gone.exists(), "{} is there", gone.display());
        assert!(text(&output).contains(&format!("removed {}", gone.display())), "{}", text(&output));
    }
    assert!(others.exists());
    let again = bare(home.path()).arg("uninstall").output().expect("qlora-nb starts");
    assert!(again.status.success() && text(&again).contains("nothing is installed in"), "{}", text(&again));
}

#[test]
fn a_folder_of_others_is_neither_filled_nor_emptied() {
    let home = tempfile::tempdir().expect("a folder");
    let theirs = home.path().join("theirs");
    fs::create_dir_all(theirs.join("lib")).expect("made");
    fs::write(theirs.join("rustc"), "notes").expect("written");
    refuses(bare(home.path()).arg("install").env("QLORA_NB_PREFIX", &theirs), "remedy: choose another folder");
    refuses(bare(home.path()).arg("uninstall").env("QLORA_NB_PREFIX", &theirs), "nothing in it was removed");
    assert!(theirs.join("lib").exists() && theirs.join("rustc").exists());
    assert_eq!(fs::read_dir(&theirs).expect("read").count(), 2);
}

#[test]
fn each_flag_names_its_own_place() {
    let home = tempfile::tempdir().expect("a folder");
    let says = |command: &mut Command, place: &Path| {
        let output = command.output().expect("qlora-nb starts");
        assert!(text(&output).contains(&format!("installed in {}\n", place.display())), "{}", text(&output));
    };
    let (elsewhere, data) = (home.path().join("elsewhere"), home.path().join(".local/share/qlora-nb"));
    says(bare(home.path()).arg("uninstall"), &data);
    says(bare(home.path()).args(["uninstall", "--user"]).env("QLORA_NB_PREFIX", &elsewhere), &data);
    says(bare(home.path()).arg("uninstall").env("QLORA_NB_PREFIX", &elsewhere), &elsewhere);
    let shared = elsewhere.join("share/qlora-nb");
    says(bare(home.path()).args(["uninstall", "--prefix"]).arg(&elsewhere), &shared);
    says(bare(home.path()).args(["uninstall", "--sys-prefix"]).env("VIRTUAL_ENV", &elsewhere), &shared);
    says(bare(home.path()).arg("uninstall").env("XDG_DATA_HOME", &elsewhere), &elsewhere.join("qlora-nb"));
    refuses(
        bare(home.path()).args(["install", "--user", "--prefix", "x"]),
        "'--user' cannot be used with '--prefix <DIR>'",
    );
}

#[test]
fn what_is_missing_is_said_with_the_remedy() {
    let home = tempfile::tempdir().expect("a folder");
    refuses(bare(home.path()).arg("install").env("PATH", "/nowhere"), "remedy: install Rust 1.95 or newer");
    refuses(bare(home.path()).args(["install", "--source", "/nowhere"]), "remedy: pass --source DIR");
    // A folder in which not even root may write.
    refuses(bare(Path::new("/proc/self")).arg("install"), "remedy: ");
    let old = home.path().join("rustc");
    fs::write(&old, "#!/bin/sh\necho 'rustc 1.80.1 (2024)'\necho 'release: 1.80.1'\n").expect("written");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).expect("executable");
    refuses(bare(home.path()).arg("install").env("PATH", home.path()), "remedy: rustup update");
    assert_eq!(fs::read_dir(home.path()).expect("read").count(), 1, "something was left behind");
}

/// A limit on the size of files stands for a disk that is full.
#[test]
fn a_full_disk_leaves_the_old_installation() {
    let home = tempfile::tempdir().expect("a folder");
    let (layout, _) = installed(home.path());
    let qlora_nb = bare(home.path());
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" install"]).arg(qlora_nb.get_program());
    for (name, value) in qlora_nb.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    refuses(&mut limited, "remedy: free about 1 GiB");
    for file in ["lib/libqlora_nb.so", "rustc", "bin/qlora-nb"] {
        assert_eq!(fs::read_to_string(layout.join(file)).expect("still there"), "old");
    }
    let names = fs::read_dir(&layout).expect("read").map(|entry| entry.expect("an entry").file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with('.')), "staged files were left");
}
