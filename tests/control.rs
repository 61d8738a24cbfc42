//! The control socket under clients that mean no good, and its documentation word for word.
//!
//! What is flat is measured over the whole process, so that one test runs at a time.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use launcher::control::messages::{
    Event, Failure, FailureKind, How, Order, Progress, Resized, Size, Status, Stopped,
};
use launcher::control::{Client, Owner, Place, Publisher, Server, Subject};
use launcher::exit;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long an answer may take while others do their worst, on a host that is busy otherwise.
const PROMPT: Duration = Duration::from_secs(2);
/// How much more memory may be in use afterwards: bytes. Allocators keep a little.
const FLAT: u64 = 16 << 20;

fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The VM that docs/control.md tells of.
#[derive(Default)]
struct Web {
    publisher: OnceLock<Publisher>,
    stops: Mutex<u32>,
}

impl Web {
    fn publish(&self, event: Event) {
        self.publisher.get().unwrap().publish(event);
    }
}

impl Subject for Web {
    fn status(&self) -> Status {
        let documented = documented()
            .into_iter()
            .flatten()
            .find(|line| line.starts_with(r#"< {"id": 3"#));
        let answer: Value = serde_json::from_str(&documented.unwrap()[2..]).unwrap();
        serde_json::from_value(answer["ok"].clone()).unwrap()
    }

    fn obey(&self, order: Order, progress: &mut dyn FnMut(Progress)) -> Result<Value, Failure> {
        match order {
            Order::Resize(resize) if resize.disk == "0" => {
                assert_eq!(resize.size, Some(Size::Text("+1GiB".to_owned())));
                let (done, of) = (1 << 29, 1 << 30);
                progress(Progress { done, of });
                let resized = Resized {
                    disk: 0,
                    from: 1 << 30,
                    to: 2 << 30,
                };
                self.publish(Event::Resized(resized.clone()));
                Ok(serde_json::to_value(resized).unwrap())
            }
            Order::Resize(resize) => Err(Failure {
                kind: FailureKind::NoSuchDisk,
                message: format!("there is no disk `{}`", resize.disk),
                help: Some("the disks are 0 and ROOT".to_owned()),
                errno: None,
            }),
            Order::Stop { .. } => {
                *self.stops.lock().unwrap() += 1;
                Ok(Value::Null)
            }
            _ => Ok(Value::Null),
        }
    }

    fn attach(&self, connection: UnixStream, _: bool) -> Result<(), Failure> {
        (&connection).write_all(b"login: ").unwrap();
        Ok(())
    }
}

struct Vm {
    server: Server,
    web: Arc<Web>,
    place: Place,
    // Dropped in this order: the claim's folder is in the other.
    _claim: launcher::control::Claim,
    dir: TempDir,
}

fn owner() -> Owner {
    Owner {
        pid: std::process::id(),
        name: "web".to_owned(),
        file: PathBuf::from("/vms/web.toml"),
        started_ms: 0,
        laid: Default::default(),
    }
}

fn place(dir: &Path) -> Place {
    Place::under(&dir.join("launcher"), Some("web"), &owner().file).unwrap()
}

impl Vm {
    fn start() -> Vm {
        Vm::start_at(None)
    }

    fn start_at(socket: Option<&Path>) -> Vm {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        let claim = place.claim(&owner()).unwrap();
        let web = Arc::new(Web::default());
        let server = Server::start(&claim, socket, web.clone()).unwrap();
        assert!(web.publisher.set(server.publisher()).is_ok());
        Vm {
            server,
            web,
            place,
            _claim: claim,
            dir,
        }
    }

    fn socket(&self) -> PathBuf {
        self.place.socket()
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    /// How long an answer takes on a connection of its own.
    fn answer_time(&self) -> Duration {
        let begun = Instant::now();
        let mut client = Client::connect(&self.socket()).unwrap();
        let status = client.ask(Order::Status, &mut |_| {}).unwrap();
        assert_eq!(status["name"], "web");
        begun.elapsed()
    }
}

fn stopped() -> Stopped {
    Stopped {
        how: How::Guest,
        why: None,
        exit_code: 0,
    }
}

/// The process's open descriptors.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The process's memory: bytes.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

/// Waits until as few descriptors are open as before: a thread may close its own a little later.
#[track_caller]
fn descriptors_are_back_at(before: usize) {
    let end = Instant::now() + Duration::from_secs(5);
    while descriptors() > before {
        assert!(Instant::now() < end, "{} of {before}", descriptors());
        thread::sleep(Duration::from_millis(5));
    }
}

/// The examples of docs/control.md: the lines of each.
fn documented() -> Vec<Vec<String>> {
    let text = include_str!("../docs/control.md");
    let blocks = text.split("```").skip(1).step_by(2);
    let lines = |block: &str| block.trim().lines().map(str::to_owned).collect();
    blocks.map(lines).collect()
}

#[test]
fn every_example_of_the_documentation_is_true() {
    let _one = one_at_a_time();
    let examples = documented();
    assert_eq!(examples.len(), 4);
    for example in examples {
        let vm = Vm::start();
        let stream = vm.connect();
        let mut lines = BufReader::new(&stream).lines();
        let mut server = Some(vm.server);
        for line in example {
            match line.split_at(2) {
                ("> ", request) => {
                    writeln!(&stream, "{request}").unwrap();
                    if request.contains("stop") {
                        while *vm.web.stops.lock().unwrap() == 0 {
                            thread::sleep(Duration::from_millis(1));
                        }
                        server.take().unwrap().close(stopped());
                    }
                }
                ("< ", reply) => {
                    let expected: Value = serde_json::from_str(reply).unwrap();
                    let got: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
                    assert_eq!(got, expected);
                }
                _ => panic!("{line}"),
            }
        }
    }
}

#[test]
fn a_million_lines_of_rubbish_hold_up_nobody() {
    const CLIENTS: usize = 8;
    let _one = one_at_a_time();
    let vm = Vm::start();
    vm.answer_time();
    let (files, memory) = (descriptors(), resident());
    let deep = "[".repeat(200);
    let lines: Vec<Vec<u8>> = [
        b"x".to_vec(),
        b"\x00\x01\x02".to_vec(),
        b"\xff\xfe\xc3\x28".to_vec(),
        b"GET / HTTP/1.1\r".to_vec(),
        b"[]".to_vec(),
        b"}{".to_vec(),
        b"{".to_vec(),
        b"{\"command\":7}".to_vec(),
        b"{\"id\":1e99}".to_vec(),
        format!("{{\"command\":{deep}").into_bytes(),
    ]
    .map(|line| [line, b"\n".to_vec()].concat())
    .to_vec();
    // Mostly what is cheap to send: that is what a flood is made of.
    let mut piece = Vec::new();
    let mut count = 0;
    while count < 1000 {
        piece.extend(
            &lines[if count % 20 == 0 {
                count / 20 % lines.len()
            } else {
                count % 6
            }],
        );
        count += 1;
    }
    thread::scope(|scope| {
        let flood = |stream: UnixStream| {
            let reader = stream.try_clone().unwrap();
            let piece = &piece;
            scope.spawn(move || {
                for _ in 0..1_000_000 / 1000 / CLIENTS {
                    (&stream).write_all(piece).unwrap();
                }
                stream.shutdown(std::net::Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut answers = 0;
                let mut buffer = vec![0; 64 << 10];
                loop {
                    match (&reader).read(&mut buffer).unwrap() {
                        0 => break answers,
                        len => answers += buffer[..len].iter().filter(|b| **b == b'\n').count(),
                    }
                }
            })
        };
        let readers: Vec<_> = (0..CLIENTS).map(|_| flood(vm.connect())).collect();
        while readers.iter().any(|reader| !reader.is_finished()) {
            let took = vm.answer_time();
            assert!(took < PROMPT, "{took:?}");
            thread::sleep(Duration::from_millis(20));
        }
        // Every single one was answered.
        let answers = readers.into_iter().map(|reader| reader.join().unwrap());
        assert_eq!(answers.sum::<usize>(), 1_000_000);
    });
    descriptors_are_back_at(files);
    let grown = resident().saturating_sub(memory);
    assert!(grown < FLAT, "{grown} bytes");
}

#[test]
fn a_thousand_slow_connections_hold_up_nobody() {
    let _one = one_at_a_time();
    more_descriptors();
    let vm = Vm::start();
    let mut regular = Client::connect(&vm.socket()).unwrap();
    regular.ask(Order::Status, &mut |_| {}).unwrap();
    let (files, memory) = (descriptors(), resident());
    let mut slow = Vec::new();
    for count in 0..1000 {
        let stream = vm.connect();
        // Some are gone again already, to make room.
        let _ = (&stream).write_all(&b"{\"command\":\"status\"}"[..count % 20]);
        slow.push(stream);
        if count % 50 == 0 {
            let took = vm.answer_time();
            assert!(took < PROMPT, "{took:?}");
        }
    }
    // No more than 64 of them are kept, and who was served before is among these.
    let begun = Instant::now();
    regular.ask(Order::Status, &mut |_| {}).unwrap();
    assert!(begun.elapsed() < PROMPT);
    assert!(descriptors() <= files + slow.len() + 64);
    drop(slow);
    descriptors_are_back_at(files);
    let grown = resident().saturating_sub(memory);
    assert!(grown < FLAT, "{grown} bytes");
}

/// Raises the limit of open files: both ends of every connection are in this process.
fn more_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < 4096) {
        let current = Some(maximum.unwrap_or(4096).min(4096));
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    }
}

#[test]
fn a_subscriber_that_never_reads_is_cut_off_and_holds_up_nobody() {
    let _one = one_at_a_time();
    let vm = Vm::start();
    let (files, memory) = (descriptors(), resident());
    let deaf = vm.connect();
    (&deaf).write_all(b"{\"command\":\"subscribe\"}\n").unwrap();
    let good = Client::connect(&vm.socket()).unwrap().subscribe().unwrap();
    let mut good = good.map(Result::unwrap);
    for _ in 0..200 {
        for _ in 0..500 {
            vm.web.publish(Event::Paused);
        }
        for _ in 0..500 {
            assert_eq!(good.next(), Some(Event::Paused));
        }
    }
    assert!(vm.answer_time() < PROMPT);
    let grown = resident().saturating_sub(memory);
    assert!(grown < FLAT, "{grown} bytes");
    let mut got = 0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match (&deaf).read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(len) => got += len,
        }
    }
    // 100 000 events are 1.9 MB.
    assert!(got < 1 << 20, "{got} bytes");
    drop((deaf, good));
    descriptors_are_back_at(files);
}

#[test]
fn clients_that_are_open_at_the_end_hear_of_it_and_hold_nothing_up() {
    let _one = one_at_a_time();
    let files = descriptors();
    let vm = Vm::start();
    let open: Vec<_> = (0..30).map(|_| vm.connect()).collect();
    for (index, mut stream) in open.iter().enumerate() {
        let said: &[u8] = match index % 4 {
            0 => b"",
            1 => b"{\"comm",
            2 => b"{\"command\":\"subscribe\"}\n",
            _ => b"{\"command\":\"stop\"}\n",
        };
        stream.write_all(said).unwrap();
    }
    while *vm.web.stops.lock().unwrap() < 7 {
        thread::sleep(Duration::from_millis(1));
    }
    vm.answer_time();
    let begun = Instant::now();
    vm.server.close(stopped());
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    let end = json!({"how": "guest", "exit_code": 0});
    let event = json!({"event": "stopped", "how": "guest", "exit_code": 0});
    for (index, mut stream) in open.into_iter().enumerate() {
        let mut heard = String::new();
        stream.read_to_string(&mut heard).unwrap();
        let heard: Vec<Value> = heard
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        match index % 4 {
            2 => assert_eq!(heard, [json!({"ok": {}}), event.clone()]),
            3 => assert_eq!(heard, [json!({"ok": end})]),
            _ => assert!(heard.is_empty(), "{heard:?}"),
        }
    }
    drop((vm._claim, vm.web));
    descriptors_are_back_at(files);
}

/// Whether a test can do what only root can. Where it cannot, the line that says so goes past what
/// the test runner keeps to itself; `./test` fails if root gets to see one.
fn is_root(test: &str, does: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let line = format!("skipped: {test}: only root can {does}\n");
        std::io::stdout().write_all(line.as_bytes()).unwrap();
    }
    root
}

#[test]
fn another_user_is_not_served() {
    let _one = one_at_a_time();
    if !is_root("another_user_is_not_served", "become another user") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = dir.path().join("my.sock");
    let vm = Vm::start_at(Some(&socket));
    let files = descriptors();

    // The socket's mode keeps him out, and so does the folder's.
    for path in [&socket, &vm.socket()] {
        let error = as_nobody(|| UnixStream::connect(path)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    }
    // Where it does not, he is sent away without a word.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    for _ in 0..100 {
        let mut stream = as_nobody(|| UnixStream::connect(&socket)).unwrap();
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).unwrap();
        // He may be gone by now.
        let _ = stream.write_all(b"{\"command\":\"status\"}\n");
        let mut heard = Vec::new();
        let _ = stream.read_to_end(&mut heard);
        assert_eq!(heard, b"");
    }
    assert!(vm.answer_time() < PROMPT);
    assert!(Client::connect(&socket).is_ok());
    descriptors_are_back_at(files);
}

/// Does something as the user 65534. Credentials are a thread's own in Linux.
fn as_nobody<T: Send>(what: impl FnOnce() -> T + Send) -> T {
    let nobody = Some(rustix::process::Uid::from_raw(65534));
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            what()
        });
        thread.join().unwrap()
    })
}

#[test]
fn a_folder_of_another_user_is_refused() {
    let _one = one_at_a_time();
    if !is_root("a_folder_of_another_user_is_refused", "give a folder away") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let place = place(dir.path());
    drop(place.claim(&owner()).unwrap());
    for folder in [place.folder(), dir.path().join("launcher")] {
        std::os::unix::fs::chown(&folder, Some(65534), None).unwrap();
        let error = place.claim(&owner()).err().unwrap();
        let expected = format!(
            "error: `{}` belongs to user 65534, expected user 0\nhelp: remove it, or set",
            folder.display()
        );
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert!(place.owner().is_err());
        std::os::unix::fs::chown(&folder, Some(0), None).unwrap();
    }
}

#[test]
fn a_link_in_the_place_of_a_folder_or_a_socket_leads_nowhere() {
    let _one = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o700)).unwrap();
    let place = place(dir.path());
    symlink(&target, dir.path().join("launcher")).unwrap();
    assert!(place.claim(&owner()).is_err());
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    fs::remove_file(dir.path().join("launcher")).unwrap();

    // Between the claim and the socket.
    let claim = place.claim(&owner()).unwrap();
    symlink(target.join("control.sock"), place.socket()).unwrap();
    let error = Server::start(&claim, None, Arc::new(Web::default()));
    let error = error.err().unwrap().to_string();
    assert!(error.contains("Address already in use"), "{error}");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

/// A process that runs this test from its beginning, and so a VM in this session's folder.
fn other_process(test: &str, dir: &Path) -> Child {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LAUNCHER_TEST_RUN", "1")
        .env("XDG_RUNTIME_DIR", dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let place = place(dir);
    let end = Instant::now() + Duration::from_secs(20);
    while !place.socket().exists() {
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < end);
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn the_socket_of_one_who_was_killed_is_taken_over() {
    if env::var_os("LAUNCHER_TEST_RUN").is_some() {
        let place = Place::of(Some("web"), &owner().file).unwrap();
        let claim = place.claim(&owner()).unwrap();
        let _server = Server::start(&claim, None, Arc::new(Web::default())).unwrap();
        loop {
            thread::sleep(Duration::from_secs(60));
        }
    }
    let _one = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    let place = place(dir.path());
    let mut child = other_process("the_socket_of_one_who_was_killed_is_taken_over", dir.path());

    // As long as it runs it has the place.
    let error = place.claim(&owner()).err().unwrap();
    assert_eq!(error.exit, exit::ALREADY_RUNNING);
    let expected = format!("already running: process {},", child.id());
    assert!(error.to_string().contains(&expected), "{error}");
    assert_eq!(place.owner().unwrap().unwrap().pid, child.id());
    assert!(Client::connect(&place.socket()).is_ok());

    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(place.owner().unwrap(), None);
    assert_eq!(place.last_owner().unwrap().pid, child.id());
    let error = Client::connect(&place.socket()).err().unwrap();
    assert_eq!(error.exit, exit::NOT_RUNNING);

    let claim = place.claim(&owner()).unwrap();
    let _server = Server::start(&claim, None, Arc::new(Web::default())).unwrap();
    assert!(Client::connect(&place.socket()).is_ok());
}

#[test]
fn a_client_asks_hears_progress_subscribes_and_attaches() {
    let _one = one_at_a_time();
    let vm = Vm::start();
    let mut client = Client::connect(&vm.socket()).unwrap();
    let resize = |disk: &str| {
        Order::Resize(launcher::control::messages::Resize {
            disk: disk.to_owned(),
            size: Some(Size::Text("+1GiB".to_owned())),
            shrink: false,
            force: false,
        })
    };
    let mut events = Client::connect(&vm.socket()).unwrap().subscribe().unwrap();
    let mut heard = Vec::new();
    let resized = client.ask(resize("0"), &mut |progress| heard.push(progress));
    assert_eq!(resized.unwrap()["to"], 2u64 << 30);
    let (done, of) = (1 << 29, 1 << 30);
    assert_eq!(heard, [Progress { done, of }]);
    let event = events.next().unwrap().unwrap();
    assert!(matches!(event, Event::Resized(_)), "{event:?}");

    let error = client.ask(resize("9"), &mut |_| {}).unwrap_err();
    assert_eq!(
        error.to_string(),
        "error: there is no disk `9`\nhelp: the disks are 0 and ROOT"
    );
    assert_eq!(error.exit, exit::USAGE);

    let mut console = client.console(true).unwrap();
    let mut text = String::new();
    console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "login: ");

    let stop = thread::spawn({
        let mut client = Client::connect(&vm.socket()).unwrap();
        move || client.ask(Order::Stop { timeout_ms: None }, &mut |_| {})
    });
    while *vm.web.stops.lock().unwrap() == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    vm.server.close(stopped());
    let end: Stopped = serde_json::from_value(stop.join().unwrap().unwrap()).unwrap();
    assert_eq!(end, stopped());
    assert_eq!(events.next().unwrap().unwrap(), Event::Stopped(stopped()));
    assert!(events.next().is_none());
    assert!(vm.dir.path().exists());
}
