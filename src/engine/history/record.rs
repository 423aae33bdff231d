//! A job as the history knows it: what was asked for, the states it goes through, how it ended.

use rusqlite::Row;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use serde_json::Value;

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// In line.
    Queued,
    /// On the device.
    Running,
    /// Its pictures are there.
    Done,
    /// It ended without, for a reason.
    Failed,
    /// Its client took it back.
    Cancelled,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Done,
        Self::Failed,
        Self::Cancelled,
    ];

    /// As it is stored and shown.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing comes after it.
    #[must_use]
    pub const fn is_end(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

impl ToSql for State {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.name().into())
    }
}

impl FromSql for State {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let text = value.as_str()?;
        let mut all = Self::ALL.into_iter();
        all.find(|state| state.name() == text)
            .ok_or(FromSqlError::InvalidType)
    }
}

/// A job as it is accepted.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    /// Its name; unique.
    pub id: String,
    /// `txt2img`, ….
    pub kind: String,
    /// Who asked.
    pub client: String,
    /// The body of the request, JSON.
    pub request: String,
    /// Text that lists show and searches find.
    pub title: String,
    /// Where its end is announced.
    pub webhook: Option<String>,
}

/// A job as it is remembered.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Its name.
    pub id: String,
    /// `txt2img`, ….
    pub kind: String,
    /// Who asked.
    pub client: String,
    /// Where it is.
    pub state: State,
    /// Text that lists show.
    pub title: String,
    /// Times it was begun.
    pub attempts: u32,
    /// Milliseconds since 1970.
    pub created: i64,
    /// Milliseconds since 1970 of the last beginning.
    pub started: Option<i64>,
    /// Milliseconds since 1970.
    pub finished: Option<i64>,
    /// What came of it.
    pub result: Option<Value>,
    /// Why it failed.
    pub error: Option<String>,
    /// Where its end is announced.
    pub webhook: Option<String>,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// With pictures.
    Done(Value),
    /// For this reason.
    Failed(String),
    /// On request.
    Cancelled,
}

/// Which jobs a list shows, newest first.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only in this state.
    pub state: Option<State>,
    /// Only of this client.
    pub client: Option<String>,
    /// Only with this text in the title.
    pub search: Option<String>,
    /// Only those accepted before this one.
    pub before: Option<String>,
    /// At most so many.
    pub limit: u32,
}

/// A row of [`super::COLUMNS`].
pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Record> {
    let result: Option<String> = row.get(9)?;
    Ok(Record {
        id: row.get(0)?,
        kind: row.get(1)?,
        client: row.get(2)?,
        state: row.get(3)?,
        title: row.get(4)?,
        attempts: row.get(5)?,
        created: row.get(6)?,
        started: row.get(7)?,
        finished: row.get(8)?,
        result: result.and_then(|text| serde_json::from_str(&text).ok()),
        error: row.get(10)?,
        webhook: row.get(11)?,
    })
}
