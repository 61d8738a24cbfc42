//! A web server of a few lines, which behaves as a test wants it to.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Counted from 0.
    pub(crate) number: usize,
    pub(crate) path: String,
    /// `Some(5)` of "Range: bytes=5-".
    pub(crate) from: Option<usize>,
}

/// A connection.
pub(crate) trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

/// A server on this host, which ends with the test.
pub(crate) struct Server {
    address: SocketAddr,
    scheme: &'static str,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// That answers by `serve`, one connection at a time. It may stop in the middle.
    pub(crate) fn start(
        serve: impl Fn(&Request, &mut dyn Stream) -> io::Result<()> + Send + 'static,
    ) -> Server {
        Server::with("http", Ok, serve)
    }

    /// As [`Server::start`], for https.
    pub(crate) fn secure(
        config: Arc<ServerConfig>,
        serve: impl Fn(&Request, &mut dyn Stream) -> io::Result<()> + Send + 'static,
    ) -> Server {
        let wrap = move |stream| {
            let connection = ServerConnection::new(Arc::clone(&config));
            Ok(StreamOwned::new(
                connection.map_err(io::Error::other)?,
                stream,
            ))
        };
        Server::with("https", wrap, serve)
    }

    fn with<S: Stream>(
        scheme: &'static str,
        wrap: impl Fn(TcpStream) -> io::Result<S> + Send + 'static,
        serve: impl Fn(&Request, &mut dyn Stream) -> io::Result<()> + Send + 'static,
    ) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let answer = || -> io::Result<()> {
                    let mut stream = wrap(stream?)?;
                    let mut request = request(&mut stream)?;
                    let mut log = log.lock().unwrap();
                    request.number = log.len();
                    log.push(request.clone());
                    drop(log);
                    serve(&request, &mut stream)?;
                    stream.flush()
                };
                // The client may have left: that is its affair.
                let _ = answer();
            }
        });
        Server {
            address,
            scheme,
            asked,
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}://{}/{path}", self.scheme, self.address)
    }

    /// What was asked for so far.
    pub(crate) fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }

    /// Where each request wanted to begin.
    pub(crate) fn ranges(&self) -> Vec<Option<usize>> {
        self.asked().iter().map(|request| request.from).collect()
    }
}

fn request(stream: &mut impl Read) -> io::Result<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let path = lines.next().unwrap().split(' ').nth(1).unwrap();
    let range = lines.find_map(|line| {
        let line = line.to_ascii_lowercase();
        let from = line.strip_prefix("range: bytes=")?.strip_suffix('-')?;
        Some(from.parse().unwrap())
    });
    Ok(Request {
        number: 0,
        path: path.to_owned(),
        from: range,
    })
}

/// Answers with all of `content`, or with its end if that is asked for.
pub(crate) fn whole(request: &Request, stream: &mut dyn Stream, content: &[u8]) -> io::Result<()> {
    head(request, stream, content)?;
    stream.write_all(&content[request.from.unwrap_or(0)..])
}

/// What stands above that.
pub(crate) fn head(request: &Request, stream: &mut dyn Stream, content: &[u8]) -> io::Result<()> {
    let total = content.len();
    match request.from {
        None => write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {total}\r\nConnection: close\r\n\r\n"
        ),
        Some(from) => write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nConnection: close\r\n\
             Content-Range: bytes {from}-{}/{total}\r\n\r\n",
            total - from,
            total - 1
        ),
    }
}

/// Answers with a status and nothing else.
pub(crate) fn status(stream: &mut dyn Stream, status: &str) -> io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
}
