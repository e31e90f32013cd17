//! llama.cpp's own server and benchmark, which `cargo xtask bench engine` measures beside ours and which nothing else needs,
//! and its tests of that server, which are run against ours.

use std::{fs, num::NonZeroUsize, path::Path, thread};

use anyhow::{Context, Result, bail};

use super::{folder_once, step};
use crate::command::{command, find, output};

/// Builds them from the source distribution that tests/peers/requirements.txt names.
pub(crate) fn build() -> Result<()> {
    let dir = xtask::llama_server_dir();
    let ready = || xtask::LLAMA_SERVER_FILES.iter().all(|file| dir.join(file).exists());
    folder_once(&dir, ready, |fresh| {
        step("building llama-server and llama-bench (ten minutes on two cores, once)", || {
            if find("cmake").is_none() {
                bail!("cmake is missing: install it (Debian and Ubuntu: apt-get install cmake)");
            }
            let work = fresh.join("work");
            fs::create_dir_all(&work)?;
            let source = fetch(&work)?;
            compile(&source, &work.join("build"))?;
            for program in ["llama-server", "llama-bench"] {
                fs::copy(work.join("build/bin").join(program), fresh.join(program))?;
            }
            let version = xtask::llama_cpp_version(&source).context("llama.cpp does not say its version")?;
            fs::write(fresh.join("VERSION"), format!("{version}, of {}", xtask::llama_server_package()))?;
            super::remove(&work)
        })
    })
}

/// Fetches llama.cpp's tests of its server from the same source, without building anything, and what they need of Python.
pub(crate) fn tests() -> Result<()> {
    folder_once(
        &xtask::llama_server_tests_dir(),
        || xtask::llama_server_tests().is_some(),
        |fresh| {
            step("llama.cpp's tests of its server", || {
                let work = fresh.join("work");
                fs::create_dir_all(&work)?;
                let source = fetch(&work)?;
                for part in xtask::LLAMA_SERVER_TESTS {
                    let to = fresh.join(part);
                    fs::create_dir_all(to.parent().context("a part without a folder")?)?;
                    fs::rename(source.join(part), to).with_context(|| format!("the package lacks {part}"))?;
                }
                super::remove(&work)
            })
        },
    )?;
    super::python::of_llama_servers_tests()
}

/// The source tree of llama.cpp, unpacked under `work`.
fn fetch(work: &Path) -> Result<std::path::PathBuf> {
    super::python::clients()?;
    let python = xtask::python().context("the Python environment of the tests is not there")?;
    // pip checks the hash.
    output(
        command(python)
            .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
            .args(["--no-binary", "llama-cpp-python", "--requirement"])
            .arg(xtask::repository().join("tests/peers/requirements.txt"))
            .arg("--dest")
            .arg(work),
    )?;
    let archive = one_of(work, |name| name.ends_with(".tar.gz"))?;
    output(command("tar").arg("--extract").arg("--file").arg(work.join(archive)).arg("--directory").arg(work))?;
    let package = one_of(work, |name| name.starts_with("llama_cpp_python") && !name.ends_with(".tar.gz"))?;
    Ok(work.join(package).join("vendor/llama.cpp"))
}

fn one_of(dir: &Path, is_it: impl Fn(&str) -> bool) -> Result<String> {
    let names = fs::read_dir(dir)?.map_while(Result::ok).map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.into_iter().find(|name| is_it(name)).with_context(|| format!("the package lacks it, in {}", dir.display()))
}

/// As the build script of llama-cpp-sys-2 compiles it: Release, static, for any CPU with AVX2, with OpenMP; and without
/// what a measurement does not need.
fn compile(source: &Path, build: &Path) -> Result<()> {
    output(
        command("cmake")
            .arg("-S")
            .arg(source)
            .arg("-B")
            .arg(build)
            .args(["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=ON"])
            .args(["-DCMAKE_POSITION_INDEPENDENT_CODE=ON", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF"])
            .args(["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_TESTS=OFF"])
            .arg("-DLLAMA_BUILD_EXAMPLES=OFF"),
    )?;
    let jobs = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    output(command("cmake").arg("--build").arg(build).args([
        "--parallel",
        &jobs.to_string(),
        "--target",
        "llama-server",
        "llama-bench",
    ]))
    .map(drop)
}
