//! Writes the generated CRDs into the folder given as the only argument (default: `crds`).

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("crds"), PathBuf::from);
    for (name, crd) in altiplano_crds::generate::crds() {
        let written = altiplano_crds::generate::to_yaml(&crd)
            .map_err(|error| error.to_string())
            .and_then(|yaml| std::fs::write(folder.join(name), yaml).map_err(|error| error.to_string()));
        if let Err(error) = written {
            eprintln!("crdgen: {}: {error}", folder.join(name).display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
