//! The document against the routes.

use std::collections::{BTreeMap, BTreeSet};

use axum::body::Body as HttpBody;
use axum::http::{Request, StatusCode, header};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::operations::HIDDEN;
use super::*;
use crate::api::options::OptionStore;
use crate::api::router;
use crate::config::Config;
use crate::engine::Engine;
use crate::engine::backend::PipelineBackend;
use crate::engine::history::History;
use crate::engine::models::Catalog;

fn app(directory: &std::path::Path) -> Arc<App> {
    let mut config = Config {
        data_dir: directory.to_path_buf(),
        ..Config::default()
    };
    config.model.load_at_start = false;
    config.server.server_stop = true;
    let devices = PipelineBackend::on_each(&config.device).unwrap();
    let engine = Engine::start(Catalog::open(&config), 4, devices).unwrap();
    let options = OptionStore::open(config.settings_file()).unwrap();
    let history = History::open(&directory.join("jobs.sqlite")).unwrap();
    App::new(engine, options, config, history, CancellationToken::new())
}

#[tokio::test]
async fn paths_and_methods_are_those_of_the_routes() {
    let directory = tempfile::tempdir().unwrap();
    let app = app(directory.path());
    let mut served = BTreeMap::new();
    for (path, _) in routes(&app) {
        let sent = path.replace(['{', '}'], "");
        let request = Request::builder().method("TRACE").uri(sent);
        let request = request.body(HttpBody::empty()).unwrap();
        let answer = router(&app).oneshot(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
        let allow = answer.headers()[header::ALLOW].to_str().unwrap();
        let methods = allow.split(',').filter(|method| *method != "HEAD");
        let methods: BTreeSet<String> = methods.map(str::to_lowercase).collect();
        if !HIDDEN.contains(&path) {
            served.insert(path.to_string(), methods);
        }
    }
    let document = document(&app);
    let paths = document["paths"].as_object().unwrap();
    let documented: BTreeMap<String, BTreeSet<String>> = paths
        .iter()
        .map(|(path, entry)| {
            (
                path.clone(),
                entry.as_object().unwrap().keys().cloned().collect(),
            )
        })
        .collect();
    assert_eq!(
        documented, served,
        "add or remove rows of `openapi/operations.rs`"
    );
    let rows: BTreeSet<&str> = OPERATIONS.iter().map(|row| row.path).collect();
    let unknown: Vec<&&str> = rows
        .iter()
        .filter(|path| !served.contains_key(**path))
        .collect();
    assert!(unknown.is_empty(), "rows without routes: {unknown:?}");
    for (path, ..) in QUERIES {
        assert!(served.contains_key(*path), "query of no route: {path}");
    }
}

#[tokio::test]
async fn every_reference_leads_somewhere_and_every_id_is_unique() {
    let directory = tempfile::tempdir().unwrap();
    let document = document(&app(directory.path()));
    let text = document.to_string();
    for reference in text.split("\"#/").skip(1) {
        let pointer = format!("/{}", reference.split('"').next().unwrap());
        assert!(document.pointer(&pointer).is_some(), "{pointer}");
    }
    let ids: Vec<&str> = text.split("\"operationId\":\"").skip(1).collect();
    let ids: Vec<&str> = ids.iter().map(|id| id.split('"').next().unwrap()).collect();
    let unique: BTreeSet<&&str> = ids.iter().collect();
    assert_eq!(unique.len(), ids.len());
    assert_eq!(document.get("security"), None);
}
