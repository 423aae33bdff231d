//! The API's document and the page that shows it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/server.rs"]
mod server;

use server::Server;

#[test]
fn the_document_says_what_is_served_and_the_page_needs_nothing_else() {
    let directory = std::sync::Arc::new(tempfile::tempdir().unwrap());
    std::fs::write(
        directory.path().join("sdgen.toml"),
        "[limits]\nmax_steps = 7\n",
    )
    .unwrap();
    let server = Server::spawn(directory, &["--subpath", "/sd"], &[]);
    let document = server.get("/openapi.json").json();
    assert_eq!(document["openapi"], "3.1.0");
    let steps = "/components/schemas/Txt2Img/properties/steps/maximum";
    assert_eq!(document.pointer(steps).unwrap(), 7);
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/images/edits") && !paths.contains_key("/sdapi/v1/server-stop"));
    for (path, kind) in [
        ("/docs", "text/html; charset=utf-8"),
        ("/redoc", "text/html; charset=utf-8"),
        ("/sd/docs", "text/html; charset=utf-8"),
        ("/docs/docs.js", "text/javascript; charset=utf-8"),
        ("/docs/docs.css", "text/css; charset=utf-8"),
    ] {
        let answer = server.get(path);
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (200, Some(kind)),
            "{path}"
        );
        let policy = answer.header("content-security-policy").unwrap();
        assert!(
            policy.starts_with("default-src 'none'") && !policy.contains("unsafe"),
            "{policy}"
        );
        let text = answer.text();
        assert!(
            !text.contains("https://") && !text.contains("http://"),
            "{path} names another site"
        );
    }
    assert_eq!(server.get("/docs/page.html").status, 404);
}
