//! Compiles the kernels of src/backend/cuda with nvcc when the feature `cuda` is on; does nothing otherwise.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if let Err(message) = compile() {
        println!("cargo::error={message}");
    }
}

fn compile() -> Result<(), String> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?);
    let folder = here.join("src/backend/cuda/kernels");
    println!("cargo::rerun-if-changed={}", folder.display());
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    let capability = capability()?;
    println!("cargo::rustc-env=QLORA_NB_CUDA_TOOLKIT={}", toolkit()?);
    let mut sources: Vec<PathBuf> = fs::read_dir(&folder)
        .map_err(|e| format!("{}: {e}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    let (mut modules, mut early, mut told) = (String::new(), Vec::new(), String::new());
    let compiled = std::thread::scope(|scope| {
        let jobs: Vec<_> = (sources.iter()).map(|source| scope.spawn(|| nvcc(source, &out, &capability))).collect();
        jobs.into_iter().map(|job| job.join().unwrap_or(Err("nvcc: the thread died".into()))).collect::<Vec<_>>()
    });
    for (source, file) in sources.iter().zip(compiled) {
        let (file, ptx) = file?;
        modules += &format!("    include_bytes!({:?}),\n", file.display().to_string());
        let ptx = fs::read_to_string(&ptx).map_err(|e| format!("{}: {e}", ptx.display()))?;
        early.extend(kernels_that_begin_early(&ptx));
        let constants = numbers_told(&ptx);
        if !constants.is_empty() {
            let name = source.file_stem().unwrap_or_default().to_string_lossy();
            told += &format!("    pub mod {name} {{\n{constants}    }}\n");
        }
    }
    early.sort();
    let text = format!(
        "const MODULES: &[&[u8]] = &[\n{modules}];\nconst EARLY: &[&str] = &{early:?};\npub(crate) mod told {{\n{told}}}\n"
    );
    fs::write(out.join("modules.rs"), text).map_err(|e| e.to_string())
}

/// The kernels that wait themselves for the one in front of them (`begin` in common.cuh).
fn kernels_that_begin_early(ptx: &str) -> Vec<String> {
    let bodies = ptx.split(".visible .entry ").skip(1);
    let early = bodies.filter(|body| body.contains("griddepcontrol.wait"));
    early.filter_map(|body| Some(body[..body.find('(')?].trim().to_string())).collect()
}

/// The numbers that a file tells the host (`TELL` in common.cuh), as constants.
fn numbers_told(ptx: &str) -> String {
    let declared = ptx.lines().filter_map(|line| line.split_once(" tell_")?.1.trim_end_matches(';').split_once(" = "));
    declared.map(|(name, value)| format!("        pub const {name}: usize = {value};\n")).collect()
}

/// One source to a fat binary: machine code for the capability and PTX for later cards, which is kept beside it.
fn nvcc(source: &Path, out: &Path, capability: &str) -> Result<(PathBuf, PathBuf), String> {
    let nvcc = nvcc_path();
    let name = source.file_stem().unwrap_or_default().to_string_lossy();
    let file = out.join(format!("{name}.fatbin"));
    let kept = out.join(&*name);
    fs::create_dir_all(&kept).map_err(|e| format!("{}: {e}", kept.display()))?;
    let output = Command::new(&nvcc)
        .args(["-fatbin", "-O3", "-std=c++17", "-Xptxas", "-v", "-gencode"])
        .arg(format!("arch=compute_{capability},code=[sm_{capability},compute_{capability}]"))
        .arg("--keep")
        .arg("--keep-dir")
        .arg(&kept)
        .arg("-o")
        .arg(&file)
        .arg(source)
        .output()
        .map_err(|e| no_nvcc(&nvcc, &e))?;
    let said = String::from_utf8_lossy(&output.stderr);
    // Registers, spills and shared memory of each kernel, for those who tune them.
    let _ = fs::write(out.join(format!("{name}.ptxas.txt")), said.as_bytes());
    let ptx = kept.join(format!("{name}.ptx"));
    if output.status.success() { Ok((file, ptx)) } else { Err(format!("nvcc {name}: {}", said.replace('\n', " | "))) }
}

fn nvcc_path() -> PathBuf {
    match env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home).join("bin/nvcc"),
        None => "nvcc".into(),
    }
}

fn no_nvcc(nvcc: &Path, e: &std::io::Error) -> String {
    format!("{}: {e}; install the CUDA toolkit 12 or 13, or set CUDA_HOME", nvcc.display())
}

/// `13.0`: the toolkit's version, which the driver must not be older than.
fn toolkit() -> Result<String, String> {
    let nvcc = nvcc_path();
    let output = Command::new(&nvcc).arg("--version").output().map_err(|e| no_nvcc(&nvcc, &e))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    version.map(str::to_string).ok_or_else(|| format!("{} --version names no release: {said}", nvcc.display()))
}

/// `90` for a card of compute capability 9.0: CUDA_COMPUTE_CAP, or what nvidia-smi says.
fn capability() -> Result<String, String> {
    if let Ok(capability) = env::var("CUDA_COMPUTE_CAP") {
        return Ok(capability.replace('.', ""));
    }
    let output = Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    match text.lines().next().map(|line| line.trim().replace('.', "")) {
        Some(capability) if !capability.is_empty() => Ok(capability),
        _ => Err("no GPU here to ask: set CUDA_COMPUTE_CAP, e.g. 80 (A100), 89 (RTX 40), 90 (H100)".into()),
    }
}
