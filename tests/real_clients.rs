//! Programs that others wrote for A1111, against our server. They need Python and the package, so this is not among the tests of a
//! plain `cargo test`; `.ci/run` installs the package and runs `cargo test --test real_clients`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::process::Command;

use server::Server;

/// Runs a script of `tests/clients` against the server.
fn drive(server: &Server, (package, pin): (&str, &str), env: &[(&str, &str)]) {
    let python = std::env::var("SDGEN_PYTHON").unwrap_or_else(|_| "python3".into());
    let install = format!(
        "install it with: python3 -m venv .venv && .venv/bin/pip install {pin} pillow==13.0.0, and set SDGEN_PYTHON=.venv/bin/python"
    );
    let has_client = Command::new(&python)
        .args(["-c", &format!("import {package}")])
        .output();
    assert!(
        has_client.is_ok_and(|output| output.status.success()),
        "`{python}` has no package {package}; {install}"
    );
    let script = format!(
        "{}/tests/clients/drive_{package}.py",
        env!("CARGO_MANIFEST_DIR")
    );
    let output = Command::new(&python)
        .arg(script)
        .env("SDGEN_BASE_URL", server.url(""))
        .envs(env.iter().copied())
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

#[test]
fn webuiapi_makes_pictures_and_reads_lists_and_progress() {
    let server = Server::start(&[]);
    drive(&server, ("webuiapi", "webuiapi==0.9.17"), &[]);
}

#[test]
fn openai_makes_edits_and_varies_pictures() {
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let server = Server::spawn(directory, &[], &[("SDGEN_API_TOKENS", "t0ken-of-ann")]);
    server.wait_ready();
    let env = [("SDGEN_TOKEN", "t0ken-of-ann")];
    drive(&server, ("openai", "openai==3.57.0"), &env);
}
