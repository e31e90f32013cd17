//! Compiles the engine's C++ shim against the llama.cpp that `llama-cpp-sys-2` has built.

use std::path::{Path, PathBuf};
use std::{env, fs};

const FOLDER: &str = "src/engine/ffi";

/// One for each topic.
const SOURCES: [&str; 9] = [
    "allowance.cpp",
    "shim.cpp",
    "shim_chat.cpp",
    "shim_depth.cpp",
    "shim_driver.cpp",
    "shim_head.cpp",
    "shim_media.cpp",
    "shim_sampler.cpp",
    "shim_sizing.cpp",
];

const HEADERS: [&str; 9] = [
    "allowance.h",
    "guard.h",
    "shim.h",
    "shim_chat.h",
    "shim_depth.h",
    "shim_driver.h",
    "shim_head.h",
    "shim_media.h",
    "shim_sizing.h",
];

/// In a build with CUDA.
const CUDA: &str = "shim_cuda.cpp";

fn main() -> Result<(), String> {
    let cuda = env::var_os("CARGO_FEATURE_CUDA").map(|_| CUDA);
    for file in HEADERS.iter().chain(&SOURCES).chain(&cuda) {
        println!("cargo:rerun-if-changed={FOLDER}/{file}");
    }
    println!("cargo:rerun-if-env-changed=DEP_LLAMA_ROOT");

    let root = env::var("DEP_LLAMA_ROOT").map_err(|_| "llama-cpp-sys-2 did not say where it has built llama.cpp")?;
    let source = llama_source(Path::new(&root))?;
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .flag_if_supported("-fexceptions")
        .include(FOLDER)
        .include(source.join("include"))
        .include(source.join("ggml/include"))
        .include(source.join("src"))
        .include(source.join("common"))
        .include(source.join("vendor"))
        .include(source.join("tools/mtmd"))
        .files(SOURCES.iter().chain(&cuda).map(|file| format!("{FOLDER}/{file}")))
        .opt_level(2)
        .warnings(false)
        .try_compile("altiplano_shim")
        .map_err(|error| format!("cannot compile the engine's shim: {error}"))
}

/// The vendored source stands in the cache of the `CMake` build; the package exports no path to it.
fn llama_source(root: &Path) -> Result<PathBuf, String> {
    let cache = root.join("build/CMakeCache.txt");
    let text = fs::read_to_string(&cache).map_err(|error| format!("cannot read {}: {error}", cache.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
        .map(PathBuf::from)
        .ok_or_else(|| format!("no CMAKE_HOME_DIRECTORY in {}", cache.display()))
}
