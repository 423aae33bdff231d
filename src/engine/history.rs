//! Jobs on disk: what was asked for, how far it is, what came of it. They outlive the process.
//!
//! Invariants: a job is committed before its client is told that it was accepted; states only go forward (`queued` to
//! `running` to one of the three ends); a job that a crash caught running is taken up once more and then given up, so every
//! accepted job ends exactly once. `SQLite` in WAL mode: what is committed survives a kill of the process at any moment. All
//! methods block on the disk: not for async threads.

mod record;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use record::read as as_record;
pub use record::{End, Filter, NewJob, Record, State};
use rusqlite::{Connection, OptionalExtension, params};

/// Runs of a job: the first, and one more after a crash.
const MOST_ATTEMPTS: u32 = 2;
/// How long another process may hold the file.
const BUSY: Duration = Duration::from_secs(5);

/// What can go wrong with the file.
#[derive(Debug, thiserror::Error)]
#[error("job history `{}`: {source}; repair or remove the file", path.display())]
pub struct Error {
    path: PathBuf,
    source: rusqlite::Error,
}

/// The file of jobs.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    connection: Mutex<Connection>,
}

const COLUMNS: &str =
    "id, kind, client, state, title, attempts, created, started, finished, result, error, webhook";

impl History {
    /// Opens or makes the file.
    ///
    /// # Errors
    /// It cannot be opened or is no database.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error {
            path: path.to_path_buf(),
            source,
        };
        let connection = Connection::open(path).map_err(fail)?;
        prepare(&connection).map_err(fail)?;
        Ok(Self {
            path: path.to_path_buf(),
            connection: Mutex::new(connection),
        })
    }

    /// Accepts a job. `false` if there is one of this name already.
    ///
    /// # Errors
    /// The file cannot be written: the job is not accepted.
    pub fn accept(&self, job: &NewJob) -> Result<bool, Error> {
        self.with(|db| {
            let mut insert = db.prepare_cached(
                "INSERT INTO jobs (id, kind, client, state, title, created, request, webhook)
                 VALUES (?1, ?2, ?3, 'queued', ?4, ?5, ?6, ?7) ON CONFLICT (id) DO NOTHING",
            )?;
            let rows = insert.execute(params![
                job.id,
                job.kind,
                job.client,
                job.title,
                now(),
                job.request,
                job.webhook
            ])?;
            Ok(rows == 1)
        })
    }

    /// Notes that a queued job is begun. `false` if it is not queued any more: then it must not be.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(&self, id: &str) -> Result<bool, Error> {
        self.with(|db| {
            let rows = db
                .prepare_cached(
                    "UPDATE jobs SET state = 'running', attempts = attempts + 1, started = ?2
                     WHERE id = ?1 AND state = 'queued'",
                )?
                .execute(params![id, now()])?;
            Ok(rows == 1)
        })
    }

    /// Notes how a job ended; its request is forgotten but for what can be shown. `false` if it had ended already.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn end(&self, id: &str, end: &End) -> Result<bool, Error> {
        let (state, result, error) = match end {
            End::Done(result) => (State::Done, Some(result.to_string()), None),
            End::Failed(reason) => (State::Failed, None, Some(reason)),
            End::Cancelled => (State::Cancelled, None, None),
        };
        self.with(|db| {
            let rows = db
                .prepare_cached(
                    "UPDATE jobs SET state = ?2, result = ?3, error = ?4, finished = ?5
                     WHERE id = ?1 AND state IN ('queued', 'running')",
                )?
                .execute(params![id, state, result, error, now()])?;
            Ok(rows == 1)
        })
    }

    /// Takes a queued job back. `false` if it is not queued.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn cancel_queued(&self, id: &str) -> Result<bool, Error> {
        self.with(|db| {
            let rows = db
                .prepare_cached(
                    "UPDATE jobs SET state = 'cancelled', finished = ?2
                     WHERE id = ?1 AND state = 'queued'",
                )?
                .execute(params![id, now()])?;
            Ok(rows == 1)
        })
    }

    /// Puts a running job back in line, as if it had not been begun: the server ends, not the job.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_back(&self, id: &str) -> Result<(), Error> {
        self.with(|db| {
            db.prepare_cached(
                "UPDATE jobs SET state = 'queued', attempts = max(attempts - 1, 0)
                 WHERE id = ?1 AND state = 'running'",
            )?
            .execute([id])
            .map(drop)
        })
    }

    /// Puts the jobs that the last process left running back in line, or gives those up that it is not the first to leave,
    /// and returns all queued ones, oldest first. To be called once, before any job is begun.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn recover(&self) -> Result<Vec<Record>, Error> {
        self.with(|db| {
            db.execute(
                "UPDATE jobs SET state = 'failed', finished = ?1,
                 error = 'the server ended twice while this job ran; it is not tried a third time'
                 WHERE state = 'running' AND attempts >= ?2",
                params![now(), MOST_ATTEMPTS],
            )?;
            db.execute(
                "UPDATE jobs SET state = 'queued' WHERE state = 'running'",
                [],
            )?;
            let sql = format!("SELECT {COLUMNS} FROM jobs WHERE state = 'queued' ORDER BY number");
            let mut select = db.prepare(&sql)?;
            select.query_map([], as_record)?.collect()
        })
    }

    /// A job.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn get(&self, id: &str) -> Result<Option<Record>, Error> {
        self.with(|db| {
            let sql = format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1");
            db.prepare_cached(&sql)?
                .query_row([id], as_record)
                .optional()
        })
    }

    /// The body of a job's request, JSON.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn request(&self, id: &str) -> Result<Option<String>, Error> {
        self.with(|db| {
            db.prepare_cached("SELECT request FROM jobs WHERE id = ?1")?
                .query_row([id], |row| row.get(0))
                .optional()
        })
    }

    /// Jobs, newest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn list(&self, filter: &Filter) -> Result<Vec<Record>, Error> {
        self.with(|db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM jobs WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR client = ?2)
                 AND (?3 IS NULL OR instr(lower(title), lower(?3)) > 0)
                 AND (?4 IS NULL OR number < (SELECT number FROM jobs WHERE id = ?4))
                 ORDER BY number DESC LIMIT ?5"
            );
            let mut select = db.prepare_cached(&sql)?;
            let Filter {
                state,
                client,
                search,
                before,
                limit,
            } = filter;
            select
                .query_map(params![state, client, search, before, limit], as_record)?
                .collect()
        })
    }

    /// Jobs in each state.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn counts(&self) -> Result<Vec<(State, u64)>, Error> {
        self.with(|db| {
            db.prepare_cached("SELECT state, count(*) FROM jobs GROUP BY state")?
                .query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?
                .collect()
        })
    }

    /// Forgets a job that has ended. `None` if there is none such.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn forget(&self, id: &str) -> Result<Option<Record>, Error> {
        let found = self.get(id)?.filter(|record| record.state.is_end());
        if found.is_some() {
            self.with(|db| db.execute("DELETE FROM jobs WHERE id = ?1", [id]))?;
        }
        Ok(found)
    }

    /// Forgets the oldest ended jobs beyond `keep`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn prune(&self, keep: u32) -> Result<usize, Error> {
        self.with(|db| {
            db.prepare_cached(
                "DELETE FROM jobs WHERE number <= (SELECT number FROM jobs
                 WHERE state IN ('done', 'failed', 'cancelled') ORDER BY number DESC LIMIT 1 OFFSET ?1)
                 AND state IN ('done', 'failed', 'cancelled')",
            )?
            .execute([keep])
        })
    }

    /// Ended jobs whose end was not announced yet, oldest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn unannounced(&self) -> Result<Vec<Record>, Error> {
        self.with(|db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM jobs WHERE webhook IS NOT NULL AND announced = 0
                 AND state IN ('done', 'failed', 'cancelled') ORDER BY number"
            );
            let mut select = db.prepare(&sql)?;
            select.query_map([], as_record)?.collect()
        })
    }

    /// Notes that a job's end was announced, or that nobody listens.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn announced(&self, id: &str) -> Result<(), Error> {
        self.with(|db| {
            db.prepare_cached("UPDATE jobs SET announced = 1 WHERE id = ?1")?
                .execute([id])
                .map(drop)
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        let db: MutexGuard<'_, Connection> = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        work(&db).map_err(|source| Error {
            path: self.path.clone(),
            source,
        })
    }
}

fn prepare(db: &Connection) -> rusqlite::Result<()> {
    db.busy_timeout(BUSY)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    let version: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version == 0 {
        db.execute_batch(
            "BEGIN;
             CREATE TABLE jobs (
                 number INTEGER PRIMARY KEY AUTOINCREMENT,
                 id TEXT NOT NULL UNIQUE,
                 kind TEXT NOT NULL,
                 client TEXT NOT NULL,
                 state TEXT NOT NULL,
                 title TEXT NOT NULL,
                 attempts INTEGER NOT NULL DEFAULT 0,
                 created INTEGER NOT NULL,
                 started INTEGER,
                 finished INTEGER,
                 request TEXT NOT NULL,
                 result TEXT,
                 error TEXT,
                 webhook TEXT,
                 announced INTEGER NOT NULL DEFAULT 0
             );
             CREATE INDEX jobs_by_state ON jobs (state, number);
             PRAGMA user_version = 1;
             COMMIT;",
        )?;
    }
    Ok(())
}

/// Milliseconds since 1970.
fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use serde_json::json;

    fn open() -> (tempfile::TempDir, History) {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(&dir.path().join("jobs.sqlite")).unwrap();
        (dir, history)
    }

    fn accept(history: &History, id: &str) {
        let job = NewJob {
            id: id.into(),
            kind: "txt2img".into(),
            client: "someone".into(),
            request: json!({ "prompt": id }).to_string(),
            title: format!("A picture of {id}"),
            webhook: None,
        };
        assert!(history.accept(&job).unwrap());
        assert!(!history.accept(&job).unwrap(), "a name is taken once");
    }

    #[test]
    fn states_only_go_forward() {
        let (_dir, history) = open();
        accept(&history, "a");
        assert!(history.begin("a").unwrap() && !history.begin("a").unwrap());
        assert!(!history.cancel_queued("a").unwrap());
        let done = End::Done(json!({ "files": ["a.png"] }));
        assert!(history.end("a", &done).unwrap());
        assert!(!history.end("a", &End::Cancelled).unwrap());
        let record = history.get("a").unwrap().unwrap();
        assert_eq!((record.state, record.attempts), (State::Done, 1));
        assert_eq!(record.result.unwrap()["files"][0], "a.png");
        assert_eq!(history.request("a").unwrap().unwrap(), r#"{"prompt":"a"}"#);
    }

    #[test]
    fn what_a_crash_leaves_is_tried_once_more_and_then_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs.sqlite");
        let open = || History::open(&path).unwrap();
        let history = open();
        for id in ["first", "second", "third"] {
            accept(&history, id);
        }
        let ids = |history: &History| -> Vec<String> {
            let queued = history.recover().unwrap();
            queued.into_iter().map(|record| record.id).collect()
        };
        assert!(history.begin("first").unwrap());
        drop(history);
        let history = open();
        assert_eq!(ids(&history), ["first", "second", "third"]);
        assert!(history.begin("first").unwrap());
        drop(history);
        let history = open();
        assert_eq!(ids(&history), ["second", "third"]);
        let first = history.get("first").unwrap().unwrap();
        assert_eq!(first.state, State::Failed);
        assert!(first.error.unwrap().contains("twice"));
    }

    #[test]
    fn lists_are_filtered_paged_and_pruned() {
        let (_dir, history) = open();
        for id in ["ant", "bee", "cat", "dog"] {
            accept(&history, id);
            history.begin(id).unwrap();
        }
        for id in ["ant", "bee", "cat"] {
            history.end(id, &End::Failed("no".into())).unwrap();
        }
        let list = |filter: Filter| -> Vec<String> {
            let filter = Filter { limit: 2, ..filter };
            let found = history.list(&filter).unwrap();
            found.into_iter().map(|record| record.id).collect()
        };
        assert_eq!(list(Filter::default()), ["dog", "cat"]);
        let before = Some("cat".to_string());
        assert_eq!(
            list(Filter {
                before,
                ..Filter::default()
            }),
            ["bee", "ant"]
        );
        let search = Some("OF BE".to_string());
        assert_eq!(
            list(Filter {
                search,
                ..Filter::default()
            }),
            ["bee"]
        );
        let state = Some(State::Running);
        assert_eq!(
            list(Filter {
                state,
                ..Filter::default()
            }),
            ["dog"]
        );
        assert_eq!(history.prune(1).unwrap(), 2);
        assert_eq!(list(Filter::default()), ["dog", "cat"]);
        assert!(history.forget("dog").unwrap().is_none(), "it runs");
        assert!(history.forget("cat").unwrap().is_some());
        assert_eq!(history.counts().unwrap(), [(State::Running, 1)]);
    }

    #[test]
    fn ends_are_announced_once() {
        let (_dir, history) = open();
        let job = NewJob {
            id: "a".into(),
            kind: "txt2img".into(),
            client: String::new(),
            request: "null".into(),
            title: String::new(),
            webhook: Some("http://example.com/".into()),
        };
        history.accept(&job).unwrap();
        assert!(history.unannounced().unwrap().is_empty());
        history.end("a", &End::Cancelled).unwrap();
        assert_eq!(history.unannounced().unwrap().len(), 1);
        history.announced("a").unwrap();
        assert!(history.unannounced().unwrap().is_empty());
    }

    #[test]
    fn a_file_that_is_no_database_is_an_error_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs.sqlite");
        std::fs::write(&path, b"not a database, but a text that is long enough").unwrap();
        let error = History::open(&path).unwrap_err().to_string();
        assert!(error.contains("repair or remove"), "{error}");
        assert!(std::fs::read(&path).unwrap().starts_with(b"not a"));
    }
}
