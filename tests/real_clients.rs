//! Programs that others wrote for A1111, against our server. They need Python and the package, so this is not among the tests of a
//! plain `cargo test`; `.ci/run` installs the package and runs `cargo test --test real_clients`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::process::Command;

use server::Server;

#[test]
fn webuiapi_makes_pictures_and_reads_lists_and_progress() {
    let python = std::env::var("SDGEN_PYTHON").unwrap_or_else(|_| "python3".into());
    let install = "install it with: python3 -m venv .venv && .venv/bin/pip install webuiapi==0.9.17, and set SDGEN_PYTHON=.venv/bin/python";
    let has_client = Command::new(&python)
        .args(["-c", "import webuiapi"])
        .output();
    assert!(
        has_client.is_ok_and(|output| output.status.success()),
        "`{python}` has no package webuiapi; {install}"
    );
    let server = Server::start(&[]);
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/clients/drive_webuiapi.py"
    );
    let output = Command::new(&python)
        .arg(script)
        .env("SDGEN_BASE_URL", server.url(""))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        server.log()
    );
}
