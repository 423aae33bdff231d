//! The `sdgen` binary: everything is in the library; here a result becomes an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    sdgen::cli::main(std::env::args_os().collect())
}
