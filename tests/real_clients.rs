//! Programs that others wrote for A1111, against our server: each makes pictures and calls every method it has for a route that we
//! serve. They need Python, Node and packages, so they are not among the tests of a plain `cargo test`; `.ci/run` installs the
//! versions pinned in `tests/clients` and runs `cargo test --test real_clients`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use std::process::Command;

use server::Server;

/// Runs one of `tests/clients` against a server of its own. `probe` fails where the packages are missing.
#[track_caller]
fn drive(program: &mut Command, probe: &[&str], script: &str) {
    drive_on(&Server::start(&[]), program, probe, script);
}

/// [`drive`] against a server that is there.
#[track_caller]
fn drive_on(server: &Server, program: &mut Command, probe: &[&str], script: &str) {
    let name = program.get_program().to_string_lossy().into_owned();
    let found = Command::new(&name)
        .args(probe)
        .envs(
            program
                .get_envs()
                .filter_map(|(key, value)| Some((key, value?))),
        )
        .output();
    assert!(
        found.is_ok_and(|output| output.status.success()),
        "`{name}` cannot load the client of `{script}`; CONTRIBUTING.md says how to install it"
    );
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients");
    let output = program
        .arg(format!("{directory}/{script}"))
        .env("SDGEN_BASE_URL", server.url(""))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}{}",
        String::from_utf8_lossy(&output.stderr),
        server.log()
    );
    println!("{said}");
}

/// The interpreter that `variable` names.
fn python(variable: &str) -> Command {
    let path = std::env::var(variable).unwrap_or_else(|_| "python3".into());
    let mut command = Command::new(path);
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

#[test]
fn webuiapi() {
    drive(
        &mut python("SDGEN_PYTHON"),
        &["-c", "import webuiapi, aiohttp"],
        "webuiapi_client.py",
    );
}

#[test]
fn sd_backend_client() {
    drive(
        &mut python("SDGEN_PYTHON"),
        &["-c", "import sd_backend_client"],
        "sd_backend_client_client.py",
    );
}

#[test]
fn aaa1111() {
    drive(
        &mut python("SDGEN_PYTHON"),
        &["-c", "import aaa1111"],
        "aaa1111_client.py",
    );
}

#[test]
fn sd_api_mcp() {
    drive(
        &mut python("SDGEN_PYTHON_MCP"),
        &["-c", "import sd_api_mcp, fastmcp, PIL"],
        "sd_api_mcp_client.py",
    );
}

#[test]
fn applications() {
    drive(
        &mut python("SDGEN_PYTHON"),
        &["-c", "import requests, PIL"],
        "applications.py",
    );
}

#[test]
fn stable_diffusion_api() {
    let modules = std::env::var("SDGEN_NODE_MODULES")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/node_modules").into());
    drive(
        Command::new("node").env("NODE_PATH", modules),
        &["-e", "require('stable-diffusion-api')"],
        "stable_diffusion_api_client.js",
    );
}

#[test]
fn openai_makes_edits_and_varies_pictures() {
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let server = Server::spawn(directory, &[], &[("SDGEN_API_TOKENS", "t0ken-of-ann")]);
    server.wait_ready();
    drive_on(
        &server,
        python("SDGEN_PYTHON_OWN").env("SDGEN_TOKEN", "t0ken-of-ann"),
        &["-c", "import openai, PIL"],
        "openai_client.py",
    );
}
