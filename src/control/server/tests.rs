use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex};
use std::time::Instant;
use std::{fs, iter};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::messages::{FailureKind, How, MemoryStatus, Order, State, Status, VcpuStatus};
use super::super::place::{Owner, Place};
use super::*;

/// A VM that does what a test tells it to.
#[derive(Default)]
struct Fake {
    /// What it has been asked, in order.
    asked: Mutex<Vec<Order>>,
    /// `resume` and `status` take until this is false.
    held: Mutex<bool>,
    changed: Condvar,
    no_console: bool,
}

impl Fake {
    fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.changed.notify_all();
    }

    fn wait_until_let_go(&self) {
        let held = self.held.lock().unwrap();
        drop(self.changed.wait_while(held, |held| *held).unwrap());
    }

    /// Waits until so many orders have arrived.
    fn wait_until_asked(&self, count: usize) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.asked.lock().unwrap().len() < count {
            assert!(Instant::now() < end, "{:?}", self.asked.lock().unwrap());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn failure(kind: FailureKind, message: &str) -> Failure {
    Failure {
        kind,
        message: message.to_owned(),
        help: None,
        errno: None,
    }
}

impl Subject for Fake {
    fn status(&self) -> Status {
        self.asked.lock().unwrap().push(Order::Status);
        self.wait_until_let_go();
        Status {
            name: "web".to_owned(),
            file: "/vms/web.toml".to_owned(),
            pid: 1,
            state: State::Running,
            booted: false,
            uptime_ms: 5,
            vcpus: vec![VcpuStatus { time_ms: 3 }],
            memory: MemoryStatus {
                size: 1 << 30,
                resident: 1 << 20,
            },
            disks: Vec::new(),
        }
    }

    fn obey(&self, order: Order, progress: &mut dyn FnMut(Progress)) -> Result<Value, Failure> {
        self.asked.lock().unwrap().push(order.clone());
        match order {
            Order::Pause => Ok(json!({"paused": true})),
            Order::Resume => {
                progress(Progress { done: 1, of: 2 });
                self.wait_until_let_go();
                Ok(json!("resumed"))
            }
            Order::Reboot => panic!("the reboot goes wrong"),
            Order::Resize(_) => Err(Failure {
                errno: Some(28),
                help: Some("free some".to_owned()),
                ..failure(FailureKind::Host, "no room")
            }),
            Order::Stop {
                timeout_ms: Some(0),
            } => Err(failure(FailureKind::Invalid, "too soon")),
            _ => Ok(Value::Null),
        }
    }

    fn may_attach(&self) -> Result<(), Failure> {
        match self.no_console {
            true => Err(failure(FailureKind::Unsupported, "there is no console")),
            false => Ok(()),
        }
    }

    fn attach(&self, mut connection: UnixStream, scrollback: bool) -> Result<(), Failure> {
        thread::spawn(move || {
            if scrollback {
                connection.write_all(b"before ").unwrap();
            }
            let mut typed = Vec::new();
            connection.read_to_end(&mut typed).unwrap();
            connection.write_all(&typed.to_ascii_uppercase()).unwrap();
        });
        Ok(())
    }
}

/// A server and the folder it is in.
struct Vm {
    fake: Arc<Fake>,
    server: Option<Server>,
    place: Place,
    claim: Claim,
    dir: TempDir,
}

fn quick() -> Limits {
    Limits {
        patience: Duration::from_millis(200),
        farewell: Duration::from_millis(300),
        ..Limits::default()
    }
}

impl Vm {
    fn start() -> Vm {
        Vm::start_with(Limits::default(), Fake::default())
    }

    fn start_with(limits: Limits, fake: Fake) -> Vm {
        Vm::start_at(limits, fake, None).unwrap()
    }

    fn start_at(limits: Limits, fake: Fake, socket: Option<&Path>) -> Result<Vm> {
        let dir = tempfile::tempdir().unwrap();
        let file = PathBuf::from("/vms/web.toml");
        let place = Place::under(&dir.path().join("launcher"), Some("web"), &file).unwrap();
        let owner = Owner {
            pid: 1,
            name: "web".to_owned(),
            file,
            started_ms: 0,
            laid: Default::default(),
        };
        let claim = place.claim(&owner).unwrap();
        let fake = Arc::new(fake);
        let server = Some(Server::start_with(&claim, socket, fake.clone(), limits)?);
        Ok(Vm {
            fake,
            server,
            place,
            claim,
            dir,
        })
    }

    fn client(&self) -> Raw {
        Raw::connect(&self.place.socket())
    }

    fn publish(&self, event: Event) {
        self.server.as_ref().unwrap().publisher().publish(event);
    }

    fn close(&mut self) {
        self.server.take().unwrap().close(Stopped {
            how: How::Guest,
            why: None,
            exit_code: 0,
        });
    }
}

/// A client that writes and reads lines, whatever they are.
struct Raw(BufReader<UnixStream>);

impl Raw {
    fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        Raw(BufReader::new(stream))
    }

    fn say(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, line: &str) -> Value {
        self.say(line);
        self.say("\n");
        self.hear()
    }

    /// Nothing more comes.
    fn is_at_end(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0))
    }
}

fn kind(answer: &Value) -> &str {
    answer["error"]["kind"].as_str().unwrap()
}

const STOPPED: &str = r#"{"how":"guest","exit_code":0}"#;

fn stopped() -> Value {
    serde_json::from_str(STOPPED).unwrap()
}

#[test]
fn a_request_is_answered_with_its_id() {
    let vm = Vm::start();
    let mut client = vm.client();
    let answer = client.ask(r#"{"id":7,"command":"status"}"#);
    assert_eq!(answer["id"], 7);
    assert_eq!(answer["ok"]["name"], "web");
    let answer = client.ask(r#"{"command":"pause"}"#);
    assert_eq!(answer, json!({"ok": {"paused": true}}));
}

#[test]
fn a_failure_has_its_kind_message_help_and_error_number() {
    let vm = Vm::start();
    let answer = vm
        .client()
        .ask(r#"{"id":1,"command":"resize","arguments":{"disk":"0","size":1}}"#);
    let expected = json!({"id": 1, "error": {
        "kind": "host", "message": "no room", "help": "free some", "errno": 28,
    }});
    assert_eq!(answer, expected);
}

#[test]
fn a_line_that_is_no_request_is_answered_and_the_next_one_served() {
    let vm = Vm::start();
    let mut client = vm.client();
    let deep = format!(r#"{{"command":"status","arguments":{}"#, "[".repeat(60_000));
    let lines = [
        "nonsense",
        "[]",
        r#"[1,"status",null]"#,
        "{",
        "null",
        "\u{0}",
        &deep,
        r#"{"command":"fly"}"#,
        r#"{"command":"stop","arguments":{"now":true}}"#,
    ];
    for line in lines {
        let answer = client.ask(line);
        assert_eq!(kind(&answer), "invalid", "{answer}");
    }
    // An empty one is none, as from a return key too many.
    client.say("\n \r\n");
    assert_eq!(client.ask(r#"{"command":"status"}"#)["ok"]["pid"], 1);
}

#[test]
fn bytes_that_are_no_text_are_answered_too() {
    let vm = Vm::start();
    let mut client = vm.client();
    client
        .0
        .get_mut()
        .write_all(b"\xff\xfe{\"\xc3\x28\n")
        .unwrap();
    assert_eq!(kind(&client.hear()), "invalid");
    client
        .0
        .get_mut()
        .write_all(b"{\"command\":\"\xff\"}\n")
        .unwrap();
    assert_eq!(kind(&client.hear()), "invalid");
}

#[test]
fn a_line_of_64_kib_is_read_and_a_longer_one_ends_the_connection() {
    let vm = Vm::start();
    let mut client = vm.client();
    let line = r#"{"command":"status"}"#;
    let longest = format!("{line}{}", " ".repeat(65536 - line.len()));
    assert_eq!(client.ask(&longest)["ok"]["pid"], 1);
    client.say(&format!("{longest} "));
    let answer = client.hear();
    assert_eq!(
        answer["error"]["message"],
        "a line is longer than 65536 bytes"
    );
    assert!(client.is_at_end());
}

#[test]
fn a_connection_without_a_line_ends_in_time() {
    let vm = Vm::start_with(quick(), Fake::default());
    let mut silent = vm.client();
    let mut unfinished = vm.client();
    unfinished.say(r#"{"command":"#);
    for client in [&mut silent, &mut unfinished] {
        assert_eq!(kind(&client.hear()), "invalid");
        assert!(client.is_at_end());
    }
}

#[test]
fn to_send_a_line_byte_by_byte_wins_no_time() {
    let vm = Vm::start_with(quick(), Fake::default());
    let mut client = vm.client();
    let begun = Instant::now();
    let sent = iter::repeat_with(|| {
        thread::sleep(Duration::from_millis(20));
        client.0.get_mut().write_all(b" ")
    });
    sent.take_while(Result::is_ok).take(500).count();
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_subscriber_and_one_with_an_order_may_be_silent() {
    let vm = Vm::start_with(quick(), Fake::default());
    vm.fake.hold(true);
    let (mut subscriber, mut other) = (vm.client(), vm.client());
    assert_eq!(
        subscriber.ask(r#"{"command":"subscribe"}"#),
        json!({"ok": {}})
    );
    let answer = other.ask(r#"{"command":"resume"}"#);
    assert_eq!(answer, json!({"progress": {"done": 1, "of": 2}}));
    thread::sleep(Duration::from_millis(500));
    vm.fake.hold(false);
    assert_eq!(other.hear(), json!({"ok": "resumed"}));
    vm.publish(Event::Booted);
    assert_eq!(subscriber.hear(), json!({"event": "booted"}));
}

#[test]
fn one_order_at_a_time_is_carried_out_for_a_connection() {
    let vm = Vm::start();
    vm.fake.hold(true);
    let mut client = vm.client();
    client.say("{\"id\":1,\"command\":\"resume\"}\n{\"id\":2,\"command\":\"pause\"}\n");
    assert_eq!(
        client.hear(),
        json!({"id": 1, "progress": {"done": 1, "of": 2}})
    );
    // Others are served meanwhile, which takes the thread past the second line.
    assert_eq!(
        vm.client().ask(r#"{"command":"subscribe"}"#),
        json!({"ok": {}})
    );
    assert_eq!(*vm.fake.asked.lock().unwrap(), [Order::Resume]);
    vm.fake.hold(false);
    assert_eq!(client.hear(), json!({"id": 1, "ok": "resumed"}));
    assert_eq!(client.hear(), json!({"id": 2, "ok": {"paused": true}}));
}

#[test]
fn orders_at_once_are_bounded_and_stop_gets_through() {
    let mut vm = Vm::start();
    vm.fake.hold(true);
    let mut clients: Vec<_> = iter::repeat_with(|| vm.client()).take(8).collect();
    for client in &mut clients {
        client.say("{\"command\":\"resume\"}\n");
    }
    vm.fake.wait_until_asked(8);
    assert_eq!(kind(&vm.client().ask(r#"{"command":"pause"}"#)), "busy");
    let mut stop = vm.client();
    stop.say("{\"command\":\"stop\"}\n");
    vm.fake.wait_until_asked(9);
    vm.fake.hold(false);
    for client in &mut clients {
        assert!(client.hear()["progress"].is_object());
        assert_eq!(client.hear(), json!({"ok": "resumed"}));
    }
    assert_eq!(
        vm.client().ask(r#"{"command":"pause"}"#)["ok"]["paused"],
        true
    );
    vm.close();
    assert_eq!(stop.hear(), json!({"ok": stopped()}));
}

#[test]
fn who_asks_for_the_end_is_answered_with_how_it_came() {
    let mut vm = Vm::start();
    let (mut stop, mut kill, mut early) = (vm.client(), vm.client(), vm.client());
    stop.say("{\"id\":1,\"command\":\"stop\"}\n");
    vm.fake.wait_until_asked(1);
    kill.say("{\"command\":\"kill\"}\n");
    vm.fake.wait_until_asked(2);
    // One that is not even begun is answered at once, and the connection goes on.
    let answer = early.ask(r#"{"command":"stop","arguments":{"timeout_ms":0}}"#);
    assert_eq!(answer["error"]["message"], "too soon");
    assert_eq!(early.ask(r#"{"command":"status"}"#)["ok"]["pid"], 1);

    vm.close();
    assert_eq!(stop.hear(), json!({"id": 1, "ok": stopped()}));
    assert_eq!(kill.hear(), json!({"ok": stopped()}));
    for mut client in [stop, kill, early] {
        assert!(client.is_at_end());
    }
    assert!(!vm.place.socket().exists());
}

#[test]
fn another_order_that_is_underway_at_the_end_is_told_so() {
    let mut vm = Vm::start();
    vm.fake.hold(true);
    let mut client = vm.client();
    client.say("{\"id\":1,\"command\":\"resume\"}\n");
    assert!(client.hear()["progress"].is_object());
    let begun = Instant::now();
    vm.close();
    assert!(begun.elapsed() < Duration::from_secs(2));
    let answer = client.hear();
    assert_eq!((kind(&answer), &answer["id"]), ("ending", &json!(1)));
    vm.fake.hold(false);
}

#[test]
fn a_server_that_goes_without_an_end_to_tell_says_that() {
    let mut vm = Vm::start();
    let mut client = vm.client();
    client.say("{\"command\":\"stop\"}\n");
    vm.fake.wait_until_asked(1);
    drop(vm.server.take());
    assert_eq!(kind(&client.hear()), "ending");
    assert!(client.is_at_end());
}

#[test]
fn subscribers_get_every_event_in_order_and_the_end_last() {
    let mut vm = Vm::start();
    let mut clients = [vm.client(), vm.client()];
    for client in &mut clients {
        assert_eq!(client.ask(r#"{"id":1,"command":"subscribe"}"#)["id"], 1);
    }
    for _ in 0..100 {
        vm.publish(Event::Paused);
        vm.publish(Event::Resumed);
    }
    vm.close();
    for client in &mut clients {
        for _ in 0..100 {
            assert_eq!(client.hear(), json!({"event": "paused"}));
            assert_eq!(client.hear(), json!({"event": "resumed"}));
        }
        let last = json!({"event": "stopped", "how": "guest", "exit_code": 0});
        assert_eq!(client.hear(), last);
        assert!(client.is_at_end());
    }
}

#[test]
fn who_has_not_subscribed_gets_no_event() {
    let vm = Vm::start();
    let mut client = vm.client();
    client.ask(r#"{"command":"status"}"#);
    vm.publish(Event::Booted);
    assert!(client.ask(r#"{"command":"status"}"#)["ok"].is_object());
}

#[test]
fn subscribers_lose_their_connection_rather_than_an_event() {
    let limits = Limits {
        events: 10,
        ..Limits::default()
    };
    let vm = Vm::start_with(limits, Fake::default());
    let (mut subscriber, mut other) = (vm.client(), vm.client());
    subscriber.ask(r#"{"command":"subscribe"}"#);
    vm.fake.hold(true);
    other.say("{\"command\":\"status\"}\n");
    vm.fake.wait_until_asked(1);
    for _ in 0..11 {
        vm.publish(Event::Booted);
    }
    vm.fake.hold(false);
    for _ in 0..10 {
        assert_eq!(subscriber.hear(), json!({"event": "booted"}));
    }
    assert_eq!(kind(&subscriber.hear()), "busy");
    assert!(subscriber.is_at_end());
    assert!(other.hear()["ok"].is_object());
}

#[test]
fn a_reply_that_nobody_reads_holds_up_its_own_connection_alone() {
    let vm = Vm::start_with(quick(), Fake::default());
    let mut deaf = UnixStream::connect(vm.place.socket()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    // Until the requests back up, and the answers with them.
    let lines = "{\"command\":\"status\"}\n".repeat(500);
    let begun = Instant::now();
    let sent = iter::repeat_with(|| match deaf.write(lines.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            thread::sleep(Duration::from_millis(1));
            true
        }
        sent => sent.is_ok(),
    });
    // It is cut off.
    sent.take_while(|sent| *sent && begun.elapsed().as_secs() < 10)
        .count();
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(vm.client().ask(r#"{"command":"status"}"#)["ok"]["pid"], 1);
}

#[test]
fn a_console_gets_what_was_typed_behind_its_request() {
    let vm = Vm::start();
    for (scrollback, expected) in [(false, "LS -L\n"), (true, "before LS -L\n")] {
        let mut client = vm.client();
        client.say(&format!(
            "{{\"command\":\"console\",\"arguments\":{{\"scrollback\":{scrollback}}}}}\nls"
        ));
        assert_eq!(client.hear(), json!({"ok": {}}));
        client.say(" -l\n");
        client
            .0
            .get_mut()
            .shutdown(std::net::Shutdown::Write)
            .unwrap();
        let mut text = String::new();
        client.0.read_to_string(&mut text).unwrap();
        assert_eq!(text, expected);
    }
}

#[test]
fn a_console_that_is_not_to_be_had_leaves_the_connection_as_it_was() {
    let fake = Fake {
        no_console: true,
        ..Fake::default()
    };
    let vm = Vm::start_with(Limits::default(), fake);
    let mut client = vm.client();
    assert_eq!(kind(&client.ask(r#"{"command":"console"}"#)), "unsupported");
    assert_eq!(client.ask(r#"{"command":"status"}"#)["ok"]["pid"], 1);
}

#[test]
fn the_longest_idle_connection_makes_room_for_a_new_one() {
    let limits = Limits {
        connections: 3,
        subscribers: 2,
        ..Limits::default()
    };
    let vm = Vm::start_with(limits, Fake::default());
    let (mut good, mut subscriber) = (vm.client(), vm.client());
    good.ask(r#"{"command":"status"}"#);
    subscriber.ask(r#"{"command":"subscribe"}"#);
    let mut silent = vm.client();
    let mut new = vm.client();
    new.ask(r#"{"command":"subscribe"}"#);
    // The one that never said a word went first.
    assert_eq!(kind(&silent.hear()), "busy");
    assert!(silent.is_at_end());
    good.ask(r#"{"command":"status"}"#);
    assert_eq!(kind(&good.ask(r#"{"command":"subscribe"}"#)), "busy");
    vm.publish(Event::Booted);
    assert_eq!(subscriber.hear(), json!({"event": "booted"}));
    assert_eq!(new.hear(), json!({"event": "booted"}));
}

#[test]
fn a_newcomer_is_sent_away_where_everybody_is_needed() {
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let vm = Vm::start_with(limits, Fake::default());
    let mut clients = [vm.client(), vm.client()];
    for client in &mut clients {
        client.ask(r#"{"command":"subscribe"}"#);
    }
    let mut new = vm.client();
    assert_eq!(kind(&new.hear()), "busy");
    assert!(new.is_at_end());
    drop(clients);
    // Two places are free again.
    let end = Instant::now() + Duration::from_secs(10);
    while kind_of_first(&mut vm.client()).is_some() {
        assert!(Instant::now() < end);
    }
}

/// The kind of failure that a status is answered with, if with any.
fn kind_of_first(client: &mut Raw) -> Option<String> {
    // It may be gone before it is asked.
    let _ = client.0.get_mut().write_all(b"{\"command\":\"status\"}\n");
    let answer = client.hear();
    answer["error"]["kind"].as_str().map(str::to_owned)
}

#[test]
fn who_closes_his_end_after_a_request_is_still_answered() {
    let vm = Vm::start();
    let mut client = vm.client();
    client.say("{\"command\":\"pause\"}\n{\"command\":\"status\"}\n");
    client
        .0
        .get_mut()
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    assert_eq!(client.hear()["ok"]["paused"], true);
    assert_eq!(client.hear()["ok"]["pid"], 1);
    assert!(client.is_at_end());
}

#[test]
fn the_last_line_needs_no_line_feed() {
    let vm = Vm::start();
    for (line, answer) in [
        (r#"{"command":"pause"}"#, "ok"),
        (r#"{"command":"pause""#, "error"),
    ] {
        let mut client = vm.client();
        client.say(line);
        client
            .0
            .get_mut()
            .shutdown(std::net::Shutdown::Write)
            .unwrap();
        assert!(client.hear()[answer].is_object());
        assert!(client.is_at_end());
    }
}

#[test]
fn a_status_keeps_the_order_of_its_documentation() {
    let vm = Vm::start();
    let mut client = vm.client();
    client.say("{\"command\":\"status\"}\n");
    let mut line = String::new();
    client.0.read_line(&mut line).unwrap();
    let expected = r#"{"ok":{"name":"web","file":"/vms/web.toml","pid":1,"state":"running","#;
    assert!(line.starts_with(expected), "{line}");
}

#[test]
fn an_order_that_goes_wrong_inside_is_answered_and_frees_its_place() {
    let vm = Vm::start();
    let mut client = vm.client();
    for _ in 0..20 {
        assert_eq!(kind(&client.ask(r#"{"command":"reboot"}"#)), "host");
    }
    assert_eq!(client.ask(r#"{"command":"pause"}"#)["ok"]["paused"], true);
}

#[test]
fn the_socket_is_its_users_alone() {
    let vm = Vm::start();
    let meta = fs::symlink_metadata(vm.place.socket()).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_socket_elsewhere_is_one_more_and_goes_with_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("my.sock");
    // Somebody was killed there.
    drop(UnixListener::bind(&path).unwrap());
    let mut vm = Vm::start_at(Limits::default(), Fake::default(), Some(&path)).unwrap();
    let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for socket in [&path, &vm.place.socket()] {
        let answer = Raw::connect(socket).ask(r#"{"command":"status"}"#);
        assert_eq!(answer["ok"]["pid"], 1);
    }
    vm.close();
    assert!(!path.exists());
}

#[test]
fn a_socket_elsewhere_takes_the_place_of_nothing_but_a_dead_socket() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let link = dir.path().join("link");
    symlink(&file, &link).unwrap();
    let live = dir.path().join("live");
    let _listener = UnixListener::bind(&live).unwrap();
    let live_link = dir.path().join("live-link");
    symlink(dir.path().join("nowhere"), &live_link).unwrap();
    for (path, why) in [
        (&file, "what is there is no socket"),
        (&link, "what is there is no socket"),
        (&live_link, "what is there is no socket"),
        (&live, "another process listens there"),
        (&dir.path().join("no/folder"), "No such file or directory"),
    ] {
        let error = Vm::start_at(Limits::default(), Fake::default(), Some(path));
        let error = error.err().unwrap().to_string();
        let expected = format!("error: cannot listen at `{}`: {why}", path.display());
        assert!(error.starts_with(&expected), "{error}");
        assert!(
            error.ends_with("help: name another place with `--socket PATH`"),
            "{error}"
        );
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert!(!dir.path().join("nowhere").exists());
}

#[test]
fn a_folder_that_has_been_exchanged_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let file = PathBuf::from("/vms/web.toml");
    let place = Place::under(&dir.path().join("launcher"), Some("web"), &file).unwrap();
    let owner = Owner {
        pid: 1,
        name: "web".to_owned(),
        file,
        started_ms: 0,
        laid: Default::default(),
    };
    let claim = place.claim(&owner).unwrap();
    fs::rename(place.folder(), dir.path().join("launcher/old")).unwrap();
    fs::create_dir(place.folder()).unwrap();
    let error = Server::start(&claim, None, Arc::new(Fake::default()));
    let error = error.err().unwrap().to_string();
    assert!(
        error.contains("is not the folder that was locked any more"),
        "{error}"
    );
    assert!(!place.socket().exists());
}

#[test]
fn a_path_that_is_too_long_for_an_address_works_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("d".repeat(150));
    fs::create_dir(&folder).unwrap();
    let path = folder.join("control.sock");
    let mut vm = Vm::start_at(Limits::default(), Fake::default(), Some(&path)).unwrap();
    let mut client = super::super::Client::connect(&path).unwrap();
    let status = client.ask(Order::Status, &mut |_| {}).unwrap();
    assert_eq!(status["pid"], 1);
    vm.close();
    assert!(!path.exists());
}

#[test]
fn the_end_does_not_wait_for_a_client_that_does_not_read() {
    let mut vm = Vm::start_with(quick(), Fake::default());
    let mut deaf = UnixStream::connect(vm.place.socket()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let lines = "{\"command\":\"status\"}\n".repeat(20_000);
    // As much as it takes.
    let _ = deaf.write(lines.as_bytes());
    let mut stop = vm.client();
    stop.say("{\"command\":\"stop\"}\n");
    vm.fake.wait_until_asked(1);
    let begun = Instant::now();
    vm.close();
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(stop.hear(), json!({"ok": stopped()}));
    drop(vm.claim);
    drop(vm.dir);
}
