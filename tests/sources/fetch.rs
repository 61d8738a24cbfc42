//! What is fetched, by http.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use super::server::{Server, head, status, whole};
use super::{Folder, content, sha256};

/// The file of a VM whose kernel is fetched.
fn vm(url: &str, sha256: &str) -> String {
    format!("[boot.kernel]\nurl = \"{url}\"\nsha256 = \"{sha256}\"\n")
}

/// A folder for what `server` has as `vmlinuz`.
fn folder_for(server: &Server) -> Folder {
    Folder::new(&vm(&server.url("vmlinuz"), &sha256(&content())))
}

#[test]
fn a_file_is_fetched_to_the_cache_once_and_nobody_is_to_write_it() {
    let content = content();
    let digest = sha256(&content);
    let server = Server::start({
        let content = content.clone();
        move |request, stream| whole(request, stream, &content)
    });
    let folder = folder_for(&server);
    let done = folder.launcher(&["prepare"]);
    let place = format!("DIR/cache/launcher/files/{digest}/vmlinuz");
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(
        done.out,
        format!("boot.kernel  fetched, verified  {place}\n")
    );
    let url = server.url("vmlinuz");
    assert_eq!(done.err, format!("launcher: fetching {url}\n"));
    let cached = folder.cached(&digest, "vmlinuz");
    assert_eq!(fs::read(&cached).unwrap(), content);
    assert!(fs::metadata(&cached).unwrap().permissions().readonly());
    assert_eq!(
        fs::read_dir(cached.parent().unwrap()).unwrap().count(),
        1,
        "nothing else is left"
    );

    let done = folder.launcher(&["prepare"]);
    assert_eq!(
        done.out,
        format!("boot.kernel  present, verified  {place}\n")
    );
    assert_eq!((done.code, &*done.err), (0, ""));
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_file_of_no_declared_length_is_what_comes_until_the_end() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |_, stream| {
            write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            stream.write_all(&content)
        }
    });
    let folder = folder_for(&server);
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 0, "{done:?}");
    let cached = folder.cached(&sha256(&content), "vmlinuz");
    assert_eq!(fs::read(cached).unwrap(), content);
}

#[test]
fn after_a_dropped_connection_the_rest_is_fetched() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request, stream| {
            head(request, stream, &content)?;
            let from = request.from.unwrap_or(0);
            match request.number {
                0 | 1 => stream.write_all(&content[from..from + 100_000]),
                _ => stream.write_all(&content[from..]),
            }
        }
    });
    let folder = folder_for(&server);
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(done.err.contains("; trying again"), "{}", done.err);
    assert_eq!(server.ranges(), [None, Some(100_000), Some(200_000)]);
    let cached = folder.cached(&sha256(&content), "vmlinuz");
    assert_eq!(fs::read(cached).unwrap(), content);
}

#[test]
fn a_server_without_ranges_begins_anew() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request, stream| {
            let request = super::server::Request {
                from: None,
                ..request.clone()
            };
            head(&request, stream, &content)?;
            match request.number {
                0 => stream.write_all(&content[..100_000]),
                _ => stream.write_all(&content),
            }
        }
    });
    let folder = folder_for(&server);
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(server.ranges(), [None, Some(100_000)]);
    let cached = folder.cached(&sha256(&content), "vmlinuz");
    assert_eq!(fs::read(cached).unwrap(), content);
}

#[test]
fn the_next_start_goes_on_where_a_killed_one_was() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request, stream| {
            head(request, stream, &content)?;
            match request.number {
                0 => {
                    stream.write_all(&content[..100_000])?;
                    stream.flush()?;
                    thread::sleep(Duration::from_secs(2));
                    Ok(())
                }
                _ => stream.write_all(&content[request.from.unwrap_or(0)..]),
            }
        }
    });
    let folder = folder_for(&server);
    let mut killed = folder.command(&["prepare"]);
    let mut killed = killed.stderr(Stdio::null()).spawn().unwrap();
    let part = folder.cached(&sha256(&content), "vmlinuz.part");
    let begin = Instant::now();
    while fs::metadata(&part).map_or(0, |meta| meta.len()) < 100_000 {
        assert!(begin.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(10));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(server.ranges(), [None, Some(100_000)]);
    assert!(!part.exists());
}

#[test]
fn what_an_earlier_start_has_left_is_thrown_away_if_it_is_not_of_this_file() {
    let content = content();
    let digest = sha256(&content);
    for left in [
        vec![7; 1000],
        vec![7; content.len()],
        vec![7; content.len() + 1],
    ] {
        let server = Server::start({
            let content = content.clone();
            move |request, stream| match request.from {
                Some(from) if from >= content.len() => status(stream, "416 Range Not Satisfiable"),
                _ => whole(request, stream, &content),
            }
        });
        let folder = folder_for(&server);
        let part = format!("cache/launcher/files/{digest}/vmlinuz.part");
        folder.write(&part, &left);
        let done = folder.launcher(&["prepare"]);
        assert_eq!(done.code, 0, "{done:?}");
        assert!(
            done.err.contains("is of no use: fetching it whole"),
            "{}",
            done.err
        );
        assert_eq!(server.ranges(), [Some(left.len()), None]);
        assert_eq!(
            fs::read(folder.cached(&digest, "vmlinuz")).unwrap(),
            content
        );
    }
}

#[test]
fn a_file_of_another_digest_is_refused_with_both_and_not_kept() {
    let server = Server::start(|request, stream| whole(request, stream, b"another"));
    let folder = folder_for(&server);
    let done = folder.launcher(&["prepare"]);
    let (expected, found) = (sha256(&content()), sha256(b"another"));
    assert_eq!(done.code, 2);
    let url = server.url("vmlinuz");
    assert_eq!(
        done.err,
        format!(
            "launcher: fetching {url}\n\
             error: `sha256` is {expected}, but {url} gives {found}\n --> vm.toml:3:10\n  |\n\
             3 | sha256 = \"{expected}\"\n  |          {}\n  |\n  = help: if the server has \
             another version now, check it, then write `sha256 = \"{found}\"`\n",
            "^".repeat(66)
        )
    );
    for name in ["vmlinuz", "vmlinuz.part"] {
        assert!(!folder.cached(&expected, name).exists(), "{name}");
    }
}

#[test]
fn a_server_that_ends_before_the_declared_length_is_asked_again_and_given_up() {
    let server = Server::start(|_, stream| {
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    });
    let folder = folder_for(&server);
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 1);
    let url = server.url("vmlinuz");
    let error = format!("error: cannot fetch {url}: the server has closed the connection\n");
    assert!(done.err.contains(&error), "{}", done.err);
    assert!(done.err.contains(" --> vm.toml:2:7\n"), "{}", done.err);
    assert!(
        done.err
            .ends_with("= help: 5 bytes are kept: the next start goes on there\n"),
        "{}",
        done.err
    );
    assert_eq!(server.asked().len(), 5);
}

#[test]
fn a_server_that_sends_more_than_it_declares_is_not_heard_to_the_end() {
    let content = content();
    let digest = sha256(&content);
    // What comes behind the declared end of an answer is no part of it.
    let flood = Server::start({
        let content = content.clone();
        move |request, stream| {
            head(request, stream, &content)?;
            stream.write_all(&content)?;
            loop {
                stream.write_all(&content)?;
            }
        }
    });
    let folder = folder_for(&flood);
    assert_eq!(folder.launcher(&["prepare"]).code, 0);
    assert_eq!(
        fs::read(folder.cached(&digest, "vmlinuz")).unwrap(),
        content
    );
    // A part of what it says is 12 bytes long, and does not end there.
    let liar = Server::start(|_, stream| {
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-11/12\r\n\r\n"
        )?;
        loop {
            stream.write_all(&[0; 4096])?;
        }
    });
    let folder = folder_for(&liar);
    folder.write(
        &format!("cache/launcher/files/{digest}/vmlinuz.part"),
        b"hello",
    );
    let done = folder.launcher(&["prepare"]);
    let url = liar.url("vmlinuz");
    let error = format!("error: {url} sends more than the 12 bytes that it said\n");
    assert!(done.code == 1 && done.err.contains(&error), "{done:?}");
}

#[test]
fn a_file_that_is_not_there_is_an_error_with_the_status_and_the_place() {
    for (answer, said, help) in [
        (
            "404 Not Found",
            "404 Not Found",
            "check the URL: the file may have moved",
        ),
        (
            "403 No",
            "403 Forbidden",
            "it is not for everybody: fetch it yourself, and give its `path`",
        ),
    ] {
        let server = Server::start(move |_, stream| status(stream, answer));
        let folder = folder_for(&server);
        let done = folder.launcher(&["prepare"]);
        let url = server.url("vmlinuz");
        assert_eq!(done.code, 1);
        assert_eq!(
            done.err,
            format!(
                "launcher: fetching {url}\n\
                 error: cannot fetch {url}: the server answers {said}\n --> vm.toml:2:7\n  |\n\
                 2 | url = \"{url}\"\n  |       {}\n  |\n  = help: {help}\n",
                "^".repeat(url.len() + 2)
            )
        );
        assert_eq!(server.asked().len(), 1, "it is not asked again");
    }
}

#[test]
fn redirects_are_followed_but_not_round_and_round() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request, stream| {
            let to = match &*request.path {
                "/vmlinuz" => "/b",
                "/b" => "/c",
                "/c" => return whole(request, stream, &content),
                round => round,
            };
            write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\
                 Connection: close\r\n\r\n"
            )
        }
    });
    let folder = folder_for(&server);
    assert_eq!(folder.launcher(&["prepare"]).code, 0);
    assert_eq!(server.asked().len(), 3);

    let url = server.url("round");
    let folder = Folder::new(&vm(&url, &sha256(&content)));
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 1);
    let error = format!("error: cannot fetch {url}: it redirects more than 10 times\n");
    assert!(done.err.contains(&error), "{}", done.err);
}

#[test]
fn what_is_missing_is_asked_for_behind_a_redirect_too() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request, stream| {
            if request.path == "/vmlinuz" {
                return write!(
                    stream,
                    "HTTP/1.1 307 Over there\r\nLocation: /b\r\nContent-Length: 0\r\n\
                     Connection: close\r\n\r\n"
                );
            }
            head(request, stream, &content)?;
            match request.from {
                None => stream.write_all(&content[..100_000]),
                Some(from) => stream.write_all(&content[from..]),
            }
        }
    });
    let folder = folder_for(&server);
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 0, "{done:?}");
    let twice = [None, None, Some(100_000), Some(100_000)];
    assert_eq!(server.ranges(), twice);
}

#[test]
fn a_host_without_a_server_is_an_error_soon() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/vmlinuz", gone.local_addr().unwrap());
    drop(gone);
    let folder = Folder::new(&vm(&url, &sha256(b"")));
    let done = folder.launcher(&["prepare"]);
    let error = format!("error: cannot fetch {url}: Connection refused\n");
    assert!(done.code == 1 && done.err.contains(&error), "{done:?}");
}

#[test]
fn two_launchers_at_once_share_one_download() {
    let content = content();
    let server = Server::start({
        let content = content.clone();
        move |request, stream| {
            head(request, stream, &content)?;
            stream.write_all(&content[..1000])?;
            stream.flush()?;
            thread::sleep(Duration::from_secs(1));
            stream.write_all(&content[1000..])
        }
    });
    let folder = folder_for(&server);
    let running: Vec<_> = (0..3)
        .map(|_| {
            let mut command = folder.command(&["prepare"]);
            let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    let done = running
        .into_iter()
        .map(|child| folder.told(child.wait_with_output().unwrap()));
    for done in done {
        assert_eq!(done.code, 0, "{done:?}");
        let of_two = [
            "launcher: fetching ",
            "launcher: waiting for another launcher that fetches ",
        ];
        assert!(
            of_two.iter().any(|said| done.err.starts_with(said)),
            "{done:?}"
        );
    }
    assert_eq!(server.asked().len(), 1);
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let server = Server::start(|request, stream| whole(request, stream, b""));
    let folder = folder_for(&server);
    folder.write("cache", "a file");
    let done = folder.launcher(&["prepare"]);
    assert_eq!(done.code, 1);
    assert!(
        done.err
            .starts_with("error: cannot create DIR/cache/launcher/files/"),
        "{}",
        done.err
    );
    assert!(
        done.err
            .ends_with("= help: XDG_CACHE_HOME sets where what is fetched is kept\n"),
        "{}",
        done.err
    );
}

#[test]
fn up_fetches_before_anything_else_and_shows_what_is_wrong_detached_too() {
    let server = Server::start(|_, stream| status(stream, "404 Not Found"));
    let folder = folder_for(&server);
    let error = format!(
        "error: cannot fetch {}: the server answers 404 Not Found\n --> vm.toml:2:7\n",
        server.url("vmlinuz")
    );
    for up in [&["up"][..], &["up", "--detach"]] {
        let done = folder.launcher(up);
        assert!(done.code == 1 && done.err.contains(&error), "{done:?}");
    }
}

#[test]
fn a_vm_boots_what_was_fetched() {
    let kernel = super::bare::kernel(super::bare::POWER_OFF);
    let digest = sha256(&kernel);
    let server = Server::start(move |request, stream| whole(request, stream, &kernel));
    let folder = Folder::new(&vm(&server.url("k"), &digest));
    let up = folder.command(&["up", "--force"]).output().unwrap();
    if let Some((code, errors)) = super::bare::ended(up) {
        assert_eq!(code, 0, "{errors}");
    }
    assert!(folder.cached(&digest, "k").exists());
}

#[test]
fn commands_that_only_look_fetch_nothing() {
    let server = Server::start(|request, stream| whole(request, stream, b""));
    let (url, kernel) = (server.url("a.img"), server.url("k"));
    let folder = Folder::new(&format!(
        "boot.kernel = {{ url = \"{kernel}\", sha256 = \"{}\" }}\n[[block]]\nurl = \"{url}\"\nsha256 = \"{}\"\nephemeral = true\n",
        sha256(b""),
        sha256(b"")
    ));
    folder.is_looked_at();
    assert!(server.asked().is_empty());
    assert!(!folder.path("cache/launcher/files").exists());
}
