//! Servers that keep one waiting, or send more than there is room for.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;

use super::*;

const HELLO: &[u8] = b"hello, world";

/// A server on this host that has `serve` answer each request, by its number; its URL.
fn server(serve: impl Fn(usize, &mut TcpStream) -> io::Result<()> + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hello", listener.local_addr().unwrap());
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                match stream.read(&mut byte) {
                    Ok(1) => request.push(byte[0]),
                    _ => break,
                }
            }
            // The other side may have had enough.
            let _ = serve(number, &mut stream);
        }
    });
    url
}

/// A place for what is fetched, in a folder of its own.
struct Cache(tempfile::TempDir);

impl Cache {
    fn new() -> Self {
        Cache(tempfile::tempdir().unwrap())
    }

    fn place(&self) -> PathBuf {
        self.0.path().join("a/hello")
    }

    fn part(&self) -> PathBuf {
        self.0.path().join("a/hello.part")
    }

    fn fetch(&self, url: &str, limits: Limits) -> Result<(), String> {
        let place = self.place();
        let source = Source {
            url,
            place: &place,
            digest: Digest::of_bytes(HELLO),
            limits,
        };
        source.fetch().map_err(|failure| match failure {
            Failure::Url(error) | Failure::Digest(error) => {
                assert_eq!(error.exit, crate::exit::FAILED);
                let folder = self.0.path().to_str().unwrap();
                error.to_string().replace(url, "URL").replace(folder, "DIR")
            }
        })
    }
}

/// As patient as a test can be.
const SOON: Limits = Limits {
    silence: Duration::from_millis(200),
    attempts: 3,
    pause: Duration::from_millis(1),
    room: |_| Ok(u64::MAX),
};

#[test]
fn a_server_that_stalls_is_left_and_what_came_is_kept() {
    let cache = Cache::new();
    let url = server(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello")?;
        thread::sleep(Duration::from_secs(60));
        Ok(())
    });
    let begin = Instant::now();
    let error = cache.fetch(&url, SOON).unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_eq!(
        error,
        "error: cannot fetch URL: the server is silent\n\
         help: 5 bytes are kept: the next start goes on there"
    );
    assert_eq!(fs::read(cache.part()).unwrap(), b"hello");
    assert!(!cache.place().exists());
}

#[test]
fn a_server_that_takes_a_request_and_says_nothing_is_left() {
    let cache = Cache::new();
    let url = server(|_, _| {
        thread::sleep(Duration::from_secs(60));
        Ok(())
    });
    let error = cache.fetch(&url, SOON).unwrap_err();
    assert_eq!(error, "error: cannot fetch URL: the server is silent");
}

#[test]
fn a_server_that_is_slow_and_not_silent_is_waited_for() {
    let cache = Cache::new();
    let url = server(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n")?;
        for byte in HELLO {
            thread::sleep(Duration::from_millis(50));
            stream.write_all(&[*byte])?;
        }
        Ok(())
    });
    cache.fetch(&url, SOON).unwrap();
    assert_eq!(fs::read(cache.place()).unwrap(), HELLO);
}

#[test]
fn what_the_file_system_has_no_room_for_is_not_begun() {
    let cache = Cache::new();
    let url = server(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4398046511104\r\n\r\n")
    });
    let little = Limits {
        room: |_| Ok(1 << 20),
        ..SOON
    };
    let error = cache.fetch(&url, little).unwrap_err();
    assert_eq!(
        error,
        "error: cannot fetch URL: it takes 4TiB more, and there is room for 1MiB\n\
         help: make room on the file system of DIR/a/hello.part, or set XDG_CACHE_HOME to another"
    );
    assert_eq!(fs::metadata(cache.part()).unwrap().len(), 0);
}

#[test]
fn a_flood_without_a_declared_length_ends_where_the_room_does() {
    let cache = Cache::new();
    let url = server(|_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
        loop {
            stream.write_all(&[0; 1 << 16])?;
        }
    });
    let little = Limits {
        room: |file| Ok((40_u64 << 20).saturating_sub(file.metadata()?.len())),
        ..SOON
    };
    let error = cache.fetch(&url, little).unwrap_err();
    let (_, why) = error
        .split_once(" bytes were not the end, and there is room for ")
        .unwrap();
    assert!(why.contains("help: make room"), "{error}");
    assert!(fs::metadata(cache.part()).unwrap().len() < 41 << 20);
}

#[test]
fn a_server_that_is_in_trouble_for_a_time_is_asked_again() {
    let cache = Cache::new();
    let url = server(|number, stream| match number {
        0 => Ok(()),
        1 => stream.write_all(b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n"),
        _ => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, world"),
    });
    cache.fetch(&url, SOON).unwrap();
    assert_eq!(fs::read(cache.place()).unwrap(), HELLO);
}

#[test]
fn what_is_no_file_in_the_place_of_what_came_is_refused() {
    let url = server(|_, stream| stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello, world"));
    for (command, target) in [("mkfifo", None), ("ln", Some("../elsewhere"))] {
        let cache = Cache::new();
        fs::create_dir(cache.0.path().join("a")).unwrap();
        let mut link = std::process::Command::new(command);
        link.args(target.map(|target| ["-s", target]).into_iter().flatten());
        assert!(link.arg(cache.part()).status().unwrap().success());
        let said = cache.fetch(&url, LIMITS).unwrap_err();
        assert!(said.contains("hello.part"), "{said}");
        assert!(!cache.0.path().join("elsewhere").exists());
    }
}

#[test]
fn free_space_is_what_is_left_for_us() {
    let file = tempfile::tempfile().unwrap();
    let stat = rustix::fs::fstatvfs(&file).unwrap();
    let free = free_space(&file).unwrap();
    assert!(free < stat.f_blocks * stat.f_frsize, "{free}");
}
