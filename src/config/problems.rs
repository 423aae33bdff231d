//! What settings must hold, setting by setting; [`super::Config::validate`] collects it.

use super::{Limits, Problem, SHORTEST_TOKEN, Server};

/// A problem with `key` unless all is well.
pub(super) fn must(ok: bool, key: &str, message: impl FnOnce() -> String) -> Option<Problem> {
    (!ok).then(|| Problem {
        key: key.into(),
        message: message(),
    })
}

impl Server {
    pub(super) fn problems(&self) -> Vec<Problem> {
        let one = || "must be at least 1".to_string();
        let mut problems = Vec::new();
        problems.extend(must(!self.host.is_empty(), "server.host", || {
            "must not be empty; use `127.0.0.1` or `0.0.0.0`".into()
        }));
        for (index, pair) in self.api_auth.iter().enumerate() {
            let pair = pair.expose().split_once(':');
            let good = pair.is_some_and(|(user, _)| !user.is_empty());
            problems.extend(must(good, "server.api_auth", || {
                format!("entry {} must have the form `user:password`", index + 1)
            }));
        }
        for (index, token) in self.api_tokens.iter().enumerate() {
            let good = token.expose().len() >= SHORTEST_TOKEN;
            problems.extend(must(good, "server.api_tokens", || {
                format!("entry {} must have {SHORTEST_TOKEN} characters", index + 1)
            }));
        }
        if let Some(pattern) = &self.cors_allow_origins_regex
            && let Err(error) = regex::Regex::new(pattern)
        {
            problems.extend(must(false, "server.cors_allow_origins_regex", || {
                format!("not a regular expression: `{pattern}`: {error}")
            }));
        }
        let (body, queue) = (self.body_limit_mib >= 1, self.queue_limit >= 1);
        problems.extend(must(body, "server.body_limit_mib", one));
        let memory = self.body_memory_mib >= self.body_limit_mib;
        problems.extend(must(memory, "server.body_memory_mib", || {
            format!(
                "must be at least `server.body_limit_mib`: `{}`",
                self.body_memory_mib
            )
        }));
        problems.extend(must(self.keep_alive_s >= 1, "server.keep_alive_s", one));
        problems.extend(must(queue, "server.queue_limit", one));
        problems
    }
}

impl Limits {
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        [
            ("limits.max_side", self.max_side, 64),
            ("limits.max_megapixels", self.max_megapixels, 1),
            ("limits.max_steps", self.max_steps, 1),
            ("limits.max_batch_size", self.max_batch_size, 1),
            ("limits.max_batch_count", self.max_batch_count, 1),
            ("limits.max_prompt_kib", self.max_prompt_kib, 1),
        ]
        .into_iter()
        .filter_map(|(key, value, least)| {
            must(value >= least, key, || {
                format!("must be at least {least}: `{value}`")
            })
        })
    }
}
