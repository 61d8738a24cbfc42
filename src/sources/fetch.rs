//! Files that a server has: fetched once, to the cache.
//!
//! What has come so far is kept: whoever comes after an interruption goes on where it ended.

mod http;
mod part;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use formats::Progress;

use self::http::{Answer, Client, Trouble};
use self::part::Part;
use crate::config::{HostFile, size};
use crate::digest::{self, Digest};
use crate::{Error, Result, messages, progress};

/// How patient one is, and with how much.
#[derive(Clone)]
struct Limits {
    /// For a connection, and for each sign of life after that.
    silence: Duration,
    /// So many times in a row without a new byte, and it is given up.
    attempts: u32,
    /// Before the second attempt; twice as long before each further one.
    pause: Duration,
    /// How many bytes may be written where the file is to be.
    room: fn(&File) -> io::Result<u64>,
}

const LIMITS: Limits = Limits {
    silence: Duration::from_secs(30),
    attempts: 5,
    pause: Duration::from_millis(250),
    room: free_space,
};

/// What is free for us, less what others on the host should find.
fn free_space(file: &File) -> io::Result<u64> {
    const LEFT: u64 = 64 << 20;
    let stat = rustix::fs::fstatvfs(file)?;
    Ok((stat.f_bavail.saturating_mul(stat.f_frsize)).saturating_sub(LEFT))
}

/// Fetches a file of a VM's from its URL to its place. `key` is the file's, for errors.
pub(super) fn fetch(key: &str, file: &HostFile, url: &str) -> Result<()> {
    let Some(digest) = file.sha256 else {
        // The configuration has no URL without one.
        return Err(Error::usage(format!("`url` is {url}, without `sha256`")).about(key));
    };
    let source = Source {
        url,
        place: &file.path,
        digest,
        limits: LIMITS,
    };
    source.fetch().map_err(|failure| match failure {
        Failure::Url(error) => error.about(format!("{key}.url")),
        Failure::Digest(error) => error.about(format!("{key}.sha256")),
    })
}

/// What is fetched, where to.
struct Source<'a> {
    url: &'a str,
    place: &'a Path,
    digest: Digest,
    limits: Limits,
}

/// What went wrong, and with which key.
#[derive(Debug)]
enum Failure {
    Url(Error),
    Digest(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Url(error)
    }
}

impl Source<'_> {
    fn fetch(&self) -> Result<(), Failure> {
        let Some(mut part) = Part::lock(self.place)? else {
            return Ok(());
        };
        messages::say(format_args!("launcher: fetching {}", self.url));
        let client = Client::new(self.limits.silence);
        // Of what was there before, nobody knows how it came about.
        let mut begun = part.len()? > 0;
        loop {
            self.download(&client, &mut part)?;
            let found = part.sync().and_then(|()| digest::of(part.path()))?;
            if found == self.digest {
                return Ok(part.becomes(self.place)?);
            }
            if !begun {
                part.remove()?;
                let message = format!(
                    "`sha256` is {}, but {} gives {found}",
                    self.digest, self.url
                );
                let help = format!(
                    "if the server has another version now, check it, then write \
                     `sha256 = \"{found}\"`"
                );
                return Err(Failure::Digest(Error::usage(message).help(help)));
            }
            part.cut(0)?;
            messages::say(
                "launcher: what an earlier start has left of it is of no use: fetching it whole",
            );
            begun = false;
        }
    }

    /// Gets the whole file into `part`, however often the connection ends.
    fn download(&self, client: &Client, part: &mut Part) -> Result<()> {
        let mut furthest = part.len()?;
        let mut failures = 0;
        loop {
            let why = match self.attempt(client, part) {
                Ok(()) => return Ok(()),
                Err(Trouble::Lasting(error)) => return Err(error),
                Err(Trouble::Passing(why)) => why,
            };
            let len = part.len()?;
            failures = match len > furthest {
                true => 1,
                false => failures + 1,
            };
            furthest = furthest.max(len);
            if failures >= self.limits.attempts {
                let message = format!("cannot fetch {}: {why}", self.url);
                let mut error = Error::failed(message);
                if len > 0 {
                    let len = size::show(len);
                    error = error.help(format!("{len} are kept: the next start goes on there"));
                }
                return Err(error);
            }
            tracing::warn!("{}: {why}; trying again", self.url);
            std::thread::sleep(self.limits.pause * (1 << (failures - 1)));
        }
    }

    /// Gets what is missing of `part`, or fails on the way with what has come kept.
    fn attempt(&self, client: &Client, part: &mut Part) -> Result<(), Trouble> {
        /// So much is written between two looks at the room, in bytes.
        const STRIDE: u64 = 16 << 20;
        let (start, total, mut body) = match client.get(self.url, part.len()?)? {
            Answer::Body { start, total, body } => (start, total, body),
            // The digest tells whether that is so.
            Answer::NothingMore => return Ok(()),
        };
        part.cut(start)?;
        if let Some(total) = total {
            let len = total.saturating_sub(start);
            self.fits(part, len, || format!("it takes {} more", size::show(len)))?;
        }
        let show = progress::fetching(total.is_some());
        let (begin, mut done, mut looked) = (Instant::now(), start, start);
        let mut piece = vec![0; 128 << 10];
        loop {
            let count = match body.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(http::broken(error)),
            };
            let more = done + count as u64;
            if let Some(total) = total
                && more > total
            {
                let message = format!(
                    "{} sends more than the {total} bytes that it said",
                    self.url
                );
                return Err(Trouble::Lasting(Error::failed(message)));
            }
            if total.is_none() && more > looked + STRIDE {
                looked = more;
                self.fits(part, STRIDE, || format!("{done} bytes were not the end"))?;
            }
            part.write(&piece[..count])?;
            done = more;
            show(&Progress {
                path: self.place,
                done,
                total: total.unwrap_or(u64::MAX),
                elapsed: begin.elapsed(),
            });
        }
        match total {
            Some(total) if done < total => Err(Trouble::Passing(format!(
                "the connection has ended after {done} of {total} bytes"
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses what the file system has no room for.
    fn fits(&self, part: &Part, len: u64, what: impl Fn() -> String) -> Result<()> {
        let room = (self.limits.room)(part.file()).map_err(part.failed("look at"))?;
        if len <= room {
            return Ok(());
        }
        let (url, what, room) = (self.url, what(), size::show(room));
        let path = part.path().display();
        Err(Error::failed(format!(
            "cannot fetch {url}: {what}, and there is room for {room}"
        ))
        .help(format!(
            "make room on the file system of {path}, or set XDG_CACHE_HOME to another"
        )))
    }
}
