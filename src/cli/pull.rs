//! Downloading a checkpoint: from the Hugging Face hub or a plain address, resumable and verified.
//!
//! The bytes go to `<name>.part`, which the next call continues; only a file of the announced size and hash gets its name. The
//! hub is asked for size and SHA-256 through hf-hub; the transfer itself is the same for both, since hf-hub appends whatever
//! a server sends and checks nothing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;

use super::Verbosity;
use crate::engine::{hashes, hub};

/// Where to get a file and what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Remote {
    url: String,
    file_name: String,
    /// For the hub only; never sent to another host.
    token: Option<String>,
    size: Option<u64>,
    sha256: Option<String>,
}

/// Downloads `source` into `directory` and returns the file's path. A file that is already complete is left alone.
///
/// # Errors
/// The source is not understood, not reachable, or delivered something else than was announced.
pub fn pull(
    source: &str,
    directory: &Path,
    sha256: Option<&str>,
    verbosity: Verbosity,
) -> anyhow::Result<PathBuf> {
    let mut remote = locate(source)?;
    if let Some(wanted) = sha256 {
        let wanted = wanted.trim().to_ascii_lowercase();
        ensure!(hub::is_sha256(&wanted), "not a SHA-256: `{wanted}`");
        if let Some(announced) = remote
            .sha256
            .as_ref()
            .filter(|announced| **announced != wanted)
        {
            bail!("the hub announces SHA-256 `{announced}`, not `{wanted}`");
        }
        remote.sha256 = Some(wanted);
    }
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create `{}`", directory.display()))?;
    let target = directory.join(&remote.file_name);
    if target.exists() {
        verify(&target, &remote).with_context(|| {
            format!(
                "`{}` exists and is not the file of that address; move it away first",
                target.display()
            )
        })?;
        return Ok(target);
    }
    let partial = directory.join(format!("{}.part", remote.file_name));
    transfer(&remote, &partial, verbosity)?;
    if let Err(error) = verify(&partial, &remote) {
        // Continuing wrong bytes would never end well.
        fs::remove_file(&partial)?;
        return Err(error.context("the download was discarded; start it again"));
    }
    fs::rename(&partial, &target)
        .with_context(|| format!("cannot write `{}`", target.display()))?;
    Ok(target)
}

fn locate(source: &str) -> anyhow::Result<Remote> {
    if source.starts_with("https://") || source.starts_with("http://") {
        let path = source.split(['?', '#']).next().unwrap_or(source);
        let file_name = file_name(path.rsplit('/').next().unwrap_or_default(), source)?;
        return Ok(Remote {
            url: source.to_string(),
            file_name,
            token: None,
            size: None,
            sha256: None,
        });
    }
    let mut parts = source.splitn(3, '/');
    let (Some(owner), Some(repo), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
        bail!("not a source: `{source}`; use `owner/repo/file.safetensors` or an https address");
    };
    let file_name = file_name(file.rsplit('/').next().unwrap_or_default(), source)?;
    locate_on_hub(&format!("{owner}/{repo}"), file, file_name)
}

fn locate_on_hub(repo: &str, file: &str, file_name: String) -> anyhow::Result<Remote> {
    let found = hub::locate(repo, file)
        .with_context(|| format!("not found on the hub: `{repo}/{file}`"))?;
    Ok(Remote {
        url: found.url,
        file_name,
        token: found.token,
        size: Some(found.size),
        sha256: found.sha256,
    })
}

/// A plain name that ends in `.safetensors`: nothing of the address reaches the path otherwise.
fn file_name(name: &str, source: &str) -> anyhow::Result<String> {
    let is_safe = name.len() > ".safetensors".len()
        && !name.starts_with('.')
        && !name.contains(['\\', '%', '\0']);
    ensure!(
        is_safe && name.to_ascii_lowercase().ends_with(".safetensors"),
        "not the address of a .safetensors file: `{source}`"
    );
    Ok(name.to_string())
}

/// Appends what is missing of `partial`.
fn transfer(remote: &Remote, partial: &Path, verbosity: Verbosity) -> anyhow::Result<()> {
    let mut have = fs::metadata(partial).map_or(0, |meta| meta.len());
    if remote.size.is_some_and(|size| have >= size) {
        return Ok(());
    }
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .build()
        .into();
    let mut request = agent.get(&remote.url);
    if let Some(token) = &remote.token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    if have > 0 {
        request = request.header("range", format!("bytes={have}-"));
    }
    let mut response = request
        .call()
        .with_context(|| format!("cannot reach `{}`", remote.url))?;
    match response.status().as_u16() {
        206 => {}
        // The server starts from the beginning, so do we.
        200 => have = 0,
        // Nothing is missing; the check afterwards decides.
        416 if have > 0 => return Ok(()),
        status => bail!("`{}` answered {status}", remote.url),
    }
    let length = response.body().content_length();
    let total = remote.size.or_else(|| length.map(|length| have + length));
    let mut file = if have > 0 {
        OpenOptions::new().append(true).open(partial)
    } else {
        File::create(partial)
    }
    .with_context(|| format!("cannot write `{}`", partial.display()))?;
    let bar = verbosity.bar(
        total,
        "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} (eta {eta})",
    );
    bar.set_position(have);
    copy(response.body_mut().as_reader(), &mut file, &bar).with_context(|| {
        format!(
            "the download stopped after {} bytes; start it again to continue",
            bar.position()
        )
    })?;
    file.sync_data()?;
    bar.finish_and_clear();
    if let Some(total) = total {
        let got = fs::metadata(partial)?.len();
        ensure!(
            got >= total,
            "the download stopped after {got} of {total} bytes; start it again to continue"
        );
    }
    Ok(())
}

fn copy(mut from: impl Read, to: &mut File, bar: &ProgressBar) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..read])?;
        bar.inc(read as u64);
    }
}

fn verify(path: &Path, remote: &Remote) -> anyhow::Result<()> {
    let size = fs::metadata(path)?.len();
    if let Some(wanted) = remote.size {
        ensure!(
            size == wanted,
            "`{}` has {size} bytes, not {wanted}",
            path.display()
        );
    }
    if let Some(wanted) = &remote.sha256 {
        let hash = hashes::sha256(path)?;
        ensure!(
            hash == *wanted,
            "`{}` has SHA-256 `{hash}`, not `{wanted}`",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_safetensors_names_are_taken() {
        let name = |source: &str| {
            locate(source)
                .map(|remote| remote.file_name)
                .map_err(|error| error.to_string())
        };
        assert_eq!(
            name("https://x.org/a/b.safetensors?download=1").unwrap(),
            "b.safetensors"
        );
        for bad in [
            "https://x.org/a.ckpt",
            "https://x.org/..%2fb.safetensors",
            "https://x.org/.safetensors",
            "https://x.org/",
        ] {
            assert_eq!(
                name(bad).unwrap_err(),
                format!("not the address of a .safetensors file: `{bad}`")
            );
        }
        let error = name("file.safetensors").unwrap_err();
        assert_eq!(
            error,
            "not a source: `file.safetensors`; use `owner/repo/file.safetensors` or an https address"
        );
    }
}
