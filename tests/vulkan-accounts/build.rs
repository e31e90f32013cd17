//! Compiles the layer and the program that holds memory, by the C++ compiler that llama.cpp needs too.

use std::path::Path;
use std::{env, fs};

/// What the Vulkan loader reads, beside the library.
const MANIFEST: &str = r#"{
  "file_format_version": "1.2.0",
  "layer": {
    "name": "VK_LAYER_ALTIPLANO_accounts",
    "type": "GLOBAL",
    "library_path": "./libaltiplano_accounts.so",
    "api_version": "1.3.0",
    "implementation_version": "1",
    "description": "one account of a device's memory over all processes",
    "device_extensions": [{ "name": "VK_EXT_memory_budget", "spec_version": "1", "entrypoints": [] }]
  }
}
"#;

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=layer");
    let out = env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?;
    let out = Path::new(&out);
    let layer = out.join("libaltiplano_accounts.so");
    let built = compile(&["account.cpp", "layer.cpp"], &layer, &["-shared", "-fvisibility=hidden"])
        .and_then(|()| compile(&["holder.cpp"], &out.join("holder"), &["-ldl"]));
    // Tests of other backends need no Vulkan; those that do say what is missing.
    if let Err(error) = built {
        println!("cargo:warning={error}");
        return Ok(());
    }
    fs::write(out.join("altiplano_accounts.json"), MANIFEST).map_err(|error| format!("the layer's manifest: {error}"))
}

fn compile(sources: &[&str], into: &Path, options: &[&str]) -> Result<(), String> {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(1).pic(true).warnings(true).extra_warnings(true);
    let compiler = build.try_get_compiler().map_err(|error| format!("no C++ compiler: {error}"))?;
    let mut command = compiler.to_command();
    command.args(sources.iter().map(|source| format!("layer/{source}"))).arg("-o").arg(into).args(options);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            Err(format!("compiling {sources:?}: {status}; are the Vulkan headers (libvulkan-dev) installed?"))
        }
        Err(error) => Err(format!("the C++ compiler: {error}")),
    }
}
